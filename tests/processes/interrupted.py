"""Solves of a group that end before their time: the processes agree on where they go on, and on what they refuse."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from nlpinf import CG, Query, checkpoints, processes, query_vectors
from nlpinf.checkpoints import Checkpoints, SolveCheckpoint
from nlpinf.errors import BadInput, NotConverged
from nlpinf.influence import QueryVectors
from nlpinf.solvers import Solution
from nlpinf.stages import Chain


def goes_on(made: Chain, folder: Path) -> None:
    """Assert that a query out of products goes on to the bits of an undisturbed one, and another is refused by all."""

    def asked(where: Path | None, budget: int = 500, restart: bool = False, damping: float = 0.5) -> QueryVectors:
        told.clear()
        kept = None if where is None else Checkpoints(where, 0, restart=restart, say=told.append)
        queries = [Query.mean_loss(made.stages[-1].data), Query.loss(made.stages[-1].data[1])]
        solver = CG(1e-5, budget)
        return query_vectors(made, queries, damping=damping, solver=solver, preconditioner="ekfac", checkpoint=kept)

    def same(found: QueryVectors) -> None:
        for one, other in zip(found.vectors, undisturbed.vectors):
            assert all(torch.equal(one[n], other[n]) for n in one)

    told: list[str] = []
    undisturbed = asked(None)
    with pytest.raises(NotConverged):
        asked(folder, 3)
    with pytest.raises(BadInput, match="another damping"):
        asked(folder, damping=0.6)
    same(asked(folder))
    assert any("goes on after" in line for line in told)
    same(asked(folder))
    assert told and all(line.endswith("done before") for line in told)
    same(asked(folder, restart=True))
    assert len(told) == 2 and all("EK-FAC takes" in line for line in told)
    with pytest.raises(
        BadInput, match="all processes must see this folder"
    ):  # the first process too, not the others alone
        asked(folder.with_name(f"{folder.name} of {processes.rank()}"))
    _a_slow_reader(folder)


def _a_slow_reader(folder: Path) -> None:
    """A part was done, the whole was not: the first process tidies the part up, but not while another reads it."""
    opened = checkpoints.safe_open

    def slow(*arguments: Any) -> Any:
        time.sleep(0.5 * processes.rank())
        return opened(*arguments)

    def solve(dies: bool) -> list[Solution]:
        def whole(part: SolveCheckpoint) -> list[Solution]:
            found = part.solved("part", lambda _: [end])
            if dies:
                raise KeyboardInterrupt
            return found

        return Checkpoints(folder, 0).of_solve("slow", {}, torch.device("cpu")).solved("whole", whole)

    end = Solution({"w": torch.arange(3.0)}, "converged", 0.0, None, 1, 0.1, 0.0, "none")
    with suppress(KeyboardInterrupt):
        solve(dies=True)
    checkpoints.safe_open = slow
    try:
        (found,) = solve(dies=False)
    finally:
        checkpoints.safe_open = opened
    assert torch.equal(found.vector["w"], end.vector["w"])
