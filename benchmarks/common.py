"""What the benchmarks share: the job's models and text, interleaved timing, and the record that they print."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nlpinf import heap, processes
from nlpinf.data.corpus import Corpus
from nlpinf.stages import Stage
from nlpinf.tasks import CausalLM, MaskedLM

WORDS, LENGTH = 8000, 64
SIZES = {"small": (4, 256), "base": (12, 768)}  # layers, width


def wall() -> float:
    """Return the time on the clock, once a GPU has done what it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS = {"wall": wall, "cpu": time.process_time}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    result = argparse.ArgumentParser(description=doc)
    result.add_argument("--corpus", type=Path, help="text file, a sentence a line (default: generated sentences)")
    result.add_argument("--sentences", type=int, default=4000, help="sentences of the corpus (default 4000)")
    result.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default 2)")
    result.add_argument("--device", default="cpu", help="where models run: cpu or cuda (default cpu)")
    result.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: time of the process, which other work on the machine disturbs less",
    )
    result.add_argument(
        "--heap",
        choices=["kept", "default"],
        default="kept",
        help="kept: freed memory stays with the process, as in the nlpinf commands; for all ways alike",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return result


def settle(arguments: argparse.Namespace) -> None:
    """Set the threads, the heap and the device that the options ask for."""
    os.environ["NLPINF_DEVICE"] = arguments.device
    torch.set_num_threads(arguments.threads)
    if arguments.heap == "kept":
        heap.keep()


def texts(file: Path | None, count: int) -> list[str]:
    """Return the first `count` sentences of the file, or ones of made-up words with natural lengths and frequencies."""
    if file is not None:
        return Corpus.read(file)[:count]
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20000)]
    shares = [1 / (rank + 2.7) for rank in range(len(words))]
    # About the lengths of news sentences: median 24 tokens, one in fifty cut at 64.
    lengths = [max(3, min(90, round(draw.lognormvariate(3.15, 0.5)))) for _ in range(count)]
    return [" ".join(draw.choices(words, shares, k=n)) for n in lengths]


def tokenizer(sentences: Sequence[str], size: int = WORDS) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `size` tokens trained on the sentences."""
    special = ["<pad>", "<bos>", "<eos>", "<mask>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        sentences,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing("<bos> $A <eos>", None, [("<bos>", 1), ("<eos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", mask_token="<mask>",
        cls_token="<bos>", sep_token="<eos>",
    )  # fmt: skip


def stage(
    kind: str, sentences: Sequence[str], words: PreTrainedTokenizerFast, size: str = "small", **changes: Any
) -> Stage:
    """Return the pretraining stage of a GPT-2 ("gpt2") or BERT ("bert") with random weights, 4 layers 256 wide or of `size`."""
    torch.manual_seed(0)
    layers, width = SIZES[size]
    if kind == "gpt2":
        shape = {"n_positions": LENGTH, "n_embd": width, "n_layer": layers, "n_head": width // 64}
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model: torch.nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, use_cache=False, **shape, **ends))
        task: Any = CausalLM(words, LENGTH)
    else:
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
        shape["intermediate_size"] = 4 * width
        model = BertForMaskedLM(BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, pad_token_id=0, **shape))
        task = MaskedLM(words, LENGTH)
    return Stage(model.to(processes.device()), task, Corpus(sentences), **changes)


def interleaved(
    ways: dict[str, Callable[[Any], Any]], batches: Sequence[Any], clock: str = "wall"
) -> dict[str, list[float]]:
    """Return the seconds of every way on every batch, all ways in turn on each batch; a first round is not kept.

    Ratios are then of the same moments, so that other load on the machine falls on all ways alike.
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number, batch in enumerate([batches[0], *batches]):
        for name, run in ways.items():
            started = now()
            run(batch)
            if number:
                seconds[name].append(now() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], way: str, base: str) -> dict[str, float]:
    """Return the ratio of total times, and the median and quartiles of the batches' ratios."""
    each = [a / b for a, b in zip(seconds[way], seconds[base])]
    low, median, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each * 3)
    total = sum(seconds[way]) / sum(seconds[base])
    return {"total": round(total, 3), "median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def machine(threads: int) -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if processes.device().type == "cuda" else "cpu",
        "threads": threads,
        "system": platform.system(),
        "versions": {package: version(package) for package in ("nlpinf", "torch", "transformers")},
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def show(record: dict[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    """Print the record as one JSON object, or the lines."""
    print(json.dumps(record) if as_json else "\n".join(lines))
