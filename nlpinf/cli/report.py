"""nlpinf report: the page of a scores folder."""

from __future__ import annotations

from pathlib import Path

import typer

from nlpinf import querystore, removals
from nlpinf import report as page
from nlpinf.cli import console
from nlpinf.scoring import Scores
from nlpinf.scoring.drop import check_queries


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("report")(report)


def report(
    scores: Path = typer.Argument(help="Scores folder."),
    out: Path | None = typer.Option(None, "--out", help="The page (default: report.html beside the scores folder)."),
    query: Path | None = typer.Option(
        None,
        "--query",
        help="Query folder: shades the words of the sentences shown; brings what `nlpinf predict --keep` left.",
    ),
    pretrain: Path | None = typer.Option(None, help="The pretraining run, where it was moved since the query."),
    examples: int = typer.Option(20, help="Sentences in each table."),
    trust_remote_code: bool = typer.Option(False, help="Run code that lies in the model's folder."),
    json_: bool = typer.Option(False, "--json", help="Print the path as JSON."),
) -> None:
    """Write one self-contained HTML page: warnings, verdicts, histogram, harmful and helpful sentences.

    Example: nlpinf report scores --query query --out report.html
    """
    opened = Scores.open(scores)
    shade = newton = None
    if query is not None:
        vectors = querystore.load(query, run=pretrain, trust_remote_code=trust_remote_code)
        check_queries(opened, vectors)
        shade = page.shader(vectors.stage, vectors.vectors)
        newton = removals.kept(query, opened.manifest["identity"]["queries"])
    path = page.write(opened, out or scores.parent / "report.html", examples=examples, shade=shade, newton=newton)
    if json_:
        console.print_json({"report": str(path)})
    else:
        console.out.print(str(path), highlight=False, soft_wrap=True)
