"""The exceptions of nlpinf: each message is one line that says what is wrong and what to do."""

from __future__ import annotations


class NlpinfError(Exception):
    """Base class; the command line prints the message alone and exits with status 2."""


class BadInput(NlpinfError, ValueError):
    """A file, field, row or setting that cannot be used."""


class NotConverged(NlpinfError, RuntimeError):
    """A solve ended without reaching its tolerance; `solution` holds what it had."""

    def __init__(self, message: str, solution: object) -> None:
        super().__init__(message)
        self.solution = solution
