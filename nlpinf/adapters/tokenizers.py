"""Train a small tokenizer on a corpus, with the `tokenizers` library; the same texts give the same tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nlpinf.errors import BadInput

TokenizerKind = Literal["wordpiece", "bpe"]
_PREFIX = "##"
_ALPHABET = 1000  # characters that are kept, the most frequent ones


def train_tokenizer(
    kind: TokenizerKind, texts: Iterable[str], size: int, *, lowercase: bool = True
) -> PreTrainedTokenizerFast:
    """Return a BERT-style WordPiece or a GPT-2-style byte-level BPE tokenizer of at most `size` words.

    WordPiece puts [CLS] before and [SEP] behind a text; BPE has <bos>, <eos> and <pad> and adds none of them. `size`
    counts these and the single characters (byte-level: 256), which are always there.
    """
    return _wordpiece(texts, size, lowercase) if kind == "wordpiece" else _bpe(texts, size)


def _wordpiece(texts: Iterable[str], size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    names = {f"{k}_token": f"[{k.upper()}]" for k in ("pad", "unk", "cls", "sep", "mask")}
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    alphabet = sorted(sorted(characters, key=lambda c: (-characters[c], c))[:_ALPHABET])
    inner = {character for word in counts for character in word[1:]}
    # The trainer numbers inner characters in the order of a hash map, and breaks ties between merges by these numbers.
    # Given among the special tokens they have fixed numbers; the tokenizer is made anew, without their being special.
    fixed = [*names.values(), *(_PREFIX + character for character in alphabet if character in inner)]
    draft = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    draft.pre_tokenizer = splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=_ALPHABET,
        continuing_subword_prefix=_PREFIX,
        show_progress=False,
    )
    draft.train_from_iterator(_repeated(counts), trainer)
    tokenizer = Tokenizer(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece(prefix=_PREFIX)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _repeated(counts: Counter[str]) -> Iterator[str]:
    for word, count in counts.items():
        yield from repeat(word, count)


def _bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(names.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokenizer_in(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder; `BadInput` if it has none.

    Where files lack, transformers 5 makes one that knows no word but its special ones, and 4 ends in a `TypeError`.
    """
    cause: TypeError | None = None
    told = ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except TypeError as error:
        cause, told = error, f" ({' '.join(str(error).split())[:160]})"  # which may be of another reason
    else:
        if len(tokenizer) > len(set(tokenizer.all_special_ids)):
            return tokenizer  # type: ignore[no-any-return]
    raise BadInput(
        f"{folder}: has no tokenizer with words in it{told}; save the run's there (tokenizer.save_pretrained, or "
        "Trainer(processing_class=tokenizer))"
    ) from cause
