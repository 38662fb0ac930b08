"""The application: collects the commands and turns errors into one line and exit status 2."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from nlpinf.cli import check, demo, query, report, run, score, top
from nlpinf.errors import NlpinfError

app = typer.Typer(
    name="nlpinf",
    help="Which sentences of a pretraining corpus help or harm a finetuned model. Positive scores are harmful.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    threads: int = typer.Option(0, "--threads", help="CPU threads to use; 0 leaves PyTorch's default.", min=0),
) -> None:
    os.environ["NLPINF_DEBUG"] = "1" if debug else ""
    if threads:
        import torch

        torch.set_num_threads(threads)


for module in (demo, run, query, score, top, report, check):
    module.add(app)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except NlpinfError as error:
        if os.environ.get("NLPINF_DEBUG"):
            raise
        print(f"nlpinf: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
