"""Make a run folder from files and settings: pretrain, fit a missing head, finetune."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import nn

from nlpinf import parameters as P
from nlpinf.adapters.elmo import ElmoFiles
from nlpinf.adapters.heads import HeadSettings
from nlpinf.adapters.huggingface import RECORD, read_json, save_run, stage_from_run, weight_files
from nlpinf.data import shipped
from nlpinf.data.corpus import Corpus, read_labelled
from nlpinf.errors import BadInput
from nlpinf.experiments.building import (
    KINDS,
    Progress,
    anchor,
    finetuning,
    fit,
    fit_pretraining,
    fitted_head,
    perplexity,
    pretraining,
    words_for,
)
from nlpinf.experiments.recipe import PretrainSettings, TrainingSettings
from nlpinf.experiments.stages import predictions
from nlpinf.stages import Proximity, Stage
from nlpinf.tasks import Task, WordClassification

_WORDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")


def claim(out: str | Path) -> Path:
    """Raise `BadInput` unless `out` is a folder that does not exist or is empty."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: exists already; give another folder with --out")
    return out


def settings_of(content: dict[str, Any]) -> PretrainSettings:
    """Return pretraining settings, or say in one line which of them cannot be."""
    return _checked(PretrainSettings, content)


def training_of(content: dict[str, Any]) -> TrainingSettings:
    """Return training settings, or say in one line which of them cannot be."""
    return _checked(TrainingSettings, content)


def _checked(kind: type[BaseModel], content: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        name = "-".join(str(part) for part in first["loc"][-1:]).replace("_", "-")
        raise BadInput(f"--{name} {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def read_config(config: str) -> dict[str, Any]:
    """Return the model that `--config` names: a preset, or a JSON file.

    The file may be a Hugging Face config.json, its words left out, or for ELMo our own config.json or an options.json.
    """
    if not config.endswith(".json"):
        return {"preset": config}
    content = read_json(Path(config), "a model's configuration")
    if not isinstance(content, dict):
        raise BadInput(f"{config}: expected a JSON object, a model's configuration")
    if "encoder" in content:
        return dict(content["encoder"])
    kind = content.pop("model_type", None)
    fields = {name: value for name, value in content.items() if name not in _WORDS}
    return fields if kind is None else {"type": kind, **fields}


def pretrain(
    settings: PretrainSettings,
    out: str | Path,
    *,
    seed: int = 0,
    words: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pretrain from nothing, or from the folder that `settings.model` is, and write the run; return what was measured.

    `words` names a tokenizer folder or a vocabulary file (default: made from the corpus). The record tells a head that was
    fitted alone, and the encoder that it stands on.
    """
    out = claim(out)
    corpus = Corpus.read(settings.corpus, empty=settings.empty, text_column=settings.text_column, split=settings.split)
    stage = pretraining(settings, corpus, words_for(settings, corpus, words), seed)
    folder = shipped.resolve(settings.model) if isinstance(settings.model, str) else None
    record: dict[str, Any] = {"seed": seed}
    loss: float | None = None
    if settings.train == "all" or folder is None or not KINDS[settings.task].has_head(folder):
        stage, fitted = fit_pretraining(stage, settings, seed, progress=progress)
        record["training"], loss = fitted.training, fitted.loss
        if settings.train == "head":
            record |= fitted_head(stage)
    elif folder is not None and (folder / RECORD).exists():  # the head that it brings may have been fitted alone
        theirs = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        record |= {key: theirs[key] for key in ("head", "notes") if key in theirs}
    if folder is not None:
        record["encoder"] = {"run": Path(os.path.relpath(folder, out)).as_posix(), "weights": _weights(folder)}
    data = {"path": shipped.absolute(settings.corpus), "reading": _reading(settings)}
    measured = perplexity(stage, corpus[: min(1000, len(corpus))])
    save_run(stage, out, data=data, **record)
    return {
        "out": str(out),
        "rows": stage.size,
        "parameters": P.size(stage.parameters),
        "loss": loss,
        "perplexity": measured,
        "head_fitted": "head" in record,
    }


def _reading(settings: PretrainSettings) -> dict[str, Any]:
    return {"empty": settings.empty, "text_column": settings.text_column, "split": settings.split}


@dataclass(frozen=True)
class Finetuning:
    """The settings of a finetuning: `alpha` is the proximity, None for none; `frozen` keeps the encoder as it is."""

    head: HeadSettings
    training: TrainingSettings
    frozen: bool = False
    alpha: float | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.frozen and self.alpha is not None:
            raise BadInput("a finetuning is either --frozen or has a --proximity; give one of them")
        if self.alpha is not None:
            Proximity(self.alpha)

    @property
    def labels(self) -> int:
        """The number of classes."""
        return self.head.labels


def finetune(
    parent: str | Path,
    data: str,
    settings: Finetuning,
    out: str | Path,
    *,
    test: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Finetune a classifier on the encoder of a run, or of a folder of ELMo's files, and write the run.

    Returns what was measured: the loss, for a linear head on a frozen encoder its optimum, and loss and accuracy on `test`.
    """
    out, parent = claim(out), Path(parent)
    rows = read_labelled(shipped.resolve(data), settings.labels, training=True)
    asked = None if test is None else read_labelled(shipped.resolve(test), settings.labels)
    model, task = _parent(parent)
    stage = finetuning(model, task, settings, settings.head, rows, seed, settings.frozen)
    near = None if settings.alpha is None else anchor(model, stage, settings.alpha)
    fitted = fit(stage, settings.training, seed, anchor=near, progress=progress, label="finetune")
    record: dict[str, Any] = {"seed": seed, "training": fitted.training}
    if settings.frozen or settings.alpha is not None:
        record["transfer"] = "frozen" if settings.frozen else {"proximity": settings.alpha}
    record["parent"] = {"run": Path(os.path.relpath(parent, out)).as_posix(), "weights": _weights(parent)}
    save_run(stage, out, data={"path": shipped.absolute(data)}, **record)
    result = {
        "out": str(out),
        "rows": len(rows),
        "trained": P.size(stage.theta),
        "loss": float(predictions(stage, rows)[0].mean()),
        "optimum": fitted.training.get("optimum"),
    }
    if asked is not None:
        losses, right = predictions(stage, asked)
        result["test"] = {
            "rows": len(asked),
            "loss": float(losses.mean()),
            "accuracy": float(right.double().mean()),
        }
    return result


def _parent(folder: Path) -> tuple[nn.Module, Task]:
    if ElmoFiles.there(folder):
        headless = ElmoFiles.find(folder).headless()
        headless.config.dropout = 0.0
        return headless, WordClassification(max_characters=headless.config.max_characters)
    stage: Stage = stage_from_run(folder, data=[""])  # its model and words alone: the corpus is not read
    return stage.model, stage.task


def _weights(folder: Path) -> dict[str, str]:
    if ElmoFiles.there(folder):
        return ElmoFiles.find(folder).sha256()
    if (folder / RECORD).exists():
        return json.loads((folder / RECORD).read_text(encoding="utf-8")).get("weights") or weight_files(folder)
    return weight_files(folder)
