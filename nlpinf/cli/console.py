"""Progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nlpinf import processes
from nlpinf.scoring import ScoredDocument, ScoredRow

# Texts, names and paths are printed as they are: what looks like markup or an emoji's name in them is theirs.
err = Console(stderr=True, markup=False, emoji=False)
out = Console(soft_wrap=False, markup=False, emoji=False)

Report = Callable[[str, int, int, str], None]


@contextmanager
def bars() -> Iterator[Report]:
    """Yield a function (step, done, total, note) that draws a bar for each step on stderr, or names it where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tasks: dict[str, Any] = {}
    if not err.is_terminal:

        def line(step: str, done: int, total: int, note: str = "") -> None:
            if step not in tasks:
                tasks[step] = None
                err.print(f"{step} ...", highlight=False)

        yield line
        return
    with Progress(*columns, console=err) as progress:

        def report(step: str, done: int, total: int, note: str = "") -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total, note=note)
            progress.update(tasks[step], completed=done, total=total, note=note)

        yield report


def paced(report: Report, step: str) -> Callable[[int, int], None]:
    """Return a function (rows done, rows in all) that reports them with the rate; where stderr is no terminal, twice a minute."""
    began: tuple[float, int] | None = None
    told = time.monotonic()

    def rows(done: int, total: int) -> None:
        nonlocal began, told
        now = time.monotonic()
        if began is None:
            began = now, done
        rate = (done - began[1]) / (now - began[0]) if done > began[1] else 0.0
        note = f"{rate:,.0f} rows/s" if rate else "rows"
        report(step, done, total, note)
        if not err.is_terminal and rate and now - told > 30:
            told = now
            line = f"{step} {done:,} of {total:,}, {note}, {duration((total - done) / rate)} left"
            err.print(line, highlight=False)

    return rows


def duration(seconds: float | None) -> str:
    """Return a time in words: 12 s, 5 min, 3.4 h, 2.1 days."""
    if seconds is None:
        return "unknown"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < limit * size:
            return f"{seconds / size:.1f} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def say(text: str) -> None:
    """Print one line on stdout as it is."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def first_speaks() -> None:
    """Let only the first of the processes that a launcher started print."""
    err.quiet = out.quiet = not processes.speaks()


def in_group(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command in the group of processes that a launcher started, if one did; only the first of them prints."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        with processes.group():
            first_speaks()
            command(*arguments, **options)

    return run


def print_json(content: Any) -> None:
    """Print one JSON document on stdout."""
    if out.quiet:
        return
    json.dump(content, sys.stdout, ensure_ascii=False, indent=1)
    sys.stdout.write("\n")


def rows_table(rows: list[ScoredRow], title: str) -> Table:
    """Return a table of scored rows: score, predicted change of the query if removed, row, text."""
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=False, box=None, padding=(0, 1))
    table.add_column("score", justify="right")
    if barred := any(row.standard_error is not None for row in rows):
        table.add_column("±", justify="right")
    table.add_column("change if removed", justify="right")
    table.add_column("row", justify="right")
    if counted := any(row.count is not None for row in rows):
        table.add_column("times", justify="right")
    table.add_column("sentence", ratio=1, overflow="fold")
    for row in rows:
        times = [str(row.count)] if counted else []
        error = [f"{row.standard_error or 0:.2g}"] if barred else []
        change = f"{row.predicted_change:+.2e}"
        table.add_row(f"{row.score:+.4g}", *error, change, str(row.row), *times, shown(row.text))
    return table


def documents_table(documents: list[ScoredDocument], texts: Mapping[int, str], title: str) -> Table:
    """Return a table of scored documents, with their texts where these are known by number."""
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=False, box=None, padding=(0, 1))
    for name in ("score", "change if removed", "document", "tokens", "in rows"):
        table.add_column(name, justify="right")
    if texts:
        table.add_column("text", ratio=1, overflow="fold")
    for d in documents:
        place = str(d.first_row) if d.rows == 1 else f"{d.rows} from {d.first_row}"
        text = [shown(texts[d.document])] if texts else []
        table.add_row(f"{d.score:+.4g}", f"{d.predicted_change:+.2e}", str(d.document), str(d.tokens), place, *text)
    return table


def shown(text: str | None, width: int = 110) -> str:
    """Return a text as one line, cut off."""
    line = " ".join((text or "").split())
    return line if len(line) <= width else line[: width - 1] + "…"


def settings_lines(settings: Mapping[str, Any]) -> list[str]:
    """Return what a query's manifest tells of texts that were cut, of a curvature sample that grew, and of error bars."""
    lines = []
    if cut := max(settings.get("truncated", [0])):
        lines.append(
            f"{cut:,} of a query's texts were cut at the max_length of the finetuned model; their losses are of their beginnings."
        )
    if growth := settings.get("growth"):
        for size in growth["sizes"]:
            told = [f"sample of {size['rows']:,} rows: {size['verdict']} after {size['products']:,} products"]
            if size["second_residual"] is not None:
                told.append(f"second sample {size['second_residual']:.2f}")
            if size["spearman"] is not None:
                told.append(f"rank correlation with the size before {size['spearman']:.3f}")
            lines.append(", ".join(told))
        alone = growth["ended"] == "limit reached" and len(growth["sizes"]) == 1
        lines.append(f"The sample {GROWTH['limit at once' if alone else growth['ended']]}.")
    if bars := settings.get("error_bars"):
        rows = ", ".join(f"{n:,} of {stage}" for stage, n in bars["rows"].items())
        lines.append(f"Standard errors from {bars['samples']} disjoint samples ({rows}).")
    return lines


GROWTH = {
    "stable": "is large enough: a larger one leaves the scores in their order",
    "whole corpus": "grew to the whole corpus, and plays no part any more",
    "limit at once": "began at its limit: how the order of the scores changes with more rows is not known",
    "limit reached": "reached its limit while the order of the scores still changed: trust it less than the solves' residuals",
}


def scoring_lines(scoring: Mapping[str, Any]) -> list[str]:
    """Return what a manifest tells of how rows are scored: why it is not compiled, and what compression was measured to do."""
    lines = []
    if isinstance(why := scoring.get("compiled"), str):
        lines.append(why)
    if made := scoring.get("compression"):
        measured = made["measured"]
        lines.append(
            f"compressed: {made['multiplications']:.0%} of the products with query vectors; scores err by {measured['rms']:.1%} "
            f"of their spread (at most {measured['max']:.1%}), rank correlation {measured['spearman']:.4f}, "
            f"on {measured['rows']} rows scored both ways"
        )
    return lines


def row_dict(row: ScoredRow) -> dict[str, Any]:
    """Return a scored row for JSON."""
    return {key: value for key, value in vars(row).items() if value is not None}
