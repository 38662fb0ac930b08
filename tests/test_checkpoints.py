"""A solve that is interrupted anywhere goes on to the bits of an undisturbed one, and another solve is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nlpinf import parameters as P
from nlpinf.checkpoints import Checkpoints, difference, sketch
from nlpinf.curvature import Curvature, Operator, Shifted
from nlpinf.damping import Auto, Choice
from nlpinf.errors import BadInput, NotConverged
from nlpinf.influence import QueryVectors, query_vectors
from nlpinf.queries import Query
from nlpinf.solvers import CG, MINRES, LiSSA, Refined, Solution
from nlpinf.stages import Chain, Proximity
from tests.cases import case
from tests.solvers.test_cg import RIGHT, SIZE, TEMPLATE, Lambda, definite
from tests.solvers.test_solvers import Mean

DEVICE = torch.device("cpu")


class Killed(Exception):
    """What stands for the end of the process."""


class Mortal(Lambda):
    """A matrix whose product raises once `left` products were made; unlimited if None."""

    def __init__(self, matrix: torch.Tensor, left: int | None = None) -> None:
        def product(v: torch.Tensor, k: int) -> torch.Tensor:
            self.made += 1
            if self.made == self.left:
                raise Killed
            return matrix @ v

        super().__init__(product)
        self.left, self.made = left, 0


RIGHTS = [RIGHT, P.random_like(TEMPLATE, 6), P.axpy(1e-3, RIGHT, P.random_like(TEMPLATE, 6))]
SCALE = torch.logspace(0, 1, SIZE, dtype=torch.float64)
PRECONDITIONER: Any = lambda v: {"w": v["w"] / SCALE[:12].view(4, 3), "b": v["b"] / SCALE[12:]}  # noqa: E731
SOLVERS: dict[str, tuple[Any, int]] = {
    "cg": (CG(1e-10), 1),
    "preconditioned cg": (CG(1e-10, preconditioner=PRECONDITIONER), 1),
    "cg, one after the other": (CG(1e-10, block=1), 3),
    "block cg": (CG(1e-10), 3),
    "block cg, two blocks": (CG(1e-10, block=2, preconditioner=PRECONDITIONER), 3),
    "minres": (MINRES(1e-10), 2),
    "lissa": (LiSSA(5e-2, 400, check=2), 2),
}


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests end no machine, and write after every product."""
    monkeypatch.setattr("nlpinf.files._sync", lambda path: None)


def same(one: list[Solution], other: list[Solution]) -> None:
    """Assert that two lists of solutions are equal to the last bit, their histories and counts included."""
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(a.vector[n], b.vector[n]) for n in a.vector)
        assert list(a.vector) == list(b.vector)
        assert a.summary() == b.summary()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solve_that_is_killed_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Killed in its first, a middle and one of its last products: the products made after it are those that were left."""
    solver, count = SOLVERS[name]
    matrix = definite(30.0)
    whole = Mortal(matrix)
    undisturbed = solver.many(whole, RIGHTS[:count], Mortal(definite(seed=1)))
    for left in (1, whole.made // 2, whole.made - 1):
        folder = tmp_path / str(left)

        def solve(operator: Operator) -> list[Solution]:
            checkpoint = Checkpoints(folder, 0).of_solve("x", {}, DEVICE)  # noqa: B023
            return checkpoint.solved(
                "s", lambda part: solver.many(operator, RIGHTS[:count], Mortal(definite(seed=1)), None, None, part)
            )

        with pytest.raises(Killed):
            solve(Mortal(matrix, left))
        again = Mortal(matrix)
        same(solve(again), undisturbed)
        # What was lost is the step that was under way, and checks or a first estimate that came before its end.
        assert again.made <= whole.made - left + 12
        idle = Mortal(matrix, 1)
        same(solve(idle), undisturbed)
        assert idle.made == 0


def test_a_drifted_recursion_and_a_larger_budget_go_on_too(tmp_path: Path) -> None:
    """A restart from the true residual lies between; a budget that was used up can be raised, as if it had been larger."""
    matrix = definite()

    def once_wrong(v: torch.Tensor, k: int) -> torch.Tensor:
        return matrix @ v * (1.001 if k == 3 else 1.0)

    undisturbed = CG(1e-10)(Lambda(once_wrong), RIGHT)

    def solve(budget: int) -> Solution:
        checkpoint = Checkpoints(tmp_path, 5).of_solve("x", {}, DEVICE)  # written where the budget ends
        run: Callable[[Any], list[Solution]] = lambda part: [  # noqa: E731
            CG(1e-10, budget)(Lambda(once_wrong), RIGHT, None, None, None, part)
        ]
        return checkpoint.solved("s", run)[0]

    first = next(i for i, size in enumerate(undisturbed.history) if size <= 1e-10)
    for budget in (2, 5, first, first + 2):
        short = solve(budget)
        assert short.verdict == "not converged" and len(short.history) == budget
    long = solve(1000)
    assert long.converged
    assert all(torch.equal(long.vector[n], undisturbed.vector[n]) for n in long.vector)
    assert long.history == undisturbed.history


def test_refinement_replays_its_finished_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = case("mlp", "frozen", torch.float32).chain.stages[0]
    solver, right = Refined(CG(1e-4)), P.random_like(stage.theta, 3)

    def operator() -> Shifted:
        return Shifted(Curvature(stage, "ggn"), damping=0.1)

    undisturbed = solver(operator(), right)
    block, made = Curvature.block, [0, 10**9]

    def counted(self: Curvature, vectors: Sequence[P.Parameters]) -> list[P.Parameters]:
        made[0] += len(vectors)
        if made[0] >= made[1]:
            raise Killed
        return block(self, vectors)

    monkeypatch.setattr(Curvature, "block", counted)

    def solve() -> list[Solution]:
        checkpoint = Checkpoints(tmp_path, 0).of_solve("x", {}, DEVICE)
        return checkpoint.solved("s", lambda part: [solver(operator(), right, None, None, None, part)])

    made[1] = undisturbed.products - 2
    with pytest.raises(Killed):
        solve()
    made[:] = [0, 10**9]
    same(solve(), [undisturbed])
    assert made[0] < undisturbed.products


def chain_and_queries() -> tuple[Chain, list[Query]]:
    c = case("mlp", "three stages")
    return c.chain, [Query.loss(c.asked[0]), Query.mean_loss(list(c.asked))]


def asked(folder: Path | None, **changes: Any) -> QueryVectors:
    chain, queries = chain_and_queries()
    settings: dict[str, Any] = {"damping": 0.1, "sample": 4, "solver": CG(1e-9), "queries": queries, "chain": chain}
    settings |= {"checkpoint": folder and Checkpoints(folder, 0), **changes}
    return query_vectors(settings.pop("chain"), settings.pop("queries"), **settings)


@pytest.mark.parametrize(("share", "damping"), [(0.2, 0.1), (0.9, 0.1), (0.6, None)])
def test_a_chain_goes_on_in_the_link_where_it_was(
    share: float, damping: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, made = Curvature.block, [0, 10**9]

    def counted(self: Curvature, vectors: Sequence[P.Parameters]) -> list[P.Parameters]:
        made[0] += len(vectors)
        if made[0] >= made[1]:
            raise Killed
        return block(self, vectors)

    choose, choosing = Auto.choose, []

    def counted_choice(self: Auto, *arguments: Any) -> Choice:
        before = made[0]
        choice = choose(self, *arguments)
        choosing.append(made[0] - before)
        return choice

    monkeypatch.setattr(Curvature, "block", counted)
    monkeypatch.setattr(Auto, "choose", counted_choice)
    undisturbed = asked(None, damping=damping)
    # Dampings that are chosen are chosen anew: eight products for a mean eigenvalue, and rough solves.
    whole, made[0], estimates = made[0], 0, sum(choosing)
    made[1] = int(share * whole)
    with pytest.raises(Killed):
        asked(tmp_path, damping=damping)
    made[:] = [0, 10**9]
    again = asked(tmp_path, damping=damping)
    for one, other in zip(again.vectors, undisturbed.vectors):
        assert all(torch.equal(one[n], other[n]) for n in one)
    for ends, others in zip(again.verdicts, undisturbed.verdicts):
        assert {k: s.summary() for k, s in ends.items()} == {k: s.summary() for k, s in others.items()}
    assert made[0] <= (1 - share) * whole + estimates + 4
    made[:] = [0, 10**9]
    asked(tmp_path, damping=damping)
    assert made[0] <= estimates


def moved() -> Chain:
    """The chain with one weight of its last stage changed a little."""
    chain, _ = chain_and_queries()
    last = chain.stages[-1]
    model = copy.deepcopy(last.model)
    with torch.no_grad():
        model.get_parameter(last.trained[-1]).view(-1)[0] += 1e-3  # type: ignore[index]
    return Chain([*chain.stages[:-1], replace(last, model=model)], [link.transfer for link in chain.links[1:]])


def other_rows() -> Chain:
    chain, _ = chain_and_queries()
    last = chain.stages[-1]
    data = [(x + 1e-9, y) for x, y in last.data]
    return Chain([*chain.stages[:-1], replace(last, data=data)], [link.transfer for link in chain.links[1:]])


OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "damping": (lambda: {"damping": 0.1000001}, r"another damping \(0.1 there, 0.1000001 now\)"),
    "relative damping": (lambda: {"damping": None}, "another damping .* now"),
    "seed": (lambda: {"seed": 1}, r"another seed \(0 there, 1 now\)"),
    "sample": (lambda: {"sample": 3}, r"another sample \(4 there, 3 now\)"),
    "curvature": (lambda: {"curvature": "fisher"}, "another curvature \\('ggn' there, 'fisher' now\\)"),
    "tolerance": (lambda: {"solver": CG(1e-8)}, r"another solver tolerance \(1e-09 there, 1e-08 now\)"),
    "solver": (lambda: {"solver": MINRES(1e-9)}, r"another solver name \('cg' there, 'minres' now\)"),
    "preconditioner": (lambda: {"preconditioner": "diagonal"}, "another preconditioner"),
    "queries": (lambda: {"queries": chain_and_queries()[1][:1]}, r"another queries \(not the same"),
    "weights": (lambda: {"chain": moved()}, r"another weights \(not the same"),
    "rows": (lambda: {"chain": other_rows()}, r"another sample rows \(not the same"),
    "proximity": (lambda: {"chain": Chain(chain_and_queries()[0].stages, Proximity(0.31))}, "decay or proximity"),
}  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints of a query whose last solve used its budget up; tests only read it."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(NotConverged):
        asked(folder, solver=CG(1e-9, max_iterations=3))
    return folder


@pytest.mark.parametrize("what", OTHERS)
def test_another_solve_is_refused_in_a_line(what: str, interrupted: Path) -> None:
    before = {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()}
    changes, message = OTHERS[what]
    with pytest.raises(BadInput, match=message) as e:
        asked(interrupted, **changes())
    assert "\n" not in str(e.value) and "--restart" in str(e.value)
    assert {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()} == before


def test_restart_begins_anew_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotConverged):
        asked(tmp_path, solver=CG(1e-9, max_iterations=3))
    (state,) = tmp_path.rglob("*.state.safetensors")
    state.write_bytes(state.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"state\.safetensors: is damaged"):
        asked(tmp_path)
    told: list[str] = []
    made = asked(None, checkpoint=Checkpoints(tmp_path, 0, restart=True, say=told.append))
    assert made.converged and told == []
    again = asked(None, checkpoint=Checkpoints(tmp_path, 0, say=told.append))
    assert len(told) == 3 and all(line.endswith("done before") for line in told)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(made.vectors, again.vectors) for n in a)
    with pytest.raises(BadInput, match="-1 minutes"):
        Checkpoints(tmp_path, -1)


def test_rounding_is_no_difference_and_more_is() -> None:
    vectors = [RIGHT, P.scaled(1e-9, RIGHT)]

    def measured(vectors: list[P.Parameters]) -> dict[str, Any]:
        return {"measured": {"right-hand sides": sketch(vectors), "damping": 0.5}}

    one = measured(vectors)
    assert difference(one, measured([P.scaled(1 + 1e-6, v) for v in vectors])) is None
    assert difference(one, measured([vectors[0], P.scaled(1.01, vectors[1])])) is not None
    turned = P.axpy(1e-2, P.random_like(TEMPLATE, 8), RIGHT)
    assert difference(one, measured([P.scaled(P.norm(RIGHT) / P.norm(turned), turned), vectors[1]])) is not None
    assert difference(one, measured(vectors[:1])) is not None


def test_stochastic_parts_of_a_curvature_go_on(tmp_path: Path) -> None:
    matrices = [definite(20.0) + torch.diag(torch.rand(SIZE, generator=torch.Generator().manual_seed(k)).double()) for k in range(4)]  # fmt: skip
    solver = LiSSA(1e-3, 60)
    undisturbed = solver(Mean(matrices), RIGHT)
    assert undisturbed.verdict == "not converged"
    for budget in (21, 40, 60):
        checkpoint = Checkpoints(tmp_path, 0).of_solve("x", {}, DEVICE)
        (found,) = checkpoint.solved(
            "s", lambda part, n=budget: [LiSSA(1e-3, n)(Mean(matrices), RIGHT, None, None, None, part)]
        )
    assert found.history[-1] <= undisturbed.history[0]
