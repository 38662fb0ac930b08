"""What all tests share: the CPU, and one thread, so that sums run in one order and several test runs can share a machine."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NLPINF_DEVICE", "cpu")  # tests/test_gpu.py says its own

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
