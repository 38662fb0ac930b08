"""Models with a part that one of the two modes would get wrong: each row's score is what autograd finds for it alone, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpinf import score
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.scoring.reverse import ReverseScorer
from nlpinf.stages import Stage
from nlpinf.tasks import Classification, Regression
from tests.cases import case
from tests.scoring.common import query_vectors

GENERATOR = torch.Generator().manual_seed(0)
WORDS, WIDTH, RARE = 12, 5, 11
ROWS = [(torch.randint(0, 10, (6,), generator=GENERATOR), torch.tensor(i % 3)) for i in range(40)]


class Pooled(nn.Module):
    """Words, something in the middle, their mean, classes."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(WORDS, WIDTH, padding_idx=padding), nn.Linear(WIDTH, 3)
        self.middle = nn.Linear(WIDTH, WIDTH)

    def between(self, h: Tensor, ids: Tensor) -> Tensor:
        return torch.tanh(self.middle(h))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.between(self.words(ids), ids).mean(1))


class Routed(Pooled):
    """The middle is for rare words alone."""

    def between(self, h: Tensor, ids: Tensor) -> Tensor:
        rare = ids == RARE
        return h.masked_scatter(rare[..., None], torch.tanh(self.middle(h[rare]))) if bool(rare.any()) else h


class Unmoved(Pooled):
    """The middle is run without gradients."""

    def between(self, h: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            moved = torch.tanh(self.middle(h))
        return h + moved


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


class Squared(Pooled):
    """An operation with a derivative backward only."""

    def between(self, h: Tensor, ids: Tensor) -> Tensor:
        return _Square.apply(self.middle(h))


def stage_of(model: nn.Module, rows: list[Any]) -> Stage:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return Stage(model.double(), Classification(), rows, batch_size=8)


def alone(stage: Stage, vectors: QueryVectors) -> Tensor:
    """⟨v, g'(z)⟩ of every row by itself, by autograd, (rows, queries)."""
    found = []
    for x, y in stage.data:
        loss = F.cross_entropy(stage.model(x[None]), y[None])
        gradients = dict(zip(stage.theta, torch.autograd.grad(loss, list(stage.model.parameters()), allow_unused=True)))
        found.append([sum(float((v[n] * g).sum()) for n, g in gradients.items() if g is not None) for v in vectors.vectors])  # fmt: skip
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mode", ["forward", "reverse", "auto"])
def test_a_padding_word_inside_a_row_has_no_derivative(mode: Any, count: int) -> None:
    stage = stage_of(Pooled(padding=3), ROWS)
    assert sum(int((x == 3).sum()) for x, _ in ROWS) > 10
    vectors = query_vectors(stage, count)
    scores = score(vectors, mode=mode)
    found = torch.stack([torch.from_numpy(scores.column(i)) for i in range(count)], 1).double()
    torch.testing.assert_close(found, alone(stage, vectors), rtol=1e-5, atol=1e-5)


def test_a_layer_for_rare_words_is_not_taken_on_trust() -> None:
    """No probe has the word; then a batch of two rows has two of it, both in one row."""
    rare = ROWS[0][0].clone()
    rare[1:3] = RARE
    rows = [*ROWS, (rare, torch.tensor(1)), ROWS[1]]
    stage = stage_of(Routed(), rows)
    vectors = query_vectors(stage)
    scorer = ReverseScorer(stage, list(vectors.vectors))
    (batch,) = stage.batches([40, 41])
    torch.testing.assert_close(scorer(batch).scores, alone(stage, vectors)[[40, 41]], rtol=1e-10, atol=1e-12)
    assert "middle.weight" in scorer.uncovered


def test_a_layer_without_gradients_is_refused_where_it_would_count() -> None:
    stage = stage_of(Unmoved(), ROWS)
    vectors = query_vectors(stage)
    with pytest.raises(BadInput, match=r"forward mode and autograd differ .*no_grad.*nlpinf check"):
        score(vectors)
    found = torch.from_numpy(score(vectors, mode="reverse").column()).double()[:, None]
    torch.testing.assert_close(found, alone(stage, vectors), rtol=1e-5, atol=1e-5)


def test_where_forward_mode_cannot_go_reverse_mode_does() -> None:
    stage = stage_of(Squared(), ROWS)
    vectors = query_vectors(stage)
    scores = score(vectors)
    assert scores.manifest["scoring"]["mode"] == "reverse"
    found = torch.from_numpy(scores.column()).double()[:, None]
    torch.testing.assert_close(found, alone(stage, vectors), rtol=1e-5, atol=1e-5)
    with pytest.raises(BadInput, match=r"forward mode cannot go through its model.*nlpinf check"):
        score(vectors, mode="forward")


@pytest.mark.parametrize("values", [(), (2,)])
def test_whole_numbers_are_targets_of_a_regression_like_any(values: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, max(1, sum(values)))).double()
    inputs = torch.randn(6, 4, generator=GENERATOR).double()
    whole = torch.randint(-3, 4, (6, *values), generator=GENERATOR)
    whole[0] = -100
    stages = [Stage(model, Regression(), list(zip(inputs, y))) for y in (whole, whole.double())]
    assert stages[0].objective() == stages[1].objective()
    one, other = (score(query_vectors(stage)).column() for stage in stages)
    assert (one == other).all()
    squeezed = Stage(Flat(model), Regression(), stages[1].data) if not values else stages[1]
    assert squeezed.objective() == stages[1].objective()


class Flat(nn.Module):
    """A model of one value a row that returns (B,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, 0]


def test_texts_beyond_the_positions_of_a_model_are_refused_in_a_line() -> None:
    stage = case("gpt2 sdpa", "frozen").chain.stages[0]
    task: Any = stage.task
    longer = Stage(stage.model, type(task)(task.tokenizer, 1000), ["the cat sat on the mat " * 100])
    with pytest.raises(BadInput, match=r"no place or no word.*max_length within the model's positions"):
        longer.objective()
