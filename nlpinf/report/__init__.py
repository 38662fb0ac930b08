"""The HTML page of a scores folder: what was asked, how far to trust it, and the sentences."""

from nlpinf.report.page import write
from nlpinf.report.tokens import shaded, shader

__all__ = ["shaded", "shader", "write"]
