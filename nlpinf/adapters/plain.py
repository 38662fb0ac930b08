"""The record of a run that nobody recorded: read off the files that a Trainer leaves, told by the user, or assumed and said so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlpinf.adapters.arguments import read_arguments
from nlpinf.adapters.elmo import ElmoFiles
from nlpinf.adapters.folders import FORMAT, RECORD, read_json
from nlpinf.adapters.names import CONFIG, task_of_class
from nlpinf.adapters.peft import adapter_task
from nlpinf.errors import BadInput

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Told:
    """What the user tells of a run that it does not store itself; None is not told.

    `data` where its rows lie, `text_column`, `label_column` and `split` of them; `task`; `weight_decay`, one number as the
    Trainer applies it (not to biases and normalisation layers); `reduction`; `max_length`; `packed`, whether texts were
    joined and cut; `probability` of a mask; `read_arguments`, to read training_args.bin.
    """

    data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    split: str | None = None
    task: str | None = None
    weight_decay: float | None = None
    reduction: str | None = None
    max_length: int | None = None
    packed: bool | None = None
    probability: float | None = None
    read_arguments: bool = False


def describe(folder: Path, config: dict[str, Any], name: str, told: Told, limit: int) -> dict[str, Any]:
    """Return the record of a plain run folder; `assumed` lists, in words, what neither the folder nor the user told.

    `name` is the task's; `limit` the most tokens that the tokenizer and the model take.
    """
    assumed: list[str] = []
    arguments = read_arguments(folder) if told.read_arguments else {}
    if arguments.get("label_smoothing_factor"):
        raise BadInput(f"{folder}: was trained with label smoothing, which no task here has; train without it to score")

    def given(value: Any, stored: Any, default: Any, words: str) -> Any:
        if value is not None:
            return value
        if stored is not None:
            return stored
        assumed.append(words)
        return default

    labelled = name == "sequence_classification"
    if labelled and (glue := str(config.get("finetuning_task")).lower()) in _PAIR_TASKS:
        raise of_pairs(f"{folder / CONFIG}: the finetuning task is {glue}")
    task: dict[str, Any] = {"name": name}
    if labelled:
        length = min(128, limit)
        task["labels"] = len(config.get("id2label") or {0: "", 1: ""})
        packed = False
    else:
        length = min(1024, limit)
        packed = given(
            told.packed,
            None,
            True,
            "texts were joined and cut into rows of full length, as run_mlm.py and run_clm.py do (--no-packed if not)",
        )
    task["max_length"] = given(told.max_length, None, length, f"texts were cut at {length} tokens (--max-length)")
    if not 2 <= task["max_length"] <= limit:
        raise BadInput(
            f"{folder}: max_length is {task['max_length']}; the model and its tokenizer take 2 to {limit} tokens"
        )
    if name == "masked_lm":
        task["probability"] = given(told.probability, None, 0.15, "15 % of the tokens were masked (--mask-probability)")
        task |= {"masks": 1, "seed": int(arguments.get("seed", 0))}
        assumed.append(
            "80 % of the masked tokens became the mask token, 10 % a random one; scores use one fixed mask a row"
        )
    decay = given(told.weight_decay, arguments.get("weight_decay"), 0.0, "there was no weight decay (--weight-decay)")
    default = "example" if labelled else "token"
    reduction = told.reduction or default
    if told.reduction is None:
        of = "sentences" if labelled else "the tokens of a batch"
        assumed.append(f"the loss was the mean over {of} (--reduction)")
    assumed.append("all parameters were trained, but for those that equal the parent's bit for bit")
    if not arguments:
        assumed.append("there was no label smoothing (--read-training-args reads training_args.bin)")
    reading = {"text_column": told.text_column or "text"}
    if labelled:
        reading["label_column"] = told.label_column or "label"
    if told.split is not None:
        reading["split"] = told.split
    data: dict[str, Any] = {"reading": reading} | ({"packed": task["max_length"]} if packed else {})
    if told.data is not None:
        data["path"] = told.data
    names = config.get("id2label") or {}
    return {
        "format": FORMAT,
        "task": task,
        "reduction": reduction,
        "weight_decay": float(decay),
        "decay": "decoupled",
        "trained": None,
        "data": data,
        "assumed": assumed,
        "training": {**_state(folder), **{k: v for k, v in arguments.items() if k in _KEPT}},
        **({"label_names": [names[k] for k in sorted(names, key=int)]} if labelled and names else {}),
    }


_PAIR_TASKS = ("mrpc", "qnli", "qqp", "rte", "stsb", "wnli", "mnli")  # of GLUE, as run_glue.py writes them

_KEPT = (
    "seed", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm", "warmup_steps",
)  # fmt: skip


def task_name(below: Path, config: dict[str, Any], told: Told, folder: Path) -> str:
    """Return the task of a plain folder: told, or by the class that config.json (of `below`, under adapters) names."""
    if told.task is not None:
        return told.task
    if below != folder:
        task = adapter_task(folder)
        if task is not None:
            return task
    classes = config.get("architectures") or []
    found = [task for name in classes if (task := task_of_class(name)) is not None]
    if not found:
        raise BadInput(
            f"{folder}: its config.json names {classes[0] if classes else 'no architecture'}, which is no masked or causal LM and no sequence classifier; record the run, or name the task (--task)"
        )
    if found[0] == "sequence_classification" and config.get("problem_type") not in (
        None,
        "single_label_classification",
    ):
        raise BadInput(
            f"{folder}: its problem type is {config['problem_type']}; a classifier here has one label of several a text"
        )
    return found[0]


def of_pairs(told: str) -> BadInput:
    """Return the error of a run on pairs of sentences."""
    return BadInput(f"{told}, so it is on pairs of sentences, which no task here has; give a run on single texts")


def _state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        return {}
    state = read_json(path, "a Trainer's output folder")
    return {n: state[n] for n in ("global_step", "epoch", "max_steps", "train_batch_size") if n in state}


def absent(folder: Path) -> BadInput:
    """Return the error of a folder without a record whose files are no model's either."""
    if ElmoFiles.there(folder):
        return BadInput(
            f"{folder}: holds ELMo's files, which are no pretraining run yet; make one of them with "
            f"`nlpinf fit-head --encoder {folder} --corpus CORPUS --out RUN`"
        )
    return BadInput(f"{folder}: has neither {RECORD} nor a Hugging Face config.json; it is no run folder")
