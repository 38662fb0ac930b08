"""One process of a group: products, gradients and query vectors of a small chain, written by the first process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from nlpinf import CG, Query, processes, query_vectors
from nlpinf.curvature import Curvature
from nlpinf.curvature import products as products_module
from nlpinf.curvature.ekfac import EKFAC
from nlpinf.curvature.perexample import PerExample
from nlpinf.growing import Growing
from nlpinf.parameters import Parameters, random_like
from nlpinf.stages import Chain
from tests.cases import case
from tests.processes.chain import chain
from tests.processes.interrupted import goes_on

SOLVED = {"float32": 1e-5, "float64": 1e-8}  # residuals of the solves


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
    # A recurrent layer's gradients are taken one example at a time; one row is fewer than there are processes.
    tagger = case("lstm tagger", "frozen", pretraining.dtype).chain.stages[0]
    for name, stage, rows, largest in (
        ("ekfac", pretraining, None, 2048), ("diagonal", pretraining, None, 0),
        ("one row", pretraining, [3], 2048), ("one at a time", tagger, None, 2048),
    ):  # fmt: skip
        ekfac, along = EKFAC.fit(stage, rows, largest=largest), random_like(stage.theta, 3)
        found[f"{name} product"], found[f"{name} inverse"] = ekfac @ along, ekfac.inverse(0.05)(along)
    queries = [Query.mean_loss(made.stages[-1].data), Query.loss(made.stages[-1].data[1])]
    for preconditioner in ("none", "ekfac"):
        solver = CG(SOLVED[str(pretraining.dtype).removeprefix("torch.")])
        vectors = query_vectors(made, queries, damping=0.5, solver=solver, preconditioner=preconditioner)
        for i, v in enumerate(vectors.vectors):
            found[f"v{i} {preconditioner}"] = v
    for name, more in (
        ("grow", {"sample": Growing(2, probe=5, spearman=0.9999)}),
        ("bars", {"sample": 2, "error_bars": 2}),
    ):
        vectors = query_vectors(made, queries[:1], damping=0.05, solver=solver, **more)  # type: ignore[arg-type]
        trees = [*vectors.vectors, *(e for errors in vectors.errors for e in errors)]
        found |= {f"v{i} {name}": tree for i, tree in enumerate(trees)}
        if "growth" in vectors.settings:
            found["rows"] = {"rows": torch.tensor([float(s["rows"]) for s in vectors.settings["growth"]["sizes"]])}
    found["values"] = {"q": torch.tensor(vectors.values, dtype=torch.float64)}
    return found


def batches_of_a_fit(made: Chain) -> int:
    """Return how many batches this process goes through for an EK-FAC of the pretraining."""
    columns, count = PerExample._columns, [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return columns(*arguments, **options)

    PerExample._columns = counted  # type: ignore[method-assign]
    EKFAC.fit(made.stages[0])
    PerExample._columns = columns  # type: ignore[method-assign]
    return count[0]


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
        made = chain(getattr(torch, dtype))
        found = {**results(made), "batches": {"made": torch.tensor(batches_of_a_fit(made))}}
        goes_on(made, out.with_name("solves"))
        torch.save(found, out.with_suffix(f".{processes.rank()}"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "dies" in sys.argv[3:])
