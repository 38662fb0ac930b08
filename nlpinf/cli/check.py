"""nlpinf check: a pre-flight on the user's own model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import typer
from rich.table import Table

from nlpinf import Stage
from nlpinf.checks import Check
from nlpinf.checks import check as run_checks
from nlpinf.cli import console

LINES = 9  # of a check


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("check")(check)


def _follow(bars: console.Report, run: str) -> Callable[[Check], None]:
    done = count(1)
    return lambda line: bars(run, next(done), LINES, line.name)


def check(
    runs: list[Path] = typer.Argument(help="Run folders."),
    examples: int = typer.Option(8, help="Examples to check on.", min=2),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check a run before scoring: invariances, derivatives, rounding. Exit status 1 if a line fails.

    Example: nlpinf check demo/pretrain demo/finetune
    """
    failed, content = False, []
    for run in runs:
        stage = Stage.from_run(run)
        with console.bars() as bars:
            checks = run_checks(stage, examples=examples, progress=_follow(bars, str(run)))
        failed |= any(not c.passed for c in checks)
        content.append({"run": str(run), "checks": [vars(c) for c in checks]})
        if not json_:
            table = Table(title=str(run), title_justify="left", title_style="bold", box=None, padding=(0, 1))
            for name in ("", "check", "figure", "limit", "what to set"):
                table.add_column(name, overflow="fold")
            for c in checks:
                figure = "–" if c.figure is None else f"{c.figure:.1e}"
                table.add_row(
                    "pass" if c.passed else "FAIL", c.name, figure, f"{c.limit:.0e}", "" if c.passed else c.advice
                )
            console.out.print(table)
    if json_:
        console.print_json(content)
    if failed:
        raise typer.Exit(1)
