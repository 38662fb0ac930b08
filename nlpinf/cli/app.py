"""The application: collects the commands and turns errors into one line and exit status 2."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from nlpinf import heap
from nlpinf.cli import (
    check,
    damping,
    demo,
    filter,
    finetune,
    fit_head,
    merge,
    plan,
    predict,
    pretrain,
    query,
    report,
    run,
    score,
    status,
    top,
)
from nlpinf.errors import NlpinfError, NotConverged

app = typer.Typer(
    name="nlpinf",
    help="Which sentences of a pretraining corpus help or harm a finetuned model. Positive scores are harmful.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    device: str = typer.Option(
        "auto",
        "--device",
        envvar="NLPINF_DEVICE",
        help="Where models run: cpu, cuda, cuda:1; auto: a GPU if there is one.",
    ),
    threads: int = typer.Option(0, "--threads", help="CPU threads to use; 0 leaves PyTorch's default.", min=0),
) -> None:
    os.environ["NLPINF_DEBUG"] = "1" if debug else ""
    os.environ["NLPINF_DEVICE"] = device
    heap.keep()
    if threads:
        import torch

        torch.set_num_threads(threads)


for module in (
    demo,
    run,
    pretrain,
    fit_head,
    finetune,
    query,
    damping,
    plan,
    score,
    status,
    top,
    filter,
    predict,
    merge,
    report,
    check,
):
    module.add(app)


_PATIENCE = 5.0  # seconds


# typer carries a click of its own or uses the installed one; either way this is the ancestor of usage errors.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")


def main() -> None:
    """Run the command line. Errors of the user's making end in one line on stderr and exit status 2."""
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="nlpinf", standalone_mode=False)
    except (NlpinfError, _UsageError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()
            sys.exit(1)
        if os.environ.get("NLPINF_DEBUG"):
            raise
        print(f"nlpinf: {_whose()}{_told(error)}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _whose() -> str:
    """Return which process of a launcher's it is, but of the first, once that one has had the time to say the same."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    time.sleep(_PATIENCE)  # where all are refused, the launcher ends this one when the first has ended
    return f"process {rank}: "


def _told(error: Any) -> str:
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror or ' '.join(str(error).split())}; check the path, its rights and the disk"
    if isinstance(error, NotConverged):
        return f"{error} (--allow-unconverged, in a recipe query.allow_unconverged)"
    if not isinstance(error, _UsageError):
        return str(error)
    command = error.ctx.command_path if error.ctx is not None else "nlpinf"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; `{command} --help` tells more"
