"""Linear solvers on curvature operators; each returns a `Solution`, never a bare vector."""

from nlpinf.solvers.base import Preconditioner, Solution, Solver, Verdict, finished
from nlpinf.solvers.cg import CG

__all__ = ["CG", "Preconditioner", "Solution", "Solver", "Verdict", "finished"]
