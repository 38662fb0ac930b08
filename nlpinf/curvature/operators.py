"""The operator contract: `operator @ v` on parameter trees, its shape, damping and the number of products so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters


class Operator(ABC):
    """A symmetric linear map on parameter trees like `template`."""

    damping: float = 0.0

    def __init__(self, template: Parameters) -> None:
        self.template = template
        self.products = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), with P the number of scalar parameters."""
        return (P.size(self.template),) * 2

    def __matmul__(self, vector: Parameters) -> Parameters:
        return self.many([vector])[0]

    def many(self, vectors: Sequence[Parameters]) -> list[Parameters]:
        """Return the products with several vectors, which can cost less than one after the other."""
        for vector in vectors:
            if vector.keys() != self.template.keys():
                odd = sorted(vector.keys() ^ self.template.keys())[0]
                raise BadInput(f"the vector's names differ from the operator's, first {odd!r}")
        self.products += len(vectors)
        return self.block(vectors)

    @abstractmethod
    def product(self, vector: Parameters) -> Parameters:
        """Return the product; `vector` has the operator's names."""

    def block(self, vectors: Sequence[Parameters]) -> list[Parameters]:
        """Return the products; an operator that shares work among them does it here."""
        return [self.product(vector) for vector in vectors]

    def parts(self) -> list[Operator]:
        """Return operators whose mean is this one, each cheaper where there are several: for stochastic solvers."""
        return [self]

    def at(self, precision: str | None) -> Operator:
        """Return this operator with products in "bfloat16", "float16" or, None, in the parameters' dtype."""
        raise BadInput(f"{type(self).__name__} has products in one precision only")

    def mean_eigenvalue(self, probes: int = 8, seed: int = 0) -> float:
        """Return tr(C)/P by Hutchinson's estimator: the mean of zᵀCz / P over `probes` seeded vectors z of ±1 entries.

        Its standard error is about √2 ‖C − diag C‖_F / (P √probes), small for large P.
        """
        draws = [P.random_like(self.template, seed * 7919 + i, P.rademacher) for i in range(probes)]
        return sum(P.dot(z, cz) for z, cz in zip(draws, self.many(draws))) / (probes * self.shape[0])


class Shifted(Operator):
    """C + diag(shift) + λ I: the losses' curvature with weight decay, proximity and damping."""

    def __init__(self, base: Operator, shift: Mapping[str, float] | None = None, damping: float = 0.0) -> None:
        super().__init__(base.template)
        if not damping >= 0:
            raise BadInput(f"the damping is {damping}; it must not be negative")
        self.base, self.damping = base, damping
        self.shift = {name: (shift or {}).get(name, 0.0) for name in base.template}

    def parts(self) -> list[Operator]:
        parts = self.base.parts()
        return [self] if len(parts) == 1 else [Shifted(part, self.shift, self.damping) for part in parts]

    def at(self, precision: str | None) -> Shifted:
        """Return this operator with the products of its base in another precision."""
        return Shifted(self.base.at(precision), self.shift, self.damping)

    def product(self, vector: Parameters) -> Parameters:
        return self.block([vector])[0]

    def block(self, vectors: Sequence[Parameters]) -> list[Parameters]:
        diagonal = {name: shift + self.damping for name, shift in self.shift.items()}
        return [
            {n: torch.add(product[n], v, alpha=diagonal[n]) for n, v in vector.items()}
            for vector, product in zip(vectors, self.base.many(vectors))
        ]


class Matrix(Operator):
    """An explicit symmetric matrix (P, P) on the flattened tree: for tests and very small models."""

    def __init__(self, template: Parameters, matrix: Tensor) -> None:
        super().__init__(template)
        self.matrix = matrix

    def product(self, vector: Parameters) -> Parameters:
        flat = self.matrix @ torch.cat([tensor.flatten() for tensor in vector.values()])
        parts = flat.split([tensor.numel() for tensor in vector.values()])
        return {name: part.view_as(tensor) for (name, tensor), part in zip(vector.items(), parts)}
