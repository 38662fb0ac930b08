"""nlpinf query: query vectors of a finetuned run, pulled back to its pretraining run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

from nlpinf import querystore
from nlpinf.adapters.huggingface import chain_from_runs
from nlpinf.cli import console
from nlpinf.cli.run import verdict_table
from nlpinf.data import shipped
from nlpinf.data.corpus import read_labelled
from nlpinf.errors import BadInput
from nlpinf.experiments.stages import misclassified as wrong_rows
from nlpinf.influence import Relative, query_vectors
from nlpinf.queries import Query
from nlpinf.solvers import CG


class CurvatureName(str, Enum):
    """Curvature operators by name."""

    ggn = "ggn"
    hessian = "hessian"
    fisher = "fisher"


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("query")(query)


def query(
    pretrain: Path = typer.Option(help="Run folder of the pretraining."),
    finetune: list[Path] = typer.Option(help="Run folder of the finetuning; give it again for each further stage."),
    test: str = typer.Option(help="Labelled rows (.jsonl or .jsonl.gz); their mean loss is the first query."),
    out: Path = typer.Option(help="Folder for the query vectors."),
    row: list[int] = typer.Option([], help="Add the loss of this row of the test file (from 0); may be repeated."),
    misclassified: int = typer.Option(
        0, help="Add the losses of so many misclassified rows, the largest first.", min=0
    ),
    curvature: CurvatureName = typer.Option(CurvatureName.ggn, help="Curvature operator of the solves."),
    damping: float | None = typer.Option(None, help="Damping λ, absolute."),
    relative_damping: float = typer.Option(
        0.01, help="Damping as a multiple of the mean eigenvalue; used without --damping."
    ),
    sample: int | None = typer.Option(
        None, help="Rows that carry the curvature of each stage (default: at most 1,024, half of the corpus)."
    ),
    alpha: float | None = typer.Option(None, help="Proximity α of the finetuning, where the run did not record it."),
    tolerance: float = typer.Option(1e-3, help="Relative residual of the solves."),
    max_iterations: int = typer.Option(1000, help="Curvature products of a solve at most."),
    seed: int = typer.Option(0, help="Seed of the curvature sample."),
    allow_unconverged: bool = typer.Option(False, help="Keep solves that did not converge; every result says so."),
    json_: bool = typer.Option(False, "--json", help="Print the manifest as JSON."),
) -> None:
    """Compute query vectors: the mean loss of a test file, and losses of single rows.

    Example: nlpinf query --pretrain demo/pretrain --finetune demo/finetune --test demo/data/test.jsonl --out query
    """
    for option, value in (("--damping", damping), ("--relative-damping", relative_damping)):
        if value is not None and not 0 <= value < float("inf"):
            raise BadInput(f"{option} is {value}; the damping must be a number of at least 0")
    querystore.claim(out)
    chain = chain_from_runs([pretrain, *finetune], alpha=alpha)
    last = chain.stages[-1]
    rows = read_labelled(shipped.resolve(test), getattr(last.task, "labels", None))
    queries = [Query.mean_loss(rows, "mean test loss")]
    chosen = list(row)
    if misclassified:
        chosen += [i for i in wrong_rows(last, rows) if i not in chosen][:misclassified]
    for i in chosen:
        if not 0 <= i < len(rows):
            raise BadInput(f"{test}: there is no row {i}; it has {len(rows)}, numbered from 0")
        queries.append(
            Query.loss(rows[i], f"loss of test row {i}: {rows[i]['text'][:50]!r} (label {rows[i]['label']})")
        )
    if sample is None:
        sample = min(1024, max(1, chain.stages[0].size // 2))
    with console.bars() as bars:
        vectors = query_vectors(
            chain,
            queries,
            curvature=curvature.value,
            damping=Relative(relative_damping) if damping is None else damping,
            solver=CG(tolerance, max_iterations),
            sample=sample,
            seed=seed,
            allow_unconverged=allow_unconverged,
            progress=lambda stage, k, residual: bars(f"solve {stage}", k, max_iterations, f"residual {residual:.1e}"),
        )
    querystore.save(vectors, out, chain)
    manifest = querystore.manifest(out)
    if json_:
        console.print_json(manifest)
    else:
        console.out.print(verdict_table(manifest["queries"]))
