"""A recipe of a bidirectional language model with both transfers on one pretraining, and rows that are held out."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from nlpinf import Stage
from nlpinf import parameters as P
from nlpinf.adapters.huggingface import chain_from_runs
from tests.cli.common import nlpinf, recipe, sentences, write_data, write_recipe

MODEL = {"preset": "small", "filters": [[1, 4], [2, 6]], "lstm_dim": 8, "projection_dim": 5, "character_dim": 3}


def test_both_transfers_share_one_pretraining(tmp_path: Path) -> None:
    data, out, result = write_data(tmp_path / "data"), tmp_path / "run", tmp_path / "result.json"
    changes = {
        "pretrain__task": "bilm", "pretrain__model": MODEL, "pretrain__vocabulary": 30, "pretrain__held_out": 12,
        "pretrain__negatives": 8, "pretrain__training__learning_rate": 0.02,
        "finetune__transfer": ["frozen", "proximity"], "finetune__head": {"pooling": "max"},
        "remove": {"share": 0.1, "random": 1, "helpful": False},
    }  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", recipe(data, **changes))
    ended = nlpinf("run", path, "--out", out, "--result", result, "--json")
    assert ended.status == 0, ended

    pretrained = Stage.from_run(out / "pretrain")
    assert list(pretrained.data) == sentences()[:48] and pretrained.task.negatives == 8  # type: ignore[attr-defined]
    found = json.loads(result.read_text(encoding="utf-8"))
    assert list(found) == list(ended.json) == ["frozen", "proximity"]
    # Under the full softmax, though the run's is sampled.
    words, model = pretrained.task.vocabulary, pretrained.model  # type: ignore[attr-defined]
    total, count = 0.0, 0
    for text in sentences()[48:]:
        encoded = [text.split()]
        inputs = pretrained.task.spelling.inputs(encoded)  # type: ignore[attr-defined]
        ids = words.encode(encoded[0])
        own = torch.tensor([*ids[1:], *ids[:-1]])
        with torch.no_grad():
            total += float(torch.nn.functional.cross_entropy(model(**inputs), own, reduction="sum"))
        count += len(own)
    texts = {
        name: (out / "frozen/data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("train", "test")
    }
    rows = {name: [json.loads(line) for line in lines] for name, lines in texts.items()}
    known = sorted({word for row in rows["train"] for word in row["text"].split()})
    x, asked = (
        [[Counter(row["text"].split())[word] for word in known] for row in rows[name]] for name in ("train", "test")
    )
    bag = LogisticRegression(max_iter=1000).fit(x, [row["label"] for row in rows["train"]])
    expected = bag.score(asked, [row["label"] for row in rows["test"]])

    for case, one in found.items():
        measured = one["test"]
        assert measured["perplexity"]["after"] == pytest.approx(math.exp(total / count), rel=1e-5)
        assert (
            measured["perplexity"]["before"] > measured["perplexity"]["after"] and measured["perplexity"]["rows"] == 12
        )
        assert measured["bag_of_words_accuracy"] == pytest.approx(expected)
        assert [entry["removed"] for entry in one["removal"]] == ["most harmful", "random 1"]
        assert one["rows_scored"] == 48 and len(one["harmful"]) == 5
        chain = chain_from_runs([out / "pretrain", out / case / "finetune"])
        record = chain.stages[1].record
        if case == "frozen":
            assert record["training"]["optimum"]["gradient"] <= 1e-8 and P.norm(chain.stages[1].gradient()) < 1e-5
            assert record["transfer"] == "frozen" and not chain.links[1].moved
        else:
            assert record["transfer"] == {"proximity": 0.03} and chain.links[1].moved
    removed = [json.loads((out / case / "removal/random-1.json").read_text(encoding="utf-8")) for case in found]
    assert removed[0]["rows"] == removed[1]["rows"] and removed[0]["actual"] != removed[1]["actual"]
    # Its pretraining is part of the first one's time alone, and so is not known where it was done before.
    assert all(found[case]["seconds"] is not None for case in found)
    for case in found:
        shutil.rmtree(out / case)
    assert nlpinf("run", path, "--out", out, "--result", result).status == 0
    again = json.loads(result.read_text(encoding="utf-8"))
    assert again["frozen"]["seconds"] is None and again["proximity"]["seconds"] is not None
    assert again["frozen"]["test"] == found["frozen"]["test"]
    # Both were finetuned on the same pretraining without these rows, so each is what its own recipe alone gives.
    alone = write_recipe(tmp_path / "one.yaml", recipe(data, **{**changes, "finetune__transfer": "proximity"}))
    assert nlpinf("run", alone, "--out", tmp_path / "alone").status == 0
    again = json.loads((tmp_path / "alone/removal/random-1.json").read_text(encoding="utf-8"))
    assert again["losses"] == removed[1]["losses"]
    assert (tmp_path / "alone/pretrain/model.safetensors").read_bytes() == (
        out / "pretrain/model.safetensors"
    ).read_bytes()
