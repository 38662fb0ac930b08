"""Which rows each step of a Trainer run saw, read off the sampler as it goes by, and the log that keeps it.

The sampler yields row numbers long before the step that uses them: loaders fetch ahead, and each process skips the batches
of the others. So what passes is only kept, by its place in the epoch; a finished step tells by its own place in the epoch
which of them it used.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.data_loader import BatchSamplerShard

from nlpinf.errors import BadInput

STEPS_FILE = "nlpinf_steps.jsonl"


class Tap:
    """Stands in for a batch sampler and keeps what it yields; else it is the sampler itself, random state included.

    `seen[k]` are the row numbers of batch k of the pass that began last.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.seen: dict[int, array] = {}

    def __iter__(self) -> Iterator[Any]:
        self.seen = {}
        for k, batch in enumerate(self._sampler):
            self.seen[k] = array("q", batch)
            yield batch

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)


class StepRows:
    """The rows of each step, of all processes, from what the main process's sampler yields."""

    def __init__(self, loader: Any, processes: int) -> None:
        base = getattr(loader, "base_dataloader", loader)
        sampler = base.batch_sampler
        self.length = len(loader)
        self.processes, self.split, self.even = processes, False, True
        if isinstance(sampler, BatchSamplerShard):
            self.processes, self.split, self.even = sampler.num_processes, sampler.split_batches, sampler.even_batches
            self.tap = sampler.batch_sampler = Tap(sampler.batch_sampler)
        else:
            self.tap = Tap(sampler)
            base.__dict__["batch_sampler"] = self.tap  # a DataLoader lets nobody assign it, and reads it at each epoch
        self._first: list[array] = []

    @classmethod
    def of(cls, loader: Any, processes: int) -> StepRows | str:
        """Return the rows of the steps of `loader`, or the reason why they cannot be known."""
        base = getattr(loader, "base_dataloader", loader)
        if type(loader).__name__ == "DataLoaderDispatcher":
            return "the main process loaded the batches for all (dispatch_batches)"
        if not hasattr(base, "__dict__") or getattr(base, "batch_sampler", None) is None:
            return "the data are a stream, whose rows have no numbers"
        if processes > 1 and not isinstance(base.batch_sampler, BatchSamplerShard):
            return "the processes shared out the batches in a way of their own"
        return cls(loader, processes)

    def take(self, epoch: float, batches: int) -> list[list[list[int]]]:
        """Return the rows of the step that ended at `epoch` (in epochs) after `batches` batches: by batch and process."""
        place = (epoch % 1.0) * self.length
        end = round(place) or self.length
        return [self._group(k) for k in range(end - batches, end)]

    def _group(self, k: int) -> list[list[int]]:
        """The rows of batch k of every process, as accelerate shares them out."""
        n = 1 if self.split else self.processes
        seen = self.tap.seen
        group = [seen[i] for i in range(k * n, (k + 1) * n) if i in seen]
        if k == 0:
            self._first = group
        for i in range(k * n, (k + 1) * n):
            if k > 0:
                seen.pop(i, None)
        if self.processes == 1:
            return [group[0].tolist()]
        size = getattr(self.tap, "batch_size", None)
        if not self.split and len(group) == n and all(size is None or len(b) == size for b in group):
            return [b.tolist() for b in group]
        # The last, uneven group is filled up from the epoch's first rows: by the rule of the shards themselves.
        first = self._first or [seen[i] for i in range(n) if i in seen]
        told = _Told(([] if k == 0 else first) + group, size, getattr(self.tap, "drop_last", False))
        ends = []
        for process in range(self.processes):
            shard = BatchSamplerShard(told, self.processes, process, self.split, self.even)  # type: ignore[arg-type]
            own = [list(batch) for batch in shard]
            ends.append(own[-1] if len(own) > (k > 0) else [])
        return ends


class _Told:
    """A batch sampler of given batches."""

    def __init__(self, batches: Sequence[array], batch_size: int | None, drop_last: bool) -> None:
        self.batches, self.batch_size, self.drop_last = batches, batch_size, drop_last

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)


class StepLog:
    """One JSON line a step, appended: `step`, `epoch`, `lr` by parameter group, `rows` by batch and process.

    A resumed run goes on in the same file after a line {"resumed": step}: steps behind it were undone, and come again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        resumed = path.exists() and path.stat().st_size > 0
        if resumed and path.read_bytes()[-1:] != b"\n":
            self._append("\n")  # the run was killed within a line
        if resumed:
            self.write({"resumed": step})
        else:
            self._append("")

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line and hand it to the system."""
        self._append(json.dumps(entry, separators=(",", ":")) + "\n")

    def _append(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)


def read_steps(run: str | Path, last: int | None = None) -> list[dict[str, Any]]:
    """Return the steps that led to a run's weights, in order, up to step `last` where a checkpoint is meant.

    Steps that a resumption undid are left out, and so is a line that was cut off. Raises `BadInput` if a step is missing.
    """
    path = Path(run) / STEPS_FILE
    if not path.exists() and (Path(run).parent / STEPS_FILE).exists():
        path = Path(run).parent / STEPS_FILE  # a checkpoint's log lies in its run's folder
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; train with nlpinf.StageRecorder() to have one") from None
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            following = lines[number : number + 2]
            if not following or any('"resumed"' in text for text in following):
                continue
            raise BadInput(f"{path}: line {number} is not valid JSON; the log is damaged") from None
        if "resumed" in entry:
            steps = {k: v for k, v in steps.items() if k <= entry["resumed"]}
        else:
            steps[entry["step"]] = entry
    found = [steps[k] for k in sorted(steps) if last is None or k <= last]
    if found and [s["step"] for s in found] != list(range(1, len(found) + 1)):
        absent = next(i for i, s in enumerate(found, 1) if s["step"] != i)
        raise BadInput(f"{path}: step {absent} is missing; the log does not tell the whole run")
    return found
