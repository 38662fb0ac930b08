"""What dropping rows does to a query, by one Newton step on the pretraining objective without them.

With S the rows that go, m the corpus and the rest as in `influence.py`,

    Δθ = ( G'' − 1/m Σ_{z∈S} g''(z) + λI )⁻¹ · 1/m Σ_{z∈S} g'(z),      Δq ≈ ⟨(w, 0), Δθ⟩

against the first order −Σ score/m = ⟨(w, 0), (G'' + λI)⁻¹ 1/m Σ g'⟩, from which it differs where S carries curvature. One
solve a set. The Hessian is the default where it is positive definite: the Gauss-Newton matrix misses what a converged stage has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nlpinf import parameters as P
from nlpinf.curvature import Curvature, CurvatureKind, Operator, Shifted
from nlpinf.errors import BadInput
from nlpinf.influence import ImplicitSolve, Progress, Step
from nlpinf.parameters import Parameters
from nlpinf.queries import Query
from nlpinf.solvers import CG, Solution, Solver
from nlpinf.stages import Chain, Link, Stage
from nlpinf.systems import CurvatureChoice, Relative, System


@dataclass(frozen=True)
class Removed:
    """The predicted changes of every query for one set of rows; `solution` holds Δθ and how its solve ended.

    `first_order`  −Σ score/m over the rows, (queries,)
    `newton`       ⟨(w, 0), Δθ⟩, (queries,)
    """

    name: str
    rows: tuple[int, ...]
    first_order: tuple[float, ...]
    newton: tuple[float, ...]
    solution: Solution


class Without(Operator):
    """The curvature of a stage's mean loss without the rows at `gone`, still over m: C − 1/m Σ_{z∈S} C(z), as (1 − |S|/m) times
    the mean over the rows that stay (those of `indices`, where these are a sample of the corpus)."""

    def __init__(
        self, stage: Stage, kind: CurvatureKind, indices: Sequence[int], gone: Sequence[int], seed: int
    ) -> None:
        super().__init__(stage.theta)
        lost = set(gone)
        stays = [i for i in indices if i not in lost]
        if not stays:
            raise BadInput("all rows of the curvature sample are to be dropped; take a larger sample")
        self.base = Curvature(stage, kind, stays, seed)
        self.share = 1 - len(lost) / stage.size

    def product(self, vector: Parameters) -> Parameters:
        return P.scaled(self.share, self.base @ vector)


def predict(
    chain: Chain,
    queries: Sequence[Query],
    sets: dict[str, Sequence[int]],
    *,
    curvature: CurvatureChoice = "auto",
    damping: float | Relative = 0.0,
    solver: Solver | None = None,
    sample: int | None = None,
    seed: int = 0,
    later: Sequence[Step] | None = None,
    allow_unconverged: bool = False,
    progress: Progress | None = None,
) -> list[Removed]:
    """Return the predicted change of every query when each of `sets`, positions in the pretraining data by name, is dropped.

    `curvature`, `damping` and `sample` are the pretraining's; `later` gives a `Step` for each later stage (default: an
    `ImplicitSolve` of the same settings on all rows). Raises `NotConverged` unless `allow_unconverged`.
    """
    if not queries or not sets:
        raise BadInput("there is nothing to predict: give at least one query and one set of rows")
    link, solver = chain.links[0], solver or CG()
    stage = link.stage
    for name, gone in sets.items():
        _refuse(name, gone, stage)
    steps = later or [ImplicitSolve(curvature, damping, solver, None, seed, allow_unconverged)] * (len(chain.links) - 1)
    cotangents = [query.gradient(chain.stages[-1]) for query in queries]
    for later_link, step in reversed(list(zip(chain.links[1:], steps))):
        cotangents = [P.embedded(c, later_link.stage.parameters) for c in cotangents]
        cotangents = [back.cotangent for back in step(later_link, cotangents, progress)]
    ws = [P.select(P.embedded(c, stage.parameters), stage.theta) for c in cotangents]
    system = System(link, curvature, damping, sample, seed)
    found = []
    for name, gone in sets.items():
        pull = P.scaled(len(gone) / stage.size, stage.gradient(indices=list(gone), decay=False))
        report = None if progress is None else (lambda k, r, name=name: progress(name, k, r))
        full = system.solve(solver, [pull], report)[0]
        moved = _newton(system, link, gone, pull, solver, report)
        if not allow_unconverged:
            for solution in (full, moved):
                solution.required(f"stage {stage.name!r} without {name}")
        found.append(
            Removed(
                name, tuple(gone), tuple(P.dot(w, full.vector) for w in ws), tuple(P.dot(w, moved.vector) for w in ws), moved
            )
        )  # fmt: skip
    return found


def _newton(
    system: System,
    link: Link,
    gone: Sequence[int],
    pull: Parameters,
    solver: Solver,
    report: Callable[[int, float], None] | None,
) -> Solution:
    """Solve with the operator of the rows that stay; with the Gauss-Newton one if theirs turns out not to be definite."""
    for kind in dict.fromkeys((system.kind, "ggn")):
        stays = Without(link.stage, kind, system.first, gone, system.seed)  # type: ignore[arg-type]
        solution = solver(Shifted(stays, link.shift, system.operator.damping), pull, None, report)
        if solution.verdict != "negative curvature":
            break
    note = f"{kind} of the rows that stay"
    return replace(solution, note="; ".join(filter(None, (solution.note, note))))


def _refuse(name: str, gone: Sequence[int], stage: Stage) -> None:
    if not gone or len(set(gone)) != len(gone):
        raise BadInput(f"{name}: names {'a row twice' if gone else 'no row'}; give each row to drop once")
    if not all(0 <= i < stage.size for i in gone):
        raise BadInput(f"{name}: names row {max(gone)}, but the corpus has {stage.size} rows, from 0")
    if len(gone) == stage.size:
        raise BadInput(f"{name}: names all {stage.size} rows; leave some")
