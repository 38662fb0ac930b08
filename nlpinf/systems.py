"""The linear system of one link of a chain: its operator on the curvature sample and on a second one, damped, with a preconditioner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from nlpinf import damping as dampings
from nlpinf import parameters as P
from nlpinf import sharded
from nlpinf.checkpoints import Checkpoints, sketch
from nlpinf.curvature import Curvature, CurvatureKind, Shifted, curvature_samples
from nlpinf.curvature.spectrum import smallest_ritz_value
from nlpinf.damping import Auto, Damping, Relative
from nlpinf.data.corpus import examples_sha256
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.solvers import Preconditioner, Preconditioning, Solution, Solver, preconditioning
from nlpinf.stages import Link, fingerprint

CurvatureChoice = CurvatureKind | Literal["auto"]


class System:
    """C + diag(weight decay, 2α) + λI of a link on its curvature sample; what it needs is made when it is first asked for.

    `curvature` "auto" takes the exact Hessian where Lanczos and the solves find it positive definite with its damping, and the
    Gauss-Newton matrix where they do not. `damping` "auto" is chosen (`damping.py`) when the first right-hand sides are solved
    for; until then there is none. `reason` says what was chosen and why.
    """

    def __init__(
        self,
        link: Link,
        curvature: CurvatureChoice,
        damping: Damping,
        sample: int | None,
        seed: int,
        preconditioner: str | Preconditioning | None = None,
        draw: int = 0,
    ) -> None:
        self.link, self.seed, self.draw, self.asked = link, seed, draw, dampings.resolved(damping)
        self.first, self.rest = curvature_samples(link.stage.size, sample, seed, draw)
        self.preconditioning = preconditioning(preconditioner)
        self._reasons: dict[str, str] = {}
        self._curvatures: dict[tuple[CurvatureKind, bool], Curvature] = {}
        self._fallback: tuple[Shifted, Shifted | None] | None = None
        self._open: CurvatureChoice | None = None
        if isinstance(self.asked, Auto):
            self._open = curvature
            self._take("ggn" if curvature == "auto" else curvature, 0.0)
        else:
            self._settle(curvature, self.asked)

    @property
    def reason(self) -> str:
        """What was chosen, curvature and damping, and why; "" where nothing was."""
        return "; ".join(self._reasons.values())

    def _settle(self, curvature: CurvatureChoice, damping: float | Relative) -> None:
        if curvature != "auto":
            self._take(curvature, damping)
            return
        self._take("ggn", damping)
        if sharded.is_sharded(self.link.stage.model):
            self._reasons["curvature"] = "Gauss-Newton matrix: a model sharded by FSDP has no second derivatives"
            return
        ggn = (self.operator, self.second)
        self._take("hessian", self.operator.damping)
        self._fallback = ggn
        least = smallest_ritz_value(self.operator, seed=self.seed)
        if least > 0:
            self._reasons["curvature"] = (
                f"exact Hessian: positive definite with its damping (smallest Ritz value {least:.2g})"
            )
        else:
            self._fall_back(f"the damped Hessian has an eigenvalue of at most {least:.2g}")

    def _take(self, kind: CurvatureKind, damping: float | Relative) -> None:
        self.kind, bare = kind, self._curvature(kind)
        if isinstance(damping, Relative):
            undamped = Shifted(bare, self.link.shift)
            damping = damping.factor * (self._mean(undamped, damping.probes) if damping.factor else 0.0)
        self.operator = Shifted(bare, self.link.shift, damping)
        second = self._curvature(kind, second=True) if self.rest else None
        self.second = None if second is None else Shifted(second, self.link.shift, damping)
        self._preconditioner: Preconditioner | None = None
        self._fallback = None

    def _curvature(self, kind: CurvatureKind, second: bool = False) -> Curvature:
        """Return the curvature on a sample, made once, as it may keep what a frozen encoder gave."""
        rows = self.rest if second else self.first
        if (kind, second) not in self._curvatures:
            self._curvatures[kind, second] = Curvature(self.link.stage, kind, rows, self.seed)
        return self._curvatures[kind, second]

    def _mean(self, undamped: Shifted, probes: int) -> float:
        mean = undamped.mean_eigenvalue(probes, self.seed)
        if not mean > 0:
            raise BadInput(
                f"stage {self.link.stage.name!r}: the mean eigenvalue of its {self.kind} is {mean:.3g}, so a relative "
                "damping is undefined; give an absolute one"
            )
        return mean

    def _choose(self, right: Parameters, progress: Callable[[int, float], None] | None) -> None:
        """Choose the damping, if that is still open."""
        if self._open is None:
            return
        assert isinstance(self.asked, Auto)
        undamped = self.operator
        choice = self.asked.choose(
            id(self.link.stage),
            undamped,
            self.second,
            lambda: self._mean(undamped, Relative(1.0).probes),
            right,
            progress,
        )
        self._reasons["damping"] = choice.reason
        self._settle(self._open, choice.damping)
        self._open = None

    def _fall_back(self, why: str) -> None:
        assert self._fallback is not None
        (self.operator, self.second), self._fallback, self.kind = self._fallback, None, "ggn"
        self._preconditioner = None
        self._reasons["curvature"] = f"Gauss-Newton matrix: {why}"

    def solve(
        self,
        solver: Solver,
        rights: Sequence[Parameters],
        progress: Callable[[int, float], None] | None = None,
        starts: Sequence[Parameters] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> list[Solution]:
        """Return the solution for every right-hand side; a preconditioner that the solver brings itself comes first.

        `starts` are guesses of the solutions. With `checkpoints` a solve that was interrupted goes on, and one that was
        done before is not done again.
        """

        self._choose(next((right for right in rights if P.norm(right)), rights[0]), progress)

        def run(part: Any) -> list[Solution]:
            own: Any = solver
            if self.preconditioning is not None and getattr(solver, "preconditioner", False) is None:
                if self._preconditioner is None:
                    planned = getattr(self.preconditioning, "planned", None)
                    if checkpoints is not None and planned is not None:
                        checkpoints.say(f"{self.link.stage.name}: {planned(self.link.stage)}")
                    self._preconditioner = self.preconditioning.fit(self.operator)
                own = replace(own, preconditioner=self._preconditioner)
            return own.many(self.operator, rights, self.second, progress, starts, part)  # type: ignore[no-any-return]

        # Of a sharded model no process holds a whole state.
        if checkpoints is None or P.in_pieces(self.operator.template):
            solutions = run(None)
        else:
            identity = self._identity(solver, rights, starts)
            kept = checkpoints.of_solve(
                self.link.stage.name, identity, next(iter(self.operator.template.values())).device
            )
            solutions = kept.solved("solve", run)
        if self._fallback is not None and any(s.verdict == "negative curvature" for s in solutions):
            self._fall_back("a solve with the damped Hessian met negative curvature")
            return self.solve(solver, rights, progress, starts, checkpoints)
        if not self.reason:
            return solutions
        return [replace(s, note="; ".join(filter(None, (s.note, self.reason)))) for s in solutions]

    def _identity(
        self, solver: Solver, rights: Sequence[Parameters], starts: Sequence[Parameters] | None
    ) -> dict[str, Any]:
        """Return what must be the same for a solve to go on: all that its answer depends on.

        But for the number of products allowed, which a later run may raise.
        """
        stage, relative = self.link.stage, isinstance(self.asked, Relative | Auto)
        rows = {"rows": stage.rows[self.first].tolist(), "trained": list(stage.trained or ()), "shift": self.link.shift}
        return {
            "stage": stage.name,
            "weights": fingerprint(stage.parameters),
            "curvature": self.kind,
            "damping": f"relative {self.asked.factor}"
            if isinstance(self.asked, Relative)
            else dampings.described(self.asked),
            "sample": len(self.first),
            "seed": self.seed,
            "sample rows": examples_sha256([(stage.data[i],) for i in self.first]),
            "sample's numbers, decay or proximity": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
            "reduction": [stage.reduction, stage.size, stage.items if stage.reduction == "token" else None],
            "task": stage.task.settings(),
            "solver": {k: v for k, v in solver.settings().items() if k != "max_iterations"},
            "preconditioner": None if self.preconditioning is None else self.preconditioning.settings(),
            "measured": {
                **({"damping": self.operator.damping} if relative else {}),
                "right-hand sides": sketch(rights),
                "starts": sketch(starts or ()),
            },
        }
