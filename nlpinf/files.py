"""Files that appear whole or not at all: written under another name, synced, then named."""

from __future__ import annotations

import errno
import glob
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nlpinf.errors import BadInput

PARTIAL = ".partial"
_STALE = 3600.0  # seconds without a byte after which a file that is being written is left over


class disk:
    """Turns the operating system's refusals into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = (
                "free some space and run again; finished parts are kept" if full else "check the folder and its rights"
            )
            raise BadInput(f"{self.path}: cannot be written ({error.strerror or error}); {advice}") from error


def publish(path: Path, write: Callable[[Path], Any], name: Callable[[Path, Path], Any] = os.replace) -> None:
    """Let `write` fill a file of another name, sync it, and give it its name by `name`; leave nothing if that fails."""
    # A name of its own for each attempt, so that processes that do the same part do not write into one file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    with disk(path):
        try:
            write(temporary)
            _sync(temporary)
            name(temporary, path)
            _sync(path.parent)
        except FileNotFoundError:
            if not path.exists():  # else another process finished the folder, this part too, and tidied up
                raise
        finally:
            temporary.unlink(missing_ok=True)


def tidy(path: Path) -> None:
    """Remove what processes that were killed left of their attempts to write this file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        try:
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
        except FileNotFoundError:  # another process was quicker
            pass


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that those may read who may read the user's other files; the library's are their owner's alone."""
    Path(path).touch()
    mode = Path(path).stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # which hides the system's error in its words
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    Path(path).chmod(mode)


def first_name(temporary: Path, path: Path) -> None:
    """Give a file its name unless there is one of that name: of processes that come at once, one is the first."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        os.replace(temporary, path)  # a file system without links


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
