"""Error bars of scores: how far they depend on which rows carry the curvature, by solves on disjoint samples.

With v_1 ... v_K the query vectors of K disjoint samples of n of the corpus's m rows, a score is that of their mean v̄, and

    se(z)² = (1 − K n / m) · 1/(K (K − 1)) · Σ_k ⟨v_k − v̄, g'(z)⟩² = Σ_j ⟨e_j, g'(z)⟩²

the standard error of a mean of K, times what drawing without replacement leaves of it: where the samples are the whole
corpus, only the solves' own errors remain. e_1 ... e_{K−1} are the orthonormal (Helmert) contrasts of the v_k, scaled. With t the
quantile of Student's distribution of K − 1 degrees of freedom, score ± t·se covers the score by the curvature of the whole
corpus, but for the bias of an inverse of a mean over n rows, of the order of (effective parameters)/n, which a larger n
shrinks and no spread shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nlpinf import parameters as P
from nlpinf.parameters import Parameters


def mean_and_errors(draws: Sequence[Parameters], unseen: float) -> tuple[Parameters, tuple[Parameters, ...]]:
    """Return v̄ and e_1 ... e_{K−1} of the vectors of K draws; `unseen` is 1 − K n / m."""
    count = len(draws)
    scale = math.sqrt(max(0.0, unseen) / (count * (count - 1)))
    total, errors = draws[0], []
    for j in range(1, count):
        contrast = P.axpy(-float(j), draws[j], total)
        errors.append(P.scaled(scale / math.sqrt(j * (j + 1)), contrast))
        total = P.axpy(1.0, draws[j], total)
    return P.scaled(1 / count, total), tuple(errors)
