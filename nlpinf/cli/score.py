"""nlpinf score: a score for every row of a corpus."""

from __future__ import annotations

from pathlib import Path

import typer

from nlpinf import querystore
from nlpinf import score as score_corpus
from nlpinf.cli import console
from nlpinf.data import shipped
from nlpinf.data.corpus import Corpus
from nlpinf.errors import BadInput


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("score")(score)


def score(
    query: Path = typer.Option(help="Query folder."),
    out: Path = typer.Option(help="Scores folder; an interrupted one is finished."),
    corpus: str | None = typer.Option(
        None, help="Text, one sentence a line (.txt, .jsonl, .gz); default: the run's own corpus."
    ),
    pretrain: Path | None = typer.Option(None, help="The pretraining run, where it was moved since the query."),
    empty: str = typer.Option("error", help="Empty lines: 'error' or 'skip'."),
    token_scores: bool = typer.Option(False, help="Keep the score of every counted token."),
    mode: str = typer.Option("auto", help="'forward', 'reverse' or 'auto'."),
    part_rows: int = typer.Option(8192, help="Rows in a part: what an interruption costs at most."),
    json_: bool = typer.Option(False, "--json", help="Print the manifest as JSON."),
) -> None:
    """Score every row of a corpus. Positive = harmful; removing a row changes the query by about −score/m.

    Example: nlpinf score --query query --corpus corpus.txt.gz --out scores
    """
    if empty not in ("error", "skip"):
        raise BadInput(f"--empty {empty} is neither error nor skip")
    if mode not in ("auto", "forward", "reverse"):
        raise BadInput(f"--mode {mode} is none of auto, forward, reverse")
    vectors = querystore.load(query, run=pretrain)
    data = None if corpus is None else Corpus.read(shipped.resolve(corpus), empty=empty)  # type: ignore[arg-type]
    with console.bars() as bars:
        scores = score_corpus(
            vectors,
            data,
            out,
            token_scores=token_scores,
            mode=mode,  # type: ignore[arg-type]
            part_rows=part_rows,
            progress=lambda done, total: bars("score", done, total, "sentences"),
        )
    if json_:
        console.print_json(scores.manifest)
    else:
        console.out.print(f"{len(scores):,} sentences, {len(scores.queries)} queries: {out}", highlight=False)
