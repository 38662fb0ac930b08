"""Solves that go on after an interruption: the state of each in a folder, with what it was the state of.

A folder holds a folder for each solve: `manifest.json`, the identity of the solve; while it runs `NAME.state.safetensors`,
the last state that was kept; and `NAME.solved.safetensors`, the solutions of what is done, NAME being a part of the solve.
A file appears whole or not at all, its numbers in the header beside its tensors, so that the two cannot disagree. In a
group of processes the first one writes, and all must see the folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nlpinf import parameters as P
from nlpinf import processes
from nlpinf.errors import BadInput
from nlpinf.files import publish, save_tensors
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import Solution

MINUTES = 5.0
MANIFEST = "manifest.json"
_CLOSE = 1e-4  # what other numbers of threads or processes change in sums of floating point numbers is far below this


class Checkpoints:
    """The folder where the solves of one query keep their states.

    `minutes`  between two writes of a state: what a solve that is killed loses at most; 0 writes after every step
    `restart`  forget what the folder holds
    `say`      is told in a line of each solve that goes on from a state, or was done before, and what a preconditioner will take
    `about`    is part of what must be the same: which queries they are
    """

    def __init__(
        self,
        folder: str | Path,
        minutes: float = MINUTES,
        *,
        restart: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if not minutes >= 0:
            raise BadInput(f"the time between checkpoints is {minutes} minutes; it must be at least 0")
        self.folder, self.minutes, self.say = Path(folder), minutes, say or (lambda _: None)
        self.about: dict[str, Any] = {}
        self._taken: Counter[str] = Counter()
        if restart:
            if processes.main():
                shutil.rmtree(self.folder, ignore_errors=True)
            processes.total_of(0.0)  # the others wait for it

    @classmethod
    def of(cls, where: str | Path | Checkpoints | None) -> Checkpoints | None:
        """Return the checkpoints in a folder; anything else as it is."""
        return cls(where) if isinstance(where, str | Path) else where

    def remove(self) -> None:
        """Remove the folder: the query is saved."""
        if processes.main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def of_solve(self, name: str, identity: dict[str, Any], device: torch.device) -> SolveCheckpoint:
        """Return the checkpoint of a solve; `BadInput` names what differs from the solve of that name in the folder.

        Solves of one name are told apart by their order, which is that of the run that was interrupted.
        """
        self._taken[name] += 1
        name += f" ({self._taken[name]})" if self._taken[name] > 1 else ""
        folder = self.folder / "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
        path, identity = folder / MANIFEST, {**self.about, **identity}
        if not path.exists() and processes.main():
            folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps(identity, indent=1, ensure_ascii=False, default=str).encode() + b"\n"
            publish(path, lambda temporary: temporary.write_bytes(content))
        processes.total_of(0.0)  # the others wait for it
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if not processes.all_of(there is not None):
            raise BadInput(
                f"{path}: cannot be read; all processes must see this folder; start the solves afresh (--restart)"
            )
        if differs := difference(there, identity):
            raise BadInput(
                f"{folder}: holds a solve that was interrupted, of another {differs}; "
                "give the same, or another folder, or start the solves afresh (--restart)"
            )
        return SolveCheckpoint(self, name, folder, "all", device)


class SolveCheckpoint:
    """The `Checkpoint` of a solve or of a part of one."""

    def __init__(self, owner: Checkpoints, title: str, folder: Path, name: str, device: torch.device) -> None:
        self._owner, self._title, self._folder, self._name, self._device = owner, title, folder, name, device
        self._latest: dict[str, Any] | None = None
        self._written = time.monotonic()

    def restored(self) -> dict[str, Any] | None:
        """Return the fields of the state that was written last; None if there is none."""
        found = self._read("state")
        if found is not None:
            self._owner.say(f"{self._title}: goes on after {found['products']} products")
        return found

    def keep(self, state: dict[str, Any]) -> None:
        """Take the fields of a state, and write them if the last write is long enough ago."""
        self._latest = state
        if time.monotonic() - self._written >= 60 * self._owner.minutes:
            self.flush()

    def flush(self) -> None:
        """Write what was kept last."""
        if self._latest is not None:
            self._write("state", self._latest)
            self._written, self._latest = time.monotonic(), None

    def solved(self, name: str, solve: Callable[[SolveCheckpoint], list[Solution]]) -> list[Solution]:
        """Return the solutions of a part that is done, or what `solve` returns, and keep it.

        One that used its products up stays open with its last state, so that a later run with more of them goes on.
        """
        part = SolveCheckpoint(self._owner, self._title, self._folder, f"{self._name}-{name}", self._device)
        found = part._read("solved")
        if found is not None:
            self._owner.say(f"{self._title}: done before")
            return [Solution(vector, **end) for vector, end in zip(found["vectors"], found["ends"])]
        solutions = solve(part)
        if any(s.verdict == "not converged" for s in solutions):
            part.flush()
            return solutions
        ends = [{f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name != "vector"} for s in solutions]
        part._write("solved", {"vectors": [s.vector for s in solutions], "ends": ends})
        if processes.main():
            for inner in self._folder.glob(f"{part._name}[-.]*"):
                if inner != part._path("solved"):
                    inner.unlink(missing_ok=True)
        return solutions

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._name}.{kind}.safetensors"

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        if not processes.main():
            return
        tensors: dict[str, Tensor] = {}
        header = {"fields": json.dumps(_packed(fields, "", tensors))}
        publish(self._path(kind), lambda temporary: save_tensors(tensors, temporary, header))

    def _read(self, kind: str) -> dict[str, Any] | None:
        path = self._path(kind)
        there, found = path.exists(), None
        if processes.total_of(float(there)) not in (0.0, float(processes.count())):
            raise BadInput(
                f"{path}: some processes see this file and some do not; give a folder that all of them share"
            )
        if not there:
            return None
        try:
            with safe_open(path, "pt") as file:
                found = _unpacked(json.loads(file.metadata()["fields"]), file, self._device)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            pass
        # All have read it before the first may go on, and remove it.
        if not processes.all_of(found is not None):
            raise BadInput(f"{path}: is damaged; delete it, or start the solves afresh (--restart)")
        assert isinstance(found, dict)
        return found


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value for JSON, its tensors put into `tensors`; trees keep the order of their names, as sums run in it."""
    if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
        for name, tensor in value.items():
            # A copy where fields share memory, which a file cannot say.
            tensors[f"{place}/{name}"] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tree": place, "names": list(value)}
    if isinstance(value, dict):
        return {"fields": {k: _packed(v, f"{place}/{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value):
        return {"items": [_packed(v, f"{place}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _unpacked(packed: dict[str, Any], file: Any, device: torch.device) -> Any:
    if "tree" in packed:
        return {name: file.get_tensor(f"{packed['tree']}/{name}").to(device) for name in packed["names"]}
    if "fields" in packed:
        return {k: _unpacked(v, file, device) for k, v in packed["fields"].items()}
    if "items" in packed:
        return [_unpacked(v, file, device) for v in packed["items"]]
    return packed["value"]


def sketch(vectors: Sequence[Parameters]) -> list[list[float]]:
    """Return for each vector its norm and four inner products with random ones: equal for equal vectors, to rounding."""
    if not vectors:
        return []
    draws = [P.random_like(vectors[0], 40487 + i, P.rademacher) for i in range(4)]
    return [[P.norm(v), *(P.dot(draw, v) for draw in draws)] for v in vectors]


def difference(there: Any, now: dict[str, Any]) -> str | None:
    """Name the first entry in which two identities differ; numbers under `measured` may differ by rounding."""
    now = json.loads(json.dumps(now, default=str))
    if not isinstance(there, dict):
        return "kind"
    for key in [*now, *(k for k in there if k not in now)]:
        old, new = there.get(key), now.get(key)
        if key == "measured" and isinstance(old, dict) and isinstance(new, dict):
            for name in [*new, *(k for k in old if k not in new)]:
                if not _close(old.get(name), new.get(name)):
                    return name + _told(old.get(name), new.get(name))
        elif isinstance(old, dict) and isinstance(new, dict):
            for name in [*new, *(k for k in old if k not in new)]:
                if old.get(name) != new.get(name):
                    return f"{key} {name}{_told(old.get(name), new.get(name))}"
        elif old != new:
            return key + _told(old, new)
    return None


def _told(old: Any, new: Any) -> str:
    short = all(isinstance(v, int | float | bool | None) or (isinstance(v, str) and len(v) < 40) for v in (old, new))
    return f" ({old!r} there, {new!r} now)" if short else " (not the same there and now)"


def _close(old: Any, new: Any) -> bool:
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return False
        if old and not isinstance(old[0], list):  # of a sketch, the first number is the size of the others
            size = max((abs(v) for v in [*old, *new] if math.isfinite(v)), default=0.0)
            return all(abs(a - b) <= _CLOSE * size or a == b or (a != a and b != b) for a, b in zip(old, new))
        return all(_close(a, b) for a, b in zip(old, new))
    if isinstance(old, float | int) and isinstance(new, float | int):
        return math.isclose(old, new, rel_tol=_CLOSE)
    return bool(old == new)


__all__ = ["MINUTES", "Checkpoints", "SolveCheckpoint", "difference", "sketch"]
