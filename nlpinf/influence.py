"""Pulls a query back through a chain of stages: one vector in the pretraining parameters, ⟨v, g'(z)⟩ being z's score.

With `W` what a stage received, `Θ` what it added, F its objective and (q_W, q_Θ) the gradient of the query:

    case 1 (frozen)     y = F_ΘΘ⁻¹ q_Θ                               w = q_W − F_WΘ y
    case 2 (proximity)  (y_W, y_Θ) = (F'' + 2α I_W)⁻¹ (q_W, q_Θ)      w = 2α y_W
    pretraining         s = G''⁻¹ (w, 0)                             v = −s         score(z) = ⟨v, g'(z)⟩

A stage may keep some of what it received and move the rest; `ImplicitSolve` is written for that, and both cases are its
ends. Source: Chen et al., Multi-Stage Influence Function, NeurIPS 2020; positive = harmful.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nlpinf import parameters as P
from nlpinf.checkpoints import Checkpoints
from nlpinf.curvature import cross_product, curvature_samples
from nlpinf.damping import Damping, described, resolved
from nlpinf.data.corpus import examples_sha256
from nlpinf.errors import BadInput
from nlpinf.growing import Growing, Pulled, grow
from nlpinf.parameters import Parameters
from nlpinf.queries import Query
from nlpinf.solvers import CG, Preconditioning, Solution, Solver, preconditioning
from nlpinf.spread import mean_and_errors
from nlpinf.stages import Chain, Link, Stage
from nlpinf.systems import CurvatureChoice, System

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
    `damping`    λ, absolute or `Relative`, or "auto" (`Auto`), chosen when the first cotangent is there
    `sample`     rows of the stage's corpus that the operator averages over; None for all. A second sample of as many
                 other rows, if there are any, measures how far the first determines the answer
    `preconditioner`  "none", "diagonal", "ekfac", "nystrom", "ekfac+nystrom", "spectral", or a `Preconditioning`
    `draw`       which of the disjoint samples of this seed and size
    `starts`     guesses of the solutions, by the stage's name
    `checkpoints`  where the solve keeps its state, to go on after an interruption
    """

    curvature: CurvatureChoice = "ggn"
    damping: Damping = "auto"
    solver: Solver = field(default_factory=CG)
    sample: int | None = None
    seed: int = 0
    allow_unconverged: bool = False
    preconditioner: str | Preconditioning | None = None
    draw: int = 0
    starts: Mapping[str, Sequence[Parameters]] = field(default_factory=dict, repr=False)
    checkpoints: Checkpoints | None = field(default=None, repr=False)
    _systems: dict[int, tuple[Link, System]] = field(default_factory=dict, repr=False)

    def settings(self) -> dict[str, Any]:
        made = preconditioning(self.preconditioner)
        chosen = {system.link.stage.name: system.reason for _, system in self._systems.values() if system.reason}
        return {
            "step": "implicit_solve",
            "curvature": self.curvature,
            "damping": described(self.damping),
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
            settings = (self.curvature, self.damping, self.sample, self.seed, self.preconditioner, self.draw)
            self._systems[id(link)] = (link, System(link, *settings))
        return self._systems[id(link)][1]

    def __call__(
        self, link: Link, cotangents: Sequence[Parameters], progress: Progress | None = None
    ) -> list[PulledBack]:
        stage, system = link.stage, self.system(link)
        report = None if progress is None else (lambda k, residual: progress(stage.name, k, residual))
        rights = [P.select(cotangent, system.operator.template) for cotangent in cotangents]
        pulled = []
        starts = self.starts.get(stage.name)
        solutions = system.solve(self.solver, rights, report, starts, self.checkpoints)
        for cotangent, solution in zip(cotangents, solutions):
            if not self.allow_unconverged:
                solution.required(f"stage {stage.name!r}")
            pulled.append(PulledBack(passed_back(link, cotangent, solution.vector, system.first), solution))
        return pulled


@dataclass(frozen=True)
class QueryVectors:
    """v of every query: `vectors[i]` by the trained parameters of the pretraining `stage`, in its dtype.

    `verdicts[i]` are the ends of the solves that made it, by stage, the last stage first.
    `values[i]` is q itself. `settings` tell how it was made.
    `errors[i]` are the vectors e with se(z)² = Σ ⟨e, g'(z)⟩² for the standard error of its scores, where error bars were
    asked for (`spread.py`); else there are none.
    """

    stage: Stage
    queries: tuple[Query, ...]
    vectors: tuple[Parameters, ...]
    verdicts: tuple[dict[str, Solution], ...]
    values: tuple[float, ...]
    settings: dict[str, Any]
    errors: tuple[tuple[Parameters, ...], ...] = ()

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
    damping: Damping | Sequence[Damping] | None = None,
    solver: Solver | None = None,
    sample: int | Growing | Sequence[int | None] | None = None,
    error_bars: int | None = None,
    seed: int = 0,
    allow_unconverged: bool = False,
    preconditioner: str | Preconditioning | None = None,
    steps: Sequence[Step] | None = None,
    checkpoint: str | Path | Checkpoints | None = None,
    progress: Progress | None = None,
) -> QueryVectors:
    """Return the query vectors v of `queries` through `chain`, with a verdict for every solve.

    `curvature`, `damping` and `sample` are one for all stages or one for each, in the chain's order. `damping` defaults
    to "auto", the smallest that the sample determines (`damping.py`). `sample` rows of a stage's corpus carry its curvature; None takes all of them, and of one number
    for all stages a smaller corpus takes all of its own. `Growing()` enlarges it until the order of the scores no longer
    changes. With `error_bars` K each v is the mean over K disjoint samples, and its scores have standard errors
    (`spread.py`); a stage whose corpus is too small for K samples takes all of it.

    `checkpoint` is a folder for the states of the solves: the same call goes on after an interruption, to the same
    vectors; another one is refused. Its owner removes it. `steps` replaces all of this by one `Step` a stage. Raises
    `NotConverged` unless `allow_unconverged`, which is recorded.
    """
    if not queries:
        raise BadInput("there is no query; give at least one")
    count, last = len(chain.links), chain.stages[-1]
    kinds, dampings = _each(curvature, count), [resolved(d) for d in _each(damping, count)]
    checkpoints = Checkpoints.of(checkpoint)
    if checkpoints is not None:
        checkpoints.about = {"queries": examples_sha256([(q.kind, q.name, q.examples) for q in queries])}
    repeats = _repeats(chain, sample, error_bars, steps is not None)
    if steps is None and not isinstance(sample, Growing):
        for n, stage in zip(_rows(chain, sample, repeats), chain.stages):
            curvature_samples(stage.size, n, seed)  # refuses more rows than there are, before the first solve
    values = [query.value(last) for query in queries]
    cotangents = [query.gradient(last) for query in queries]
    made: Sequence[Step] = steps or []

    def pulled(rows: Sequence[int | None], draw: int = 0, before: list[dict[str, Solution]] | None = None) -> Pulled:
        nonlocal made
        told_apart = before and len({stage.name for stage in chain.stages}) == count
        starts = {name: [v[name].vector for v in before] for name in before[0]} if before and told_apart else {}
        made = steps or [
            ImplicitSolve(
                kind, lam, solver or CG(), n, seed, allow_unconverged, preconditioner, draw if n else 0, starts, checkpoints
            )
            for kind, lam, n in zip(kinds, dampings, rows)
        ]  # fmt: skip
        return pull_back(chain, cotangents, made, progress)

    errors: tuple[tuple[Parameters, ...], ...] = ()
    more: dict[str, Any] = {}
    if isinstance(sample, Growing):
        (vectors, verdicts), more["growth"] = grow(
            sample, chain.stages[0], seed, lambda n, before: pulled(_rows(chain, n, 1), 0, before)
        )
    elif repeats > 1:
        rows = _rows(chain, sample, repeats)
        sizes = {s.name: n for s, n in zip(chain.stages, rows) if n is not None}
        unseen = max(1 - repeats * n / s.size for s, n in zip(chain.stages, rows) if n is not None)
        draws = [pulled(rows, 0)]
        for draw in range(1, repeats):
            draws.append(pulled(rows, draw, draws[-1][1]))
        pairs = [mean_and_errors([d[0][q] for d in draws], unseen) for q in range(len(queries))]
        vectors, errors = [mean for mean, _ in pairs], tuple(error for _, error in pairs)
        verdicts = [
            {f"{name}, sample {k}": end for k, d in enumerate(draws, 1) for name, end in d[1][q].items()}
            for q in range(len(queries))
        ]
        more["error_bars"] = {"samples": repeats, "rows": sizes, "unseen": unseen}
    else:
        vectors, verdicts = pulled(_rows(chain, sample, 1) if steps is None else [])
    if any(truncated := [query.truncated(last) for query in queries]):
        more["truncated"] = truncated
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
        "steps": [step.settings() for step in made],
        "sign": "positive = harmful",
        **more,
    }
    return QueryVectors(
        chain.stages[0], tuple(queries), tuple(vectors), tuple(verdicts), tuple(values), settings, errors
    )


def _rows(chain: Chain, sample: Any, repeats: int) -> list[int | None]:
    """Return the rows of each stage's curvature sample; of one number for all, a stage that lacks them takes all it has."""
    first = chain.stages[0].size
    if not isinstance(sample, int) or sample * repeats > first:
        return _each(sample, len(chain.links))
    if repeats == 1:
        return [min(sample, stage.size) for stage in chain.stages]
    return [sample if sample * repeats <= stage.size else None for stage in chain.stages]


def _repeats(chain: Chain, sample: Any, error_bars: int | None, own_steps: bool) -> int:
    """Return over how many samples v is the mean."""
    if own_steps and isinstance(sample, Growing):
        raise BadInput("a sample that grows was given beside steps, which have their own samples; give one of them")
    if error_bars is None:
        return 1
    if own_steps or isinstance(sample, Growing):
        raise BadInput(
            "error bars come from samples of a fixed size; let it grow first, then give the size that it reached"
        )
    if error_bars < 2:
        raise BadInput(f"error bars from {error_bars} samples were asked for; at least 2 are needed")
    rows = _rows(chain, sample, error_bars)
    if all(n is None for n in rows):
        raise BadInput("error bars need a sample: where all rows carry the curvature, none are left to vary")
    for n, stage in zip(rows, chain.stages):
        if n is not None and n * error_bars > stage.size:
            raise BadInput(
                f"{error_bars} disjoint samples of {n} rows were asked for, but the corpus of stage {stage.name!r} has "
                f"{stage.size}; give "
                + (f"a sample of at most {most}" if (most := stage.size // error_bars) else "fewer error bars")
            )
    return error_bars


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
