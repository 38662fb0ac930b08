"""A run folder becomes a Stage: recorded by nlpinf, by `StageRecorder`, or by nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from nlpinf import processes
from nlpinf.adapters import plain
from nlpinf.adapters.folders import FORMAT, RECORD, check_weights, one_line, read_json, weight_files
from nlpinf.adapters.names import CONFIG, check_config, decayed
from nlpinf.adapters.openers import build_task, opener_of
from nlpinf.adapters.peft import ADAPTERS, adapter_config, open_adapters
from nlpinf.adapters.plain import Told
from nlpinf.data import shipped
from nlpinf.data.corpus import Corpus, examples_sha256
from nlpinf.data.labelled import read_rows
from nlpinf.data.packing import packed_rows
from nlpinf.data.tokenrows import ROWS_FILE, TokenRows, row_fingerprint
from nlpinf.errors import BadInput
from nlpinf.stages import Stage
from nlpinf.tasks import SequenceClassification, Task

_OFFSET = {
    "roberta",
    "xlm-roberta",
    "camembert",
    "xlm-roberta-xl",
    "mpnet",
}  # positions count on from the pad token's id


def stage_from_run(
    folder: str | Path,
    *,
    data: Any = None,
    told: Told | None = None,
    record: Mapping[str, Any] | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> Stage:
    """Open a run folder as a Stage.

    `data` replaces the run's corpus (a path, a Corpus or rows), `changes` its settings. For a plain output folder of a
    Trainer, which has no nlpinf_stage.json, `told` is what the folder does not store; what is then assumed is listed in
    the stage's `record["assumed"]`. `record` stands for a file that is not there. `base` is the model under the adapters
    of a folder of peft (default: the one that the folder names).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such run folder")
    recorded = (folder / RECORD).exists()
    content: dict[str, Any] | None = _record(folder) if recorded else None if record is None else dict(record)
    adapters = (folder / ADAPTERS).exists()
    if content is None and not adapters and not (folder / CONFIG).exists():
        raise plain.absent(folder)
    below = adapter_config(folder, base).base if adapters else folder
    config = check_config(below, trust_remote_code) if (below / CONFIG).exists() or content is None else {}
    check_weights(folder)
    weights = weight_files(folder)
    for name, digest in weights.items():
        if content is not None and content.get("weights", {}).get(name) not in (None, digest):
            raise BadInput(f"{folder / name}: the weights changed since {RECORD} was written; record the run again")
    told = told or Told()
    if content is not None and data is None:
        data = told.data
    used = {k: v for k, v in vars(told).items() if recorded and v is not None and k in _USED}
    kind = content["task"].get("name") if content is not None else plain.task_name(below, config, told, folder)
    model, words = _open(folder, below, kind, adapters, trust_remote_code, recorded)
    model = model.to(processes.device())
    notes = _pad(kind, words)
    if content is None:
        content = plain.describe(folder, config, kind, told, _limit(words, config))
    elif recorded:
        content = _completed(folder, content, told, _limit(words, config))
    content = {**content, "notes": [*content.get("notes", []), *notes]}
    if content.get("training", {}).get("label_smoothing_factor"):
        raise BadInput(f"{folder}: was trained with label smoothing, which no task here has; train without it to score")
    if content.get("own_labels"):
        raise BadInput(
            f"{folder / RECORD}: the run learned from labels that its rows brought, and nlpinf counts every token of a text; "
            "train with DataCollatorForLanguageModeling to score"
        )
    if content["task"].get("name") == "sequence_classification" and content["task"].get("labels") == 1:
        raise BadInput(f"{folder}: has one label, a regression; a classifier here has at least 2 classes")
    if content.get("pairs"):
        raise plain.of_pairs(f"{folder / RECORD}: the run's rows have a second segment")
    try:
        task = build_task({**content["task"], **changes.pop("task", {})}, words)
    except TypeError as error:
        raise BadInput(
            f"{folder / RECORD}: the task's settings are not known ({error}); record the run again"
        ) from None
    examples = _data(folder, content, data, task)
    kept = {**content, "run": str(folder), "weights": weights, "recorded": recorded, "adapters": adapters}
    if used:  # so that what is made of this stage opens it in the same way
        kept["told"] = {**used, **({"data": str(shipped.absolute(used["data"]))} if "data" in used else {})}
    if data is not None:
        kept.pop("items", None)  # T is that of the recorded corpus
    try:
        settings = {**_settings(content, model, folder), "record": kept, **changes}
        return Stage(model, task, examples, **settings)
    except BadInput as error:
        raise BadInput(f"{folder}: {error}") from None


_USED = ("data", "text_column", "label_column", "split", "max_length")  # of what is told, where there is a record


def _completed(folder: Path, record: dict[str, Any], told: Told, limit: int) -> dict[str, Any]:
    """Return a record with what it lacks and was told; `BadInput` where what was told is recorded otherwise."""
    task, data = dict(record["task"]), dict(record["data"])
    if task.get("name") in ("masked_lm", "causal_lm", "sequence_classification") and "max_length" not in task:
        task["max_length"] = told.max_length or min(1024, limit)  # of rows that came in a stream
    for name, value in (("max_length", task.get("max_length")), ("reduction", record["reduction"])):
        asked = getattr(told, name)
        if asked not in (None, value):
            raise BadInput(
                f"{folder / RECORD}: records a {name.replace('_', ' ')} of {value}, and {asked} was given; leave that out"
            )
    columns = {k: v for k, v in vars(told).items() if k in ("text_column", "split", "label_column") and v is not None}
    if columns and told.data is not None:
        data["reading"] = {**data.get("reading", {}), **columns}
    return {**record, "task": task, "data": data}


def told_record(stage: Stage) -> dict[str, Any] | None:
    """Return what opens the stage's run again, where its folder has no record; None where it has one."""
    if stage.record.get("recorded", True):
        return None
    content = {k: v for k, v in stage.record.items() if k not in ("run", "weights", "recorded", "adapters")}
    return {**content, "weight_decay": stage.decay, "trained": list(stage.trained or ()), "reduction": stage.reduction}


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    record = read_json(path, "a run that nlpinf recorded")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BadInput(f"{path}: is no record of a run of format {FORMAT}; record the run again")
    for key, kind in {"task": dict, "reduction": str, "weight_decay": dict, "trained": list, "data": dict}.items():
        if not isinstance(record.get(key), kind):
            raise BadInput(f"{path}: the field {key!r} is missing or of another type; record the run again")
    return record


def _open(
    folder: Path, below: Path, kind: Any, adapters: bool, trust_remote_code: bool, recorded: bool
) -> tuple[Any, Any]:
    try:
        opener = opener_of(kind)
    except BadInput as error:
        raise BadInput(f"{folder / RECORD if recorded else folder}: {error}") from None
    try:
        if adapters:
            return open_adapters(folder, below, kind)
        return opener.open(folder, trust_remote_code)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadInput(f"{folder}: cannot be opened as a {kind} model: {one_line(error)}") from error


def _pad(kind: Any, words: Any) -> list[str]:
    """Give a causal LM's tokenizer a pad token, where it has none: what is padded is masked out and never counted."""
    if kind != "causal_lm" or words.pad_token_id is not None or words.eos_token_id is None:
        return []
    words.pad_token = words.eos_token
    return ["the tokenizer has no pad token; its end token pads, which changes no loss"]


def _limit(words: Any, config: Mapping[str, Any]) -> int:
    """Return the most tokens that the tokenizer and the model's positions take."""
    places = [config[n] for n in ("max_position_embeddings", "n_positions") if isinstance(config.get(n), int)]
    if places and config.get("model_type") in _OFFSET:
        places[0] -= (config.get("pad_token_id") or 0) + 1
    return int(min([*places[:1], getattr(words, "model_max_length", 512), 1 << 20]))


def _settings(content: Mapping[str, Any], model: nn.Module, folder: Path) -> dict[str, Any]:
    trained = content["trained"]
    if trained is None:
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
    decay = content["weight_decay"]
    if not isinstance(decay, Mapping):
        decay = dict.fromkeys(decayed(model), float(decay))
    name = content.get("name", folder.resolve().name)
    return {"weight_decay": decay, "reduction": content["reduction"], "trained": trained, "name": name}


def _data(folder: Path, record: dict[str, Any], data: Any, task: Task) -> Any:
    if data is not None and not isinstance(data, str | Path):
        return data
    recorded = record.get("data", {})
    where = data if data is not None else recorded.get("path")
    if where is None:
        file = folder / RECORD if (folder / RECORD).exists() else folder
        raise BadInput(
            f"{file}: no data location is recorded; give the run's data (--corpus or --train, in a check --data, in Python data=...)"
        )
    path = shipped.resolve(where)
    if not path.is_absolute() and (folder / path).exists() and (data is None or not path.exists()):
        path = folder / path
    if path.name == ROWS_FILE:
        return _rows(path, recorded if data is None else {}, task)
    reading = dict(recorded.get("reading", {}))
    examples: Any
    if isinstance(task, SequenceClassification):
        examples = read_rows(path, task.labels, record.get("label_names"), **reading)
    else:
        examples = Corpus.read(path, **reading)
    if data is None and (expected := recorded.get("sha256")) not in (None, examples_sha256(examples)):
        raise BadInput(
            f"{path}: the texts are not those of the run (sha256 of the rows differs from {str(expected)[:12]}…); restore the file or give another with data"
        )
    if recorded.get("packed"):
        return _packed(examples, task, recorded["packed"])
    if data is None and "fingerprint" in recorded:
        _same_rows(folder, path, examples, task)
    return examples


def _rows(path: Path, recorded: Mapping[str, Any], task: Any) -> TokenRows:
    rows = TokenRows.read(path, lambda ids: task.tokenizer.decode(ids, skip_special_tokens=True))
    digest = hashlib.sha256("".join(rows.fingerprints).encode()).hexdigest()
    if recorded.get("fingerprint") not in (None, digest):
        raise BadInput(f"{path}: the rows are not those of the run (their fingerprints differ); restore the file")
    return rows


def _packed(corpus: Corpus, task: Any, size: int) -> TokenRows:
    texts = corpus[:]
    encoded = task.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)[
        "input_ids"
    ]
    rows = list(packed_rows(encoded, corpus.rows.tolist(), size))
    if not rows:
        tokens = sum(map(len, encoded))
        raise BadInput(
            f"{corpus.path}: its {tokens} tokens make no row of {size}; give the run's corpus, or --no-packed if its texts were not joined"
        )
    names = {"input_ids": pa.list_(pa.int32()), "documents": pa.list_(pa.int64()), "starts": pa.list_(pa.int32())}
    columns = {n: pa.array([row[n] for row in rows], kind) for n, kind in names.items()}
    table = pa.table({"row": pa.array(range(len(rows)), pa.int64()), **columns})
    return TokenRows(table, corpus.path, task.tokenizer.decode)


def _same_rows(folder: Path, path: Path, examples: Any, task: Any) -> None:
    """Raise `BadInput` if texts are not, tokenized, the rows that a recorder saw; some hundred are looked at."""
    import pyarrow.parquet as pq

    prints = pq.read_table(folder / ROWS_FILE, columns=["fingerprint"])["fingerprint"].to_pylist()
    if len(prints) != len(examples):
        raise BadInput(f"{path}: has {len(examples)} rows, the run had {len(prints)}; give the run's own corpus")
    chosen = sorted(set(range(0, len(prints), max(1, len(prints) // 256))))
    for i, encoded in zip(chosen, task.encode([examples[i] for i in chosen])):
        ids, label = (encoded.ids, encoded.label) if hasattr(encoded, "ids") else (encoded, None)
        if row_fingerprint(ids, label) != prints[i]:
            raise BadInput(
                f"{path}: row {i} is not what the run saw there (its tokens differ); give the run's own corpus"
            )
