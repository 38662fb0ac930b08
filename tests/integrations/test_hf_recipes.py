"""The Trainer scripts of recipes/hf, under python, accelerate launch and torchrun, and the chain that their runs make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from nlpinf.adapters.chains import open_chain
from nlpinf.adapters.folders import RECORD
from nlpinf.integrations.steps import read_steps
from nlpinf.stages import Stage
from tests.cases import tokenizer
from tests.cli.common import sentences, write_data
from tests.integrations.common import bert

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}  # fmt: skip


def _launched(launcher: str, script: str, folder: Path, **options: Any) -> None:
    given = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 3e-3, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        **({"ddp_backend": "gloo"} if launcher == "torchrun" else {}), **options,
    }  # fmt: skip
    words = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    command = [*LAUNCHERS[launcher], str(ROOT / "recipes" / "hf" / script), *words]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr  # all of it: the end is the launcher's own traceback


def _prepared(folder: Path) -> Path:
    write_data(folder / "data")
    tokenizer().save_pretrained(folder / "tokenizer")
    bert(hidden_dropout_prob=0.0).save_pretrained(folder / "bert")
    GPT2Config(vocab_size=len(tokenizer()), n_embd=16, n_layer=1, n_head=2, n_positions=24).save_pretrained(
        folder / "gpt2"
    )
    return folder


@pytest.mark.slow
def test_a_masked_lm_on_two_processes_and_a_classifier_make_a_chain(tmp_path: Path) -> None:
    folder = _prepared(tmp_path)
    _launched(
        "torchrun", "pretrain_mlm.py", folder, train_file="data/corpus.txt", config_file="bert/config.json",
        tokenizer_name="tokenizer", max_seq_length=16, output_dir="pretrain", num_train_epochs=2,
    )  # fmt: skip
    record = json.loads((folder / "pretrain" / RECORD).read_text())
    assert record["training"]["world_size"] == 2 and record["finished"]
    steps = read_steps(folder / "pretrain")
    assert len(steps) == 2 * 8  # 60 rows, 4 to each of 2 processes
    for epoch in (steps[:8], steps[8:]):
        rows = [row for step in epoch for process in step["rows"][0] for row in process]
        assert len(rows) == 64 and set(rows) == set(range(60))
    _launched(
        "python", "finetune_sentiment.py", folder, train_file="data/rows.jsonl", model_name_or_path="pretrain",
        output_dir="finetune", freeze_encoder=True,
    )  # fmt: skip
    opened = open_chain([folder / "pretrain", folder / "finetune"])
    first, second = opened.chain.stages
    assert first.data.texts(0, 3).to_pylist() == sentences()[:3]
    assert opened.chain.links[1].transfer == "frozen" and set(second.trained or ()) == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.slow
def test_a_packed_causal_lm_tells_its_documents(tmp_path: Path) -> None:
    folder = _prepared(tmp_path)
    _launched(
        "accelerate", "pretrain_clm.py", folder, train_file="data/corpus.txt", config_file="gpt2/config.json",
        tokenizer_name="tokenizer", block_size=16, output_dir="pretrain",
    )  # fmt: skip
    stage = Stage.from_run(folder / "pretrain")
    words = tokenizer()
    texts = sentences()
    assert stage.data.packed and stage.task.name == "causal_lm"
    for i in range(stage.size):
        documents = stage.data.documents(i)
        for (number, start), end in zip(documents, [*(s for _, s in documents[1:]), 16]):
            piece = " ".join(map(str, stage.data[i][start:end]))
            assert piece in " ".join(map(str, words(texts[number])["input_ids"]))
