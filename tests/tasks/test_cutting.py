"""Long texts: what is kept of them is what tokenizing them whole keeps, and which were cut is told."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import nlpinf.tasks.cutting as cutting
from nlpinf.tasks import CausalLM, SequenceClassification
from nlpinf.tasks.cutting import splits_at_spaces, token_ids

P, N = pre_tokenizers, normalizers
# The kinds of BERT, GPT-2, T5 and ALBERT, and of RoBERTa's relatives that divide digits.
SPLITTING: dict[str, tuple[Any, Any, Any]] = {
    "bert": (models.WordPiece(unk_token="<unk>"), N.BertNormalizer(), P.BertPreTokenizer()),
    "gpt2": (models.BPE(), None, P.ByteLevel(add_prefix_space=False)),
    "digits": (models.BPE(), N.NFC(), P.Sequence([P.Digits(individual_digits=True), P.ByteLevel()])),
    "albert": (models.Unigram(), N.Sequence([N.Replace("``", '"'), N.NFKD(), N.StripAccents()]), P.Metaspace()),
}
WHOLE: dict[str, tuple[Any, Any, Any]] = {
    "llama": (models.BPE(), N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")]), None),
    "one piece": (models.BPE(), None, P.Metaspace(split=False)),
    "no regular expression": (models.BPE(), None, P.ByteLevel(use_regex=False)),
}
WORDS = [
    "the",
    "film",
    "wasn't",
    "naïve",
    "ΟΔΟΣ",
    "x" * 40,
    "3,141",
    "``so''",
    "日本語",
    "!?",
    "e\u0301t\u0301",
    "<unk>",
]
SPACES = [" ", " ", " ", "  ", "\n", "\t ", "\u00a0", " \u2028 "]


def text(words: int, seed: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(SPACES) for _ in range(words))


def made(model: Any, normalizer: Any, splitter: Any, **options: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(model)
    if normalizer is not None:
        core.normalizer = normalizer
    if splitter is not None:
        core.pre_tokenizer = splitter
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    kinds = {
        models.WordPiece: (trainers.WordPieceTrainer, {}),
        models.BPE: (trainers.BpeTrainer, {"initial_alphabet": P.ByteLevel.alphabet()}),
        models.Unigram: (trainers.UnigramTrainer, {"unk_token": "<unk>"}),
    }
    trainer, more = kinds[type(model)]
    corpus = [text(12, 1000 + i) for i in range(200)]
    core.train_from_iterator(corpus, trainer(vocab_size=400, special_tokens=special, show_progress=False, **more))
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 2), ("</s>", 3)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, **options)


@pytest.mark.parametrize("kind", SPLITTING)
def test_a_prefix_gives_the_ids_of_the_whole_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made(*SPLITTING[kind])
    assert splits_at_spaces(tokenizer)
    monkeypatch.setattr(cutting, "_PREFIX", 1)  # short prefixes, many of which do not fill the length at first
    texts = [text(n, n) for n in range(1, 160, 3)] + [text(400, i) for i in range(20)] + ["a" * 300, " " * 99 + "a b"]
    lengths: list[int] = []
    encoded = cutting._encoded

    def watched(tokenizer: Any, given: Any, max_length: int) -> Any:
        lengths.extend(map(len, given))
        return encoded(tokenizer, given, max_length)

    monkeypatch.setattr(cutting, "_encoded", watched)
    for max_length in (8, 20):
        whole = tokenizer(texts)["input_ids"]
        expected = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        ids, cut = token_ids(tokenizer, texts, max_length)
        assert ids == expected
        assert cut.tolist() == [len(each) > max_length for each in whole]
    assert sum(lengths) < 2 * sum(map(len, texts)) * 0.8  # so prefixes were what was tokenized


@pytest.mark.parametrize("kind", WHOLE)
def test_other_tokenizers_see_the_whole_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made(*WHOLE[kind])
    assert not splits_at_spaces(tokenizer)
    monkeypatch.setattr(cutting, "_PREFIX", 1)
    texts = [text(n, n) for n in (2, 30, 200)]
    ids, cut = token_ids(tokenizer, texts, 10)
    assert ids == tokenizer(texts, truncation=True, max_length=10)["input_ids"] and cut.tolist()[1:] == [True, True]


def test_tokens_with_spaces_and_cuts_on_the_left_see_the_whole_text() -> None:
    spaced = made(*SPLITTING["gpt2"])
    spaced.add_tokens(["film noir"])
    assert not splits_at_spaces(spaced)
    assert not splits_at_spaces(made(*SPLITTING["gpt2"], truncation_side="left"))


def test_a_very_long_line_costs_no_more_than_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made(*SPLITTING["bert"])
    given: list[int] = []
    encoded = cutting._encoded
    monkeypatch.setattr(cutting, "_encoded", lambda t, x, m: (given.extend(map(len, x)), encoded(t, x, m))[1])
    ids, cut = token_ids(tokenizer, ["the film " * 1_200_000, "the film"], 16)
    assert len(ids[0]) == 16 and cut.tolist() == [True, False] and max(given) < 10_000


def test_tasks_tell_what_they_cut() -> None:
    tokenizer = made(*SPLITTING["gpt2"])
    texts = ["the film", text(60, 1), "the"]
    exact = len(tokenizer("the film")["input_ids"])
    lm = CausalLM(tokenizer, exact)
    ids, cut = lm.encode_marked(texts)
    assert ids == lm.encode(texts) and cut is not None and cut.tolist() == [False, True, False]
    ends = CausalLM(tokenizer, exact + 1, boundaries=True)  # the two ends that it adds do not fit
    assert ends.encode_marked(texts)[1].tolist() == [True, True, False] or len(ids[2]) == exact
    rows, cut = CausalLM(tokenizer, 3).encode_marked([[1, 2, 3], [1, 2, 3, 4]])
    assert rows == [[1, 2, 3], [1, 2, 3]] and cut.tolist() == [False, True]
    _, cut = SequenceClassification(tokenizer, 5).encode_marked([{"text": t, "label": 0} for t in texts])
    assert cut.tolist()[1:] == [True, False]
    assert CausalLM(tokenizer, 3).encode_marked([])[1].tolist() == np.zeros(0, bool).tolist()
