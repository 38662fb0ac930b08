"""EK-FAC: the curvature's diagonal in a Kronecker-factored eigenbasis of every parameter, with a closed-form inverse.

For a parameter seen as k matrices (r, c), with G_b the gradients of single examples (`perexample.py`):

    Q_L, Q_R   eigenvectors of Σ_b G_b G_bᵀ and of Σ_b G_bᵀ G_b, each side
    Λ          1/n Σ_b (Q_Lᵀ G_b Q_R)²                     the eigenvalues, by example
    C V        Q_L (Λ ∘ (Q_Lᵀ V Q_R)) Q_Rᵀ,   (C + σI)⁻¹ V = Q_L ((Q_Lᵀ V Q_R) / (Λ + σ)) Q_Rᵀ

so that Λ is the exact diagonal, in that basis, of the examples' second moment. The two sides are those of the gradients
themselves, which K-FAC builds from inputs and output gradients apart; where these are independent they have the same
eigenvectors. A vector (a bias, a normalisation) has c = 1, so that its factor is its whole second moment. A side of more than
`largest` entries, and the words of an embedding or of a language model's output layer, keep their basis: diagonal there. In a group
of processes each takes its share of the batches, and of the eigenvectors. Sources: George et al., NeurIPS 2018; Grosse et al., 2023;
Morwani et al., 2024, for factors of whole gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nlpinf import memory, processes, sharded
from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.curvature.perexample import Outer, PerExample, Rows, Use, Whole, dense
from nlpinf.data.corpus import examples_sha256
from nlpinf.errors import BadInput
from nlpinf.files import save_tensors
from nlpinf.parameters import Parameters
from nlpinf.pieces import entries
from nlpinf.stages import Stage, fingerprint

_BLOCK = 1 << 20  # entries of the examples' gradients that are held at a time, which a cache holds
_TOGETHER = 16  # examples whose gradients are squared at a time
_FORMAT = 2
_ROWS = "the positions of the examples"  # the name of their tensor in a file


@dataclass(frozen=True)
class Factor:
    """One parameter: `eigenvalues` (k, r, c), `left` (k, r, r) and `right` (k, c, c), None where diagonal."""

    eigenvalues: Tensor
    left: Tensor | None
    right: Tensor | None

    def rotated(self, v: Tensor) -> Tensor:
        """Return Q_Lᵀ V Q_R of (..., k, r, c)."""
        v = v if self.left is None else self.left.mT @ v
        return v if self.right is None else v @ self.right

    def back(self, v: Tensor) -> Tensor:
        """Return Q_L V Q_Rᵀ."""
        v = v if self.left is None else self.left @ v
        return v if self.right is None else v @ self.right.mT

    def mapped(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return Q_L (function(Λ) ∘ Q_Lᵀ V Q_R) Q_Rᵀ in the shape and dtype of V."""
        seen = self.rotated(v.to(self.eigenvalues).view(self.eigenvalues.shape))
        return self.back(seen * function(self.eigenvalues)).view(v.shape).to(v)


class EKFAC(Operator):
    """The operator C of the module's docstring; `inverse` gives (C + diag(shift) + λI)⁻¹ for any damping."""

    def __init__(self, template: Parameters, factors: dict[str, Factor], record: dict[str, Any]) -> None:
        super().__init__(template)
        self.factors, self.record = factors, record

    @classmethod
    def fit(
        cls,
        stage: Stage,
        indices: Sequence[int] | None = None,
        seed: int = 0,
        largest: int = 2048,
        basis_rows: int = 256,
    ) -> EKFAC:
        """Take the factors from the examples at `indices` (default: all).

        `largest`     entries of a side up to which its eigenvectors are taken; 0 gives the diagonal alone
        `basis_rows`  examples that the eigenvectors come from; the eigenvalues come from all

        In a group of processes all must call it, and all get the same bits.
        """
        indices = list(range(stage.size) if indices is None else indices)
        if not indices:
            raise BadInput("EK-FAC needs at least one row")
        sharded.refused(stage.model, stage.name, "EK-FAC", "take the preconditioner 'none'")
        return memory.within(stage, lambda sized: cls._fit(sized, indices, seed, largest, basis_rows))

    @classmethod
    def _fit(cls, stage: Stage, indices: Sequence[int], seed: int, largest: int, basis_rows: int) -> EKFAC:
        gradients = PerExample(stage, list(stage.theta), seed)
        shapes = {name: _shape(stage, name) for name in stage.theta}
        dtype = torch.promote_types(stage.dtype, torch.float32)
        # In float64, so that the order of the sums, and with it the number of processes, turns no eigenvectors.
        grams: Parameters = {}
        for name, (k, r, c, lone) in shapes.items():
            for side, n in zip(("left", "right"), _dense_sides(r, c, lone, largest)):
                if n is not None:
                    grams[f"{name}.{side}"] = torch.zeros(k, n, n, dtype=torch.float64, device=stage.device)
        if grams:
            step = max(1, len(indices) // basis_rows)
            for uses in gradients(indices[::step]):
                for name, made in uses.items():
                    pair = grams.get(f"{name}.left"), grams.get(f"{name}.right")
                    for alike in _alike([_cast(u, dtype) for u in made], shapes[name][:3]):
                        _add_grams(alike, shapes[name][:3], *pair)
        bases = _eigenvectors(processes.total(grams), dtype)
        factors = {}
        for name, (*shape, _) in shapes.items():
            zeros = torch.zeros(shape, dtype=dtype, device=stage.device)
            factors[name] = Factor(zeros, bases.get(f"{name}.left"), bases.get(f"{name}.right"))
        for uses in gradients(indices):
            for name, made in uses.items():
                for alike in _alike([_cast(u, dtype) for u in made], shapes[name][:3]):
                    _add_squares(alike, factors[name])
        sums = _finite(processes.total({n: f.eigenvalues for n, f in factors.items()}))
        factors = {n: replace(f, eigenvalues=sums[n] / len(indices)) for n, f in factors.items()}
        record = {"seed": seed, "largest": largest, "basis_rows": basis_rows, "rows": indices, **_of(stage, indices)}
        return cls(stage.theta, factors, record)

    def product(self, vector: Parameters) -> Parameters:
        return {n: self.factors[n].mapped(v, lambda e: e) for n, v in vector.items()}

    def inverse(
        self, damping: float, shift: dict[str, float] | None = None, power: float = 1.0
    ) -> Callable[[Parameters], Parameters]:
        """Return v ↦ (C + diag(shift) + λI)^−power v. The stored factors do not change.

        An eigenvalue that is nothing beside the largest, with neither shift nor damping, counts as the smallest number
        that is something beside it, so that the map stays positive definite.
        """
        if not damping >= 0:
            raise BadInput(f"the damping is {damping}; it must not be negative")
        shift = shift or {}
        top = max(float(f.eigenvalues.max()) for f in self.factors.values())
        least = top * torch.finfo(next(iter(self.factors.values())).eigenvalues.dtype).eps or 1.0

        def solve(vector: Parameters) -> Parameters:
            found = {}
            for name, v in vector.items():
                factor, diagonal = self.factors[name], shift.get(name, 0.0) + damping
                found[name] = factor.mapped(v, lambda e, d=diagonal: (e + d).clamp(min=least).pow(-power))  # type: ignore[misc]
            return found

        return solve

    def mean_eigenvalue(self, probes: int = 0, seed: int = 0) -> float:
        """Return tr(C)/P, exactly."""
        return float(sum(f.eigenvalues.double().sum() for f in self.factors.values())) / self.shape[0]

    def save(self, path: str | Path, stage: Stage) -> Path:
        """Write the factors as one safetensors file; its metadata say what they are of. Returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, factor in self.factors.items():
            parts = {"eigenvalues": factor.eigenvalues, "left": factor.left, "right": factor.right}
            tensors |= {f"{name}.{part}": t.contiguous() for part, t in parts.items() if t is not None}
        record = {"format": _FORMAT, "weights": fingerprint(stage.parameters), **self.record}
        tensors[_ROWS] = torch.tensor(record.pop("rows"))
        part = path.with_name(path.name + ".part")
        save_tensors(tensors, part, metadata={"nlpinf_ekfac": json.dumps(record)})
        part.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path, stage: Stage) -> EKFAC:
        """Read what `save` wrote; raises `BadInput` if it is damaged, or of other weights, examples or trained parameters."""
        path = Path(path)
        if not path.is_file():
            raise BadInput(f"{path}: no such file of EK-FAC factors")
        try:
            with safe_open(path, "pt", device=str(stage.device)) as file:
                record = json.loads((file.metadata() or {})["nlpinf_ekfac"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                rows = tensors.pop(_ROWS).tolist() if record["format"] == _FORMAT else []
        except (SafetensorError, KeyError, ValueError) as error:
            raise BadInput(
                f"{path}: is no file of EK-FAC factors ({' '.join(str(error).split())}); delete it"
            ) from None
        if record.pop("format") != _FORMAT:
            raise BadInput(f"{path}: was written by another version; delete it")
        if record.pop("weights") != fingerprint(stage.parameters):
            raise BadInput(f"{path}: was made with other weights than stage {stage.name!r} has; delete it")
        if max(rows) >= stage.size or any(record[key] != value for key, value in _of(stage, rows).items()):
            raise BadInput(
                f"{path}: was made from other examples or another loss than stage {stage.name!r} has; delete it"
            )
        found = {key.removesuffix(".eigenvalues") for key in tensors if key.endswith(".eigenvalues")}
        if odd := sorted(found ^ set(stage.theta)):
            raise BadInput(f"{path}: differs from what stage {stage.name!r} trained, first {odd[0]!r}; delete it")
        factors = {}
        for n in stage.theta:
            k, r, c, lone = _shape(stage, n)
            factor = Factor(tensors[f"{n}.eigenvalues"], tensors.get(f"{n}.left"), tensors.get(f"{n}.right"))
            sides = [None if side is None else (k, side, side) for side in _dense_sides(r, c, lone, record["largest"])]
            there = [None if side is None else tuple(side.shape) for side in (factor.left, factor.right)]
            if tuple(factor.eigenvalues.shape) != (k, r, c) or there != sides:
                raise BadInput(f"{path}: the factors of {n!r} are incomplete or of another shape; delete it")
            factors[n] = factor
        return cls(stage.theta, factors, {**record, "rows": rows})


@dataclass(frozen=True)
class Planned:
    """Bytes that EK-FAC takes: the factors, in memory and in a file, and the most at a time while they are made.

    The latter beside the model and one batch of its activations.
    """

    factors: int
    peak: int


def planned_bytes(stage: Stage, largest: int = 2048) -> Planned:
    """Return how many bytes the factors of `stage` take, without making them."""
    values = sides = 0
    for name, tensor in stage.theta.items():
        k, r, c, lone = _shape(stage, name)
        values += tensor.numel()
        sides += k * sum(n * n for n in _dense_sides(r, c, lone, largest) if n is not None)
    width = max(4, torch.finfo(stage.dtype).bits // 8)
    # The Gram matrices in float64 with the eigenvectors that are made of them, or the eigenvectors with a block of gradients.
    making = max(sides * (8 + width), (sides + values + entries(_BLOCK, next(iter(stage.theta.values())))) * width)
    return Planned((values + sides) * width, making)


def _of(stage: Stage, rows: Sequence[int]) -> dict[str, Any]:
    """Return what factors are of beside the weights: the examples' digest, their task and how their losses count."""
    told = {
        "examples_sha256": examples_sha256([(stage.data[i], int(stage.rows[i])) for i in rows]),
        "task": stage.task.settings(),
        "reduction": stage.reduction,
    }
    return json.loads(json.dumps(told))  # type: ignore[no-any-return]


def _dense_sides(r: int, c: int, lone: bool, largest: int) -> list[int | None]:
    """Return the sizes of the sides whose eigenvectors are taken, None where the basis stays."""
    return [None if lone or r > largest else r, None if c > largest or c == 1 else c]


def _shape(stage: Stage, name: str) -> tuple[int, int, int, bool]:
    """Return a parameter's (k, r, c), and whether its rows are words (an embedding's or output layer's)."""
    tensor = stage.parameters[name]
    head = stage.task.item_module(stage.model)
    first = {id(p): n for n, p in stage.model.named_parameters()}
    lone = False
    for module in stage.model.modules():
        if not any(p is not None and first[id(p)] == name for p in module._parameters.values()):
            continue
        lone |= module is head or isinstance(module, nn.Embedding)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return 1, len(tensor), tensor[0].numel(), lone
    *blocks, r, c = tensor.shape if tensor.dim() > 1 else (tensor.numel(), 1)
    return int(torch.Size(blocks).numel()), r, c, lone


def _cast(use: Use, dtype: torch.dtype) -> Use:
    if isinstance(use, Whole):
        return Whole(use.values.to(dtype))
    if isinstance(use, Rows):
        return Rows(use.ids, use.right.to(dtype))
    return Outer(use.left.to(dtype), use.right.to(dtype))


def _alike(uses: list[Use], shape: tuple[int, int, int]) -> Iterator[list[Use]]:
    """Yield the uses, either all `Whole` or none; where they are mixed, what they add up to, example by example."""
    if len({isinstance(use, Whole) for use in uses}) == 1:
        yield uses
        return
    k, r, c = shape
    for b in range(len(next(u.values for u in uses if isinstance(u, Whole)))):
        one = [replace(u, **{name: tensor[b : b + 1] for name, tensor in vars(u).items()}) for u in uses]
        yield [Whole(dense(one, (1, k * r, c)))]


def _eigenvectors(grams: Parameters, dtype: torch.dtype) -> Parameters:
    """Return the eigenvectors of every Gram matrix, which is let go of; each process makes its share of them.

    So they are the same on all, where other processors would turn those of close eigenvalues another way.
    """
    _finite(grams)
    own = set(processes.share(sorted(grams, key=lambda name: grams[name].numel())))
    found = {}
    for name in list(grams):
        gram = grams.pop(name)
        found[name] = torch.linalg.eigh(gram)[1].to(dtype) if name in own else torch.zeros_like(gram, dtype=dtype)
    return processes.total(found)


def _finite(sums: Parameters) -> Parameters:
    if not P.finite(sums):
        raise BadInput("a gradient is not finite; run `nlpinf check` on the model")
    return sums


def _add_grams(uses: list[Use], shape: tuple[int, int, int], left: Tensor | None, right: Tensor | None) -> None:
    """Add Σ_b G_b G_bᵀ and Σ_b G_bᵀ G_b to the sides that are kept."""
    if left is None and right is None:
        return
    if any(isinstance(u, Whole) for u in uses):
        g = sum(u.values.view(-1, *shape) for u in uses if isinstance(u, Whole))
        assert isinstance(g, Tensor)
        if left is not None:
            columns = g.permute(1, 2, 0, 3).flatten(2)
            left += columns @ columns.mT
        if right is not None:
            stacked = g.transpose(0, 1).flatten(1, 2)
            right += stacked.mT @ stacked
        return
    # From the sides alone, Σ_ts right_t ⟨left_t, left_s⟩ right_sᵀ: no gradient is formed.
    factored = [u for u in uses if not isinstance(u, Whole)]
    for u in factored:
        for v in factored:
            if right is not None:
                right += u.right.flatten(0, 1).T @ (_inner(u, v) @ v.right).flatten(0, 1)
            if left is not None:
                assert isinstance(u, Outer) and isinstance(v, Outer)
                left += u.left.flatten(0, 1).T @ ((u.right @ v.right.mT) @ v.left).flatten(0, 1)


def _inner(u: Outer | Rows, v: Outer | Rows) -> Tensor:
    """Return ⟨left_t, left_s⟩ (B, T_u, T_v) for all pairs of places of an example."""
    if isinstance(u, Rows) and isinstance(v, Rows):
        return (u.ids[:, :, None] == v.ids[:, None]).to(u.right)
    if isinstance(u, Rows):
        return _inner(v, u).mT
    if isinstance(v, Rows):
        return u.left.gather(2, v.ids[:, None].expand(-1, u.left.shape[1], -1))
    return u.left @ v.left.mT


def _add_squares(uses: list[Use], factor: Factor) -> None:
    """Add Σ_b (Q_Lᵀ G_b Q_R)² to the factor's eigenvalues."""
    total = factor.eigenvalues
    if any(isinstance(u, Whole) for u in uses):
        values: Any = sum(u.values for u in uses if isinstance(u, Whole))
        total += factor.rotated(values.view(-1, *total.shape)).square_().sum(0)
        return
    ql, qr = (None if q is None else q[0] for q in (factor.left, factor.right))
    outer = [u for u in uses if isinstance(u, Outer)]
    rows = [u for u in uses if isinstance(u, Rows)]
    ids = torch.cat([u.ids for u in rows], 1) if rows else None
    words = torch.cat([u.right for u in rows], 1) if rows else None
    words = words @ qr if words is not None and qr is not None else words
    if not outer:
        assert ids is not None and words is not None
        _add_row_squares(ids, words, total[0])
        return
    left, right = torch.cat([u.left for u in outer], 1), torch.cat([u.right for u in outer], 1)
    left, right = left if ql is None else left @ ql, right if qr is None else right @ qr
    _, r, c = total.shape
    count = min(_TOGETHER, len(left))
    step = min(r, max(1, entries(_BLOCK, left) // (count * c)))
    room = left.new_empty(count * step * c)  # the same memory for all blocks
    for first in range(0, r, step):
        for b in range(0, len(left), count):
            some = left[b : b + count, :, first : first + step].mT
            g = room[: some.shape[0] * some.shape[1] * c].view(*some.shape[:2], c)
            torch.bmm(some, right[b : b + count], out=g)
            if ids is not None and words is not None:
                rows_of = ids[b : b + count] - first
                inside = (rows_of >= 0) & (rows_of < some.shape[1])
                where = rows_of + torch.arange(len(some), device=rows_of.device)[:, None] * some.shape[1]
                g.view(-1, c).index_add_(0, where[inside], words[b : b + count][inside])
            total[0, first : first + step] += g.square_().sum(0)


def _add_row_squares(ids: Tensor, words: Tensor, total: Tensor) -> None:
    """Add the squares of an embedding's gradients, of which an example has only the rows of its own words."""
    keys = ids + torch.arange(len(ids), device=ids.device)[:, None] * len(total)
    distinct, where = torch.unique(keys, return_inverse=True)
    sums = words.new_zeros(len(distinct), words.shape[-1]).index_add_(0, where.flatten(), words.flatten(0, 1))
    total.index_add_(0, distinct % len(total), sums.square_())
