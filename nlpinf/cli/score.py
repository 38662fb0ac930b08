"""nlpinf score: a score for every row of a corpus."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from nlpinf import querystore
from nlpinf import score as score_corpus
from nlpinf.cli import console, options
from nlpinf.data.sources import find
from nlpinf.errors import BadInput
from nlpinf.scoring import Shard
from nlpinf.scoring.corpus import PART_ROWS
from nlpinf.scoring.feed import StreamFeed, deduped, feed_of
from nlpinf.scoring.screen import recall
from nlpinf.scoring.screen import screen as screen_corpus
from nlpinf.scoring.select import Amount


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("score")(score)


def score(
    query: options.Query,
    out: Path = typer.Option(help="Scores folder; an interrupted one is finished, one at work is joined."),
    corpus: options.Corpus = None,
    pretrain: options.Pretrain = None,
    empty: options.Empty = "error",
    text_column: options.TextColumn = "text",
    split: options.Split = None,
    streaming: options.Streaming = False,
    dedupe: options.Dedupe = False,
    screen: str | None = typer.Option(
        None,
        help="A share such as 10%: score a sample and the most promising rows, guess the others, and say how many of the true top were found.",
    ),
    shard: str | None = typer.Option(
        None,
        help="INDEX/COUNT from 0, such as 3/64: do this share of the parts alone, for machines without a common disk.",
    ),
    compress: options.Compress = None,
    precision: options.Precision = None,
    compiled: options.Compiled = False,
    token_scores: options.TokenScores = False,
    text: options.Text = True,
    mode: options.Mode = "auto",
    part_rows: options.PartRows = PART_ROWS,
    trust_remote_code: options.TrustRemoteCode = False,
    json_: options.Json = False,
) -> None:
    """Score every row of a corpus. Positive = harmful; removing a row changes the query by about −score/m.

    Any number of processes may run the same command: they share the parts, and what one leaves undone another does.

    Example: nlpinf score --query query --corpus corpus.txt.gz --out scores
    """
    console.first_speaks()
    share = None if shard is None else Shard.parse(shard)
    exact = None if screen is None else Amount.parse(screen).share
    if screen is not None and (exact is None or share is not None or token_scores or compress is not None):
        raise BadInput("--screen takes a share such as 10%, and none of --shard, --token-scores, --compress")
    if screen is not None and (compiled or precision is not None):
        raise BadInput("--compile and --precision do not go with --screen")
    source = None if corpus is None else find(corpus, text_column, split, streaming)
    vectors = querystore.load(query, run=pretrain, trust_remote_code=trust_remote_code)
    feed = None if source is None else StreamFeed.of(source, empty)
    with console.bars() as bars:
        progress = console.paced(bars, "score")
        if exact is not None:
            data = feed_of(vectors.stage.data if feed is None else feed)
            data = deduped(data) if dedupe else data
            scores = screen_corpus(
                vectors,
                data,
                out,
                exact=exact,
                mode=mode,
                text=text,
                part_rows=part_rows,
                progress=progress,
            )
        else:
            scores = score_corpus(
                vectors,
                feed,
                out,
                token_scores=token_scores,
                text=text,
                mode=mode,
                dedupe=dedupe,
                compress=compress,
                precision=precision,
                compiled=compiled,
                shard=share,
                part_rows=part_rows,
                progress=progress,
            )
    found = recall(out) or []
    if json_:
        console.print_json({**scores.manifest, **({"recall": [asdict(end) for end in found]} if found else {})})
        return
    lacking = f"; {len(scores.missing):,} parts are missing still" if scores.missing else ""
    console.say(f"{len(scores):,} sentences, {len(scores.queries)} queries: {out}{lacking}")
    for line in console.scoring_lines(scores.manifest["scoring"]):
        console.say(line)
    for end in found:
        console.say(
            f"{end.query}: of the {end.share:.0%} most {end.end} rows {end.recall:.0%} were scored exactly "
            f"({end.low:.0%} to {end.high:.0%}; {end.found} of {end.seen} held-out rows)"
        )
