"""Who does which part: any number of processes share a scores folder, join, die and are started again.

A process that takes a part makes a claim beside it, a file that it alone creates, and holds a lock on that file, which
the kernel lets go of when the process ends, however it ends. Others leave claimed parts for last; then they wait for
those whose claim is locked, and do the rest again. Where a file system has no such locks, a part may be done twice, which
does no harm: a part is a function of its rows, appears under its name whole, and the first to come stays.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from nlpinf.errors import BadInput
from nlpinf.scoring.feed import Feed, Part
from nlpinf.scoring.files import disk
from nlpinf.scoring.rows import Tick
from nlpinf.scoring.store import CLAIM, Store

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[int, int], None]
Make = Callable[[Part, Tick], pa.Table]

_WAIT = 0.2  # seconds between two looks at parts that others are doing
_PACE = 1.0  # seconds between two reports within a part


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count`, from 0: the parts whose number leaves the remainder `index` when divided by `count`."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise BadInput(
                f"the shard {self.index}/{self.count} is none; shards are counted from 0: 0/{max(1, self.count)} to "
                f"{max(1, self.count) - 1}/{max(1, self.count)}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "3/64"."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise BadInput(
                f"the shard {text!r} is not of the form INDEX/COUNT, such as 3/64; shards are counted from 0"
            )
        return cls(int(index), int(count))

    @classmethod
    def of_launcher(cls) -> Shard | None:
        """Return the share of this process in a group that torchrun, `accelerate launch` or `srun` started, if one did."""
        for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            values = os.environ.get(index, ""), os.environ.get(count, "")
            if all(value.isdecimal() for value in values) and int(values[0]) < int(values[1]):
                return cls(int(values[0]), int(values[1]))
        return None

    def __contains__(self, part: int) -> bool:
        return part % self.count == self.index


class Claims:
    """Claims on the parts of a folder. A claim only orders the work; the result never depends on one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, part: int) -> Path:
        """Return the path of a part's claim."""
        return self.folder / f".part-{part:05d}{CLAIM}"

    @contextmanager
    def take(self, part: int, again: bool = False) -> Iterator[bool]:
        """Yield whether the part is ours to do while the block runs; `again` takes over what a dead process claimed."""
        path = self.path(part)
        with disk(path):
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | (0 if again else os.O_EXCL), 0o644)
            except FileExistsError:
                handle = -1
        if handle < 0:
            yield False
            return
        try:
            if not _locked(handle):
                yield False
                return
            _sign(handle)
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)

    def held(self, part: int) -> bool:
        """Say whether a process that lives holds the part's claim."""
        try:
            handle = os.open(self.path(part), os.O_RDWR)
        except OSError:
            return False
        try:
            return not _locked(handle)
        finally:
            os.close(handle)


def _locked(handle: int) -> bool:
    """Lock the file, unless another process holds it; where there are no locks, say that it is ours."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


def _sign(handle: int) -> None:
    """Write who works on the part, for people to read; on a full disk it stays unsigned."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
    except OSError:
        pass


class Worker:
    """Does the missing parts of a store: with `only`, those of its shard; else all, those of the launcher's share first."""

    def __init__(
        self, store: Store, feed: Feed, make: Make, only: Shard | None = None, progress: Progress | None = None
    ) -> None:
        self.store, self.feed, self.make, self.only = store, feed, make, only
        self.claims = Claims(store.folder)
        self._pace = _Pace(store, progress)

    def run(self) -> None:
        """Return when no part is missing, but for those of other shards if there is one."""
        share = self.only or Shard.of_launcher()
        if share is not None:
            self._sweep([part for part in self._missing() if part in share])
        self._sweep(self._missing())
        while missing := self._missing():
            if all(self.claims.held(part) for part in missing):
                time.sleep(_WAIT)
                self._pace.report()
            else:
                self._sweep(missing, again=True)
        self._pace.report(last=True)
        self.store.tidy()

    def _missing(self) -> list[int]:
        return [part for part in self.store.missing() if self.only is None or part in self.only]

    def _sweep(self, parts: list[int], again: bool = False) -> None:
        if not parts:
            return
        for part in self.feed.parts(parts, self.store.part_rows):
            if self.store.has(part.number):
                continue
            with self.claims.take(part.number, again) as ours:
                if ours and not self.store.has(part.number):
                    self.store.write(part.number, self.make(part, self._pace.tick))
                    self._pace.finished(len(part.rows))


class _Pace:
    """Reports rows done by all processes: after each part of ours, and about once a second in between."""

    def __init__(self, store: Store, progress: Progress | None) -> None:
        self.store, self.progress = store, progress
        self.done, self.within = store.done(), 0
        self.looked = self.told = time.monotonic()

    def tick(self, rows: int) -> None:
        self.within += rows
        if time.monotonic() - self.told > _PACE:
            self._tell(self.done + self.within)

    def finished(self, rows: int) -> None:
        self.done, self.within = self.done + rows, 0
        self.report(always=True)

    def report(self, always: bool = False, last: bool = False) -> None:
        """Look what others did, about once a second, and tell."""
        before = self.done
        if last or time.monotonic() - self.looked > _PACE:
            self.done, self.looked = self.store.done(), time.monotonic()
        if always or self.done != before:
            self._tell(self.done)

    def _tell(self, done: int) -> None:
        self.told = time.monotonic()
        if self.progress is not None:
            self.progress(min(done, self.store.rows), self.store.rows)
