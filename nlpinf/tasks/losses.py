"""Losses at a network's outputs, with their derivatives in closed form, so that one batch of outputs is all that is held.

`outputs` o is (items, classes), `targets` t is (items,) classes or (items, values). Every function works item by item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class OutputLoss(ABC):
    """ℓ(o, t) of one item, and what curvature and scoring need of it."""

    name: str

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ℓ, (items,)."""

    @abstractmethod
    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ∂ℓ/∂o, (items, classes)."""

    @abstractmethod
    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """Return (∂²ℓ/∂o²) u for the output tangent u, (items, classes)."""

    @abstractmethod
    def sampled_gradient(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        """Return ∂ℓ/∂o at targets drawn from the model's own distribution by `uniform` (items, classes or 1) in [0, 1)."""

    def root_product(self, outputs: Tensor, targets: Tensor, x: Tensor) -> Tensor:
        """Return S x, (items, classes), with S Sᵀ = ∂²ℓ/∂o²; here by eigenvalues of the whole matrix, for few classes."""
        units = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        columns = [self.hessian_product(outputs, targets, unit.expand_as(outputs)) for unit in units]
        values, vectors = torch.linalg.eigh(torch.stack(columns, -1))
        return (vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT @ x[..., None])[..., 0]

    def tangents(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """Return dℓ/dt = ⟨∂ℓ/∂o, u⟩ of every item, (items,)."""
        return (self.gradient(outputs, targets) * tangent).sum(-1)


class CrossEntropy(OutputLoss):
    """ℓ = log Σ_c exp(o_c) − o_t.  With p = softmax(o): gradient p − e_t, Hessian diag(p) − p pᵀ."""

    name = "cross_entropy"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.logsumexp(outputs, -1) - outputs.gather(-1, targets[:, None])[:, 0]

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.softmax(outputs, -1)
        return gradient.scatter_add_(-1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        p = torch.softmax(outputs, -1)
        return p * (tangent - (p * tangent).sum(-1, keepdim=True))

    def root_product(self, outputs: Tensor, targets: Tensor, x: Tensor) -> Tensor:
        p = torch.softmax(outputs, -1)  # S = diag(√p) − p √pᵀ
        along = p.sqrt() * x
        return along - p * along.sum(-1, keepdim=True)

    def sampled_gradient(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        cumulative = torch.softmax(outputs.double(), -1).cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform[:, :1] * cumulative[:, -1:], right=True)[:, 0]
        return self.gradient(outputs, drawn.clamp_(max=outputs.shape[-1] - 1))

    def tangents(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        p = torch.softmax(outputs, -1)
        return torch.linalg.vecdot(p, tangent) - tangent.gather(-1, targets[:, None])[:, 0]


class SquaredError(OutputLoss):
    """ℓ = ½ ‖o − t‖².  Gradient o − t, Hessian the identity; the model's own distribution is N(o, 1)."""

    name = "squared_error"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum(-1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        return tangent

    def root_product(self, outputs: Tensor, targets: Tensor, x: Tensor) -> Tensor:
        return x

    def sampled_gradient(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        return torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)).to(outputs)
