"""One process of a group: products, gradients and query vectors of a small chain, written by the first process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from nlpinf import CG, Query, processes, query_vectors
from nlpinf.curvature import Curvature
from nlpinf.curvature import products as products_module
from nlpinf.parameters import Parameters, random_like
from nlpinf.stages import Chain
from tests.processes.chain import chain

SOLVED = {"float32": 1e-5, "float64": 1e-10}  # residuals of the solves


def results(made: Chain) -> dict[str, Parameters]:
    """Return what a group must have in common with one process."""
    pretraining = made.stages[0]
    vector = random_like(pretraining.theta, 3)
    found: dict[str, Parameters] = {"gradient": pretraining.gradient()}
    for kind in ("ggn", "hessian", "fisher"):
        operator = Curvature(pretraining, kind)
        found[kind] = operator @ vector
        # Each rank has its own batch at each turn; the mean over the turns is the product.
        parts = [part @ vector for part in operator.parts()]
        found[f"{kind} parts"] = {n: sum(p[n] for p in parts) / len(parts) for n in vector}
    queries = [Query.mean_loss(made.stages[-1].data), Query.loss(made.stages[-1].data[1])]
    for preconditioner in ("none", "ekfac"):
        solver = CG(SOLVED[str(pretraining.dtype).removeprefix("torch.")])
        vectors = query_vectors(made, queries, damping=0.05, solver=solver, preconditioner=preconditioner)
        for i, v in enumerate(vectors.vectors):
            found[f"v{i} {preconditioner}"] = v
    found["values"] = {"q": torch.tensor(vectors.values, dtype=torch.float64)}
    return found


def main(dtype: str, out: Path, dies: bool) -> None:
    """Run as one of the launched processes; with `dies`, the last of them ends in the middle of its third product."""
    torch.set_num_threads(1)
    with processes.group("gloo"):
        if dies and processes.rank() == processes.count() - 1:
            product, calls = products_module.gauss_newton_product, iter(range(10**9))

            def mortal(*arguments: object) -> object:
                if next(calls) == 6:
                    os._exit(13)
                return product(*arguments)  # type: ignore[arg-type]

            products_module.gauss_newton_product = mortal  # type: ignore[assignment]
        found = results(chain(getattr(torch, dtype)))
        torch.save(found, out.with_suffix(f".{processes.rank()}"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "dies" in sys.argv[3:])
