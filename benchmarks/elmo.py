"""Speed of the ELMo network: its LSTMs beside torch.nn.LSTM, forward mode, reverse mode, words computed once.

Every figure is a ratio of times taken in turn in one run (median over rounds of the ratio within a round):

    lstm     two layers, two directions, weights of the same shapes as two torch.nn.LSTM(proj_size=...), which neither
             clip nor add a skip connection
             (and forward mode in bfloat16 beside the float32 forward pass)
    allennlp the encoder beside AllenNLP's `_ElmoBiLm` of the same weights and words, where AllenNLP is installed
    text     a whole language model on sentences of text: character CNN once a distinct word against once a token, gate
             inputs likewise, and one directional derivative of all losses (a score) against the bare forward pass
    original one batch of the released sizes with 793,471 words (2 GB of weights, twice with their tangents)

The times are CPU time of the process with --clock cpu, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from nlpinf import heap
from nlpinf.adapters import elmo
from nlpinf.adapters.elmo.network import ProjectedLSTM

Work = Callable[[], Any]


def in_turn(works: dict[str, Work], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each piece of work, all of them once a round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for k in range(rounds + 1):
        for name, work in works.items():
            start = clock()
            work()
            if k:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    return round(statistics.median(a / b for a, b in zip(seconds[above], seconds[below])), 3)


def tangent(module: nn.Module, direction: dict[str, Tensor], arguments: tuple[Any, ...]) -> Tensor:
    """The directional derivative of a module's output, by dual parameters."""
    with torch.no_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p.detach(), direction[name]) for name, p in module.named_parameters()}
        return forward_ad.unpack_dual(functional_call(module, duals, arguments)).tangent


class Layers(nn.Module):
    """Our LSTM layers alone on packed vectors, with clipping and the skip connection."""

    def __init__(self, units: int, projection: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ProjectedLSTM(projection, units, projection, 3.0, 3.0) for _ in range(2))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, ProjectedLSTM)
            y, _ = layer(layer.gates(x), sizes, None, False)
            x = x + y if k else y
        return x


def bench_lstm(units: int, projection: int, batch: int, steps: int, rounds: int, clock: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    peers = [nn.LSTM(projection, units, num_layers=2, proj_size=projection) for _ in range(2)]
    ours = Layers(units, projection)
    x = torch.randn(steps, batch, projection)
    packed = torch.stack([x, x.flip(0)]).reshape(2, steps * batch, projection)
    sizes = [batch] * steps
    direction = {name: 0.01 * torch.randn_like(p) for name, p in ours.named_parameters()}

    def bare() -> None:
        with torch.no_grad():
            ours(packed, sizes)

    def anchor() -> None:
        with torch.no_grad():
            peers[0](x)
            peers[1](x.flip(0))

    def reverse(module: nn.Module, weights: bool, run: Callable[[Tensor], Tensor], data: Tensor) -> None:
        module.requires_grad_(weights).zero_grad(set_to_none=True)
        run(data.clone().requires_grad_()).square().sum().backward()

    def anchor_reverse() -> None:
        for peer in peers:
            reverse(peer, True, lambda y, peer=peer: peer(y)[0], x)  # type: ignore[misc]

    half = Layers(units, projection).bfloat16()
    half.load_state_dict(ours.state_dict())
    narrow = {name: v.bfloat16() for name, v in direction.items()}

    works: dict[str, Work] = {
        "nn.LSTM": anchor,
        "forward": bare,
        "jvp bfloat16": lambda: tangent(half, narrow, (packed.bfloat16(), sizes)),
        "jvp": lambda: tangent(ours, direction, (packed, sizes)),
        "reverse activations": lambda: reverse(ours, False, lambda y: ours(y, sizes), packed),
        "reverse weights": lambda: reverse(ours, True, lambda y: ours(y, sizes), packed),
        "nn.LSTM reverse weights": anchor_reverse,
    }
    seconds = in_turn(works, rounds, clock)
    return {
        "shape": {"units": units, "projection": projection, "batch": batch, "steps": steps},
        "forward / nn.LSTM forward": ratio(seconds, "forward", "nn.LSTM"),
        "jvp / forward": ratio(seconds, "jvp", "forward"),
        "jvp in bfloat16 / forward in float32": ratio(seconds, "jvp bfloat16", "forward"),
        "reverse to activations / forward": ratio(seconds, "reverse activations", "forward"),
        "reverse to weights / forward": ratio(seconds, "reverse weights", "forward"),
        "reverse to weights / nn.LSTM reverse": ratio(seconds, "reverse weights", "nn.LSTM reverse weights"),
        "forward seconds": round(statistics.median(seconds["forward"]), 4),
    }


def sentences_of(path: Path | None, count: int) -> list[list[str]]:
    """The first sentences of a gzipped text file, or made-up ones with Zipf-like words."""
    if path is None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(5, 45, (count,), generator=generator).tolist()
        ranks = (torch.rand(sum(lengths), generator=generator) * 9.2).exp().long().tolist()
        words = iter(f"w{rank * 7919 % 99991:x}" for rank in ranks)
        return [[next(words) for _ in range(length)] for length in lengths]
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.split() for line, _ in zip(file, range(count))]


def bench_text(config: elmo.ElmoConfig, text: list[list[str]], size: int, rounds: int, clock: Any) -> dict[str, Any]:
    """A whole model on one length-sorted batch from the middle of the text."""
    torch.manual_seed(0)
    vocabulary = elmo.Vocabulary.build(text, size=8000)
    model = elmo.ElmoLM(config, len(vocabulary)).eval()
    text = sorted(text, key=len)
    chosen = text[(len(text) - size) // 2 :][:size]
    batch = elmo.character_batch(chosen)
    words = vocabulary.batch(chosen)
    by_token = batch.distinct[batch.index.flatten()]
    each = torch.arange(batch.index.numel()).view_as(batch.index)
    once = (batch.distinct, batch.index, batch.lengths, words)
    direction = {name: 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}

    def forward(*arguments: Tensor) -> Tensor:
        with torch.no_grad():
            return model(*arguments)

    works: dict[str, Work] = {
        "forward": lambda: forward(*once),
        "forward by token": lambda: forward(by_token, each, batch.lengths, words),
        "jvp": lambda: tangent(model, direction, once),
        "reverse": lambda: torch.autograd.grad(model(*once).mean(), list(model.parameters())),
    }
    seconds = in_turn(works, rounds, clock)
    return {
        "sizes": {"lstm": config.lstm_dim, "projection": config.projection_dim, "vocabulary": len(vocabulary)},
        "batch": {"sentences": size, "tokens": int(batch.lengths.sum()), "distinct words": len(batch.distinct)},
        "forward by token / forward": ratio(seconds, "forward by token", "forward"),
        "jvp / forward": ratio(seconds, "jvp", "forward"),
        "reverse / forward": ratio(seconds, "reverse", "forward"),
        "forward tokens a second": round(int(batch.lengths.sum()) / statistics.median(seconds["forward"])),
    }


def bench_allennlp(
    config: elmo.ElmoConfig, text: list[list[str]], size: int, rounds: int, clock: Any
) -> dict[str, Any]:
    """Encoders of the same weights on one length-sorted batch; AllenNLP convolves the characters of every token."""
    from allennlp.modules.elmo import _ElmoBiLm, batch_to_ids

    torch.manual_seed(0)
    encoder = elmo.ElmoEncoder(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        options, weights = elmo.write_encoder(encoder, folder)
        peer = _ElmoBiLm(str(options), str(weights)).eval()
    text = sorted(text, key=len)
    chosen = text[(len(text) - size) // 2 :][:size]
    ids = batch_to_ids(chosen)
    batch = elmo.character_batch(chosen)

    def ours() -> Any:
        with torch.no_grad():
            return encoder(batch.distinct, batch.index, batch.lengths)

    def theirs() -> Any:
        peer._elmo_lstm.reset_states()
        with torch.no_grad():
            return peer(ids)["activations"]

    count = len(chosen[0])
    gap = max(float((a[0, :count] - b[0, 1 : count + 1]).abs().max()) for a, b in zip(ours(), theirs()))
    seconds = in_turn({"forward": ours, "AllenNLP": theirs}, rounds, clock)
    return {
        "sizes": {"lstm": config.lstm_dim, "projection": config.projection_dim},
        "batch": {"sentences": size, "tokens": int(batch.lengths.sum()), "distinct words": len(batch.distinct)},
        "largest difference, first sentence": gap,
        "AllenNLP / forward": ratio(seconds, "AllenNLP", "forward"),
    }


class Sampled(nn.Module):
    """A language model whose losses use fixed negatives."""

    def __init__(self, model: elmo.ElmoLM, negatives: elmo.Negatives) -> None:
        super().__init__()
        self.model, self.negatives = model, negatives

    def forward(self, *batch: Tensor) -> Tensor:
        *inputs, words = batch
        items = self.model.items(*inputs)
        head, targets = self.model.head, words[items.sentences, items.positions]
        losses = elmo.sampled_softmax_losses(items.hidden, targets, head.weight, head.bias, self.negatives)
        return losses.new_zeros(len(words)).index_add(0, items.sentences, losses) / (2 * (inputs[2] - 1))


def bench_original(text: list[list[str]], size: int, rounds: int, clock: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    vocabulary_size = 793_471
    with torch.device("meta"):
        model = elmo.ElmoLM(elmo.ElmoConfig.preset("original"), vocabulary_size)
    model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    wrapped = Sampled(model, elmo.draw_negatives(vocabulary_size, 0))
    chosen = sorted(text, key=len)[len(text) // 2 :][:size]
    batch = elmo.character_batch(chosen)
    words = torch.randint(0, 10_000, batch.index.shape, generator=torch.Generator().manual_seed(0))
    arguments = (batch.distinct, batch.index, batch.lengths, words)
    direction = {name: torch.full_like(p, 1e-3) for name, p in wrapped.named_parameters()}

    def forward() -> Tensor:
        with torch.no_grad():
            return wrapped(*arguments)

    seconds = in_turn({"forward": forward, "jvp": lambda: tangent(wrapped, direction, arguments)}, rounds, clock)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": {"sentences": size, "tokens": int(batch.lengths.sum()), "distinct words": len(batch.distinct)},
        "jvp / forward": ratio(seconds, "jvp", "forward"),
        "forward seconds": round(statistics.median(seconds["forward"]), 3),
    }


def processor() -> str:
    """The processor's model name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=["lstm", "text"], choices=["lstm", "text", "allennlp", "original"]
    )
    parser.add_argument("--units", type=int, default=2048)
    parser.add_argument("--projection", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--preset", default="medium", choices=["small", "medium", "original"])
    parser.add_argument("--text", type=Path, help="a .txt.gz file, one tokenised sentence a line; made up if absent")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument(
        "--heap",
        choices=["kept", "default"],
        default="kept",
        help="kept: freed memory stays with the process, as in the nlpinf commands; for all works alike",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.heap == "kept":
        heap.keep()
    warnings.filterwarnings("ignore", message="LSTM with projections")
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    report: dict[str, Any] = {
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": args.threads,
        "clock": args.clock,
        "heap": args.heap,
        "rounds": args.rounds,
    }
    for part in args.parts:
        if part == "lstm":
            report[part] = bench_lstm(args.units, args.projection, args.batch, args.steps, args.rounds, clock)
        elif part == "text":
            text = sentences_of(args.text, 2000)
            report[part] = bench_text(elmo.ElmoConfig.preset(args.preset), text, args.batch, args.rounds, clock)
        elif part == "allennlp":
            config = elmo.ElmoConfig.preset(args.preset)
            report[part] = bench_allennlp(config, sentences_of(args.text, 2000), args.batch, args.rounds, clock)
        else:
            report[part] = bench_original(sentences_of(args.text, 2000), args.batch, args.rounds, clock)
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        if isinstance(value, dict) and name in ("lstm", "text", "allennlp", "original"):
            print(name)
            for key, figure in value.items():
                print(f"  {key}: {figure}")
        else:
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
