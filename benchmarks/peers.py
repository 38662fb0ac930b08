"""Beside kronfluence, bergson, dattri and captum: the same model, rows and query, each on the parameters that it covers.

A GPT-2 (4 layers, 256 wide, 8,000 words, tied), trained for a few steps on the rows themselves; the query is the mean loss of 50
sentences, or the losses of 32. Each contestant runs alone, in a process of the environment that is named for it, with a bare
no-grad forward pass over the same length-sorted rows before and after; ours counts every parameter. The slow peers (dattri,
captum) score the first --few rows. What is not installed is said.

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformers kronfluence==1.0.1 captum==0.9.0 dattri==0.3.0 bergson==2.5.1
    peers/bin/pip uninstall --yes torchvision torchaudio      # of another torch
    python benchmarks/peers.py --python peers/bin/python --queries 1 32 --json
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import common

PACKAGES = {"kronfluence": "kronfluence", "bergson": "bergson", "dattri": "dattri", "captum": "captum"}
ONE_QUERY = ("dattri", "captum")


def train(model: torch.nn.Module, rows: list[list[int]], steps: int) -> None:
    """Take AdamW steps on batches of 32 rows, so that gradients are those of a model that has learnt something."""
    from benchmarks.peer_runs import losses, padded

    draw, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        batch = padded(draw.sample(rows, 32))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = losses(logits, batch["labels"]).sum() / (batch["labels"][:, 1:] != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the job: model, rows and query; return the settings."""
    texts = common.texts(arguments.corpus, arguments.sentences + 50)
    words = common.tokenizer(texts)
    rows = words(texts, truncation=True, max_length=common.LENGTH)["input_ids"]
    model = common.stage("gpt2", texts[:64], words).model
    train(model, rows[:-50], arguments.steps)
    model.save_pretrained(folder / "model")
    return {
        "corpus": rows[:-50], "query": rows[-50:], "fit": min(arguments.fit, arguments.sentences),
        "few": min(arguments.few, arguments.sentences), "batch": 32, "threads": arguments.threads,
    }  # fmt: skip


def versions(python: str) -> dict[str, str | None]:
    """Return the versions of torch and the peers in the environment of this interpreter, None for what it lacks."""
    code = (
        "import json,sys\nfrom importlib.metadata import version,PackageNotFoundError\nfound={}\nfor n in sys.argv[1:]:\n"
        " try: found[n]=version(n)\n except PackageNotFoundError: found[n]=None\nprint(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code, "torch", *PACKAGES], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def contend(name: str, python: str, folder: Path, limit: int, quiet: bool) -> list[dict[str, Any]]:
    """Run one contestant in a process of its own and return its records."""
    script = Path(__file__).with_name("peer_runs.py")
    done = subprocess.run(
        [python, str(script), name, str(folder), str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
        timeout=limit + 120,
    )
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return records or [{"error": f"ended with status {done.returncode} and no record"}]


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--python", action="append", default=[], help="interpreter with peers (repeat for several)")
    options.add_argument("--peers", nargs="*", default=list(PACKAGES), choices=list(PACKAGES), help="which (all)")
    options.add_argument("--queries", nargs="+", type=int, default=[1], choices=[1, 32], help="numbers of queries")
    options.add_argument("--fit", type=int, default=1000, help="rows that curvature is taken from (1000)")
    options.add_argument("--few", type=int, default=256, help="rows for dattri and captum (256)")
    options.add_argument("--steps", type=int, default=200, help="training steps of the model (200)")
    options.add_argument("--limit", type=int, default=600, help="seconds for a contestant (600)")
    options.add_argument("--verbose", action="store_true", help="show what the contestants print")
    arguments = options.parse_args()
    common.settle(arguments)
    results: list[dict[str, Any]] = []
    lines = ["contestant   queries  sentences/s  ratio  fit s  peak MiB  disk MiB  covers"]
    found = {python: versions(python) for python in arguments.python}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = prepare(folder, arguments)
        for queries in arguments.queries:
            (folder / "rows.json").write_text(json.dumps({**job, "queries": queries}))
            for name in ["nlpinf", *arguments.peers]:
                python = sys.executable if name == "nlpinf" else next((p for p in found if found[p][name]), None)
                if queries > 1 and name in ONE_QUERY:
                    continue
                if python is None:
                    records = [{"error": "is not installed in any --python"}]
                else:
                    records = contend(name, python, folder, arguments.limit, not arguments.verbose)
                release = None if python is None or name == "nlpinf" else found[python][name]
                for record in records:
                    results.append({"contestant": name, "version": release, "queries": queries, **record})
                    lines.append(line(results[-1]))
                    print(lines[-1], file=sys.stderr)
    record = {
        "benchmark": "peers", "sentences": arguments.sentences, "steps": arguments.steps,
        "corpus": arguments.corpus.name if arguments.corpus else "generated", "results": results,
        "environments": list(found.values()), "machine": common.machine(arguments.threads),
    }  # fmt: skip
    common.show(record, arguments.json, lines)


def line(record: dict[str, Any]) -> str:
    """Return a row of the table."""
    name = f"{record['contestant']:12} {record['queries']:7}"
    if "seconds" not in record:
        return f"{name}  {record.get('error') or record['note']}"
    disk = "–" if record["disk_mib"] is None else f"{record['disk_mib']:.1f}"
    return (
        f"{name}  {record['sentences_per_second']:11.1f}  {record['ratio']:5.2f}  {record['fit_seconds']:5.0f}  "
        f"{record['peak_mib']:8}  {disk:>8}  {record['covers']}"
    )


if __name__ == "__main__":
    main()
