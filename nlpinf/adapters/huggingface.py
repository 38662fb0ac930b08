"""Hugging Face models as stages: made anew, and saved as run folders, which `runs` and `chains` open again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from nlpinf.adapters.chains import chain_from_runs
from nlpinf.adapters.folders import FORMAT, RECORD, file_sha256, one_line, read_json, versions, weight_files, write_json
from nlpinf.adapters.openers import AUTO_MODELS, build_task, opener_of, quiet_loading
from nlpinf.adapters.runs import stage_from_run
from nlpinf.adapters.supported import check_supported
from nlpinf.data.corpus import examples_sha256
from nlpinf.errors import BadInput
from nlpinf.parameters import tied_groups
from nlpinf.stages import Stage

__all__ = [
    "RECORD",
    "build_task",
    "chain_from_runs",
    "file_sha256",
    "new_model",
    "one_line",
    "read_json",
    "save_run",
    "shared_names",
    "stage_from_run",
    "versions",
    "weight_files",
    "write_json",
]


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
            made = AutoConfig.for_model(kind, **{**defaults, **fields})
            check_supported(made, "the model config", task)
            return AUTO_MODELS[task].from_config(made)
    except BadInput:
        raise
    except Exception as error:  # of values that its configuration or its layers refuse, each in its own way
        raise BadInput(f"a {kind} model of {fields} cannot be made for {task}: {one_line(error)}") from error


def places(model: nn.Module) -> int | None:
    """Return how many tokens a model has learned positions for; None where it has no such table."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if type(module) is nn.Embedding and last in ("position_embeddings", "wpe"):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def shared_names(parent: nn.Module, child: nn.Module) -> list[str]:
    """Return the names of the parameters that both models have."""
    theirs = dict(parent.named_parameters())
    return [n for n, _ in child.named_parameters() if n in theirs]


def save_run(stage: Stage, folder: str | Path, **record: Any) -> Path:
    """Write a run folder: weights, config, tokenizer and nlpinf_stage.json; return its path.

    `record` adds to what the stage itself tells: parent, transfer, corpus location, training settings, seeds.
    Raises `BadInput` for a task of one's own (see `openers.OPENERS`) and for a model without `save_pretrained`.
    """
    folder = Path(folder)
    opener = opener_of(stage.task.name)
    if not callable(save := getattr(stage.model, "save_pretrained", None)):
        raise BadInput(
            f"{folder}: the model of stage {stage.name!r}, {type(stage.model).__name__}, has no save_pretrained, so no run folder can be made of it; score it in memory (nlpinf.query_vectors, nlpinf.score), or save it as a Hugging Face model"
        )
    data = {"rows": stage.size, "sha256": examples_sha256(stage.data)}
    items = stage.items  # which reads all examples, and so refuses what cannot be read before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_loading():
        save(folder)
    for weights in folder.glob("*.safetensors"):  # which safetensors gives to their owner alone
        weights.chmod((folder / "config.json").stat().st_mode)
    opener.save_words(stage.task, folder)
    content = {
        "format": FORMAT,
        "name": stage.name,
        "task": stage.task.settings(),
        "reduction": stage.reduction,
        "weight_decay": stage.decay,
        "trained": list(stage.trained or ()),
        "tied": tied_groups(stage.model),
        "items": items,
        "weights": weight_files(folder),
        "versions": versions(),
        **record,
    }
    content["data"] = {**data, **record.get("data", {})}
    write_json(folder / RECORD, content)
    return folder
