"""What StageRecorder costs a training step: the time inside its callbacks as a share of the run's, in one and the same run.

python -m benchmarks.recorder [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

import nlpinf
from nlpinf.adapters.folders import versions


def _timed(recorder: Any) -> dict[str, float]:
    """Make the recorder's callbacks add up the seconds that they take, by name."""
    spent: dict[str, float] = {}
    for name in ("on_train_begin", "on_step_begin", "on_substep_end", "on_step_end", "on_train_end"):
        call = getattr(recorder, name)

        def timed(*args: Any, call: Any = call, name: str = name, **kwargs: Any) -> Any:
            start = time.perf_counter()
            call(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        setattr(recorder, name, timed)
    return spent


def measure(steps: int = 40, batch: int = 32, length: int = 64, width: int = 128) -> dict[str, Any]:
    """Train a small BERT for `steps` steps and return the recorder's share of the time of the steps, and its start."""
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (steps * batch, length)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * width}
    model = BertForMaskedLM(BertConfig(vocab_size=1000, **sizes))
    recorder = nlpinf.StageRecorder()
    spent = _timed(recorder)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch, max_steps=steps, save_strategy="no", report_to=[], disable_tqdm=True,
            logging_strategy="no", use_cpu=True,
        )  # fmt: skip
        start = time.perf_counter()
        Trainer(model, arguments, train_dataset=rows, callbacks=[recorder]).train()
        whole = time.perf_counter() - start
    of_steps = sum(seconds for name, seconds in spent.items() if "step" in name)
    return {
        "share_of_a_step": of_steps / (whole - spent["on_train_begin"] - spent["on_train_end"]),
        "milliseconds_a_step": 1e3 * of_steps / steps,
        "rows_recorded_a_second": len(rows) / spent["on_train_begin"],
        "setting": {"steps": steps, "batch": batch, "length": length, "width": width, "layers": 2},
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    figures = measure()
    if parser.parse_args().json:
        print(json.dumps(figures, indent=1))
    else:
        print(f"recorder: {figures['share_of_a_step']:.2%} of a step ({figures['milliseconds_a_step']:.2f} ms)")


if __name__ == "__main__":
    main()
