"""nlpinf demo: the main job on shipped data."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import typer

from nlpinf.cli.run import execute
from nlpinf.experiments import recipe as recipes


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("demo")(demo)


def demo(
    out: Path = typer.Option(Path("demo"), "--out", help="Folder for the results."),
    frozen: bool = typer.Option(False, "--frozen", help="Case 1: finetune with the encoder frozen (default: case 2)."),
    result: Path | None = typer.Option(None, "--result", help="Write the measured result to this JSON file as well."),
    json_: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Pretrain, finetune, score every pretraining sentence, remove some and retrain: a few minutes on two cores.

    Example: nlpinf demo --out demo
    """
    recipe = recipes.load(Path(str(files("nlpinf") / "experiments" / "demo.yaml")))
    if frozen:
        finetune = recipe.finetune.model_copy(update={"transfer": "frozen"})
        recipe = recipe.model_copy(update={"name": "demo-frozen", "finetune": finetune})
        out = Path("demo-frozen") if out == Path("demo") else out
    execute(recipe, out, json_, result, "nlpinf demo --frozen" if frozen else "nlpinf demo")
