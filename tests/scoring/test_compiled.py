"""The compiled scorer gives a loop of autograd's scores, or the reason why it cannot."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from nlpinf.errors import BadInput
from nlpinf.scoring import compiled, score
from nlpinf.scoring.compiled import CannotCompile, CompiledScorer
from nlpinf.scoring.forward import ForwardScorer
from nlpinf.scoring.reverse import ReverseScorer
from nlpinf.stages import Stage
from tests.scoring.common import apart, by_loop, directions, pretrain_stage, query_vectors, sentences

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")


@pytest.mark.parametrize(
    ("family", "queries", "unfused"),
    [("bert sdpa", 1, 128), ("bert sdpa", 1, 0), ("gpt2 sdpa", 1, 8), ("gpt2 eager", 3, 128)],
)
def test_a_loop_of_autograd_agrees_with_batches_of_every_shape(
    family: str, queries: int, unfused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_UNFUSED_UP_TO", unfused)  # so that rows are on either side of the limit
    stage = pretrain_stage(family)
    vectors = directions(stage, queries)
    scorer = CompiledScorer(ReverseScorer(stage, vectors), backend="aot_eager")
    truth, losses = by_loop(stage, vectors)
    for size in (1, 4, 7):
        for batch in replace(stage, batch_size=size).batches():
            found = scorer(batch)
            assert apart(found.scores, truth[batch.rows]) < 1e-10
            assert apart(found.losses, losses[batch.rows]) < 1e-10


@needs_compiler
def test_a_corpus_scored_compiled_in_bfloat16_ranks_as_in_float32() -> None:
    stage, texts = pretrain_stage("gpt2 sdpa", torch.float32), sentences(60)
    vectors = query_vectors(stage)
    exact = score(vectors, texts, mode="forward")
    low = score(vectors, texts, precision="bfloat16", compiled=True)
    assert low.manifest["scoring"]["compiled"] is True
    assert low.manifest["scoring"]["mode"] == "reverse"
    assert low.manifest["identity"]["precision"] == "bfloat16"
    a, b = (torch.as_tensor(found.column()).double().flatten() for found in (exact, low))
    assert torch.corrcoef(torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()]))[0, 1] > 0.995
    assert 1e-6 < apart(b, a) < 0.05  # low precision it is, and not far off


def test_low_precision_forward_mode_keeps_the_output_layer_and_the_sums_in_float32() -> None:
    stage = pretrain_stage("gpt2 sdpa", torch.float32)
    vectors = directions(stage)
    batch = next(iter(stage.batches()))
    exact, low = ForwardScorer(stage, vectors)(batch), ForwardScorer(stage.at("bfloat16"), vectors)(batch)
    assert low.scores.dtype == torch.float64
    assert 1e-6 < apart(low.scores, exact.scores) < 0.05


def test_low_precision_reverse_mode_of_many_queries_is_near_each_querys_own() -> None:
    stage = pretrain_stage("gpt2 sdpa", torch.float32)  # whose output layer is tied to its embedding
    vectors = directions(stage, 5)
    low = ReverseScorer(stage.at("bfloat16"), vectors)
    assert low.low and all(vector.dtype == torch.bfloat16 for vector in low.low.values())
    batch = next(iter(stage.batches()))
    found = low(batch).scores
    for q, vector in enumerate(vectors):
        exact = ForwardScorer(stage, [vector])(batch).scores
        assert 1e-6 < apart(found[:, q : q + 1], exact) < 0.05


def test_what_low_precision_cannot_do_is_refused() -> None:
    vectors = query_vectors(pretrain_stage("gpt2 sdpa", torch.float32))
    with pytest.raises(BadInput, match="score in bfloat16"):
        score(vectors, sentences(2), precision="float16")
    with pytest.raises(BadInput, match="leave out one of the two"):
        score(vectors, sentences(2), precision="bfloat16", compress=0.05)


class _Odd(nn.Module):
    """A parameter that no rule covers, on the way of a language model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(300, 300, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale[0, 0]


def test_what_cannot_be_compiled_is_scored_without_and_says_why() -> None:
    made = pretrain_stage("gpt2 sdpa")

    model = copy.deepcopy(made.model)
    block = model.get_submodule("transformer.h.0")
    block.mlp = _Odd(block.mlp)
    stage = Stage(model, made.task, made.data)
    with pytest.raises(CannotCompile, match="no rule for"):
        CompiledScorer(ReverseScorer(stage, directions(stage)))
    vectors, texts = query_vectors(stage), sentences(8)
    found = score(vectors, texts, compiled=True)
    assert found.manifest["scoring"]["compiled"].startswith("not compiled: no rule for transformer.h.0.mlp.scale")
    assert apart(found.column(), score(vectors, texts).column()) == 0
