"""Scores of lists of examples: encodes them, batches them by length, scores the batches, restores the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf import sharded
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.memory import OutOfMemory
from nlpinf.parameters import Parameters
from nlpinf.scoring.compiled import CannotCompile, CompiledScorer
from nlpinf.scoring.compress import Compression
from nlpinf.scoring.forward import BatchScores, ForwardScorer
from nlpinf.scoring.reverse import ReverseScorer, agrees
from nlpinf.stages import Precision, length_batches
from nlpinf.tasks import Batch, MaskedLM

Mode = Literal["auto", "forward", "reverse"]
Tick = Callable[[int], None]

_TRIED = (
    1 << 27
)  # trained parameters up to which forward mode is held against autograd first, which takes three copies of them
FORWARD_QUERIES = 1  # measured: two queries cost 5.7 forward passes in forward mode and 3.5 in reverse mode


@dataclass(frozen=True)
class RowScores:
    """Results in the order of the rows given: `scores` (n, queries), `losses` (n,), `tokens` (n,), float64 and int64.

    With item scores also `items` (I, queries) in the rows' order, `targets` (I,), `positions` (I,) of the outputs that
    predict them, and their own `places` (I,) in the example, of which row i has `tokens[i]`. `truncated` (n,) bool: which
    examples were cut to the task's greatest length, where it tells. `errors` (n, queries): the standard errors of the
    scores, where the query vectors have error vectors.
    """

    scores: np.ndarray
    losses: np.ndarray
    tokens: np.ndarray
    items: np.ndarray | None = None
    targets: np.ndarray | None = None
    positions: np.ndarray | None = None
    places: np.ndarray | None = None
    truncated: np.ndarray | None = None
    errors: np.ndarray | None = None


class RowScorer:
    """Scores lists of examples with their row numbers: encodes, batches by length, scores, restores the order."""

    def __init__(
        self,
        vectors: QueryVectors,
        mode: Mode = "auto",
        token_scores: bool = False,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        compression: Compression | None = None,
        precision: Precision | None = None,
        compiled: bool = False,
    ) -> None:
        if not len(vectors):
            raise BadInput("there is no query vector to score with; compute at least one")
        if mode not in ("auto", "forward", "reverse"):
            raise BadInput(f"mode {mode!r} is none of 'auto', 'forward', 'reverse'")
        if token_scores and mode == "reverse":
            raise BadInput("token scores come from forward mode; use mode='forward' or 'auto'")
        if compression is not None and (token_scores or mode == "forward"):
            raise BadInput("compressed vectors are for reverse mode without token scores; leave one of them out")
        if any(limit is not None and limit < 1 for limit in (batch_size, batch_tokens)):
            raise BadInput(f"batches of {batch_size} examples, {batch_tokens} tokens were asked for; give at least 1")
        self.stage, self.token_scores, self.queries = vectors.stage.at(precision), token_scores, len(vectors)
        if compression is not None and vectors.errors:
            raise BadInput(
                "compressed vectors give no standard errors; score without compression, or make a query without error bars"
            )
        trees = [*vectors.vectors, *(tree for error in vectors.errors for tree in error)]
        self.columns = len(trees)
        # Measured of one query: in bfloat16 reverse mode takes 0.77 to 0.88 of forward mode's time on a CPU, 0.69 on a GPU;
        # in float32 0.9 on a GPU, and on a CPU 0.9 to 1.15, the more the smaller the model.
        plain = self.stage.device.type == "cpu" and precision is None
        self.forward_pays = self.columns <= (FORWARD_QUERIES if plain else 0)
        self._score: Callable[[Batch], BatchScores] = ForwardScorer(self.stage, trees)
        self.mode: Mode = "forward"
        self.compiled, self.note = False, ""
        self.compression = compression
        wanted = mode == "reverse" or compiled or not self.forward_pays
        if compression is not None or (wanted and mode != "forward" and not token_scores):
            if (reverse := self._made(trees, mode)) is not None:
                self._reverse(reverse, mode, compiled)
        elif compiled:
            self.note = "not compiled: token scores and mode 'forward' are not"
        small = P.size(self.stage.theta) <= _TRIED
        if self.mode == "forward" and small and not sharded.is_sharded(self.stage.model):
            self._tried(trees, "forward" if token_scores else mode)
        self.batch_size = self._budget(batch_size, self.stage.batch_size)
        self.batch_tokens = self._budget(batch_tokens, self.stage.batch_tokens)

    def __call__(self, examples: Sequence[Any], rows: Sequence[int], tick: Tick | None = None) -> RowScores:
        """Score the examples with these row numbers; `tick` is told the number of rows of every batch that is done."""
        n = len(examples)
        scores, losses, tokens = np.empty((n, self.columns)), np.empty(n), np.empty(n, np.int64)
        items: list[tuple[np.ndarray, ...]] = []
        encoded, waiting, truncated = self.arrange(examples)
        waiting.reverse()
        while waiting:
            chosen = waiting.pop()
            held = True
            try:
                batch, result = self.score([encoded[i] for i in chosen], [rows[i] for i in chosen])
            except OutOfMemory:
                held = False  # what the failed pass held is let go of with the exception
            if not held:
                self._shrink(chosen)
                halves = [(c[len(c) // 2 :], c[: len(c) // 2]) for c in [*waiting, chosen]]
                waiting = [half for pair in halves for half in pair if half]
                continue
            if len(chosen) > 1 and not bool(torch.isfinite(result.scores).all()):
                waiting += [[i] for i in chosen[::-1]]  # one NaN spreads to its neighbours (0 · NaN): find whose it is
                continue
            where = np.asarray(chosen)
            scores[where], losses[where] = _numpy(result.scores), _numpy(result.losses)
            tokens[where] = _numpy(batch.counts)
            if tick is not None:
                tick(len(chosen))
            if self.token_scores:
                assert result.item_scores is not None
                parts = _numpy(result.item_scores[:, : self.queries])
                items.append((where[_numpy(batch.example)], parts, *_shown(batch)))
        scores, errors = self._split(scores)
        if not self.token_scores:
            return RowScores(scores, losses, tokens, truncated=truncated, errors=errors)
        owner, values, targets, positions = (np.concatenate(column) for column in zip(*items))
        order = np.argsort(owner, kind="stable")
        positions = positions[order]
        places = positions + self.stage.task.ahead
        return RowScores(scores, losses, tokens, values[order], targets[order], positions, places, truncated, errors)

    def settled(self, examples: Sequence[Any], rows: Sequence[int]) -> tuple[list[Any], list[list[int]]]:
        """Return the encoded examples and their batches, cut so that a GPU's memory holds the largest."""
        while True:
            encoded, batches, _ = self.arrange(examples)
            largest = max(batches, key=lambda c: len(c) * max(self.stage.task.length(encoded[i]) for i in c))
            try:
                self.score([encoded[i] for i in largest], [rows[i] for i in largest])
                return encoded, batches
            except OutOfMemory:
                pass
            self._shrink(largest)

    def _shrink(self, chosen: list[int]) -> None:
        """Let later batches be half as large: the GPU's memory did not hold this one."""
        if len(chosen) == 1:
            raise BadInput(
                "the GPU's memory does not hold one row; take a shorter max_length, a GPU with more memory, or --device cpu"
            )
        torch.cuda.empty_cache()
        self.batch_size, self.batch_tokens = max(1, self.batch_size // 2), max(1, self.batch_tokens // 2)

    def summary(self) -> dict[str, Any]:
        """Return what manifests say: mode and batches, whether it is compiled or why not, what compression was measured to do."""
        told: dict[str, Any] = {
            "mode": self.mode,
            "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens,
        }
        if self.compiled or self.note:
            told["compiled"] = self.note or True
        if self.compression is not None:
            told["compression"] = self.compression.summary()
        return told

    def _split(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the scores (n, queries) and their standard errors: roots of the sums of squares over the error vectors."""
        if self.columns == self.queries:
            return found, None
        errors = found[:, self.queries :].reshape(len(found), self.queries, -1)
        return found[:, : self.queries], np.sqrt(np.square(errors).sum(2))

    def arrange(self, examples: Sequence[Any]) -> tuple[list[Any], list[list[int]], np.ndarray | None]:
        """Return the encoded examples, which of them share a batch, the longest first, and which were cut, if told."""
        task = self.stage.task
        encoded, cut = task.encode_marked(examples)
        lengths = [task.length(e) for e in encoded]
        return encoded, list(length_batches(lengths, self.batch_size, self.batch_tokens)), cut

    def score(self, encoded: Sequence[Any], rows: Sequence[int]) -> tuple[Batch, BatchScores]:
        """Return the batch of encoded examples, and its scores."""
        batch = self.stage.on_device(self.stage.task.collate(encoded, rows))
        return batch, self._score(batch)

    def _made(self, trees: list[Parameters], mode: Mode) -> ReverseScorer | None:
        """Return the scorer by reverse mode; None where it cannot go through the model and need not."""
        try:
            return ReverseScorer(self.stage, trees)
        except OutOfMemory:
            raise
        except RuntimeError as error:  # of an operation without a derivative, or a checkpoint that hooks disturb
            if mode == "auto" and self.compression is None:
                return None
            raise self._impassable("reverse", error) from error

    def _tried(self, trees: list[Parameters], mode: Mode) -> None:
        """Hold forward mode against autograd on an example, and take reverse mode where there is none and `mode` allows it."""
        try:
            right = agrees(self.stage)
        except OutOfMemory:
            return  # a GPU that does not hold two rows and their gradients
        except NotImplementedError as error:
            reverse = self._made(trees, "reverse") if mode == "auto" else None
            if reverse is None or reverse.uncovered:
                raise self._impassable("forward", error) from error
            self._score, self.mode = reverse, "reverse"
            return
        if not right:
            raise BadInput(
                f"stage {self.stage.name!r}: forward mode and autograd differ on its model, as where a layer runs under "
                "torch.no_grad(); run `nlpinf check`, and use detach() there"
            )

    def _impassable(self, mode: str, error: Exception) -> BadInput:
        told = " ".join(str(error).split())[:160]
        return BadInput(
            f"stage {self.stage.name!r}: {mode} mode cannot go through its model ({told}); run `nlpinf check`"
        )

    def _reverse(self, scorer: ReverseScorer, mode: Mode, compiled: bool) -> None:
        """Take reverse mode, compiled if asked and possible, unless forward mode is the cheaper."""
        if self.compression is not None:
            scorer = scorer.replaced(self.compression.matrices)
        elif mode == "auto" and scorer.uncovered:
            # A parameter without a rule costs a forward-mode pass a query, and then reverse mode saves nothing.
            self.note = f"not compiled: no rule for {scorer.uncovered[0]}" if compiled else ""
            return
        self._score, self.mode = scorer, "reverse"
        if compiled:
            try:
                self._score, self.compiled = CompiledScorer(scorer), True
            except CannotCompile as reason:
                self.note = f"not compiled: {reason}"
        if not self.compiled and mode == "auto" and self.compression is None and self.forward_pays:
            self._score, self.mode = ForwardScorer(self.stage, scorer.vectors), "forward"

    def _budget(self, given: int | None, default: int) -> int:
        """Return the limit of a batch that was given, or the stage's, which the masks of an example share."""
        task = self.stage.task
        if given is None:
            # Reverse mode reads all query vectors once a batch, so larger batches pay.
            given = default * 2 if self.mode == "reverse" and self.columns > 1 else default
        return max(1, given // (task.masks if isinstance(task, MaskedLM) else 1))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _shown(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return what each item predicts (a class, −1 where targets are none) and at which place of its sequence."""
    count = len(batch.example)
    words = batch.targets if batch.shown is None else batch.shown
    targets = _numpy(words) if words.dim() == 1 and not words.is_floating_point() else None
    if batch.position is None:
        positions = np.zeros(count, np.int64)
    else:
        width = next(value.shape[1] for value in batch.inputs.values() if value.dim() > 1)
        positions = _numpy(batch.position) % width
    return np.full(count, -1) if targets is None else targets, positions
