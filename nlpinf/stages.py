"""Stage: what one training run minimised. Chain: stages in order, and how each hands its parameters to the next.

A stage's objective over its corpus of m examples is

    G(θ) = 1/m Σ_i g(z_i; θ) + ½ Σ_name weight_decay[name] ‖θ[name]‖²

with g of the task and reduction (see `Stage`). The notation is that of docs/concepts.md.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nlpinf import memory, processes, sharded
from nlpinf import parameters as P
from nlpinf.errors import BadInput
from nlpinf.evaluation import evaluation as evaluation  # the state in which a stage is computed with
from nlpinf.parameters import Parameters
from nlpinf.tasks import Batch, Task

Reduction = Literal["example", "token"]
Precision = Literal["bfloat16", "float16"]


@dataclass(frozen=True)
class Stage:
    """One training run: model, task, data and what it minimised. Immutable; never changes the model it is given.

    `data`          examples as the task takes them; a `Corpus` brings its own row numbers, others are numbered from 0
    `weight_decay`  one number for all trained parameters, or one by name (names left out have none)
    `reduction`     "example": g(z) = mean of z's counted losses; "token": g(z) = (m / T) · their sum, with T the counted
                    items of the whole corpus, so that G is the mean over all items
    `trained`       names of the parameters that the run moved; default: those with `requires_grad`
    `batch_size`    examples in a batch at most; `batch_tokens` padded tokens in a batch at most; 0: by the device, 64 and
                    2,048 on a CPU, 512 and 16,384 on a GPU
    `precision`     "bfloat16" or "float16": the network runs under autocast; losses, sums and vectors stay as they were
    """

    model: nn.Module
    task: Task
    data: Sequence[Any]
    weight_decay: float | Mapping[str, float] = 0.0
    reduction: Reduction = "example"
    trained: Sequence[str] | None = None
    name: str = "stage"
    batch_size: int = 0
    batch_tokens: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision | None = None

    def __post_init__(self) -> None:
        sharded.check(self.model)
        names = dict(self.model.named_parameters())
        if not len(self.data):
            raise BadInput(f"stage {self.name!r} has no examples")
        if self.reduction not in ("example", "token"):
            raise BadInput(f"stage {self.name!r}: reduction {self.reduction!r} is neither 'example' nor 'token'")
        trained = [n for n, p in names.items() if p.requires_grad] if self.trained is None else list(self.trained)
        if unknown := [n for n in trained if n not in names]:
            raise BadInput(
                f"stage {self.name!r}: the model has no parameter {unknown[0]!r} (tied weights go by their first name)"
            )
        if not trained:
            raise BadInput(f"stage {self.name!r} trained no parameter; name them in `trained` or set requires_grad")
        object.__setattr__(self, "trained", tuple(trained))
        decay = self.weight_decay
        decay = (
            {n: float(decay) for n in trained}
            if isinstance(decay, int | float)
            else {n: float(decay.get(n, 0.0)) for n in trained}
        )
        if not all(0 <= value < float("inf") for value in decay.values()):
            raise BadInput(f"stage {self.name!r}: weight decay must be finite and not negative")
        object.__setattr__(self, "weight_decay", decay)
        for limit, size in zip(("batch_size", "batch_tokens"), memory.sizes(self.device)):
            if getattr(self, limit) < 0:
                raise BadInput(f"stage {self.name!r}: {limit} must not be negative")
            object.__setattr__(self, limit, getattr(self, limit) or size)
        for name, tensor in self.parameters.items():
            if not P.finite({name: tensor}):
                raise BadInput(
                    f"stage {self.name!r}: parameter {name!r} has NaN or infinite entries; use a checkpoint from before"
                )

    @classmethod
    def from_run(cls, folder: Any, **changes: Any) -> Stage:
        """Open a run folder: what `save_pretrained` leaves plus nlpinf_stage.json. `changes` override recorded settings."""
        from nlpinf.adapters.huggingface import stage_from_run  # adapters build stages, so they import this module

        return stage_from_run(folder, **changes)

    @cached_property
    def parameters(self) -> Parameters:
        """All parameters of the model, trained or not, detached: θ."""
        return P.of_model(self.model)

    @property
    def theta(self) -> Parameters:
        """The trained parameters."""
        return P.select(self.parameters, self.trained or ())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(iter(self.theta.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.theta.values())).device

    def at(self, precision: Precision | None) -> Stage:
        """Return this stage with another precision; what was counted of its corpus is kept."""
        other = copy.copy(self)
        object.__setattr__(other, "precision", precision)
        return other

    @property
    def size(self) -> int:
        """m, the number of examples in the corpus."""
        return len(self.data)

    @cached_property
    def rows(self) -> Tensor:
        """The examples' permanent row numbers, (m,) int64, in the corpus's order."""
        rows = getattr(self.data, "rows", None)
        return torch.arange(self.size) if rows is None else torch.as_tensor(rows, dtype=torch.int64)

    @cached_property
    def items(self) -> int:
        """T, the number of counted items of the corpus; one pass over it, or as the run recorded it."""
        if "items" in self.record:
            return int(self.record["items"])
        return sum(
            self.task.counted(self.task.encode([self.data[i] for i in range(start, min(start + 1024, self.size))]))
            for start in range(0, self.size, 1024)
        )

    def item_weights(self, batch: Batch) -> Tensor:
        """Return the w of g(z) = Σ_{items of z} w ℓ for every item, (I,) in the model's dtype."""
        if self.reduction == "token":
            return torch.full((len(batch.example),), self.size / self.items, dtype=self.dtype, device=self.device)
        return batch.counts[batch.example].to(self.dtype).reciprocal()

    def batches(self, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield batches of the examples at `indices` (default: all), longest together, on the model's device."""
        order = range(self.size) if indices is None else indices
        encoded = self.task.encode([self.data[i] for i in order])
        rows = [int(self.rows[i]) for i in order]
        for chosen in length_batches([self.task.length(e) for e in encoded], self.batch_size, self.batch_tokens):
            yield self.on_device(self.task.collate([encoded[i] for i in chosen], [rows[i] for i in chosen]))

    def on_device(self, batch: Batch) -> Batch:
        """Return the batch on the model's device, its floating point tensors in the model's dtype."""
        return batch.to(self.device).cast(self.dtype)

    def outputs(self, batch: Batch, changed: Parameters | None = None) -> Tensor:
        """Return the task's outputs (I, classes) at θ, with the tensors in `changed` in the place of θ's; call it within `evaluation`."""
        model: Any = self.model
        if not sharded.is_sharded(model):
            model = _Functional(self.model, {**self.parameters, **(changed or {})})
        elif changed:
            raise BadInput(f"stage {self.name!r}: its model is sharded among processes, which cannot be done with it")
        if self.precision is None:
            try:
                return self.task.outputs(model, batch)
            except IndexError as error:
                raise BadInput(
                    f"stage {self.name!r}: its model has no place or no word for a token of its rows ({error}); give the task "
                    "a max_length within the model's positions, and the tokenizer that the model was trained with"
                ) from error
        # Without autocast's cache: it holds what it cast by the tensor, and a dual tensor's tangent would be lost.
        with torch.autocast(self.device.type, getattr(torch, self.precision), cache_enabled=False):
            outputs = self.task.outputs(model, batch)
        return outputs.to(self.dtype)

    def example_losses(self, batch: Batch, changed: Parameters | None = None) -> Tensor:
        """Return g(z) of every example, (B,), differentiable in `changed`; call it within `evaluation`."""
        items = self.task.losses(self.outputs(batch, changed), batch) * self.item_weights(batch)
        return items.new_zeros(len(batch)).index_add(0, batch.example, items)

    def objective(self, changed: Parameters | None = None, indices: Sequence[int] | None = None) -> float:
        """Return G over the examples at `indices` (default: all), weight decay included."""

        def mean(stage: Stage) -> float:
            total, count = 0.0, 0
            with evaluation(self.model), torch.no_grad():
                for batch in stage.batches(indices):
                    total += float(stage.example_losses(batch, changed).double().sum())
                    count += len(batch)
            return total / count

        theta = {**self.theta, **(changed or {})}
        decay = sum(value * float(theta[n].double().square().sum()) for n, value in self.decay.items())
        return memory.within(self, mean) + 0.5 * decay

    def _sum(self, batch: Batch, weight: float, changed: Parameters | None = None) -> Tensor:
        return self.example_losses(batch, changed).sum() * weight

    @property
    def decay(self) -> dict[str, float]:
        """Weight decay of every trained parameter by name."""
        assert isinstance(self.weight_decay, dict)
        return self.weight_decay

    def gradient(
        self, names: Sequence[str] | None = None, indices: Sequence[int] | None = None, *, decay: bool = True
    ) -> Parameters:
        """Return ∇G over the examples at `indices` (default: all) for `names` (default: the trained ones).

        In a group of processes each does its share, so all of them must call it.
        """
        names = list(names or self.trained or ())
        template = P.select(self.parameters, names)

        def summed(stage: Stage) -> tuple[Parameters, int]:
            sums, count = P.sums_like(template), 0
            with evaluation(self.model):
                for batch, own in processes.turns(stage.batches(indices), sharded.is_sharded(self.model)):
                    gradients = sharded.gradients(self.model, template, partial(stage._sum, batch, own))
                    for name, gradient in zip(names, gradients):
                        sums[name] += gradient
                    count += len(batch) * own
            return sums, count

        sums, count = memory.within(self, summed)
        total = P.mean_like(processes.total(sums), processes.total_of(count), template)
        if decay:
            total = {n: t + self.decay.get(n, 0.0) * self.parameters[n] for n, t in total.items()}
        return total


class _Functional:
    """Looks like the module to a task, and runs it at other parameters; tied weights follow their first name."""

    def __init__(self, module: nn.Module, values: Parameters) -> None:
        self._module, self._values = module, values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._module, self._values, args, kwargs, tie_weights=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def length_batches(lengths: Sequence[int], batch_size: int, batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices in batches of like length, at most `batch_size` of them and `batch_tokens` after padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # ties stay in their order
    start = 0
    while start < len(order):
        width = max(1, lengths[order[start]])
        count = max(1, min(batch_size, batch_tokens // width))
        yield order[start : start + count]
        start += count


@dataclass(frozen=True)
class Proximity:
    """Case 2: the stage minimised F(W, Θ) + α ‖W − W*‖², W* being what its parent handed it."""

    alpha: float

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise BadInput(
                f"the proximity α is {self.alpha}; it must be greater than 0 (use transfer='frozen' if W was kept)"
            )


Transfer = Literal["frozen"] | Proximity


@dataclass(frozen=True)
class Link:
    """A stage and what it received: `received` maps its own names to its parent's; `transfer` says what became of them.

    The first stage of a chain received nothing.
    """

    stage: Stage
    received: dict[str, str]
    transfer: Transfer | None

    @property
    def moved(self) -> tuple[str, ...]:
        """Received names that this stage went on training, W of case 2."""
        return tuple(n for n in self.received if n in self.stage.decay)

    @property
    def kept(self) -> tuple[str, ...]:
        """Received names that this stage left as they were, W of case 1."""
        return tuple(n for n in self.received if n not in self.stage.decay)

    @property
    def alpha(self) -> float:
        """α, 0 where nothing moved."""
        return self.transfer.alpha if isinstance(self.transfer, Proximity) else 0.0

    @property
    def shift(self) -> dict[str, float]:
        """The diagonal that the stage's Hessian has beside its losses': weight decay, and 2α on what it moved."""
        return {n: value + (2 * self.alpha if n in self.received else 0.0) for n, value in self.stage.decay.items()}


class Chain:
    """Stages in order, the pretraining first; parameters of the same name and shape are what is handed on.

    `transfer`  how the encoder passes: "frozen" (case 1) or `Proximity(α)` (case 2), one for all or one for each step
    `shared`    for each step a map from the later stage's names to the earlier one's, where the names differ
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        transfer: Transfer | Sequence[Transfer] = "frozen",
        shared: Sequence[Mapping[str, str] | None] | None = None,
    ) -> None:
        if not stages:
            raise BadInput("a chain needs at least one stage")
        steps = len(stages) - 1
        transfers: list[Any] = list(transfer) if isinstance(transfer, list | tuple) else [transfer] * steps
        maps = list(shared) if shared is not None else [None] * steps
        if len(transfers) != steps or len(maps) != steps:
            raise BadInput(f"a chain of {len(stages)} stages has {steps} steps; give one transfer (and map) for each")
        self.links = [Link(stages[0], {}, None)]
        for parent, stage, how, names in zip(stages, stages[1:], transfers, maps):
            self.links.append(_link(parent, stage, how, names))

    @property
    def stages(self) -> list[Stage]:
        """The stages, the pretraining first."""
        return [link.stage for link in self.links]


def _link(parent: Stage, stage: Stage, transfer: Transfer, names: Mapping[str, str] | None) -> Link:
    if transfer != "frozen" and not isinstance(transfer, Proximity):
        raise BadInput(f"transfer {transfer!r} is neither 'frozen' nor Proximity(α)")
    theirs, ours = parent.parameters, stage.parameters
    received = dict(names) if names is not None else {n: n for n in ours if n in theirs}
    where = f"stage {stage.name!r} does not descend from {parent.name!r}"
    if not received:
        raise BadInput(
            f"{where}: they share no parameter name (the first are {next(iter(ours))!r} and {next(iter(theirs))!r})"
        )
    for mine, other in received.items():
        if mine not in ours or other not in theirs:
            raise BadInput(f"{where}: no parameter {mine if mine not in ours else other!r}")
        if ours[mine].shape != theirs[other].shape:
            raise BadInput(
                f"{where}: {mine!r} has shape {tuple(ours[mine].shape)}, its parent's {tuple(theirs[other].shape)}"
            )
    link = Link(stage, received, transfer)
    if transfer == "frozen":
        if link.moved:
            raise BadInput(
                f"transfer is 'frozen', but stage {stage.name!r} trained {link.moved[0]!r}; give Proximity(α) or leave it out of `trained`"
            )
    elif not link.moved:
        raise BadInput(
            f"transfer is Proximity, but stage {stage.name!r} trained nothing that it received; use 'frozen'"
        )
    for mine in link.kept:
        if not torch.equal(ours[mine], theirs[received[mine]]):
            raise BadInput(f"{where}: {mine!r} was not trained, yet its values differ from its parent's")
    storages = {P.place(theirs[other]) for other in received.values()} - {0}  # of an empty piece
    if any(P.place(ours[mine]) in storages for mine in link.moved):
        raise BadInput(
            f"stages {parent.name!r} and {stage.name!r} hold the same tensors; give each stage a model of its own (copy.deepcopy)"
        )
    return link


def fingerprint(parameters: Parameters) -> str:
    """Return the sha256 of the parameters' names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = P.gathered(parameters[name]).contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
