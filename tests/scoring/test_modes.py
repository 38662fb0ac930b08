"""Forward mode, reverse mode and a loop of autograd give the same scores, for every architecture and odd module."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from nlpinf import parameters as P
from nlpinf.scoring.forward import ForwardScorer, forward_scores
from nlpinf.scoring.reverse import ReverseScorer, reverse_scores
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Classification
from tests.cases import FAMILIES, randomised
from tests.gated import GATED, gated_stage, loss_alone
from tests.scoring.common import apart, by_loop, directions, pretrain_stage

LSTM = {f"lstm.{kind}_{gate}_l0" for kind in ("weight", "bias") for gate in ("ih", "hh")}


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_modes_agree_with_a_loop_of_autograd(family: str, queries: int) -> None:
    stage = pretrain_stage(family)
    vectors = directions(stage, queries)
    truth, losses = by_loop(stage, vectors)
    forward, reverse = ForwardScorer(stage, vectors), ReverseScorer(stage, vectors)
    for batch in stage.batches():
        ahead, back = forward(batch), reverse(batch)
        expected = truth[batch.rows]
        assert apart(ahead.scores, expected) < 1e-10 and apart(back.scores, expected) < 1e-10
        assert apart(ahead.losses, losses[batch.rows]) < 1e-10 and apart(back.losses, losses[batch.rows]) < 1e-10
        assert ahead.item_scores is not None and back.item_scores is None
        assert apart(batch.sum_by_example(ahead.item_scores), expected) < 1e-10
    # Transformers and perceptrons take no forward-mode pass a query; an LSTM's own weights do, and ELMo's encoder.
    uncovered = {"lstm tagger": LSTM, "elmo sampled": set(stage.theta)}
    uncovered["elmo"] = {name for name in stage.theta if not name.startswith("head.")}
    assert set(reverse.uncovered) == uncovered.get(family, set())


@pytest.mark.parametrize("block", [1, 300, 5000])
def test_blocks_of_any_size_change_no_score(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("nlpinf.scoring.layers._BLOCK", block)
    stage = pretrain_stage("gpt2 sdpa")
    vectors = directions(stage, 3)
    truth, _ = by_loop(stage, vectors)
    reverse = ReverseScorer(stage, vectors)
    assert not reverse.uncovered
    for batch in replace(stage, batch_size=5).batches():
        assert apart(reverse(batch).scores, truth[batch.rows]) < 1e-10


@pytest.mark.parametrize("family", ["bert sdpa", "gpt2 sdpa", "lstm tagger"])
def test_modes_agree_in_single_precision(family: str) -> None:
    stage = pretrain_stage(family, torch.float32)
    vectors = directions(stage, 3)
    reverse = ReverseScorer(stage, vectors)
    assert set(reverse.uncovered) == (LSTM if family == "lstm tagger" else set())
    for batch in stage.batches():
        assert apart(reverse(batch).scores, forward_scores(stage, vectors, batch).scores) < 1e-5


def test_token_scores_are_the_derivatives_of_the_token_losses() -> None:
    stage = pretrain_stage("gpt2 sdpa")
    vector = directions(stage)[0]
    (batch,) = list(replace(stage, batch_size=64).batches())
    found = forward_scores(stage, [vector], batch).item_scores
    step = 1e-5

    def losses(scale: float) -> Tensor:
        moved = P.axpy(scale, vector, stage.theta)
        with evaluation(stage.model):
            return stage.task.losses(stage.outputs(batch, moved), batch) * stage.item_weights(batch)

    assert found is not None
    assert apart(found[:, 0], (losses(step) - losses(-step)) / (2 * step)) < 1e-7


class Raw(nn.Module):
    """A bare parameter, a layer used twice, and a map that shares the embedding's weight without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.twice, self.gain = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.twice(self.words(ids)))) * self.gain
        return F.linear(h, self.words.weight)


class Positions(nn.Module):
    """Position embeddings with ids (1, T), added in place, and layer norms with and without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.LayerNorm(4)
        self.rms, self.bare = nn.RMSNorm(4), nn.LayerNorm(4, elementwise_affine=False)
        self.mix, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        h += self.places(torch.arange(ids.shape[1])[None])
        h = self.mix(self.norm(h)).relu_()
        return self.out(self.bare(self.rms(h)))


class Experts(nn.Module):
    """Each token goes to one of two experts, which see tokens without their sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        mixed = torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            mixed = mixed.index_put((ids % 2 == k,), expert(h[ids % 2 == k]))
        return self.out(torch.tanh(mixed))


class TimeFirst(nn.Module):
    """Works on (T, B, d), as recurrent code does."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.words(ids.T)))).transpose(0, 1)


class Scaled(nn.Linear):
    """A subclass that is no linear map of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tanh(), self.bias)


class OwnNorm(nn.Module):
    """A normalisation of a class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Subclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.own, self.scaled = nn.Embedding(7, 4, max_norm=None), OwnNorm(), Scaled(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(self.own(self.words(ids)))


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class Convolution(nn.Module):
    """A convolution over time, and weights under a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.over, self.out = nn.Embedding(7, 4), nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 3)
        nn.utils.parametrize.register_parametrization(self.out, "weight", Exponential())

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.over(self.words(ids).transpose(1, 2)).transpose(1, 2)))


class Pruned(nn.Module):
    """A linear layer whose weight is made of another parameter before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)
        prune.custom_from_mask(self.out, "weight", torch.arange(12).view(3, 4) % 3 > 0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(ids)))


ODD: dict[str, tuple[type[nn.Module], set[str]]] = {
    "raw": (Raw, {"words.weight", "gain"}),
    "positions": (Positions, set()),
    "experts": (Experts, {f"experts.{k}.{n}" for k in (0, 1) for n in ("weight", "bias")}),
    "time first": (TimeFirst, {"words.weight", "mix.weight", "mix.bias", "out.weight", "out.bias"}),
    "subclassed": (Subclassed, set()),
    "pruned": (Pruned, {"out.weight_orig"}),
    "convolution": (Convolution, {"out.parametrizations.weight.original", "out.bias"}),
}


def tagged(seed: int, lengths: list[int], classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, 7, (n,), generator=generator), torch.randint(0, classes, (n,), generator=generator))
        for n in lengths
    ]


def autograd_scores(stage: Stage, vectors: list[P.Parameters], batch: Any) -> Tensor:
    theta = {n: t.clone().requires_grad_(True) for n, t in stage.theta.items()}
    with evaluation(stage.model):
        losses = stage.example_losses(batch, theta)
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(theta.values()), retain_graph=True, materialize_grads=True)
        rows.append(torch.stack([sum((g * v[n]).sum() for n, g in zip(theta, gradients)) for v in vectors]))  # type: ignore[misc]
    return torch.stack(rows)


@pytest.mark.parametrize("name", ODD)
def test_odd_modules_are_exact_too(name: str) -> None:
    kind, by_pass = ODD[name]
    model = randomised(kind().double(), 3)
    stage = Stage(model, Classification(), tagged(1, [2, 3, 3, 5, 2, 4], 3), reduction="example", batch_size=2)
    vectors = directions(stage, 3)
    reverse = ReverseScorer(stage, vectors)
    for batch in stage.batches():
        assert apart(reverse(batch).scores, autograd_scores(stage, vectors, batch)) < 1e-10
    assert set(reverse.uncovered) == by_pass


def test_a_use_that_only_later_batches_show_is_seen() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.out(self.words(ids))
            return h + h @ self.out.weight[:, :3] if ids.shape[1] == 4 else h

    data = tagged(1, [2, 3, 3, 5, 2, 4, 4], 3)
    stage = Stage(randomised(Sometimes().double(), 3), Classification(), data, batch_size=2)
    vectors = directions(stage, 2)
    reverse = ReverseScorer(stage, vectors)
    assert reverse.uncovered == []
    four = next(b for b in stage.batches([5, 6]))
    assert apart(reverse(four).scores, autograd_scores(stage, vectors, four)) < 1e-10
    assert reverse.uncovered == ["out.weight"]


@pytest.mark.parametrize("name", GATED)
def test_gated_layers_experts_and_norms_of_their_own(name: str) -> None:
    """Llama, Qwen 2, Gemma and Mixtral, against one backward pass for each sentence alone."""
    stage = gated_stage(name)
    vectors = directions(stage, 3)
    truth = []
    with evaluation(stage.model):
        for i in range(stage.size):
            theta = {n: t.clone().requires_grad_(True) for n, t in stage.theta.items()}
            gradients = torch.autograd.grad(loss_alone(stage, i, theta), list(theta.values()), materialize_grads=True)
            truth.append(torch.stack([sum((g * v[n]).sum() for n, g in zip(theta, gradients)) for v in vectors]))  # type: ignore[misc]
    expected = torch.stack(truth)
    reverse = ReverseScorer(stage, vectors)
    for batch in stage.batches():
        # Rotary angles and the norms' means are float32 inside these models, whatever their dtype: hence 1e-6.
        assert apart(forward_scores(stage, vectors, batch).scores, expected[batch.rows]) < 1e-6
        assert apart(reverse(batch).scores, expected[batch.rows]) < 1e-6
        assert apart(autograd_scores(stage, vectors, batch), expected[batch.rows]) < 1e-6
    assert all("experts" in n or "gate" in n for n in reverse.uncovered) and (
        name == "mixtral" or not reverse.uncovered
    )


def test_examples_without_counted_items_score_zero() -> None:
    stage = pretrain_stage("gpt2 sdpa")
    ids = [[5, 6, 7, 8], [9], [6, 5], [7, 7, 7, 7]]
    short = replace(stage, data=ids, reduction="example", batch_size=4, record={})
    vectors = directions(short, 3)
    (batch,) = list(short.batches())
    ahead, back = forward_scores(short, vectors, batch), reverse_scores(short, vectors, batch)
    at = int((batch.rows == 1).nonzero())
    assert batch.counts[at] == 0 and torch.equal(ahead.scores[at], torch.zeros(3, dtype=torch.float64))
    assert apart(back.scores, ahead.scores) < 1e-10
    assert apart(ahead.scores, autograd_scores(short, vectors, batch)) < 1e-10


@pytest.mark.parametrize("scorer", [ForwardScorer, ReverseScorer])
@pytest.mark.parametrize("family", ["bert sdpa", "gpt2 sdpa", "lstm tagger"])
def test_the_users_model_is_left_as_it_was(family: str, scorer: Any) -> None:
    stage = pretrain_stage(family)
    model = stage.model.train()
    model.requires_grad_(True)
    last = list(model.parameters())[-1].requires_grad_(False)

    def state() -> Any:
        return (
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()],
            [(id(p), p.requires_grad, p.grad, p._version) for p in model.parameters()],
            getattr(getattr(model, "config", None), "_attn_implementation", None),
            torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.is_grad_enabled(),
        )  # fmt: skip

    values = copy.deepcopy(dict(model.state_dict()))
    before = state()
    run = scorer(stage, directions(stage, 3))
    for batch in stage.batches():
        run(batch)
    last.requires_grad_(True)
    before[1][-1] = (*before[1][-1][:1], True, *before[1][-1][2:])
    assert state() == before
    assert all(torch.equal(values[n], t) for n, t in model.state_dict().items())
