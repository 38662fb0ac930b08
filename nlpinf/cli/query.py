"""nlpinf query: query vectors of a finetuned run, pulled back to its pretraining run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from nlpinf import processes, querystore
from nlpinf.adapters.chains import open_chain
from nlpinf.adapters.plain import Told
from nlpinf.checkpoints import MINUTES, Checkpoints
from nlpinf.cli import console
from nlpinf.cli.run import verdict_table
from nlpinf.data.labelled import read_rows
from nlpinf.errors import BadInput
from nlpinf.experiments.asking import ask
from nlpinf.experiments.recipe import CurvatureName, PreconditionerName, QuerySettings, SolverName, checked
from nlpinf.experiments.stages import misclassified as wrong_rows
from nlpinf.queries import Query
from nlpinf.stages import Precision


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("query")(console.in_group(query))


_UNRECORDED = "Runs without a record"


def query(
    pretrain: Path = typer.Option(help="Run folder of the pretraining."),
    finetune: list[Path] = typer.Option(help="Run folder of the finetuning; give it again for each further stage."),
    test: str = typer.Option(
        help="Labelled rows (.jsonl, .parquet, datasets folder); their mean loss is the first query."
    ),
    out: Path = typer.Option(help="Folder for the query vectors."),
    row: list[int] = typer.Option([], help="Add the loss of this row of the test file (from 0); may be repeated."),
    misclassified: int = typer.Option(
        0, help="Add the losses of so many misclassified rows, the largest first.", min=0
    ),
    curvature: CurvatureName = typer.Option(
        "ggn",
        help="Curvature operator of the solves; auto: the Hessian where it is positive definite, else the GGN.",
    ),
    solver: SolverName = typer.Option("cg", help="Solver; direct: EK-FAC's inverse, with its residual."),
    preconditioner: PreconditionerName = typer.Option("none", help="Preconditioner of the solver; direct takes ekfac."),
    precision: Precision | None = typer.Option(
        None, help="Make the products in low precision, refined to the same residual."
    ),
    damping: float | None = typer.Option(None, help="Damping λ, absolute."),
    relative_damping: float | None = typer.Option(
        None,
        help="Damping as a multiple of the mean eigenvalue (default, without --damping: the smallest of 100, 10, 1, 0.1 and 0.01 with which a second sample agrees).",
    ),
    sample: str = typer.Option(
        "auto",
        metavar="ROWS|auto|grow",
        help="Rows that carry the curvature of each stage; auto: at most 1,024, half of the corpus; grow: from 1,024 on twice as many until the order of the scores no longer changes.",
    ),
    sample_limit: int | None = typer.Option(
        None, help="With --sample grow: rows at most (default: the whole corpus).", min=1
    ),
    error_bars: int | None = typer.Option(
        None,
        help="Solve on so many disjoint samples (at least 2; 4 is a good number): the scores get standard errors.",
    ),
    alpha: float | None = typer.Option(
        None, help="Proximity α of the finetuning, where the run did not record it (default: fitted from the two runs)."
    ),
    tolerance: float = typer.Option(1e-3, help="Relative residual of the solves."),
    max_iterations: int = typer.Option(1000, help="Curvature products of a solve at most."),
    seed: int = typer.Option(0, help="Seed of the curvature sample."),
    checkpoint_every: float = typer.Option(
        MINUTES, help="Minutes between checkpoints of a solve: what an interruption costs at most.", min=0
    ),
    restart: bool = typer.Option(
        False,
        "--restart",
        help="Start the solves afresh, though the folder holds those of a query that was interrupted.",
    ),
    allow_unconverged: bool = typer.Option(False, help="Keep solves that did not converge; every result says so."),
    corpus: str | None = typer.Option(None, help="Where the pretraining's texts lie.", rich_help_panel=_UNRECORDED),
    text_column: str | None = typer.Option(None, help="Their column (default: text).", rich_help_panel=_UNRECORDED),
    split: str | None = typer.Option(None, help="Their split, of a datasets folder.", rich_help_panel=_UNRECORDED),
    task: str | None = typer.Option(
        None, help="The pretraining's task: masked_lm or causal_lm.", rich_help_panel=_UNRECORDED
    ),
    weight_decay: float | None = typer.Option(
        None, help="The pretraining's weight decay, of all but biases and norms.", rich_help_panel=_UNRECORDED
    ),
    reduction: str | None = typer.Option(
        None, help="Its loss: mean over 'token' or 'example'.", rich_help_panel=_UNRECORDED
    ),
    max_length: int | None = typer.Option(None, help="Tokens of a row at most.", rich_help_panel=_UNRECORDED),
    mask_probability: float | None = typer.Option(
        None, help="Share of the tokens that were masked.", rich_help_panel=_UNRECORDED
    ),
    packed: bool | None = typer.Option(
        None, "--packed/--no-packed", help="Whether texts were joined and cut to rows.", rich_help_panel=_UNRECORDED
    ),
    train: list[str] = typer.Option(
        [], help="Where the finetuning's labelled rows lie, one for each --finetune.", rich_help_panel=_UNRECORDED
    ),
    train_text_column: str | None = typer.Option(
        None, help="Column of the labelled texts, training and test.", rich_help_panel=_UNRECORDED
    ),
    label_column: str | None = typer.Option(None, help="Column of the labels.", rich_help_panel=_UNRECORDED),
    train_weight_decay: float | None = typer.Option(
        None, help="The finetuning's weight decay.", rich_help_panel=_UNRECORDED
    ),
    train_max_length: int | None = typer.Option(
        None, help="Tokens of a labelled text at most.", rich_help_panel=_UNRECORDED
    ),
    read_training_args: bool = typer.Option(
        False, help="Read settings off training_args.bin, a pickle, without running it.", rich_help_panel=_UNRECORDED
    ),
    trust_remote_code: bool = typer.Option(False, help="Run code that lies in the model's folder."),
    json_: bool = typer.Option(False, "--json", help="Print the manifest as JSON."),
) -> None:
    """Compute query vectors: the mean loss of a test file, and losses of single rows.

    A run is what nlpinf or nlpinf.StageRecorder recorded, or a plain output folder of a Hugging Face Trainer; what such a
    folder does not store is told by options, or assumed and listed.
    A query that was interrupted goes on where it was when the same command is given again.

    Example: nlpinf query --pretrain demo/pretrain --finetune demo/finetune --test demo/data/test.jsonl --out query
    """
    for option, value in (("--damping", damping), ("--relative-damping", relative_damping)):
        if value is not None and not 0 <= value < float("inf"):
            raise BadInput(f"{option} is {value}; the damping must be a number of at least 0")
    if damping is not None and relative_damping is not None:
        raise BadInput("--damping and --relative-damping were both given; give one of them")
    if not sample.isdecimal() and sample not in ("auto", "grow"):
        raise BadInput(f"--sample is {sample!r}; give a number of rows, auto or grow")
    if len(train) not in (0, len(finetune)):
        raise BadInput(f"--train was given {len(train)} times for {len(finetune)} finetuning runs; give it for each")
    settings = checked(
        QuerySettings,
        {
            "misclassified": misclassified,
            "curvature": curvature,
            "damping": _damping(damping, relative_damping),
            "sample": sample,
            "sample_limit": sample_limit,
            "error_bars": error_bars,
            "solver": solver,
            "preconditioner": preconditioner,
            "precision": precision,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "allow_unconverged": allow_unconverged,
        },
        "query",
    )
    querystore.claim(out)
    told = [
        Told(
            corpus, text_column, None, split, task, weight_decay, reduction, max_length, packed, mask_probability,
            read_training_args,
        )
    ]  # fmt: skip
    places: list[str | None] = [*train] if train else [None] * len(finetune)
    for where in places:
        told.append(
            Told(
                where,
                train_text_column,
                label_column,
                weight_decay=train_weight_decay,
                max_length=train_max_length,
                read_arguments=read_training_args,
            )
        )
    opened = open_chain([pretrain, *finetune], alpha=alpha, told=told, trust_remote_code=trust_remote_code)
    chain = opened.chain
    last = chain.stages[-1]
    rows = read_rows(
        test,
        getattr(last.task, "labels", None),
        last.record.get("label_names"),
        text_column=train_text_column,
        label_column=label_column,
    )
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
    kept = Checkpoints(querystore.solves(out), checkpoint_every, restart=restart, say=_tell)
    with console.bars() as bars:
        vectors = ask(
            chain,
            queries,
            settings,
            seed,
            kept,
            lambda stage, k, residual: bars(f"solve {stage}", k, max_iterations, f"residual {residual:.1e}"),
        )
    if not processes.main():
        return
    querystore.save(vectors, out, chain, opened.facts)
    manifest = querystore.manifest(out)
    if json_:
        console.print_json(manifest)
    else:
        for line in opened.lines:
            console.out.print(line, highlight=False, markup=False, soft_wrap=True)
        console.out.print(verdict_table(manifest["queries"]))
        for line in console.settings_lines(manifest["settings"]):
            console.say(line)


def _damping(absolute: float | None, relative: float | None) -> Any:
    if relative is not None:
        return {"relative": relative}
    return "auto" if absolute is None else absolute


def _tell(line: str) -> None:
    console.err.print(line, highlight=False, markup=False)
