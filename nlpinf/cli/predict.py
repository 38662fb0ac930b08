"""nlpinf predict: what leaving rows out of the pretraining does to the queries, to first order and by a Newton step."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from nlpinf import processes, querystore, removals
from nlpinf.cli import console
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.newton import Removed
from nlpinf.newton import predict as predict_removals
from nlpinf.scoring import Scores
from nlpinf.scoring.drop import check_scores, positions_of, rows_to_drop
from nlpinf.solvers import CG


class CurvatureName(str, Enum):
    """Curvature operators of the Newton step by name."""

    auto = "auto"
    hessian = "hessian"
    ggn = "ggn"


class PreconditionerName(str, Enum):
    """Preconditioners of the Newton step's solve by name."""

    none = "none"
    diagonal = "diagonal"
    ekfac = "ekfac"


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("predict")(console.in_group(predict))


def predict(
    query: Path = typer.Option(help="Query folder."),
    drop: list[str] = typer.Option(
        help="Rows to drop: a file of row numbers (one a line; .jsonl or .parquet with `row`), or '5%' or a number of the most harmful of --scores; give it again for another set."
    ),
    scores: Path | None = typer.Option(None, help="Scores folder that ranks the rows, for '5%' or a number."),
    by: int = typer.Option(0, help="Number of the query whose scores rank, from 0."),
    helpful: bool = typer.Option(False, "--helpful", help="Take the most helpful rows instead of the most harmful."),
    each: bool = typer.Option(False, "--each", help="Drop every row by itself: one solve for each."),
    keep: bool = typer.Option(
        False, "--keep", help="With --each: keep the figures in the query folder, for the report."
    ),
    pretrain: Path | None = typer.Option(None, help="The pretraining run, where it was moved since the query."),
    corpus: str | None = typer.Option(None, help="The pretraining corpus, where it was moved since the query."),
    curvature: CurvatureName = typer.Option(
        CurvatureName.auto,
        help="Curvature of the Newton step; auto: the Hessian where it is positive definite, else the GGN.",
    ),
    damping: float | None = typer.Option(None, help="Damping λ, absolute (default: the query's own)."),
    sample: int | None = typer.Option(None, help="Rows that carry the curvature (default: the query's own)."),
    preconditioner: PreconditionerName = typer.Option(PreconditionerName.none, help="Preconditioner of the solve."),
    tolerance: float = typer.Option(1e-3, help="Relative residual of the solve."),
    max_iterations: int = typer.Option(1000, help="Curvature products of a solve at most."),
    allow_unconverged: bool = typer.Option(False, help="Show figures of solves that did not converge, marked as such."),
    trust_remote_code: bool = typer.Option(False, help="Run code that lies in the model's folder."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Predict how every query changes when rows are left out of the pretraining: to first order and by a Newton step.

    Example: nlpinf predict --query query --scores scores --drop 5%
    """
    if damping is not None and not 0 <= damping < float("inf"):
        raise BadInput(f"--damping is {damping}; the damping must be a number of at least 0")
    if keep and not each:
        raise BadInput("--keep was given without --each; the report shows rows that are dropped by themselves")
    solver = CG(tolerance, max_iterations)
    vectors = querystore.load(query, run=pretrain, data=corpus, trust_remote_code=trust_remote_code)
    opened = None if scores is None else Scores.open(scores)
    if opened is not None:
        check_scores(opened, vectors)
    sets: dict[str, list[int]] = {}
    for told in drop:
        rows = rows_to_drop(told, opened, by, helpful=helpful)
        places = positions_of(rows, vectors, told)
        sets.update({f"row {r}": [p] for r, p in zip(rows, places)} if each else {told: places})
    with console.bars() as bars:
        found = predict_removals(
            vectors,
            sets,
            curvature=curvature.value,  # type: ignore[arg-type]
            damping=damping,
            sample=sample,
            solver=solver,
            preconditioner=preconditioner.value,
            allow_unconverged=allow_unconverged,
            progress=lambda name, k, residual: bars(
                f"solve without {name}", k, max_iterations, f"residual {residual:.1e}"
            ),
        )
    if not processes.main():
        return
    if keep:
        told_settings = {"curvature": curvature.value, "damping": damping, "sample": sample, "tolerance": tolerance}
        removals.keep(query, vectors, found, told_settings)
    if json_:
        console.print_json({"m": vectors.stage.size, "sets": [_content(vectors, removed) for removed in found]})
        return
    for k, (q, value) in enumerate(zip(vectors.queries, vectors.values)):
        console.out.print(f"query {k}: {console.shown(q.name)}, value {value:.4f}", highlight=False)
    console.out.print()
    console.out.print(_table(vectors, found))
    for note in dict.fromkeys(removed.solution.note for removed in found):
        console.out.print(f"Newton step by the {note}", highlight=False)


def _content(vectors: QueryVectors, removed: Removed) -> dict[str, Any]:
    return {
        "name": removed.name,
        "rows": [int(vectors.stage.rows[i]) for i in removed.rows],
        "queries": [
            {"name": q.name, "value": value, "first_order": one, "newton": two}
            for q, value, one, two in zip(vectors.queries, vectors.values, removed.first_order, removed.newton)
        ],
        "solve": {k: v for k, v in removed.solution.summary().items() if k != "history"},
    }


def _table(vectors: QueryVectors, found: list[Removed]) -> Table:
    title = f"Predicted change when rows are left out of the {vectors.stage.size:,} of the pretraining"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for name in ("dropped", "rows", "query", "first order", "Newton", "residual", "verdict"):
        table.add_column(name, justify="left" if name in ("dropped", "verdict") else "right")
    for removed in found:
        end = removed.solution
        for k in range(len(vectors.queries)):
            head = [console.shown(removed.name), f"{len(removed.rows):,}"] if k == 0 else ["", ""]
            tail = [f"{end.residual:.1e}", end.verdict] if k == 0 else ["", ""]
            table.add_row(*head, str(k), f"{removed.first_order[k]:+.3e}", f"{removed.newton[k]:+.3e}", *tail)
    return table
