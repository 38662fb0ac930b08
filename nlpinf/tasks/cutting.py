"""Token ids of texts, cut to a greatest length, and which texts lost something by that.

A text much longer than what is kept is not tokenized whole where that cannot matter: if the tokenizer splits at white space
before all else, the words before a space are tokenized as if nothing followed, so a prefix that fills the greatest length
gives the same ids. Whether a tokenizer is of that kind is read from its definition; of others all texts are tokenized whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

_PREFIX = 32  # characters a token in the first prefix that is tried
_GROWTH = 4
_BEFORE_SPACE = re.compile(r"(?<=\S)(?= \S)")
_LOCAL = {
    "BertNormalizer",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "StripAccents",
    "Strip",
    "Prepend",
    "Precompiled",
}
_SPLITTING = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_DIVIDING = {"Digits", "Punctuation"}


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> tuple[list[list[int]], np.ndarray]:
    """Return the ids of every text, at most `max_length`, special ones included, and which texts were cut, (n,) bool."""
    ends = _ends(tokenizer, texts, _PREFIX * max_length)
    found, cut = _encoded(
        tokenizer, [text if end is None else text[:end] for text, end in zip(texts, ends)], max_length
    )
    size = _PREFIX * max_length
    while short := [i for i, end in enumerate(ends) if end is not None and not cut[i]]:  # the prefix did not fill it
        size *= _GROWTH
        longer = _ends(tokenizer, [texts[i] for i in short], size)
        again, more = _encoded(
            tokenizer, [texts[i] if end is None else texts[i][:end] for i, end in zip(short, longer)], max_length
        )
        for i, end, ids, lost in zip(short, longer, again, more):
            ends[i], found[i], cut[i] = end, ids, lost
    return found, cut


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> tuple[list[list[int]], np.ndarray]:
    result = tokenizer(
        list(texts), truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
    )
    if tokenizer.is_fast:
        cut = [bool(encoding.overflowing) for encoding in result.encodings]
    else:  # not told: a text that fills the length is tokenized again
        full = [i for i, ids in enumerate(result["input_ids"]) if len(ids) >= max_length]
        cut = [False] * len(texts)
        for i in full:
            cut[i] = len(tokenizer(texts[i], verbose=False)["input_ids"]) > max_length
    return result["input_ids"], np.array(cut, bool)


def _ends(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int) -> list[int | None]:
    """Return for each text where a prefix of about `size` characters may end, None if all of it must be tokenized."""
    if all(len(text) <= 2 * size for text in texts) or not splits_at_spaces(tokenizer):
        return [None] * len(texts)
    found: list[int | None] = []
    for text in texts:
        place = _BEFORE_SPACE.search(text, size) if len(text) > 2 * size else None
        found.append(None if place is None else place.start())
    return found


def splits_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the tokens of a text's beginning, up to a space after a word, do not depend on what follows."""
    if not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return False
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    if any(re.search(r"\s", token["content"]) for token in definition["added_tokens"]):
        return False  # it may lie across the end
    return _all_local(definition["normalizer"]) and _some_split(definition["pre_tokenizer"])


def _all_local(normalizer: dict[str, Any] | None) -> bool:
    """Say whether a normalizer changes nothing before a space by what comes after."""
    if normalizer is None or normalizer["type"] in _LOCAL:
        return True
    if normalizer["type"] == "Sequence":
        return all(_all_local(each) for each in normalizer["normalizers"])
    if normalizer["type"] != "Replace":
        return False
    pattern = normalizer["pattern"]
    return "String" in pattern and not re.search(r"\s", pattern["String"])


def _some_split(splitter: dict[str, Any] | None) -> bool:
    """Say whether a pre-tokenizer ends a piece before every space that follows a word."""
    if splitter is None:
        return False
    kind = splitter["type"]
    if kind == "Sequence":
        parts = splitter["pretokenizers"]  # one of another kind could take the spaces away
        return any(map(_some_split, parts)) and all(p["type"] in _DIVIDING or _some_split(p) for p in parts)
    return (
        kind in _SPLITTING
        or (kind == "ByteLevel" and splitter["use_regex"])
        or (kind == "Metaspace" and splitter["split"])
    )
