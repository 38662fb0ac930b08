"""Models whose parameters are shared out among the processes: FSDP2 (`torch.distributed.fsdp.fully_shard`), also by accelerate.

Parameters, gradients and vectors are `DTensor`s: each process holds a piece of every one. During a pass FSDP's own hooks gather
one wrapped block's parameters at a time; in a forward-mode pass the block's part of the tangent is gathered beside them and let go
of with them. Gradients arrive from FSDP's backward pass in pieces, summed over the processes. So each process
works on batches of its own, and all must make equally many passes (`processes.turns`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from nlpinf import parameters as P
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters


def blocks_of(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 wrapped, each of which gathers its parameters by itself; none of a plain model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody wraps a model without importing it
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Say whether the model's parameters are shared out among the processes."""
    return bool(blocks_of(model))


def refused(model: nn.Module, stage: str, what: str, advice: str) -> None:
    """Raise `BadInput` if the model is sharded, for what cannot be done with its pieces."""
    if is_sharded(model):
        raise BadInput(f"stage {stage!r}: its model is sharded among processes, for which there is no {what}; {advice}")


def check(model: nn.Module) -> None:
    """Raise `BadInput` if the model is sharded in part: every parameter must be in a block that FSDP2 wrapped."""
    if _in_pieces(model):
        for name, parameter in model.named_parameters():
            if not P.in_pieces({name: parameter}):
                raise BadInput(
                    f"the sharded model's parameter {name!r} is in no sharded block; shard the whole model too"
                )


@contextmanager
def moving(model: nn.Module, tangent: Parameters) -> Iterator[None]:
    """Let the model's parameters move along `tangent` while the block runs, within a dual level: θ + t v at t = 0.

    Right after a wrapped block has gathered its parameters, dual tensors take their places; before it lets go of them, they
    are put back.
    """
    blocks = _in_pieces(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    _places(model, blocks[0], set(map(id, blocks)), names, places)
    handles, replaced = [], dict[int, list[tuple[nn.Module, str, Any]]]()

    def enter(block: nn.Module, _: Any) -> None:
        made: dict[str, Tensor] = {}
        for module, key, name in places.get(id(block), ()):
            if name not in tangent:
                continue
            parameter = module._parameters[key]
            if name not in made:  # a tied weight is one tensor under several names
                assert parameter is not None
                made[name] = forward_ad.make_dual(parameter.detach(), P.gathered(tangent[name]))
            replaced.setdefault(id(block), []).append((module, key, parameter))
            module._parameters[key] = made[name]  # type: ignore[assignment]

    def leave(block: nn.Module, *_: Any) -> None:
        for module, key, parameter in replaced.pop(id(block), []):
            module._parameters[key] = parameter

    try:
        for block in blocks:
            handles.append(block.register_forward_pre_hook(enter))  # after FSDP's own, which gathers
            handles.append(block.register_forward_hook(leave, prepend=True))  # before FSDP's own, which lets go
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            leave(block)
        _in_pieces(model)


def _in_pieces(model: nn.Module) -> list[Any]:
    """Let go of what a pass left gathered: FSDP keeps the last block's parameters for a backward pass. Returns the blocks."""
    blocks = blocks_of(model)
    for block in blocks:
        block.reshard()
    return blocks


def _places(
    module: nn.Module,
    block: nn.Module,
    blocks: set[int],
    names: dict[int, str],
    places: dict[int, list[tuple[nn.Module, str, str]]],
) -> None:
    """Collect by wrapped block the parameters that it gathers: their module, their key in it and their first name."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            places.setdefault(id(block), []).append((module, key, names[id(parameter)]))
    for child in module.children():
        _places(child, child if id(child) in blocks else block, blocks, names, places)


def gradients(model: nn.Module, at: Parameters, scalar: Callable[[Parameters | None], Tensor]) -> Sequence[Tensor]:
    """Return ∂ scalar(θ)/∂θ at the tensors `at`; of a sharded model, whose θ is its own (None), summed over the processes."""
    if is_sharded(model):
        return pulled_back(model, list(at), lambda: (scalar(None), None))
    theta = {name: tensor.clone().requires_grad_(True) for name, tensor in at.items()}
    return torch.autograd.grad(scalar(theta), list(theta.values()), materialize_grads=True)


def pulled_back(
    model: nn.Module, names: Sequence[str], run: Callable[[], tuple[Tensor, Tensor | None]]
) -> list[Tensor]:
    """Return the gradients of `names`, in pieces, summed over the processes, of what `run` returns: (outputs, their cotangent).

    A cotangent of None stands for 1, of a scalar. The model's own `grad` is put back.
    """
    _in_pieces(model)
    parameters: dict[str, Any] = dict(model.named_parameters())
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    if fixed := [name for name in names if not parameters[name].requires_grad]:
        raise BadInput(
            f"the sharded model's parameter {fixed[0]!r} has requires_grad off, so it gets no gradient; set it before sharding"
        )
    try:
        for parameter in parameters.values():
            parameter.grad = None
        with torch.enable_grad():
            outputs, cotangent = run()
            torch.autograd.backward(outputs, cotangent)
        _in_pieces(model)
        found = []
        for name in names:
            parameter = parameters[name]
            if parameter.grad is None:
                found.append(torch.zeros_like(parameter.detach()))
            else:  # FSDP averages over the processes
                found.append(parameter.grad.detach() * parameter.device_mesh.size())
        return found
    finally:
        for name, old in kept.items():
            parameters[name].grad = old
