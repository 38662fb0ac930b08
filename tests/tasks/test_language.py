"""Text tasks: masks, counted positions and losses, against the Hugging Face models' own losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForMaskedLM, BertForSequenceClassification, GPT2ForSequenceClassification, GPT2LMHeadModel

from nlpinf.errors import BadInput
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import CausalLM, MaskedLM, SequenceClassification
from tests.cases import LABELLED, MORE_TEXTS, TEXTS, bert_config, gpt2_config, randomised, tokenizer
from tests.oracle import uniform

ALL = [*TEXTS, *MORE_TEXTS, "a", "the the the the the the the"]


def masked(**settings: Any) -> MaskedLM:
    return MaskedLM(tokenizer(), 12, **{"probability": 0.4, "seed": 9, **settings})


def masks_by_row(task: MaskedLM, encoded: list[list[int]], rows: list[int]) -> dict[int, list[tuple]]:
    """Return what each row was shown and asked, without its padding: (mask number, input ids, counted places, targets)."""
    batch = task.collate(encoded, rows)
    width = batch.inputs["input_ids"].shape[1]
    seen: dict[int, list[tuple]] = {}
    for s, (ids, attention) in enumerate(zip(batch.inputs["input_ids"], batch.inputs["attention_mask"])):
        here = batch.position // width == s
        places = (batch.position[here] % width).tolist()
        row = rows[int(batch.sequence[s])]
        assert batch.example[here].eq(batch.sequence[s]).all()
        shown = ids[attention.bool()].tolist()
        seen.setdefault(row, []).append((shown, places, batch.targets[here].tolist()))
    return seen


@pytest.mark.parametrize("masks", [1, 3])
def test_masks_are_a_function_of_seed_and_row(masks: int) -> None:
    """Alone, in any batch, in another order and under other padding a row gets the same masks."""
    task = masked(masks=masks)
    encoded = task.encode(ALL)
    rows = [100 + 7 * i for i in range(len(ALL))]
    whole = masks_by_row(task, encoded, rows)
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    assert masks_by_row(task, [encoded[i] for i in order], [rows[i] for i in order]) == whole
    for i, row in enumerate(rows):
        assert masks_by_row(task, [encoded[i]], [row])[row] == whole[row]
        assert len(whole[row]) == masks
    assert masks_by_row(masked(masks=masks, seed=10), encoded, rows) != whole
    assert masks_by_row(task, encoded, [r + 1 for r in rows]).values() != whole.values()
    if masks > 1:
        assert any(shown[0] != shown[1] for shown in whole.values())  # the K masks of a sentence differ
        single = masked()
        assert {row: shown[:1] for row, shown in whole.items()} == masks_by_row(single, encoded, rows)


def test_masks_are_those_of_the_published_recipe() -> None:
    """Against a loop in plain Python: the smallest draws of (seed, row, mask, place) win, then 80 % / 10 % / 10 %."""
    task = masked(masks=2, probability=0.5)
    words = [i for i in range(16) if i == 1 or i > 4]  # the unknown word is a word, the other special tokens are none
    for row, text in enumerate(ALL):
        (ids,) = task.encode([text])
        places = [t for t, i in enumerate(ids) if i in words]
        for number, (shown, counted, targets) in enumerate(masks_by_row(task, [ids], [row])[row]):
            wanted = max(1, round(0.5 * len(places)))
            chosen = sorted(sorted(places, key=lambda t: uniform(9, row, number, t))[:wanted])
            assert counted == chosen
            assert targets == [ids[t] for t in chosen]
            expected = list(ids)
            for t in chosen:
                kind = uniform(10, row, number, t)
                if kind < 0.8:
                    expected[t] = tokenizer().mask_token_id
                elif kind >= 0.9:
                    expected[t] = words[int(uniform(11, row, number, t) * len(words))]
            assert shown == expected


def test_shares_of_mask_random_and_kept_words() -> None:
    task = masked(probability=0.5)
    batch = task.collate([[2, *[5 + j % 11 for j in range(10)], 3]] * 800, range(800))
    shown = batch.inputs["input_ids"].flatten()[batch.position]
    n = len(shown)
    assert n == 800 * 5
    share = float((shown == tokenizer().mask_token_id).float().mean())
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / n) ** 0.5
    kept = float((shown == batch.targets).float().mean())  # 10 %, and a random word may be the word itself
    assert abs(kept - (0.1 + 0.1 / 12)) < 4 * (0.1 * 0.9 / n) ** 0.5
    places = torch.bincount(batch.position % 12, minlength=12)
    assert places[[0, 11]].eq(0).all()  # [CLS] and [SEP] are never masked
    assert (places[1:11] - 400).abs().max() < 5 * (800 * 0.25) ** 0.5


@pytest.mark.parametrize("probability", [0.15, 0.3, 0.35, 0.5, 0.07])
def test_counted_is_what_collate_counts(probability: float) -> None:
    """Over every length to 300, where the two roundings could part."""
    long = MaskedLM(tokenizer(), 400, probability=probability, masks=2)
    for start in range(1, 301, 50):
        encoded = [[2, *[5] * n, 3] for n in range(start, start + 50)]
        batch = long.collate(encoded, range(50))
        assert long.counted(encoded) == len(batch.targets)
        assert [long.counted([e]) for e in encoded] == batch.counts.tolist()


def test_counted_of_the_other_tasks() -> None:
    for task, examples in [
        (CausalLM(tokenizer(), 12), ALL),
        (CausalLM(tokenizer(), 12, boundaries=True), ALL),
        (SequenceClassification(tokenizer(), 12), LABELLED),
        (masked(), ["", "a", "[MASK] [SEP]"]),
    ]:
        encoded = task.encode(examples)
        assert task.counted(encoded) == len(task.collate(encoded, range(len(encoded))).targets)


def double(model: torch.nn.Module) -> torch.nn.Module:
    return randomised(model.double(), 1).eval()


def padded(ids: list[list[int]], fill: int) -> Tensor:
    width = max(len(i) for i in ids)
    return torch.tensor([[*i, *[fill] * (width - len(i))] for i in ids])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masked_lm_losses_are_the_models_own(attention: str) -> None:
    model = double(BertForMaskedLM._from_config(bert_config(max_position_embeddings=16), attn_implementation=attention))
    task = masked(masks=2)
    stage = Stage(model, task, ALL, reduction="token", batch_size=64)
    (batch,) = stage.batches()
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels.view(-1)[batch.position] = batch.targets
    own = model(**batch.inputs, labels=labels).loss
    losses = task.losses(task.outputs(model, batch), batch)
    assert losses.mean().item() == pytest.approx(own.item(), rel=1e-12)
    assert stage.objective() == pytest.approx(own.item(), rel=1e-12)  # "token": the mean over all items


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_causal_lm_losses_are_the_models_own(attention: str) -> None:
    model = double(GPT2LMHeadModel._from_config(gpt2_config(n_positions=16), attn_implementation=attention))
    task = CausalLM(tokenizer(), 12)
    stage = Stage(model, task, ALL, reduction="token", batch_size=64)
    ids = [tokenizer()(text)["input_ids"] for text in ALL]
    inputs = {"input_ids": padded(ids, 0), "attention_mask": padded([[1] * len(i) for i in ids], 0)}
    with evaluation(model):
        result = model(**inputs, labels=padded(ids, -100))
    logits, labels = result.logits[:, :-1].flatten(0, 1), padded(ids, -100)[:, 1:].flatten()
    assert stage.objective() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)
    assert stage.objective() == pytest.approx(result.loss.item(), rel=1e-6)  # the model takes its loss in float32
    # "example": the mean over sentences of each one's own mean
    with evaluation(model):
        each = [
            F.cross_entropy(model(input_ids=torch.tensor([i])).logits[0, :-1], torch.tensor(i[1:])).item() for i in ids
        ]
    by_example = Stage(model, task, ALL, reduction="example", batch_size=3)
    assert by_example.objective() == pytest.approx(sum(each) / len(each), rel=1e-12)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_classification_losses_are_the_models_own(architecture: str) -> None:
    cls, config = {
        "bert": (BertForSequenceClassification, bert_config()), "gpt2": (GPT2ForSequenceClassification, gpt2_config()),
    }[architecture]  # fmt: skip
    model = double(cls(config))
    task = SequenceClassification(tokenizer(), 9)
    ids = [tokenizer()(e["text"])["input_ids"] for e in LABELLED]
    inputs = {"input_ids": padded(ids, 0), "attention_mask": padded([[1] * len(i) for i in ids], 0)}
    with evaluation(model):
        own = model(**inputs, labels=torch.tensor([e["label"] for e in LABELLED])).loss
    assert Stage(model, task, LABELLED, batch_size=2).objective() == pytest.approx(own.item(), rel=1e-12)


def test_boundaries_count_the_first_word() -> None:
    plain, bounded = CausalLM(tokenizer(), 12), CausalLM(tokenizer(), 12, boundaries=True)
    ids = [[5, 6, 7]]
    assert plain.collate(plain.encode(ids), [0]).targets.tolist() == [6, 7]
    assert bounded.collate(bounded.encode(ids), [0]).targets.tolist() == [5, 6, 7, 3]
    assert bounded.encode([[5] * 30])[0][:2] == [2, 5]
    assert len(bounded.encode([[5] * 30])[0]) == 12


def test_outputs_are_made_at_counted_positions_only() -> None:
    model = double(BertForMaskedLM(bert_config()))
    task = masked()
    batch = task.collate(task.encode(TEXTS), range(len(TEXTS)))
    rows: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.shape[0]))
    outputs = task.outputs(model, batch)
    handle.remove()
    assert rows == [len(batch.targets)]
    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.position]
    assert torch.allclose(outputs, logits, rtol=0, atol=1e-14)


def test_token_ids_texts_and_mappings_are_the_same_examples() -> None:
    task = CausalLM(tokenizer(), 12)
    ids = task.encode(TEXTS)
    assert task.encode(ids) == ids
    assert task.encode([{"text": t, "source": "x"} for t in TEXTS]) == ids
    assert task.encode([]) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masked(probability=0.0), "between 0 and 1"),
        (lambda: masked(masks=0), "at least one mask"),
        (lambda: CausalLM(tokenizer(), 1), "at least 2 tokens"),
        (lambda: SequenceClassification(tokenizer(), labels=1), "at least 2 classes"),
        (
            lambda: SequenceClassification(tokenizer()).encode([{"text": "a", "label": 2}]),
            "label 2 is outside the range 0 to 1",
        ),
        (lambda: SequenceClassification(tokenizer()).encode([{"text": "a", "label": -1}]), "label -1"),
        (lambda: SequenceClassification(tokenizer()).encode([{"text": "a", "label": "1"}]), "label '1'"),
        (lambda: SequenceClassification(tokenizer()).encode([{"text": "a"}]), "label"),
    ],
)
def test_bad_settings_and_labels_are_refused(make: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as e:
        make()
    assert "\n" not in str(e.value)
