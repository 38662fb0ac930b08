"""nlpinf check: a pre-flight on the user's own model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import typer
from rich.table import Table

from nlpinf.adapters.plain import Told
from nlpinf.adapters.runs import stage_from_run
from nlpinf.checks import Check
from nlpinf.checks import check as run_checks
from nlpinf.cli import console
from nlpinf.errors import BadInput

LINES = 9  # of a check


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("check")(check)


def _follow(bars: console.Report, run: str) -> Callable[[Check], None]:
    done = count(1)
    return lambda line: bars(run, next(done), LINES, line.name)


_PLAIN = "Runs without a record"


def check(
    runs: list[Path] = typer.Argument(help="Run folders."),
    examples: int = typer.Option(8, help="Examples to check on.", min=2),
    data: list[str] = typer.Option(
        [], help="Where the run's rows lie, if it did not record that or they moved; one for each run."
    ),
    text_column: str | None = typer.Option(None, help="Column of the texts (default: text).", rich_help_panel=_PLAIN),
    label_column: str | None = typer.Option(None, help="Column of the labels.", rich_help_panel=_PLAIN),
    split: str | None = typer.Option(None, help="Their split, of a datasets folder.", rich_help_panel=_PLAIN),
    task: str | None = typer.Option(
        None, help="The runs' task: masked_lm, causal_lm or sequence_classification.", rich_help_panel=_PLAIN
    ),
    max_length: int | None = typer.Option(None, help="Tokens of a row at most.", rich_help_panel=_PLAIN),
    packed: bool | None = typer.Option(
        None, "--packed/--no-packed", help="Whether texts were joined and cut to rows.", rich_help_panel=_PLAIN
    ),
    trust_remote_code: bool = typer.Option(False, help="Run code that lies in the model's folder."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check a run before scoring: invariances, derivatives, rounding. Exit status 1 if a line fails.

    A run is what nlpinf or nlpinf.StageRecorder recorded, or a plain output folder of a Hugging Face Trainer with --data;
    what was assumed of one is listed.

    Example: nlpinf check demo/pretrain demo/finetune
    """
    if len(data) not in (0, len(runs)):
        raise BadInput(f"--data was given {len(data)} times for {len(runs)} runs; give it for each")
    failed, content = False, []
    for i, run in enumerate(runs):
        told = Told(
            data[i] if data else None, text_column, label_column, split, task, max_length=max_length, packed=packed
        )
        stage = stage_from_run(run, told=told, trust_remote_code=trust_remote_code)
        assumed = list(stage.record.get("assumed", ()))
        with console.bars() as bars:
            checks = run_checks(stage, examples=examples, progress=_follow(bars, str(run)))
        failed |= any(not c.passed for c in checks)
        content.append({"run": str(run), "assumed": assumed, "checks": [vars(c) for c in checks]})
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
            for line in assumed:
                console.say(f"assumed: {line}")
    if json_:
        console.print_json(content)
    if failed:
        raise typer.Exit(1)
