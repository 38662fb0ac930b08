"""What a stage's trained parameters do not reach is computed once for each batch: a frozen encoder below a trained head.

A part of the network is constant if none of its parameters is trained and nothing that enters it depends on one that is;
the largest such parts are run once for each batch of a curvature sample, and what they gave is handed on in every product
after that. Both are seen by autograd in a pass of their own, so that a network in which trained parameters come first is
left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nlpinf import sharded
from nlpinf.evaluation import replaced
from nlpinf.stages import Stage
from nlpinf.tasks import Batch

KEEP = 1 << 30  # bytes for one curvature sample; batches beyond are computed anew each time


class Constants:
    """The constant parts' outputs for the batches of one curvature sample, kept from each batch's first use on."""

    def __init__(self, stage: Stage, limit: int = KEEP) -> None:
        self.stage, self.limit, self._room = stage, limit, limit
        named = dict(stage.model.named_parameters())
        trained = {id(named[name]) for name in stage.theta}
        self._parts = [] if sharded.is_sharded(stage.model) else list(_parts(stage.model, trained))
        self._kept: dict[int, tuple[Batch, dict[nn.Module, Any]]] = {}  # by the batch's identity, which it keeps alive

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """Within, the constant parts hand on what they gave for this batch; call it within `evaluation`."""
        if not self._parts:
            yield
            return
        if id(batch) not in self._kept:
            self._kept[id(batch)] = batch, self._record(batch)
        with ExitStack() as stack:
            for part, output in self._kept[id(batch)][1].items():
                stack.enter_context(replaced(part, partial(_handed, output)))
            yield

    def _record(self, batch: Batch) -> dict[nn.Module, Any]:
        records = [_Record(part) for part in self._parts]
        leaves = {name: t.detach().requires_grad_(True) for name, t in self.stage.theta.items()}
        with ExitStack() as stack, torch.enable_grad():
            for record in records:
                stack.enter_context(replaced(record.part, record))
            self.stage.outputs(batch, leaves)
        outputs = {record.part: record.outputs[0] for record in records if record.constant}
        size = sum(leaf.untyped_storage().nbytes() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
        if size > self._room:
            return {}
        self._room -= size
        return outputs


class _Record:
    """A part's forward pass; keeps its outputs and whether they depend on a trained parameter."""

    def __init__(self, part: nn.Module) -> None:
        self.part, self.outputs = part, list[Any]()
        self._plain, self._changes, self._versions = part.forward, False, list[tuple[Tensor, int]]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._plain(*args, **kwargs)
        for leaf in pytree.tree_leaves((args, kwargs, found)):
            if isinstance(leaf, Tensor):
                self._changes |= leaf.requires_grad
            else:  # of a container that is not known, its tensors are not either
                self._changes |= not isinstance(leaf, bool | int | float | str | None)
        self._versions += [(leaf, leaf._version) for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
        self.outputs.append(found)
        return found

    @property
    def constant(self) -> bool:
        """Whether the output may be handed on again: one call, no trained parameter before it, never written over."""
        written = any(tensor._version != version for tensor, version in self._versions)
        return len(self.outputs) == 1 and not self._changes and not written


def _parts(module: nn.Module, trained: set[int]) -> Iterator[nn.Module]:
    """Yield the largest modules that have parameters, and no trained ones."""
    own = list(module.parameters())
    if own and not any(id(p) in trained for p in own):
        yield module
    elif own:
        for child in module.children():
            yield from _parts(child, trained)


def _handed(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output
