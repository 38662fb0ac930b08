"""What surrounds the model in a pass over a corpus: reading, batching, writing; memory; several processes; the plan.

python benchmarks/pipeline.py zeros --rows 10000000   a scorer that returns zeros: rows/s, memory above the start
python benchmarks/pipeline.py model --rows 1000000    a one-layer model end to end
python benchmarks/pipeline.py processes               two processes with one thread each against one
python benchmarks/pipeline.py plan --rows 24000       what `nlpinf plan` says against what the run takes
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import common
from nlpinf import parameters as P
from nlpinf.data.corpus import Corpus
from nlpinf.data.sources import find
from nlpinf.influence import QueryVectors
from nlpinf.queries import Query
from nlpinf.scoring import score
from nlpinf.scoring.corpus import PART_ROWS
from nlpinf.scoring.feed import Part, StreamFeed
from nlpinf.scoring.plan import plan
from nlpinf.scoring.rows import RowScores, Tick
from nlpinf.scoring.shards import Worker
from nlpinf.scoring.store import Scores, Store
from nlpinf.scoring.tables import table
from nlpinf.stages import Stage, length_batches
from nlpinf.tasks import CausalLM

WORDS = 4000


def write_corpus(path: Path, rows: int) -> None:
    """Write sentences of 1 to 40 made-up words, 12 on average, with frequencies that fall like 1/rank."""
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(draw.choice(letters, draw.integers(2, 9))) for _ in range(WORDS)], dtype=object)
    chance = 1 / np.arange(1, WORDS + 1)
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, rows, 50_000):
            lengths = np.clip(draw.poisson(12, min(50_000, rows - start)), 1, 40)
            chosen = iter(words[draw.choice(WORDS, lengths.sum(), p=chance / chance.sum())])
            file.writelines(" ".join(next(chosen) for _ in range(n)) + "\n" for n in lengths)


@contextmanager
def peak_above() -> Any:
    """Yield a list to which the peak of the resident memory above that at the start is added at the end, in MiB."""
    gc.collect()
    start, peak, ended = resident(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    found: list[float] = []
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found.append(round((max(peak[0], resident()) - start) / 2**20, 1))


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def zeros(part: Part, tick: Tick) -> pa.Table:
    """Take the place of a model: batches by length, zeros for scores."""
    count = len(part.rows)
    scores, losses = np.zeros((count, 1)), np.zeros(count)
    lengths = [len(text) // 5 for text in part.examples]
    for chosen in length_batches(lengths, 64, 2048):
        scores[np.asarray(chosen)] = 0.0
        tick(len(chosen))
    return table(RowScores(scores, losses, np.asarray(lengths)), part)


def run_zeros(corpus: Path, out: Path, rows: int) -> dict[str, Any]:
    """Move the rows through everything but a model, then look for the extremes and filter."""
    from nlpinf.scoring.filter import filter_corpus
    from nlpinf.scoring.select import Amount, Rule, select

    with peak_above() as memory:
        began, used = time.perf_counter(), time.process_time()
        feed = StreamFeed.of(find(corpus))
        read = time.perf_counter() - began
        identity = {"rows": feed.size, "part_rows": PART_ROWS, "parts": -(-feed.size // PART_ROWS)}
        manifest = {"kind": "scores", "format": 1, "identity": identity, "m": rows, "queries": [{"name": "zeros"}]}
        Worker(Store.start(out, {**manifest, "corpus": {}}), feed, zeros).run()
        seconds, used = time.perf_counter() - began, time.process_time() - used
    del feed
    result = {
        "rows_per_cpu_second": round(rows / used),
        "rows_per_second": round(rows / seconds),
        "seconds": round(seconds, 1),
        "seconds_check": round(read, 1),
    }
    result["mib_above_start"] = memory[0]
    scores = Scores.open(out)
    with peak_above() as memory:
        began = time.perf_counter()
        scores.top(20)
        result["seconds_top"] = round(time.perf_counter() - began, 1)
    result["mib_top"] = memory[0]
    with peak_above() as memory:
        began = time.perf_counter()
        chosen = select(scores, Rule("harmful", Amount.parse("5%")))
        filter_corpus(scores, chosen, out.parent / "clean.txt.zst")
        result["seconds_filter"] = round(time.perf_counter() - began, 1)
    return {
        **result,
        "mib_filter": memory[0],
        "mib_on_disk": round(sum(p.stat().st_size for p in out.iterdir()) / 2**20),
    }


def vectors_of(layers: int, width: int, texts: list[str], tokens: int = common.WORDS) -> QueryVectors:
    """Return one random query vector for a GPT-2 of this size with at most so many tokens in its vocabulary."""
    words = common.tokenizer(texts, tokens)
    torch.manual_seed(0)
    size = {"n_positions": 64, "n_embd": width, "n_layer": layers, "n_head": max(1, width // 64)}
    config = GPT2Config(vocab_size=len(words), use_cache=False, bos_token_id=1, eos_token_id=2, pad_token_id=0, **size)
    stage = Stage(GPT2LMHeadModel(config).eval(), CausalLM(words, 64), Corpus(texts))
    return QueryVectors(
        stage, (Query("loss", (texts[0],), "random"),), (P.random_like(stage.theta, 0),), ({},), (0.0,), {}
    )


def run_model(corpus: Path, out: Path, rows: int, vectors: QueryVectors) -> dict[str, Any]:
    """Score the corpus end to end; what memory is held after a tenth of it and at the end tells whether it grows."""
    held: list[tuple[int, int]] = []
    with peak_above() as memory:
        began = time.perf_counter()
        score(vectors, corpus, out, progress=lambda done, of: held.append((done, resident())))
        seconds = time.perf_counter() - began
    early = max((size for done, size in held if done <= rows / 10), default=held[0][1])
    late = max(size for done, size in held if done >= rows * 9 / 10)
    return {
        "rows_per_second": round(rows / seconds, 1),
        "seconds": round(seconds, 1),
        "mib_above_start": memory[0],
        "mib_grown_since_first_tenth": round((late - early) / 2**20, 1),
    }


def forked(count: int, work: Callable[[], Any]) -> float:
    """Return the seconds that so many processes with one thread each need together."""
    began, children = time.perf_counter(), []
    for _ in range(count):
        if (child := os.fork()) == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                work()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert not any(os.waitpid(child, 0)[1] for child in children)
    return time.perf_counter() - began


def run_processes(corpus: Path, out: Path, rows: int, vectors: QueryVectors) -> dict[str, Any]:
    """Score the corpus by one process and by two, in turn, in 16 parts."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(3):
        for count in seconds:
            folder = out.parent / f"{count}-{turn}"
            seconds[count].append(forked(count, lambda f=folder: score(vectors, corpus, f, part_rows=-(-rows // 16))))  # type: ignore[misc]
    best = {count: min(each) for count, each in seconds.items()}
    return {
        "speedup": round(best[1] / best[2], 2),
        "seconds": {k: [round(s, 1) for s in v] for k, v in seconds.items()},
    }


def sized(corpus: Path, vectors: QueryVectors, seconds: float = 10.0) -> int:
    """Return how many rows one process with one thread scores in about so many seconds; the file gets that many lines."""
    probe = 1024
    write_corpus(corpus, probe)
    with tempfile.TemporaryDirectory() as folder:
        taken = forked(1, lambda: score(vectors, corpus, Path(folder, "probe")))
    rows = max(probe, 16 * round(seconds / taken * probe / 16))
    write_corpus(corpus, rows)
    return rows


def run_plan(corpus: Path, out: Path, rows: int, vectors: QueryVectors) -> dict[str, Any]:
    """Compare the plan with the run that follows it."""
    began = time.perf_counter()
    found = plan(vectors, StreamFeed.of(find(corpus)), part_rows=PART_ROWS)
    measuring = time.perf_counter() - began
    began = time.perf_counter()
    score(vectors, corpus, out)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in out.glob("part-*"))
    planned = found.options[0].hours * 3600
    return {
        "planned_seconds": round(planned, 1), "seconds": round(seconds, 1), "ratio": round(planned / seconds, 3),
        "disk_ratio": round(found.disk_bytes / size, 3), "measured_rows": found.measured, "seconds_measuring": round(measuring, 1),
        "planned_memory_mib": round(found.memory_bytes / 2**20),
        "memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    options.add_argument("job", choices=["zeros", "model", "processes", "plan"])
    options.add_argument(
        "--rows", type=int, help="rows of the generated corpus (100,000; for processes: what one does in 10 seconds)"
    )
    options.add_argument("--layers", type=int, help="layers of the model (default 1, for the plan 4)")
    options.add_argument("--width", type=int, help="width of the model (default 32, for the plan 256)")
    options.add_argument("--tokens", type=int, help="tokens of its vocabulary (default 1000, for the plan 8000)")
    arguments = options.parse_args()
    if arguments.clock == "cpu":  # of this process, which other work on the machine does not lengthen
        time.perf_counter = time.process_time
    large = arguments.job == "plan"
    layers, width = arguments.layers or (4 if large else 1), arguments.width or (256 if large else 32)
    common.settle(arguments)
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder, "corpus.txt"), Path(folder, "scores")
        rows = arguments.rows or 100_000
        write_corpus(corpus, rows)
        if arguments.job == "zeros":
            result = run_zeros(corpus, out, rows)
        else:
            with corpus.open(encoding="utf-8") as file:
                texts = [line.rstrip("\n") for line, _ in zip(file, range(2000))]
            tokens = arguments.tokens or (common.WORDS if large else 1000)
            vectors = vectors_of(layers, width, texts, tokens)
            if arguments.job == "processes" and arguments.rows is None:
                rows = sized(corpus, vectors)
            job = {"model": run_model, "processes": run_processes, "plan": run_plan}[arguments.job]
            result = {
                "layers": layers,
                "width": width,
                "tokens": tokens,
                **job(corpus, out, rows, vectors),
            }
        size = {"rows": rows, "corpus_mib": round(corpus.stat().st_size / 2**20)}
    load = round(os.getloadavg()[0], 1)
    record = {
        "benchmark": f"pipeline {arguments.job}",
        **size,
        **result,
        "load": load,
        "machine": common.machine(arguments.threads),
    }
    common.show(
        record, arguments.json, [f"{key:18} {value}" for key, value in {**size, **result, "load": load}.items()]
    )


if __name__ == "__main__":
    main()
