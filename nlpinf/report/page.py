"""Builds the page: reads a scores store, makes the charts, fills the template. Everything that is text is escaped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nlpinf.errors import BadInput
from nlpinf.report import svg
from nlpinf.report.notices import notices
from nlpinf.report.numbers import count, figure, in_column, power_of_ten, shared_power, superscript
from nlpinf.report.tokens import Piece, Shader, located


class ScoresLike(Protocol):
    """What the page reads of `nlpinf.scoring.Scores`."""

    @property
    def manifest(self) -> dict[str, Any]: ...

    def top(self, k: int, query: int = 0, helpful: bool = False) -> Sequence[Any]: ...

    def column(self, query: int = 0) -> np.ndarray: ...


def write(
    scores: ScoresLike,
    path: str | os.PathLike[str],
    *,
    examples: int = 20,
    tokenizer: Any = None,
    removal: Sequence[Mapping[str, Any]] | None = None,
    shade: Shader | None = None,
    newton: Mapping[int, Sequence[float]] | None = None,
) -> Path:
    """Write the report of a scores folder as one HTML page that needs no network, and return its path.

    `examples`   sentences in each list of most harmful and most helpful ones
    `tokenizer`  the pretraining task's: shades tokens by the store's token scores, where these were kept
    `shade`      shades tokens by scoring the shown sentences anew instead: `report.shader(stage, vectors)`
    `removal`    what removing rows did, a mapping for each set: `name`; `rows`, how many were removed; `predicted`, the
                 sum of −score/m; `actual`, the change of the query after retraining, a number or one for each draw;
                 `accuracy` after it, the same; optional `query`, the number of the query (0)
    `newton`     by row, the predicted change of each query by a Newton step, shown beside the first-order one

    Positive scores are harmful. Raises `BadInput` for a store without queries and for a removal without its fields.
    """
    if examples < 1:
        raise BadInput(f"examples is {examples}; a report shows at least 1 sentence a list")
    manifest = scores.manifest
    if not manifest.get("queries"):
        raise BadInput("the scores' manifest names no query; score again with this version")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        figure=figure, count=count, in_column=in_column, power_of_ten=power_of_ten, superscript=superscript
    )
    html = environment.get_template("template.html.j2").render(
        page(scores, examples, tokenizer, removal, shade, newton)
    )
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadInput(f"{path}: the report cannot be written ({error.strerror}); give a writable path") from error
    return path


def page(
    scores: ScoresLike,
    examples: int,
    tokenizer: Any,
    removal: Sequence[Mapping[str, Any]] | None,
    shade: Shader | None,
    newton: Mapping[int, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Return what the template shows."""
    manifest = scores.manifest
    columns = [np.asarray(scores.column(q)) for q in range(len(manifest["queries"]))]
    missing = _missing(scores, columns)
    shading = _shading(manifest, tokenizer, shade)
    sections = [
        _query(scores, number, column, examples, shading, {r: float(f[number]) for r, f in (newton or {}).items()})
        for number, column in enumerate(columns)
    ]
    return {
        "m": manifest.get("m"),
        "scored": len(columns[0]),
        "missing": missing,
        "notices": notices(manifest, columns, missing),
        "queries": sections,
        "asked": _asked(manifest),
        "growth": _growth(manifest),
        "error_bars": (manifest.get("query_vectors") or {}).get("error_bars"),
        "chain": [stage["name"] for stage in (manifest.get("query_vectors") or {}).get("stages", [])],
        "removals": _removals(removal, manifest["queries"]) if removal else [],
        "versions": manifest.get("versions") or {},
        "shaded": any(row["shaded"] for section in sections for table in section["tables"] for row in table["rows"]),
    }


def _missing(scores: ScoresLike, columns: list[np.ndarray]) -> int | None:
    expected = (scores.manifest.get("identity") or {}).get("rows")
    return expected - len(columns[0]) if isinstance(expected, int) else None


def _query(
    scores: ScoresLike, number: int, column: np.ndarray, examples: int, shading: Shader, newton: Mapping[int, float]
) -> dict[str, Any]:
    manifest = scores.manifest
    query = manifest["queries"][number]
    found = [(helpful, list(scores.top(examples, query=number, helpful=helpful))) for helpful in (False, True)]
    # A list of harmful sentences ends where the scores turn negative, and the other way round.
    found = [(h, [row for row in rows if (row.score < 0 if h else row.score > 0)]) for h, rows in found]
    shown = [(helpful, rows, shading(rows, number)) for helpful, rows in found]
    everything = [row for _, rows in found for row in rows]
    largest = max((abs(s) for _, _, ps in shown for p in ps for _, s in p if s is not None), default=0.0)
    tables = [
        {
            "helpful": helpful,
            "rows": [
                {**_row(rank, row, p, largest), "newton": newton.get(row.row)}
                for rank, (row, p) in enumerate(zip(rows, pieces), 1)
            ],
        }
        for helpful, rows, pieces in shown
    ]
    finite = column[np.isfinite(column)]
    return {
        "id": f"query-{number + 1}",
        "name": query["name"],
        "value": query.get("value"),
        "solves": [_solve(stage, verdict) for stage, verdict in (query.get("verdicts") or {}).items()],
        "histogram": svg.histogram(column),
        "harmful": float((finite > 0).mean()) if len(finite) else 0.0,
        "least": float(finite.min()) if len(finite) else None,
        "most": float(finite.max()) if len(finite) else None,
        "tables": tables,
        "largest": largest,
        "score_power": shared_power([row.score for row in everything]),
        "change_power": shared_power([row.predicted_change for row in everything]),
        "newton": any(row.row in newton for row in everything),
        "barred": any(row.standard_error is not None for row in everything),
    }


def _row(rank: int, row: Any, pieces: list[Piece], largest: float) -> dict[str, Any]:
    shares = [(text, score, abs(score) / largest if score and largest else 0.0) for text, score in pieces]
    return {
        "rank": rank,
        "row": row.row,
        "score": row.score,
        "error": row.standard_error,
        "change": row.predicted_change,
        "loss": row.loss,
        "pieces": shares,
        "shaded": any(score is not None for _, score, _ in shares),
        "stored": row.text is not None,
    }


def _shading(manifest: Mapping[str, Any], tokenizer: Any, shade: Shader | None) -> Shader:
    """Return `shade` if given; else what the store's token scores and the tokenizer give, or the plain text."""
    task = (manifest.get("identity") or {}).get("task") or {}

    def stored(rows: Sequence[Any], query: int) -> list[list[Piece]]:
        return [
            [(row.text or "", None)]
            if tokenizer is None or row.text is None or row.token_scores is None
            else located(row.text, tokenizer, task, row.token_ids, row.token_positions, row.token_scores)
            for row in rows
        ]

    return shade or stored


def _solve(stage: str, verdict: Mapping[str, Any]) -> dict[str, Any]:
    history = verdict.get("history") or []
    residual, second, tolerance = (verdict.get(k) for k in ("residual", "second_residual", "tolerance"))
    return {
        "stage": stage,
        "verdict": verdict.get("verdict", "not recorded"),
        "converged": verdict.get("verdict") == "converged",
        "residual": residual,
        "second": second,
        "tolerance": tolerance,
        "products": verdict.get("products"),
        "damping": verdict.get("damping"),
        "solver": verdict.get("solver", ""),
        "curve": svg.residual_curve(history, tolerance, residual, second),
    }


def _asked(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each stage of the chain: what it was and how its cotangent was passed back."""
    settings = manifest.get("query_vectors") or {}
    stages, steps, transfer = (settings.get(k) or [] for k in ("stages", "steps", "transfer"))
    asked = []
    for number, stage in enumerate(stages):
        step = steps[number] if number < len(steps) else {}
        solver = step.get("solver") or {}
        entry = {
            "Task": _words((stage.get("task") or {}).get("name", "")),
            "Examples": count(int(stage.get("rows", 0))),
            "Reduction": _words(stage.get("reduction", "")),
            "Received": _transfer(transfer[number - 1]) if 0 < number <= len(transfer) else "",
            "Curvature": _words(step.get("curvature", "")),
            "Damping": _damping(step.get("damping")),
            "Chosen": "; ".join((step.get("chosen") or {}).values()),
            "Sample": _sample(step),
            "Solver": ", ".join([str(solver.get("name", "")), *_settings(solver)]),
        }
        entries = {key: value for key, value in entry.items() if value}
        asked.append({"name": stage.get("name", f"stage {number + 1}"), "entries": entries})
    return asked


def _growth(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    growth = (manifest.get("query_vectors") or {}).get("growth")
    return growth and {**growth, "chart": svg.growth(growth["sizes"], growth["spearman"])}


def _sample(step: Mapping[str, Any]) -> str:
    if not step:
        return ""
    rows = step.get("sample")
    return "every row" if rows is None else f"{count(int(rows))} rows, seed {step.get('seed', 0)}"


def _settings(solver: Mapping[str, Any]) -> list[str]:
    """A solver's settings in words; a switch is named where it is on."""
    told = [(_words(key), value) for key, value in solver.items() if key != "name" and value not in (None, False)]
    return [
        key if value is True else f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in told
    ]


def _transfer(transfer: Any) -> str:
    if isinstance(transfer, Mapping) and "proximity" in transfer:
        return f"the encoder, kept near by proximity α\u00a0=\u00a0{transfer['proximity']:g} (case\u00a02)"
    return "the encoder, frozen (case\u00a01)" if transfer == "frozen" else str(transfer)


def _damping(damping: Any) -> str:
    if isinstance(damping, Mapping) and "relative" in damping:
        return f"{damping['relative']:g} × the mean eigenvalue"
    return "" if damping is None else "by a second sample" if damping == "auto" else f"{damping:g}"


def _words(name: str) -> str:
    known = {"masked_lm": "masked LM", "causal_lm": "causal LM", "ggn": "GGN", "hessian": "Hessian", "fisher": "Fisher"}
    return known.get(name, str(name).replace("_", " "))


def _removals(removal: Sequence[Mapping[str, Any]], queries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a group for each query that rows were removed for, with its chart."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for entry in removal:
        lacking = [key for key in ("name", "rows", "predicted", "actual") if key not in entry]
        if lacking:
            raise BadInput(f"a removal result lacks {lacking[0]!r}; it needs name, rows, predicted and actual")
        query = int(entry.get("query", 0))
        if not 0 <= query < len(queries):
            raise BadInput(f"removal {entry['name']!r} belongs to query {query}, but there are {len(queries)}")
        actual, accuracy = _numbers(entry["actual"]), _numbers(entry.get("accuracy"))
        predicted = _numbers(entry["predicted"])
        draws = entry.get("draws")
        groups.setdefault(query, []).append(
            {
                "name": entry["name"],
                "rows": int(entry["rows"]),
                "predicted": fmean(predicted) if predicted else None,
                "actual": fmean(actual) if actual else None,
                "accuracy": fmean(accuracy) if accuracy else None,
                "draws": actual if len(actual) > 1 else [],
                "count": draws if isinstance(draws, int) else max(1, len(actual)),
            }
        )
    return [
        {
            "name": queries[query]["name"],
            "rows": rows,
            "chart": svg.removals(rows),
            "power": shared_power(
                [row[key] for row in rows for key in ("predicted", "actual") if row[key] is not None]
            ),
        }
        for query, rows in sorted(groups.items())
    ]


def _numbers(value: Any) -> list[float]:
    if value is None:
        return []
    return [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]
