"""nlpinf status: how far a scores folder is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from nlpinf.cli import console
from nlpinf.scoring.status import status as status_of


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("status")(status)


def status(
    scores: Path = typer.Argument(help="Scores folder."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Say how far a scores folder is: parts and rows done, who works on which part, rows a second, time left.

    Example: nlpinf status scores
    """
    found = status_of(scores)
    if json_:
        console.print_json(asdict(found))
        return
    share = found.rows_done / found.rows
    console.say(
        f"{found.parts_done:,} of {found.parts:,} parts, {found.rows_done:,} of {found.rows:,} rows ({share:.1%})"
    )
    console.say(f"{found.bytes / 1e6:,.1f} MB on disk")
    if found.rate is not None and found.missing:
        console.say(f"{found.rate:,.0f} rows/s over the last ten minutes, {console.duration(found.seconds_left)} left")
    odd = {name: f"{count:,} with {name}" for name, count in (found.corpus.get("odd") or {}).items()}
    skipped = {name: f"{count:,} {name} skipped" for name, count in (found.corpus.get("skipped") or {}).items()}
    cut = [f"{found.corpus['truncated']:,} truncated"] if found.corpus.get("truncated") else []
    if counts := [*skipped.values(), *cut, *odd.values()]:
        console.say(f"rows: {', '.join(counts)}")
    for work in found.working:
        told = "at work" if work.alive else "ended without finishing, or on a machine whose locks are not seen here"
        console.say(f"part {work.part}: {work.who}, for {console.duration(work.seconds)}, {told}")
    if found.missing and not found.working:
        console.say("nobody is at work; run `nlpinf score` again with the same arguments to finish it")
