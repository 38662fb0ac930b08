"""Query vectors with random directions: what scoring computes is an inner product, whatever solve made the vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf.influence import QueryVectors
from nlpinf.parameters import Parameters
from nlpinf.queries import Query
from nlpinf.solvers import Solution
from nlpinf.stages import Stage
from tests.cases import FAMILIES, WORDS, Case, case


def pretrain_stage(family: str, dtype: torch.dtype = torch.float64) -> Stage:
    return case(family, "frozen", dtype).chain.stages[0]


def directions(stage: Stage, count: int = 1, seed: int = 0) -> list[Parameters]:
    return [P.random_like(stage.theta, seed + i) for i in range(count)]


def query_vectors(stage: Stage, count: int = 1, seed: int = 0) -> QueryVectors:
    trees = directions(stage, count, seed)
    ends = [
        Solution(tree, "converged", 1e-4 * (i + 1), None, 3, 1e-3, 0.1, "cg", [1.0, 0.1])
        for i, tree in enumerate(trees)
    ]
    queries = tuple(Query("loss", (stage.data[0],), f"query {i}") for i in range(count))
    verdicts = tuple({stage.name: end} for end in ends)
    return QueryVectors(stage, queries, tuple(trees), verdicts, tuple(0.5 + i for i in range(count)), {"damping": 0.1})


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return sentences of 1 to 7 of the tests' words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator).tolist()) for n in lengths
    ]


def by_loop(
    stage: Stage, vectors: Sequence[Parameters], examples: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return scores (N, Q) and losses (N,) of the stage's examples: one autograd backward an example, a dot a query.

    The outputs come from the tests' own route (`tests.cases`): one example at a time, no padding, eager attention.
    """
    family = next(f for f in FAMILIES if pretrain_stage(f) is stage)
    own: Case = case(family, "frozen")
    items = sum(len(own.asked_outputs(stage, dict(stage.parameters), i)[1]) for i in range(stage.size))
    scores, losses = [], []
    for i in range(stage.size) if examples is None else examples:
        theta = {n: t.double().clone().requires_grad_(True) for n, t in stage.parameters.items()}
        outputs, targets = own.asked_outputs(stage, theta, i)
        if targets.is_floating_point():
            each = 0.5 * ((outputs - targets) ** 2).sum(-1)
        else:
            each = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
        loss = each.mean() if stage.reduction == "example" else stage.size / items * each.sum()
        gradients = dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)))
        scores.append(torch.stack([sum((gradients[n] * v[n].double()).sum() for n in v) for v in vectors]))  # type: ignore[misc]
        losses.append(loss.detach())
    return torch.stack(scores), torch.stack(losses)


def apart(a: Any, b: Any) -> float:
    """Return the largest difference relative to the largest entry."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return float((a - b).abs().max() / b.abs().max())
