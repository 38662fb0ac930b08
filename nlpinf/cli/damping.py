"""nlpinf damping: how to choose the damping of a query, from the spectrum and a ladder of solutions."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

from nlpinf.adapters.chains import open_chain
from nlpinf.advice import FACTORS, Advice, advise
from nlpinf.cli import console
from nlpinf.curvature import CurvatureKind
from nlpinf.data import shipped
from nlpinf.data.corpus import read_labelled
from nlpinf.queries import Query


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("damping")(damping)


def damping(
    pretrain: Path = typer.Option(help="Run folder of the pretraining."),
    finetune: list[Path] = typer.Option(help="Run folder of the finetuning; give it again for each further stage."),
    test: str = typer.Option(help="Labelled rows (.jsonl or .jsonl.gz); their mean loss is the query."),
    curvature: CurvatureKind = typer.Option("ggn", help="Curvature operator: ggn, hessian or fisher."),
    factor: list[float] = typer.Option(
        list(FACTORS), help="Damping to try, as a multiple of the mean eigenvalue; give it again for each."
    ),
    sample: int = typer.Option(256, help="Rows that carry the curvature of each stage.", min=1),
    probe: int = typer.Option(256, help="Rows whose ranking is compared.", min=2),
    alpha: float | None = typer.Option(None, help="Proximity α of the finetuning, where the run did not record it."),
    tolerance: float = typer.Option(1e-2, help="Relative residual of the solves."),
    max_iterations: int = typer.Option(500, help="Curvature products of a stage at most."),
    seed: int = typer.Option(0, help="Seed of sample, probe and starts."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Sketch each stage's spectrum, solve for a ladder of dampings at once, and recommend one with the reason.

    Example: nlpinf damping --pretrain demo/pretrain --finetune demo/finetune --test demo/data/test.jsonl
    """
    chain = open_chain([pretrain, *finetune], alpha=alpha).chain
    rows = read_labelled(shipped.resolve(test), getattr(chain.stages[-1].task, "labels", None))
    with console.bars() as bars:
        found = advise(
            chain,
            Query.mean_loss(rows, "mean test loss"),
            curvature=curvature,
            factors=factor,
            sample=sample,
            probe=probe,
            seed=seed,
            tolerance=tolerance,
            max_iterations=max_iterations,
            progress=lambda stage, k, r: bars(f"ladder {stage}", k, max_iterations, f"residual {r:.1e}"),
        )
    if json_:
        console.print_json([advice.content() for advice in found])
        return
    for advice in found:
        console.out.print(_table(advice))
        chosen = "none" if advice.recommended is None else f"{advice.recommended:.3g}"
        console.out.print(f"recommended: {chosen}: {advice.reason}\n", highlight=False)


def _table(advice: Advice) -> Table:
    s = advice.spectrum
    title = (
        f"{advice.stage}: {advice.curvature} of {s['parameters']:,} parameters on {advice.rows} rows; eigenvalues mean "
        f"{s['mean']:.3g}, smallest {s['smallest']:.3g}, largest {s['largest']:.3g}, about {s['above_mean']:,.0f} above the mean"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    names = ("x mean", "damping", "verdict", "residual", "second sample", "products", "cosine to next", "ranks to next")
    for name in names:
        table.add_column(name, justify="left" if name == "verdict" else "right")
    for rung in advice.rungs:
        beside = ["–" if x is None else f"{x:.3f}" for x in (rung.cosine, rung.spearman)]
        second = "–" if rung.second_residual is None else f"{rung.second_residual:.2f}"
        table.add_row(
            f"{rung.factor:g}", f"{rung.damping:.3g}", rung.verdict, f"{rung.residual:.1e}", second,
            str(rung.products), *beside,
        )  # fmt: skip
    return table
