"""Pulls a query back through a chain of stages: one vector in the pretraining parameters, ⟨v, g'(z)⟩ being z's score.

With `W` what a stage received, `Θ` what it added, F its objective and (q_W, q_Θ) the gradient of the query:

    case 1 (frozen)     y = F_ΘΘ⁻¹ q_Θ                               w = q_W − F_WΘ y
    case 2 (proximity)  (y_W, y_Θ) = (F'' + 2α I_W)⁻¹ (q_W, q_Θ)      w = 2α y_W
    pretraining         s = G''⁻¹ (w, 0)                             v = −s         score(z) = ⟨v, g'(z)⟩

A stage may keep some of what it received and move the rest; `ImplicitSolve` is written for that, and both cases are its
ends. Source: Chen et al., Multi-Stage Influence Function, NeurIPS 2020; positive = harmful.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nlpinf import parameters as P
from nlpinf.curvature import cross_product, curvature_samples
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.queries import Query
from nlpinf.solvers import CG, Preconditioning, Solution, Solver, preconditioning
from nlpinf.stages import Chain, Link, Stage
from nlpinf.systems import CurvatureChoice, Relative, System

Progress = Callable[[str, int, float], None]


@dataclass(frozen=True)
class PulledBack:
    """What a step returns: the cotangent on what the stage received, by the parent's names, and how the solve ended."""

    cotangent: Parameters
    solution: Solution


def passed_back(link: Link, cotangent: Parameters, y: Parameters, indices: Sequence[int]) -> Parameters:
    """Return w, the cotangent on what the stage received, by the parent's names; `indices` carry the mixed block F_WΘ."""
    w = {n: 2 * link.alpha * y[n] for n in link.moved}
    if link.kept:
        w |= P.axpy(-1.0, cross_product(link.stage, y, link.kept, indices), P.select(cotangent, link.kept))
    return {link.received[n]: tensor for n, tensor in w.items()}


class Step(Protocol):
    """How one stage passes cotangents back."""

    def __call__(
        self, link: Link, cotangents: Sequence[Parameters], progress: Progress | None = None
    ) -> list[PulledBack]:
        """Take ∂q/∂(the stage's final parameters) by name to ∂q/∂(what it received), for every query q."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the settings for a manifest."""
        ...


@dataclass
class ImplicitSolve:
    """Passes a cotangent back by the implicit function theorem at the stage's optimum: one linear solve.

    `curvature`  "ggn" (default), "hessian", "fisher", or "auto": the Hessian where it is positive definite, else the GGN
    `damping`    λ, absolute or `Relative`
    `sample`     rows of the stage's corpus that the operator averages over; None for all. A second sample of as many
                 other rows, if there are any, measures how far the first determines the answer
    `preconditioner`  "none", "diagonal", "ekfac", "nystrom", "spectral", or a `Preconditioning`
    """

    curvature: CurvatureChoice = "ggn"
    damping: float | Relative = field(default_factory=lambda: Relative(1e-2))
    solver: Solver = field(default_factory=CG)
    sample: int | None = None
    seed: int = 0
    allow_unconverged: bool = False
    preconditioner: str | Preconditioning | None = None
    _systems: dict[int, tuple[Link, System]] = field(default_factory=dict, repr=False)

    def settings(self) -> dict[str, Any]:
        damping = self.damping
        made = preconditioning(self.preconditioner)
        chosen = {system.link.stage.name: system.reason for _, system in self._systems.values() if system.reason}
        return {
            "step": "implicit_solve",
            "curvature": self.curvature,
            "damping": {"relative": damping.factor} if isinstance(damping, Relative) else damping,
            "sample": self.sample,
            "seed": self.seed,
            "solver": self.solver.settings(),
            "preconditioner": None if made is None else made.settings(),
            "allow_unconverged": self.allow_unconverged,
            **({"chosen": chosen} if chosen else {}),
        }

    def system(self, link: Link) -> System:
        """Return the link's linear system; made once."""
        if id(link) not in self._systems:
            settings = (self.curvature, self.damping, self.sample, self.seed, self.preconditioner)
            self._systems[id(link)] = (link, System(link, *settings))
        return self._systems[id(link)][1]

    def __call__(
        self, link: Link, cotangents: Sequence[Parameters], progress: Progress | None = None
    ) -> list[PulledBack]:
        stage, system = link.stage, self.system(link)
        report = None if progress is None else (lambda k, residual: progress(stage.name, k, residual))
        rights = [P.select(cotangent, system.operator.template) for cotangent in cotangents]
        pulled = []
        for cotangent, solution in zip(cotangents, system.solve(self.solver, rights, report)):
            if not self.allow_unconverged:
                solution.required(f"stage {stage.name!r}")
            pulled.append(PulledBack(passed_back(link, cotangent, solution.vector, system.first), solution))
        return pulled


@dataclass(frozen=True)
class QueryVectors:
    """v of every query: `vectors[i]` by the trained parameters of the pretraining `stage`, in its dtype.

    `verdicts[i]` are the ends of the solves that made it, by stage, the last stage first.
    `values[i]` is q itself. `settings` tell how it was made.
    """

    stage: Stage
    queries: tuple[Query, ...]
    vectors: tuple[Parameters, ...]
    verdicts: tuple[dict[str, Solution], ...]
    values: tuple[float, ...]
    settings: dict[str, Any]

    @property
    def converged(self) -> bool:
        """Whether every solve of every query converged."""
        return all(solution.converged for verdict in self.verdicts for solution in verdict.values())

    def __len__(self) -> int:
        return len(self.vectors)


def pull_back(
    chain: Chain, cotangents: Sequence[Parameters], steps: Sequence[Step], progress: Progress | None = None
) -> tuple[list[Parameters], list[dict[str, Solution]]]:
    """Return v and the verdicts for every cotangent ∂q/∂(the last stage's parameters), by name; `steps[i]` is stage i's."""
    verdicts: list[dict[str, Solution]] = [{} for _ in cotangents]
    for link, step in reversed(list(zip(chain.links, steps))):
        pulled = step(link, [P.embedded(c, link.stage.parameters) for c in cotangents], progress)
        name = _unique(link.stage.name, verdicts[0])
        for ends, back in zip(verdicts, pulled):
            ends[name] = back.solution
        cotangents = [back.cotangent for back in pulled]
    return [P.scaled(-1.0, back.solution.vector) for back in pulled], verdicts


def query_vectors(
    chain: Chain,
    queries: Sequence[Query],
    *,
    curvature: CurvatureChoice | Sequence[CurvatureChoice] = "ggn",
    damping: float | Relative | Sequence[float | Relative] | None = None,
    solver: Solver | None = None,
    sample: int | Sequence[int | None] | None = None,
    seed: int = 0,
    allow_unconverged: bool = False,
    preconditioner: str | Preconditioning | None = None,
    steps: Sequence[Step] | None = None,
    progress: Progress | None = None,
) -> QueryVectors:
    """Return the query vectors v of `queries` through `chain`, with a verdict for every solve.

    `curvature`, `damping` and `sample` are one for all stages or one for each, in the chain's order. `damping` defaults
    to `Relative(1e-2)`. `sample` rows of a stage's corpus carry its curvature; None takes all of them, and of one number
    for all stages a smaller corpus takes all of its own. `steps` replaces all of this by one `Step` a stage. Raises `NotConverged` unless
    `allow_unconverged`, which is recorded.
    """
    if not queries:
        raise BadInput("there is no query; give at least one")
    if steps is None:
        count = len(chain.links)
        samples = _each(sample, count)
        if isinstance(sample, int) and sample <= chain.stages[0].size:
            samples = [min(sample, stage.size) for stage in chain.stages]
        for rows, stage in zip(samples, chain.stages):
            curvature_samples(stage.size, rows, seed)  # refuses more rows than there are, before the first solve
        steps = [
            ImplicitSolve(kind, lam, solver or CG(), rows, seed, allow_unconverged, preconditioner)
            for kind, lam, rows in zip(
                _each(curvature, count), _each(Relative(1e-2) if damping is None else damping, count), samples
            )
        ]
    last = chain.stages[-1]
    values = [query.value(last) for query in queries]
    vectors, verdicts = pull_back(chain, [query.gradient(last) for query in queries], steps, progress)
    settings = {
        "stages": [
            {
                "name": s.name,
                "reduction": s.reduction,
                "rows": s.size,
                "task": s.task.settings(),
                **({"head": s.record["head"]} if "head" in s.record else {}),  # a head that was fitted afterwards
            }
            for s in chain.stages
        ],
        "transfer": [_transfer(link) for link in chain.links[1:]],
        "steps": [step.settings() for step in steps],
        "sign": "positive = harmful",
    }
    return QueryVectors(chain.stages[0], tuple(queries), tuple(vectors), tuple(verdicts), tuple(values), settings)


def _transfer(link: Link) -> Any:
    return {"proximity": link.alpha} if link.alpha else "frozen"


def _each(value: Any, count: int) -> list[Any]:
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise BadInput(f"{len(value)} settings for {count} stages; give one for all or one for each")
        return list(value)
    return [value] * count


def _unique(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else f"{name} ({len(taken) + 1})"
