"""Hessian products of networks whose backward pass has no forward mode, and of all gated language models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import nlpinf.curvature.products as products
from nlpinf import parameters as P
from nlpinf.curvature import Curvature, cross_product
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Classification, Regression
from tests.cases import FAMILIES, case, randomised
from tests.gated import GATED, gated_stage, loss_alone


def flat(tree: P.Parameters) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tree.values()])


@pytest.mark.parametrize("name", GATED)
def test_products_equal_the_dense_hessian(name: str) -> None:
    """The dense matrix comes of double backward passes on sentences alone.

    Rotary angles and the norms' means are float32 inside these models, whatever their dtype: hence 1e-6.
    """
    stage = gated_stage(name)
    theta = {n: t.clone().requires_grad_(True) for n, t in stage.theta.items()}
    with evaluation(stage.model):
        loss = torch.stack([loss_alone(stage, i, theta) for i in range(stage.size)]).mean()
        gradient = flat(dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True))))
        rows = torch.autograd.grad(
            gradient, list(theta.values()), torch.eye(len(gradient), dtype=torch.float64), is_grads_batched=True,
            materialize_grads=True,
        )  # fmt: skip
    dense = torch.cat([part.flatten(1) for part in rows], 1)
    v = P.random_like(stage.theta, 3)
    expected = dense @ flat(v)
    operator = Curvature(stage, "hessian")
    assert torch.linalg.norm(flat(operator @ v) - expected) <= 1e-6 * torch.linalg.norm(expected)
    ggn = flat(Curvature(stage, "ggn") @ v)
    assert torch.linalg.norm(ggn - expected) > 1e-2 * torch.linalg.norm(expected)  # the residual part counts here
    few = [n for n in stage.theta if "mlp" in n or "norm" in n]
    rest = [n for n in stage.theta if n not in few]
    where = torch.cat([torch.full((t.numel(),), n in few) for n, t in stage.theta.items()])
    crossed = flat(cross_product(stage, P.select(v, rest), few, range(stage.size)))
    mixed = dense[where][:, ~where] @ flat(P.select(v, rest))
    assert torch.linalg.norm(crossed - mixed) <= 1e-6 * torch.linalg.norm(mixed)


class Silu(nn.Module):
    """A SiLU network, float64 throughout."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.silu(self.gate(x)) * self.first(x))


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_products_equal_differences_of_gradients(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    classes = kind == "classification"
    y = torch.arange(5) % 3 if classes else torch.randn(5, 3, generator=generator, dtype=torch.float64)
    model = randomised(Silu().double(), 4)
    stage = Stage(model, Classification() if classes else Regression(), list(zip(x, y)), batch_size=2)

    def gradient(step: float) -> torch.Tensor:
        theta = {n: t.requires_grad_(True) for n, t in P.axpy(step, v, stage.theta).items()}
        outputs = functional_call(model, theta, (x,))
        mean = nn.functional.cross_entropy(outputs, y) if classes else 0.5 * (outputs - y).square().sum(-1).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(theta.values()))])

    v, h = P.random_like(stage.theta, 2), 1e-3
    expected = (8 * (gradient(h) - gradient(-h)) - gradient(2 * h) + gradient(-2 * h)) / (12 * h)
    found = flat(Curvature(stage, "hessian") @ v)
    assert torch.linalg.norm(found - expected) <= 1e-9 * torch.linalg.norm(expected)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_reverse_over_reverse_equals_forward_over_reverse(family: str, k: int) -> None:
    """Where both exist, for every architecture; the first is compared with dense matrices in test_products.py."""
    stage = case(family, "proximity").chain.stages[k]
    v, names = P.random_like(stage.theta, 6), list(stage.parameters)
    with evaluation(stage.model):
        for batch in stage.batches():
            ahead = products._forward_over_reverse(stage, batch, v, names)
            back = products._reverse_over_reverse(stage, batch, v, names)
            size = torch.linalg.norm(torch.cat([part.flatten() for part in ahead]))
            for name, a, b in zip(names, ahead, back):
                assert torch.linalg.norm(a - b) <= 1e-10 * size, name


def test_forward_mode_is_tried_once_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Stage] = []
    original = products._forward_over_reverse

    def counting(stage: Stage, *args: object) -> list[torch.Tensor]:
        tried.append(stage)
        return original(stage, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "_forward_over_reverse", counting)
    stage = gated_stage("llama")
    operator, v = Curvature(stage, "hessian"), P.random_like(stage.theta, 1)
    assert len(operator.batches) == 2
    first = operator @ v
    assert len(tried) == 1
    assert torch.equal(flat(operator @ v), flat(first))
    assert len(tried) == 1
    other = case("gpt2 sdpa", "frozen").chain.stages[0]  # one that has forward mode keeps it
    Curvature(other, "hessian") @ P.random_like(other.theta, 1)
    assert len(tried) == 1 + len(list(other.batches()))


def test_a_direction_that_does_not_reach_the_outputs_gives_zero() -> None:
    class Idle(Silu):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))

    stage = Stage(randomised(Idle().double(), 1), Classification(), [(torch.ones(3, dtype=torch.float64), 1)])
    found = cross_product(stage, {"unused": torch.ones(2, dtype=torch.float64)}, ["first.weight"], [0])
    assert torch.equal(found["first.weight"], torch.zeros(4, 3, dtype=torch.float64))
