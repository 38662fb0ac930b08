"""Query vectors of low rank: V_q ≈ L C_q Rᵀ, and how much rank the scores need.

For a parameter matrix (r, c) and Q queries, L is (r, k), R (c, l), C (Q, k, l); both bases are shared by the queries, and
either may be left out (the identity). With one query this is Σ_k u_k w_kᵀ. A layer's share Σ_t δ_tᵀ V_q a_t becomes the
same sum of the projected (L'δ_t), (R'a_t) with the small C_q: T·(r·k + c·l + k·l) multiplications in the place of T·r·c.

Which directions to keep is settled by what the scores feel of them. With A = E[aaᵀ], B = E[δδᵀ] over tokens of the corpus,
a change E of V moves the scores by tr(Eᵀ B E A) in the mean square if a and δ are independent (as K-FAC takes them). So
the singular values of B^½ V_q A^½ are the shares of the directions, and those that add least for their cost are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nlpinf.scoring.layers import Groups, Matrices, bilinear, chosen, side_by_side

GATHER = 8  # multiplications in the time that one entry of a table row is fetched
_LARGEST = 4096  # of a side whose second moments are held whole, and whose spectrum is taken
_RIDGE = 1e-3  # of the mean second moment, added to all: directions that the sample did not show are not free


@dataclass(frozen=True)
class LowRank(Matrices):
    """V_q ≈ L C_q Rᵀ: `left` L (r, k) or None, `core` C (Q, k, l), `right` R (c, l) or None; None is the identity."""

    left: Tensor | None
    core: Tensor
    right: Tensor | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "core", side_by_side(self.core))

    def __len__(self) -> int:
        return len(self.core)

    def bilinear(self, left: Tensor, right: Tensor, groups: Groups) -> Tensor:
        return bilinear(_onto(left, self.left), _onto(right, self.right), self.core, groups)

    def chosen(self, ids: Tensor, right: Tensor, groups: Groups) -> Tensor:
        right = _onto(right, self.right)
        if self.left is not None:
            return bilinear(self.left[ids], right, self.core, groups)
        return chosen(ids, right, self.core, groups)

    @property
    def dense(self) -> Tensor:
        """The matrices, (Q, r, c)."""
        whole = self.core if self.left is None else self.left @ self.core
        return whole if self.right is None else whole @ self.right.T

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (r, c) of a matrix."""
        (_, k, l), left, right = self.core.shape, self.left, self.right  # noqa: E741
        return k if left is None else len(left), l if right is None else len(right)


def _onto(values: Tensor, basis: Tensor | None) -> Tensor:
    return values if basis is None else values @ basis


class Moments(Matrices):
    """Takes the place of a query vector in a pass over a sample, and gathers what its two sides look like there.

    `left` (r, r) or, of a large side, its diagonal (r,), and `right` (c, c) or (c,): scaled so that tr(Eᵀ B E A) is the
    mean square of an example's score for E. A parameter that is used in two ways (tied weights) has the sum of both.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = shape
        self._uses: dict[str, tuple[Tensor, Tensor, list[int]]] = {}

    def __len__(self) -> int:
        return 1

    def bilinear(self, left: Tensor, right: Tensor, groups: Groups) -> Tensor:
        self._add("linear", _second(left, self.shape[0]), right, groups, left.shape[0] * left.shape[1])
        return left.new_zeros(groups.examples, 1)

    def chosen(self, ids: Tensor, right: Tensor, groups: Groups) -> Tensor:
        counts = torch.bincount(ids.flatten(), minlength=self.shape[0]).double()
        self._add("table", counts if self.shape[0] > _LARGEST else counts.diag(), right, groups, ids.numel())
        return right.new_zeros(groups.examples, 1)

    def _add(self, use: str, left: Tensor, right: Tensor, groups: Groups, places: int) -> None:
        second = _second(right, self.shape[1])
        if use not in self._uses:
            self._uses[use] = left, second, [places]
        else:
            old_left, old_right, counted = self._uses[use]
            counted[0] += places
            self._uses[use] = old_left + left, old_right + second, counted

    def sides(self, examples: int) -> tuple[Tensor, Tensor]:
        """Return the two sides' second moments for a sample of so many examples."""
        balanced = []
        for left, right, (places,) in self._uses.values():
            # Σ_t of the products: (1 / examples) · places · (Σ left / places) (Σ right / places), shared out evenly.
            sizes = [float((m if m.dim() == 1 else m.diagonal()).sum().clamp(min=1e-300)) for m in (left, right)]
            scale = (sizes[0] * sizes[1] / (examples * places)) ** 0.5
            balanced.append((left * (scale / sizes[0]), right * (scale / sizes[1])))
        lefts, rights = zip(*balanced)
        return sum(lefts[1:], lefts[0]), sum(rights[1:], rights[0])

    @property
    def uses(self) -> dict[str, int]:
        """In how many places the parameter was used, "linear" maps, or look-ups in a "table"."""
        return {use: places for use, (_, _, (places,)) in self._uses.items()}


def _second(values: Tensor, width: int) -> Tensor:
    flat = values.reshape(-1, width)
    return flat.double().square().sum(0) if width > _LARGEST else (flat.T @ flat).double()


@dataclass(frozen=True)
class Side:
    """Directions of one side, the most telling first: `energy` (k,) what the scores' mean square loses without each.

    `onto` (n, k) takes V to the directions' coordinates, `back` (n, k) returns: V ≈ back · ontoᵀ V.
    """

    energy: Tensor
    onto: Tensor
    back: Tensor


@dataclass(frozen=True)
class Spectrum:
    """A parameter's sides, None where there are too many directions to look at; one query has one set for both."""

    shape: tuple[int, int]
    queries: int
    uses: dict[str, int]
    left: Side | None
    right: Side | None

    @property
    def paired(self) -> bool:
        """Whether left and right directions belong together, one to one."""
        return self.queries == 1

    def cost(self, k: int | None, l: int | None) -> int:  # noqa: E741
        """Return the multiplications for the sample with k left and l right directions; None is a side left whole.

        Counted with one product of the (projected) sides a place: what one query costs, and many queries at least.
        """
        r, c = self.shape
        width, right = (c, 0) if l is None else (l, c * l)
        linear = right + (r * width if k is None else r * k + k * width)
        table = right + (GATHER * self.queries * width if k is None else GATHER * k + k * width)
        return self.uses.get("linear", 0) * linear + self.uses.get("table", 0) * table


def spectrum(vectors: Tensor, moments: Moments, examples: int, spreads: Tensor) -> Spectrum:
    """Return the directions of V (Q, r, c) and their shares in units of the queries' `spreads` squared (Q,), in the mean."""
    (q, r, c), (before, after) = vectors.shape, moments.sides(examples)
    roots = [_roots(m) for m in (before, after)]
    weights = (1 / (spreads.double() * q**0.5)).tolist()
    seen = [_times(roots[0][0], _times(roots[1][0], v.double().T).T) * w for v, w in zip(vectors, weights)]
    left: Side | None = None
    right: Side | None = None
    if q == 1:
        left_basis, right_basis, energy = _singular(seen[0])
        left, right = _side(roots[0], left_basis, energy), _side(roots[1], right_basis, energy)
        return Spectrum((r, c), q, moments.uses, left, right)
    if r <= _LARGEST:
        left = _side(roots[0], *_eigen(sum((m @ m.T for m in seen[1:]), seen[0] @ seen[0].T)))
    if c <= _LARGEST:
        right = _side(roots[1], *_eigen(sum((m.T @ m for m in seen[1:]), seen[0].T @ seen[0])))
    return Spectrum((r, c), q, moments.uses, left, right)


def _side(roots: tuple[Tensor, Tensor], basis: Tensor, energy: Tensor) -> Side:
    return Side(energy, _times(roots[0], basis), _times(roots[1], basis))


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a second moment and its inverse."""
    values, basis = (moment, None) if moment.dim() == 1 else torch.linalg.eigh(moment)
    values = (values.clamp(min=0) + _RIDGE * values.clamp(min=0).mean().clamp(min=1e-30)).sqrt()
    if basis is None:
        return values, 1 / values
    return (basis * values) @ basis.T, (basis / values) @ basis.T


def _times(root: Tensor, values: Tensor) -> Tensor:
    return root[:, None] * values if root.dim() == 1 else root @ values


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, basis = torch.linalg.eigh(gram)
    return basis.flip(1), values.flip(0).clamp(min=0)


def _singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, right.T, values.square()


def choose(spectra: Mapping[str, Spectrum], budget: float) -> dict[str, tuple[int | None, int | None]]:
    """Return how many left and right directions each parameter keeps (None: the side stays whole, (None, None): exact).

    Directions are left out in the order of what the scores lose by them for the cost that they save, until the losses add
    up to `budget`, a share of the scores' mean square. A side that saves nothing so stays whole.
    """
    energies, sides = [], []
    for name, found in spectra.items():
        r, c = (sum(found.uses.values()) * n for n in found.shape)
        both = [("both", found.left, r + c)] if found.paired else [("left", found.left, r), ("right", found.right, c)]
        for which, side, cost in both:
            if side is not None:
                energies.append(torch.stack([side.energy / cost, side.energy]))
                sides += [(name, which)] * len(side.energy)
    price, energy = torch.cat(energies, 1).cpu()
    order = torch.argsort(price)
    lost = torch.zeros(len(order), dtype=torch.bool)
    lost[order] = torch.cumsum(energy[order], 0) <= budget
    kept: dict[tuple[str, str], int] = {}
    for (name, which), gone in zip(sides, lost.tolist()):
        kept[name, which] = kept.get((name, which), 0) + (not gone)
    result = {}
    for name, found in spectra.items():
        k, l = (  # noqa: E741
            max(1, kept[name, at]) if (name, at) in kept else None
            for at in (("both", "both") if found.paired else ("left", "right"))
        )
        result[name] = min(((None, None), (k, None), (None, l), (k, l)), key=lambda way: found.cost(*way))
    return result


def reduced(vectors: Tensor, found: Spectrum, k: int | None, l: int | None) -> LowRank | None:  # noqa: E741
    """Return V (Q, r, c) on its first k left and l right directions; None if both sides stay whole."""
    if k is None and l is None:
        return None
    core, bases = vectors.double(), []
    if k is not None:
        assert found.left is not None
        core = found.left.onto[:, :k].T @ core
        bases.append(found.left.back[:, :k].to(vectors.dtype).contiguous())
    if l is not None:
        assert found.right is not None
        core = core @ found.right.onto[:, :l]
        bases.append(found.right.back[:, :l].to(vectors.dtype).contiguous())
    left = bases[0] if k is not None else None
    right = bases[-1] if l is not None else None
    return LowRank(left, core.to(vectors.dtype), right)


def multiplications(spectra: Iterable[Spectrum], chosen: Iterable[tuple[int | None, int | None]]) -> float:
    """Return the multiplications of the chosen ways as a share of the exact ones'."""
    pairs = list(zip(spectra, chosen))
    return sum(s.cost(*way) for s, way in pairs) / max(1, sum(s.cost(None, None) for s, way in pairs))
