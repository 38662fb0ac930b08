"""Make a recipe's stages: pretrain on its corpus, finetune on its labelled data, and measure the result."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from nlpinf.adapters.heads import HeadSettings
from nlpinf.adapters.huggingface import RECORD
from nlpinf.data.corpus import Corpus, read_labelled
from nlpinf.errors import BadInput
from nlpinf.experiments.building import (
    Fitted,
    Progress,
    anchor,
    check_length,
    finetuning,
    fit,
    fit_pretraining,
    perplexity,
    pretraining,
    words_for,
)
from nlpinf.experiments.recipe import Recipe, Transfer
from nlpinf.experiments.removal import removed_rows
from nlpinf.queries import Query
from nlpinf.scoring.compress import LEAST
from nlpinf.stages import Stage, evaluation

__all__ = ["Progress", "Recipes", "Result", "misclassified", "predictions"]


@dataclass(frozen=True)
class Result:
    """Of a finetuned model on its test set: mean loss, accuracy, and the loss of every row."""

    loss: float
    accuracy: float
    losses: list[float]


class Recipes:
    """The data and words of a recipe, and its stages trained on all of the corpus or on part of it.

    `run` is where the pretraining run lies or will lie: once it is there, its words are the recipe's.
    """

    def __init__(self, recipe: Recipe, run: Path | None = None) -> None:
        self.recipe, self.run = recipe, run

    @property
    def reading(self) -> dict[str, Any]:
        """How the corpus is read."""
        settings = self.recipe.pretrain
        return {"empty": settings.empty, "text_column": settings.text_column, "split": settings.split}

    @cached_property
    def _whole(self) -> Corpus:
        return Corpus.read(self.recipe.pretrain.corpus, **self.reading)

    @cached_property
    def corpus(self) -> Corpus:
        """The pretraining corpus, without the rows that are held out."""
        kept = len(self._whole) - self.recipe.pretrain.held_out
        if kept == len(self._whole):
            return self._whole
        if kept < 1:
            raise BadInput(
                f"pretrain.held_out is {self.recipe.pretrain.held_out} rows, but {self.recipe.pretrain.corpus} has "
                f"{len(self._whole)}; hold out fewer"
            )
        return Corpus(self._whole.texts(0, kept), self._whole.rows[:kept], path=self._whole.path)

    @cached_property
    def held_out(self) -> list[str]:
        """The texts at the end of the corpus that are not trained on."""
        return self._whole[len(self.corpus) :]

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
    def words(self) -> Any:
        """The tokenizer or vocabulary of the run or of the pretrained model, else one made from all of the corpus."""
        there = self.run is not None and (self.run / RECORD).exists()
        return words_for(self.recipe.pretrain, self.corpus, self.run if there else None)

    def check(self) -> None:
        """Raise `BadInput` for what can be known to be wrong before anything is trained or written."""
        recipe, rows = self.recipe, len(self.corpus)
        sizes = {"pretraining": rows, "finetuning": len(self.labelled[0])}
        for key in ("sample", "damping"):
            given = getattr(recipe.query, key)
            if isinstance(given, list) and len(given) != len(sizes):
                raise BadInput(
                    f"query.{key} lists {len(given)} values for 2 stages; give pretraining's and finetuning's"
                )
        samples, bars = recipe.query.sample, recipe.query.error_bars or 1
        for (stage, size), sample in zip(sizes.items(), samples if isinstance(samples, list) else [samples]):
            if isinstance(sample, int) and sample * bars > size:
                told = f"query.sample is {sample} rows" + (f", times {bars} for error_bars" if bars > 1 else "")
                raise BadInput(f"{told}, but {stage} has {size}; give at most {size // bars}")
        if recipe.score.compress is not None and rows < LEAST:
            raise BadInput(
                f"score.compress needs a corpus of at least {LEAST} rows to measure, not {rows}; leave it out"
            )
        if recipe.remove is not None:
            removed_rows(recipe.remove.share, rows)
        if len({row["label"] for row in self.labelled[0]}) < 2:
            raise BadInput(
                f"{recipe.finetune.data}: the rows left to train on are all of one class; make test_share smaller"
            )
        check_length(self.untrained().model, recipe.finetune.max_length)

    def untrained(self) -> Stage:
        """The first stage at its seeded initialisation."""
        return pretraining(self.recipe.pretrain, self.corpus, self.words, self.recipe.seed)

    def pretrain(
        self, exclude: Collection[int] = (), progress: Progress | None = None, label: str = "pretrain"
    ) -> Stage:
        """Train the first stage from its seeded initialisation, without the rows `exclude`."""
        stage, left_out = self.untrained(), set(exclude)
        positions = [i for i, row in enumerate(stage.rows.tolist()) if row in left_out]
        settings, seed = self.recipe.pretrain, self.recipe.seed
        return fit_pretraining(stage, settings, seed, exclude=positions, progress=progress, label=label)[0]

    def perplexity(self, stage: Stage) -> float:
        """Exp of the mean loss of a pretraining stage on the rows that are held out."""
        return perplexity(stage, self.held_out)

    def finetune(
        self, pretrained: Stage, transfer: Transfer, progress: Progress | None = None, label: str = "finetune"
    ) -> tuple[Stage, Fitted]:
        """Train the second stage from the pretrained encoder, frozen or held near it by the proximity term."""
        settings, seed, frozen = self.recipe.finetune, self.recipe.seed, transfer == "frozen"
        head = HeadSettings(labels=settings.labels, **settings.head.model_dump())
        stage = finetuning(pretrained.model, pretrained.task, settings, head, self.labelled[0], seed, frozen)
        near = None if frozen else anchor(pretrained.model, stage, settings.alpha)
        return stage, fit(stage, settings.training, seed, anchor=near, progress=progress, label=label)

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
        return Result(float(losses.mean()), float(right.double().mean()), [round(x, 6) for x in losses.tolist()])

    def bag_of_words(self) -> float:
        """The accuracy on the test rows of a logistic regression on the counts of words, with scikit-learn's defaults."""
        (texts, labels), (asked, right) = (
            ([row["text"] for row in rows], [row["label"] for row in rows]) for rows in self.labelled
        )
        model = make_pipeline(CountVectorizer(token_pattern=r"\S+"), LogisticRegression(max_iter=1000))
        return float(model.fit(texts, labels).score(asked, right))


def predictions(stage: Stage, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of every labelled row and whether its class is predicted, in the rows' order."""
    test = Stage(stage.model, stage.task, rows, trained=stage.trained, name="test")
    losses, right = torch.empty(len(rows), dtype=torch.float64), torch.empty(len(rows), dtype=torch.bool)
    with evaluation(stage.model), torch.no_grad():
        for batch in test.batches():
            outputs = test.outputs(batch)
            own = batch.rows.cpu()
            losses[own] = stage.task.losses(outputs, batch).double().cpu()
            right[own] = (outputs.argmax(-1) == batch.targets).cpu()
    return losses, right


def misclassified(stage: Stage, rows: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of the rows whose class is not predicted, the largest loss first."""
    losses, right = predictions(stage, rows)
    return [i for i in torch.argsort(losses, descending=True, stable=True).tolist() if not right[i]]


def _short(text: str) -> str:
    return repr(text if len(text) <= 50 else text[:47] + "...")
