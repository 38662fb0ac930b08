"""The files of a run folder: JSON written whole or not at all, weights that are all there, and their sha256."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nlpinf.errors import BadInput

RECORD = "nlpinf_stage.json"
FORMAT = 1


def versions() -> dict[str, str]:
    """Return the versions of nlpinf and the libraries that its numbers depend on."""
    return {name: version(name) for name in ("nlpinf", "torch", "transformers", "tokenizers")}


def write_json(path: Path, content: Any) -> None:
    """Write JSON under another name, then rename it, so that no half-written file has the name."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_json(path: Path, what: str) -> Any:
    """Read JSON or say in one line what is wrong with the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; {path.parent} is not {what}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path}: not valid JSON ({error}); make {what} again") from None


def weight_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every safetensors file of a run folder, by file name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = next(iter(sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))), None)
        hint = "" if pickled is None else f" ({pickled.name} may be a pickle, which is not loaded)"
        raise BadInput(
            f"{folder}: no .safetensors weights{hint}; save the model with save_pretrained(..., safe_serialization=True)"
        )
    return {path.name: file_sha256(path) for path in files}


def check_weights(folder: Path) -> None:
    """Raise `BadInput` where a safetensors file is truncated, or one that an index names is not there."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        content = read_json(index, "a sharded checkpoint")
        named = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(named, dict):
            raise BadInput(f"{index}: has no `weight_map`; save the model again")
        if absent := [name for name in sorted(set(named.values())) if not (folder / name).is_file()]:
            raise BadInput(
                f"{folder / absent[0]}: this shard is missing, {index.name} names it; copy all of the shards"
            )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"{path}: truncated or not a safetensors file ({one_line(error)}); copy or save it again"
            ) from None


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """Return an exception's message without line breaks, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
