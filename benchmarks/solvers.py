"""Products and seconds that each solver needs to relative residuals of 1e-1, 1e-2 and 1e-3, on real stages.

    pretrain, finetune   the two stages of a finished `nlpinf demo` (--demo FOLDER): BERT, 2 layers, and its classifier
    gpt2      the 4-layer, 256-wide GPT-2 of the other benchmarks, random weights
    elmo      a small ELMo language model, random weights

Right-hand sides are gradients of single rows outside the curvature sample; figures are medians over them. Dampings are
multiples of the mean eigenvalue of the Gauss-Newton matrix on the sample. A product is one pass over the sample, of a block
one for each of its members; seconds are those of all that a solve does, for a product. What a preconditioner costs to make,
once for all queries, stands beside it ("fit"). "–": not within --most products, or not within the solver's means; "end" is the
residual where the solve ended. With --truth PRODUCTS a long solve tells the answers' errors too: "scores" is the relative error, over
50 other rows z, of the scores ⟨x, ∇g(z)⟩ where each solve ended.

    python benchmarks/solvers.py --stages pretrain finetune --demo demo --sample 256 --json
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import common
from nlpinf import parameters as P
from nlpinf import processes
from nlpinf.adapters.elmo import ElmoConfig, ElmoLM, Vocabulary
from nlpinf.curvature import Curvature, Shifted, curvature_samples
from nlpinf.data.corpus import Corpus
from nlpinf.parameters import Parameters
from nlpinf.solvers import CG, MINRES, Direct, LiSSA, Refined, Solution, preconditioning
from nlpinf.solvers.base import Preconditioner
from nlpinf.stages import Stage
from nlpinf.tasks import BidirectionalLM

STAGES = ("pretrain", "finetune", "gpt2", "elmo")
LEVELS = (1e-1, 1e-2, 1e-3)
WAYS = (
    *(("cg", p) for p in ("none", "diagonal", "ekfac", "nystrom", "ekfac+nystrom", "spectral")),
    *(("block", p) for p in ("none", "ekfac+nystrom")), ("refined", "none"),
    ("minres", "none"), ("minres", "nystrom"), ("minres", "ekfac+nystrom"),
    ("lissa", "none"), ("lissa", "ekfac"), ("direct", "ekfac"),
)  # fmt: skip


class Solve:
    """Solves for several right-hand sides and keeps at which product each residual level was reached."""

    def __init__(self, solver: str, most: int, inverse: Preconditioner | None) -> None:
        makers: dict[str, Any] = {"lissa": LiSSA, "minres": MINRES}
        self.kind = solver
        if solver == "direct":
            self.solver: Any = Direct(min(LEVELS), inverse)
        else:
            self.solver = makers.get(solver, CG)(min(LEVELS), most, inverse)
        if solver == "refined":
            self.solver = Refined(self.solver)

    def __call__(self, operator: Shifted, rights: list[Parameters]) -> tuple[list[list[int | None]], list[Solution]]:
        if self.kind == "block":
            solutions = self.solver.many(operator, rights)
            return [self._levels(list(enumerate(s.history, 1))) for s in solutions], solutions
        found: list[list[int | None]] = []
        solutions: list[Solution] = []
        for right in rights:
            if sum(levels[0] is None for levels in found) > len(rights) // 2:
                break  # the medians are settled
            told: list[tuple[int, float]] = []
            solutions.append(self.solver(operator, right, None, lambda k, r, told=told: told.append((k, r))))
            if self.kind == "direct":
                told = [(0, solutions[-1].residual)]
            if self.kind == "refined":  # its history is of all rounds
                told = list(enumerate(solutions[-1].history, 1))
            found.append(self._levels(told))
        return [*found, *[[None] * len(LEVELS)] * (len(rights) - len(found))], solutions

    @staticmethod
    def _levels(told: list[tuple[int, float]]) -> list[int | None]:
        return [next((k for k, r in told if r <= level), None) for level in LEVELS]


def stages(kind: str, arguments: Any) -> list[Stage]:
    """Return the stages of one kind."""
    if kind in ("pretrain", "finetune"):
        size, tokens = (256, 8192) if processes.device().type == "cpu" else (2048, 65536)
        return [Stage.from_run(arguments.demo / kind, batch_size=size, batch_tokens=tokens)]
    texts = common.texts(arguments.corpus, arguments.sentences)
    if kind == "gpt2":
        return [common.stage("gpt2", texts, common.tokenizer(texts), name="gpt2")]
    torch.manual_seed(0)
    words = [text.split() for text in texts]
    known = list(dict.fromkeys(w for line in words for w in line))[:1000]
    config = ElmoConfig(
        character_dim=8, filters=((1, 16), (2, 16), (3, 32)), highways=1, lstm_dim=128, projection_dim=32, dropout=0.0
    )
    vocabulary = Vocabulary(["<S>", "</S>", "<UNK>", *known])
    model = ElmoLM(config, len(vocabulary)).to(processes.device())
    return [Stage(model, BidirectionalLM(vocabulary, 32), Corpus(texts), name="elmo")]


def truths(
    operator: Shifted, rights: list[Parameters], products: int, stage: Stage, rows: list[int]
) -> Callable[[int, Solution], float] | None:
    """Return a function that gives the relative error of an answer's scores of `rows`, by one long solve for each right-hand side."""
    if not products:
        return None
    gradients = [stage.gradient(indices=[i], decay=False) for i in rows]
    made = preconditioning("nystrom")
    solver = CG(1e-6, products, None if made is None else made.fit(operator))
    answers = [solver(operator, right) for right in rights]
    print(f"truth: residuals {[round(a.residual, 7) for a in answers]}", file=sys.stderr)

    def scores(x: Parameters) -> torch.Tensor:
        return torch.tensor([P.dot(x, g) for g in gradients])

    right = [scores(a.vector) for a in answers]
    return lambda i, solution: float((scores(solution.vector) - right[i]).norm() / right[i].norm())


def middle(values: list[int | None]) -> float | None:
    """Return the median, None where half of them never got there."""
    value = statistics.median([float("inf") if v is None else v for v in values])
    return None if value == float("inf") else value


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    options.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    options.add_argument("--demo", type=Path, default=Path("demo"), help="folder of a finished demo (default demo)")
    options.add_argument("--sample", type=int, default=256, help="rows of the curvature sample (default 256)")
    options.add_argument("--queries", type=int, default=5, help="right-hand sides (default 5)")
    options.add_argument("--factors", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3], help="dampings, x mean")
    options.add_argument("--most", type=int, default=300, help="products of a solve at most (default 300)")
    options.add_argument(
        "--truth", type=int, default=0, help="products of a long solve that the answers are held against"
    )
    names = [f"{solver}:{preconditioner}" for solver, preconditioner in WAYS]
    options.add_argument("--ways", nargs="+", default=names, choices=names, help="solver:preconditioner (all)")
    arguments = options.parse_args()
    common.settle(arguments)
    clock = common.CLOCKS[arguments.clock]
    results: list[dict[str, Any]] = []
    lines = [
        "stage     damping  solver   preconditioner  products to 1e-1, 1e-2, 1e-3      end   scores  s/product  fit s  fit products"
    ]
    for stage in [s for kind in arguments.stages for s in stages(kind, arguments)]:
        sample, second = curvature_samples(stage.size, min(arguments.sample, stage.size // 2), 0)
        rights = [stage.gradient(indices=[i], decay=False) for i in second[: arguments.queries]]
        bare = Curvature(stage, "ggn", sample)
        mean = Shifted(bare, stage.decay).mean_eigenvalue()
        for factor in arguments.factors:
            operator = Shifted(bare, stage.decay, factor * mean)
            fits: dict[str, tuple[Any, float, int]] = {}
            true = truths(operator, rights, arguments.truth, stage, second[arguments.queries :][:50])
            for solver, name in (way.split(":") for way in arguments.ways):
                if name not in fits or name == "spectral":
                    before, start = operator.products, clock()
                    made = preconditioning(name)
                    inverse = None if made is None else made.fit(operator)
                    fits[name] = inverse, clock() - start, operator.products - before
                inverse, fit, fit_products = fits[name]
                before, start = operator.products, clock()
                levels, solved = Solve(solver, arguments.most, inverse)(operator, rights)
                spent = max(1, sum(s.products for s in solved))
                seconds = (clock() - start) / spent
                products = [middle(list(column)) for column in zip(*levels)]
                end = statistics.median(s.residual for s in solved)
                error = None if true is None else statistics.median(map(true, range(len(solved)), solved))
                results.append(
                    {
                        "stage": stage.name, "damping": factor, "solver": solver, "preconditioner": name,
                        "products": products, "end": end, "scores": error, "seconds_per_product": round(seconds, 4),
                        "fit_seconds": round(fit, 2), "fit_products": fit_products, "products_for_all": spent,
                    }
                )  # fmt: skip
                shown = "  ".join("–".rjust(5) if p is None else f"{p:5.0f}" for p in products)
                lines.append(
                    f"{stage.name:9} {factor:7g}  {solver:7}  {name:14} {shown:>25}  {end:7.1e}  {error or math.nan:7.1e}  {seconds:9.3f}  {fit:5.1f}  {fit_products:5}"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    settings = {"sample": arguments.sample, "queries": arguments.queries, "most": arguments.most}
    record = {"benchmark": "solvers", **settings, "results": results, "machine": common.machine(arguments.threads)}
    common.show(record, arguments.json, lines)


if __name__ == "__main__":
    main()
