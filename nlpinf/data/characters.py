"""Words to ELMo's character ids: UTF-8 bytes with marks around them, each distinct word of a batch once.

Source: bilm-tf's alphabet, every id raised by one so that 0 is free for padding, as bilm-tf and AllenNLP feed it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nlpinf.errors import BadInput

ALPHABET = 261
BEGIN_SENTENCE, END_SENTENCE, BEGIN_WORD, END_WORD, PADDING = 257, 258, 259, 260, 261
MAX_CHARACTERS = 50
# Not those of U+0080 to U+009F but the line end: they stand in real corpora (One Billion Word) for the Windows-1252
# characters that they once were, and bilm-tf reads them as it reads any other two bytes.
_CONTROL = re.compile("[\x00-\x1f\x7f\x85]")
BEGIN, END = "<S>", "</S>"
"""The boundary tokens, as bilm-tf's vocabularies spell them."""


@dataclass(frozen=True)
class CharacterBatch:
    """What `ElmoEncoder` reads: character ids of the distinct words, and where each stands."""

    distinct: Tensor  # (n, max_characters) int64
    index: Tensor  # (B, T) int64, rows of `distinct`; <S> first and </S> last in each sentence
    lengths: Tensor  # (B,) int64, the two boundaries counted
    truncated: int  # distinct words that were cut to max_characters - 2 bytes

    def to(self, device: torch.device | str) -> CharacterBatch:
        return CharacterBatch(self.distinct.to(device), self.index.to(device), self.lengths.to(device), self.truncated)


@lru_cache(1 << 16)  # a corpus repeats its words
def word_bytes(word: str) -> bytes:
    """The UTF-8 bytes of a word, or an error that says what is wrong with it."""
    if not word:
        raise BadInput("a word is empty; split sentences so that each word has at least one character")
    if found := _CONTROL.search(word):
        raise BadInput(f"the word {_shown(word)} has the control character U+{ord(found[0]):04X}; remove it")
    try:
        return word.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput(f"the word {_shown(word)} is not valid Unicode (half of a surrogate pair); repair it") from None


def word_characters(
    word: str, max_characters: int = MAX_CHARACTERS, long_words: str = "truncate"
) -> tuple[list[int], bool]:
    """The character ids of one word, `max_characters` of them, and whether the word was cut.

    begin-word, the bytes, end-word, then padding.  As in bilm-tf a word of more than `max_characters` − 2 bytes keeps
    its first ones (a character of several bytes may be cut in two), unless `long_words` is "error"; and `<S>`, `</S>`
    are the boundary tokens wherever they stand.
    """
    if long_words not in ("truncate", "error"):
        raise BadInput(f"long_words is {long_words!r}, expected 'truncate' or 'error'")
    room = max_characters - 2
    cut = False
    if word == BEGIN:
        body = [BEGIN_SENTENCE]
    elif word == END:
        body = [END_SENTENCE]
    else:
        data = word_bytes(word)
        cut = len(data) > room
        if cut and long_words == "error":
            raise BadInput(
                f"the word {_shown(word)} has {len(data)} bytes, at most {room} fit; shorten it or use "
                "long_words='truncate'"
            )
        body = [byte + 1 for byte in data[:room]]
    ids = [BEGIN_WORD, *body, END_WORD]
    return ids + [PADDING] * (max_characters - len(ids)), cut


@lru_cache(1 << 16)  # a corpus repeats its words: 17 MB of codes save most of the work of a batch
def _coded(word: str, max_characters: int, long_words: str) -> tuple[np.ndarray, bool]:
    ids, cut = word_characters(word, max_characters, long_words)
    return np.asarray(ids, np.int16), cut


def character_batch(
    sentences: Sequence[Sequence[str]], max_characters: int = MAX_CHARACTERS, long_words: str = "truncate"
) -> CharacterBatch:
    """Sentences of words, without boundaries, to one batch; `<S>` and `</S>` are added."""
    if not sentences:
        raise BadInput("a batch of no sentences; give at least one")
    rows: dict[str, int] = {BEGIN: 0, END: 1}
    lengths = []
    index: list[list[int]] = []
    for number, words in enumerate(sentences):
        if isinstance(words, str):
            raise BadInput(f"sentence {number} is a string; expected a list of words, split it first")
        if not words:
            raise BadInput(f"sentence {number} of the batch is empty; expected at least one word, drop it")
        index.append([0, *(rows.setdefault(word, len(rows)) for word in words), 1])
        lengths.append(len(words) + 2)
    width = max(lengths)
    coded = [_coded(word, max_characters, long_words) for word in rows]
    return CharacterBatch(
        torch.from_numpy(np.stack([ids for ids, _ in coded]).astype(np.int64)),
        torch.tensor([row + [0] * (width - len(row)) for row in index], dtype=torch.int64),
        torch.tensor(lengths, dtype=torch.int64),
        sum(cut for _, cut in coded),
    )


def _shown(word: str) -> str:
    text = ascii(word)
    return text if len(text) <= 60 else text[:57] + "...'"
