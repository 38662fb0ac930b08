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
from nlpinf.curvature import Curvature, CurvatureKind, Shifted, cross_product, curvature_samples
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.queries import Query
from nlpinf.solvers import CG, Solution, Solver
from nlpinf.stages import Chain, Link, Stage

Progress = Callable[[str, int, float], None]


@dataclass(frozen=True)
class Relative:
    """A damping of `factor` times the mean eigenvalue of the undamped curvature on its sample.

    The mean eigenvalue is tr(C)/P by Hutchinson's estimator with `probes` seeded ±1 vectors; weight decay and proximity
    are part of C.
    """

    factor: float
    probes: int = 8

    def __post_init__(self) -> None:
        if not self.factor >= 0:
            raise BadInput(f"the relative damping is {self.factor}; it must not be negative")


@dataclass(frozen=True)
class PulledBack:
    """What a step returns: the cotangent on what the stage received, by the parent's names, and how the solve ended."""

    cotangent: Parameters
    solution: Solution


class Step(Protocol):
    """How one stage passes a cotangent back."""

    def __call__(self, link: Link, cotangent: Parameters, progress: Progress | None = None) -> PulledBack:
        """Take ∂q/∂(the stage's final parameters) by name to ∂q/∂(what it received)."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the settings for a manifest."""
        ...


@dataclass
class ImplicitSolve:
    """Passes a cotangent back by the implicit function theorem at the stage's optimum: one linear solve.

    `curvature`  "ggn" (default), "hessian" or "fisher"
    `damping`    λ, absolute or `Relative`
    `sample`     rows of the stage's corpus that the operator averages over; None for all. A second sample of as many
                 other rows, if there are any, measures how far the first determines the answer
    """

    curvature: CurvatureKind = "ggn"
    damping: float | Relative = field(default_factory=lambda: Relative(1e-2))
    solver: Solver = field(default_factory=CG)
    sample: int | None = None
    seed: int = 0
    allow_unconverged: bool = False
    _operators: dict[int, tuple[Link, Shifted, Shifted | None]] = field(default_factory=dict, repr=False)

    def settings(self) -> dict[str, Any]:
        damping = self.damping
        return {
            "step": "implicit_solve",
            "curvature": self.curvature,
            "damping": {"relative": damping.factor} if isinstance(damping, Relative) else damping,
            "sample": self.sample,
            "seed": self.seed,
            "solver": self.solver.settings(),
            "allow_unconverged": self.allow_unconverged,
        }

    def operators(self, link: Link) -> tuple[Shifted, Shifted | None]:
        """Return C + diag(weight decay, 2α) + λI on the curvature sample and on the second one; made once a link."""
        if id(link) not in self._operators:
            stage = link.stage
            first, second = curvature_samples(stage.size, self.sample, self.seed)
            bare = Curvature(stage, self.curvature, first, self.seed)
            damping = self.damping
            if isinstance(damping, Relative):
                mean = Shifted(bare, link.shift).mean_eigenvalue(damping.probes, self.seed)
                if not mean > 0 and damping.factor > 0:
                    raise BadInput(
                        f"stage {stage.name!r}: the mean eigenvalue of its {self.curvature} is {mean:.3g}, so a relative "
                        "damping is undefined; give an absolute one"
                    )
                damping = damping.factor * mean
            operator = Shifted(bare, link.shift, damping)
            other = (
                Shifted(Curvature(stage, self.curvature, second, self.seed), link.shift, damping) if second else None
            )
            self._operators[id(link)] = (link, operator, other)
        return self._operators[id(link)][1:]

    def __call__(self, link: Link, cotangent: Parameters, progress: Progress | None = None) -> PulledBack:
        stage = link.stage
        operator, second = self.operators(link)
        report = None if progress is None else (lambda k, residual: progress(stage.name, k, residual))
        solution = self.solver(operator, P.select(cotangent, operator.template), second, report)
        if not self.allow_unconverged:
            solution.required(f"stage {stage.name!r}")
        y = solution.vector
        w = {n: 2 * link.alpha * y[n] for n in link.moved}
        if link.kept:
            indices, _ = curvature_samples(stage.size, self.sample, self.seed)
            w |= P.axpy(-1.0, cross_product(stage, y, link.kept, indices), P.select(cotangent, link.kept))
        return PulledBack({link.received[n]: tensor for n, tensor in w.items()}, solution)


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
    chain: Chain, cotangent: Parameters, steps: Sequence[Step], progress: Progress | None = None
) -> tuple[Parameters, dict[str, Solution]]:
    """Return v and the verdicts for a cotangent ∂q/∂(the last stage's parameters), by name; `steps[i]` is stage i's."""
    verdicts: dict[str, Solution] = {}
    for link, step in reversed(list(zip(chain.links, steps))):
        pulled = step(link, P.embedded(cotangent, link.stage.parameters), progress)
        verdicts[_unique(link.stage.name, verdicts)] = pulled.solution
        cotangent = pulled.cotangent
    return P.scaled(-1.0, pulled.solution.vector), verdicts


def query_vectors(
    chain: Chain,
    queries: Sequence[Query],
    *,
    curvature: CurvatureKind | Sequence[CurvatureKind] = "ggn",
    damping: float | Relative | Sequence[float | Relative] | None = None,
    solver: Solver | None = None,
    sample: int | None = None,
    seed: int = 0,
    allow_unconverged: bool = False,
    steps: Sequence[Step] | None = None,
    progress: Progress | None = None,
) -> QueryVectors:
    """Return the query vectors v of `queries` through `chain`, with a verdict for every solve.

    `curvature` and `damping` are one for all stages or one for each, in the chain's order. `damping` defaults to
    `Relative(1e-2)`. `sample` rows of each stage's corpus carry its curvature (a stage with fewer uses all of its own);
    None takes all rows. `steps` replaces all of this by one `Step` a stage. Raises `NotConverged` unless
    `allow_unconverged`, which is recorded.
    """
    if not queries:
        raise BadInput("there is no query; give at least one")
    if steps is None:
        count = len(chain.links)
        if sample is not None and sample > chain.stages[0].size:
            raise BadInput(
                f"the curvature sample is {sample} rows, but the corpus has {chain.stages[0].size}; give at most that"
            )
        steps = [
            ImplicitSolve(kind, lam, solver or CG(), sample and min(sample, stage.size), seed, allow_unconverged)
            for kind, lam, stage in zip(
                _each(curvature, count), _each(Relative(1e-2) if damping is None else damping, count), chain.stages
            )
        ]
    vectors, verdicts, values = [], [], []
    last = chain.stages[-1]
    for query in queries:
        values.append(query.value(last))
        v, verdict = pull_back(chain, query.gradient(last), steps, progress)
        vectors.append(v)
        verdicts.append(verdict)
    settings = {
        "stages": [
            {"name": s.name, "reduction": s.reduction, "rows": s.size, "task": s.task.settings()} for s in chain.stages
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
