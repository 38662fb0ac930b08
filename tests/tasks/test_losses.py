"""Closed forms at the outputs against autograd, and the tasks on plain tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nlpinf import parameters as P
from nlpinf.curvature import Curvature
from nlpinf.data.hashing import uniform
from nlpinf.errors import BadInput
from nlpinf.scoring.forward import ForwardScorer
from nlpinf.scoring.reverse import ReverseScorer
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Classification, CrossEntropy, OutputLoss, Regression, SquaredError
from tests import oracle
from tests.cases import Tagger, randomised


def setting(loss: OutputLoss, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs, tangent = scale * torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    cross = isinstance(loss, CrossEntropy)
    return outputs, torch.randint(0, 4, (6,)) if cross else torch.randn(6, 4, dtype=torch.float64), tangent


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_closed_forms_equal_autograd(loss: OutputLoss, scale: float) -> None:
    """Large outputs too, where exp would overflow."""
    o, t, u = setting(loss, scale)
    expected = F.cross_entropy(o, t, reduction="none") if loss.name == "cross_entropy" else ((o - t) ** 2).sum(1) / 2
    assert torch.allclose(loss.losses(o, t), expected, rtol=1e-12)
    each = [oracle.item_losses(x[None], y[None])[0] for x, y in zip(o, t)]
    assert torch.allclose(loss.losses(o, t), torch.stack(each), rtol=1e-12)
    gradients, products = [], []
    for x, y, v in zip(o, t, u):
        f = lambda z, y=y: oracle.item_losses(z[None], y[None])[0]  # noqa: E731
        gradients.append(torch.autograd.functional.jacobian(f, x))
        products.append(torch.autograd.functional.hessian(f, x) @ v)
    gradient = torch.stack(gradients)
    assert torch.allclose(loss.gradient(o, t), gradient, rtol=1e-12, atol=1e-14)
    assert torch.allclose(loss.hessian_product(o, t, u), torch.stack(products), rtol=1e-10, atol=1e-12)
    assert torch.allclose(loss.tangents(o, t, u), (gradient * u).sum(1), rtol=1e-12, atol=1e-12)


def test_sampled_targets_follow_the_model() -> None:
    """Drawn classes have the model's probabilities; drawn residuals of squared error are standard normal."""
    o = torch.randn(1, 4, dtype=torch.float64).expand(20000, 4)
    u = uniform(3, torch.arange(20000)[:, None], torch.arange(4)[None])
    p = torch.softmax(o[0], 0)
    drawn = (p - CrossEntropy().sampled_gradient(o, u[:, :1])).argmax(1)
    share = torch.bincount(drawn, minlength=4) / 20000
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 20000).sqrt()).all()
    g = SquaredError().sampled_gradient(o, u)
    assert g.mean(0).abs().max() < 4.5 / 20000**0.5
    assert (g.T @ g / 20000 - torch.eye(4, dtype=torch.float64)).abs().max() < 5 * 2**0.5 / 20000**0.5


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    for seed, row, place in [(0, 0, 0), (1, 2, 3), (2**40, 10**9, 511), (7, 2**62, 0)]:
        made = uniform(seed, torch.tensor(row), torch.tensor(place))
        assert float(made) == oracle.uniform(seed, row, place)
    many = uniform(5, torch.arange(200)[:, None], torch.arange(200)[None])
    assert many.min() >= 0 and many.max() < 1
    assert abs(float(many.mean()) - 0.5) < 4.5 * (1 / 12 / 40000) ** 0.5
    assert len(many.unique()) == 40000


def test_step_labels_that_are_not_counted() -> None:
    """Items are the labelled steps in order, whatever the padding; a row of no label has no item."""
    task = Classification()
    data = [([1, 2, 3], [0, -100, 1]), ([4], [1]), ([5, 6], [-100, -100])]
    encoded = task.encode([(torch.tensor(x), torch.tensor(y)) for x, y in data])
    batch = task.collate(encoded, [7, 8, 9])
    assert batch.inputs["input"].tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert batch.targets.tolist() == [0, 1, 1]
    assert batch.example.tolist() == [0, 0, 1]
    assert batch.position.tolist() == [0, 2, 3]
    assert batch.counts.tolist() == [2, 1, 0]
    assert task.counted(encoded) == 3
    stage = Stage(randomised(Tagger(2).double(), 1), task, [(torch.tensor(x), torch.tensor(y)) for x, y in data])
    with evaluation(stage.model):
        losses = stage.example_losses(batch)
    assert losses[2] == 0
    logits = stage.model.eval()(torch.tensor([[1, 2, 3]]))[0]
    assert losses[0].item() == pytest.approx(F.cross_entropy(logits[[0, 2]], torch.tensor([0, 1])).item(), rel=1e-12)


def test_regression_and_keyword_inputs() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1, dtype=torch.float64)

        def forward(self, *, features: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.linear(features)}

    x, y = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    model = Keyword()
    stage = Stage(model, Regression("features"), list(zip(x, y)))
    expected = 0.5 * ((model.linear(x)[:, 0] - y) ** 2).mean()
    assert stage.objective() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("steps", [2, 4])
def test_regression_sums_over_all_values_of_an_example(steps: int) -> None:
    """Outputs of three dimensions, as many steps as examples or not: a loss an example, the sum over steps and values."""
    x, y = torch.randn(4, steps, 3, dtype=torch.float64), torch.randn(4, steps, 2, dtype=torch.float64)
    model = nn.Linear(3, 2, dtype=torch.float64)
    stage = Stage(model, Regression(), list(zip(x, y)), batch_size=4)
    (batch,) = stage.batches()
    with evaluation(model), torch.no_grad():
        losses = stage.example_losses(batch)
        expected = torch.stack([sum(0.5 * ((model(a) - b) ** 2).sum() for a, b in zip(*pair)) for pair in zip(x, y)])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    vector = P.random_like(stage.theta, 1)
    residual, moved = model(x).detach() - y, F.linear(x, vector["weight"], vector["bias"])
    for scorer in (ForwardScorer, ReverseScorer):
        scores = scorer(stage, [vector])(batch).scores[:, 0]
        torch.testing.assert_close(scores, (residual * moved).sum((1, 2)), rtol=1e-12, atol=1e-12)
    matrix = torch.einsum("bsi,bsj->ij", x, x) / 4  # the Hessian of the mean loss in one row of the weights
    direction = {n: torch.zeros_like(t) for n, t in stage.theta.items()}
    direction["weight"][0] = torch.tensor([1.0, -2.0, 0.5])
    product = (Curvature(stage, "ggn") @ direction)["weight"]
    torch.testing.assert_close(product[0], matrix @ direction["weight"][0], rtol=1e-12, atol=1e-15)
    assert not product[1].any()


def test_inputs_of_unequal_shapes_are_refused() -> None:
    task = Classification()
    with pytest.raises(BadInput, match="different shapes"):
        task.collate(task.encode([(torch.zeros(2, 3), 0), (torch.zeros(3, 3), 1)]), [0, 1])
