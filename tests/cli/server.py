"""Run commands as processes of their own without importing everything each time: reads requests, forks, answers.

A request is a line of JSON: `argv`, `cwd`, `out` and `err` (files for the two streams), and `kill`, a number n to end the
process by SIGKILL just before the n-th file gets its final name (0: never). The answer is a line with the exit status.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from transformers import BertForMaskedLM, GPT2LMHeadModel, Trainer  # noqa: F401  imported once, for all

from nlpinf.cli import main


def child(request: dict[str, Any]) -> None:
    """Become the command."""
    for number, name in ((1, request["out"]), (2, request["err"])):
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    os.chdir(request["cwd"])
    sys.argv = ["nlpinf", *request["argv"]]
    left = request["kill"]

    def counted(name: Callable[..., None]) -> Callable[..., None]:
        def naming(*names: Any, **options: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            name(*names, **options)

        return naming

    os.replace, os.link = counted(os.replace), counted(os.link)
    status = 1
    try:
        main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(status)


def serve() -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
