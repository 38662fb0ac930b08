"""Pretrain and finetune a stage with the Hugging Face Trainer so that what is minimised is the stage's own G, to the letter.

Weight decay is the L2 term of G (Adam's coupled decay), a proximity term is part of the loss, the losses of an epoch's
batches have the mean 1/m Σ g(z), dropout is whatever the model has (0 is what makes g a function of z). Everything is a
function of the seed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from nlpinf import parameters as P
from nlpinf import processes
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.stages import Stage
from nlpinf.tasks import MaskedLM

StepProgress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Anchor:
    """The proximity term α ‖W − W*‖²: `values` are W* by the stage's names."""

    alpha: float
    values: Parameters

    def loss(self, theta: Parameters) -> Tensor:
        """Return α ‖W − W*‖², differentiable in `theta`."""
        return self.alpha * torch.stack([(theta[n] - v).square().sum() for n, v in self.values.items()]).sum()


class _Examples(Dataset):
    """Encoded examples by (position, turn, step); see `Task.training_batch`."""

    def __init__(self, stage: Stage) -> None:
        self.encoded = stage.task.encode([stage.data[i] for i in range(stage.size)])
        self.rows = stage.rows.tolist()

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Any, int, int, int]:
        position, turn, step = key
        return self.encoded[position], self.rows[position], turn, step


class Schedule:
    """Which examples each step sees: batches of like length in a seeded order, the same whatever rows are left out.

    Rows in `exclude` are taken out of their batches and the rest stays as it was, so that a run without them differs from
    the run with them by nothing else; a batch that loses all of its rows is an empty one, and its step is taken.
    """

    drop_last = False

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        epochs: int,
        seed: int,
        masks: int = 1,
        exclude: Collection[int] = (),
    ) -> None:
        self.lengths, self.batch_size, self.epochs, self.seed, self.masks = lengths, batch_size, epochs, seed, masks
        self.exclude = frozenset(exclude)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    @property
    def mean_size(self) -> float:
        """The mean number of examples of an epoch's batches, left out ones too: the others keep their weight 1/m in G."""
        return len(self.lengths) / len(self)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window, batches = self.batch_size * 50, []
        for start in range(0, len(order), window):  # sorted inside a window only: random enough, half the padding
            near = sorted(order[start : start + window], key=lambda i: self.lengths[i])
            batches += [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
        turn, start = self.epoch % self.masks, self.epoch * len(batches)
        self.epoch += 1
        for step, k in enumerate(torch.randperm(len(batches), generator=generator).tolist(), start):
            yield [(i, turn, step) for i in batches[k] if i not in self.exclude]


class _Arguments(TrainingArguments):
    """Of one process, the stage's own device alone; the Trainer would take the first GPU, and copy the model to the others."""

    place = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        chosen: torch.device = super().device
        return self.place if processes.launched() == 1 else chosen

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


@contextmanager
def _placed(device: torch.device) -> Iterator[None]:
    """Let accelerate put what it prepares on the device."""
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if processes.launched() == 1:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


class _StageTrainer(Trainer):
    def __init__(
        self, stage: Stage, schedule: Schedule, examples: _Examples, anchor: Anchor | None, **kwargs: Any
    ) -> None:
        self.stage, self.schedule, self.examples, self.anchor = stage, schedule, examples, anchor
        super().__init__(model=stage.model, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.examples, batch_sampler=self.schedule, collate_fn=self._collate)  # type: ignore[arg-type]
        return self.accelerator.prepare(loader)

    def _collate(self, chosen: Sequence[tuple[Any, int, int, int]]) -> dict[str, Any]:
        if not chosen:
            return {"batch": None}
        encoded, rows, turns, steps = zip(*chosen)
        return {"batch": self.stage.task.training_batch(encoded, rows, turns[0], steps[0])}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if inputs["batch"] is None:
            loss = torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum() * 0.0
        else:
            batch = inputs["batch"].cast(self.stage.dtype)
            task = self.stage.task
            losses = task.losses(task.outputs(model, batch), batch) * self.stage.item_weights(batch)
            if isinstance(task, MaskedLM) and self.stage.reduction == "token":
                losses = losses * task.masks  # T counts all K masks, of which this batch shows one
            # Divided by the batches' mean size: the rows of a smaller one would else count for more than the others'.
            loss = losses.sum() / self.schedule.mean_size
        if self.anchor is not None:
            loss = loss + self.anchor.loss(dict(model.named_parameters()))
        return loss


class _Progress(TrainerCallback):
    def __init__(self, report: StepProgress) -> None:
        self.report, self.loss = report, float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, state.max_steps, self.loss)


@dataclass(frozen=True)
class Training:
    """Settings of a run: Adam with linear warm-up over `warmup` of the steps and linear decay to 0."""

    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: float = 0.1
    max_gradient_norm: float = 1.0
    seed: int = 0


def train(
    stage: Stage,
    settings: Training,
    *,
    anchor: Anchor | None = None,
    exclude: Collection[int] = (),
    progress: StepProgress | None = None,
) -> float:
    """Minimise the stage's G (plus the anchor's α ‖W − W*‖²) from where its model is; the model's weights change in place.

    `exclude` are positions in the stage's data to do without: what is minimised then is G − 1/m Σ_excluded g, that which a
    score speaks of. Returns the mean training loss of the run's last tenth. Raises `BadInput` where training diverged.
    """
    exclude = frozenset(exclude)
    if len(exclude) >= stage.size:
        raise BadInput(f"stage {stage.name!r}: every example is left out; keep at least one")
    examples = _Examples(stage)
    lengths = [stage.task.length(e) for e in examples.encoded]
    masks = stage.task.masks if isinstance(stage.task, MaskedLM) else 1
    schedule = Schedule(lengths, settings.batch_size, settings.epochs, settings.seed, masks, exclude)
    named = dict(stage.model.named_parameters())
    required = {name: parameter.requires_grad for name, parameter in named.items()}
    for name, parameter in named.items():
        parameter.requires_grad_(name in stage.decay)
    # L2 inside the gradient, so that the minimum is that of G; AdamW's decoupled decay has another one.
    groups = [
        {"params": [named[n] for n, decay in stage.decay.items() if decay == value], "weight_decay": value}
        for value in sorted(set(stage.decay.values()))
    ]
    optimizer = torch.optim.Adam(groups, lr=settings.learning_rate, fused=False)
    steps = len(schedule) * settings.epochs
    scheduler = get_scheduler("linear", optimizer, int(settings.warmup * steps), steps)
    with tempfile.TemporaryDirectory() as scratch, _placed(stage.device):
        arguments = _Arguments(
            output_dir=scratch,
            max_steps=steps,
            max_grad_norm=settings.max_gradient_norm,
            seed=settings.seed,
            logging_steps=max(1, steps // 50),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=stage.device.type == "cpu",
            dataloader_pin_memory=False,
        )
        arguments.place = stage.device
        trainer = _StageTrainer(stage, schedule, examples, anchor, args=arguments, optimizers=(optimizer, scheduler))
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback", "NotebookProgressCallback"):
                trainer.remove_callback(callback)
        if progress is not None:
            trainer.add_callback(_Progress(progress))
        try:
            trainer.train()
        finally:
            for name, parameter in named.items():
                parameter.requires_grad_(required[name])
                parameter.grad = None
    if not P.finite(stage.theta):
        raise BadInput(f"stage {stage.name!r}: the weights became NaN or infinite in training; lower the learning rate")
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tail = log[-max(1, len(log) // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")
