"""What the README and the docs show: their Python runs, their commands run, and every command's own example is taken."""

from __future__ import annotations

import gzip
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from nlpinf.cli.app import app
from tests.cli.common import labelled, nlpinf, recipe, sentences, write_data, write_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
USAGE: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")
# Pages whose commands are run on a small experiment; those of the others are only parsed.
RUN = ["README.md", "docs/how-to/own-runs.md", "docs/how-to/check-a-model.md"]


def name(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """The fenced blocks of Python: what stands after the fence, the code, and the line where it starts."""
    text = page.read_text(encoding="utf-8")
    return [
        (m[1], m[2], text[: m.start(2)].count("\n"))
        for m in re.finditer(r"^```(python[^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's indented blocks that are commands of nlpinf, without its name."""
    lines = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8")).splitlines()  # a line may go on in the next
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("    nlpinf ")]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The values that a command line gives to its command, which is not run; raises where the command refuses it."""
    assert arguments[0] in COMMANDS, arguments
    command = COMMANDS[arguments[0]]
    return command.make_context(f"nlpinf {arguments[0]}", list(arguments[1:])).params


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the examples name: a finished experiment in `demo`, a recipe, a corpus and test rows."""
    folder = tmp_path_factory.mktemp("docs")
    data = write_data(folder / "data", sentences(560), labelled(80))
    (folder / "recipes").mkdir()
    tiny = recipe(data, query__sample=40, pretrain__training__batch_size=64)
    write_recipe(folder / "recipes/demo.yaml", tiny)
    ended = nlpinf("run", "recipes/demo.yaml", "--out", "demo", cwd=folder)
    assert ended.status == 0, ended
    for run in ("pretrain", "finetune", "data"):
        shutil.copytree(folder / "demo" / run, folder / "runs" / run)
    for source, packed in (("data/corpus.txt", "corpus.txt.gz"), ("demo/data/test.jsonl", "test.jsonl.gz")):
        (folder / packed).write_bytes(gzip.compress((folder / source).read_bytes(), mtime=0))
    return folder


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_runs(page: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """In order, in one session a page: all of the README's, and those of the docs that are marked `run`."""
    readme = page.name == "README.md" and page.parent == ROOT
    chosen = []
    for fence, code, line in blocks(page):
        compiled = compile("\n" * line + code, str(page), "exec")  # tracebacks show the page's own lines
        if readme or fence == "python run":
            chosen.append(compiled)
        else:
            assert fence == "python", f"{name(page)}: ```{fence} is neither ```python nor ```python run"
    assert not readme or chosen
    folder = tmp_path / "session"
    if readme:
        shutil.copytree(request.getfixturevalue("place"), folder)
    else:
        folder.mkdir()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    dtype = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            for block in chosen:
                exec(block, namespace)
            if readme:
                assert len(namespace["scores"].top(20)) == 20 and namespace["vectors"].converged
        finally:
            torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name)
def test_commands_are_taken(page: Path) -> None:
    for arguments in commands(page):
        assert parsed(arguments)


@pytest.mark.parametrize("page", RUN)
def test_commands_run(page: str, place: Path, tmp_path: Path) -> None:
    shown = commands(ROOT / page)
    assert shown
    folder = tmp_path / "session"
    shutil.copytree(place, folder)
    for arguments in shown:
        ended = nlpinf(*arguments, cwd=folder)
        assert ended.status == 0 and ended.out, (arguments, ended)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_that_it_takes(command: str) -> None:
    told = COMMANDS[command].help
    assert told.count("Example: ") == 1, f"the docstring of {command} has no line `Example: nlpinf {command} ...`"
    arguments = shlex.split(" ".join(told.split("Example: ")[1].split()))
    assert arguments[:2] == ["nlpinf", command]
    parsed(arguments[1:])
    assert "--json" in {option for parameter in COMMANDS[command].params for option in parameter.opts}


def test_an_option_that_is_not_there_would_be_seen() -> None:
    for wrong in (["top", "scores", "--cuont", "3"], ["score", "--out", "scores"], ["top", "scores", "-n", "many"]):
        with pytest.raises(USAGE, match=r"--cuont|query|integer"):
            parsed(wrong)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "recipes/README.md"]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{name(page)} links to {target}, which is not there"


def test_every_page_of_the_docs_is_linked() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for page in PAGES:
        if page.parent != ROOT and page.name != "README.md":
            path = page.relative_to(ROOT / "docs").as_posix()
            assert f"({path})" in index, f"docs/README.md does not link to {path}"
