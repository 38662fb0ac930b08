"""StageRecorder: a callback that records, beside a Hugging Face Trainer's checkpoint, what attribution needs of the run.

It reads and never acts: no loss, no weight, no random state changes. What it writes, it writes on the main process:
nlpinf_stage.json (the stage) beside every checkpoint and in the output folder, nlpinf_rows.parquet (what was trained on)
and nlpinf_steps.jsonl (which rows and learning rate each step had) in the output folder.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from nlpinf.adapters.folders import FORMAT, RECORD, file_sha256, versions, write_json
from nlpinf.adapters.names import task_of_class
from nlpinf.data.tokenrows import ROWS_FILE, write_rows
from nlpinf.integrations.steps import STEPS_FILE, StepLog, StepRows
from nlpinf.parameters import tied_groups

_log = logging.getLogger(__name__)
_ARGUMENTS = (
    "seed", "data_seed", "full_determinism", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "optim",
    "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "label_smoothing_factor", "fp16", "bf16",
    "dataloader_drop_last", "dataloader_num_workers", "average_tokens_across_devices",
)  # fmt: skip


class StageRecorder(TrainerCallback):
    """Records a Trainer's run as a stage: `Trainer(..., callbacks=[nlpinf.StageRecorder()])`.

    The rows are kept as the token ids that the model saw, by their place in the training set. `dataset` is the training set
    with the columns that the Trainer drops, of which `row` (integer numbers of one's own), `text`, and `documents` and
    `starts` of packed rows are kept too. With `corpus`, where the texts lie (`text_column` of them), no ids are kept:
    their fingerprints tell whether that corpus is the run's. `folder` defaults to the Trainer's output folder.
    """

    def __init__(
        self,
        dataset: Any = None,
        *,
        corpus: str | Path | None = None,
        text_column: str = "text",
        folder: str | Path | None = None,
    ) -> None:
        self.dataset, self.corpus, self.text_column = dataset, corpus, text_column
        self.folder = None if folder is None else Path(folder)
        self._record: dict[str, Any] = {}
        self._steps: StepLog | None = None
        self._rows: StepRows | str = ""
        self._rates: list[float] = []
        self._batches = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Describe the run, write its rows, and follow the sampler."""
        if not state.is_world_process_zero:
            return
        folder = self.folder or Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        loader, model = _handed("train_dataloader", kwargs, state), _bare(kwargs["model"])
        collator = _collator(loader)
        if args.label_smoothing_factor:
            _log.warning("label smoothing is on: nlpinf has no task with it, so this run cannot be scored")
        words = _tokenizer(kwargs, collator)
        rows = self._write_rows(folder, loader, words)
        self._record = _describe(args, model, collator, _handed("optimizer", kwargs, state), kwargs, rows)
        if rows is not None and "pair" in rows["seen"]:
            _log.warning("rows are pairs of sentences: nlpinf has no task of them, so this run cannot be scored")
            self._record["pairs"] = True
        if rows is not None and _own_labels(self._record["task"]["name"], collator, rows["seen"]):
            _log.warning("rows bring labels of their own: nlpinf counts every token, so this run cannot be scored")
            self._record["own_labels"] = True
        if rows is not None and ("left" in rows["seen"] or _pads_left(getattr(collator, "tokenizer", words), rows)):
            self._record["notes"].append("rows were padded on the left; here positions count from a row's first token")
        if "data" in self._record and self.corpus is not None:
            self._record["data"] |= {"path": str(Path(self.corpus).resolve())}
            self._record["data"]["reading"] = {"text_column": self.text_column}
        self._rows = StepRows.of(loader, args.world_size)
        self._record["steps"] = {"file": STEPS_FILE, "rows": self._rows if isinstance(self._rows, str) else "recorded"}
        self._steps = StepLog(folder / STEPS_FILE, state.global_step)
        self._batches = 0
        write_json(folder / RECORD, {**self._record, "finished": False})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the learning rates, which the scheduler changes before the step is over."""
        self._batches = 1
        if self._steps is not None:
            self._rates = [group["lr"] for group in _handed("optimizer", kwargs, state).param_groups]

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the batches of an accumulated step."""
        self._batches += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the step."""
        if self._steps is None:
            return
        entry: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch, 9)}
        entry["lr"] = [float(rate) for rate in self._rates]
        if getattr(_handed("optimizer", kwargs, state), "step_was_skipped", False):
            entry["skipped"] = True  # an overflow in half precision
        if isinstance(self._rows, StepRows):
            entry["rows"] = self._rows.take(state.epoch, self._batches)
        self._steps.write(entry)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the record beside a checkpoint, its rows being in the folder above."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._steps is None or not checkpoint.is_dir():
            return
        weights = {path.name: file_sha256(path) for path in sorted(checkpoint.glob("*.safetensors"))}
        record = {**self._record, **_progress(state), "weights": weights}
        path = record.get("data", {}).get("path")
        if path == ROWS_FILE:
            where = os.path.relpath((self.folder or Path(args.output_dir)) / ROWS_FILE, checkpoint)
            record["data"] = {**record["data"], "path": Path(where).as_posix()}
        parent = record.get("parent", {}).get("run")
        if parent is not None and not Path(parent).is_absolute():
            where = os.path.relpath((self.folder or Path(args.output_dir)) / parent, checkpoint)
            record["parent"] = {**record["parent"], "run": Path(where).as_posix()}
        write_json(checkpoint / RECORD, record)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the record into the output folder, where `save_model` puts the weights afterwards."""
        if self._steps is None:
            return
        self._steps = None
        best = (
            {} if state.best_model_checkpoint is None else {"best_checkpoint": Path(state.best_model_checkpoint).name}
        )
        record = {**self._record, **_progress(state), **(best if args.load_best_model_at_end else {})}
        write_json((self.folder or Path(args.output_dir)) / RECORD, record)

    def _write_rows(self, folder: Path, loader: Any, words: Any) -> dict[str, Any] | None:
        dataset = loader.dataset
        if isinstance(dataset, torch.utils.data.IterableDataset):
            return None
        if "input_ids" not in _columns(dataset):
            _log.warning(
                "rows have no input_ids, so which tokens were trained on is not recorded; tokenize them before"
            )
            return None
        with _untouched_randomness():
            pad = [] if getattr(words, "pad_token_id", None) is None else [words.pad_token_id]
            rows = _Rows(_numbered(dataset, self.dataset))
            return {**write_rows(folder / ROWS_FILE, rows, ids=self.corpus is None, count=pad), "seen": rows.seen}


def _progress(state: Any) -> dict[str, Any]:
    return {"finished": state.global_step >= state.max_steps, "step": state.global_step, "epoch": state.epoch}


def _handed(name: str, kwargs: Mapping[str, Any], state: Any) -> Any:
    """Return what the Trainer hands to callbacks; some of its versions put it into the state and None here."""
    found = kwargs[name]
    return getattr(state, name) if found is None else found


def _describe(
    args: Any, model: Any, collator: Any, optimizer: Any, kwargs: Mapping[str, Any], rows: Any
) -> dict[str, Any]:
    """Return the record of a stage, all but its weights."""
    name = task_of_class(type(model).__name__)
    tokenizer = _tokenizer(kwargs, collator)
    config = model.config
    task: dict[str, Any] = {"name": name or type(model).__name__}
    notes: list[str] = []
    if rows is not None:
        task["max_length"] = max(2, rows["longest"])
    if name == "masked_lm":
        task |= {"probability": getattr(collator, "mlm_probability", None) or 0.15, "masks": 1, "seed": args.seed}
        replaced = (getattr(collator, "mask_replace_prob", 0.8), getattr(collator, "random_replace_prob", 0.1))
        if (
            replaced != (0.8, 0.1)
            or "WholeWord" in type(collator).__name__
            or getattr(collator, "whole_word_mask", False)
        ):
            notes.append("the run masked in another way than 80 % mask, 10 % random, 10 % kept of single tokens")
        if not hasattr(collator, "mlm_probability"):
            notes.append("its collator does not tell how it masked; 15 % of the tokens are taken to have been")
    elif name == "causal_lm":
        ignored = _is_language_modeling(collator) and tokenizer is not None and tokenizer.pad_token_id is not None
        if ignored and tokenizer.pad_token_id == tokenizer.eos_token_id:  # the collator takes ends for padding
            task["uncounted"] = [tokenizer.pad_token_id]
    elif name == "sequence_classification":
        task["labels"] = config.num_labels
    items = {}
    if name == "causal_lm" and rows is not None:
        # What the Trainer divides the sum of an update's losses by: all labels, or all but each row's first, which no
        # output predicts.
        first = _counts_first(model)
        ids = rows["ids"]
        left_out = sum(ids.get(i, 0) for i in task.get("uncounted", ()))
        items = {"items": rows["tokens"] - left_out - (0 if first else rows["rows"]), "counts_first_token": first}
    plain = getattr(optimizer, "optimizer", optimizer)
    record: dict[str, Any] = {
        "format": FORMAT,
        "task": task,
        "reduction": "example" if name == "sequence_classification" else "token",
        "averaged_over": "step" if name == "causal_lm" else "batch",
        **items,
        "weight_decay": _decay(model, plain),
        "decay": "L2" if type(plain) in (torch.optim.Adam, torch.optim.SGD) else "decoupled",
        "trained": [n for n, p in model.named_parameters() if p.requires_grad],
        "tied": tied_groups(model),
        "data": {},
        "parent": _parent(model, args.output_dir),
        "training": {
            **{n: _plain(getattr(args, n)) for n in _ARGUMENTS if hasattr(args, n)},
            "optimizer": type(plain).__name__,
            "world_size": args.world_size,
            "collator": {"class": type(collator).__name__, **_settings(collator)},
            "dropout": sorted({m.p for m in model.modules() if isinstance(m, nn.Dropout)}),
        },
        "notes": notes,
        "versions": versions(),
    }
    if rows is not None:
        record["data"] = {"path": ROWS_FILE, "rows": rows["rows"], "fingerprint": rows["sha256"]}
    if label_names := getattr(config, "id2label", None) if name == "sequence_classification" else None:
        record["label_names"] = [label_names[i] for i in sorted(label_names)]
    if not record["parent"]:
        del record["parent"]
    return record


def _counts_first(model: Any) -> bool:
    """Whether the Trainer counts the labels that a causal model shifts away, as it does unless it knows the model's loss."""
    try:
        from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    except ImportError:
        return True
    knows = "_loss_shifts_labels" in Trainer.__init__.__code__.co_names
    return not (knows and LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss)


def _bare(model: Any) -> Any:
    """Return the model without the wrapper of adapters, whose layers stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _tokenizer(kwargs: Mapping[str, Any], collator: Any) -> Any:
    found = kwargs.get("processing_class")
    return found if found is not None else getattr(collator, "tokenizer", None)


def _collator(loader: Any) -> Any:
    """Return the collator that the script gave, without the one that removes columns."""
    collator: Any = loader.collate_fn
    while type(collator).__name__ == "RemoveColumnsCollator":
        collator = collator.data_collator
    return collator


def _is_language_modeling(collator: Any) -> bool:
    return hasattr(collator, "mlm") and not collator.mlm


def _settings(value: Any) -> dict[str, Any]:
    found = (
        {n: _plain(v) for n, v in vars(value).items() if not n.startswith("_")} if hasattr(value, "__dict__") else {}
    )
    return {n: v for n, v in found.items() if v is not None}


def _plain(value: Any) -> Any:
    """Return a JSON value, None for what is none."""
    value = getattr(value, "value", value)
    return value if isinstance(value, bool | int | float | str) else None


def _decay(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """Return the weight decay of every trained parameter, by the optimizer's own groups."""
    of = {id(p): float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups for p in group["params"]}
    return {n: of.get(id(p), 0.0) for n, p in model.named_parameters() if p.requires_grad}


def _parent(model: Any, output_dir: str) -> dict[str, Any]:
    """Return where the model's first weights came from, and their sha256; nothing for a model made at random."""
    name = getattr(model.config, "_name_or_path", "") or ""
    if not name:
        return {}
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if not isinstance(found, str):
            return {"run": name}
        folder = Path(found).parent
        return {"run": name, "weights": {p.name: file_sha256(p) for p in sorted(folder.glob("*.safetensors"))}}
    weights = {p.name: file_sha256(p) for p in sorted(folder.glob("*.safetensors"))}
    return {"run": Path(os.path.relpath(folder, output_dir)).as_posix(), "weights": weights}


def _numbered(dataset: Any, kept: Any) -> Iterator[dict[str, Any]]:
    """Yield the training set's rows, with the columns of `kept`, the same rows before columns were dropped."""
    if kept is not None and len(kept) != len(dataset):
        raise ValueError(
            f"StageRecorder's dataset has {len(kept)} rows, the training set {len(dataset)}; give the same"
        )
    extras = [] if kept is None else [n for n in ("row", "text", "documents", "starts") if n in _columns(kept)]
    for row, more in zip(_plain_rows(dataset), _plain_rows(kept) if extras else repeat({})):
        ids, seen = row["input_ids"], set()
        there = np.asarray(row["attention_mask"]).astype(bool) if "attention_mask" in row else np.ones(len(ids), bool)
        if there.shape == (len(ids),) and not there.all():  # padded in the data set
            ids = [token for token, real in zip(ids, there) if real]
            seen |= {"left"} if not there[0] else set()
        if "token_type_ids" in row and np.any(row["token_type_ids"]):
            seen.add("pair")
        found = {"input_ids": ids, "seen": seen, **{n: more[n] for n in extras}}
        for name in ("label", "labels", "label_ids"):
            if name in row and np.ndim(row[name]) == 0:
                found["label"] = int(row[name])
            elif name in row and np.shape(row[name]) == there.shape:
                seen |= {"labels", "others"} if _others(row[name], row["input_ids"], there) else {"labels"}
        yield found


def _others(labels: Any, ids: Any, there: np.ndarray) -> bool:
    """Say whether the labels of a row's tokens are other than the tokens, with none where it is padded."""
    given = np.asarray(labels)
    return not (np.array_equal(given[there], np.asarray(ids)[there]) and (given[~there] == -100).all())


def _pads_left(words: Any, rows: Mapping[str, Any]) -> bool:
    """Say whether a batch's shorter rows get their padding before their first token."""
    uneven = rows["tokens"] < rows["rows"] * rows["longest"]
    return uneven and getattr(words, "padding_side", "right") == "left"


def _own_labels(task: str, collator: Any, seen: set[str]) -> bool:
    """Say whether a language model learns from labels that the data set brings, not from those that a collator makes."""
    if hasattr(collator, "mlm"):
        return False
    return {"masked_lm": "labels", "causal_lm": "others"}.get(task, "") in seen


class _Rows:
    """Passes rows on and notes what one of them was seen to be: a pair (of segments), padded on the left, with labels of its own."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self._rows, self.seen = rows, set[str]()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            self.seen |= row.pop("seen")
            yield row


def _columns(dataset: Any) -> Any:
    return getattr(dataset, "column_names", None) or dataset[0]


def _plain_rows(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rows; of a `datasets.Dataset` a thousand at a time, which is ten times as fast."""
    if not (hasattr(dataset, "with_format") and hasattr(dataset, "iter")):
        yield from (dataset[i] for i in range(len(dataset)))
        return
    for columns in dataset.with_format(None).iter(1000):
        for values in zip(*columns.values()):
            yield dict(zip(columns, values))


@contextmanager
def _untouched_randomness() -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch: a data set may draw when its rows are read."""
    python, numeric = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)
