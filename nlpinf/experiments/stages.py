"""Make a recipe's stages: pretrain on its corpus, finetune on its labelled data, and measure the result."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nlpinf.adapters.heads import HeadSettings, TextClassifier
from nlpinf.adapters.huggingface import RECORD, build_task, new_model, shared_names
from nlpinf.adapters.tokenizers import train_tokenizer
from nlpinf.data.corpus import Corpus, read_labelled
from nlpinf.errors import BadInput
from nlpinf.experiments.recipe import Recipe, TrainingSettings
from nlpinf.experiments.removal import removed_rows
from nlpinf.queries import Query
from nlpinf.stages import Chain, Proximity, Stage, evaluation
from nlpinf.tasks import SequenceClassification
from nlpinf.training import Anchor, Training, train

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Result:
    """Of a finetuned model on its test set: mean loss and accuracy."""

    loss: float
    accuracy: float


class Recipes:
    """The data and tokenizer of a recipe, and its stages trained on all of the corpus or on part of it.

    `run` is where the pretraining run lies or will lie: once it is there, its tokenizer is the recipe's.
    """

    def __init__(self, recipe: Recipe, run: Path | None = None) -> None:
        self.recipe, self.run = recipe, run

    @cached_property
    def corpus(self) -> Corpus:
        """The pretraining corpus."""
        return Corpus.read(self.recipe.pretrain.corpus, empty=self.recipe.pretrain.empty)

    @cached_property
    def labelled(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The finetuning rows and the test rows."""
        settings = self.recipe.finetune
        rows = read_labelled(settings.data, settings.labels, training=True)
        if settings.test is not None:
            return rows, read_labelled(settings.test, settings.labels)
        random.Random(self.recipe.seed).shuffle(rows)
        held_out = max(1, round(settings.test_share * len(rows)))
        if held_out >= len(rows):
            raise BadInput(
                f"{settings.data}: test_share {settings.test_share} leaves no row to train on; make it smaller"
            )
        return rows[held_out:], rows[:held_out]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run, else one trained on all of the corpus."""
        if self.run is not None and (self.run / RECORD).exists():
            return AutoTokenizer.from_pretrained(self.run)
        settings = self.recipe.pretrain.tokenizer
        texts = (self.corpus[i] for i in range(len(self.corpus)))
        return train_tokenizer(settings.kind, texts, settings.size, lowercase=settings.lowercase)

    def check(self) -> None:
        """Raise `BadInput` for what can be known to be wrong before anything is trained or written."""
        recipe, rows = self.recipe, len(self.corpus)
        if recipe.query.sample is not None and recipe.query.sample > rows:
            raise BadInput(
                f"query.sample is {recipe.query.sample} rows, but {recipe.pretrain.corpus} has {rows}; give at most that"
            )
        if isinstance(recipe.query.damping, list) and len(recipe.query.damping) != 2:
            raise BadInput(
                f"query.damping lists {len(recipe.query.damping)} values for 2 stages; give pretraining's and finetuning's"
            )
        if recipe.remove is not None:
            removed_rows(recipe.remove.share, rows)
        if len({row["label"] for row in self.labelled[0]}) < 2:
            raise BadInput(
                f"{recipe.finetune.data}: the rows left to train on are all of one class; make test_share smaller"
            )
        self.new_model()

    def new_model(self) -> nn.Module:
        """The pretraining model at its seeded initialisation."""
        settings = self.recipe.pretrain
        return new_model(settings.task, settings.model, self.tokenizer, settings.max_length, self.recipe.seed)

    def pretrain(
        self, exclude: Collection[int] = (), progress: Progress | None = None, label: str = "pretrain"
    ) -> Stage:
        """Train the first stage from its seeded initialisation, without the rows `exclude`."""
        settings, seed = self.recipe.pretrain, self.recipe.seed
        model = self.new_model()
        options: dict[str, Any] = {"name": settings.task, "max_length": settings.max_length}
        if settings.task == "masked_lm":
            options |= {"masks": settings.masks, "probability": settings.probability, "seed": seed}
        stage = Stage(
            model,
            build_task(options, self.tokenizer),
            self.corpus,
            weight_decay=settings.training.weight_decay,
            reduction=settings.reduction,
            name="pretrain",
        )
        left_out = set(exclude)
        positions = [i for i, row in enumerate(stage.rows.tolist()) if row in left_out]
        train(stage, _training(settings.training, seed), exclude=positions, progress=_bar(progress, label))
        return stage

    def finetune(self, pretrained: Stage, progress: Progress | None = None, label: str = "finetune") -> Stage:
        """Train the second stage from the pretrained encoder, frozen or held near it by the proximity term."""
        settings, seed = self.recipe.finetune, self.recipe.seed
        head = HeadSettings(settings.head.pooling, settings.head.hidden, settings.labels)
        model = TextClassifier.on(pretrained.model, head, seed)
        shared = shared_names(pretrained.model, model)
        frozen = settings.transfer == "frozen"
        stage = Stage(
            model,
            SequenceClassification(
                self.tokenizer, settings.max_length or self.recipe.pretrain.max_length, labels=settings.labels
            ),
            self.labelled[0],
            weight_decay=settings.training.weight_decay,
            trained=[n for n, _ in model.named_parameters() if n not in shared] if frozen else None,
            name="finetune",
        )
        anchor = None if frozen else Anchor(settings.alpha, {n: pretrained.parameters[n].clone() for n in shared})
        train(stage, _training(settings.training, seed), anchor=anchor, progress=_bar(progress, label))
        return stage

    def chain(self, pretrained: Stage, finetuned: Stage) -> Chain:
        """The two stages as a chain."""
        settings = self.recipe.finetune
        return Chain([pretrained, finetuned], "frozen" if settings.transfer == "frozen" else Proximity(settings.alpha))

    def queries(self, finetuned: Stage) -> list[Query]:
        """The mean test loss, and the losses of the misclassified test rows with the largest ones."""
        test = self.labelled[1]
        wrong = misclassified(finetuned, test)[: self.recipe.query.misclassified]
        return [Query.mean_loss(test, "mean test loss")] + [
            Query.loss(test[i], f"loss of test row {i}: {_short(test[i]['text'])} (label {test[i]['label']})")
            for i in wrong
        ]

    def result(self, finetuned: Stage) -> Result:
        """Mean loss and accuracy on the test rows."""
        losses, right = predictions(finetuned, self.labelled[1])
        return Result(float(losses.mean()), float(right.double().mean()))


def predictions(stage: Stage, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of every labelled row and whether its class is predicted, in the rows' order."""
    test = Stage(stage.model, stage.task, rows, trained=stage.trained, name="test")
    losses, right = torch.empty(len(rows), dtype=torch.float64), torch.empty(len(rows), dtype=torch.bool)
    with evaluation(stage.model), torch.no_grad():
        for batch in test.batches():
            outputs = test.outputs(batch)
            losses[batch.rows] = stage.task.losses(outputs, batch).double()
            right[batch.rows] = outputs.argmax(-1) == batch.targets
    return losses, right


def misclassified(stage: Stage, rows: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of the rows whose class is not predicted, the largest loss first."""
    losses, right = predictions(stage, rows)
    return [i for i in torch.argsort(losses, descending=True, stable=True).tolist() if not right[i]]


def _training(settings: TrainingSettings, seed: int) -> Training:
    return Training(settings.epochs, settings.batch_size, settings.learning_rate, settings.warmup, seed=seed)


def _bar(progress: Progress | None, label: str) -> Callable[[int, int, float], None] | None:
    if progress is None:
        return None
    return lambda done, total, loss: progress(label, done, total, "" if loss != loss else f"loss {loss:.3f}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 50 else text[:47] + "...")
