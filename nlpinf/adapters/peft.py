"""Folders of peft: a stage whose Θ is low-rank adapters and a head, on a base model that stays as it was (case 1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from nlpinf.adapters.folders import read_json
from nlpinf.adapters.openers import AUTO_MODELS, quiet_loading
from nlpinf.adapters.tokenizers import tokenizer_in
from nlpinf.errors import BadInput

ADAPTERS = "adapter_config.json"
_TASKS = {"SEQ_CLS": "sequence_classification", "CAUSAL_LM": "causal_lm"}
_HEADS = ("classifier.weight", "score.weight", "out_proj.weight")


@dataclass(frozen=True)
class AdapterConfig:
    """adapter_config.json, checked; `base` is the folder of the model under the adapters."""

    base: Path
    content: dict[str, Any]


def adapter_config(folder: Path, base: str | Path | None = None) -> AdapterConfig:
    """Read a folder's adapter_config.json; raise `BadInput` for adapters other than LoRA, or a base that is not there."""
    path = folder / ADAPTERS
    content = read_json(path, "a folder of peft")
    kind = content.get("peft_type")
    if kind != "LORA":
        raise BadInput(f"{path}: adapters of type {kind} are not supported; LoRA is")
    if content.get("use_dora"):
        raise BadInput(f"{path}: DoRA takes no derivative of its norms, so its loss has no Hessian; train plain LoRA")
    named = base if base is not None else content.get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise BadInput(
            f"{path}: its base model {str(named)!r} is no folder here; give the folder (base=..., or --pretrain)"
        )
    return AdapterConfig(Path(named), content)


def adapter_task(folder: Path) -> str | None:
    """Return the task that a folder of peft was trained for, None where it does not say."""
    return _TASKS.get(read_json(folder / ADAPTERS, "a folder of peft").get("task_type") or "")


def open_adapters(folder: Path, base: Path, task: str) -> tuple[nn.Module, Any]:
    """Return the base model with the adapters in its layers, these and the head alone being trained, and its tokenizer.

    Raises `BadInput` if the head, or another module that the base lacks, was trained but not saved.
    """
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        raise BadInput(f"{folder}: opening adapters needs peft; install it with: pip install 'nlpinf[peft]'") from None
    options = {} if task != "sequence_classification" else {"num_labels": _labels(folder)}
    with quiet_loading():
        where = folder if any(folder.glob("tokenizer*")) else base
        tokenizer = tokenizer_in(where)
        if task == "sequence_classification":
            options["pad_token_id"] = tokenizer.pad_token_id
        model, loading = AUTO_MODELS[task].from_pretrained(base, output_loading_info=True, **options)
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True)
    inner = wrapped.get_base_model()
    saved = {n for name, p in inner.named_parameters() if ".modules_to_save." in name for n in [_base_name(name)]}
    if absent := sorted(n for n in loading["missing_keys"] if n not in saved):
        raise BadInput(
            f"{folder}: neither it nor {base} has {absent[0]!r}, which was made at random for the finetuning; name its module in modules_to_save and finetune again"
        )
    return inner, tokenizer


def _base_name(name: str) -> str:
    return name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")


def _labels(folder: Path) -> int:
    """Return the number of classes of the head that was saved with the adapters."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(_HEADS):
                    return int(file.get_slice(name).get_shape()[0])
    raise BadInput(f"{folder}: has no head among its weights; name it in modules_to_save and finetune again")
