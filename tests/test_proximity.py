"""α̂ of a run without a proximity term, against runs whose α is known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nlpinf.errors import BadInput
from nlpinf.proximity import fit_proximity
from nlpinf.stages import Stage
from nlpinf.tasks import Classification


class Net(nn.Module):
    def __init__(self, head: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(4, 3, dtype=torch.float64)
        self.add_module(head, nn.Linear(3, 2, dtype=torch.float64))
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.head)(torch.tanh(self.encoder(x)))


def _stages() -> tuple[Stage, Stage]:
    generator = torch.Generator().manual_seed(1)
    rows = [(torch.randn(4, generator=generator, dtype=torch.float64), i % 2) for i in range(30)]
    parent = Stage(Net("first"), Classification(), rows, name="pretrain")
    return parent, Stage(Net("second"), Classification(), rows, weight_decay=1e-3, name="finetune")


def _minimise(parent: Stage, stage: Stage, alpha: float, steps: int = 200) -> None:
    """Minimise F + α ‖W − W*‖² by LBFGS on an independently written loss."""
    start = copy.deepcopy(parent.model.encoder)  # type: ignore[attr-defined]
    x, y = (torch.stack([torch.as_tensor(r[i]) for r in stage.data]) for i in (0, 1))
    optimizer = torch.optim.LBFGS(stage.model.parameters(), max_iter=steps, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(stage.model(x), y)
        loss = loss + 5e-4 * sum(p.square().sum() for p in stage.model.parameters())
        for name, p in stage.model.encoder.named_parameters():  # type: ignore[attr-defined]
            loss = loss + alpha * (p - start.get_parameter(name).detach()).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("alpha", [0.003, 0.1])
def test_the_alpha_of_a_converged_run_is_found(alpha: float) -> None:
    parent, stage = _stages()
    _minimise(parent, stage, alpha)
    fitted = fit_proximity(parent, stage)
    assert fitted.alpha == pytest.approx(alpha, rel=1e-4)
    assert fitted.residual < 1e-3
    assert fitted.required().alpha == fitted.alpha


def test_a_run_that_moved_uphill_is_refused() -> None:
    parent, stage = _stages()
    gradient = stage.gradient(["encoder.weight"])
    with torch.no_grad():
        stage.model.encoder.weight.add_(gradient["encoder.weight"], alpha=0.1)  # type: ignore[attr-defined]
    fitted = fit_proximity(parent, stage)
    assert fitted.alpha < 0
    with pytest.raises(BadInput, match="moved uphill"):
        fitted.required()


def test_an_unchanged_encoder_is_refused() -> None:
    parent, stage = _stages()
    with pytest.raises(BadInput, match="use transfer='frozen'"):
        fit_proximity(parent, stage)
