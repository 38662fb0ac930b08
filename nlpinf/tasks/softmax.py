"""Losses over the word vocabulary: the full softmax, and the sampled one with fixed negatives.

Source: Jean et al., "On using very large target vocabulary for neural machine translation", ACL 2015; the log-uniform
candidates and the expected-count correction are those that TensorFlow's sampled softmax uses, and so bilm-tf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nlpinf.errors import BadInput
from nlpinf.pieces import entries

DEFAULT_NEGATIVES = 8192
CHUNK = 2**22


@dataclass(frozen=True)
class Negatives:
    """Distinct word ids drawn log-uniformly: P(k) = log((k + 2) / (k + 1)) / log(V + 1), id 0 the most frequent word.

    `tries` draws were needed for `ids`; a word k is then expected 1 − (1 − P(k))^tries times among them.
    """

    ids: Tensor  # (K,) int64, sorted
    tries: int
    vocabulary_size: int
    seed: tuple[int, ...]

    def log_expected(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """log(1 − (1 − P(k))^tries) for each id."""
        k = ids.to(torch.float64)
        p = torch.log1p(1.0 / (k + 1.0)) / math.log(self.vocabulary_size + 1.0)
        return torch.log(-torch.expm1(self.tries * torch.log1p(-p))).to(dtype)

    def to(self, device: torch.device | str) -> Negatives:
        return Negatives(self.ids.to(device), self.tries, self.vocabulary_size, self.seed)


def draw_negatives(vocabulary_size: int, seed: int | tuple[int, ...], count: int = DEFAULT_NEGATIVES) -> Negatives:
    """The negatives of one seed, or of (seed, step) in training: the same on every machine.

    The vocabulary must be in order of falling frequency, as `Vocabulary.build` and bilm-tf's files have it.
    """
    if not 0 < count < vocabulary_size:
        raise BadInput(
            f"sampled softmax: {count} negatives from {vocabulary_size} words; expected fewer negatives than words, "
            "use the full softmax for a small vocabulary"
        )
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    generator = np.random.Generator(np.random.PCG64(list(seeds)))
    scale = math.log(vocabulary_size + 1.0)
    seen = np.zeros(vocabulary_size, dtype=bool)
    found, tries = 0, 0
    while found < count:
        draws = np.exp(generator.random(2 * count) * scale).astype(np.int64) - 1
        draws = np.clip(draws, 0, vocabulary_size - 1)
        # The first occurrences among these draws of words not seen before, in the order of drawing.
        first = np.sort(np.unique(draws, return_index=True)[1])
        first = first[~seen[draws[first]]]
        enough = found + len(first) >= count
        first = first[: count - found]
        seen[draws[first]] = True
        found += len(first)
        tries += int(first[-1]) + 1 if enough else len(draws)
    return Negatives(torch.from_numpy(np.flatnonzero(seen)), tries, vocabulary_size, seeds)


def full_softmax_losses(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """−log softmax(W h + b)[target]: hidden (items, P), targets (items,) to (items,).

    In chunks of items, so that (items × words) never exists whole outside reverse mode.
    """
    # 2²² logits (16 MB in float32) at a time: forward mode over 8,000 words took 0.66 of the time of one chunk.
    chunk = max(1, entries(CHUNK, weight) // len(weight))
    return torch.cat(
        [
            F.cross_entropy(F.linear(h, weight, bias), t, reduction="none")
            for h, t in zip(hidden.split(chunk), targets.split(chunk))
        ]
    )


def sampled_softmax_logits(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, negatives: Negatives
) -> Tensor:
    """Logits (items, 1 + K) whose class 0 is each item's own word and the others are the negatives.

    Each logit has the log of its word's expected count taken off; a negative that is the item's own word is left out
    (−∞).  So the loss is the cross-entropy of class 0, and outputs and loss can be taken apart.
    """
    if len(bias) != negatives.vocabulary_size:
        raise BadInput(
            f"sampled softmax: negatives for {negatives.vocabulary_size} words, but the head has {len(bias)}"
        )
    rows = F.embedding(targets, weight)
    own = (hidden * rows).sum(-1) + bias.index_select(0, targets) - negatives.log_expected(targets, hidden.dtype)
    shift = bias.index_select(0, negatives.ids) - negatives.log_expected(negatives.ids, hidden.dtype)
    others = F.linear(hidden, F.embedding(negatives.ids, weight), shift)
    others = others.masked_fill(targets[:, None] == negatives.ids, -math.inf)
    return torch.cat([own[:, None], others], 1)


def sampled_softmax_losses(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, negatives: Negatives
) -> Tensor:
    """The cross-entropy of class 0 of `sampled_softmax_logits`: (items,)."""
    logits = sampled_softmax_logits(hidden, targets, weight, bias, negatives)
    return torch.logsumexp(logits, 1) - logits[:, 0]
