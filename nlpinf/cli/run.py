"""nlpinf run: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from nlpinf.adapters.huggingface import write_json
from nlpinf.cli import console
from nlpinf.experiments import recipe as recipes
from nlpinf.experiments.recipe import Recipe
from nlpinf.experiments.results import measured
from nlpinf.experiments.runner import Outcome, Runner


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("run")(run)


def run(
    recipe: Path = typer.Argument(help="The recipe, a YAML file."),
    out: Path | None = typer.Option(None, "--out", help="Folder for the results (default: runs/NAME)."),
    result: Path | None = typer.Option(None, "--result", help="Write the measured result to this JSON file as well."),
    json_: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Run a recipe: pretrain, finetune, query, score, report, remove and retrain. Finished steps are skipped.

    Example: nlpinf run recipes/demo.yaml --out runs/demo
    """
    loaded = recipes.load(recipe)
    execute(loaded, out or Path("runs") / loaded.name, json_, result, f"nlpinf run {recipe}")


def execute(recipe: Recipe, out: Path, json_: bool, result: Path | None, command: str) -> None:
    """Run and print; `command` is what a result file names."""
    with console.bars() as bars:
        runner = Runner(recipe, out, bars, lambda line: console.err.print(line, highlight=False))
        outcome = runner.run()
    if result is not None:
        write_json(result, measured(out, command, outcome.seconds))
    if json_:
        console.print_json(_content(outcome, out))
    else:
        _print(outcome, out)


def _content(outcome: Outcome, out: Path) -> dict[str, Any]:
    scores = outcome.scores
    return {
        "out": str(out),
        "report": str(outcome.report),
        "seconds": round(outcome.seconds, 1),
        "test_loss": outcome.test_loss,
        "accuracy": outcome.accuracy,
        "rows": len(scores),
        "queries": [{k: q[k] for k in ("name", "value", "converged", "verdicts")} for q in scores.manifest["queries"]],
        "harmful": [console.row_dict(row) for row in scores.top(10)],
        "helpful": [console.row_dict(row) for row in scores.top(10, helpful=True)],
        "removal": [{**entry, "rows": len(entry["rows"])} for entry in outcome.removal],
    }


def _print(outcome: Outcome, out: Path) -> None:
    scores, print_ = outcome.scores, console.out.print
    print_(f"\nfinetuned model: test loss {outcome.test_loss:.4f}, accuracy {outcome.accuracy:.3f}", highlight=False)
    print_(verdict_table(scores.manifest["queries"]))
    print_()
    print_(console.rows_table(scores.top(10), "Most harmful sentences (positive score)"))
    print_()
    print_(console.rows_table(scores.top(10, helpful=True), "Most helpful sentences (negative score)"))
    if outcome.removal:
        print_()
        print_(_removal_table(outcome))
    print_(f"\n{len(scores):,} sentences scored in {out}/scores; the report is {outcome.report}", highlight=False)


def verdict_table(queries: list[dict[str, Any]]) -> Table:
    """Return how every solve ended."""
    table = Table(title="Solves", title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for name in ("query", "value", "stage", "verdict"):
        table.add_column(name, overflow="fold")
    for name in ("residual", "second sample", "products"):
        table.add_column(name, justify="right")
    for query in queries:
        for stage, end in query["verdicts"].items():
            second = end["second_residual"]
            table.add_row(
                console.shown(query["name"], 60),
                f"{query['value']:.4f}",
                stage,
                end["verdict"],
                "not finite" if end["residual"] is None else f"{end['residual']:.1e}",
                "–" if second is None else f"{second:.2f}",
                str(end["products"]),
            )
    return table


def _removal_table(outcome: Outcome) -> Table:
    table = Table(
        title="Change of the mean test loss when rows are removed and both stages retrained",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1),
    )
    table.add_column("removed")
    for name in ("rows", "predicted", "actual", "accuracy"):
        table.add_column(name, justify="right")
    for entry in outcome.removal:
        table.add_row(
            entry["name"],
            str(len(entry["rows"])),
            f"{entry['predicted']:+.4f}",
            f"{entry['actual']:+.4f}",
            f"{entry['accuracy']:.3f}",
        )
    return table
