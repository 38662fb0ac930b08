"""Write the table of recipes/README.md and the demo's lines of README.md from the measured results in recipes/results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent


def ranged(figure: dict[str, Any], digits: int) -> str:
    """Return a figure with its interval."""
    low, high = figure["interval"]
    return f"{figure['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def change(figure: dict[str, Any]) -> str:
    """Return a change with its interval."""
    low, high = figure["interval"]
    return f"{figure['value']:+.4f} ({low:+.4f} to {high:+.4f})"


def kind(result: dict[str, Any]) -> str:
    """Return the kind of machine."""
    machine = result["machine"]
    return ", ".join([f"{machine['cores']} cores, {machine['processor']}", *machine["gpus"]])


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return one line a recipe, or a line for each of its cases."""
    columns = ("recipe", "test loss", "accuracy", "most harmful removed: predicted, actual", "random", "measured")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for name, content in results.items():
        cases = {"": content} if "recipe" in content else content
        for case, result in cases.items():
            harmful = [r for r in result["removal"] if r["removed"] == "most harmful"]
            random = [r["actual"]["value"] for r in result["removal"] if r["removed"].startswith("random")]
            removal = f"{harmful[0]['predicted']:+.4f}, {change(harmful[0]['actual'])}" if harmful else "–"
            drawn = ", ".join(f"{value:+.4f}" for value in random) or "–"
            words = result["test"].get("bag_of_words_accuracy")
            beside = "" if words is None else f"; bag of words {words:.3f}"
            took = "" if result["seconds"] is None else f"{result['seconds']:.0f} s on "
            lines.append(
                f"| [{' '.join([name, case]).strip()}](results/{name}.json) | {ranged(result['test']['loss'], 3)} | "
                f"{ranged(result['test']['accuracy'], 3)}{beside} | {removal} | {drawn} | `{result['command']}`, {result['date']}, "
                f"seed {result['seed']}, {took}{kind(result)} |"
            )
    return "\n".join(lines)


def demo(result: dict[str, Any]) -> str:
    """Return what the demo measured."""
    rows = result["removal"]
    order = sorted(rows, key=lambda r: r["predicted"])
    control = fmean(r["actual"]["value"] for r in rows if r["removed"].startswith("random"))
    lines = [
        "| 5 % of the corpus removed | predicted change of the test loss | actual change, both stages retrained | beyond random |",
        "| --- | --- | --- | --- |",
        *(
            f"| {r['removed']} | {r['predicted']:+.4f} | {change(r['actual'])} | {r['actual']['value'] - control:+.4f} |"
            for r in order
        ),
        "",
        f"`{result['command']}`, {result['date']}, seed {result['seed']}, {result['seconds']:.0f} s on {kind(result)}: test loss "
        f"{ranged(result['test']['loss'], 3)}, accuracy {ranged(result['test']['accuracy'], 3)} on {result['test']['rows']} reviews "
        f"(a bag of words: {result['test']['bag_of_words_accuracy']:.3f}; the encoder is sized for minutes); 95 % intervals over the "
        "test rows. What removing rows at random does is what training again does of itself; *beyond random* is the change less its "
        "average.",
    ]
    return "\n".join(lines)


def replaced(text: str, mark: str, content: str) -> str:
    """Return `text` with what lies between the marks replaced."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def pages() -> dict[Path, str]:
    """Return each page with its tables made anew."""
    paths = sorted((HERE / "results").glob("*.json"))
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    listed, front = HERE / "README.md", HERE.parent / "README.md"
    made = {listed: replaced(listed.read_text(encoding="utf-8"), "results", table(results))}
    if "demo" in results:
        made[front] = replaced(front.read_text(encoding="utf-8"), "demo", demo(results["demo"]))
    return made


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
