"""EK-FAC against loops of autograd over single examples, dense inverses, and its own file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nlpinf import parameters as P
from nlpinf.curvature import Curvature
from nlpinf.curvature.ekfac import EKFAC, planned_bytes
from nlpinf.curvature.perexample import EXACT, PerExample, square_roots
from nlpinf.errors import BadInput
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import CausalLM, Classification, OutputLoss, Regression
from tests.cases import FAMILIES, TEXTS, case, randomised, tokenizer


def moments(stage: Stage, ekfac: EKFAC) -> dict[str, Tensor]:
    """Return the mean over examples of the squares of the rotated gradients: one example at a time, by autograd."""
    total = {n: torch.zeros_like(f.eigenvalues) for n, f in ekfac.factors.items()}
    for i in range(stage.size):
        (batch,) = stage.batches([i])
        with evaluation(stage.model):
            theta = {n: t.clone().requires_grad_(True) for n, t in stage.theta.items()}
            outputs = stage.outputs(batch, theta)
            for u in square_roots(stage, batch, outputs.detach(), 0):
                found = torch.autograd.grad(
                    outputs, list(theta.values()), u, retain_graph=True, materialize_grads=True, allow_unused=True
                )
                for (name, sum_), g in zip(total.items(), found):
                    factor = ekfac.factors[name]
                    g = g.view(factor.eigenvalues.shape)
                    g = g if factor.left is None else torch.einsum("kri,krc->kic", factor.left, g)
                    g = g if factor.right is None else torch.einsum("krc,kcj->krj", g, factor.right)
                    sum_ += g**2 / stage.size
    return total


class Shared(nn.Module):
    """A layer used three times, a convolution, a normalisation, and a scale that no layer's rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 2, padding=1), nn.LayerNorm(4)
        self.enter, self.again, self.scale = nn.Linear(18, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(torch.tanh(self.conv(x.view(-1, 1, 2, 2))).flatten(1)))
        for _ in range(3):
            h = torch.tanh(self.again(self.norm(h)))
        return self.out(h * self.scale)


class Backwards(nn.Module):
    """A layer's weight, the other way round: a module that no layer's rule covers but its size does."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.T)


class Tied(nn.Module):
    """A weight used by a layer, twice, and by such a module."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 3)
        self.back, self.out = Backwards(self.enter.weight), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.enter(torch.tanh(self.back(torch.tanh(self.enter(x)))))))


class Moody(nn.Module):
    """A layer that takes rows with large numbers in another form, of which the first 32 rows have none."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(2, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.view(-1, 2, 2)
        h = self.enter(pairs.flatten(0, 1)).view(-1, 2, 3) if bool((x > 9).any()) else self.enter(pairs)
        return self.out(torch.tanh(h).flatten(1))


def stages() -> dict[str, Stage]:
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(4, generator=generator).double(), torch.tensor(i % 3)) for i in range(5)]
    found = {name: case(name, "frozen").chain.stages[0] for name in FAMILIES}
    found["shared"] = Stage(randomised(Shared().double(), 3), Classification(), rows, batch_size=2)
    found["tied"] = Stage(randomised(Tied().double(), 3), Classification(), rows, batch_size=2)
    many = [(torch.randn(4, generator=generator).double() + 10 * (i > 35), torch.tensor(i % 3)) for i in range(40)]
    found["moody"] = Stage(randomised(Moody().double(), 3), Classification(), many, batch_size=3)
    return found


@pytest.mark.parametrize("name", [*FAMILIES, "shared", "tied", "moody"])
def test_eigenvalues_are_the_second_moments_of_single_examples_in_the_basis(name: str) -> None:
    stage = stages()[name]
    ekfac = EKFAC.fit(stage)
    for parameter, expected in moments(stage, ekfac).items():
        found = ekfac.factors[parameter].eigenvalues
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-14), parameter
    # The sum of the squares knows no basis: that of the diagonal is the same.
    plain = EKFAC.fit(stage, largest=0)
    assert all(f.left is None and f.right is None for f in plain.factors.values())
    assert plain.mean_eigenvalue() == pytest.approx(ekfac.mean_eigenvalue(), rel=1e-10)


@pytest.mark.parametrize("name", ["bert sdpa", "gpt2 sdpa", "elmo", "tied"])  # the first two with words tied to outputs
def test_blocks_of_any_size_change_no_eigenvalue(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("nlpinf.curvature.ekfac._BLOCK", 48)
    monkeypatch.setattr("nlpinf.curvature.ekfac._TOGETHER", 3)
    monkeypatch.setattr("nlpinf.pieces.ENTRIES", 40)
    stage = stages()[name]
    ekfac = EKFAC.fit(stage)
    for parameter, expected in moments(stage, ekfac).items():
        assert torch.allclose(ekfac.factors[parameter].eigenvalues, expected, rtol=1e-8, atol=1e-14), parameter


@pytest.mark.parametrize("name", ["bert sdpa", "shared", "tied", "moody"])
def test_batches_and_padding_play_no_part(name: str) -> None:
    stage = stages()[name]
    vector = P.random_like(stage.theta, 1)
    first, second = (
        EKFAC.fit(replace(stage, batch_size=size)).inverse(1e-2)(vector) for size in (1, 64)
    )  # fmt: skip
    assert P.norm(P.axpy(-1.0, first, second)) <= 1e-8 * P.norm(first)


def test_what_a_batch_gives_at_once() -> None:
    """Text models need no loop over examples; a recurrent cell and a lone scale do."""
    for name, apart in {
        "bert sdpa": set(), "gpt2 eager": set(), "mlp": set(), "shared": {"scale"},
        "lstm tagger": {f"lstm.{kind}_{which}_l0" for kind in ("weight", "bias") for which in ("ih", "hh")},
    }.items():  # fmt: skip
        stage = stages()[name]
        assert set(PerExample(stage, list(stage.theta)).apart) == apart, name


def test_on_a_linear_layer_with_independent_examples_the_inverse_is_the_dense_one() -> None:
    """With squared error the Gauss-Newton matrix of o = W x is I ⊗ E[x xᵀ], a Kronecker product."""
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(4, generator=generator).double(), torch.zeros(3).double()) for _ in range(30)]
    stage = Stage(nn.Linear(4, 3, bias=False).double(), Regression(), rows)
    ekfac = EKFAC.fit(stage)
    x = torch.stack([a for a, _ in rows])
    dense = torch.kron(torch.eye(3).double(), x.T @ x / len(x))
    vector = P.random_like(stage.theta, 1)
    expected = torch.linalg.solve(dense + 0.3 * torch.eye(12).double(), vector["weight"].flatten())
    assert torch.allclose(ekfac.inverse(0.1, {"weight": 0.2})(vector)["weight"].flatten(), expected, rtol=1e-10)
    assert torch.allclose((ekfac @ vector)["weight"].flatten(), dense @ vector["weight"].flatten(), rtol=1e-10)
    assert ekfac.mean_eigenvalue() == pytest.approx(float(dense.trace()) / 12, rel=1e-10)


def test_the_cotangents_are_square_roots() -> None:
    """Column by column Σ u uᵀ = w B; with random signs the squares u_c² have the mean w B_cc, and little spread."""
    for name in ("mlp", "mlp regression", "gpt2 eager"):
        stage = case(name, "frozen").chain.stages[0]
        (batch,) = list(stage.batches())[:1]
        outputs, w = stage.outputs(batch).detach(), stage.item_weights(batch)
        units = torch.eye(outputs.shape[1]).double()
        columns = [stage.task.loss.hessian_product(outputs, batch.targets, e.expand_as(outputs)) for e in units]
        expected = w[:, None, None] * torch.stack(columns, -1)
        if outputs.shape[1] <= EXACT:
            found = sum(u[:, :, None] * u[:, None, :] for u in square_roots(stage, batch, outputs, 0))
            assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)
            generic = OutputLoss.root_product(stage.task.loss, outputs, batch.targets, units[0].expand_as(outputs))
            assert torch.allclose(generic.square().sum(-1), columns[0][:, 0], rtol=1e-10)
        else:
            draws = torch.stack([next(square_roots(stage, batch, outputs, seed)) for seed in range(4000)])
            mean = torch.einsum("sic,sid->icd", draws, draws) / len(draws)
            assert (mean - expected).abs().max() <= 5 * float(expected.max()) / len(draws) ** 0.5


def test_the_trace_is_the_gauss_newton_matrix_s() -> None:
    """For examples of one item and few classes the roots are taken whole, so that nothing is left to chance."""
    stage = case("mlp", "frozen").chain.stages[0]
    size = P.size(stage.theta)
    ggn, flat = Curvature(stage, "ggn"), torch.eye(size, dtype=torch.float64)
    trace = 0.0
    for row in flat:
        parts = row.split([t.numel() for t in stage.theta.values()])
        unit = {n: p.view_as(t) for (n, t), p in zip(stage.theta.items(), parts)}
        trace += P.dot(unit, ggn @ unit)
    assert EKFAC.fit(stage).mean_eigenvalue() == pytest.approx(trace / size, rel=1e-9)


def test_damping_does_not_change_the_factors(tmp_path: Any) -> None:
    stage = case("mlp", "frozen").chain.stages[0]
    ekfac, vector = EKFAC.fit(stage), P.random_like(stage.theta, 1)
    once = ekfac.inverse(1e-2)(vector)
    ekfac.inverse(5.0)(vector)
    assert P.norm(P.axpy(-1.0, once, ekfac.inverse(1e-2)(vector))) == 0.0
    path = ekfac.save(tmp_path / "deep" / "factors.safetensors", stage)
    assert path.stat().st_size == pytest.approx(planned_bytes(stage).factors, abs=4000)
    again = EKFAC.load(path, stage)
    assert P.norm(P.axpy(-1.0, once, again.inverse(1e-2)(vector))) == 0.0
    assert again.record == ekfac.record
    with pytest.raises(BadInput, match="other weights"):
        EKFAC.load(path, case("mlp regression", "frozen").chain.stages[0])
    (x, label), *others = stage.data
    for data in ([(x + 1, label), *others], stage.data[:1]):
        with pytest.raises(BadInput, match="other examples"):
            EKFAC.load(path, replace(stage, data=data))
    tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
    side = next(name for name in tensors if name.endswith(".left"))
    save_file({**tensors, side: tensors[side][:, 1:, 1:].contiguous()}, tmp_path / "cut", metadata)
    save_file({name: t for name, t in tensors.items() if name != side}, tmp_path / "without", metadata)
    for name in ("cut", "without"):
        with pytest.raises(BadInput, match="incomplete or of another shape"):
            EKFAC.load(tmp_path / name, stage)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match="no file of EK-FAC factors"):
        EKFAC.load(path, stage)


def test_a_layer_without_a_gradient_and_no_damping_give_finite_numbers() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    stage = Stage(Idle().double(), Classification(), [(torch.ones(3).double(), torch.tensor(1))])
    ekfac = EKFAC.fit(stage)
    assert float(ekfac.factors["idle.weight"].eigenvalues.abs().max()) == 0.0
    assert P.finite(ekfac.inverse(0.0)(P.random_like(stage.theta, 0)))
    with pytest.raises(BadInput, match="negative"):
        ekfac.inverse(-1.0)


def test_a_tied_output_layer_counts_both_uses() -> None:
    """GPT-2 ties words and output layer: the word side stays diagonal, so nothing is quadratic in the vocabulary."""
    stage = case("gpt2 eager", "frozen").chain.stages[0]
    assert isinstance(stage.task, CausalLM) and len(TEXTS) == stage.size
    factor = EKFAC.fit(stage).factors["transformer.wte.weight"]
    assert factor.left is None and factor.right is not None
    assert factor.eigenvalues.shape == (1, len(tokenizer()), 4)
