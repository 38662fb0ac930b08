"""What a run minimised and no task here has: losses of sentence pairs, and smoothed labels. Refused, or assumed away and said so."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import BertForSequenceClassification

from nlpinf import StageRecorder
from nlpinf.adapters.folders import RECORD
from nlpinf.adapters.plain import Told
from nlpinf.adapters.runs import stage_from_run
from nlpinf.data.labelled import read_examples
from nlpinf.errors import BadInput
from tests.cases import tokenizer
from tests.cli.common import labelled, nlpinf, refused, write_data
from tests.integrations.common import bert, finetuning, trained


def _run(folder: Path, *, paired: bool = False, **changes: float) -> Path:
    trainer = finetuning(
        folder, [StageRecorder()], BertForSequenceClassification(bert()), num_train_epochs=1, **changes
    )
    ids = [tokenizer()(row["text"])["input_ids"] for row in labelled()]
    segments = [[int(paired and k > len(one) // 2) for k in range(len(one))] for one in ids]
    columns = {"input_ids": ids, "token_type_ids": segments, "label": [row["label"] for row in labelled()]}
    trainer.train_dataset = Dataset.from_dict(columns)
    return trained(trainer)


def test_a_recorded_run_on_pairs_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = _run(tmp_path / "pairs", paired=True)
    assert any("pairs of sentences" in line for line in caplog.messages)
    with pytest.raises(BadInput, match=r"nlpinf_stage.json: the run's rows have a second segment, so it is on pairs"):
        stage_from_run(run)
    refused(nlpinf("check", run), "nlpinf_stage.json", "pairs of sentences")


def test_segments_that_are_all_the_first_are_no_pairs(tmp_path: Path) -> None:
    run = _run(tmp_path / "single")
    assert "pairs" not in json.loads((run / RECORD).read_text()) and stage_from_run(run).size == 24


def test_plain_folders_and_rows_of_pairs_are_refused(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    (run / RECORD).unlink()
    write_data(tmp_path / "data")
    told = Told(str(tmp_path / "data/rows.jsonl"), max_length=16)
    assert stage_from_run(run, told=told).size == 24
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**content, "finetuning_task": "mrpc"}))
    with pytest.raises(BadInput, match=r"config.json: the finetuning task is mrpc, so it is on pairs of sentences"):
        stage_from_run(run, told=told)
    row = {"premise": "a plot", "hypothesis": "a film", "label": 1}
    (tmp_path / "nli.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput, match=r"nli.jsonl: line 1 is a pair of sentences, 'premise' and 'hypothesis'"):
        read_examples(tmp_path / "nli.jsonl", ["no", "yes"], text_column="premise")
    (tmp_path / "one.jsonl").write_text(json.dumps({**row, "hypothesis": None}) + "\n")
    assert read_examples(tmp_path / "one.jsonl", ["no", "yes"], text_column="premise") == [
        {"text": "a plot", "label": 1}
    ]


def test_smoothed_labels_are_refused_or_assumed_away(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", label_smoothing_factor=0.1)
    with pytest.raises(BadInput, match="was trained with label smoothing"):
        stage_from_run(run)
    plain = tmp_path / "plain"
    shutil.copytree(run, plain)
    (plain / RECORD).unlink()
    write_data(tmp_path / "data")
    where = str(tmp_path / "data/rows.jsonl")
    with pytest.raises(BadInput, match="plain: was trained with label smoothing"):
        stage_from_run(plain, told=Told(where, max_length=16, read_arguments=True))
    assumed = stage_from_run(plain, told=Told(where, max_length=16)).record["assumed"]
    assert [line for line in assumed if "label smoothing" in line and "--read-training-args" in line]
