"""Make the stages that settings describe: pretraining from nothing, and a classifier on a pretrained encoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nlpinf import processes
from nlpinf.adapters.elmo import ElmoConfig, ElmoFiles, ElmoLM, Vocabulary
from nlpinf.adapters.heads import HeadSettings, TextClassifier
from nlpinf.adapters.huggingface import build_task, new_model, places, shared_names
from nlpinf.adapters.openers import VOCABULARY
from nlpinf.adapters.pretrained import head_names, open_pretrained, open_tokenizer
from nlpinf.adapters.tokenizers import train_tokenizer
from nlpinf.data.shipped import resolve
from nlpinf.errors import BadInput
from nlpinf.experiments.recipe import PretrainSettings, TrainingSettings
from nlpinf.optimum import Optimum, fit_linear_head, is_linear
from nlpinf.stages import Stage
from nlpinf.tasks import BidirectionalLM, SequenceClassification, Task, WordClassification
from nlpinf.training import Anchor, Training, train

Progress = Callable[[str, int, int, str], None]

_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "masked_lm": {
        "small": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
        "medium": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
        "original": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    },
    "causal_lm": {
        "small": {"n_embd": 128, "n_layer": 2, "n_head": 2},
        "medium": {"n_embd": 256, "n_layer": 4, "n_head": 4},
        "original": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    },
}
_TYPES = {"masked_lm": "bert", "causal_lm": "gpt2"}


class Kind(ABC):
    """A way of pretraining: `words` is what turns its texts into numbers, a tokenizer or a vocabulary."""

    @abstractmethod
    def words(self, settings: PretrainSettings, texts: Sequence[str]) -> Any:
        """Make the words from the corpus."""

    @abstractmethod
    def open_words(self, path: Path) -> Any:
        """Read the words of a run folder, or of a path that the user gave; None where it brings none."""

    def has_head(self, folder: Path) -> bool:
        """Say whether a folder brings the pretraining head, so that there is nothing to fit."""
        return False

    @abstractmethod
    def model(self, settings: PretrainSettings, words: Any, seed: int) -> nn.Module:
        """Return the model at its seeded initialisation."""

    @abstractmethod
    def options(self, settings: PretrainSettings, model: Any, seed: int) -> dict[str, Any]:
        """Return the settings of the task."""

    def task(self, settings: PretrainSettings, model: Any, words: Any, seed: int) -> Task:
        """Return the task of the model."""
        return build_task({"name": settings.task, **self.options(settings, model, seed)}, words)


class Transformer(Kind):
    """A Hugging Face model with a tokenizer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def words(self, settings: PretrainSettings, texts: Sequence[str]) -> Any:
        chosen = settings.tokenizer
        kind = chosen.kind or ("wordpiece" if self.name == "masked_lm" else "bpe")
        return train_tokenizer(kind, (texts[i] for i in range(len(texts))), chosen.size, lowercase=chosen.lowercase)

    def open_words(self, path: Path) -> Any:
        return open_tokenizer(path)

    def model(self, settings: PretrainSettings, words: Any, seed: int) -> nn.Module:
        if isinstance(settings.model, str):
            return open_pretrained(self.name, resolve(settings.model), seed)
        config = _preset(settings.model, {k: {"type": _TYPES[self.name], **v} for k, v in _SIZES[self.name].items()})
        return new_model(self.name, config, words, settings.max_length, seed)

    def options(self, settings: PretrainSettings, model: Any, seed: int) -> dict[str, Any]:
        options: dict[str, Any] = {"max_length": settings.max_length}
        if self.name == "masked_lm":
            options |= {"masks": settings.masks, "probability": settings.probability, "seed": seed}
        return options


class Bilm(Kind):
    """ELMo with the words of its softmax."""

    def words(self, settings: PretrainSettings, texts: Sequence[str]) -> Vocabulary:
        return Vocabulary.build((texts[i].split() for i in range(len(texts))), settings.vocabulary)

    def open_words(self, path: Path) -> Vocabulary | None:
        if not ElmoFiles.there(path):
            return Vocabulary.read(path / VOCABULARY if path.is_dir() else path)
        found = ElmoFiles.find(path)
        if found.vocabulary is None and found.softmax is not None:
            raise BadInput(
                f"{path}: has {found.softmax.name} and no vocabulary (.txt), whose lines are its rows; add it"
            )
        return None if found.vocabulary is None else Vocabulary.read(found.vocabulary)

    def model(self, settings: PretrainSettings, words: Any, seed: int) -> nn.Module:
        if isinstance(settings.model, str):
            return _opened_elmo(resolve(settings.model), words, seed)
        fields = dict(settings.model)
        if fields.pop("type", "elmo") != "elmo":
            raise BadInput(f"model.type is {settings.model['type']!r}; a bilm is of type 'elmo'")
        torch.manual_seed(seed)
        return ElmoLM(_elmo_config(fields), len(words))

    def has_head(self, folder: Path) -> bool:
        return not ElmoFiles.there(folder) or ElmoFiles.find(folder).softmax is not None

    def options(self, settings: PretrainSettings, model: Any, seed: int) -> dict[str, Any]:
        options = {"max_length": settings.max_length, "negatives": settings.negatives, "seed": seed}
        return {**options, "max_characters": model.config.max_characters}


KINDS: dict[str, Kind] = {
    "masked_lm": Transformer("masked_lm"),
    "causal_lm": Transformer("causal_lm"),
    "bilm": Bilm(),
}


def _opened_elmo(folder: Path, words: Vocabulary, seed: int) -> ElmoLM:
    if ElmoFiles.there(folder):
        model = ElmoFiles.find(folder).language_model(words, seed)
    else:
        model = ElmoLM.from_pretrained(folder)
        words.check_size(model.vocabulary_size, f"the softmax of {folder}")
    model.config.dropout = 0.0  # so that the loss that is minimised is a function of the example
    return model


def _elmo_config(fields: dict[str, Any]) -> ElmoConfig:
    if "char_cnn" in fields or "lstm" in fields:  # bilm-tf's options.json
        return ElmoConfig.from_options(fields, "model")
    preset = fields.pop("preset", "original")
    try:
        return ElmoConfig.preset(preset, **fields)
    except TypeError as error:
        raise BadInput(f"model: not a configuration of ELMo ({str(error).split('() ')[-1]})") from None


def _preset(config: dict[str, Any], presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    fields = dict(config)
    name = fields.pop("preset", None)
    if name is None:
        return fields
    if name not in presets:
        raise BadInput(f"model.preset is {name!r}; there are {', '.join(presets)}")
    return {**presets[name], **fields}


def words_for(settings: PretrainSettings, corpus: Sequence[str], given: Path | None = None) -> Any:
    """Return the words: those that are `given`, else those that the pretrained model brings, else made from the corpus."""
    kind = KINDS[settings.task]
    if given is None and isinstance(settings.model, str):
        given = resolve(settings.model)
        if not given.is_dir():
            raise BadInput(f"{given}: is no folder; give the folder of a pretrained model")
    words = None if given is None else kind.open_words(given)
    return kind.words(settings, corpus) if words is None else words


def pretraining(settings: PretrainSettings, corpus: Sequence[str], words: Any, seed: int) -> Stage:
    """Return the pretraining stage at its seeded initialisation."""
    kind = KINDS[settings.task]
    model = kind.model(settings, words, seed).to(processes.device())
    return Stage(
        model,
        kind.task(settings, model, words, seed),
        corpus,
        weight_decay=settings.training.weight_decay,
        reduction=settings.reduction,
        name="pretrain",
    )


class Classifier(Protocol):
    """What `finetuning` needs to know: a recipe's finetuning, or the options of a command."""

    @property
    def labels(self) -> int: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def training(self) -> TrainingSettings: ...


def classification(task: Task, labels: int, max_length: int | None) -> Task:
    """Return the task of a classifier on the encoder of a language model's task."""
    if isinstance(task, BidirectionalLM | WordClassification):
        spelling = task.spelling
        length = max_length or spelling.max_length
        return WordClassification(length, labels=labels, long=spelling.long, max_characters=spelling.max_characters)
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is None:
        raise BadInput(f"a classifier cannot stand on the task {task.name!r}; pretrain a language model")
    return SequenceClassification(tokenizer, max_length or task.max_length, labels=labels)  # type: ignore[attr-defined]


def check_length(model: nn.Module, max_length: int | None) -> None:
    """Raise `BadInput` for texts longer than the positions of a model's table."""
    if max_length is not None and (limit := places(model)) is not None and max_length > limit:
        raise BadInput(
            f"the finetuning's max_length is {max_length}, but its encoder has {limit} positions; give at most that"
        )


def finetuning(
    model: nn.Module, task: Task, settings: Classifier, head: HeadSettings, rows: Sequence[Any], seed: int, frozen: bool
) -> Stage:
    """Return the finetuning stage on a copy of a pretraining model's encoder, its head at its seeded initialisation."""
    check_length(model, settings.max_length)
    classifier = TextClassifier.on(model, head, seed).to(processes.device())
    shared = shared_names(model, classifier)
    return Stage(
        classifier,
        classification(task, settings.labels, settings.max_length),
        rows,
        weight_decay=settings.training.weight_decay,
        trained=[n for n, _ in classifier.named_parameters() if n not in shared] if frozen else None,
        name="finetune",
    )


def anchor(model: nn.Module, stage: Stage, alpha: float) -> Anchor:
    """Return the proximity term α ‖W − W*‖² of a finetuning stage to the encoder of the pretraining model."""
    theirs = dict(model.named_parameters())
    return Anchor(alpha, {n: theirs[n].detach().clone().to(stage.device) for n in shared_names(model, stage.model)})


@dataclass(frozen=True)
class Fitted:
    """How a stage was fitted, for its record: the optimizer's settings, or the optimum that Newton's method found."""

    training: dict[str, Any]
    loss: float | None = None


def fit(
    stage: Stage,
    settings: TrainingSettings,
    seed: int,
    *,
    anchor: Anchor | None = None,
    exclude: Collection[int] = (),
    progress: Progress | None = None,
    label: str = "",
) -> Fitted:
    """Minimise the stage's G: a linear head on a frozen encoder to its optimum, anything else by the Trainer."""
    if is_linear(stage) and anchor is None:
        optimum: Optimum = fit_linear_head(
            stage,
            exclude=exclude,
            progress=None if progress is None else (lambda k, g: progress(label, k, k + 1, f"gradient {g:.1e}")),
        )
        return Fitted({"weight_decay": settings.weight_decay, "optimum": vars(optimum)})
    chosen = Training(settings.epochs, settings.batch_size, settings.learning_rate, settings.warmup, seed=seed)
    loss = train(stage, chosen, anchor=anchor, exclude=exclude, progress=_bar(progress, label))
    return Fitted(settings.model_dump(), loss)


def fit_pretraining(
    stage: Stage,
    settings: PretrainSettings,
    seed: int,
    *,
    exclude: Collection[int] = (),
    progress: Progress | None = None,
    label: str = "pretrain",
) -> tuple[Stage, Fitted]:
    """Fit what the settings say, all parameters or the head alone, and return the stage of all of them."""
    moved = replace(stage, trained=head_names(stage.model)) if settings.train == "head" else stage
    fitted = fit(moved, settings.training, seed, exclude=exclude, progress=progress, label=label)
    # A new one: a stage holds what it computed of the model that it was given.
    return replace(stage), fitted


def fitted_head(stage: Stage) -> dict[str, Any]:
    """Return what the record of a run says whose pretraining head alone was fitted."""
    return {
        "head": {"fitted": True, "rows": stage.size, "corpus": getattr(stage.data, "path", None)},
        "notes": [f"its pretraining head was fitted on {stage.size:,} texts with the encoder fixed"],
    }


def perplexity(stage: Stage, texts: Sequence[str]) -> float:
    """Return exp of the mean loss of the texts' counted items, a bilm's under the full softmax."""
    task = stage.task
    if isinstance(task, BidirectionalLM) and task.negatives:
        options = {k: v for k, v in task.settings().items() if k != "name"}
        task = BidirectionalLM(task.vocabulary, **{**options, "negatives": 0})
    loss = Stage(stage.model, task, texts, trained=stage.trained, reduction="token").objective()
    try:
        return math.exp(loss)
    except OverflowError:
        raise BadInput(
            f"stage {stage.name!r}: the mean loss of a token is {loss:.3g}: training diverged; lower the learning rate"
        ) from None


def _bar(progress: Progress | None, label: str) -> Callable[[int, int, float], None] | None:
    if progress is None:
        return None
    return lambda done, total, loss: progress(label, done, total, "" if loss != loss else f"loss {loss:.3f}")
