"""Products and seconds that each solver needs to relative residuals of 1e-1, 1e-2 and 1e-3, on real stages.

    demo      the two stages of a finished `nlpinf demo` (--demo FOLDER): BERT, 2 layers, and its classifier
    gpt2      the 4-layer, 256-wide GPT-2 of the other benchmarks, random weights
    elmo      a small ELMo language model, random weights

Right-hand sides are gradients of single rows outside the curvature sample; figures are medians over them. Dampings are
multiples of the mean eigenvalue of the Gauss-Newton matrix on the sample. A product is one pass over the sample; what a
preconditioner costs to make, once for all queries, stands beside it ("fit"). "–": not within --most products.

    python benchmarks/solvers.py --stages demo --demo demo --sample 256 --json
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import common
from nlpinf.adapters.elmo import ElmoConfig, ElmoLM, Vocabulary
from nlpinf.curvature import Curvature, Shifted, curvature_samples
from nlpinf.data.corpus import Corpus
from nlpinf.solvers import CG, MINRES, LiSSA, Solution, preconditioning
from nlpinf.stages import Stage
from nlpinf.tasks import BidirectionalLM

LEVELS = (1e-1, 1e-2, 1e-3)
PRECONDITIONERS = ("none", "diagonal", "ekfac", "nystrom", "ekfac+nystrom")


def stages(kind: str, arguments: Any) -> list[Stage]:
    """Return the stages of one kind."""
    if kind == "demo":
        return [
            Stage.from_run(arguments.demo / name, batch_size=256, batch_tokens=8192)
            for name in ("pretrain", "finetune")
        ]
    texts = common.texts(arguments.corpus, arguments.sentences)
    if kind == "gpt2":
        return [common.stage("gpt2", texts, common.tokenizer(texts))]
    torch.manual_seed(0)
    words = [text.split() for text in texts]
    known = list(dict.fromkeys(w for line in words for w in line))[:1000]
    config = ElmoConfig(
        character_dim=8, filters=((1, 16), (2, 16), (3, 32)), highways=1, lstm_dim=128, projection_dim=32, dropout=0.0
    )
    vocabulary = Vocabulary(["<S>", "</S>", "<UNK>", *known])
    return [Stage(ElmoLM(config, len(vocabulary)), BidirectionalLM(vocabulary, 32), Corpus(texts), name="elmo")]


def reached(solution: Solution) -> list[int | None]:
    """Return at which product the solver's residual reached each level."""
    return [next((k + 1 for k, r in enumerate(solution.history) if r <= level), None) for level in LEVELS]


def middle(values: list[int | None]) -> float | None:
    """Return the median, None where half of them never got there."""
    value = statistics.median([float("inf") if v is None else v for v in values])
    return None if value == float("inf") else value


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    options.add_argument("--stages", nargs="+", default=["demo", "gpt2", "elmo"], choices=["demo", "gpt2", "elmo"])
    options.add_argument("--demo", type=Path, default=Path("demo"), help="folder of a finished demo (default demo)")
    options.add_argument("--sample", type=int, default=256, help="rows of the curvature sample (default 256)")
    options.add_argument("--queries", type=int, default=5, help="right-hand sides (default 5)")
    options.add_argument("--factors", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3], help="dampings, x mean")
    options.add_argument("--most", type=int, default=300, help="products of a solve at most (default 300)")
    options.add_argument("--solvers", nargs="+", default=["cg", "block", "lissa", "minres"])
    options.add_argument("--preconditioners", nargs="+", default=list(PRECONDITIONERS), choices=PRECONDITIONERS)
    arguments = options.parse_args()
    common.settle(arguments)
    makers: dict[str, Any] = {"cg": CG, "block": CG, "lissa": LiSSA, "minres": MINRES}
    results: list[dict[str, Any]] = []
    lines = [
        "stage     damping  solver  preconditioner    products to 1e-1, 1e-2, 1e-3    s/product  fit s  fit products"
    ]
    for stage in [s for kind in arguments.stages for s in stages(kind, arguments)]:
        sample, second = curvature_samples(stage.size, min(arguments.sample, stage.size // 2), 0)
        rights = [stage.gradient(indices=[i], decay=False) for i in second[: arguments.queries]]
        bare = Curvature(stage, "ggn", sample)
        mean = Shifted(bare, stage.decay).mean_eigenvalue()
        for factor in arguments.factors:
            operator = Shifted(bare, stage.decay, factor * mean)
            for name in arguments.preconditioners:
                before, start = operator.products, time.perf_counter()
                made = preconditioning(name)
                inverse = None if made is None else made.fit(operator)
                fit, fit_products = time.perf_counter() - start, operator.products - before
                for solver in arguments.solvers:
                    own = makers[solver](min(LEVELS), arguments.most, preconditioner=inverse)
                    before, start = operator.products, time.perf_counter()
                    solved = own.many(operator, rights) if solver == "block" else [own(operator, b) for b in rights]
                    seconds = (time.perf_counter() - start) / max(1, operator.products - before)
                    products = [middle(list(column)) for column in zip(*map(reached, solved))]
                    results.append(
                        {
                            "stage": stage.name, "damping": factor, "solver": solver, "preconditioner": name,
                            "products": products, "seconds_per_product": round(seconds, 3), "fit_seconds": round(fit, 2),
                            "fit_products": fit_products, "products_for_all": operator.products - before,
                        }
                    )  # fmt: skip
                    shown = "  ".join("–".rjust(5) if p is None else f"{p:5.0f}" for p in products)
                    lines.append(
                        f"{stage.name:9} {factor:7g}  {solver:6}  {name:16} {shown:>30}  {seconds:9.3f}  {fit:5.1f}  {fit_products:5}"
                    )
                    print(lines[-1], file=sys.stderr, flush=True)
    settings = {"sample": arguments.sample, "queries": arguments.queries, "most": arguments.most}
    record = {"benchmark": "solvers", **settings, "results": results, "machine": common.machine(arguments.threads)}
    common.show(record, arguments.json, lines)


if __name__ == "__main__":
    main()
