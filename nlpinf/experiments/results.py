"""The measured result of a recipe: what a finished run folder says, with intervals, on which machine and with what.

Intervals are 95 % and over the test rows: a rerun with other test rows of the same kind. They do not cover the seed.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nlpinf.adapters.huggingface import read_json, versions
from nlpinf.experiments import recipe as recipes
from nlpinf.scoring import Scores

_Z = 1.959964  # two-sided 95 % of the normal distribution


def machine() -> dict[str, Any]:
    """Return the kind of this machine: cores, processor, memory in GiB and GPUs."""
    import torch

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cores": os.cpu_count(), "processor": processor, "memory_gib": round(pages / 2**30), "gpus": gpus}


def measured(folder: str | Path, command: str, seconds: float | None) -> dict[str, Any]:
    """Return the result of a finished recipe run in `folder`, made by `command` in `seconds`, None where that is not known."""
    folder = Path(folder)
    recipe = recipes.load(folder / "recipe.yaml")
    base = read_json(folder / "result.json", "a recipe run")
    scores = Scores.open(folder / "scores")
    losses = base["losses"]
    return {
        "recipe": recipe.name,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": None if seconds is None else round(seconds, 1),
        "seed": recipe.seed,
        "machine": machine(),
        "versions": versions(),
        "test": {
            "rows": len(losses),
            "loss": _mean(losses),
            "accuracy": {"value": round(base["accuracy"], 4), "interval": wilson(base["accuracy"], len(losses))},
            **{k: v for k, v in base.items() if k not in ("losses", "test_loss", "accuracy")},
        },
        "queries": [
            {
                "name": query["name"],
                "value": query["value"],
                "solves": {
                    stage: {k: end[k] for k in ("verdict", "residual", "second_residual", "products")}
                    for stage, end in query["verdicts"].items()
                },
            }
            for query in scores.manifest["queries"]
        ],
        "rows_scored": len(scores),
        "harmful": [_row(row) for row in scores.top(5)],
        "helpful": [_row(row) for row in scores.top(5, helpful=True)],
        "removal": [
            {
                "removed": entry["name"],
                "rows": len(entry["rows"]),
                "predicted": round(entry["predicted"], 5),
                "actual": _mean([after - before for before, after in zip(losses, entry["losses"])]),
                "accuracy": round(entry["accuracy"], 4),
            }
            for entry in (read_json(path, "a removal") for path in sorted((folder / "removal").glob("*.json")))
        ],
    }


def _row(row: Any) -> dict[str, Any]:
    return {"row": row.row, "score": row.score, "predicted_change": row.predicted_change, "text": row.text}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of the rows' values with its interval; for paired differences, that of the change."""
    array = np.asarray(values, dtype=np.float64)
    half = _Z * float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.inf
    mean = float(array.mean())
    return {"value": round(mean, 5), "interval": [round(mean - half, 5), round(mean + half, 5)]}


def wilson(share: float, count: int) -> list[float]:
    """Return Wilson's 95 % interval of a share observed on `count` rows."""
    centre = share + _Z**2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return [round((centre - half) / scale, 4), round((centre + half) / scale, 4)]
