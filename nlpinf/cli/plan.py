"""nlpinf plan: what scoring a corpus will take, before anything runs."""

from __future__ import annotations

import time
from dataclasses import asdict

import typer
from rich.table import Table

from nlpinf import querystore
from nlpinf.cli import console, options
from nlpinf.data.sources import find
from nlpinf.scoring.corpus import PART_ROWS
from nlpinf.scoring.feed import StreamFeed, deduped, feed_of
from nlpinf.scoring.making import Scoring
from nlpinf.scoring.plan import plan as plan_of


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("plan")(plan)


def plan(
    query: options.Query,
    corpus: options.Corpus = None,
    pretrain: options.Pretrain = None,
    empty: options.Empty = "error",
    text_column: options.TextColumn = "text",
    split: options.Split = None,
    streaming: options.Streaming = False,
    dedupe: options.Dedupe = False,
    compress: options.Compress = None,
    precision: options.Precision = None,
    compiled: options.Compiled = False,
    token_scores: options.TokenScores = False,
    text: options.Text = True,
    mode: options.Mode = "auto",
    part_rows: options.PartRows = PART_ROWS,
    rows: int = typer.Option(300, help="Rows to measure, at least; more make the plan surer.", min=1),
    processes: int = typer.Option(8, help="Plan for 1, 2, 4, ... up to so many processes.", min=1),
    price: float | None = typer.Option(None, help="Price of a process for an hour, in any currency.", min=0),
    trust_remote_code: options.TrustRemoteCode = False,
    json_: options.Json = False,
) -> None:
    """Measure a few hundred rows and say how long the whole corpus will take, in how much memory, disk and money.

    Give the options that `nlpinf score` is to get. The figures hold for processes like this one, each with processors or a GPU of its own; set --threads as for the run.

    Example: nlpinf plan --query query --corpus corpus.txt.gz --price 0.5
    """
    scoring = Scoring(mode, token_scores, compress, precision, compiled)
    began = time.perf_counter()
    source = None if corpus is None else find(corpus, text_column, split, streaming)
    vectors = querystore.load(query, run=pretrain, trust_remote_code=trust_remote_code)
    loading = time.perf_counter() - began
    feed = feed_of(vectors.stage.data) if source is None else StreamFeed.of(source, empty)
    found = plan_of(
        vectors,
        deduped(feed) if dedupe else feed,
        scoring=scoring,
        text=text,
        part_rows=part_rows,
        sample=rows,
        processes=_counts(processes),
        price=price,
        seconds_start=loading,
    )
    if json_:
        console.print_json(asdict(found))
        return
    console.say(
        f"{found.rows:,} rows in {found.parts:,} parts; measured {found.measured:,} rows, {found.scoring['mode']} mode, "
        f"{found.threads} threads: {found.rows_per_second:,.0f} rows/s, after {console.duration(found.seconds_start)}"
    )
    for line in console.scoring_lines(found.scoring):
        console.say(line)
    table = Table(box=None, padding=(0, 2))
    for name in ("processes", "time", "memory", "disk", *(["cost"] if price is not None else [])):
        table.add_column(name, justify="right")
    for option in found.options:
        cost = [] if option.cost is None else [f"{option.cost:,.2f}"]
        memory, disk = f"{option.memory_bytes / 2**30:,.1f} GiB", f"{found.disk_bytes / 2**30:,.2f} GiB"
        table.add_row(str(option.processes), console.duration(option.hours * 3600), memory, disk, *cost)
    console.out.print(table)
    if found.gpu_memory_bytes is not None:
        console.say(f"GPU memory of each process: {found.gpu_memory_bytes / 2**30:,.1f} GiB")


def _counts(most: int) -> list[int]:
    """Return 1, 2, 4, ... and the greatest."""
    counts = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    return counts if counts[-1] == most else [*counts, most]
