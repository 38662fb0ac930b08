"""How many bare forward passes an exact score costs: 4-layer, 256-wide GPT-2 and BERT, 8,000 words, every parameter.

The bare pass is a no-grad forward pass with its loss, as most people write it, over the same length-sorted batches in
the same run. Ratios are medians over batches, each batch timed all ways in turn. "counted" is the bare pass with the
output layer at the counted positions alone: the fairer base for a masked model. "bare, fast" has the float32 products and
the attention of a score (`nlpinf.products`, attention unfused); "x best" is the ratio to the faster of the two bare passes.

    python benchmarks/scoring.py --queries 1 32 --json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common
from nlpinf import parameters as P
from nlpinf import products
from nlpinf.scoring.compiled import CompiledScorer
from nlpinf.scoring.forward import ForwardScorer
from nlpinf.scoring.reverse import ReverseScorer
from nlpinf.stages import Stage
from nlpinf.tasks import Batch


def bare(stage: Stage, batch: Batch) -> torch.Tensor:
    """Forward pass and loss as most people write them: logits at every place, the library's own attention."""
    labels = torch.full_like(batch.inputs["input_ids"], -100).flatten()
    labels[batch.position] = batch.targets
    with torch.no_grad():
        logits = stage.model(**batch.inputs).logits
        return F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="none")


def bare_fast(stage: Stage, batch: Batch) -> torch.Tensor:
    """The bare pass with the library for float32 products and the attention kernel that a score takes."""
    with products.fast(), sdpa_kernel(SDPBackend.MATH):
        return bare(stage, batch)


def counted(stage: Stage, batch: Batch) -> torch.Tensor:
    """Forward pass and loss with the output layer at the counted positions alone."""
    with torch.no_grad():
        return stage.task.losses(stage.task.outputs(stage.model, batch), batch)


def rank_correlation(one: Any, other: Any, batches: list[Batch]) -> float:
    """Return the least Spearman correlation of two ways' scores over the queries."""
    a, b = (torch.cat([way(batch).scores for batch in batches]).cpu() for way in (one, other))
    return round(min(float(spearmanr(x, y).statistic) for x, y in zip(a.T, b.T)), 6)


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    options.add_argument("--models", nargs="+", default=["gpt2", "bert"], choices=["gpt2", "bert"])
    options.add_argument("--size", default="small", choices=list(common.SIZES), help="4 layers 256 wide, or 12 and 768")
    options.add_argument("--queries", nargs="+", type=int, default=[1], help="numbers of queries (default 1)")
    options.add_argument("--batch-tokens", nargs="+", type=int, default=[4096], help="padded tokens of a batch")
    options.add_argument("--batches", type=int, default=12, help="time so many batches, evenly spaced (default 12)")
    options.add_argument("--forward-up-to", type=int, default=2, help="time forward mode up to so many queries")
    options.add_argument("--low", action="store_true", help="also forward and reverse mode in bfloat16, not compiled")
    options.add_argument("--compile", action="store_true", help="also the compiled scorer, in float32 and in bfloat16")
    arguments = options.parse_args()
    common.settle(arguments)
    sentences = common.texts(arguments.corpus, arguments.sentences)
    words = common.tokenizer(sentences)
    results: list[dict[str, Any]] = []
    lines = [
        "model  queries  tokens  way                 ratio  (quartiles)     x best  sentences/s  Spearman to float32"
    ]
    for kind in arguments.models:
        for tokens in arguments.batch_tokens:
            stage = common.stage(kind, sentences, words, arguments.size, batch_tokens=tokens, batch_size=1 << 20)
            stage.model.eval()
            every = list(stage.batches())
            step = max(1, len(every) // arguments.batches)
            batches = every[step // 2 :: step]
            vectors = [P.random_like(stage.theta, seed) for seed in range(max(arguments.queries))]
            for queries in arguments.queries:
                ways: dict[str, Any] = {
                    "bare": lambda b, s=stage: bare(s, b),
                    "bare, fast": lambda b, s=stage: bare_fast(s, b),
                    "counted": lambda b, s=stage: counted(s, b),
                }
                if queries <= arguments.forward_up_to:
                    ways["forward"] = ForwardScorer(stage, vectors[:queries])
                ways["reverse"] = reverse = ReverseScorer(stage, vectors[:queries])
                if arguments.low:
                    low = stage.at("bfloat16")
                    if queries <= arguments.forward_up_to:
                        ways["forward, bfloat16"] = ForwardScorer(low, vectors[:queries])
                    ways["reverse, bfloat16"] = ReverseScorer(low, vectors[:queries])
                if arguments.compile:
                    ways["compiled"] = CompiledScorer(reverse)
                    ways["compiled, bfloat16"] = CompiledScorer(ReverseScorer(stage.at("bfloat16"), vectors[:queries]))
                    for way in ("compiled", "compiled, bfloat16"):  # shapes are compiled when they first come
                        ways[way](batches[0]), ways[way](batches[-1])
                seconds = common.interleaved(ways, batches, arguments.clock)
                done = sum(len(batch) for batch in batches)
                best = min(("bare", "bare, fast"), key=lambda way: sum(seconds[way]))
                for way in ways:
                    found = common.ratio(seconds, way, "bare")
                    if way.endswith("bfloat16"):
                        found["spearman"] = rank_correlation(reverse, ways[way], batches)
                    to_best = common.ratio(seconds, way, best)
                    rate = round(done / sum(seconds[way]), 1)
                    results.append(
                        {
                            "model": kind,
                            "queries": queries,
                            "batch_tokens": tokens,
                            "way": way,
                            "ratio": found,
                            "ratio_to_best": to_best,
                            "ratio_to_counted": common.ratio(seconds, way, "counted"),
                            "sentences_per_second": rate,
                        }
                    )
                    spread = f"({found['low']:.2f} to {found['high']:.2f})"
                    lines.append(
                        f"{kind:6} {queries:7} {tokens:7}  {way:18} {found['median']:6.2f}  {spread}  {to_best['median']:6.2f}  {rate:8.0f}  {found.get('spearman', '')}"
                    )
                    print(lines[-1], file=sys.stderr)
    corpus = arguments.corpus.name if arguments.corpus else "generated"
    settings = {
        "size": arguments.size,
        "sentences": len(sentences),
        "corpus": corpus,
        "clock": arguments.clock,
        "heap": arguments.heap,
    }
    record = {"benchmark": "scoring", **settings, "results": results, "machine": common.machine(arguments.threads)}
    common.show(record, arguments.json, lines)


if __name__ == "__main__":
    main()
