"""Choices of the inverse-HVP engine, each beside what it replaces, on the 4-layer GPT-2 of the other benchmarks.

compile   a Gauss-Newton product as one graph of `torch.compile` beside the product as it is
bfloat16  a solve with refined products in bfloat16 beside the solve in float32, to the same residual
block     block CG on many right-hand sides beside as many solves one by one (the median of four stands for each)
ekfac     the fit of EK-FAC on 1,000 rows beside a bare forward pass with its loss over the same batches
memory    peak memory of a product above the loaded model, by batch size, each in a process of its own

python benchmarks/engine.py --parts bfloat16 block ekfac memory --json
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common
from benchmarks.scoring import bare
from nlpinf import parameters as P
from nlpinf.adapters.heads import HeadSettings, TextClassifier
from nlpinf.curvature import Curvature, Shifted, curvature_samples
from nlpinf.curvature.ekfac import EKFAC
from nlpinf.parameters import Parameters
from nlpinf.solvers import CG, Refined
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import SequenceClassification

PARTS = ("compile", "bfloat16", "block", "frozen", "ekfac", "memory")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result."""
    start = common.wall()
    result = run()
    return common.wall() - start, result


def system(stage: Stage, arguments: Any) -> tuple[Shifted, list[Parameters]]:
    """Return the damped Gauss-Newton matrix of a sample, and gradients of single rows outside it."""
    sample, second = curvature_samples(stage.size, arguments.sample, 0)
    base = Curvature(stage, "ggn", sample)
    mean = Shifted(base, stage.decay).mean_eigenvalue()
    rights = [stage.gradient(indices=[i], decay=False) for i in second[: arguments.rights]]
    return Shifted(base, stage.decay, arguments.factor * mean), rights


def compiled(stage: Stage, arguments: Any) -> dict[str, Any]:
    """Products of one vector, eager and compiled, in turn."""
    base = Curvature(stage, "ggn", list(range(arguments.sample)))
    vector = P.random_like(stage.theta, 0)

    def product(theta: Parameters, inputs: Parameters, position: Any, weights: Any) -> Parameters:
        def outputs(parameters: Parameters) -> torch.Tensor:
            return functional_call(stage.model, parameters, (), inputs).logits.flatten(0, 1)[position]

        out, moved = jvp(outputs, (theta,), (vector,))
        share = out.softmax(-1)
        inner = share * (moved - (share * moved).sum(-1, keepdim=True)) * weights[:, None]
        return vjp(outputs, theta)[1](inner)[0]

    graph = torch.compile(product, dynamic=True)

    def whole() -> Parameters:
        total = P.sums_like(stage.theta)
        with evaluation(stage.model), sdpa_kernel(SDPBackend.MATH):  # dual tensors have no fused attention
            for batch, _ in base.batches:
                found = graph(dict(stage.parameters), batch.inputs, batch.position, stage.item_weights(batch))
                total = {name: value + found[name] for name, value in total.items()}
        return {name: value / arguments.sample for name, value in total.items()}

    first, found = timed(whole)
    truth = base.product(vector)
    apart = max(float((found[n] - truth[n]).norm() / truth[n].norm()) for n in truth)
    pairs = [(timed(whole)[0], timed(lambda: base.product(vector))[0]) for _ in range(arguments.rounds)]
    return {
        "seconds of the first": round(first, 1),
        "largest relative difference": apart,
        "compiled / eager": round(statistics.median(a / b for a, b in pairs), 3),
    }


def low(stage: Stage, arguments: Any) -> dict[str, Any]:
    """Solves to the same float32 residual."""
    operator, rights = system(stage, arguments)
    solver = CG(arguments.tolerance, 1000)
    ratios, counts = [], []
    for b in rights[: arguments.rounds]:
        plain, one = timed(lambda b=b: solver(operator, b))  # type: ignore[misc]
        refined, other = timed(lambda b=b: Refined(solver)(operator, b))  # type: ignore[misc]
        ratios.append(refined / plain)
        counts.append((one.products, other.products, round(one.residual, 5), round(other.residual, 5), other.note))
    return {"refined / float32, seconds": round(statistics.median(ratios), 3), "products and residuals": counts}


def block(stage: Stage, arguments: Any) -> dict[str, Any]:
    """Many right-hand sides at once and one by one."""
    operator, rights = system(stage, arguments)
    solver = CG(arguments.tolerance, 1000)
    together, solved = timed(lambda: solver.many(operator, rights))
    alone = [timed(lambda b=b: solver(operator, b)) for b in rights[:4]]  # type: ignore[misc]
    single = statistics.median(seconds for seconds, _ in alone)
    return {
        "right-hand sides": len(rights),
        "block / one by one, seconds": round(together / (single * len(rights)), 3),
        "products of a block's member": statistics.median(s.products for s in solved),
        "products alone": statistics.median(s.products for _, s in alone),
    }


def frozen(stage: Stage, arguments: Any) -> dict[str, Any]:
    """Products after the first, and all anew."""
    bert = common.stage("bert", list(stage.data[:16]), stage.task.tokenizer).model
    model = TextClassifier.on(bert, HeadSettings())
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(stage.data[: 8 * arguments.sample])]
    task = SequenceClassification(stage.task.tokenizer, common.LENGTH)
    trained = [name for name, _ in model.named_parameters() if name.startswith("head.")]
    classifier = Stage(model, task, rows, trained=trained, batch_size=64, batch_tokens=4096)
    kept, anew = Curvature(classifier, "ggn"), Curvature(classifier, "ggn", keep=0)
    vector = P.random_like(classifier.theta, 0)
    first, _ = timed(lambda: kept @ vector)
    pairs = [(timed(lambda: kept @ vector)[0], timed(lambda: anew @ vector)[0]) for _ in range(arguments.rounds)]
    return {
        "rows": len(rows),
        "the first, seconds": round(first, 2),
        "kept, seconds": round(statistics.median(a for a, _ in pairs), 4),
        "anew, seconds": round(statistics.median(b for _, b in pairs), 3),
    }


def ekfac(stage: Stage, arguments: Any) -> dict[str, Any]:
    """The fit of every parameter."""
    rows = list(range(1000))
    batches = [batch for batch, _ in Curvature(stage, "ggn", rows).batches]
    forward = min(timed(lambda: [bare(stage, batch) for batch in batches])[0] for _ in range(2))
    seconds, fitted = timed(lambda: EKFAC.fit(stage, rows))
    return {
        "seconds": round(seconds, 1),
        "bare forward seconds": round(forward, 2),
        "fit / bare forward": round(seconds / forward, 2),
        "parameters": sum(t.numel() for t in fitted.template.values()),
    }


def peak(queue: Any, kind: str, arguments: Any, rows: int) -> None:
    """Put the peak memory of one product above the loaded model, in MiB (a process of its own)."""
    common.settle(arguments)
    sentences = common.texts(arguments.corpus, arguments.sentences)
    sentences = sorted(sentences, key=len)[len(sentences) // 2 :][:64]
    words = common.tokenizer(sentences)
    stage = common.stage(kind, sentences, words, arguments.size, batch_size=rows, batch_tokens=1 << 30)
    base = Curvature(stage, "ggn", list(range(64)))
    vector = P.random_like(stage.theta, 0)
    if stage.device.type == "cuda":
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        base.product(vector)
        queue.put(torch.cuda.max_memory_allocated() / 2**20 - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten (Linux)
    before = resident("VmRSS")
    base.product(vector)
    queue.put(resident("VmHWM") - before)


def resident(what: str) -> float:
    """Return a figure of this process's memory, MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what + ":")) / 1024


def memory(kind: str, stage: Stage, arguments: Any) -> dict[str, Any]:
    """Peaks by batch size."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"parameters, MiB": round(sum(t.numel() * 4 for t in stage.parameters.values()) / 2**20)}
    for rows in (1, 4, 16, 64):
        queue = context.Queue()
        process = context.Process(target=peak, args=(queue, kind, arguments, rows))
        process.start()
        found[f"{rows} rows, MiB"] = round(queue.get())
        process.join()
    return found


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    options.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options.add_argument("--model", default="gpt2", choices=["gpt2", "bert"])
    options.add_argument("--size", default="small", choices=list(common.SIZES))
    options.add_argument("--sample", type=int, default=32, help="rows of the curvature sample (default 32)")
    options.add_argument("--factor", type=float, default=100.0, help="damping, x the mean eigenvalue (default 100)")
    options.add_argument("--tolerance", type=float, default=0.1, help="relative residual (default 0.1)")
    options.add_argument("--rights", type=int, default=16, help="right-hand sides of the block (default 16)")
    options.add_argument("--rounds", type=int, default=3, help="repetitions (default 3)")
    arguments = options.parse_args()
    common.settle(arguments)
    sentences = common.texts(arguments.corpus, arguments.sentences)
    sizes = {"batch_size": 64, "batch_tokens": 4096} if arguments.device == "cpu" else {}
    stage = common.stage(arguments.model, sentences, common.tokenizer(sentences), arguments.size, **sizes)
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "compile": lambda: compiled(stage, arguments),
        "bfloat16": lambda: low(stage, arguments),
        "block": lambda: block(stage, arguments),
        "frozen": lambda: frozen(stage, arguments),
        "ekfac": lambda: ekfac(stage, arguments),
        "memory": lambda: memory(arguments.model, stage, arguments),
    }
    results, lines = {}, []
    for part in arguments.parts:
        results[part] = makers[part]()
        lines += [part, *(f"  {name}: {value}" for name, value in results[part].items())]
        print("\n".join([part, *(f"  {n}: {v}" for n, v in results[part].items())]), file=sys.stderr, flush=True)
    settings = {
        n: getattr(arguments, n) for n in ("model", "size", "sample", "factor", "tolerance", "rights", "rounds")
    }
    record = {"benchmark": "engine", **settings, "results": results, "machine": common.machine(arguments.threads)}
    common.show(record, arguments.json, lines)


if __name__ == "__main__":
    main()
