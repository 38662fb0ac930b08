"""The words that the language model predicts: bilm-tf's vocabulary file, one word a line, most frequent first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nlpinf.data.characters import BEGIN, END
from nlpinf.errors import BadInput

UNKNOWN = "<UNK>"
SPECIAL = (BEGIN, END, UNKNOWN)


class Vocabulary:
    """Words and their ids: a word's id is its row in the softmax."""

    def __init__(self, words: Sequence[str], source: str = "vocabulary") -> None:
        self.words = list(words)
        self.source = source
        # As in bilm-tf, the last of equal lines counts.
        self.ids = {word: k for k, word in enumerate(self.words)}
        for word in SPECIAL:
            if word not in self.ids:
                raise BadInput(f"{source}: no line {word}; expected {', '.join(SPECIAL)} among the words, add it")
        self.begin, self.end, self.unknown = (self.ids[word] for word in SPECIAL)

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the words in order, UTF-8, each followed by "\\n": that of the file that `write` makes."""
        return hashlib.sha256("".join(word + "\n" for word in self.words).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def read(cls, path: str | Path, size: int | None = None) -> Vocabulary:
        """Read a vocabulary file; `size`, where given, is the number of rows of the softmax it must fit."""
        try:
            with open(path, encoding="utf-8") as file:
                words = [line.strip() for line in file]
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file; give the vocabulary that the model was trained with") from None
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: not UTF-8 at byte {error.start}; convert it") from None
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror}); check the file") from None
        # bilm-tf's released vocabulary ends in this mark, which is no word.
        vocabulary = cls([word for word in words if word != "!!!MAXTERMID"], str(path))
        if size is not None:
            vocabulary.check_size(size)
        return vocabulary

    def check_size(self, rows: int, softmax: str = "the softmax") -> None:
        if len(self) != rows:
            raise BadInput(
                f"{self.source}: {len(self)} words, but {softmax} has {rows} rows; give the vocabulary that it was "
                "trained with"
            )

    @classmethod
    def build(cls, sentences: Iterable[Sequence[str]], size: int | None = None, minimum: int = 1) -> Vocabulary:
        """The words of a corpus that occur at least `minimum` times, at most `size` with the three special ones.

        In order of falling count, equal counts by code point; the special words stand first.
        """
        counts = Counter(word for words in sentences for word in words)
        kept = [word for word, count in counts.items() if count >= minimum and word not in SPECIAL]
        kept.sort(key=lambda word: (-counts[word], word))
        if size is not None:
            if size < len(SPECIAL):
                raise BadInput(f"vocabulary: size is {size}, expected at least {len(SPECIAL)}")
            kept = kept[: size - len(SPECIAL)]
        return cls([*SPECIAL, *kept])

    def write(self, path: str | Path) -> None:
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text("".join(word + "\n" for word in self.words), encoding="utf-8")
        part.replace(path)

    def encode(self, words: Sequence[str]) -> list[int]:
        """The ids of a sentence, `<S>` and `</S>` added; words that are not listed become `<UNK>`."""
        return [self.begin, *(self.ids.get(word, self.unknown) for word in words), self.end]

    def batch(self, sentences: Sequence[Sequence[str]]) -> Tensor:
        """Word ids (B, T) of a batch, in step with `character_batch(sentences).index`; 0 past a sentence's end."""
        rows = [self.encode(words) for words in sentences]
        width = max(len(row) for row in rows)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
