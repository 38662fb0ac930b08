"""Pre-flight checks of a stage: is what it computes a function of its examples, and are its derivatives right?

Scores are derivatives of derivatives, so a model that trains well may still be unfit for them: a batch statistic, a
random number, a kernel or a hand-written backward pass that is good enough for training shows here, with its size.

Every check runs on copies of the model; the caller's own is never touched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nlpinf import parameters as P
from nlpinf.curvature.products import hessian_product
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.scoring.forward import forward_scores
from nlpinf.stages import Stage, evaluation
from nlpinf.testbench import Bench, differences, error_of, first, gradients, joined, relative, reverse_scores

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Check:
    """One line: `passed` says whether `figure`, a relative error, is at most `limit`; `advice` what to set if not.

    `figure` is None where the check could not be computed; `advice` then says why.
    """

    name: str
    passed: bool
    figure: float | None
    limit: float
    advice: str = ""


def check(
    stage: Stage, *, examples: int = 8, seed: int = 0, progress: Callable[[Check], None] | None = None
) -> list[Check]:
    """Check `stage` on `examples` of its rows and return one `Check` a property, in an order to read from the top.

    `progress` is called with each `Check` as soon as it is done.

    The scores are those of a seeded random vector. Errors are relative to the largest value of the batch, those of
    derivatives to the norm. Never raises for what the model does: a check that fails with an exception fails.
    """
    if examples < 2:
        raise BadInput(f"examples is {examples}; the checks compare examples with each other and need at least 2")
    bench = Bench.of(stage, examples, seed)
    limit = ROUNDING.get(stage.dtype, 1e-4)
    table: list[tuple[str, float, str, Callable[[Bench], float]]] = [
        (
            "determinism",
            0.0 if stage.device.type == "cpu" else limit,
            "two calls differ, so whatever else fails below may follow from it: something draws random numbers in "
            "evaluation mode; use nn.Dropout instead of F.dropout(training=True), and no sampling in forward",
            _determinism,
        ),
        (
            "padding",
            limit,
            "padding changes the result: pass attention_mask through to every layer that mixes positions, and count no "
            "padded position in a mean or a pooling",
            _padding,
        ),
        (
            "batch size",
            limit,
            "an example's result depends on the others in its batch: use LayerNorm, or BatchNorm with its running "
            "statistics (module.eval() must reach it)",
            _batch_size,
        ),
        (
            "attention kernel",
            max(limit, 1e-6),  # rotations and norms of several families compute in float32 whatever the model's dtype
            "the kernels of attention disagree: load the model with attn_implementation='eager', and train it so",
            _attention,
        ),
        (
            "gradient",
            1e-4,
            "the gradient is not the derivative of the loss: look for detach(), .data, rounding, or a backward pass of "
            "your own in forward",
            _gradient,
        ),
        (
            "Hessian product",
            1e-4,
            "second derivatives are wrong: an autograd.Function needs a jvp and a backward made of differentiable "
            "operations; where an operation has none, use curvature='ggn', which needs no second derivative of the "
            "network (but a frozen encoder does)",
            _hessian,
        ),
        (
            "forward mode",
            1e-5,
            "forward-mode scores differ from reverse-mode ones: correct the jvp of your autograd.Function, or use "
            "plain PyTorch operations instead of fused ones",
            _forward_mode,
        ),
        (
            "rounding",
            1e-3,
            "rounding hides the scores: load the model in float32 (dtype=torch.float32), and set "
            "torch.set_float32_matmul_precision('highest')",
            _rounding,
        ),
        (
            "model restored",
            0.0,
            "computing losses and scores changes the model: keep counters and running statistics out of forward in "
            "evaluation mode",
            _restored,
        ),
    ]
    done = []
    for entry in table:
        done.append(_run(bench, *entry))
        if progress is not None:
            progress(done[-1])
    return done


def _run(bench: Bench, name: str, limit: float, advice: str, measure: Callable[[Bench], float]) -> Check:
    try:
        with torch.random.fork_rng(devices=[bench.stage.device] if bench.stage.device.type == "cuda" else []):
            figure = measure(bench)
    except Exception as error:  # whatever the user's model raises is the finding
        told = (str(error) or repr(error)).strip().splitlines()[0]
        return Check(name, False, None, limit, f"could not be computed ({type(error).__name__}: {told}); {advice}")
    if not math.isfinite(figure):
        return Check(name, False, None, limit, f"gave NaN or infinity; {advice}")
    passed = figure <= limit
    return Check(name, passed, figure, limit, "" if passed else advice)


def _determinism(bench: Bench) -> float:
    batch = bench.batch(bench.stage, bench.everything)
    return error_of(bench.figures(bench.stage, batch), bench.figures(bench.stage, batch))


def _padding(bench: Bench) -> float:
    """Each example alone: padded to the longest one's length, against not padded."""
    stage, longest = bench.stage, bench.longest
    if len(set(bench.lengths)) == 1:
        return 0.0  # nothing is ever padded
    padded = [first(bench.batch(stage, [i, longest])) for i in bench.everything]
    return error_of(joined([bench.figures(stage, batch) for batch in padded]), bench.alone(stage))


def _batch_size(bench: Bench) -> float:
    """All in one batch, against each alone at the same padded length, so that padding plays no part."""
    stage, longest = bench.stage, bench.longest
    single = [first(bench.batch(stage, [i, longest])) for i in bench.everything]
    together = bench.figures(stage, bench.batch(stage, bench.everything))
    return error_of(together, joined([bench.figures(stage, batch) for batch in single]))


def _attention(bench: Bench) -> float:
    """Losses by the kernel that PyTorch takes by itself, and losses and scores by eager attention, against ours."""
    stage = bench.stage
    batch = bench.batch(stage, bench.everything)
    expected = bench.figures(stage, batch)
    with torch.no_grad():
        error = relative(
            replace(stage, model=copy.deepcopy(stage.model).eval()).example_losses(batch), expected["losses"]
        )
    if hasattr(stage.model, "set_attn_implementation") and hasattr(stage.model, "config"):
        twin = copy.deepcopy(stage.model)
        twin.set_attn_implementation("eager")  # type: ignore[operator]
        error = max(error, error_of(bench.figures(replace(stage, model=twin), batch), expected))
    return error


def _gradient(bench: Bench) -> float:
    """⟨∇G, u⟩ against central differences of G along two seeded directions u, in float64."""
    stage = bench.exact
    batch = bench.batch(stage, bench.everything)
    with evaluation(stage.model):
        gradient = gradients(stage, batch, stage.theta)
        # What ⟨∇G, u⟩ comes to for a random u with entries of this size: the yardstick for its error.
        scale = math.sqrt(sum(P.dot({n: g}, {n: g}) / g.numel() for n, g in gradient.items()))
        errors = []
        for k in range(2):
            u = replace(bench, seed=bench.seed + k).vector(stage)

            def along(step: float, u: Parameters = u) -> Tensor:
                with torch.no_grad():
                    return stage.example_losses(batch, P.axpy(step, u, stage.theta)).mean()

            slope = P.dot(gradient, u)

            def error(difference: Tensor, slope: float = slope) -> float:
                return abs(float(difference) - slope) / (scale or 1.0)

            errors.append(differences(error, along))
    return max(errors)


def _hessian(bench: Bench) -> float:
    """Hu against central differences of the gradient along a seeded direction u, in float64."""
    stage = bench.exact
    batch = bench.batch(stage, bench.everything)
    u = bench.vector(stage)
    with evaluation(stage.model):
        names = list(stage.theta)
        product = [part / len(batch) for part in hessian_product(stage, batch, u, names)]
        exact = torch.cat([part.flatten() for part in product])

        def along(step: float) -> Tensor:
            gradient = gradients(stage, batch, P.axpy(step, u, stage.theta))
            return torch.cat([gradient[n].flatten() for n in names])

        return differences(lambda d: float((d - exact).norm() / (d.norm() or 1.0)), along)


def _forward_mode(bench: Bench) -> float:
    """Scores by forward mode against each example's gradient by reverse mode, in float64."""
    stage = bench.exact
    v = bench.vector(stage)
    batch = bench.batch(stage, bench.everything)
    return relative(forward_scores(stage, [v], batch).scores[:, 0], reverse_scores(stage, v, batch))


def _rounding(bench: Bench) -> float:
    """Losses and scores in the model's own dtype against its float64 copy."""
    own = bench.figures(bench.stage, bench.batch(bench.stage, bench.everything))
    return error_of(own, bench.figures(bench.exact, bench.batch(bench.exact, bench.everything)))


def _restored(bench: Bench) -> float:
    """The share of the model's tensors and module modes that losses and scores leave changed, from training mode."""
    model = copy.deepcopy(bench.stage.model).train()
    before = copy.deepcopy(model)
    stage = replace(bench.stage, model=model)
    bench.figures(stage, bench.batch(stage, bench.everything))
    tensors = [(a, b) for kind in ("named_parameters", "named_buffers") for a, b in _pairs(kind, before, model)]
    changed = sum(not _same(a, b) for a, b in tensors)
    modules = list(zip(before.modules(), model.modules()))
    changed += sum(a.training != b.training or _hooks(a) != _hooks(b) for a, b in modules)
    return changed / (len(tensors) + len(modules))


def _pairs(kind: str, before: nn.Module, after: nn.Module) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    old, new = dict(getattr(before, kind)()), dict(getattr(after, kind)())
    for name in {**old, **new}:
        yield old.get(name), new.get(name)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.requires_grad != b.requires_grad or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach()))) and b.grad is None


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
