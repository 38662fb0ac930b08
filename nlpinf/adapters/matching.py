"""Which parameters of a finetuned model came from its pretraining run: by names inside the encoder, and by shapes.

Encoders go by other prefixes in other models (`bert.`, `model.`, `transformer.`, none), lack or have a pooler, and may have
more words. A word embedding with more rows than its parent's came from it in its first rows alone: those are W, the others Θ.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nlpinf.errors import BadInput
from nlpinf.stages import Stage

_SHOWN = 3


@dataclass(frozen=True)
class Matching:
    """What a stage received: `shared` maps its names to its parent's, `grown` the embeddings that gained rows to those that
    the parent has; `own` are the names that are only the stage's (Θ), `left` only the parent's (U)."""

    shared: dict[str, str]
    grown: dict[str, int]
    own: tuple[str, ...]
    left: tuple[str, ...]
    size: int

    def __str__(self) -> str:
        renamed = {_prefixes(mine, theirs) for mine, theirs in self.shared.items() if mine != theirs}
        under = "".join(f", {mine or 'no prefix'} for {theirs or 'none'}" for mine, theirs in sorted(renamed)[:_SHOWN])
        grown = "".join(f"; {name} grew from {rows} rows" for name, rows in self.grown.items())
        own, left = (_modules(names) or "none" for names in (self.own, self.left))
        return f"{len(self.shared)} tensors ({self.size:,} numbers) received{under}{grown}; of its own: {own}; left behind: {left}"


def match(parent: Stage, stage: Stage) -> Matching:
    """Match a stage's parameters to its parent's.

    Raises `BadInput`, naming the first tensors that differ, if the encoders are not of one architecture and size.
    """
    theirs, ours = parent.parameters, stage.parameters
    inner, outer = _encoder_names(parent.model), _encoder_names(stage.model)
    if inner is None or outer is None:
        inner, outer = {n: n for n in theirs}, {n: n for n in ours if n in theirs}
    elif type(parent.model) is type(stage.model):  # the same head too, as in continued pretraining
        inner |= {n: n for n in theirs if n not in set(inner.values())}
        outer |= {
            n: n for n in ours if n not in set(outer.values()) and n in inner and ours[n].shape == theirs[n].shape
        }
    shared, grown, odd = {}, {}, []
    for name, mine in outer.items():
        if name not in inner:
            if not _is_pooler(name):
                odd.append(f"{mine!r} is not in its parent")
        elif ours[mine].shape == theirs[inner[name]].shape:
            shared[mine] = inner[name]
        elif _grew(stage.model, mine, ours[mine], theirs[inner[name]]):
            shared[mine], grown[mine] = inner[name], len(theirs[inner[name]])
        else:
            odd.append(f"{mine!r} has shape {tuple(ours[mine].shape)}, its parent's {tuple(theirs[inner[name]].shape)}")
    odd += [
        f"its parent's {theirs_!r} is not in it"
        for name, theirs_ in inner.items()
        if name not in outer and _encodes(parent, name, theirs_)
    ]
    where = f"stage {stage.name!r} does not descend from {parent.name!r}"
    if not shared:
        kinds = [
            getattr(getattr(s.model, "config", None), "model_type", type(s.model).__name__) for s in (stage, parent)
        ]
        raise BadInput(
            f"{where}: no parameter of its {kinds[0]} encoder has a name of the parent's {kinds[1]} (the first are {next(iter(ours))!r} and {next(iter(theirs))!r})"
        )
    if odd:
        more = f", and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise BadInput(f"{where}: {'; '.join(odd[:_SHOWN])}{more}; give the run that it was finetuned from")
    own = tuple(n for n in ours if n not in shared)
    left = tuple(n for n in theirs if n not in set(shared.values()))
    return Matching(shared, grown, own, left, sum(theirs[n].numel() for n in shared.values()))


def received(stage: Stage, matching: Matching) -> tuple[Stage, dict[str, str]]:
    """Return the stage with grown embeddings split into the parent's rows and the new ones, and what it shares by name.

    The stage is copied if there is anything to split; its functions stay what they are.
    """
    if not matching.grown:
        return stage, matching.shared
    model = copy.deepcopy(stage.model)
    names: dict[str, tuple[str, str]] = {}
    for name, rows in matching.grown.items():
        names[name] = _split(model, name, rows)
    decay = {part: value for n, value in stage.decay.items() for part in names.get(n, (n,))}
    split = replace(stage, model=model, trained=tuple(decay), weight_decay=decay)
    return split, {names[n][0] if n in names else n: theirs for n, theirs in matching.shared.items()}


class _Rows(nn.Module):
    """A matrix as its first `rows` rows and the others, each a parameter."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, first: Tensor, others: Tensor) -> Tensor:
        return torch.cat([first, others])

    def right_inverse(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        return whole[: self.rows].clone(), whole[self.rows :].clone()


def _split(model: nn.Module, name: str, rows: int) -> tuple[str, str]:
    """Split a parameter, under all names that it is tied to; return the names of its two parts."""
    whole = model.get_parameter(name)
    places = [n for n, p in model.named_parameters(remove_duplicate=False) if p is whole]
    first: Any = None
    for place in places:
        owner, _, last = place.rpartition(".")
        module: Any = model.get_submodule(owner)
        parametrize.register_parametrization(module, last, _Rows(rows))
        parts = module.parametrizations[last]
        if first is None:
            first = parts
        else:
            parts.original0, parts.original1 = first.original0, first.original1
    owner, _, last = places[0].rpartition(".")
    return tuple(f"{owner}.parametrizations.{last}.original{i}" for i in (0, 1))  # type: ignore[return-value]


def _encoder_names(model: nn.Module) -> dict[str, str] | None:
    """Return the encoder's parameters: name inside the encoder to name in the model. None for a model without a prefix."""
    prefix = getattr(model, "prefix", None) or getattr(model, "base_model_prefix", "")
    if not prefix:
        return None
    inside = f"{prefix}." if hasattr(model, prefix) else ""
    names = {}
    for name, _ in model.named_parameters():
        plain = _without_adapters(name)
        if plain is not None and plain.startswith(inside):
            names[plain[len(inside) :]] = name
    return names


def _without_adapters(name: str) -> str | None:
    """Return the name that a parameter has without the layers of peft around it; None for one that these added."""
    if ".lora_" in name or ".original_module." in name:
        return None
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def _is_pooler(name: str) -> bool:
    return any(part.startswith("pooler") for part in name.split("."))


def _encodes(parent: Stage, name: str, full: str) -> bool:
    """Whether a parent's parameter is one that every model on its encoder must have."""
    names = _encoder_names(parent.model)
    return names is not None and name in names and names[name] == full and not _is_pooler(name)


def _grew(model: nn.Module, name: str, mine: Tensor, theirs: Tensor) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.Embedding) and mine.shape[1:] == theirs.shape[1:] and len(mine) > len(theirs)


def _prefixes(mine: str, theirs: str) -> tuple[str, str]:
    """Return what the two names begin with before their common end."""
    a, b = mine.split("."), theirs.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return ".".join(a), ".".join(b)


def _modules(names: tuple[str, ...] | Mapping[str, Any]) -> str:
    """Return the modules of these parameters, each once, the first few."""
    found = list(dict.fromkeys(n.rpartition(".")[0] or n for n in names))
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
