"""Training minimises the stage's own G, reduction, weight decay and proximity included, and is a function of the seed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from nlpinf import parameters as P
from nlpinf import training
from nlpinf.errors import BadInput
from nlpinf.stages import Stage
from nlpinf.tasks import Classification, MaskedLM
from nlpinf.training import Anchor, Schedule, Training, train
from tests.cases import MORE_TEXTS, TEXTS, bert_config, randomised, tokenizer

SENTENCES = [*TEXTS, *MORE_TEXTS, "the cat", "on the mat the dog sat", "good"]
STILL = 1e-30  # a learning rate that leaves every weight as it is


def language_stage(reduction: Any = "token", masks: int = 2, **config: Any) -> Stage:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = randomised(BertForMaskedLM(bert_config(**{**quiet, **config})), 1)
    task = MaskedLM(tokenizer(), 9, probability=0.3, masks=masks, seed=3)
    return Stage(model, task, SENTENCES, 0.01, reduction)


class Steps(nn.Module):
    """Logits of every step, linear in the parameters, so that G with weight decay is strictly convex."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 2, bias=False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.outer(x.flip(-1))


def convex_stage(reduction: Any) -> Stage:
    """A stage whose examples have from one to four counted steps, so that the two reductions differ."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for i in range(23):
        x = torch.randn(4, 3, generator=generator)
        y = (x[:, 0] + (0.5 if i % 4 else -1.5) * x[:, 1] > 0).long()
        y[1 + i % 4 :] = -100
        rows.append((x, y))
    return Stage(Steps(), Classification(), rows, {"inner.weight": 0.05, "outer.weight": 0.02}, reduction)


def copied(stage: Stage, **changes: Any) -> Stage:
    """The stage with a model of its own."""
    settings = {"reduction": stage.reduction, "trained": stage.trained, **changes}
    return Stage(copy.deepcopy(stage.model), stage.task, stage.data, stage.decay, **settings)


def values(stage: Stage) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in stage.model.parameters()])


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The loss of every step, as the Trainer gets it."""
    seen: list[float] = []
    compute = training._StageTrainer.compute_loss

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        seen.append(float(loss.detach().double()))
        return loss

    monkeypatch.setattr(training._StageTrainer, "compute_loss", watched)
    yield seen


def data_term(stage: Stage, left_out: tuple[int, ...] = ()) -> float:
    """1/m Σ g over the rows that stay: G without its weight decay, from the stage alone."""
    kept = [i for i in range(stage.size) if i not in left_out]
    decay = 0.5 * sum(value * float(stage.theta[n].double().square().sum()) for n, value in stage.decay.items())
    return (stage.objective(indices=kept) - decay) * len(kept) / stage.size


@pytest.mark.parametrize("reduction", ["example", "token"])
def test_the_losses_of_a_pass_have_the_mean_of_the_stage(reduction: Any, losses: list[float]) -> None:
    """Batches of 4, 4 and 1 rows; a pass a mask, so that two passes show all of G."""
    stage = language_stage(reduction)
    before = values(stage)
    train(stage, Training(epochs=2, batch_size=4, learning_rate=STILL))
    assert torch.equal(values(stage), before) and len(losses) == 6
    assert sum(losses) / 6 == pytest.approx(data_term(stage), rel=1e-5)
    other = language_stage("token" if reduction == "example" else "example")
    assert abs(data_term(other) - data_term(stage)) > 1e-3 * data_term(stage)


def test_the_logged_loss_is_the_stage_s_own() -> None:
    """One batch of all rows: what the Trainer itself logs, to its four decimals."""
    stage = language_stage("token", masks=1)
    logged = train(stage, Training(epochs=1, batch_size=64, learning_rate=STILL))
    assert logged == pytest.approx(data_term(stage), abs=1e-4)
    anchor = Anchor(0.3, {n: t + 0.1 for n, t in stage.theta.items()})
    size = sum(t.numel() for t in stage.theta.values())
    logged = train(stage, Training(epochs=1, batch_size=64, learning_rate=STILL), anchor=anchor)
    assert logged == pytest.approx(data_term(stage) + 0.3 * 0.01 * size, rel=1e-4)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_training_ends_where_the_gradient_vanishes(reduction: Any, anchored: bool) -> None:
    """∇G + 2α(W − W*) = 0 with L2 weight decay by name: a minimum that another reduction, decay or α does not have."""
    stage = convex_stage(reduction)
    anchor = Anchor(0.15, {"outer.weight": torch.full((2, 3), 0.5)}) if anchored else None
    train(stage, Training(epochs=400, batch_size=23, learning_rate=0.05), anchor=anchor)

    def slope(reduction: Any, alpha: float, scale: float = 1.0) -> float:
        here = copied(stage, reduction=reduction)
        gradient = here.gradient(decay=False)
        for name, value in here.decay.items():
            gradient[name] += scale * value * here.theta[name]
        gradient["outer.weight"] += 2 * alpha * (here.theta["outer.weight"] - 0.5)
        return P.norm(gradient)

    alpha = 0.15 if anchored else 0.0
    assert slope(reduction, alpha) < 2e-3
    assert slope("token" if reduction == "example" else "example", alpha) > 2e-2
    assert slope(reduction, alpha, scale=0.5) > 1e-2
    assert slope(reduction, alpha + 0.1) > 2e-2


def test_training_is_a_function_of_the_seed() -> None:
    """Also with dropout, and whatever random numbers were drawn before."""
    start = language_stage(hidden_dropout_prob=0.2)
    ends = []
    for number, seed in enumerate((1, 1, 2)):
        stage = copied(start)
        torch.manual_seed(100 + number)
        torch.rand(number)
        train(stage, Training(epochs=2, batch_size=4, learning_rate=1e-2, seed=seed))
        ends.append(values(stage))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], values(start))


def test_rows_that_are_left_out_change_nothing_else() -> None:
    """Every step keeps its other rows, in their order; a batch that loses all of its rows keeps its step."""
    lengths = [3 + i % 5 for i in range(41)]
    left_out = {2, 9, 10, 40}
    whole, less = (Schedule(lengths, 4, 3, seed=6, masks=2, exclude=out) for out in ((), left_out))
    for epoch in range(3):
        every, some = list(whole), list(less)
        assert len(every) == len(some) == len(whole) == 11
        assert sorted(i for batch in every for i, _, _ in batch) == list(range(41))
        assert some == [[key for key in batch if key[0] not in left_out] for batch in every]
        assert {turn for batch in every for _, turn, _ in batch} == {epoch % 2}
        assert [step for batch in every for step in {key[2] for key in batch}] == list(
            range(11 * epoch, 11 * epoch + 11)
        )
    assert whole.mean_size == less.mean_size == 41 / 11
    alone = Schedule(lengths, 4, 1, seed=6, exclude=set(range(41)) - {7})
    batches = list(alone)
    assert len(batches) == 11 and sum(map(len, batches)) == 1
    assert list(Schedule(lengths, 4, 1, seed=7)) != list(Schedule(lengths, 4, 1, seed=6))


def test_what_is_minimised_without_rows_is_what_a_score_speaks_of(losses: list[float]) -> None:
    """G − 1/m Σ_excluded g: the others keep their weight 1/m, the empty batch its step."""
    stage = language_stage("example", masks=1)
    train(stage, Training(epochs=1, batch_size=4, learning_rate=STILL), exclude=[0, 5])
    assert sum(losses) / len(losses) == pytest.approx(data_term(stage, (0, 5)), rel=1e-5)
    del losses[:]
    train(stage, Training(epochs=1, batch_size=1, learning_rate=STILL), exclude=[3])
    assert len(losses) == 9 and sorted(losses)[0] == 0.0 < sorted(losses)[1]
    assert sum(losses) / 9 == pytest.approx(data_term(stage, (3,)), rel=1e-5)


def test_the_anchor_is_the_proximity_term() -> None:
    theta = {"a": torch.tensor([1.0, -2.0], requires_grad=True), "b": torch.ones(2, 2)}
    anchor = Anchor(0.25, {"a": torch.tensor([0.0, 1.0])})
    loss = anchor.loss(theta)
    assert loss.item() == pytest.approx(0.25 * (1 + 9))
    (gradient,) = torch.autograd.grad(loss, [theta["a"]])
    torch.testing.assert_close(gradient, 2 * 0.25 * torch.tensor([1.0, -3.0]))


def test_a_large_alpha_holds_the_encoder_where_it_was() -> None:
    moved = []
    for alpha in (0.0, 1.0, 100.0):
        stage = language_stage()
        start = {n: t.clone() for n, t in stage.theta.items() if n.startswith("bert.")}
        train(stage, Training(epochs=12, batch_size=4, learning_rate=1e-2), anchor=Anchor(alpha, start))
        moved.append(P.norm(P.axpy(-1.0, start, P.select(stage.theta, start))))
    assert moved[0] > 3 * moved[1] > 9 * moved[2] > 0


def test_only_the_trained_parameters_move_and_the_model_is_given_back_as_it_was() -> None:
    stage = copied(language_stage(), trained=["cls.predictions.bias"])
    before = {n: t.clone() for n, t in stage.parameters.items()}
    stage.model.get_parameter("bert.embeddings.LayerNorm.bias").requires_grad_(False)
    train(stage, Training(epochs=1, batch_size=4))
    for name, parameter in stage.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name != "cls.predictions.bias"), name
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "bert.embeddings.LayerNorm.bias")


def test_a_run_that_diverges_or_has_no_rows_is_refused() -> None:
    with pytest.raises(BadInput, match=r"NaN or infinite in training; lower the learning rate"):
        train(language_stage(), Training(epochs=3, batch_size=4, learning_rate=1e20))
    stage = language_stage()
    with pytest.raises(BadInput, match="every example is left out"):
        train(stage, Training(), exclude=range(stage.size))


def test_progress_counts_the_steps() -> None:
    told: list[tuple[int, int, float]] = []
    train(language_stage(), Training(epochs=2, batch_size=4), progress=lambda *step: told.append(step))
    assert [(done, total) for done, total, _ in told] == [(i, 6) for i in range(1, 7)]
    assert all(loss == loss for _, _, loss in told[1:])
