"""Where the public data sets lie that tests read but the repository does not carry."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def data_root() -> Path:
    """Return the folder NLPINF_DATA names, else `shared/data` beside the checkout."""
    return Path(os.environ["NLPINF_DATA"]) if os.environ.get("NLPINF_DATA") else ROOT.parent / "shared" / "data"


def shared_data(*parts: str) -> Path:
    """Return the path of a shared file or folder; without it skip the test, or fail it where the environment has CI=true."""
    path = data_root().joinpath(*parts)
    if not path.exists():
        reason = f"{path} is missing; set NLPINF_DATA to the folder of the data sets"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
