"""What scoring a corpus will take, from a few hundred of its rows: hours, memory, disk and cost."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from scipy.optimize import nnls

from nlpinf import products
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.scoring.feed import Feed, Part
from nlpinf.scoring.files import write_table
from nlpinf.scoring.making import Scoring
from nlpinf.scoring.rows import RowScorer, RowScores
from nlpinf.scoring.tables import table

_BATCHES = 12  # that are timed at least
_LONGEST = 64  # texts of the greatest length, whose batch sets the memory


@dataclass(frozen=True)
class Option:
    """So many processes of the kind that was measured, each with processors of its own."""

    processes: int
    hours: float
    memory_bytes: int
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """What was measured on `measured` rows, and what follows for all of them.

    `scoring` is what a scores folder's manifest would say of how its rows are scored;
    `rows_per_second` one process, reading, encoding, scoring and writing included; `seconds_start` what comes before
    the first part: loading, making the scorer, and reading the corpus once; `memory_bytes` the process's peak (on a GPU also
    `gpu_memory_bytes`); `disk_bytes` the scores folder; `options` for 1 to N processes.
    """

    rows: int
    parts: int
    measured: int
    scoring: dict[str, Any]
    threads: int
    rows_per_second: float
    seconds_start: float
    memory_bytes: int
    gpu_memory_bytes: int | None
    disk_bytes: int
    options: list[Option]


def plan(
    vectors: QueryVectors,
    feed: Feed,
    *,
    scoring: Scoring | None = None,
    text: bool = True,
    part_rows: int,
    sample: int = 300,
    processes: Sequence[int] = (1, 2, 4, 8),
    price: float | None = None,
    seconds_start: float = 0.0,
    seed: int = 0,
) -> Plan:
    """Measure and extrapolate; `scoring`, `text` and `part_rows` are as for `nlpinf.score`.

    A part of random rows is encoded and cut into batches as a run would. Of its batches some are scored and timed, at
    least `sample` rows, from equal shares of the part's tokens; a fit of their times by calls, tokens and attention says
    what the others need. `price` is that of a process for an hour; `seconds_start` what loading took.
    """
    if part_rows < 1:
        raise BadInput(f"a part of {part_rows} rows was asked for; give a number of at least 1")
    if sample < 1 or any(count < 1 for count in processes):
        raise BadInput("a plan needs at least 1 row to measure and 1 process")
    began = time.perf_counter()
    scorer = (scoring or Scoring()).scorer(vectors, feed)
    seconds_make = time.perf_counter() - began
    began = time.perf_counter()
    lengths = _lengths(feed)
    seconds_read = time.perf_counter() - began
    size, draw = min(part_rows, feed.size), np.random.default_rng(seed)
    part = feed.taken(draw.choice(feed.size, size, replace=False))
    encoding = []
    for _ in range(2):  # a tokenizer remembers words, so that the first part of a run takes longer than the others
        began = time.perf_counter()
        scorer.arrange(part.examples)
        encoding.append(time.perf_counter() - began)
    seconds_encode = encoding[1]
    _longest(scorer, feed, lengths, min(_LONGEST, feed.size))
    encoded, batches = scorer.settled(part.examples, part.rows.tolist())
    seconds_score, measured = _scoring(scorer, encoded, part, batches, sample)
    seconds_write, bytes_part = _writing(scorer, part, text and feed.has_texts, draw)
    seconds_part = seconds_encode + seconds_score + seconds_write
    parts = math.ceil(feed.size / part_rows)
    # A run reads the corpus once to check it, once to score it.
    start = seconds_start + seconds_make + 2 * seconds_read + max(0.0, encoding[0] - encoding[1])
    total = seconds_part * feed.size / size
    on_cpu = vectors.stage.device.type == "cpu"
    memory = _peak_memory() + (products.programs() if on_cpu else 0)  # of few shapes so far
    options = []
    for count in processes:
        # Whole parts for each; the last part of the corpus may be short.
        seconds = start + min(math.ceil(parts / count) * seconds_part, total)
        hours = seconds / 3600
        options.append(Option(count, hours, count * memory, None if price is None else price * hours * count))
    gpu = torch.cuda.max_memory_allocated() if vectors.stage.device.type == "cuda" else None
    disk = int(bytes_part * feed.size / size)
    return Plan(feed.size, parts, measured, scorer.summary(), torch.get_num_threads(), feed.size / total, start, memory, gpu, disk, options)  # fmt: skip


def _lengths(feed: Feed) -> np.ndarray:
    """Return the bytes of every row's text, zeros where rows are no texts; one pass."""
    size = 1 << 16
    found = [
        np.zeros(len(part.rows), np.int64) if part.texts is None else pc.binary_length(part.texts).to_numpy()
        for part in feed.parts(range(-(-feed.size // size)), size)
    ]
    return np.concatenate(found)


def _scoring(
    scorer: RowScorer, encoded: list[object], part: Part, batches: list[list[int]], sample: int
) -> tuple[float, int]:
    """Return the seconds for all batches, from those of some, and how many rows these have.

    A batch of n rows padded to w tokens takes about a + b·n·w + c·n·w² seconds with a, b, c ≥ 0: calls, products, attention.
    """
    task, rows = scorer.stage.task, part.rows
    width = np.array([max(task.length(encoded[i]) for i in chosen) for chosen in batches], float)
    padded = width * [len(chosen) for chosen in batches]
    timed = _spread(padded, [len(chosen) for chosen in batches], sample)
    seconds = []
    for number in [timed[0], *timed]:
        chosen = batches[int(number)]
        began = time.perf_counter()
        _, result = scorer.score([encoded[i] for i in chosen], rows[chosen].tolist())
        result.scores.cpu()
        seconds.append(time.perf_counter() - began)
    del seconds[0]  # of libraries, allocators and caches that warm up, which a run pays once
    measured = sum(len(batches[int(number)]) for number in timed)
    if len(timed) == len(batches):
        return sum(seconds), measured
    features = np.stack([np.ones(len(batches)), padded, padded * width], 1)
    features /= features.max(0)
    fitted = features @ nnls(features[timed], np.array(seconds))[0]
    return float(fitted.sum() * sum(seconds) / fitted[timed].sum()), measured


def _spread(padded: np.ndarray, rows: Sequence[int], sample: int) -> np.ndarray:
    """Return the numbers of batches, 12 at least and with `sample` rows, each from the middle of an equal share of the tokens.

    So a short batch at the end of a part, which has next to no tokens, does not speak for its neighbours.
    """
    middle = np.cumsum(padded) - padded / 2
    wanted, timed = min(_BATCHES, len(padded)), np.zeros(0, int)
    while True:
        shares = (np.arange(wanted) + 0.5) / wanted * padded.sum()
        timed = np.unique(np.abs(middle[:, None] - shares).argmin(0))
        if wanted >= len(padded) or sum(rows[int(number)] for number in timed) >= sample:
            return timed if wanted < len(padded) else np.arange(len(padded))
        wanted += 1


def _longest(scorer: RowScorer, feed: Feed, lengths: np.ndarray, count: int) -> None:
    """Score the batch of the longest texts, so that the peak of the memory has been reached, and a GPU's batches fit it."""
    part = feed.taken(np.argpartition(-lengths, count - 1)[:count])
    scorer.settled(part.examples, part.rows.tolist())


def _writing(scorer: RowScorer, part: Part, text: bool, draw: np.random.Generator) -> tuple[float, int]:
    """Return the seconds and bytes of the part, with random numbers in the place of scores: neither is compressible."""
    count = len(part.rows)
    scores = draw.standard_normal((count, scorer.queries))
    errors = None if scorer.columns == scorer.queries else draw.random((count, scorer.queries))
    result = RowScores(scores, draw.random(count), np.ones(count, np.int64), errors=errors)
    if scorer.token_scores:
        counted = np.array([scorer.stage.task.counted([e]) for e in scorer.stage.task.encode(part.examples)])
        items, ids = (
            draw.standard_normal((int(counted.sum()), scorer.queries)),
            draw.integers(0, 8000, int(counted.sum())),
        )
        result = RowScores(scores, result.losses, counted, items, ids, ids % 64, errors=errors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        began = time.perf_counter()
        write_table(table(result, part, text), path)
        return time.perf_counter() - began, path.stat().st_size


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
