"""Scores against what happens: closed forms, retraining without an example, reweighting and solving again.

The solvers of this file are its own (normal equations, Newton's method on a flat vector); nlpinf only scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpinf.influence import query_vectors
from nlpinf.queries import Query
from nlpinf.solvers import CG
from nlpinf.stages import Chain, Proximity, Stage
from nlpinf.tasks import Classification, Regression
from tests.cases import scores_of

ALPHA, DECAY = 0.05, 0.02
EXACT = CG(tolerance=1e-13, max_iterations=4000)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Additive(nn.Module):
    """outputs = W x_left + head · x_right: linear in the shared W and in the head together, so each stage is convex."""

    def __init__(self, head: str, left: int, right: int, outputs: int) -> None:
        super().__init__()
        self.left, self.head = left, head
        self.shared = nn.Linear(left, outputs, bias=False, dtype=torch.float64)
        self.add_module(head, nn.Linear(right, outputs, bias=False, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x[:, : self.left]) + getattr(self, self.head)(x[:, self.left :])


def additive(head: str, left: Tensor, right: Tensor) -> Additive:
    """Return the model with these weights, each (inputs, outputs)."""
    model = Additive(head, len(left), len(right), left.shape[1])
    model.shared.weight.data, getattr(model, head).weight.data = left.T.clone(), right.T.clone()
    return model


def scores(
    pretrain: nn.Module, finetune: nn.Module, task: Any, data: Any, later: Any, query: Query, case: int, **settings: Any
) -> np.ndarray:
    """Return the scores of all pretraining examples; in case 1 the finetuning trained what the pretraining lacks."""
    theirs = {n for n, _ in pretrain.named_parameters()}
    trained = [n for n, _ in finetune.named_parameters() if case == 2 or n not in theirs]
    first = Stage(pretrain, task, list(zip(*data)), DECAY, name="pretrain")
    last = Stage(finetune, task, list(zip(*later)), DECAY, trained=trained, name="finetune")
    chain = Chain([first, last], "frozen" if case == 1 else Proximity(ALPHA))
    made = query_vectors(chain, [query], **{"damping": 0.0, "solver": EXACT, "curvature": "hessian", **settings})
    return scores_of(first, list(made.vectors))[:, 0].numpy()


class TestRidge:
    """Pretraining and finetuning by ridge regression with other heads; m = 30, n = 20, 2 outputs."""

    X, Y, X2, T, XQ, TQ = (
        normal(1, 30, 5),
        normal(2, 30, 2),
        normal(3, 20, 5),
        normal(4, 20, 2),
        normal(5, 9, 5),
        normal(6, 9, 2),
    )
    LEFT = 3

    def solve(self, case: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (W*, U*) stacked and (W, Θ) stacked, the pretraining losses weighed by `weights`/m."""
        X, X2, left, m, n = self.X, self.X2, self.LEFT, len(self.X), len(self.X2)
        eye = torch.eye(5, dtype=torch.float64)
        first = torch.linalg.solve(
            X.T @ (weights[:, None] * X) / m + DECAY * eye, X.T @ (weights[:, None] * self.Y) / m
        )
        if case == 1:
            B, rest = X2[:, left:], self.T - X2[:, :left] @ first[:left]
            head = torch.linalg.solve(B.T @ B / n + DECAY * eye[left:, left:], B.T @ rest / n)
            return first, torch.cat([first[:left], head])
        pull = 2 * ALPHA * torch.diag((torch.arange(5) < left).double())
        return first, torch.linalg.solve(X2.T @ X2 / n + DECAY * eye + pull, X2.T @ self.T / n + pull @ first)

    def models(self, case: int) -> tuple[Additive, Additive]:
        first, last = self.solve(case, torch.ones(len(self.X), dtype=torch.float64))
        left = self.LEFT
        return additive("before", first[:left], first[left:]), additive("after", last[:left], last[left:])

    def moves(self, case: int) -> Tensor:
        """Return the analytic d(W, Θ)/dε of every example, (m, 5, 2)."""
        X, X2, left, n = self.X, self.X2, self.LEFT, len(self.X2)
        eye = torch.eye(5, dtype=torch.float64)
        first, _ = self.solve(case, torch.ones(len(X), dtype=torch.float64))
        inverse = torch.linalg.inv(X.T @ X / len(X) + DECAY * eye)
        d_first = -torch.einsum("pq,iq,io->ipo", inverse, X, X @ first - self.Y)
        d_w = d_first[:, :left]
        if case == 1:
            B = X2[:, left:]
            pull_through = torch.linalg.solve(B.T @ B / n + DECAY * eye[left:, left:], B.T @ X2[:, :left] / n)
            return torch.cat([d_w, -torch.einsum("pq,iqo->ipo", pull_through, d_w)], 1)
        pull = 2 * ALPHA * torch.diag((torch.arange(5) < left).double())
        through = torch.linalg.solve(X2.T @ X2 / n + DECAY * eye + pull, pull)
        return torch.einsum("pq,iqo->ipo", through[:, :left], d_w)

    @pytest.mark.parametrize("curvature", ["hessian", "ggn"])
    @pytest.mark.parametrize("case", [1, 2])
    def test_score_is_the_analytic_derivative(self, case: int, curvature: str) -> None:
        query = Query.mean_loss(list(zip(self.XQ, self.TQ)))
        made = scores(
            *self.models(case), Regression(), (self.X, self.Y), (self.X2, self.T), query, case, curvature=curvature
        )
        _, last = self.solve(case, torch.ones(len(self.X), dtype=torch.float64))
        gradient = self.XQ.T @ (self.XQ @ last - self.TQ) / len(self.XQ)
        expected = torch.einsum("ipo,po->i", self.moves(case), gradient).numpy()
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-10 * np.abs(expected).max())

    @pytest.mark.parametrize("case", [1, 2])
    def test_removal_solved_again(self, case: int) -> None:
        """With q linear in the outputs, removing z changes q by exactly −score/m / (1 − h/m), h = zᵀ G''⁻¹ z its leverage."""
        query = Query.of(
            lambda outputs, batch: (outputs * outputs.new_tensor([1.0, -2.0])).mean(), list(zip(self.XQ, self.TQ))
        )
        made = scores(*self.models(case), Regression(), (self.X, self.Y), (self.X2, self.T), query, case)
        m = len(self.X)

        def q(weights: Tensor) -> float:
            return float(
                (self.XQ @ self.solve(case, weights)[1] * torch.tensor([1.0, -2.0], dtype=torch.float64)).mean()
            )

        inverse = torch.linalg.inv(self.X.T @ self.X / m + DECAY * torch.eye(5, dtype=torch.float64))
        for i in range(m):
            weights = torch.ones(m, dtype=torch.float64)
            weights[i] = 0.0
            actual = q(weights) - q(torch.ones(m, dtype=torch.float64))
            leverage = float(self.X[i] @ inverse @ self.X[i])
            assert actual == pytest.approx(-made[i] / m / (1 - leverage / m), rel=1e-8, abs=1e-13)

    def test_head_on_top_of_a_frozen_encoder(self) -> None:
        """Ridge regression on features W x with W from ridge pretraining: dΘ from differentiating the normal equations."""
        X, Y, X2, n = self.X, normal(7, 30, 3), self.X2, len(self.X2)
        T, TQ, XQ = self.T[:, :1], self.TQ[:, :1], self.XQ
        inverse = torch.linalg.inv(X.T @ X / len(X) + DECAY * torch.eye(5, dtype=torch.float64))
        W = inverse @ X.T @ Y / len(X)
        Z = X2 @ W
        normal_matrix = Z.T @ Z / n + DECAY * torch.eye(3, dtype=torch.float64)
        head = torch.linalg.solve(normal_matrix, Z.T @ T / n)
        pretrain = nn.Sequential()
        pretrain.add_module("encoder", nn.Linear(5, 3, bias=False))
        finetune = nn.Sequential()
        finetune.add_module("encoder", nn.Linear(5, 3, bias=False))
        finetune.add_module("head", nn.Linear(3, 1, bias=False))
        pretrain.encoder.weight.data, finetune.encoder.weight.data = W.T.clone(), W.T.clone()
        finetune.head.weight.data = head.T.clone()
        query = Query.mean_loss(list(zip(XQ, TQ)))
        made = scores(pretrain, finetune, Regression(), (X, Y), (X2, T), query, 1)
        residual = XQ @ W @ head - TQ
        for i in range(len(X)):
            dW = -torch.outer(inverse @ X[i], X[i] @ W - Y[i])
            dZ = X2 @ dW
            d_head = torch.linalg.solve(normal_matrix, (dZ.T @ (T - Z @ head) - Z.T @ dZ @ head) / n)
            expected = float((residual * (XQ @ dW @ head + XQ @ W @ d_head)).mean())
            assert made[i] == pytest.approx(expected, rel=1e-8, abs=1e-12)


Objective = Callable[[Tensor], Tensor]


def newton(objective: Objective, theta: Tensor, tolerance: float = 1e-12) -> Tensor:
    """Return the minimum near `theta`: Newton's method with halved steps, to |gradient| < tolerance."""
    gradient, hessian = torch.func.grad(objective), torch.func.hessian(objective)
    for _ in range(60):
        g = gradient(theta)
        if torch.linalg.norm(g) < tolerance:
            return theta
        step, size = torch.linalg.solve(hessian(theta), g), 1.0
        while objective(theta - size * step) > objective(theta) + 1e-15 and size > 1e-6:
            size /= 2
        theta = theta - size * step
    raise AssertionError(f"Newton's method ended at |gradient| {torch.linalg.norm(gradient(theta)):.1e}")


def newton_all(objective: Callable[[Tensor, Tensor], Tensor], start: Tensor, settings: Tensor) -> Tensor:
    """Return the minima of objective(·, settings[k]) near `start`, one row each: Newton's method for all at once."""
    gradient, hessian = torch.func.vmap(torch.func.grad(objective)), torch.func.vmap(torch.func.hessian(objective))
    theta = start.expand(len(settings), -1)
    for _ in range(8):
        g = gradient(theta, settings)
        if torch.linalg.norm(g, dim=1).max() < 1e-12:
            break
        theta = theta - torch.linalg.solve(hessian(theta, settings), g)
    assert torch.linalg.norm(gradient(theta, settings), dim=1).max() < 1e-12
    return theta


def lbfgs(objective: Objective, theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [theta], lr=1.0, max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective(theta)
        loss.backward()
        return loss

    optimiser.step(closure)
    return theta.detach()


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("case", [1, 2])
def test_leave_one_out_of_a_two_stage_logistic_regression(case: int) -> None:
    """100 examples removed one at a time, both stages solved again to the end: r ≥ 0.999 with −score/m."""
    m, left, p, c = 400, 3, 5, 2
    truth, truth2 = normal(10, p, c), normal(11, p, c)
    X, X2, XQ = normal(12, m, p), normal(13, 60, p), normal(14, 40, p)
    Y, T, TQ = (
        (x @ w + 0.7 * normal(s, len(x), c)).argmax(1)
        for x, w, s in [(X, truth, 15), (X2, truth2, 16), (XQ, truth2, 17)]
    )

    def pretraining(theta: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(X @ theta.view(p, c), Y, reduction="none")
        return (weights * losses).sum() / m + DECAY / 2 * theta.square().sum()

    def finetuning(theta: Tensor, first: Tensor) -> Tensor:
        W = first.view(p, c)[:left]
        if case == 1:
            logits = X2[:, :left] @ W + X2[:, left:] @ theta.view(p - left, c)
            return F.cross_entropy(logits, T) + DECAY / 2 * theta.square().sum()
        far = theta.view(p, c)[:left] - W
        return F.cross_entropy(X2 @ theta.view(p, c), T) + DECAY / 2 * theta.square().sum() + ALPHA * far.square().sum()

    def joined(first: Tensor, last: Tensor) -> Tensor:
        return last.view(p, c) if case == 2 else torch.cat([first.view(p, c)[:left], last.view(p - left, c)])

    ones = torch.ones(m, dtype=torch.float64)
    zero = torch.zeros((p if case == 2 else p - left) * c, dtype=torch.float64)
    first = newton(lambda theta: pretraining(theta, ones), torch.zeros(p * c, dtype=torch.float64))
    last = newton(lambda theta: finetuning(theta, first), zero)
    whole, B = joined(first, last), first.view(p, c)
    made = scores(
        additive("before", B[:left], B[left:]), additive("after", whole[:left], whole[left:]), Classification(),
        (X, Y), (X2, T), Query.mean_loss(list(zip(XQ, TQ))), case,
    )  # fmt: skip
    weights = torch.ones(100, m, dtype=torch.float64)
    weights[torch.arange(100), torch.arange(100)] = 0.0
    firsts = newton_all(pretraining, first, weights)
    lasts = newton_all(finetuning, last, firsts)
    before = float(F.cross_entropy(XQ @ whole, TQ))
    actual = [float(F.cross_entropy(XQ @ joined(a, b), TQ)) - before for a, b in zip(firsts, lasts)]
    assert pearson(-made[:100] / m, np.array(actual)) >= 0.999


class Tanh(nn.Module):
    """logits = head · tanh(W x + b)."""

    def __init__(self, head: str, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(inputs, width, dtype=torch.float64)
        self.add_module(head, nn.Linear(width, classes, bias=False, dtype=torch.float64))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.head)(torch.tanh(self.encoder(x)))


class Network:
    """A non-convex two-stage network with weight decay, both stages at a strict minimum; m = 24."""

    m, d, width, c = 24, 2, 3, 2

    def __init__(self) -> None:
        d, width, c = self.d, self.width, self.c
        self.X, self.X2, self.XQ = normal(21, self.m, d), normal(22, 16, d), normal(23, 12, d)

        def label(x: Tensor, sign: float, seed: int) -> Tensor:
            return (x[:, 0] * x[:, 1] + sign * 0.5 * x[:, 0] + 0.5 * normal(seed, len(x)) > 0).long()

        self.Y, self.T, self.TQ = label(self.X, 1, 24), label(self.X2, -1, 25), label(self.XQ, -1, 26)
        self.split = width * d + width  # W and b come first, the head after them
        self.size = self.split + c * width

    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        weight, bias, head = theta.split([self.width * self.d, self.width, self.c * self.width])
        return torch.tanh(x @ weight.view(self.width, self.d).T + bias) @ head.view(self.c, self.width).T

    def pretraining(self, theta: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(self.logits(theta, self.X), self.Y, reduction="none")
        return (weights * losses).sum() / self.m + DECAY / 2 * theta.square().sum()

    def finetuning(self, case: int) -> Callable[[Tensor, Tensor], Tensor]:
        def objective(theta: Tensor, first: Tensor) -> Tensor:
            encoder = first[: self.split]
            whole = torch.cat([encoder, theta]) if case == 1 else theta
            value = F.cross_entropy(self.logits(whole, self.X2), self.T) + DECAY / 2 * theta.square().sum()
            return value if case == 1 else value + ALPHA * (theta[: self.split] - encoder).square().sum()

        return objective

    def whole(self, first: Tensor, last: Tensor, case: int) -> Tensor:
        return torch.cat([first[: self.split], last]) if case == 1 else last

    def query(self, theta: Tensor) -> float:
        return float(F.cross_entropy(self.logits(theta, self.XQ), self.TQ))

    def model(self, head: str, theta: Tensor) -> Tanh:
        model = Tanh(head, self.d, self.width, self.c)
        parts = theta.split([self.width * self.d, self.width, self.c * self.width])
        for parameter, part in zip(model.parameters(), parts):
            parameter.data = part.view_as(parameter).clone()
        return model


@pytest.mark.parametrize("case", [1, 2])
def test_reweighting_in_a_non_convex_network(case: int) -> None:
    """Each example's weight changed by ±1 %, both stages solved again: r ≥ 0.999, slope 1 ± 0.01 with the exact Hessian."""
    net = Network()
    ones = torch.ones(net.m, dtype=torch.float64)
    objectives: list[Objective] = [lambda theta: net.pretraining(theta, ones)]
    first = newton(objectives[0], lbfgs(objectives[0], normal(31, net.size)))
    objectives.append(lambda theta: net.finetuning(case)(theta, first))
    last = newton(objectives[1], lbfgs(objectives[1], first if case == 2 else first[net.split :]))
    for objective, theta in zip(objectives, (first, last)):
        assert torch.linalg.norm(torch.func.grad(objective)(theta)) < 1e-8
        assert torch.linalg.eigvalsh(torch.func.hessian(objective)(theta))[0] > 0  # a strict minimum
    whole = net.whole(first, last, case)
    setup = (
        net.model("before", first), net.model("after", whole), Classification(), (net.X, net.Y), (net.X2, net.T),
        Query.mean_loss(list(zip(net.XQ, net.TQ))), case,
    )  # fmt: skip
    made = scores(*setup)
    changes = 0.01 * torch.cat([torch.eye(net.m, dtype=torch.float64), -torch.eye(net.m, dtype=torch.float64)])
    firsts = newton_all(net.pretraining, first, ones + changes)
    lasts = newton_all(net.finetuning(case), last, firsts)
    predicted = (changes.numpy() @ made) / net.m
    actual = [net.query(net.whole(a, b, case)) - net.query(whole) for a, b in zip(firsts, lasts)]
    x, y = predicted, np.array(actual)
    assert pearson(x, y) >= 0.999
    assert abs(float(x @ y / (x @ x)) - 1) <= 0.01
    by_ggn = (changes.numpy() @ scores(*setup, curvature="ggn")) / net.m
    assert pearson(by_ggn, y) < pearson(x, y)  # the network is non-convex enough for the difference to show


@pytest.mark.parametrize("case", [1, 2])
def test_a_planted_wrong_label_is_harmful(case: int) -> None:
    """The sign: an example with a wrong label, far on its side, has the highest score, and q falls when it is removed."""
    m, planted = 60, 17
    x = normal(41, m, 2)
    y = (x[:, 0] > 0).long()
    x[planted], y[planted] = torch.tensor([2.0, 0.0], dtype=torch.float64), 0
    x2, xq = normal(42, 30, 2), normal(43, 50, 2)
    t, tq = (x2[:, 0] > 0).long(), (xq[:, 0] > 0).long()

    def solve(kept: Tensor) -> tuple[Tensor, Tensor]:
        def pretraining(w: Tensor) -> Tensor:
            return (
                kept * F.cross_entropy(x @ w.view(2, 2), y, reduction="none")
            ).sum() / m + DECAY / 2 * w.square().sum()

        first = newton(pretraining, torch.zeros(4, dtype=torch.float64)).view(2, 2)

        def finetuning(w: Tensor) -> Tensor:
            if case == 1:
                return (
                    F.cross_entropy(x2[:, :1] @ first[:1] + x2[:, 1:] @ w.view(1, 2), t) + DECAY / 2 * w.square().sum()
                )
            far = w.view(2, 2)[:1] - first[:1]
            return F.cross_entropy(x2 @ w.view(2, 2), t) + DECAY / 2 * w.square().sum() + ALPHA * far.square().sum()

        last = newton(finetuning, torch.zeros(2 if case == 1 else 4, dtype=torch.float64))
        return first, torch.cat([first[:1], last.view(1, 2)]) if case == 1 else last.view(2, 2)

    first, last = solve(torch.ones(m, dtype=torch.float64))
    made = scores(
        additive("before", first[:1], first[1:]), additive("after", last[:1], last[1:]), Classification(),
        (x, y), (x2, t), Query.mean_loss(list(zip(xq, tq))), case,
    )  # fmt: skip
    assert made[planted] > 0
    assert made.argmax() == planted
    kept = torch.ones(m, dtype=torch.float64)
    kept[planted] = 0
    after = F.cross_entropy(xq @ solve(kept)[1], tq)
    assert after < F.cross_entropy(xq @ last, tq)


def test_the_pretraining_curvature_counts() -> None:
    """With everything else the same, another pretraining curvature gives other scores."""
    net = Network()
    theta, later = normal(51, net.size), normal(52, net.size)
    later[: net.split] = theta[: net.split]
    setup = (
        net.model("before", theta), net.model("after", later), Classification(), (net.X, net.Y), (net.X2, net.T),
        Query.mean_loss(list(zip(net.XQ, net.TQ))), 1,
    )  # fmt: skip
    plain = scores(*setup, curvature=["ggn", "ggn"], damping=[1.0, 1.0])
    for change in [
        {"curvature": ["hessian", "ggn"], "damping": [1.0, 1.0]},
        {"curvature": ["fisher", "ggn"], "damping": [1.0, 1.0]},
        {"curvature": ["ggn", "ggn"], "damping": [2.0, 1.0]},
    ]:
        other = scores(*setup, **change)
        assert np.abs(other - plain).max() > 0.01 * np.abs(plain).max()
        assert pearson(other, plain) < 1 - 1e-6
