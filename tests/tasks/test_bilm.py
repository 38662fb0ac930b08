"""The bidirectional language model as a task: which negatives it takes, what it records, what it makes of texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nlpinf.adapters.elmo import ElmoLM, Vocabulary, draw_negatives
from nlpinf.adapters.openers import build_task
from nlpinf.errors import BadInput
from nlpinf.stages import Stage
from nlpinf.tasks import BidirectionalLM, WordClassification
from tests.cases import ELMO, randomised

WORDS = ["<S>", "</S>", "<UNK>", *(f"w{k}" for k in range(60))]
VOCABULARY = Vocabulary(WORDS)
TEXTS = ["w1 w7 w3", "w0", "w2 w59 other w4"]


def ids(task: BidirectionalLM, step: int | None = None) -> list[int]:
    """The negatives of a batch of losses, or of a step of training."""
    encoded = task.encode(TEXTS)
    batch = task.collate(encoded, [0, 1, 2]) if step is None else task.training_batch(encoded, [0, 1, 2], 0, step)
    return batch.inputs["negatives"].flatten().tolist()


def test_the_softmax_is_full_up_to_50_000_words_and_else_sampled_with_8_192() -> None:
    large = Vocabulary(["<S>", "</S>", "<UNK>", *map(str, range(50_001 - 3))])
    assert BidirectionalLM(large).negatives == 8192 and len(ids(BidirectionalLM(large))) == 8192
    assert BidirectionalLM(Vocabulary(large.words[:-1])).negatives == 0
    assert BidirectionalLM(large, negatives=0).fixed is None
    with pytest.raises(BadInput, match="fewer than the vocabulary's 63 words"):
        BidirectionalLM(VOCABULARY, negatives=63)


def test_negatives_are_fixed_by_the_seed_and_recorded() -> None:
    task = BidirectionalLM(VOCABULARY, negatives=9, seed=5)
    assert ids(task) == draw_negatives(63, 5, 9).ids.tolist()
    recorded = task.settings()
    assert recorded["negatives"] == 9 and recorded["seed"] == 5
    again: Any = build_task(recorded, VOCABULARY)
    assert ids(again) == ids(task) and again.settings() == recorded
    assert ids(BidirectionalLM(VOCABULARY, negatives=9, seed=6)) != ids(task)
    with pytest.raises(BadInput, match="sha256 differs"):
        build_task(recorded, Vocabulary([*WORDS[:-2], *WORDS[:-3:-1]]))


def test_training_draws_others_at_each_step_by_seed_and_step() -> None:
    task = BidirectionalLM(VOCABULARY, negatives=9, seed=5)
    drawn = [ids(task, step) for step in range(4)]
    assert len({tuple(d) for d in [*drawn, ids(task)]}) == 5
    assert drawn == [ids(BidirectionalLM(VOCABULARY, negatives=9, seed=5), step) for step in range(4)]


def test_the_sampled_loss_is_near_the_full_one_and_nearer_with_more_negatives() -> None:
    """Over draws its mean is a little too low (Jensen), by less with more negatives."""
    model = randomised(ElmoLM(ELMO, len(VOCABULARY)).double(), 1)
    gaps = []
    for negatives in (0, 10, 30, 55):
        losses = []
        for seed in range(1 if negatives == 0 else 40):
            task = BidirectionalLM(VOCABULARY, max_characters=8, negatives=negatives, seed=seed)
            losses.append(Stage(model, task, TEXTS).objective())
        gaps.append(sum(losses) / len(losses))
    full, *sampled = gaps
    errors = [abs(loss - full) for loss in sampled]
    assert errors[2] < 0.1 * full and errors[2] < errors[0] and errors[1] < errors[0], gaps


def test_texts_are_their_words() -> None:
    task = BidirectionalLM(VOCABULARY, max_length=3)
    assert task.encode(["w1  w7\tw3 w4", ["w1", "w 2"], {"text": "w9"}]) == [["w1", "w7", "w3"], ["w1", "w 2"], ["w9"]]
    for text, message in [
        ("", "has no word"),
        ([], "has no word"),
        ("w1 a\x07b", r"the text 'w1 a\\x07b': the word 'a\\x07b' has the control character U\+0007"),
        (["w1", ""], "a word is empty"),
    ]:
        for one in (task, WordClassification()):
            with pytest.raises(BadInput, match=message):
                one.encode([text if one is task else {"text": text, "label": 0}])
    with pytest.raises(BadInput, match="4 words, more than 3"):
        BidirectionalLM(VOCABULARY, max_length=3, long="error").encode(["w1 w2 w3 w4"])


def test_a_token_of_the_text_has_its_place() -> None:
    spans = BidirectionalLM(VOCABULARY, max_length=3).spans("  w1 é\tw3 w4")
    assert spans == ([(0, 0), (2, 4), (5, 6), (7, 9), (0, 0)], ["<S>", "w1", "é", "w3", "</S>"])


def test_items_are_forward_then_backward_by_sentence() -> None:
    batch = BidirectionalLM(VOCABULARY, max_characters=8).collate([["w1", "w7"], ["w0"]], [4, 9])
    one = [VOCABULARY.ids[w] for w in ("w1", "w7", "</S>", "<S>", "w1", "w7")]
    two = [VOCABULARY.ids[w] for w in ("w0", "</S>", "<S>", "w0")]
    assert batch.targets.tolist() == [*one, *two] and torch.equal(batch.shown, batch.targets)  # type: ignore[arg-type]
    assert batch.example.tolist() == [0] * 6 + [1] * 4 and batch.rows.tolist() == [4, 9]
    assert batch.position is not None and batch.position.tolist() == [1, 2, 3, 0, 1, 2, 5, 6, 4, 5]
