"""Parts of a network that no trained parameter reaches are computed once, and products stay what they are without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nlpinf import parameters as P
from nlpinf.curvature import Curvature
from nlpinf.stages import Stage
from nlpinf.tasks import Classification


class Counted(nn.Module):
    """A linear map that counts its calls."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.map, self.calls = nn.Linear(inputs, outputs), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.map(x))


class Tower(nn.Module):
    """Below, between and above, of which any may be trained; `write` adds to the lower output in place."""

    def __init__(self, write: bool = False) -> None:
        super().__init__()
        self.below, self.between, self.above = Counted(4, 5), Counted(5, 5), nn.Linear(5, 3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x)
        if self.write:
            x += 1.0
        return self.above(self.between(x))


def stage(trained: list[str], **settings: Any) -> Stage:
    torch.manual_seed(0)
    model = Tower(**settings).double()
    rows = [(torch.randn(4, dtype=torch.float64), torch.tensor(i % 3)) for i in range(7)]
    names = [name for name, _ in model.named_parameters() if name.split(".")[0] in trained]
    return Stage(model, Classification(), rows, trained=names, batch_size=3)


def without(s: Stage, kind: Any, vectors: list[P.Parameters]) -> list[P.Parameters]:
    """Products of the same stage in which nothing is kept."""
    operator = Curvature(copy.deepcopy(s), kind, keep=0)
    return [operator @ v for v in vectors]


@pytest.mark.parametrize("kind", ["ggn", "hessian", "fisher"])
@pytest.mark.parametrize(
    ("trained", "below", "between"),
    [
        (["above"], 3, 3),  # once for each of the three batches
        (["between"], 3, 15),  # four products more
        (["below"], 15, 15),  # it reaches all that follows
        (["below", "above"], 15, 15),
        (["below", "between", "above"], 12, 12),  # nothing to look for
    ],
)
def test_constant_parts_run_once_a_batch(trained: list[str], below: int, between: int, kind: Any) -> None:
    s = stage(trained)
    vectors = [P.random_like(s.theta, seed) for seed in range(4)]
    expected = without(s, kind, vectors)
    operator = Curvature(s, kind)
    for v, truth in zip(vectors, expected):
        found = operator @ v
        assert any(bool(t.any()) for t in truth.values())
        for name in truth:
            torch.testing.assert_close(found[name], truth[name], rtol=1e-13, atol=1e-14)
    assert (s.model.below.calls, s.model.between.calls) == (below, between)
    assert all("forward" not in module.__dict__ for module in s.model.modules())


def test_what_is_written_over_is_not_kept() -> None:
    s = stage(["above"], write=True)
    vectors = [P.random_like(s.theta, seed) for seed in range(3)]
    expected, operator = without(s, "ggn", vectors), Curvature(s, "ggn")
    for v, truth in zip(vectors, expected):
        for name, found in (operator @ v).items():
            torch.testing.assert_close(found, truth[name], rtol=1e-13, atol=1e-14)
    assert (s.model.below.calls, s.model.between.calls) == (12, 3)


def test_no_more_is_kept_than_the_limit() -> None:
    s = stage(["above"])
    vectors = [P.random_like(s.theta, seed) for seed in range(3)]
    two = 2 * 3 * 2 * 5 * 8  # two batches of three rows, two parts, five float64
    expected, operator = without(s, "ggn", vectors), Curvature(s, "ggn", keep=two)
    for v, truth in zip(vectors, expected):
        for name, found in (operator @ v).items():
            torch.testing.assert_close(found, truth[name], rtol=1e-13, atol=1e-14)
    assert s.model.below.calls == 3 + 3  # of the last batch in every product


def test_low_precision_keeps_its_own() -> None:
    s = stage(["above"])
    single = Stage(s.model.float(), s.task, [(x.float(), y) for x, y in s.data], trained=s.trained, batch_size=3)
    v = P.random_like(single.theta, 0)
    operator = Curvature(single, "ggn")
    exact = operator @ v
    low = operator.at("bfloat16") @ v
    away = max(float((low[n] - exact[n]).norm() / exact[n].norm()) for n in exact)
    assert 1e-5 < away < 3e-2
    assert all(torch.equal(t, exact[n]) for n, t in (operator @ v).items())
