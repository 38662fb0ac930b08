"""How far a scores folder is, from what lies in it: nothing is asked of the processes that work on it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlpinf.scoring.shards import Claims
from nlpinf.scoring.store import CLAIM, missing_parts, part_path, read_manifest, rows_done

WINDOW = 600.0  # seconds back over which the rate is taken


@dataclass(frozen=True)
class Working:
    """A part with a claim: who (host and process), for how many seconds, and whether that process is known to live."""

    part: int
    who: str
    seconds: float
    alive: bool


@dataclass(frozen=True)
class Status:
    """Parts and rows that are done, of how many; `bytes` on disk; `rate` in rows a second over the last ten minutes.

    `rate` is None where fewer than two parts ended in that time, `seconds_left` then too; `missing` are part numbers.
    `corpus` is the manifest's: rows that were `skipped`, `odd` and, at the end, `truncated`.
    """

    parts: int
    parts_done: int
    rows: int
    rows_done: int
    bytes: int
    missing: list[int]
    working: list[Working]
    rate: float | None
    seconds_left: float | None
    corpus: dict[str, Any]


def status(folder: str | Path) -> Status:
    """Return how far the folder is. Raises `BadInput` if it is no scores folder."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    now, missing = time.time(), missing_parts(folder, manifest)
    lacking, size, ended = set(missing), 0, []
    parts = manifest["identity"]["parts"]
    for part in range(parts):
        if part not in lacking:
            found = part_path(folder, part).stat()
            size += found.st_size
            ended.append(found.st_mtime)
    done, rows = rows_done(manifest, missing), manifest["identity"]["rows"]
    recent = sorted(when for when in ended if now - when < WINDOW)
    rate = None
    if len(recent) > 1 and now > recent[0]:
        rate = (len(recent) - 1) * manifest["identity"]["part_rows"] / (now - recent[0])
    left = None if not missing else (rows - done) / rate if rate else None
    corpus = manifest.get("corpus") or {}
    return Status(parts, parts - len(missing), rows, done, size, missing, _working(folder, now), rate, left, corpus)


def _working(folder: Path, now: float) -> list[Working]:
    claims, found = Claims(folder), []
    for path in sorted(folder.glob(f".part-*{CLAIM}")):
        try:
            part = int(path.name.removesuffix(CLAIM).rpartition("-")[2])
            who, began = path.read_text(encoding="utf-8").strip(), path.stat().st_mtime
        except (OSError, ValueError):  # done at this moment
            continue
        found.append(Working(part, who or "unknown", max(0.0, now - began), claims.held(part)))
    return found
