"""Compressed query vectors: low rank, no more of it than a stated error of the scores needs, measured on rows of the corpus.

The error of a compressed score s̃ is (s̃ − s)/σ, σ the standard deviation of the query's exact scores on the sample: what
matters is whether a row changes its place among the others. The root mean square is held under what was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from scipy.stats import spearmanr
from torch import Tensor

from nlpinf.errors import BadInput
from nlpinf.files import save_tensors
from nlpinf.influence import QueryVectors
from nlpinf.parameters import Parameters
from nlpinf.scoring.feed import Feed, Part
from nlpinf.scoring.files import first_name, publish
from nlpinf.scoring.lowrank import LowRank, Moments, Spectrum, choose, multiplications, reduced, spectrum
from nlpinf.scoring.reverse import ReverseScorer
from nlpinf.scoring.store import COMPRESSED, identity_difference
from nlpinf.stages import Stage, length_batches
from nlpinf.tasks import Batch

SAMPLE = 512  # rows that tell the second moments, and as many others on which the error is measured
LEAST = 64
SPEARMAN = 0.99  # less than this rank correlation with the exact scores, for any query, is not accepted
_STEP = 4.0  # between the budgets that are tried, in mean squares: a factor of 2 in the error


@dataclass(frozen=True)
class Error:
    """The errors of compressed scores on `rows` rows, in standard deviations of the exact scores; the worst query's.

    `rms` root mean square, `median` and `max` of the absolute values, `spearman` the rank correlation with the exact ones.
    """

    rows: int
    rms: float
    median: float
    max: float
    spearman: float


@dataclass(frozen=True)
class Compression:
    """Query vectors of low rank: `matrices` by parameter, others exact; `error` asked for, and what was `measured`.

    `multiplications` is the share of an exact pass's products with query vectors that is left.
    """

    error: float
    measured: Error
    matrices: dict[str, LowRank]
    multiplications: float

    def summary(self) -> dict[str, Any]:
        """Return what manifests say: asked and measured errors, cost, and the ranks kept by parameter."""
        ranks = {
            name: dict(zip(("left", "right"), _kept(matrix)), shape=list(matrix.shape))
            for name, matrix in self.matrices.items()
        }
        return {
            "error": self.error,
            "measured": asdict(self.measured),
            "multiplications": self.multiplications,
            "ranks": ranks,
        }


def compressed(vectors: QueryVectors, feed: Feed, error: float, seed: int = 0) -> Compression:
    """Return query vectors compressed so that scores err by at most `error` standard deviations, in the root mean square.

    Random rows of the corpus tell the second moments of every layer's inputs and output gradients, and so which directions
    the scores feel; as many others are scored both ways. Ranks rise until the measured error is at most `error` and the
    rank correlation at least 0.99; a matrix that would need too much rank for a gain stays exact. Biases and norms do.

    Raises `BadInput` for a corpus of less than 64 rows, and for a model with layers that only forward mode can do.
    """
    if not 0 < error < 1:
        raise BadInput(f"the error {error} of compressed vectors is none; give one between 0 and 1, such as 0.01")
    if feed.size < LEAST:
        raise BadInput(f"the corpus has {feed.size} rows, too few to measure what compression does; score it exactly")
    draw = np.random.default_rng(seed)
    part = feed.taken(draw.choice(feed.size, min(2 * SAMPLE, feed.size), replace=False))
    halves = np.array_split(draw.permutation(len(part.rows)), 2)
    stage, trees = vectors.stage, list(vectors.vectors)
    exact = ReverseScorer(stage, trees)
    if exact.uncovered:
        raise BadInput(
            f"compressed vectors need reverse mode, which does not know the layer of {exact.uncovered[0]!r}; score exactly"
        )
    fit, check = (list(_batches(stage, part, half)) for half in halves)
    moments = {name: Moments(shape) for name, shape in exact.matrices.items()}
    for batch in fit:
        exact.shares(batch, moments)
    moments = {name: found for name, found in moments.items() if found.uses}
    truth = torch.cat([exact(batch).scores for batch in check])
    spread = truth.std(0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    spectra = {n: spectrum(_stacked(trees, n), m, len(halves[0]), spread) for n, m in moments.items()}
    found, budget = Compression(error, Error(len(truth), 0.0, 0.0, 0.0, 1.0), {}, 1.0), error**2
    rising: bool | None = None
    while budget > 1e-16 and budget < 1:
        tried = _reduced(trees, spectra, budget)
        if not tried:
            break
        scorer = exact.replaced(tried)
        measured = _measured(truth, torch.cat([scorer(batch).scores for batch in check]), spread)
        good = measured.rms <= error and measured.spearman >= SPEARMAN
        if good:
            share = multiplications(spectra.values(), [_kept(tried.get(name)) for name in spectra])
            found = Compression(error, measured, tried, share)
        if rising is not None and rising is not good:
            break
        rising = good
        budget *= _STEP if good else 1 / _STEP
    return found


def compression_of(
    vectors: QueryVectors, feed: Feed, error: float, folder: Path, identity: dict[str, Any]
) -> Compression:
    """Return the compression that a scores folder has, or compute it and put it there: all processes then use the same.

    `identity` is the folder's. Raises `BadInput` if the folder's is of another query, corpus, weights or setting.
    """
    path = folder / COMPRESSED
    if not path.exists():
        write_compression(path, compressed(vectors, feed, error), identity)
    return read_compression(path, vectors, identity)


def write_compression(path: Path, found: Compression, identity: dict[str, Any]) -> None:
    """Write a compression as safetensors, unless there is one of that name."""
    tensors: dict[str, Tensor] = {}
    for name, matrix in found.matrices.items():
        parts = {"left": matrix.left, "core": matrix.core, "right": matrix.right}
        tensors |= {
            f"{which} {name}": tensor.cpu().contiguous() for which, tensor in parts.items() if tensor is not None
        }
    summary = {"error": found.error, "measured": asdict(found.measured), "multiplications": found.multiplications}
    metadata = {"compression": json.dumps({**summary, "names": list(found.matrices)}), "identity": json.dumps(identity)}
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, lambda temporary: save_tensors(tensors, temporary, metadata), first_name)


def read_compression(path: Path, vectors: QueryVectors, identity: dict[str, Any]) -> Compression:
    """Read a compression; raise `BadInput` if it is damaged or its identity is another."""
    device = vectors.stage.device
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            told, old = json.loads(metadata["compression"]), json.loads(metadata["identity"])
            tensors = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118
        matrices = {
            name: LowRank(tensors.get(f"left {name}"), tensors[f"core {name}"], tensors.get(f"right {name}"))
            for name in told.pop("names")
        }
    except Exception as problem:  # whatever safetensors, json or a missing key raise
        raise BadInput(
            f"{path}: is damaged ({type(problem).__name__}); delete the scores folder and start again"
        ) from None
    if difference := identity_difference(old, json.loads(json.dumps(identity, default=str))):
        raise BadInput(f"{path.parent}: {difference}; give another folder, or the arguments that it was started with")
    return Compression(told["error"], Error(**told["measured"]), matrices, told["multiplications"])


def _stacked(trees: Sequence[Parameters], name: str) -> Tensor:
    return torch.stack([tree[name] for tree in trees])


def _batches(stage: Stage, part: Part, places: np.ndarray) -> Iterator[Batch]:
    examples, task = part.examples, stage.task
    encoded = task.encode([examples[int(i)] for i in places])
    lengths = [task.length(e) for e in encoded]
    for chosen in length_batches(lengths, stage.batch_size, stage.batch_tokens):
        rows = [int(part.rows[places[i]]) for i in chosen]
        yield stage.on_device(task.collate([encoded[i] for i in chosen], rows))


def _reduced(trees: Sequence[Parameters], spectra: dict[str, Spectrum], budget: float) -> dict[str, LowRank]:
    ways = choose(spectra, budget)
    found = {name: reduced(_stacked(trees, name), spectra[name], *way) for name, way in ways.items()}
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def _kept(matrix: LowRank | None) -> tuple[int | None, int | None]:
    if matrix is None:
        return None, None
    return (
        None if matrix.left is None else matrix.core.shape[1],
        None if matrix.right is None else matrix.core.shape[2],
    )


def _measured(truth: Tensor, found: Tensor, spread: Tensor) -> Error:
    errors = ((found - truth) / spread).abs()
    pairs = zip(truth.T.cpu().numpy(), found.T.cpu().numpy())
    ranks = [float(spearmanr(a, b).statistic) if a.std() > 0 else 1.0 for a, b in pairs]
    worst = errors.square().mean(0).sqrt().max()
    return Error(len(truth), float(worst), float(errors.median(0).values.max()), float(errors.max()), min(ranks))
