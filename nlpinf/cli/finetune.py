"""nlpinf finetune: a classifier on a pretrained encoder, as a run that can be queried."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

from nlpinf.adapters.heads import HeadSettings
from nlpinf.cli import console
from nlpinf.cli.pretrain import training
from nlpinf.experiments import runs


class HeadName(str, Enum):
    """Heads by name."""

    linear = "linear"
    mlp = "mlp"
    bilstm = "bilstm"


class PoolingName(str, Enum):
    """Poolings by name."""

    mean = "mean"
    max = "max"
    attention = "attention"
    first = "first"


class LayersName(str, Enum):
    """Which layers the head reads."""

    last = "last"
    mix = "mix"


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("finetune")(finetune)


def finetune(
    pretrain: Path = typer.Option(
        help="Run folder of the pretraining, or a folder with ELMo's options.json and weights."
    ),
    data: str = typer.Option(help="Labelled rows to train on (.jsonl or .jsonl.gz): objects with text and label."),
    out: Path = typer.Option(help="Folder for the run."),
    frozen: bool = typer.Option(
        False, "--frozen", help="Case 1: the encoder stays; a linear head is brought to its optimum."
    ),
    proximity: float | None = typer.Option(
        None, "--proximity", help="Case 2: α of the term α ‖W − W*‖². Without either α̂ is fitted by `nlpinf query`."
    ),
    test: str | None = typer.Option(None, help="Labelled rows to measure loss and accuracy on."),
    labels: int = typer.Option(2, help="Number of classes.", min=2),
    head: HeadName = typer.Option(
        HeadName.linear, help="On the pooled states: linear, one hidden layer, or a BiLSTM below."
    ),
    units: int = typer.Option(64, help="Units of the hidden layer, or of each direction of the BiLSTM.", min=1),
    pooling: PoolingName = typer.Option(PoolingName.mean, help="Over the tokens."),
    layers: LayersName = typer.Option(LayersName.last, help="The last layer, or a trained mix of all."),
    max_length: int | None = typer.Option(
        None, help="Words or tokens of a text at most; default: as the pretraining.", min=1
    ),
    epochs: int = typer.Option(3, help="Passes over the texts.", min=1),
    batch_size: int = typer.Option(32, help="Texts in an optimizer step.", min=1),
    learning_rate: float = typer.Option(1e-3, help="The highest learning rate, at the end of the warmup."),
    warmup: float = typer.Option(0.1, help="Share of the steps in which the learning rate rises."),
    weight_decay: float = typer.Option(1e-3, help="λ of the objective's λ/2 ‖θ‖², over what is trained."),
    seed: int = typer.Option(0, help="Seed of the head and the order.", min=0, max=2**32 - 1),
    json_: bool = typer.Option(False, "--json", help="Print what was measured as JSON."),
) -> None:
    """Finetune a classifier on a pretrained encoder.

    Example: nlpinf finetune --pretrain runs/pretrain --data shipped:cr --out runs/finetune --frozen
    """
    settings = runs.Finetuning(
        HeadSettings(
            pooling.value,
            units if head is HeadName.mlp else 0,
            labels,
            layers.value,
            units if head is HeadName.bilstm else 0,
        ),
        runs.training_of(training(epochs, batch_size, learning_rate, warmup, weight_decay)),
        frozen,
        proximity,
        max_length,
    )
    with console.bars() as bars:
        result = runs.finetune(pretrain, data, settings, out, test=test, seed=seed, progress=bars)
    if json_:
        console.print_json(result)
        return
    told = f"{result['out']}: {result['trained']:,} parameters trained on {result['rows']:,} texts, loss {result['loss']:.4f}"
    if result["optimum"]:
        told += f", at its optimum (gradient {result['optimum']['gradient']:.1e})"
    if measured := result.get("test"):
        told += f"; test loss {measured['loss']:.4f}, accuracy {measured['accuracy']:.3f} on {measured['rows']:,} texts"
    console.out.print(told, highlight=False)
