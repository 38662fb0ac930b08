"""How rows are scored, as one value: checked at once, and made into the scorer that a run uses and a plan times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.scoring.compress import compressed, compression_of
from nlpinf.scoring.feed import Feed
from nlpinf.scoring.rows import Mode, RowScorer
from nlpinf.stages import Precision


@dataclass(frozen=True)
class Scoring:
    """How rows are scored; the fields are arguments of `nlpinf.score`. Raises `BadInput` for what does not go together."""

    mode: Mode = "auto"
    token_scores: bool = False
    compress: float | None = None
    precision: Precision | None = None
    compiled: bool = False
    batch_size: int | None = None
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.precision == "float16":
            raise BadInput("in float16 small gradients of the outputs are lost; score in bfloat16")
        if self.precision is not None and self.compress is not None:
            raise BadInput("compressed vectors are chosen and measured in full precision; leave out one of the two")

    def scorer(
        self, vectors: QueryVectors, feed: Feed, folder: Path | None = None, identity: dict[str, Any] | None = None
    ) -> RowScorer:
        """Return the scorer of rows of `feed`.

        Compressed vectors are those of the scores folder of this identity, if one is given; else they are made anew.
        """
        compression = None
        if self.compress is not None and folder is not None and identity is not None:
            compression = compression_of(vectors, feed, self.compress, folder, identity)
        elif self.compress is not None:
            compression = compressed(vectors, feed, self.compress)
        sizes = self.batch_size, self.batch_tokens
        return RowScorer(vectors, self.mode, self.token_scores, *sizes, compression, self.precision, self.compiled)
