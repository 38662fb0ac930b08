"""Run folders: what `save_pretrained` leaves, plus nlpinf_stage.json, and back into a Stage or a Chain of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from nlpinf.adapters.openers import AUTO_MODELS, build_task, opener_of, quiet_loading
from nlpinf.data import shipped
from nlpinf.data.corpus import Corpus, examples_sha256, read_labelled
from nlpinf.errors import BadInput
from nlpinf.parameters import tied_groups
from nlpinf.stages import Chain, Proximity, Stage, Transfer
from nlpinf.tasks import SequenceClassification, Task

RECORD = "nlpinf_stage.json"
FORMAT = 1


def versions() -> dict[str, str]:
    """Return the versions of nlpinf and the libraries that its numbers depend on."""
    return {name: version(name) for name in ("nlpinf", "torch", "transformers", "tokenizers")}


def new_model(
    task: str, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> nn.Module:
    """Return a randomly initialised model for `task` from a Hugging Face config: `type` and its own fields.

    Vocabulary size, special ids and room for `max_length` positions are taken from the tokenizer and the task. Dropout
    is 0 unless the config sets it, so that the loss that is minimised is a function of the example.
    """
    fields = dict(config)
    kind = fields.pop("type", None)
    if kind is None:
        raise BadInput("the model config has no `type` (such as bert or gpt2)")
    defaults: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is not None:
            defaults[name] = getattr(tokenizer, name)
    try:
        known = AutoConfig.for_model(kind)
    except ValueError as error:
        raise BadInput(f"the model type {kind!r} is not one that transformers knows") from error
    dropout = [
        n for n in known.to_dict() if n.endswith(("dropout", "dropout_prob", "pdrop")) and n != "classifier_dropout"
    ]
    defaults |= dict.fromkeys(dropout, 0.0)
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(known, name):
            defaults[name] = max_length
            break
    if hasattr(known, "use_cache"):
        defaults["use_cache"] = False
    if unknown := [n for n in fields if not hasattr(known, n)]:
        raise BadInput(f"a {kind} config has no field {unknown[0]!r}; see the transformers documentation of this model")
    torch.manual_seed(seed)
    try:
        with quiet_loading():
            return AUTO_MODELS[task].from_config(AutoConfig.for_model(kind, **{**defaults, **fields}))
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"a {kind} model of {fields} cannot be made for {task}: {one_line(error)}") from error


def shared_names(parent: nn.Module, child: nn.Module) -> list[str]:
    """Return the names of the parameters that both models have."""
    theirs = dict(parent.named_parameters())
    return [n for n, _ in child.named_parameters() if n in theirs]


def save_run(stage: Stage, folder: str | Path, **record: Any) -> Path:
    """Write a run folder: weights, config, tokenizer and nlpinf_stage.json; return its path.

    `record` adds to what the stage itself tells: parent, transfer, corpus location, training settings, seeds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    opener = opener_of(stage.task.name)
    with quiet_loading():
        stage.model.save_pretrained(folder)  # type: ignore[operator]
    opener.save_words(stage.task, folder)
    data = {"rows": stage.size, "sha256": examples_sha256(stage.data)}
    content = {
        "format": FORMAT,
        "name": stage.name,
        "task": stage.task.settings(),
        "reduction": stage.reduction,
        "weight_decay": stage.decay,
        "trained": list(stage.trained or ()),
        "tied": tied_groups(stage.model),
        "items": stage.items,
        "weights": weight_files(folder),
        "versions": versions(),
        **record,
    }
    content["data"] = {**data, **record.get("data", {})}
    write_json(folder / RECORD, content)
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write JSON under another name, then rename it, so that no half-written file has the name."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_json(path: Path, what: str) -> Any:
    """Read JSON or say in one line what is wrong with the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; {path.parent} is not {what}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path}: not valid JSON ({error}); make {what} again") from None


def weight_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every safetensors file of a run folder, by file name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInput(
            f"{folder}: no .safetensors weights; save the model with save_pretrained(..., safe_serialization=True)"
        )
    return {path.name: file_sha256(path) for path in files}


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def stage_from_run(folder: str | Path, *, data: Any = None, **changes: Any) -> Stage:
    """Open a run folder as a Stage. `data` replaces the recorded corpus (a path, a Corpus or rows); `changes` its settings."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such run folder")
    record = _record(folder)
    _readable(folder)
    recorded = record.get("weights", {})
    for name, digest in weight_files(folder).items():
        if recorded.get(name) not in (None, digest):
            raise BadInput(f"{folder / name}: the weights changed since {RECORD} was written; record the run again")
    name = record["task"].get("name")
    try:
        opener = opener_of(name)
    except BadInput as error:
        raise BadInput(f"{folder / RECORD}: {error}") from None
    try:
        model, words = opener.open(folder)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadInput(f"{folder}: cannot be opened as a {name} model: {one_line(error)}") from error
    try:
        task = build_task({**record["task"], **changes.pop("task", {})}, words)
    except TypeError as error:
        raise BadInput(
            f"{folder / RECORD}: the task's settings are not known ({error}); record the run again"
        ) from None
    settings: dict[str, Any] = {
        "weight_decay": record["weight_decay"],
        "reduction": record["reduction"],
        "trained": record["trained"],
        "name": record.get("name", folder.name),
    }
    examples = _data(folder, record, data, task)
    kept = {**record, "run": str(folder)}
    if data is not None:
        kept.pop("items", None)  # T is that of the recorded corpus
    try:
        return Stage(model, task, examples, **{**settings, "record": kept, **changes})
    except BadInput as error:
        raise BadInput(f"{folder}: {error}") from None


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    record = read_json(path, "a run that nlpinf recorded")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BadInput(f"{path}: is no record of a run of format {FORMAT}; record the run again")
    for key, kind in {"task": dict, "reduction": str, "weight_decay": dict, "trained": list, "data": dict}.items():
        if not isinstance(record.get(key), kind):
            raise BadInput(f"{path}: the field {key!r} is missing or of another type; record the run again")
    return record


def one_line(error: BaseException) -> str:
    """Return an exception's message without line breaks, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _readable(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"{path}: truncated or not a safetensors file ({one_line(error)}); copy or save it again"
            ) from None


def _data(folder: Path, record: dict[str, Any], data: Any, task: Task) -> Any:
    if data is not None and not isinstance(data, str | Path):
        return data
    where = data if data is not None else record.get("data", {}).get("path")
    if where is None:
        raise BadInput(f"{folder / RECORD}: no data location is recorded; give the run's data (--corpus, or data=...)")
    path = shipped.resolve(where)
    if not path.is_absolute() and not path.exists() and (folder / path).exists():
        path = folder / path
    examples: Any
    if isinstance(task, SequenceClassification):
        examples = read_labelled(path, task.labels)
    else:
        examples = Corpus.read(path, **record.get("data", {}).get("reading", {}))
    if data is None and (expected := record["data"].get("sha256")) != examples_sha256(examples):
        raise BadInput(
            f"{path}: the texts are not those of the run (sha256 of the rows differs from {str(expected)[:12]}…); restore the file or give another with data"
        )
    return examples


def chain_from_runs(folders: Sequence[str | Path], *, alpha: float | None = None, **changes: Any) -> Chain:
    """Open runs, the pretraining first, as a Chain; the transfer of each is as it was recorded.

    `alpha` is the proximity of runs that recorded none. Raises `BadInput` if a run recorded another one: an α that a
    run was trained with is used as it is.
    """
    given = None if alpha is None else Proximity(alpha)
    stages = [stage_from_run(folder, **changes) for folder in folders]
    transfers: list[Transfer] = []
    for folder, stage in zip(folders[1:], stages[1:]):
        transfers.append(_transfer(Path(folder) / RECORD, stage.record.get("transfer"), given))
    for parent, folder, stage in zip(stages, folders[1:], stages[1:]):
        _same_tokenizer(parent, stage, Path(folder))
        expected = stage.record.get("parent", {}).get("weights")
        if expected is not None and expected != parent.record.get("weights"):
            raise BadInput(
                f"{folder}: was finetuned from other weights than those in {parent.record['run']} (sha256 differs); give the run that it descends from"
            )
    return Chain(stages, transfer=transfers)


def _transfer(path: Path, recorded: Any, given: Proximity | None) -> Transfer:
    if recorded is None:
        if given is None:
            raise BadInput(
                f'{path}: no transfer is recorded; give the proximity α (--alpha), or add "transfer": "frozen" to the file'
            )
        return given
    how: Transfer
    if recorded == "frozen":
        how = "frozen"
    elif isinstance(recorded, dict) and isinstance(recorded.get("proximity"), int | float):
        try:
            how = Proximity(float(recorded["proximity"]))
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
    else:
        raise BadInput(f'{path}: the transfer {recorded!r} is neither "frozen" nor {{"proximity": α}}; correct it')
    if given is not None and given != how:
        told = "frozen" if how == "frozen" else f"trained with α = {recorded['proximity']}"
        raise BadInput(f"{path}: the run was {told}, but α = {given.alpha} was given; leave --alpha out")
    return how


def _same_tokenizer(parent: Stage, stage: Stage, folder: Path) -> None:
    one, two = (getattr(s.task, "tokenizer", None) for s in (parent, stage))
    if one is None or two is None:
        return
    ours, theirs = two.get_vocab(), one.get_vocab()
    if ours != theirs:
        odd = next((w for w in theirs if ours.get(w) != theirs[w]), next(iter(ours.keys() - theirs.keys()), "?"))
        raise BadInput(
            f"{folder}: its tokenizer is not that of the pretraining run (first difference: {odd!r}); a finetuned run shares its parent's words"
        )
