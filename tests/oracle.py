"""Dense float64 oracles: every matrix of the formulas written out, and the score by the direct method.

Nothing here uses the products, solvers or the recursion of nlpinf. Where nlpinf pulls a query back (adjoint), the oracle
pushes every example's perturbation forward through the stages:

    dθ_0 = −G''⁻¹ g'(z),   dT = −(F_TT + 2α I)⁻¹ (F_TK dK − 2α dM),   score(z) = ⟨q', (dK, dT)⟩

with T what a stage trained, K what it received and kept, M what it received and moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nlpinf.stages import Link, Stage
from tests.cases import Case, case

_WORD = 2**64 - 1


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def uniform(seed: int, *keys: int) -> float:
    """Return the number in [0, 1) of (seed, keys): SplitMix64 in whole numbers."""
    state = _mix(seed & _WORD)
    for key in keys:
        state = _mix(state ^ _mix(key & _WORD))
    return (state >> 11) * 2.0**-53


def item_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return 0.5 * ((outputs - targets) ** 2).sum(-1)
    return F.cross_entropy(outputs, targets, reduction="none")


@dataclass
class Dense:
    """One stage's derivatives over all of its model's parameters, flat, in the order of the model's names."""

    case: Case
    k: int

    @property
    def stage(self) -> Stage:
        return self.case.chain.stages[self.k]

    @cached_property
    def names(self) -> list[str]:
        return list(dict(self.stage.model.named_parameters()))

    @cached_property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().double().flatten() for p in self.stage.model.parameters()])

    def tree(self, flat: Tensor) -> dict[str, Tensor]:
        shapes = {n: p.shape for n, p in self.stage.model.named_parameters()}
        parts = flat.split([s.numel() for s in shapes.values()])
        return {n: part.view(s) for (n, s), part in zip(shapes.items(), parts)}

    def flat(self, tree: dict[str, Tensor]) -> Tensor:
        zero = self.tree(torch.zeros_like(self.theta))
        return torch.cat([tree.get(n, zero[n]).double().flatten() for n in self.names])

    def where(self, names: list[str] | tuple[str, ...]) -> Tensor:
        """Return the flat indices of `names`, in the order given."""
        index = self.tree(torch.arange(len(self.theta)).double())
        return torch.cat([index[n].flatten().long() for n in names]) if names else torch.zeros(0, dtype=torch.long)

    def outputs(self, flat: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return self.case.outputs(self.k, self.tree(flat), i)

    @cached_property
    def counts(self) -> list[int]:
        return [len(self.outputs(self.theta, i)[0]) for i in range(len(self.stage.data))]

    def weight(self, i: int) -> float:
        """Return the weight of each counted loss of example i in g(z_i)."""
        if self.stage.reduction == "token":
            return len(self.counts) / sum(self.counts)
        return 1 / self.counts[i]

    def loss(self, flat: Tensor, i: int) -> Tensor:
        """Return g(z_i)."""
        return self.weight(i) * item_losses(*self.outputs(flat, i)).sum()

    @cached_property
    def gradients(self) -> Tensor:
        """g'(z_i) of every example, (m, P)."""
        theta = self.theta.clone().requires_grad_(True)
        return torch.stack([torch.autograd.grad(self.loss(theta, i), theta)[0] for i in range(len(self.counts))])

    @cached_property
    def hessian(self) -> Tensor:
        """The Hessian of the mean loss, reverse over reverse mode."""
        m = len(self.counts)
        return sum(
            torch.autograd.functional.hessian(lambda t, i=i: self.loss(t, i), self.theta, vectorize=True) for i in range(m)
        ) / m  # fmt: skip

    @cached_property
    def jacobians(self) -> list[Tensor]:
        """∂outputs/∂θ of every example, each (items, classes, P)."""
        return [
            torch.autograd.functional.jacobian(lambda t, i=i: self.outputs(t, i)[0], self.theta, vectorize=True)
            for i in range(len(self.counts))
        ]

    def _inner(self, middle: list[Tensor]) -> Tensor:
        total = torch.zeros(len(self.theta), len(self.theta), dtype=torch.float64)
        for i, (jacobian, b) in enumerate(zip(self.jacobians, middle)):
            total += self.weight(i) * torch.einsum("tcp,tcd,tdq->pq", jacobian, b, jacobian)
        return total / len(self.counts)

    @cached_property
    def ggn(self) -> Tensor:
        """1/m Σ w Jᵀ (∂²ℓ/∂o²) J, the inner Hessian by autograd."""
        middle = []
        for i in range(len(self.counts)):
            outputs, targets = self.outputs(self.theta, i)
            middle.append(
                torch.stack(
                    [
                        torch.autograd.functional.hessian(lambda o, t=t: item_losses(o[None], t[None])[0], o)
                        for o, t in zip(outputs.detach(), targets)
                    ]
                )
            )
        return self._inner(middle)

    def fisher(self, seed: int) -> Tensor:
        """1/m Σ w Jᵀ ĝ ĝᵀ J with targets drawn from (seed, row, number of the item in its example)."""
        middle = []
        for i in range(len(self.counts)):
            outputs, targets = self.outputs(self.theta, i)
            gradients = []
            for number, o in enumerate(outputs.detach()):
                if targets.is_floating_point():
                    draws = torch.tensor([uniform(seed, i, number, c) for c in range(len(o))], dtype=torch.float64)
                    gradients.append(-torch.distributions.Normal(0.0, 1.0).icdf(draws))
                    continue
                p, u, drawn = torch.softmax(o, 0).tolist(), uniform(seed, i, number, 0), 0
                while drawn < len(p) - 1 and sum(p[: drawn + 1]) <= u:
                    drawn += 1
                gradients.append(torch.softmax(o, 0) - F.one_hot(torch.tensor(drawn), len(p)))
            g = torch.stack(gradients)
            middle.append(g[:, :, None] * g[:, None, :])
        return self._inner(middle)

    def curvature(self, kind: str, seed: int = 0) -> Tensor:
        return self.fisher(seed) if kind == "fisher" else getattr(self, kind)

    def shift(self, link: Link) -> Tensor:
        """The diagonal of weight decay and 2α, over all parameters, as the case was built."""
        alpha = getattr(link.transfer, "alpha", 0.0)
        decay = self.stage.weight_decay
        trained = set(self.stage.trained)
        return self.flat(
            {
                n: torch.full_like(t, decay.get(n, 0.0) + (2 * alpha if n in link.received and n in trained else 0.0))
                for n, t in self.tree(self.theta).items()
            }
        )


@lru_cache
def dense(family: str, path: str, k: int) -> Dense:
    """Return the derivatives of stage k of the case; a pretraining stage is the same on every path."""
    return Dense(case(family, "frozen" if k == 0 else path), k)


def matrix(family: str, path: str, k: int, kind: str) -> Tensor:
    """Return the curvature of stage k over what it trained, with weight decay and proximity, undamped."""
    d, link = dense(family, path, k), case(family, path).chain.links[k]
    trained = d.where(list(d.stage.trained))
    return d.curvature(kind)[trained][:, trained] + torch.diag(d.shift(link)[trained])


def safe_damping(family: str, path: str, k: int, kind: str, share: float) -> float:
    """Return a damping that makes the curvature of stage k clearly positive definite: `share` of its largest eigenvalue."""
    values = torch.linalg.eigvalsh(matrix(family, path, k, kind))
    return share * float(values[-1]) + 1.3 * max(0.0, -float(values[0]))


def query_gradient(family: str, path: str, examples: list, which: slice) -> Tensor:
    """Return q' of the mean loss over `examples[which]` at the last stage, flat."""
    c = case(family, path)
    d = dense(family, path, len(c.chain.links) - 1)
    asked = Stage(d.stage.model, d.stage.task, examples, 0.0, "example", d.stage.trained)
    theta = d.theta.clone().requires_grad_(True)
    chosen = range(len(examples))[which]
    q = sum(item_losses(*c.asked_outputs(asked, d.tree(theta), i)).mean() for i in chosen) / len(chosen)
    return torch.autograd.grad(q, theta)[0]


def vector(family: str, path: str, q: Tensor, kinds: list[str], dampings: list[float]) -> Tensor:
    """Return v, flat over what the pretraining trained, with score(z) = ⟨v, g'(z)⟩, by the direct method.

    The columns of `moves` are what happens to a stage's parameters for each unit step of the pretraining parameters.
    """
    c = case(family, path)
    d = dense(family, path, 0)
    trained = d.where(list(d.stage.trained))
    damped = matrix(family, path, 0, kinds[0]) + dampings[0] * torch.eye(len(trained), dtype=torch.float64)
    moves = torch.zeros(len(d.theta), len(trained), dtype=torch.float64)
    moves[trained] = -torch.linalg.inv(damped)  # −G''⁻¹, to be applied to g'(z)
    for k, link in enumerate(c.chain.links[1:], start=1):
        parent, d = d, dense(family, path, k)
        received = torch.zeros(len(d.theta), moves.shape[1], dtype=torch.float64)
        for mine, other in link.received.items():
            received[d.where([mine])] = moves[parent.where([other])]
        kept = d.where([n for n in link.received if n not in d.stage.trained])
        trained = d.where(list(d.stage.trained))
        pull = torch.zeros(len(d.theta), dtype=torch.float64)
        went_on = [n for n in link.received if n in d.stage.trained]
        pull[d.where(went_on)] = 2 * getattr(link.transfer, "alpha", 0.0)
        damped = matrix(family, path, k, kinds[k]) + dampings[k] * torch.eye(len(trained), dtype=torch.float64)
        right = d.hessian[trained][:, kept] @ received[kept] - (pull[:, None] * received)[trained]
        moves = torch.zeros_like(received)
        moves[kept] = received[kept]
        moves[trained] = -torch.linalg.solve(damped, right)
    return q @ moves
