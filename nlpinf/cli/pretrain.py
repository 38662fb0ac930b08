"""nlpinf pretrain: a language model from nothing, as a run that can be finetuned and attributed."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import typer

from nlpinf.cli import console
from nlpinf.experiments import runs


class TaskName(str, Enum):
    """Pretraining tasks by name."""

    bilm = "bilm"
    masked_lm = "masked_lm"
    causal_lm = "causal_lm"


class Reduction(str, Enum):
    """What the loss of a text is."""

    example = "example"
    token = "token"


class Empty(str, Enum):
    """What to do with empty lines."""

    error = "error"
    skip = "skip"


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("pretrain")(pretrain)


def pretrain(
    task: TaskName = typer.Option(help="bilm (ELMo), masked_lm (BERT) or causal_lm (GPT-2)."),
    config: str = typer.Option(
        help="Sizes: small, medium, original, or a JSON file (config.json, ELMo's options.json)."
    ),
    corpus: str = typer.Option(help="Text, one sentence a line (.txt, .jsonl, .gz), a folder or a pattern of files."),
    out: Path = typer.Option(help="Folder for the run."),
    vocabulary: Path | None = typer.Option(
        None, help="A vocabulary file (bilm) or a tokenizer folder; default: made from the corpus."
    ),
    vocabulary_size: int = typer.Option(8000, help="Words of a vocabulary or tokenizer that is made.", min=64),
    negatives: int | None = typer.Option(
        None, help="bilm: words of the sampled softmax, 0 for the full one (default: 8,192 above 50,000 words).", min=0
    ),
    max_length: int = typer.Option(64, help="Words (bilm) or tokens of a text at most; the rest is cut off.", min=2),
    masks: int = typer.Option(1, help="masked_lm: masks of a text.", min=1),
    probability: float = typer.Option(0.15, help="masked_lm: share of the tokens that are masked."),
    reduction: Reduction = typer.Option(
        Reduction.example, help="The loss of a text: its mean, or its share of all tokens."
    ),
    empty: Empty = typer.Option(Empty.error, help="Empty lines."),
    epochs: int = typer.Option(3, help="Passes over the texts.", min=1),
    batch_size: int = typer.Option(64, help="Texts in an optimizer step.", min=1),
    learning_rate: float = typer.Option(1e-3, help="The highest learning rate, at the end of the warmup."),
    warmup: float = typer.Option(0.1, help="Share of the steps in which the learning rate rises."),
    weight_decay: float = typer.Option(1e-6, help="λ of the objective's λ/2 ‖θ‖²."),
    seed: int = typer.Option(0, help="Seed of weights, order, masks and negatives.", min=0, max=2**32 - 1),
    json_: bool = typer.Option(False, "--json", help="Print what was measured as JSON."),
) -> None:
    """Pretrain a language model on a corpus, by the Hugging Face Trainer.

    Example: nlpinf pretrain --task bilm --config small --corpus shipped:wikitext2 --out runs/pretrain --epochs 1
    """
    settings = runs.settings_of(
        {
            "corpus": corpus,
            "task": task.value,
            "model": runs.read_config(config),
            "tokenizer": {"size": vocabulary_size},
            "vocabulary": vocabulary_size,
            "negatives": negatives,
            "max_length": max_length,
            "masks": masks,
            "probability": probability,
            "reduction": reduction.value,
            "empty": empty.value,
            "training": training(epochs, batch_size, learning_rate, warmup, weight_decay),
        }
    )
    with console.bars() as bars:
        result = runs.pretrain(settings, out, seed=seed, words=vocabulary, progress=bars)
    show(result, json_)


def training(epochs: int, batch_size: int, learning_rate: float, warmup: float, weight_decay: float) -> dict[str, Any]:
    """Return the training settings of the options."""
    return {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
    }


def show(result: dict[str, Any], json_: bool) -> None:
    """Print what a pretraining measured."""
    if json_:
        console.print_json(result)
        return
    loss = "" if result["loss"] is None else f"training loss {result['loss']:.4f}, "
    console.out.print(
        f"{result['out']}: {result['parameters']:,} parameters, {result['rows']:,} texts, {loss}"
        f"perplexity {result['perplexity']:.1f} on the first of them",
        highlight=False,
    )
    if result["head_fitted"]:
        console.out.print("The encoder is as it was given; its pretraining head was fitted on this corpus.")
