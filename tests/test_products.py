"""The library that takes float32 products is chosen by the processor, changes no precision, and leaves no trace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nlpinf import products
from nlpinf.evaluation import evaluation

settings = getattr(torch.backends.mkldnn, "matmul", None)
pytestmark = pytest.mark.skipif(
    not hasattr(settings, "fp32_precision"), reason="PyTorch before 2.9 has no such setting"
)


@contextmanager
def _given(setting: str) -> Iterator[None]:
    """Have the caller's own setting within."""
    before, settings.fp32_precision = settings.fp32_precision, setting
    try:
        yield
    finally:
        settings.fp32_precision = before


def _error() -> float:
    """Return the relative error of a product whose factors bfloat16 does not hold, forward and backward."""
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randn(300, 300, generator=draw, requires_grad=True) for _ in range(2))
    product = a @ b
    (back,) = torch.autograd.grad(product.sum(), a)
    truth, sides = a.detach().double() @ b.detach().double(), b.detach().double().sum(1).expand(300, 300)
    return max(float((product.detach() - truth).norm() / truth.norm()), float((back - sides).norm() / sides.norm()))


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor for which the other library is taken, whatever this one is."""
    monkeypatch.setattr(products, "onednn_pays", lambda: True)


@pytest.mark.parametrize("before", ["none", "ieee"])
@pytest.mark.usefixtures("amd")
def test_the_setting_is_that_of_before_after_an_error_too(before: str) -> None:
    with _given(before):
        with pytest.raises(KeyError), evaluation(torch.nn.Linear(2, 2)):
            assert settings.fp32_precision == "bf16"
            raise KeyError
        assert settings.fp32_precision == before


@pytest.mark.usefixtures("amd")
def test_a_caller_who_permits_less_is_obeyed() -> None:
    with _given("tf32"), products.fast():
        assert settings.fp32_precision == "tf32"


def test_products_keep_float32_where_the_other_library_is_taken() -> None:
    with products.fast():
        if products.onednn_pays():
            assert settings.fp32_precision == "bf16"
        assert _error() < 2e-6


def test_a_setting_that_rounds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products.exact("ieee")
    whole = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda c, a, b: whole(c, a.bfloat16().float(), b.bfloat16().float()))
    assert not products.exact("ieee")


@pytest.mark.parametrize("vendor", ["GenuineIntel", None])
def test_processors_that_mkl_knows_keep_it(vendor: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = tmp_path / "cpuinfo"
    if vendor:
        described.write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "_CPUINFO", described)
    products.onednn_pays.cache_clear()
    try:
        assert not products.onednn_pays()
        with products.fast():
            assert settings.fp32_precision == "none"
    finally:
        products.onednn_pays.cache_clear()


_MOVED = """
import nlpinf.products, torch
draw = torch.Generator().manual_seed(0)
a, b = torch.randn(203, 117, generator=draw), torch.randn(117, generator=draw)
def at(x, offset):
    room = torch.empty(x.numel() + 16)
    return room[offset:offset + x.numel()].view_as(x).copy_(x)
ways = torch.mv, lambda x, y: x.flatten()[:9000].dot(y.repeat(80)[:9000]), lambda x, y: x[:117].T @ x[:117], lambda x, y: x @ x.T
def kinds():
    return [len({f(at(a, i), at(b, j)).numpy().tobytes() for i in range(8) for j in range(4)}) for f in ways]
with nlpinf.products.fast():
    print(*kinds())
print(*kinds())
"""


@pytest.mark.skipif(not products._amd(), reason="MKL is asked for the same bits on AMD alone")
def test_a_product_has_the_same_bits_wherever_its_matrices_lie() -> None:
    clean = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"}
    done = subprocess.run([sys.executable, "-c", _MOVED], capture_output=True, text=True, env=clean, check=True)
    assert done.stdout.split() == ["1"] * 8


@pytest.mark.usefixtures("amd")
def test_what_programs_come_to_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    assert products.programs() == 128 << 20
    monkeypatch.setattr(products, "onednn_pays", lambda: False)
    assert products.programs() == 0
