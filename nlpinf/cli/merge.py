"""nlpinf merge: one scores folder from those of several machines."""

from __future__ import annotations

from pathlib import Path

import typer

from nlpinf.cli import console
from nlpinf.scoring.merge import merge as merge_folders


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("merge")(merge)


def merge(
    scores: list[Path] = typer.Argument(help="Scores folders of one job."),
    out: Path = typer.Option(help="Folder for all parts: new, or one of the same job."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Bring the parts of several folders together, after checking that query, weights, corpus and settings are the same.

    Example: nlpinf merge machine-a/scores machine-b/scores --out scores
    """
    merged = merge_folders(scores, out)
    if json_:
        content = {"folder": str(merged.folder), "parts": merged.parts, "missing": merged.missing}
        console.print_json({**content, "differences": merged.differences})
        return
    for difference in merged.differences:
        console.err.print(f"note: {difference}", highlight=False, markup=False)
    lacking = f", {len(merged.missing):,} parts are missing still" if merged.missing else ""
    console.say(f"{out}: {merged.parts:,} parts brought together{lacking}")
