"""The tiny experiment, made once for all tests of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.common import tiny


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished tiny experiment; tests only read it."""
    return tiny(tmp_path_factory)
