"""Files appear whole or not at all, and what the system refuses is told in a line."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from nlpinf.errors import BadInput
from nlpinf.files import publish, save_tensors


def test_tensors_that_do_not_fit_on_the_disk_leave_no_file(tmp_path: Path) -> None:
    tensors, path = {"x": torch.ones(1000)}, tmp_path / "x.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(BadInput, match=r"x.safetensors: cannot be written .*free some space"):
            publish(path, lambda temporary: save_tensors(tensors, temporary))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    publish(path, lambda temporary: save_tensors(tensors, temporary))
    assert path.exists()
