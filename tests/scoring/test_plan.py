"""The plan, on a clock that the test turns: every batch costs what a formula says, so that the truth is known."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlpinf.data.corpus import Corpus
from nlpinf.errors import BadInput
from nlpinf.scoring import score
from nlpinf.scoring.feed import feed_of
from nlpinf.scoring.forward import BatchScores
from nlpinf.scoring.making import Scoring
from nlpinf.scoring.plan import plan
from nlpinf.scoring.rows import RowScorer
from tests.cases import WORDS
from tests.scoring.common import pretrain_stage, query_vectors

ROWS, PART = 3000, 400


@pytest.mark.parametrize("part_rows", [PART, 10**6])
def test_the_plan_is_what_the_run_takes(monkeypatch: pytest.MonkeyPatch, part_rows: int) -> None:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, n)) for n in np.minimum(7, draw.geometric(0.3, ROWS))]
    stage = replace(pretrain_stage("gpt2 sdpa"), data=Corpus(texts), batch_size=8, batch_tokens=64)
    vectors = query_vectors(stage)
    clock = [0.0]

    def cost(lengths: list[int]) -> float:
        return 0.01 + 0.002 * len(lengths) * max(lengths) + 0.0005 * len(lengths) * max(lengths) ** 2

    def scored(self: RowScorer, encoded: list[list[int]], rows: list[int]):  # type: ignore[no-untyped-def]
        clock[0] += cost([len(e) for e in encoded])
        n = len(encoded)
        return None, BatchScores(torch.zeros(n), torch.zeros(n, 1), None)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(RowScorer, "score", scored)
    scorer, truth = RowScorer(vectors), 0.0
    for start in range(0, ROWS, part_rows):
        encoded, batches, _ = scorer.arrange(texts[start : start + part_rows])
        truth += sum(cost([len(encoded[i]) for i in chosen]) for chosen in batches)
    found = plan(
        vectors, feed_of(stage.data), part_rows=part_rows, sample=100, processes=(1, 2, 3), price=2.0, seconds_start=5.0
    )
    one, two, three = found.options
    assert one.hours * 3600 - 5 == pytest.approx(truth, rel=0.05)
    assert found.rows_per_second == pytest.approx(ROWS / truth, rel=0.05)
    assert 100 <= found.measured < ROWS / 2 if part_rows > PART else 100 <= found.measured <= 250
    assert two.cost == pytest.approx(2 * 2.0 * two.hours) and two.memory_bytes == 2 * one.memory_bytes
    if part_rows == PART:  # 8 parts: four for each of two, three for the first of three
        assert two.hours * 3600 - 5 == pytest.approx(truth * 4 * PART / ROWS, rel=0.05)
        assert three.hours * 3600 - 5 == pytest.approx(truth * 3 * PART / ROWS, rel=0.05)
    else:
        assert two.hours == one.hours  # one part cannot be shared


@pytest.mark.parametrize("sample", [40, 300])
@pytest.mark.parametrize(("call", "token", "attention"), [(0.01, 1e-3, 0.0), (0.0, 1e-3, 1e-3), (0.05, 1e-4, 1e-5)])
def test_a_short_last_batch_speaks_for_itself_alone(
    monkeypatch: pytest.MonkeyPatch, call: float, token: float, attention: float, sample: int
) -> None:
    """A call costs as much for 3 rows as for 64, so a token of the last batch costs twenty times as much as others'."""
    draw = np.random.default_rng(1)
    texts = [" ".join(draw.choice(WORDS, n)) for n in [*draw.integers(2, 8, 64 * 40), 1, 1, 1]]
    stage = replace(pretrain_stage("gpt2 sdpa"), data=Corpus(texts), batch_size=64, batch_tokens=4096)
    clock, calls = [0.0], [0]
    noise = np.random.default_rng(2).normal(1, 0.1, 10**4)

    def cost(lengths: list[int]) -> float:
        tokens = len(lengths) * max(lengths)
        return call + token * tokens + attention * tokens * max(lengths)

    def scored(self: RowScorer, encoded: list[list[int]], rows: list[int]):  # type: ignore[no-untyped-def]
        clock[0] += cost([len(e) for e in encoded]) * noise[calls[0]]
        calls[0] += 1
        return None, BatchScores(torch.zeros(len(encoded)), torch.zeros(len(encoded), 1), None)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(RowScorer, "score", scored)
    vectors = query_vectors(stage)
    encoded, batches, _ = RowScorer(vectors).arrange(texts)
    assert len(batches[-1]) == 3
    truth = sum(cost([len(encoded[i]) for i in chosen]) for chosen in batches)
    found = plan(vectors, feed_of(stage.data), part_rows=10**6, sample=sample, processes=(1,))
    assert found.options[0].hours * 3600 == pytest.approx(truth, rel=0.1)
    assert sample <= found.measured <= max(64 * 12, 2 * sample)


def test_the_first_encoding_is_paid_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = replace(pretrain_stage("gpt2 sdpa"), data=Corpus(["the cat sat"] * 1000))
    clock, calls = [0.0], [0]
    arrange = RowScorer.arrange

    def encoding(self: RowScorer, examples: list[str]):  # type: ignore[no-untyped-def]
        if len(examples) == 100:
            clock[0] += 5.0 if calls[0] == 0 else 1.0
            calls[0] += 1
        return arrange(self, examples)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(RowScorer, "arrange", encoding)
    found = plan(query_vectors(stage), feed_of(stage.data), part_rows=100, processes=(1,))
    assert found.options[0].hours * 3600 == pytest.approx(5 + 9)  # ten parts, of which the first takes longer


@pytest.mark.parametrize("barred", [False, True])
def test_disk_is_what_the_folder_takes(tmp_path: Path, barred: bool) -> None:
    draw = np.random.default_rng(0)
    stage = replace(pretrain_stage("gpt2 sdpa"), data=Corpus([" ".join(draw.choice(WORDS, 6)) for _ in range(600)]))
    vectors = query_vectors(stage, 3)
    if barred:
        vectors = replace(vectors, errors=tuple((vector,) for vector in vectors.vectors))
    found = plan(vectors, feed_of(stage.data), part_rows=200)
    score(vectors, out=tmp_path / "s", part_rows=200)
    size = sum(path.stat().st_size for path in (tmp_path / "s").glob("part-*"))
    assert found.disk_bytes == pytest.approx(size, rel=0.1) and found.parts == 3
    with pytest.raises(BadInput, match="at least 1"):
        plan(vectors, feed_of(stage.data), part_rows=200, sample=0)
    with pytest.raises(BadInput, match="a part of 0 rows"):
        plan(vectors, feed_of(stage.data), part_rows=0)


@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(compress=0.2),
        Scoring(precision="bfloat16"),
        Scoring(mode="reverse", batch_size=3),
        Scoring(token_scores=True, compiled=True),
    ],
)
def test_what_is_timed_is_what_a_run_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scoring: Scoring) -> None:
    draw = np.random.default_rng(0)
    stage = replace(pretrain_stage("gpt2 sdpa"), data=Corpus([" ".join(draw.choice(WORDS, 6)) for _ in range(200)]))
    vectors, used = query_vectors(stage, 2), []
    scored = RowScorer.score

    def noted(self: RowScorer, encoded: list[list[int]], rows: list[int]):  # type: ignore[no-untyped-def]
        used.append((type(self._score), self.stage.precision, self.batch_size, self.compression is not None))
        return scored(self, encoded, rows)

    monkeypatch.setattr(RowScorer, "score", noted)
    found = plan(vectors, feed_of(stage.data), scoring=scoring, part_rows=100, sample=50, processes=(1,))
    timed = set(used)
    used.clear()
    ran = score(vectors, out=tmp_path / "s", part_rows=100, **asdict(scoring))
    assert set(used) == timed and len(timed) == 1
    assert found.scoring == ran.manifest["scoring"]


def test_making_the_scorer_is_paid_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = replace(pretrain_stage("gpt2 sdpa"), data=Corpus(["the cat sat"] * 1000))
    clock = [0.0]
    made, scored = Scoring.scorer, RowScorer.score

    def making(self: Scoring, *arguments: Any) -> RowScorer:
        clock[0] += 30.0
        return made(self, *arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def scoring(self: RowScorer, *arguments: Any):  # type: ignore[no-untyped-def]
        clock[0] += 0.001
        return scored(self, *arguments)

    monkeypatch.setattr(Scoring, "scorer", making)
    monkeypatch.setattr(RowScorer, "score", scoring)
    found = plan(query_vectors(stage), feed_of(stage.data), part_rows=100, processes=(1, 2))
    assert [option.hours * 3600 for option in found.options] == pytest.approx([30.13, 30.065])  # 13 batches a part
    assert found.seconds_start == pytest.approx(30)
