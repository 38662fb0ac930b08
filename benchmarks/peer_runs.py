"""One contestant of `benchmarks/peers.py` on its job folder, in an environment of its own: prints one JSON object a line.

Needs torch, transformers and the contestant's package; nlpinf for "nlpinf" alone. The job folder holds `model/`, a GPT-2 with
its output layer tied to the embeddings, and `rows.json`: the token ids of the corpus, of the query's sentences, and settings.
Every contestant has the same model, rows, query, threads and clock, and beside it the same bare forward pass, before and after.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

warnings.filterwarnings("ignore")
PAD, WIDTH = 0, 64
Rows = list[list[int]]


class Job:
    """The folder's content; `batches` are padded on the right to their longest row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = json.loads((folder / "rows.json").read_text())
        self.corpus: Rows = content["corpus"]
        self.query: Rows = content["query"]
        self.queries: int = content["queries"]
        self.fit: int = content["fit"]
        self.few: int = content["few"]
        self.batch: int = content["batch"]
        torch.set_num_threads(content["threads"])

    def model(self) -> GPT2LMHeadModel:
        """The model, with the attention of transformers' choice."""
        return GPT2LMHeadModel.from_pretrained(self.folder / "model").eval()

    def batches(self, rows: Rows, sort: bool = True) -> list[dict[str, torch.Tensor]]:
        """The rows in batches."""
        rows = sorted(rows, key=len, reverse=True) if sort else rows
        return [padded(rows[i : i + self.batch]) for i in range(0, len(rows), self.batch)]


def padded(rows: Sequence[Sequence[int]], width: int | None = None) -> dict[str, torch.Tensor]:
    """Return ids, mask and labels of rows, padded on the right."""
    width = width or max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the token losses of every row, (B,)."""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
    return flat.view(len(labels), -1).sum(1)


def bare(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """Return the seconds of a no-grad forward pass with its loss as most people write it."""
    began = time.perf_counter()
    with torch.no_grad():
        for b in batches:
            losses(model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, b["labels"])
    return time.perf_counter() - began


def linear(model: Any) -> Any:
    """Return the model with GPT-2's Conv1D as nn.Linear, which the peers know."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            other = torch.nn.Linear(*module.weight.shape)
            other.weight.data, other.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, other)
    return model


def inside(model: Any) -> list[str]:
    """Return the names of the linear maps within the blocks."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def size(folder: Path) -> float:
    """Return the MiB of all files below a folder."""
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20, 2)


def told(
    job: Job, covers: str, fit: float, rows: Rows, run: Callable[[], Any], written: Path | None, **more: Any
) -> None:
    """Time `run`, which scores `rows`, with the bare pass before and after, and print the record."""
    model, batches = job.model(), job.batches(rows)
    bare(model, batches[:1])
    before = bare(model, batches)
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    forward = (before + bare(model, batches)) / 2
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    record = {
        "covers": covers, "queries": job.queries, "sentences": len(rows), "seconds": round(seconds, 2),
        "sentences_per_second": round(len(rows) / seconds, 1), "ratio": round(seconds / forward, 2),
        "forward_sentences_per_second": round(len(rows) / forward, 1), "fit_seconds": round(fit, 1), "fit_rows": job.fit,
        "peak_mib": round(peak / 1024), "disk_mib": None if written is None else size(written), **more,
    }  # fmt: skip
    print(json.dumps(record), flush=True)


def nlpinf(job: Job, folder: Path) -> None:
    """Every parameter; vectors by three steps of conjugate gradient, of many queries on fewer rows; exact and compressed."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from nlpinf import CG, CausalLM, Chain, Query, Relative, Stage, query_vectors

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")
    stage = Stage(job.model(), CausalLM(words, WIDTH), job.corpus, reduction="example")
    each = [Query.loss(row) for row in job.query]
    queries = each if job.queries > 1 else [Query.mean_loss(job.query)]
    began = time.perf_counter()
    vectors = query_vectors(
        Chain([stage]), queries[: job.queries], sample=max(32, job.fit // job.queries), allow_unconverged=True,
        solver=CG(max_iterations=3), damping=Relative(0.1),  # of the mean eigenvalue, as kronfluence takes it
    )  # fmt: skip
    fit = time.perf_counter() - began
    import pyarrow.parquet as pq

    from nlpinf.scoring.feed import feed_of
    from nlpinf.scoring.making import Scoring
    from nlpinf.scoring.tables import table

    feed = feed_of(stage.data)
    (part,) = feed.parts([0], len(job.corpus))
    ways = {
        "exact": Scoring(),
        "exact, compiled": Scoring(compiled=True),
        "exact, compiled, bfloat16": Scoring(compiled=True, precision="bfloat16"),
        "compressed to 0.05": Scoring(compress=0.05),
        "compressed to 0.05, compiled": Scoring(compress=0.05, compiled=True),
    }
    reference: Any = None
    for way, scoring in ways.items():
        began = time.perf_counter()
        scorer = scoring.scorer(vectors, feed)  # what compression and compiling take is told with the fit
        few = range(0, len(job.corpus), max(1, len(job.corpus) // 256))
        scorer([part.examples[i] for i in few], [int(part.rows[i]) for i in few])
        made = time.perf_counter() - began
        out = folder / way
        out.mkdir()
        found: list[Any] = []

        def run(scorer: Any = scorer, out: Path = out, found: list[Any] = found) -> None:
            scored = scorer(part.examples, part.rows.tolist())
            found.append(scored.scores)
            pq.write_table(table(scored, part, False), out / "scores.parquet")

        told(job, f"every parameter, {way}", fit + made, job.corpus, run, out)
        reference = found[0] if reference is None else reference
        print(json.dumps({"note": f"{way}: least rank correlation with exact {correlation(found[0], reference):.5f}"}))


def correlation(one: Any, other: Any) -> float:
    """Return the least Spearman correlation of two sets of scores (rows, queries)."""
    from scipy.stats import spearmanr

    return min(float(spearmanr(a, b).statistic) for a, b in zip(one.T, other.T))


def kronfluence(job: Job, folder: Path) -> None:
    """EK-FAC on the linear maps of the blocks."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    model = linear(job.model())
    names = inside(model)

    class Loss(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"]
            if sample:
                with torch.no_grad():
                    drawn = torch.distributions.Categorical(logits=logits.detach()[:, :-1]).sample()
                    labels = labels.clone()
                    labels[:, 1:] = torch.where(labels[:, 1:] == -100, -100, drawn)
            return losses(logits, labels).sum()

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch["attention_mask"]

    task = Loss()
    analyzer = Analyzer(
        "job", prepare_model(model, task).eval(), task, cpu=True, output_dir=str(folder), disable_tqdm=True
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=padded, num_workers=0))
    began = time.perf_counter()
    analyzer.fit_all_factors(
        "f", job.corpus[: job.fit], per_device_batch_size=job.batch, factor_args=FactorArguments(strategy="ekfac")
    )
    fit = time.perf_counter() - began
    one, count = job.queries == 1, min(len(job.query), 50 if job.queries == 1 else job.queries)
    arguments = ScoreArguments(damping_factor=None, aggregate_query_gradients=one)

    def run() -> None:
        analyzer.compute_pairwise_scores(
            "s", "f", job.query[:count], job.corpus, per_device_query_batch_size=count,
            per_device_train_batch_size=job.batch, score_args=arguments,
        )  # fmt: skip

    told(job, "linear maps in the blocks", fit, job.corpus, run, folder, note="with the query's gradients")


def bergson(job: Job, folder: Path) -> None:
    """EK-FAC on the linear maps of the blocks; position embeddings lengthened, for its batches have 2,048 tokens."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    from bergson.build import build_query
    from bergson.config.config import (
        DataConfig,
        HessianConfig,
        IndexConfig,
        InversionConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
    )
    from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
    from bergson.hessians.hessian_approximations import approximate_hessians
    from bergson.score.score import score_dataset
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = job.model()
    long = torch.zeros(2048, model.config.n_embd)
    long[:WIDTH] = model.transformer.wpe.weight.data
    model.transformer.wpe, model.config.n_positions = torch.nn.Embedding.from_pretrained(long, freeze=False), 2048
    model.save_pretrained(folder / "model")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>", eos_token="<eos>")
    words.save_pretrained(folder / "model")

    def data(name: str, rows: Rows) -> str:
        Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]}).save_to_disk(str(folder / name))
        return str(folder / name)

    def index(name: str, rows: str) -> IndexConfig:
        return IndexConfig(
            run_path=str(folder / name), overwrite=True, model=str(folder / "model"), data=DataConfig(dataset=rows),
            token_batch_size=2048, precision="fp32",
        )  # fmt: skip

    asked = data("asked", job.query[: 50 if job.queries == 1 else job.queries])
    few, corpus = data("few", job.corpus[: job.fit]), data("corpus", job.corpus)
    began = time.perf_counter()
    query = QuerySetConfig(dataset=asked, aggregation="mean" if job.queries == 1 else "none")
    build_query(index("query", asked), query, PreprocessConfig())
    approximate_hessians(index("hessian/kfac", few), HessianConfig(method="kfac", ev_correction=True))
    settings = EkfacConfig(
        hessian_method_path=str(folder / "hessian/kfac"), gradient_path=str(folder / "query"),
        run_path=str(folder / "applied"), ev_correction=True,
    )  # fmt: skip
    apply_worker(0, 0, 1, settings, InversionConfig())
    fit = time.perf_counter() - began

    def run() -> None:
        score_dataset(index("scores", corpus), ScoreConfig(query_path=str(folder / "applied")), PreprocessConfig())

    told(job, "linear maps in the blocks, no biases", fit, job.corpus, run, folder)


def _four(ids: torch.Tensor) -> torch.Tensor:
    """Return a causal mask to add, made from the padding: one that vmap takes."""
    keep = (ids != PAD)[:, None, :] & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    return torch.where(keep, 0.0, torch.finfo(torch.float32).min)[:, None]


def dattri(job: Job, folder: Path) -> None:
    """TracIn with one checkpoint: the inner product of the gradients, no curvature; one query."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    model, rows = linear(job.model()), job.corpus[: job.few]

    def loss(parameters: Any, data: Any) -> torch.Tensor:
        ids = data[0].long().reshape(-1, data[0].shape[-1])
        labels = ids.masked_fill(ids == PAD, -100)
        given = {"input_ids": ids, "attention_mask": _four(ids)}
        return losses(torch.func.functional_call(model, parameters, (), given).logits, labels).sum()

    task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()], target_func=loss)
    attributor = TracInAttributor(task, torch.ones(1), False)
    train = DataLoader(TensorDataset(padded(rows, WIDTH)["input_ids"]), job.batch)
    asked = DataLoader(TensorDataset(padded(job.query, WIDTH)["input_ids"][None]), 1)
    told(job, "every parameter, no curvature", 0.0, rows, lambda: attributor.attribute(train, asked), None)


def captum(job: Job, folder: Path) -> None:
    """TracInCP with one checkpoint: linear layers only, no curvature; one sentence asked."""
    from captum.influence import TracInCP
    from torch.utils.data import TensorDataset

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear(job.model())

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids=ids, attention_mask=_four(ids)).logits

    class Loss(torch.nn.Module):
        reduction = "sum"

        def forward(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return losses(logits, ids.masked_fill(ids == PAD, -100)).sum()

    rows, model = job.corpus[: job.few], Logits().eval()
    ids, asked = padded(rows, WIDTH)["input_ids"], padded(job.query[:1], WIDTH)["input_ids"]
    method = TracInCP(
        model, TensorDataset(ids, ids), ["one"], checkpoints_load_func=lambda model, path: 1.0, loss_fn=Loss(),
        batch_size=job.batch, sample_wise_grads_per_batch=True,
    )  # fmt: skip
    told(job, "linear layers, no curvature", 0.0, rows, lambda: method.influence((asked, asked)), None)


RUNS = {"nlpinf": nlpinf, "kronfluence": kronfluence, "bergson": bergson, "dattri": dattri, "captum": captum}


@contextmanager
def within(seconds: int) -> Any:
    """Raise TimeoutError after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main(name: str, folder: str, limit: str) -> None:
    """Run one contestant; what goes wrong is told as its record."""
    scratch = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print as they like
    try:
        import builtins

        plain = builtins.print
        globals()["print"] = lambda *args, **options: plain(*args, **{"file": out, **options})
        with within(int(limit)):
            RUNS[name](Job(Path(folder)), scratch)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        print(json.dumps({"error": f"{type(error).__name__}: {lines[0][:200]}"}), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
