"""One process of a group over a chain whose models are sharded: gradients, products, query vectors and scores."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nlpinf import CG, Query, processes, query_vectors
from nlpinf import parameters as P
from nlpinf.curvature import Curvature, Shifted
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.scoring.forward import forward_scores
from nlpinf.solvers import Refined
from nlpinf.stages import Chain
from tests.processes.chain import chain


def sharded(model: nn.Module) -> nn.Module:
    """Return the model as accelerate shards it: FSDP2, every transformer layer by itself, embeddings, and the rest together.

    `Accelerator` itself asks for GPUs before it takes FSDP; what it then calls does not.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False,
    )  # fmt: skip
    here: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=True,
    )
    return fsdp2_prepare_model(here, model)


def results(made: Chain) -> dict[str, Parameters]:
    """Return what sharded models must have in common with whole ones, whole."""
    first, last = made.stages
    vector = P.random_like(first.theta, 3)
    found: dict[str, Parameters] = {"random": vector, "gradient": first.gradient()}
    for kind in ("ggn", "fisher"):
        operator = Curvature(first, kind)  # type: ignore[arg-type]
        found[kind] = operator @ vector
        parts = [part @ vector for part in operator.parts()]
        found[f"{kind} parts"] = {n: sum(p[n] for p in parts) / len(parts) for n in vector}  # type: ignore[misc]
    mean = Shifted(Curvature(first, "ggn"), first.decay).mean_eigenvalue()
    queries = [Query.mean_loss(last.data), Query.margin(last.data[1])]
    vectors = query_vectors(made, queries, damping=1.0, solver=CG(1e-12))
    found |= {f"v{i}": v for i, v in enumerate(vectors.vectors)}
    batches = list(first.batches())
    scores = [forward_scores(first, list(vectors.vectors), batch).scores for batch in batches]
    found["scores"] = {
        "all": torch.cat(scores),
        "mean eigenvalue": torch.tensor([mean]),
        "q": torch.tensor(vectors.values),
    }
    return {name: P.whole(tree) for name, tree in found.items()}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with processes.group("gloo"):
        whole = chain(torch.float64, "gpt2 eager")
        stages = [replace(stage, model=sharded(stage.model)) for stage in whole.stages]
        made = Chain(stages, whole.links[1].transfer)  # type: ignore[arg-type]
        held = sum(t.to_local().numel() for t in stages[0].parameters.values())  # type: ignore[attr-defined]
        assert held < 0.7 * P.size(stages[0].parameters), held  # pieces are pieces
        found = results(made)
        assert all(hasattr(t, "to_local") for t in stages[0].parameters.values())
        assert all(p.grad is None for p in stages[0].model.parameters())
        try:
            Curvature(stages[0], "hessian") @ P.random_like(stages[0].theta, 3)
        except BadInput as error:
            assert "second derivatives" in str(error)
        else:
            raise AssertionError("a Hessian product of a sharded model was not refused")
        query, tiny = [Query.mean_loss(stages[-1].data)], {"damping": 1.0, "solver": CG(1e-2)}
        for settings, told in (
            ({"preconditioner": "nystrom"}, "no Nyström preconditioner; take the preconditioner 'none'"),
            ({"preconditioner": "ekfac"}, "no EK-FAC; take the preconditioner 'none'"),
            ({"solver": Refined(CG(1e-2))}, "no copy in another precision; leave the precision out"),
        ):
            try:
                query_vectors(made, query, **{**tiny, **settings})
            except BadInput as error:
                assert told in str(error), error
            else:
                raise AssertionError(f"{settings} of a sharded model was not refused")
        chosen = query_vectors(made, query, curvature="auto", **tiny).verdicts[0]
        assert all("Gauss-Newton matrix" in end.note and "sharded" in end.note for end in chosen.values()), chosen
        torch.save(found, out.with_suffix(f".{processes.rank()}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
