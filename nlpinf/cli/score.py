"""nlpinf score: a score for every row of a corpus."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from nlpinf import querystore
from nlpinf import score as score_corpus
from nlpinf.cli import console
from nlpinf.data.sources import find
from nlpinf.errors import BadInput
from nlpinf.scoring import Shard
from nlpinf.scoring.feed import StreamFeed, deduped, feed_of
from nlpinf.scoring.screen import recall
from nlpinf.scoring.screen import screen as screen_corpus
from nlpinf.scoring.select import Amount


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("score")(score)


def score(
    query: Path = typer.Option(help="Query folder."),
    out: Path = typer.Option(help="Scores folder; an interrupted one is finished, one at work is joined."),
    corpus: str | None = typer.Option(
        None,
        help="A file (.txt, .jsonl, also .gz, .zst, .bz2; .parquet), folder or data set; default: the run's own corpus.",
    ),
    pretrain: Path | None = typer.Option(None, help="The pretraining run, where it was moved since the query."),
    empty: str = typer.Option("error", help="Empty lines: 'error' or 'skip'."),
    text_column: str = typer.Option("text", help="The column or key of the texts."),
    split: str | None = typer.Option(None, help="The split of a data set."),
    streaming: bool = typer.Option(
        False,
        "--streaming",
        help="Fetch a data set of the hub while it is read: twice, once to count and once to score.",
    ),
    dedupe: bool = typer.Option(False, "--dedupe", help="Score equal texts once, with the first one's row number."),
    screen: str | None = typer.Option(
        None,
        help="A share such as 10%: score a sample and the most promising rows, guess the others, and say how many of the true top were found.",
    ),
    shard: str | None = typer.Option(
        None,
        help="INDEX/COUNT from 0, such as 3/64: do this share of the parts alone, for machines without a common disk.",
    ),
    compress: float | None = typer.Option(
        None,
        help="Query vectors of low rank, whose scores err by this share of their spread at most, such as 0.05.",
    ),
    precision: console.PrecisionName | None = typer.Option(
        None, help="bfloat16: the network's products in low precision; losses and sums stay as they are."
    ),
    compiled: bool = typer.Option(
        False, "--compile", help="Compile the scoring: half a minute to begin with, then faster. Needs a C++ compiler."
    ),
    token_scores: bool = typer.Option(False, help="Keep the score of every counted token."),
    text: bool = typer.Option(True, help="Keep the texts beside the scores."),
    mode: str = typer.Option("auto", help="'forward', 'reverse' or 'auto'."),
    part_rows: int = typer.Option(8192, help="Rows in a part: what an interruption costs at most."),
    trust_remote_code: bool = typer.Option(False, help="Run code that lies in the model's folder."),
    json_: bool = typer.Option(False, "--json", help="Print the manifest as JSON."),
) -> None:
    """Score every row of a corpus. Positive = harmful; removing a row changes the query by about −score/m.

    Any number of processes may run the same command: they share the parts, and what one leaves undone another does.

    Example: nlpinf score --query query --corpus corpus.txt.gz --out scores
    """
    if empty not in ("error", "skip"):
        raise BadInput(f"--empty {empty} is neither error nor skip")
    if mode not in ("auto", "forward", "reverse"):
        raise BadInput(f"--mode {mode} is none of auto, forward, reverse")
    share = None if shard is None else Shard.parse(shard)
    exact = None if screen is None else Amount.parse(screen).share
    if screen is not None and (exact is None or share is not None or token_scores or compress is not None):
        raise BadInput("--screen takes a share such as 10%, and none of --shard, --token-scores, --compress")
    if screen is not None and (compiled or precision is not None):
        raise BadInput("--compile and --precision do not go with --screen")
    source = None if corpus is None else find(corpus, text_column, split, streaming)
    vectors = querystore.load(query, run=pretrain, trust_remote_code=trust_remote_code)
    feed = None if source is None else StreamFeed.of(source, empty)  # type: ignore[arg-type]
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
                mode=mode,  # type: ignore[arg-type]
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
                mode=mode,  # type: ignore[arg-type]
                dedupe=dedupe,
                compress=compress,
                precision=None if precision is None else precision.value,
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
    if isinstance(why := scores.manifest["scoring"].get("compiled"), str):
        console.say(why)
    if made := scores.manifest["scoring"].get("compression"):
        measured = made["measured"]
        console.say(
            f"compressed: {made['multiplications']:.0%} of the products with query vectors; scores err by {measured['rms']:.1%} "
            f"of their spread (at most {measured['max']:.1%}), rank correlation {measured['spearman']:.4f}, "
            f"on {measured['rows']} rows scored both ways"
        )
    for end in found:
        console.say(
            f"{end.query}: of the {end.share:.0%} most {end.end} rows {end.recall:.0%} were scored exactly "
            f"({end.low:.0%} to {end.high:.0%}; {end.found} of {end.seen} held-out rows)"
        )
