"""The state in which a model is computed with: evaluation mode, and kernels that have forward-mode and second derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import activations

from nlpinf import products

# The same functions as one kernel, with one for each derivative: written out, they are a dozen passes over memory.
_FUSED: dict[type[nn.Module], Callable[..., Any]] = {
    activations.NewGELUActivation: partial(F.gelu, approximate="tanh"),
    activations.FastGELUActivation: partial(F.gelu, approximate="tanh"),
}


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode with twice-differentiable kernels; restore every module's mode afterwards.

    Of the kernels of scaled dot product attention only the math one has forward-mode and second derivatives; fused
    recurrent layers (cuDNN, oneDNN) have neither, so models that contain one run PyTorch's own. Nor do the fast path of
    `nn.TransformerEncoder`, taken only without gradients, and the grouped products of mixtures of experts. Constants
    that a double precision model makes without saying their dtype are double too. Convolutions on a GPU, which PyTorch
    cuts to TensorFloat-32 unasked, keep float32's precision; matrix products do unless the caller set
    `torch.set_float32_matmul_precision`.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    experts = _grouped_experts(model)
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with ExitStack() as stack:
        if any(p.dtype == torch.float64 for p in model.parameters()):
            # transformers before 5 masks with the least float64 in a tensor of the default dtype, which overflows.
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        for module, _ in modes:
            if type(module) in _FUSED:
                stack.enter_context(replaced(module, _FUSED[type(module)]))
            if type(module) is nn.Embedding and module.padding_idx is not None and module.max_norm is None:
                stack.enter_context(replaced(module, partial(_looked_up, module)))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(products.fast())
        if recurrent:
            with warnings.catch_warnings():  # PyTorch's setter speaks of GPUs that a CPU-only build does not support
                warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        if torch.cuda.is_available():
            cudnn = torch.backends.cudnn
            enabled = cudnn.enabled and not recurrent  # or it lays recurrent weights out anew, dual tensors too
            stack.enter_context(cudnn.flags(enabled, deterministic=cudnn.deterministic, allow_tf32=False))
            if recurrent:
                stack.enter_context(written_out_recurrence())
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for config, _ in experts:
                config._experts_implementation_internal = "eager"
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
            for config, implementation in experts:
                config._experts_implementation_internal = implementation
            torch.backends.mha.set_fastpath_enabled(fast)


def _looked_up(module: nn.Embedding, ids: Tensor) -> Tensor:
    """Return the vectors of an embedding whose `padding_idx` has no derivative forward either, as it has none backward."""
    rows = F.embedding(ids, module.weight)
    return torch.where(ids.eq(module.padding_idx or 0)[..., None], rows.detach(), rows)


@contextmanager
def written_out_recurrence() -> Iterator[None]:
    """Let `nn.LSTM`, `nn.GRU` and `nn.RNN` run as plain operations: a GPU's fused cells have no forward-mode derivatives."""
    from torch._decomp import decompositions as loops

    written = {
        "lstm": (loops.lstm_impl, loops.lstm_data_impl),
        "gru": (loops.gru_impl, loops.gru_impl_data),
        "rnn_tanh": (loops.rnn_tanh_input, loops.rnn_tanh_data),
        "rnn_relu": (loops.rnn_relu_input, loops.rnn_relu_data),
    }

    def either(padded: Callable[..., Any], packed: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a: (padded if isinstance(a[3], bool) else packed)(*a)

    before = {name: torch._VF.__dict__.get(name) for name in written}
    try:
        for name, ways in written.items():
            setattr(torch._VF, name, either(*ways))
        yield
    finally:
        for name, function in before.items():
            if function is None:
                delattr(torch._VF, name)
            else:
                setattr(torch._VF, name, function)


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let the module compute `forward` within."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _grouped_experts(model: nn.Module) -> list[tuple[Any, str]]:
    """Return the configs by which transformers chooses fused products of experts, each with its choice."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    chosen = [(config, getattr(config, "_experts_implementation_internal", None)) for config in configs.values()]
    # "deepgemm_megamoe" lays the weights out anew when they are loaded, so that no other way can read them.
    return [
        (config, name) for config, name in chosen if isinstance(name, str) and name not in ("eager", "deepgemm_megamoe")
    ]
