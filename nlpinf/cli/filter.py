"""nlpinf filter: a corpus without its most harmful rows, or with other rows in their place."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path

import typer

from nlpinf.cli import console
from nlpinf.data.sources import Source, find
from nlpinf.errors import BadInput
from nlpinf.scoring import Scores
from nlpinf.scoring.filter import filter_corpus
from nlpinf.scoring.select import Amount, Rule, Side, select


class HowName(str, Enum):
    """How several queries count together."""

    all = "all"
    any = "any"
    mean = "mean"


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("filter")(filter)


def filter(
    scores: Path = typer.Argument(help="Scores folder."),
    out: Path = typer.Option(help="The corpus: .txt or .jsonl (also .gz, .zst, .bz2), or .parquet."),
    drop_harmful: str | None = typer.Option(None, help="Drop the most harmful rows: '5%' or a number of rows."),
    drop_helpful: str | None = typer.Option(None, help="Drop the most helpful rows."),
    drop_random: str | None = typer.Option(None, help="Drop as many rows at random: the control."),
    drop_above: float | None = typer.Option(None, help="Drop rows whose score is greater."),
    drop_below: float | None = typer.Option(None, help="Drop rows whose score is less."),
    keep_harmful: str | None = typer.Option(None, help="Keep the most harmful rows alone."),
    keep_helpful: str | None = typer.Option(None, help="Keep the most helpful rows alone."),
    keep_random: str | None = typer.Option(None, help="Keep as many rows at random."),
    query: list[int] = typer.Option([0], help="Number of the query, from 0; may be repeated."),
    how: HowName = typer.Option(
        HowName.all, help="With several queries: rows meant for all of them, for any, or by the mean score."
    ),
    replace_with: str | None = typer.Option(None, help="Corpus whose rows take the places of the dropped ones."),
    corpus: str | None = typer.Option(None, help="The corpus that was scored, where the scores keep no texts."),
    text_column: str | None = typer.Option(None, help="The column or key of its texts; default: as it was scored."),
    split: str | None = typer.Option(None, help="Its split, of a data set; default: as it was scored."),
    replace_column: str = typer.Option("text", help="The column or key of the texts of --replace-with."),
    replace_split: str | None = typer.Option(None, help="The split of --replace-with, of a data set."),
    seed: int = typer.Option(0, help="Seed of the random rules."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Write the corpus without the rows that one rule names, in its order, in a stream.

    Example: nlpinf filter scores --drop-harmful 5% --out clean.txt.zst
    """
    amounts: dict[str, tuple[bool, Side, str | None]] = {
        "--drop-harmful": (False, "harmful", drop_harmful),
        "--drop-helpful": (False, "helpful", drop_helpful),
        "--drop-random": (False, "random", drop_random),
        "--keep-harmful": (True, "harmful", keep_harmful),
        "--keep-helpful": (True, "helpful", keep_helpful),
        "--keep-random": (True, "random", keep_random),
    }
    rules = [
        (keep, Rule(side, Amount.parse(text), seed=seed)) for keep, side, text in amounts.values() if text is not None
    ]
    if drop_above is not None:
        rules.append((False, Rule("harmful", threshold=drop_above)))
    if drop_below is not None:
        rules.append((False, Rule("helpful", threshold=drop_below)))
    if len(rules) != 1:
        told = ", ".join(amounts)
        raise BadInput(f"{len(rules)} rules were given; give one of {told}, --drop-above, --drop-below")
    keep, rule = rules[0]
    opened = Scores.open(scores)
    selection = select(opened, rule, query, how.value)
    source: Source | str | None = corpus
    if text_column is not None or split is not None:
        if corpus is None:
            raise BadInput("--text-column and --split say how to read --corpus; give that too")
        source = find(corpus, text_column or "text", split)
    filler = None if replace_with is None else find(replace_with, replace_column, replace_split)
    done = filter_corpus(opened, selection, out, keep=keep, corpus=source, replacement=filler)
    if json_:
        console.print_json({**asdict(done), "out": str(done.out)})
        return
    filled = f", {done.replaced:,} put in their place" if done.replaced else ""
    console.say(f"{done.out}: {done.written:,} rows; {done.dropped:,} of {done.rows:,} dropped{filled}")
    for name, edge in done.edges.items():
        console.say(f"edge: score {edge:+.4g} for {name}")
    for name, change in done.predicted_change.items():
        console.say(f"predicted change, to first order: {change:+.3e} for {name}")
