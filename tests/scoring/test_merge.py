"""Merging: the folder of one machine from those of several, refused where they are not of one job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from nlpinf.data.corpus import Corpus
from nlpinf.errors import BadInput
from nlpinf.scoring.merge import merge
from nlpinf.scoring.status import status
from nlpinf.scoring.store import Scores
from tests.scoring.made import made

TEXTS = [f"text {i}" for i in range(40)]
VALUES = np.random.default_rng(0).standard_normal(40)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shared_out(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A whole folder, and three copies that have a share of its parts each."""
    made(tmp_path / "whole", Corpus(TEXTS), VALUES)
    folders = []
    for index in range(3):
        folders.append(tmp_path / f"machine {index}")
        shutil.copytree(tmp_path / "whole", folders[-1])
        for part in range(6):
            if part % 3 != index:
                (folders[-1] / f"part-{part:05d}.parquet").unlink()
    return tmp_path / "whole", folders


def test_merged_is_the_whole(tmp_path: Path) -> None:
    whole, folders = shared_out(tmp_path)
    merged = merge(folders[:2], tmp_path / "out")
    assert merged.parts == 4 and merged.missing == [2, 5] and merged.differences == []
    partial = Scores.open(tmp_path / "out", partial=True)
    assert partial.missing == (2, 5) and len(partial) == 28 == len(partial.rows)
    again = merge([folders[2], folders[1]], tmp_path / "out")
    assert again.missing == [] and bytes_of(tmp_path / "out") == bytes_of(whole)


def test_folders_of_other_jobs_are_refused(tmp_path: Path) -> None:
    _, folders = shared_out(tmp_path)
    made(tmp_path / "other", Corpus([*TEXTS[:39], "x"]), VALUES)
    with pytest.raises(BadInput, match="other: was made from another corpus"):
        merge([folders[0], tmp_path / "other"], tmp_path / "out")
    with pytest.raises(BadInput, match="no scores folder"):
        merge([folders[0], tmp_path / "nowhere"], tmp_path / "out")
    made(tmp_path / "rounded", Corpus(TEXTS), VALUES * (1 + 1e-6))
    with pytest.raises(BadInput, match=r"rounded/part-00000.parquet: differs from .*machine 0/part-00000.parquet"):
        merge([folders[0], tmp_path / "rounded"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_may_round_differently_is_told(tmp_path: Path) -> None:
    _, folders = shared_out(tmp_path)
    for folder, torch in zip(folders, ("2.4", "2.4", "2.5")):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["versions"] = {"torch": torch}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (told,) = merge(folders, tmp_path / "out").differences
    assert "torch: 2.4" in told and "2.5 here" in told and "machine 2" in told


def test_status_counts_what_is_there(tmp_path: Path) -> None:
    whole, folders = shared_out(tmp_path)
    found = status(folders[2])
    assert (found.parts, found.parts_done, found.rows, found.rows_done) == (6, 2, 40, 7 + 5)
    assert found.missing == [0, 1, 3, 4] and found.working == []
    (folders[2] / ".part-00001.claim").write_text("host 17\n")
    (working,) = status(folders[2]).working
    assert working.part == 1 and working.who == "host 17" and not working.alive and working.seconds < 60
    done = status(whole)
    assert done.rows_done == 40 and done.seconds_left is None
    assert done.bytes == sum(path.stat().st_size for path in whole.glob("part-*"))


def test_what_screening_was_worth_comes_along(tmp_path: Path) -> None:
    _, folders = shared_out(tmp_path)
    for folder in folders[1:]:
        (folder / "screening").mkdir()
        (folder / "screening" / "recall.json").write_text("[]")
    merge(folders, tmp_path / "out")
    assert (tmp_path / "out" / "screening" / "recall.json").read_text() == "[]"


@pytest.mark.parametrize(("damage", "message"), [("garbage", "cannot be read"), ("rows", "has 3 rows instead of 7")])
def test_a_damaged_part_is_refused_before_anything_is_made(tmp_path: Path, damage: str, message: str) -> None:
    _, folders = shared_out(tmp_path)
    path = folders[0] / "part-00003.parquet"
    if damage == "garbage":
        path.write_bytes(b"garbage")
    else:
        pq.write_table(pq.read_table(path).slice(0, 3), path)
    with pytest.raises(BadInput, match=f"machine 0/part-00003.parquet: {message}.*delete this part"):
        merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
