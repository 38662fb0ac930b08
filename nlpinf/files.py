"""Files that appear whole or not at all: written under another name, synced, then named."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nlpinf.errors import BadInput

PARTIAL = ".partial"


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


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that those may read who may read the user's other files; the library's are their owner's alone."""
    Path(path).touch()
    mode = Path(path).stat().st_mode
    save_file(tensors, path, metadata)
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
