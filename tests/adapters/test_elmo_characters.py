"""Words to character ids as bilm-tf has them, and words that cannot be used."""

from __future__ import annotations

import pytest
import torch

from nlpinf.adapters import elmo
from nlpinf.errors import NlpinfError


def test_ids_of_a_word() -> None:
    ids, cut = elmo.word_characters("né")
    assert ids[:6] == [259, ord("n") + 1, 0xC3 + 1, 0xA9 + 1, 260, 261]
    assert len(ids) == 50 and set(ids[5:]) == {261} and not cut


def test_boundaries() -> None:
    assert elmo.word_characters("<S>")[0][:4] == [259, 257, 260, 261]
    assert elmo.word_characters("</S>")[0][:4] == [259, 258, 260, 261]


def test_long_words() -> None:
    assert not elmo.word_characters("x" * 48)[1]
    ids, cut = elmo.word_characters("x" * 49)
    assert cut and ids == [259, *[121] * 48, 260]
    # Bytes count, not characters, and the cut may fall inside a character.
    ids, cut = elmo.word_characters("x" + "é" * 30)
    assert cut and ids[48:] == [0xC3 + 1, 260]
    with pytest.raises(NlpinfError, match=r"^the word 'xxx[^\n]*has 40000 bytes, at most 48 fit[^\n]*$") as error:
        elmo.word_characters("x" * 40_000, long_words="error")
    assert len(str(error.value)) < 200
    with pytest.raises(NlpinfError, match="expected 'truncate' or 'error'"):
        elmo.word_characters("x", long_words="skip")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a\x07b", r"the word 'a\\x07b' has the control character U\+0007"),
        ("a\nb", r"the word 'a\\nb' has the control character U\+000A"),
        ("\x85", r"U\+0085"),
        ("\ud800", "not valid Unicode"),
        ("", "a word is empty"),
    ],
)
def test_words_that_cannot_be_used(word: str, message: str) -> None:
    with pytest.raises(NlpinfError, match=message) as error:
        elmo.character_batch([["fine", word]])
    assert "\n" not in str(error.value)


def test_damaged_letters_are_bytes_like_any_other() -> None:
    """U+0092 stands for an apostrophe in One Billion Word; bilm-tf reads its two bytes."""
    assert elmo.word_characters("\x92")[0][:4] == [259, 0xC2 + 1, 0x92 + 1, 260]


def test_batch() -> None:
    batch = elmo.character_batch([["a", "b", "a"], ["b" * 60]])
    assert batch.lengths.tolist() == [5, 3] and batch.truncated == 1
    assert batch.index.tolist() == [[0, 2, 3, 2, 1], [0, 4, 1, 0, 0]]
    assert batch.distinct.shape == (5, 50)
    words = ["<S>", "</S>", "a", "b", "b" * 60]
    assert torch.equal(batch.distinct, torch.tensor([elmo.word_characters(word)[0] for word in words]))


def test_batches_that_cannot_be_used() -> None:
    with pytest.raises(NlpinfError, match="sentence 1 of the batch is empty"):
        elmo.character_batch([["a"], []])
    with pytest.raises(NlpinfError, match="sentence 0 is a string"):
        elmo.character_batch(["a b"])
    with pytest.raises(NlpinfError, match="no sentences"):
        elmo.character_batch([])
    encoder = elmo.ElmoEncoder(elmo.ElmoConfig(filters=((1, 4),), highways=0, lstm_dim=4, projection_dim=4))
    batch = elmo.character_batch([["a"], ["b"]])
    with pytest.raises(NlpinfError, match="sentence 1 of the batch is empty"):
        encoder(batch.distinct, batch.index, torch.tensor([3, 2]))
    with pytest.raises(NlpinfError, match="does not fit 3 columns"):
        encoder(batch.distinct, batch.index, torch.tensor([3, 4]))
