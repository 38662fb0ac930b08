"""Trees of tensors used as vectors: `dict[str, Tensor]` by the model's own parameter names, tied weights once.

Sums run in float64 whatever the tensors' dtype, so that a dot product over 10^8 float32 entries loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nlpinf.errors import BadInput
from nlpinf.pieces import pieces

Parameters = dict[str, Tensor]


def of_model(model: nn.Module) -> Parameters:
    """Return every parameter of `model` by its first name, detached, sharing storage; tied weights appear once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Return the groups of names that are one tensor, such as a decoder tied to the word embeddings."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def dot(a: Parameters, b: Parameters) -> float:
    """Return ⟨a, b⟩ over the names of `a`, summed in float64."""
    _same_names(a, b)
    total: Any = sum(_dot(a[name], b[name]) for name in a)
    return float(gathered(total))


def _dot(a: Tensor, b: Tensor) -> Any:
    """Return ⟨a, b⟩ as a scalar tensor, float64, without a widened copy of either."""
    if hasattr(a, "full_tensor"):
        return (a.double() * b.double()).sum()
    x, y = a.reshape(-1), b.expand_as(a).reshape(-1)  # raises where the shapes differ
    parts = [torch.dot(x[part].double(), y[part].double()) for part in pieces(x)]
    return torch.stack(parts).sum() if parts else 0.0


def norm(a: Parameters) -> float:
    """Return ‖a‖ = √⟨a, a⟩."""
    return dot(a, a) ** 0.5


def axpy(scale: float, a: Parameters, b: Parameters) -> Parameters:
    """Return scale·a + b."""
    _same_names(a, b)
    return {name: torch.add(b[name], a[name], alpha=scale) for name in a}


def scaled(scale: float, a: Parameters) -> Parameters:
    """Return scale·a."""
    return {name: tensor * scale for name, tensor in a.items()}


def zeros_like(a: Parameters) -> Parameters:
    """Return zeros of the same names, shapes and dtypes."""
    return {name: torch.zeros_like(tensor) for name, tensor in a.items()}


def sums_like(a: Parameters) -> Parameters:
    """Return zeros to add the batches of a mean into: like `a`, but float32 for half precision, which loses small terms."""
    return {name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for name, t in a.items()}


def mean_like(sums: Parameters, count: float, a: Parameters) -> Parameters:
    """Return sums / count in the dtypes of `a`."""
    return {name: (sums[name] / count).to(tensor.dtype) for name, tensor in a.items()}


def select(a: Parameters, names: Iterable[str]) -> Parameters:
    """Return the tensors of `names`, in that order."""
    return {name: a[name] for name in names}


def embedded(a: Parameters, like: Parameters) -> Parameters:
    """Return `a` with zeros in the slots of `like` that it lacks: (w, 0) of the formulas."""
    return {name: a[name] if name in a else torch.zeros_like(tensor) for name, tensor in like.items()}


def size(a: Parameters) -> int:
    """Return the number of scalar entries."""
    return sum(tensor.numel() for tensor in a.values())


def finite(a: Parameters) -> bool:
    """Say whether every entry is a finite number."""
    # 0 times what is not finite is NaN; so of a tensor in pieces one number is gathered.
    return all(bool(torch.isfinite(gathered((tensor.detach() * 0).sum()))) for tensor in a.values())


def in_pieces(a: Parameters) -> bool:
    """Say whether processes hold the tensors in pieces (`DTensor`)."""
    return any(hasattr(tensor, "full_tensor") for tensor in a.values())


def gathered(tensor: Any) -> Any:
    """Return the tensor whole where processes hold it in pieces; all of them must call it."""
    return tensor.full_tensor() if in_pieces({"": tensor}) else tensor


def whole(a: Parameters) -> Parameters:
    """Return the tensors whole where processes hold them in pieces; all of them must call it."""
    return {name: gathered(tensor) for name, tensor in a.items()}


def random_like(a: Parameters, seed: int, draw: Callable[..., Tensor] = torch.randn) -> Parameters:
    """Return independent random entries (`torch.randn` or a function of its signature), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _as(draw(t.shape, generator=generator, dtype=torch.float64), t) for name, t in a.items()}


def place(tensor: Any) -> int:
    """Return the address of a tensor's entries, or of this process's piece of them."""
    return int((tensor.to_local() if hasattr(tensor, "to_local") else tensor).data_ptr())


def _as(drawn: Tensor, tensor: Any) -> Tensor:
    """Return `drawn`, the same on every process, in the dtype and place of `tensor`, in pieces if that is."""
    if not in_pieces({"": tensor}):
        return drawn.to(tensor)
    from torch.distributed.tensor import distribute_tensor  # half a second to import, for sharded models alone

    placed = drawn.to(tensor.device, tensor.dtype)
    return distribute_tensor(placed, tensor.device_mesh, tensor.placements, src_data_rank=None)


def rademacher(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return entries −1 or 1 with equal probability; a `draw` for `random_like`."""
    return torch.randint(0, 2, shape, generator=generator).to(dtype) * 2 - 1


def _same_names(a: Parameters, b: Parameters) -> None:
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())[0]
        raise BadInput(f"parameter trees have different names, first {odd!r}; use select() or embedded() before")
