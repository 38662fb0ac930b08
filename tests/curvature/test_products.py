"""Curvature products against dense float64 matrices, over the whole table of cases."""

from __future__ import annotations

import pytest
import torch

from nlpinf import parameters as P
from nlpinf.curvature import Curvature, Shifted, cross_product, curvature_samples, products
from nlpinf.errors import BadInput
from nlpinf.stages import Stage
from nlpinf.tasks import Classification
from tests import oracle
from tests.cases import FAMILIES, Mlp, case


def flat(tree: P.Parameters) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tree.values()]).double()


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_equal_the_dense_matrix(family: str, k: int, kind: str) -> None:
    stage, d = case(family, "proximity").chain.stages[k], oracle.dense(family, "proximity", k)
    operator = Curvature(stage, kind, seed=5)  # type: ignore[arg-type]
    where = d.where(list(stage.trained))
    matrix = d.curvature(kind, seed=5)[where][:, where]
    v = P.random_like(stage.theta, 3)
    expected = matrix @ flat(v)
    assert operator.shape == tuple(matrix.shape)
    assert torch.linalg.norm(flat(operator @ v) - expected) <= 1e-10 * torch.linalg.norm(expected)
    w = P.random_like(stage.theta, 4)
    for product, vector in zip(operator.many([v, w, v]), (v, w, v)):
        expected = matrix @ flat(vector)
        assert torch.linalg.norm(flat(product) - expected) <= 1e-10 * torch.linalg.norm(expected)
    assert operator.products == 4
    assert stage.model not in products._one_by_one


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_product_is_the_mixed_block_of_the_hessian(family: str) -> None:
    c, d = case(family, "frozen"), oracle.dense(family, "frozen", 1)
    link = c.chain.links[1]
    y = P.random_like(link.stage.theta, 4)
    got = cross_product(link.stage, y, link.kept, range(link.stage.size))
    expected = d.hessian[d.where(link.kept)][:, d.where(list(link.stage.trained))] @ flat(y)
    assert torch.linalg.norm(flat(got) - expected) <= 1e-10 * torch.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("family", ["mlp", "bert eager", "lstm tagger"])
def test_an_operator_is_symmetric_linear_and_repeats_itself(family: str, kind: str) -> None:
    stage = case(family, "frozen").chain.stages[0]
    operator = Curvature(stage, kind)  # type: ignore[arg-type]
    a, b = P.random_like(stage.theta, 1), P.random_like(stage.theta, 2)
    ca, cb = operator @ a, operator @ b
    assert P.dot(b, ca) == pytest.approx(P.dot(a, cb), rel=1e-10)
    assert torch.equal(flat(operator @ a), flat(ca))
    both = operator @ P.axpy(2.0, a, b)
    assert P.norm(P.axpy(-1.0, both, P.axpy(2.0, ca, cb))) <= 1e-12 * P.norm(both)
    assert operator.products == 4


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_products_do_not_depend_on_batches(kind: str) -> None:
    """Batches of other sizes, padded otherwise and in another order, give the same operator; the sample's mean is taken."""
    stage = case("bert sdpa", "frozen").chain.stages[0]
    v, rows = P.random_like(stage.theta, 1), [2, 0, 3]
    products = []
    for size, order in [(1, rows), (2, rows[::-1]), (8, rows)]:
        other = Stage(stage.model, stage.task, stage.data, 0.0, "token", batch_size=size)
        products.append(flat(Curvature(other, kind, order) @ v))  # type: ignore[arg-type]
    for product in products[1:]:
        assert torch.linalg.norm(product - products[0]) <= 1e-12 * torch.linalg.norm(products[0])
    parts = [flat(Curvature(stage, kind, [i]) @ v) for i in rows]  # type: ignore[arg-type]
    assert torch.linalg.norm(sum(parts) / 3 - products[0]) <= 1e-12 * torch.linalg.norm(products[0])


@pytest.mark.parametrize("family", ["mlp", "mlp regression"])
def test_the_mean_of_many_fishers_is_the_ggn(family: str) -> None:
    """E[ĝ ĝᵀ] = ∂²ℓ/∂o²: over 250 draws every entry of the mean product is within 4.5 of its standard errors."""
    stage = case(family, "frozen").chain.stages[0]
    stage = Stage(stage.model, stage.task, stage.data, batch_size=64)
    v = P.random_like(stage.theta, 1)
    ggn = flat(Curvature(stage, "ggn") @ v)
    draws = torch.stack([flat(Curvature(stage, "fisher", seed=seed) @ v) for seed in range(250)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - ggn).abs() <= 4.5 * error + 1e-12).all()
    assert (error < 0.3 * ggn.abs().max()).all()  # the bound above can fail
    assert not torch.allclose(draws[0], draws[1])


def test_a_product_leaves_the_model_as_it_was() -> None:
    stage = case("bert sdpa", "frozen").chain.stages[0]
    before = {n: t.clone() for n, t in stage.model.state_dict().items()}
    Curvature(stage, "hessian") @ P.random_like(stage.theta, 1)
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in stage.model.parameters())
    assert not any(m._forward_pre_hooks for m in stage.model.modules())
    assert stage.model.training


def test_damping_and_shift_are_added_once_a_product() -> None:
    stage = case("mlp", "proximity").chain.stages[1]
    bare = Curvature(stage, "ggn")
    v = P.random_like(stage.theta, 1)
    first = flat(bare @ v)
    shift = {n: 0.1 * i for i, n in enumerate(stage.theta)}
    damped = Shifted(bare, shift, 0.7)
    expected = first + torch.cat([(0.7 + shift[n]) * v[n].flatten() for n in v])
    for _ in range(3):
        assert torch.allclose(flat(damped @ v), expected, rtol=1e-12)
    assert torch.equal(flat(bare @ v), first)
    assert damped.products == 3
    assert damped.damping == 0.7


def test_bad_settings_are_refused() -> None:
    stage = Stage(Mlp("digits", 2), Classification(), [(torch.zeros(3), 0)])
    with pytest.raises(BadInput, match=r"damping is -0\.1"):
        Shifted(Curvature(stage, "ggn"), {}, -0.1)
    with pytest.raises(BadInput, match="damping is nan"):
        Shifted(Curvature(stage, "ggn"), {}, float("nan"))
    with pytest.raises(BadInput, match="'kfac'"):
        Curvature(stage, "kfac")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="names differ"):
        Curvature(stage, "ggn") @ {"other": torch.zeros(1)}
    for sample in (11, 0, -1):
        with pytest.raises(BadInput, match=f"{sample} rows, but the corpus has 10"):
            curvature_samples(10, sample, 0)


def test_samples_are_disjoint_and_fixed() -> None:
    first, second = curvature_samples(100, 30, 7)
    assert (first, second) == curvature_samples(100, 30, 7)
    assert first != curvature_samples(100, 30, 8)[0]
    assert len(first) == len(second) == 30
    assert not set(first) & set(second)
    assert {*first, *second} <= set(range(100))
    assert len(curvature_samples(100, 80, 0)[1]) == 20
    assert curvature_samples(5, None, 0) == (list(range(5)), [])


class _Doubled(torch.autograd.Function):
    """2x, with derivatives of both modes but no rule for many at once."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return 2 * x

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return 2 * g

    @staticmethod
    def jvp(ctx, t):  # type: ignore[no-untyped-def]
        return 2 * t


class _Own(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Doubled.apply(super().forward(x))  # type: ignore[no-any-return, no-untyped-call]


def test_several_products_of_a_network_that_makes_only_one_at_a_time() -> None:
    torch.manual_seed(0)
    rows = [(torch.randn(3, dtype=torch.float64), torch.tensor(i % 3)) for i in range(9)]
    stage = Stage(_Own("out", 3).double(), Classification(), rows)
    operator = Curvature(stage, "ggn")
    vectors = [P.random_like(stage.theta, i) for i in range(3)]
    for product, v in zip(operator.many(vectors), vectors):
        assert P.norm(P.axpy(-1.0, product, operator @ v)) <= 1e-12 * P.norm(product)
    assert stage.model in products._one_by_one


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_memory_bounds_how_many_products_are_made_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = case("bert eager", "frozen").chain.stages[0]
    operator = Curvature(stage, kind)  # type: ignore[arg-type]
    vectors = [P.random_like(stage.theta, i) for i in range(5)]
    together = operator.many(vectors)
    monkeypatch.setattr(products, "_TOGETHER", 0)
    for one, other in zip(together, operator.many(vectors)):
        assert P.norm(P.axpy(-1.0, one, other)) <= 1e-12 * P.norm(one)
