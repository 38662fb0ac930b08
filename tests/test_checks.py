"""Each check passes on sound models, and fails on a model with the fault planted that it is there to find."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpinf.checks import Check, check
from nlpinf.errors import BadInput
from nlpinf.stages import Stage, fingerprint
from nlpinf.tasks import CausalLM, Classification
from tests.cases import case, tokenizer

NAMES = [
    "determinism",
    "padding",
    "batch size",
    "attention kernel",
    "gradient",
    "Hessian product",
    "forward mode",
    "rounding",
    "model restored",
]


def _sequences(count: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randint(1, 9, (2 + i % 5,), generator=generator), torch.tensor(i % 3)) for i in range(count)]


class _Sound(nn.Module):
    """Embedding, masked mean, tanh layer; `middle` is where a fault is planted."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-1).to(self.words.weight)
        return self.head(self.middle(torch.tanh(self.layer(self.pooled(self.words(ids), mask)))))

    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask).sum(1) / mask.sum(1)

    def middle(self, x: Tensor) -> Tensor:
        return x


class _Padded(_Sound):
    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.mean(1)


class _Dropout(_Sound):
    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class _SlightNoise(_Sound):
    def middle(self, x: Tensor) -> Tensor:
        return x + 1e-3 * torch.randn(x.shape)


class _BatchStatistics(_Sound):
    def middle(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class _RunningStatistics(_Sound):
    """Counts in evaluation mode: harmless to the result, but the model is another one afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def middle(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        self.get_buffer("seen").add_(1)
        return x


class _Detached(_Sound):
    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + x.detach())


class _Square(torch.autograd.Function):
    """x², with a right first derivative whose own derivative autograd does not see."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.x = inputs[0].detach().clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * ctx.x * grad

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return 2 * ctx.x * tangent


class _WrongSecondDerivative(_Sound):
    def middle(self, x: Tensor) -> Tensor:
        return _Square.apply(x)


class _WrongTangent(_Square):
    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return 3 * ctx.x * tangent


class _WrongForwardMode(_Sound):
    def middle(self, x: Tensor) -> Tensor:
        return _WrongTangent.apply(x)


class _WrongGradient(_Sound):
    def middle(self, x: Tensor) -> Tensor:
        return _WrongBackward.apply(x)


class _WrongBackward(_Square):
    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 1.9 * ctx.x * grad


class _Overflow(_Sound):
    def middle(self, x: Tensor) -> Tensor:
        return x + torch.log(x - 10)


class _Silu(_Sound):
    """SiLU's backward pass has no forward mode; double backward does without."""

    def middle(self, x: Tensor) -> Tensor:
        return F.silu(x)


class _Slope(torch.autograd.Function):
    """2x, with no derivative of either mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass


class _OnceOnly(torch.autograd.Function):
    """x², with first derivatives in both modes, and none of second order."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Slope.apply(*ctx.saved_tensors) * grad

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangent


class _NoSecondDerivative(_Sound):
    def middle(self, x: Tensor) -> Tensor:
        return _OnceOnly.apply(x)


def _stage(model: nn.Module, dtype: torch.dtype = torch.float32) -> Stage:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return Stage(model.to(dtype), Classification(), _sequences(), name="planted")


def _failed(checks: list[Check]) -> set[str]:
    assert [c.name for c in checks] == NAMES
    for c in checks:
        if c.passed:
            assert c.figure is not None and c.figure <= c.limit and c.advice == ""
        else:
            assert c.advice and (c.figure is None or c.figure > c.limit)
    return {c.name for c in checks if not c.passed}


@pytest.mark.parametrize("family", ["mlp", "mlp regression", "bert eager", "bert sdpa", "gpt2 sdpa", "lstm tagger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_sound_stages_pass(family: str, dtype: torch.dtype) -> None:
    for stage in case(family, "proximity", dtype).chain.stages:
        assert _failed(check(stage)) == set(), stage.name


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        (_Sound(), set()),
        (_Padded(), {"padding"}),
        (_BatchStatistics(), {"batch size"}),
        (_Detached(), {"gradient", "Hessian product"}),
        (_WrongSecondDerivative(), {"Hessian product"}),
        (_WrongForwardMode(), {"forward mode", "Hessian product"}),
        (_WrongGradient(), {"gradient", "forward mode", "Hessian product"}),
        (_RunningStatistics(), {"model restored"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_planted_fault_fails_its_own_line(model: nn.Module, lines: set[str]) -> None:
    assert _failed(check(_stage(model))) == lines


@pytest.mark.parametrize("model", [_Dropout(), _SlightNoise()])
def test_random_numbers_fail_the_first_line(model: nn.Module) -> None:
    checks = check(_stage(model))
    assert "determinism" in _failed(checks)
    assert "draws random numbers" in checks[0].advice


def test_figures_tell_the_size_of_the_fault() -> None:
    found = {c.name: c.figure for c in check(_stage(_SlightNoise(), torch.float64))}
    assert 1e-5 < found["determinism"] < 1e-1  # type: ignore[operator]


def test_a_difference_between_attention_kernels_shows() -> None:
    class TwoFaced(nn.Module):
        """Attention by the kernel of PyTorch's choice in training, and something else under the math kernel."""

        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            mask = (ids != 0)[:, None, :]
            out = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            scale = 1.0 if torch.backends.cuda.flash_sdp_enabled() else 1.01
            weight = mask.transpose(1, 2).to(x)
            return self.head(scale * (out * weight).sum(1) / weight.sum(1))

    assert _failed(check(_stage(TwoFaced()))) == {"attention kernel"}


def test_eager_attention_is_compared_where_the_model_has_it() -> None:
    stage = case("gpt2 sdpa", "proximity", torch.float32).chain.stages[0]
    model = copy.deepcopy(stage.model)

    # The check works on deep copies, so the fault goes into the class.
    class Faulty(type(model)):  # type: ignore[misc]
        def set_attn_implementation(self, kind: str) -> None:
            super().set_attn_implementation(kind)
            with torch.no_grad():
                self.transformer.ln_f.bias += 0.1

    model.__class__ = Faulty
    broken = Stage(model, CausalLM(tokenizer(), 9), stage.data, name="kernels")
    assert _failed(check(broken)) == {"attention kernel"}


def test_bfloat16_fails_by_rounding_alone() -> None:
    assert _failed(check(_stage(_Sound(), torch.bfloat16))) == {"rounding"}


def test_what_cannot_be_computed_fails_with_the_reason() -> None:
    checks = check(_stage(_NoSecondDerivative()))
    assert _failed(checks) == {"Hessian product"}
    line = next(c for c in checks if c.name == "Hessian product")
    assert line.figure is None and "could not be computed (NotImplementedError" in line.advice and "ggn" in line.advice


def test_second_derivatives_do_without_forward_mode() -> None:
    assert _failed(check(_stage(_Silu()))) == set()


def test_not_finite_fails() -> None:
    checks = check(_stage(_Overflow()))
    assert {"determinism", "gradient", "Hessian product", "forward mode", "rounding"} <= _failed(checks)
    assert "NaN" in checks[0].advice


def test_the_model_is_not_touched() -> None:
    stage = _stage(_RunningStatistics())
    model = stage.model
    model.layer.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, modes = fingerprint({**stage.parameters, "seen": model.seen}), [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    check(stage)
    assert fingerprint({**stage.parameters, "seen": model.seen}) == before
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert torch.equal(torch.random.get_rng_state(), random)


def test_the_seed_decides() -> None:
    stage = _stage(_Padded())
    assert check(stage, seed=3) == check(stage, seed=3)
    assert check(stage, seed=3)[1].figure != check(stage, seed=4)[1].figure


def test_progress_and_bad_input() -> None:
    stage = _stage(_Sound())
    seen: list[Check] = []
    assert check(stage, examples=2, progress=seen.append) == seen
    with pytest.raises(BadInput, match="at least 2"):
        check(stage, examples=1)
