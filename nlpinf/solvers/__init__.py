"""Linear solvers on curvature operators; each returns a `Solution`, never a bare vector."""

from nlpinf.solvers.base import Preconditioner, Solution, Solver, Verdict, finished
from nlpinf.solvers.cg import CG
from nlpinf.solvers.direct import Direct
from nlpinf.solvers.lissa import LiSSA
from nlpinf.solvers.minres import MINRES
from nlpinf.solvers.preconditioners import (
    EKFACPreconditioning,
    LimitedMemory,
    Nystrom,
    Preconditioning,
    preconditioning,
)
from nlpinf.solvers.refined import Refined

__all__ = [
    "CG",
    "MINRES",
    "Direct",
    "EKFACPreconditioning",
    "LiSSA",
    "LimitedMemory",
    "Nystrom",
    "Preconditioner",
    "Preconditioning",
    "Refined",
    "Solution",
    "Solver",
    "Verdict",
    "finished",
    "preconditioning",
]
