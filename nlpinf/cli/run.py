"""nlpinf run: run a recipe."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import typer
from rich.console import Group
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
    outcomes: dict[str, tuple[Outcome, Path]] = {}
    with console.bars() as bars:
        runners = Runner.of_each(recipe, out, bars, lambda line: console.err.print(line, highlight=False))
        for case, runner in runners.items():
            outcomes[case] = runner.run(), runner.out
    if result is not None:
        found = {
            case: measured(folder, command, None if outcome.resumed else outcome.seconds)
            for case, (outcome, folder) in outcomes.items()
        }
        write_json(result, found if len(found) > 1 else next(iter(found.values())))
    contents = {case: _content(outcome, folder) for case, (outcome, folder) in outcomes.items()}
    if json_:
        console.print_json(contents if len(contents) > 1 else next(iter(contents.values())))
        return
    for case, (outcome, folder) in outcomes.items():
        if len(outcomes) > 1:
            console.out.print(f"\n{case}", style="bold")
        _print(outcome, folder)


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
    for line in console.settings_lines(scores.manifest["query_vectors"]):
        console.say(line)
    print_()
    print_(console.rows_table(scores.top(10), "Most harmful sentences (positive score)"))
    print_()
    print_(console.rows_table(scores.top(10, helpful=True), "Most helpful sentences (negative score)"))
    if outcome.removal:
        print_()
        print_(_removal_table(outcome))
    print_(f"\n{len(scores):,} sentences scored in {out}/scores; the report is {outcome.report}", highlight=False)


def verdict_table(queries: list[dict[str, Any]]) -> Group:
    """Return the queries with their values, and how every solve ended."""
    names = [f"query {i}: {console.shown(q['name'], 100)}, value {q['value']:.4f}" for i, q in enumerate(queries)]
    table = Table(title="Solves", title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for name in ("query", "stage", "verdict"):
        table.add_column(name)
    for name in ("damping", "residual", "second sample", "products"):
        table.add_column(name, justify="right")
    for i, query in enumerate(queries):
        for stage, end in query["verdicts"].items():
            second = end["second_residual"]
            table.add_row(
                str(i),
                stage,
                end["verdict"],
                f"{end['damping']:.3g}",
                "not finite" if end["residual"] is None else f"{end['residual']:.1e}",
                "–" if second is None else f"{second:.2f}",
                str(end["products"]),
            )
    told = {f"{stage}: {end['note']}": None for q in queries for stage, end in q["verdicts"].items() if end.get("note")}
    return Group(*names, "", table, *told)


def _removal_table(outcome: Outcome) -> Table:
    table = Table(
        title="Change of the mean test loss when rows are removed and both stages retrained",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1),
    )
    table.add_column("removed")
    random = [entry["actual"] for entry in outcome.removal if entry["name"].startswith("random")]
    control = fmean(random) if random else None
    for name in ("rows", "predicted", "actual", *([] if control is None else ["beyond random"]), "accuracy"):
        table.add_column(name, justify="right")
    for entry in outcome.removal:
        beyond = [] if control is None else [f"{entry['actual'] - control:+.4f}"]
        table.add_row(
            entry["name"],
            str(len(entry["rows"])),
            f"{entry['predicted']:+.4f}",
            f"{entry['actual']:+.4f}",
            *beyond,
            f"{entry['accuracy']:.3f}",
        )
    if control is not None:
        table.caption_justify, table.caption = "left", _control(random, control)
    return table


def _control(random: list[float], control: float) -> str:
    """Say what retraining does of itself: rows drawn at random predict next to no change."""
    return (
        f"Removing as many rows at random changed it by {control:+.4f} on average ({min(random):+.4f} to {max(random):+.4f}): "
        "what training again does of itself. Beyond random is the change less that average."
    )
