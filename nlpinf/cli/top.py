"""nlpinf top: the most harmful or helpful rows, or documents, of a scores folder."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

from nlpinf.cli import console
from nlpinf.data.sources import find, texts_at
from nlpinf.errors import BadInput
from nlpinf.scoring import Documents, Scores


class By(str, Enum):
    """What is ranked."""

    row = "row"
    document = "document"


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("top")(top)


def top(
    scores: Path = typer.Argument(help="Scores folder."),
    count: int = typer.Option(20, "--count", "-n", help="Rows to show."),
    query: int = typer.Option(0, help="Number of the query, from 0."),
    helpful: bool = typer.Option(False, "--helpful", help="The most helpful rows instead of the most harmful."),
    by: By = typer.Option(By.row, help="Rank rows, or the documents that packed rows hold pieces of."),
    corpus: str | None = typer.Option(None, help="With --by document: the corpus before packing, to show its texts."),
    text_column: str = typer.Option("text", help="The column or key of its texts."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show the most harmful rows, or the most helpful ones.

    Example: nlpinf top scores --count 20
    """
    opened = Scores.open(scores)
    name = opened.queries[opened.index_of(query)]
    told = {"query": name, "m": opened.m}
    title = f"Most {'helpful' if helpful else 'harmful'} for: {console.shown(name)}"
    if by is By.document:
        documents = Documents.of(opened).top(count, query, helpful)
        texts = {} if corpus is None else texts_at(find(corpus, text_column), [d.document for d in documents])
        if json_:
            shown = [{**vars(d), **({"text": texts[d.document]} if texts else {})} for d in documents]
            console.print_json({**told, "documents": shown})
        else:
            console.out.print(console.documents_table(documents, texts, title))
        return
    if corpus is not None:
        raise BadInput("--corpus was given without --by document; rows have their texts in the scores folder")
    rows = opened.top(count, query, helpful)
    if json_:
        console.print_json({**told, "rows": [console.row_dict(r) for r in rows]})
        return
    console.out.print(console.rows_table(rows, title))
