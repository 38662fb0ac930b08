"""Token scores in the text: pieces of a sentence, each with the score of the item that predicted it.

Only counted items have scores: the masked positions of a masked LM, every token but the first of a causal one. The
scores of a sentence's pieces add up to its score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nlpinf.parameters import Parameters
from nlpinf.scoring.forward import forward_scores
from nlpinf.stages import Stage
from nlpinf.tasks import Batch

Piece = tuple[str, float | None]
Shader = Callable[[Sequence[Any], int], list[list[Piece]]]


def located(
    text: str,
    tokenizer: Any,
    task: Mapping[str, Any],
    ids: Sequence[int],
    positions: Sequence[int],
    scores: Sequence[float],
) -> list[Piece]:
    """Return [(piece of text, score or None), ...] for the items of one sentence.

    `ids` are the tokens that the items predicted, `positions` the places in the sequence that predicted them, `task`
    the task's settings. Items of one token (several masks) are added up. The pieces joined are the text; tokens that
    have a score but no place in the text, such as an end token, follow as pieces of their own. Where the tokens do
    not match the text's (another tokenizer, a task that is not known here) the text comes back whole, without a score.
    """
    if not getattr(tokenizer, "is_fast", False):
        return [(text, None)]
    cut = {"truncation": True, "max_length": task["max_length"]} if "max_length" in task else {}
    found = tokenizer(text, return_offsets_mapping=True, **cut)
    own, offsets = found["input_ids"], found["offset_mapping"]
    for shift in _shifts(task):
        places = [position + shift for position in positions]
        if all(not place < len(own) or own[place] == token for place, token in zip(places, ids)):
            break
    else:
        return [(text, None)]
    sums: dict[int, float] = {}
    names: dict[int, str] = {}
    for place, token, score in zip(places, ids, scores):
        sums[place] = sums.get(place, 0.0) + score
        names[place] = str(tokenizer.convert_ids_to_tokens(int(token)))
    return _cut(text, offsets, sums, names)


def shaded(
    stage: Stage, vectors: Sequence[Parameters], texts: Sequence[str], rows: Sequence[int], query: int = 0
) -> list[list[Piece]]:
    """Return the pieces of each of `texts`, scored anew by a forward-mode pass each: for stores without token scores.

    `rows` are their numbers in the corpus, which fix the masks.
    """
    task = stage.task
    tokenizer = getattr(task, "tokenizer", None)
    result: list[list[Piece]] = []
    for text, row in zip(texts, rows):
        batch = stage.on_device(task.collate(task.encode([text]), [int(row)]))
        if (spans := task.spans(text)) is not None:
            result.append(_by_place(stage, vectors[query], batch, text, spans))
            continue
        if tokenizer is None or batch.position is None or "input_ids" not in batch.inputs:
            result.append([(text, None)])
            continue
        items = forward_scores(stage, [vectors[query]], batch).item_scores
        assert items is not None
        positions = batch.position % batch.inputs["input_ids"].shape[1]
        result.append(
            located(text, tokenizer, task.settings(), batch.targets.tolist(), positions.tolist(), items[:, 0].tolist())
        )
    return result


def _by_place(
    stage: Stage, vector: Parameters, batch: Batch, text: str, spans: tuple[list[tuple[int, int]], list[str]]
) -> list[Piece]:
    """Cut a text at the places that its task names, each with the sum of its items' scores (two directions, say)."""
    items = forward_scores(stage, [vector], batch).item_scores
    assert items is not None and batch.position is not None
    sums: dict[int, float] = {}
    for place, score in zip(batch.position.tolist(), items[:, 0].tolist()):
        sums[place] = sums.get(place, 0.0) + score
    return _cut(text, spans[0], sums, dict(enumerate(spans[1])))


def shader(stage: Stage, vectors: Sequence[Parameters]) -> Shader:
    """Return what `report.write` takes as `shade`: the rows of a store and a query's number to pieces with scores."""

    def shade(rows: Sequence[Any], query: int) -> list[list[Piece]]:
        if any(row.text is None for row in rows):
            return [[(row.text or "", None)] for row in rows]
        return shaded(stage, vectors, [row.text for row in rows], [row.row for row in rows], query)

    return shade


def _shifts(task: Mapping[str, Any]) -> tuple[int, ...]:
    """From the place that predicts to the token predicted, in the tokenizer's own numbering, the likeliest first."""
    if task.get("name") == "masked_lm":
        return (0,)
    return (0, 1) if task.get("boundaries") else (1, 0)  # a begin token in front moves the others by one


def _cut(
    text: str, offsets: Sequence[tuple[int, int]], sums: Mapping[int, float], names: Mapping[int, str]
) -> list[Piece]:
    found: list[Piece] = []
    after: list[Piece] = []
    at = 0
    for place in sorted(sums):
        start, end = offsets[place] if place < len(offsets) else (0, 0)
        if end <= max(start, at):  # a special token, or one more token of a character that is already shown
            after.append((names[place], sums[place]))
            continue
        start = max(start, at)
        if start > at:
            found.append((text[at:start], None))
        found.append((text[start:end], sums[place]))
        at = end
    if at < len(text):
        found.append((text[at:], None))
    return found + after
