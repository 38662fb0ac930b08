"""What dropping rows does to a query, by one Newton step on the pretraining objective without them.

With S the rows that go, m the corpus, p = 1/m Σ_{z∈S} g'(z), v the query vector, which solves C v = −(w, 0), and C_S the operator
of the rows that stay, still over m and with its damping,

    first order   −Σ score/m = −⟨v, p⟩
    Newton        Δθ = C_S⁻¹ p,      Δq ≈ ⟨(w, 0), Δθ⟩ = −⟨v, p⟩ − ⟨v, (C − C_S) Δθ⟩

They differ where S carries curvature. In the last form the error of the solve for Δθ counts to second order only, and neither the
finetuning nor its data are needed again: v holds what they say. One solve a set. The exact Hessian is the default
where it is positive definite: the Gauss-Newton matrix misses what a converged stage has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nlpinf import parameters as P
from nlpinf.curvature import Curvature, CurvatureKind, Operator, Shifted
from nlpinf.errors import BadInput
from nlpinf.influence import Progress, QueryVectors
from nlpinf.parameters import Parameters
from nlpinf.solvers import CG, Preconditioning, Solution, Solver, preconditioning
from nlpinf.stages import Link, Stage
from nlpinf.systems import CurvatureChoice, System


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
        return self.block([vector])[0]

    def block(self, vectors: Sequence[Parameters]) -> list[Parameters]:
        return [P.scaled(self.share, product) for product in self.base.many(vectors)]


def predict(
    vectors: QueryVectors,
    sets: Mapping[str, Sequence[int]],
    *,
    curvature: CurvatureChoice = "auto",
    damping: float | None = None,
    sample: int | None = None,
    solver: Solver | None = None,
    preconditioner: str | Preconditioning | None = None,
    allow_unconverged: bool = False,
    progress: Progress | None = None,
) -> list[Removed]:
    """Return the predicted change of every query when each of `sets`, positions in the pretraining data by name, is dropped.

    `damping` and `sample` are the query vectors' own by default, λ as an absolute number. A preconditioner is made once,
    from all rows. Raises `NotConverged` for a solve, of a set or of a query vector, that did not, unless `allow_unconverged`.
    """
    stage, own = vectors.stage, _own(vectors)
    if not sets:
        raise BadInput("there is nothing to predict: give at least one set of rows")
    for name, gone in sets.items():
        _refuse(name, gone, stage)
    if not allow_unconverged:
        for query, ends in zip(vectors.queries, vectors.verdicts):
            for where, end in ends.items():
                end.required(f"query {query.name!r}, stage {where!r}")
    lam = own.damping if damping is None else damping
    rows = own.sample if sample is None else sample
    link, solver = Link(stage, {}, None), solver or CG()
    made = System(link, own.kind, own.damping, own.sample, own.seed).operator
    system = System(link, curvature, lam, rows, own.seed)
    ready = preconditioning(preconditioner)
    if ready is not None and getattr(solver, "preconditioner", False) is None:
        changed: Any = solver
        solver = replace(changed, preconditioner=ready.fit(system.operator))
    found = []
    for name, gone in sets.items():
        pull = P.scaled(len(gone) / stage.size, stage.gradient(indices=list(gone), decay=False))
        report = None if progress is None else (lambda k, r, name=name: progress(name, k, r))
        operator, solution = _newton(system, gone, pull, solver, report)
        if not allow_unconverged:
            solution.required(f"stage {stage.name!r} without {name}")
        lost = P.axpy(-1.0, operator @ solution.vector, made @ solution.vector)  # (C − C_S) Δθ
        first = tuple(-P.dot(v, pull) for v in vectors.vectors)
        more = tuple(-P.dot(v, lost) for v in vectors.vectors)
        found.append(Removed(name, tuple(gone), first, tuple(a + b for a, b in zip(first, more)), solution))
    return found


def _newton(
    system: System,
    gone: Sequence[int],
    pull: Parameters,
    solver: Solver,
    report: Callable[[int, float], None] | None,
) -> tuple[Operator, Solution]:
    """Solve with the operator of the rows that stay; with the Gauss-Newton one if theirs turns out not to be definite."""
    link = system.link
    for kind in dict.fromkeys((system.kind, "ggn")):
        stays = Without(link.stage, kind, system.first, gone, system.seed)  # type: ignore[arg-type]
        operator = Shifted(stays, link.shift, system.operator.damping)
        solution = solver(operator, pull, None, report)
        if solution.verdict != "negative curvature":
            break
    note = f"{kind} of the rows that stay"
    return operator, replace(solution, note="; ".join(filter(None, (solution.note, note))))


@dataclass(frozen=True)
class _Own:
    """The operator that the query vectors were solved with."""

    kind: CurvatureKind
    damping: float
    sample: int | None
    seed: int


def _own(vectors: QueryVectors) -> _Own:
    step: Mapping[str, Any] = (vectors.settings.get("steps") or [{}])[0]
    if step.get("step") != "implicit_solve":
        raise BadInput(
            f"the query vectors' pretraining step is {step.get('step', 'not recorded')!r}; a prediction needs one solve"
        )
    end = list(vectors.verdicts[0].values())[-1]  # the pretraining's comes last
    kind = step["curvature"]
    if kind == "auto":
        kind = "ggn" if "Gauss-Newton matrix" in end.note else "hessian"
    return _Own(kind, end.damping, step["sample"], step["seed"])


def _refuse(name: str, gone: Sequence[int], stage: Stage) -> None:
    if not gone or len(set(gone)) != len(gone):
        raise BadInput(f"{name}: names {'a row twice' if gone else 'no row'}; give each row to drop once")
    if odd := [i for i in gone if not 0 <= i < stage.size]:
        raise BadInput(f"{name}: names row {odd[0]}, but the corpus has {stage.size} rows, from 0")
    if len(gone) == stage.size:
        raise BadInput(f"{name}: names all {stage.size} rows; leave some")
