"""Options that the commands which score a corpus share: score, and plan, which says what score would take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nlpinf.data.sources import EmptyPolicy
from nlpinf.scoring.rows import Mode as ModeName
from nlpinf.stages import Precision as PrecisionName

Query = Annotated[Path, typer.Option(help="Query folder.")]
Corpus = Annotated[
    str | None,
    typer.Option(
        help="A file (.txt, .jsonl, also .gz, .zst, .bz2; .parquet), folder or data set; default: the run's own corpus."
    ),
]
Pretrain = Annotated[Path | None, typer.Option(help="The pretraining run, where it was moved since the query.")]
Empty = Annotated[EmptyPolicy, typer.Option(help="What empty lines are.")]
TextColumn = Annotated[str, typer.Option(help="The column or key of the texts.")]
Split = Annotated[str | None, typer.Option(help="The split of a data set.")]
Streaming = Annotated[
    bool,
    typer.Option(
        "--streaming",
        help="Fetch a data set of the hub while it is read: twice, once to count and once to go through it.",
    ),
]
Dedupe = Annotated[bool, typer.Option("--dedupe", help="Score equal texts once, with the first one's row number.")]
Compress = Annotated[
    float | None,
    typer.Option(
        help="Query vectors of low rank, whose scores err by this share of their spread at most, such as 0.05."
    ),
]
Precision = Annotated[
    PrecisionName | None,
    typer.Option(help="bfloat16: the network's products in low precision; losses and sums stay as they are."),
]
Compiled = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the scoring: half a minute to begin with, then faster. Needs a C++ compiler."
    ),
]
TokenScores = Annotated[bool, typer.Option(help="Keep the score of every counted token.")]
Text = Annotated[bool, typer.Option(help="Keep the texts beside the scores.")]
Mode = Annotated[ModeName, typer.Option(help="How scores are computed; auto takes the cheaper.")]
PartRows = Annotated[int, typer.Option(help="Rows in a part: what an interruption costs at most.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that lies in the model's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
