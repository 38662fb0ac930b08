"""nlpinf top: the most harmful or helpful rows of a scores folder."""

from __future__ import annotations

from pathlib import Path

import typer

from nlpinf.cli import console
from nlpinf.scoring import Scores


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("top")(top)


def top(
    scores: Path = typer.Argument(help="Scores folder."),
    count: int = typer.Option(20, "--count", "-n", help="Rows to show."),
    query: int = typer.Option(0, help="Number of the query, from 0."),
    helpful: bool = typer.Option(False, "--helpful", help="The most helpful rows instead of the most harmful."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show the most harmful rows, or the most helpful ones.

    Example: nlpinf top scores --count 20
    """
    opened = Scores.open(scores)
    rows = opened.top(count, query, helpful)
    if json_:
        console.print_json({"query": opened.queries[query], "m": opened.m, "rows": [console.row_dict(r) for r in rows]})
        return
    kind = "helpful" if helpful else "harmful"
    console.out.print(console.rows_table(rows, f"Most {kind} for: {console.shown(opened.queries[query])}"))
