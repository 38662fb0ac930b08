"""nlpinf fit-head: a run from an encoder that came without its pretraining head."""

from __future__ import annotations

from pathlib import Path

import typer

from nlpinf.cli import console
from nlpinf.cli.pretrain import Empty, Reduction, TaskName, show, training
from nlpinf.experiments import runs


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("fit-head")(fit_head)


def fit_head(
    encoder: Path = typer.Option(
        help="Folder with ELMo's options.json and weights .hdf5 (and softmax .hdf5, vocabulary .txt), or a Hugging Face model."
    ),
    corpus: str = typer.Option(help="Text that the encoder was pretrained on, or like it: one sentence a line."),
    out: Path = typer.Option(help="Folder for the run."),
    task: TaskName = typer.Option(TaskName.bilm, help="What the encoder was pretrained for."),
    vocabulary: Path | None = typer.Option(
        None, help="The vocabulary of the softmax; default: the folder's, else made from the corpus."
    ),
    vocabulary_size: int = typer.Option(8000, help="Words of a vocabulary that is made.", min=64),
    negatives: int | None = typer.Option(
        None, help="bilm: words of the sampled softmax, 0 for the full one (default: 8,192 above 50,000 words).", min=0
    ),
    max_length: int = typer.Option(64, help="Words or tokens of a text at most; the rest is cut off.", min=2),
    reduction: Reduction = typer.Option(
        Reduction.example, help="The loss of a text: its mean, or its share of all tokens."
    ),
    empty: Empty = typer.Option(Empty.error, help="Empty lines."),
    epochs: int = typer.Option(3, help="Passes over the texts.", min=1),
    batch_size: int = typer.Option(64, help="Texts in an optimizer step.", min=1),
    learning_rate: float = typer.Option(1e-3, help="The highest learning rate, at the end of the warmup."),
    warmup: float = typer.Option(0.1, help="Share of the steps in which the learning rate rises."),
    weight_decay: float = typer.Option(1e-6, help="λ of the objective's λ/2 ‖θ‖²."),
    seed: int = typer.Option(0, help="Seed of the head, the order and the negatives.", min=0, max=2**32 - 1),
    json_: bool = typer.Option(False, "--json", help="Print what was measured as JSON."),
) -> None:
    """Fit the missing pretraining head of an encoder on a corpus, the encoder as it is. A softmax that is there is kept.

    Example: nlpinf fit-head --encoder elmo --corpus corpus.txt.gz --out runs/pretrain
    """
    settings = runs.settings_of(
        {
            "corpus": corpus,
            "task": task.value,
            "model": str(encoder),
            "train": "head",
            "vocabulary": vocabulary_size,
            "negatives": negatives,
            "max_length": max_length,
            "reduction": reduction.value,
            "empty": empty.value,
            "training": training(epochs, batch_size, learning_rate, warmup, weight_decay),
        }
    )
    with console.bars() as bars:
        result = runs.pretrain(settings, out, seed=seed, words=vocabulary, progress=bars)
    show(result, json_)
