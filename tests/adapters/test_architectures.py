"""Sixteen architectures of transformers, tiny and random: their objective, query vectors and scores against finite differences.

The truth is the model's own loss (`labels=`) on sentences alone, unpadded, in float64 throughout, and differences of it
and of its gradient: no product, solver or recursion of nlpinf. A solve is checked by what defines its solution, the
residual of (C + λI) s = b with C s by differences.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from nlpinf import CG, Chain, Proximity, Query, Stage, query_vectors
from nlpinf import parameters as P
from nlpinf.adapters.heads import HeadSettings, TextClassifier
from nlpinf.curvature import Curvature
from nlpinf.errors import NotConverged
from nlpinf.influence import QueryVectors
from nlpinf.scoring.forward import forward_scores
from nlpinf.scoring.reverse import ReverseScorer
from nlpinf.stages import evaluation
from nlpinf.tasks import CausalLM, MaskedLM, SequenceClassification
from tests.cases import inherit, randomised, tokenizer

TEXTS = ["the cat sat on mat", "a good film"]
LABELLED = [{"text": "good film", "label": 1}, {"text": "the bad dog sat", "label": 0}]
ASKED = {"text": "a bad film", "label": 1}
ALPHA, DECAY = 0.3, 0.01

_BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 4}
# Of each: the size, and what is its own: shared layers, relative and rotary positions, windows, grouped heads, experts.
MASKED: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 6},
    "albert": {**_BERT, "num_hidden_layers": 2, "embedding_size": 3},
    "electra": {**_BERT, "embedding_size": 3},
    "deberta-v2": {
        **_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
    "modernbert": {**_BERT, "num_hidden_layers": 2, "local_attention": 4, "global_attn_every_n_layers": 2},
    "xlm-roberta": _BERT,
    "mpnet": _BERT,
}  # fmt: skip
CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 6},
    "gpt_neox": _BERT,
    "opt": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 6, "word_embed_proj_dim": 3},
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gemma": _LLAMA,
    "mixtral": {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2},
}  # fmt: skip
CASES = [(name, how) for name in [*MASKED, *CAUSAL] for how in ("eager", "sdpa")]


class Doubles(TorchFunctionMode):
    """Computes in float64 what a model computes in float32 whatever its dtype; `used` tells whether it does."""

    used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            self.used |= args[0].is_floating_point()
            return args[0].double()
        if torch.float32 in [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]:
            self.used = True
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def reference(model: nn.Module) -> nn.Module:
    """A copy without dropout, and without the fused products of experts, which are of lower precision only."""
    twin: Any = copy.deepcopy(model).eval()
    for module in twin.modules():
        if hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation("eager")
    return twin


class Truth:
    """A stage's objective by the model's own losses, one sentence at a time, and its derivatives by differences."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.mode = Doubles()

    @cached_property
    def model(self) -> nn.Module:
        return reference(self.stage.model)

    def loss(self, i: int | None, theta: P.Parameters, example: Any = None) -> Tensor:
        """g of example i, or of `example`."""
        example = self.stage.data[i] if i is not None else example
        text = example["text"] if isinstance(example, dict) else example
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        task = self.stage.task
        if isinstance(task, MaskedLM):  # which words are masked is part of the objective
            batch = task.collate(task.encode([text]), [i])
            labels = torch.full_like(ids, -100)
            labels[0, batch.position] = batch.targets
            inputs |= {"input_ids": batch.inputs["input_ids"], "labels": labels}
        elif isinstance(task, CausalLM):
            inputs["labels"] = ids
        with self.mode:
            if not isinstance(self.model, TextClassifier):
                labels = inputs.get("labels", torch.tensor([example["label"]]) if isinstance(example, dict) else None)
                return functional_call(self.model, theta, (), {**inputs, "labels": labels}, tie_weights=True).loss
            logits = functional_call(self.model, theta, (), inputs, tie_weights=True)
            return nn.functional.cross_entropy(logits, torch.tensor([example["label"]]))

    def losses(self, theta: P.Parameters) -> Tensor:
        with torch.no_grad():
            return torch.stack([self.loss(i, theta) for i in range(self.stage.size)])

    def gradient(self, theta: P.Parameters, loss: Callable[[P.Parameters], Tensor] | None = None) -> P.Parameters:
        """The gradient over all parameters, of the mean loss if no other is given."""
        leaves = {n: t.detach().clone().requires_grad_(True) for n, t in theta.items()}
        every = loss or (lambda at: torch.stack([self.loss(i, at) for i in range(self.stage.size)]).mean())
        return dict(zip(leaves, torch.autograd.grad(every(leaves), list(leaves.values()), materialize_grads=True)))

    def along(self, v: P.Parameters) -> P.Parameters:
        """The Hessian of the mean loss times v, over all parameters."""
        return self._along(v, self.gradient)

    def slopes(self, v: P.Parameters) -> Tensor:
        """⟨v, g'(z)⟩ of every example."""
        return self._along(v, lambda theta: {"": self.losses(theta)})[""]

    def _along(self, v: P.Parameters, f: Callable[[P.Parameters], P.Parameters]) -> P.Parameters:
        theta, length = self.stage.parameters, P.norm(v)  # a unit step, whatever the length of v
        moved = difference(lambda h: f({**theta, **P.axpy(h / length, v, P.select(theta, v))}))
        return P.scaled(length, moved)


def difference(f: Callable[[float], P.Parameters], h: float = 2e-4) -> P.Parameters:
    """The derivative of f at 0, to the fourth order in h."""
    near, far = P.axpy(-1.0, f(-h), f(h)), P.axpy(-1.0, f(-2 * h), f(2 * h))
    return P.scaled(1 / (12 * h), P.axpy(-1.0, far, P.scaled(8.0, near)))


def apart(found: P.Parameters, expected: P.Parameters) -> float:
    assert found.keys() == expected.keys()
    return P.norm(P.axpy(-1.0, expected, found)) / P.norm(expected)


def pretraining(name: str, attention: str) -> Stage:
    sizes = MASKED.get(name) or CAUSAL[name]
    auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    lm = MaskedLM(tokenizer(), 9, probability=0.4, seed=3) if name in MASKED else CausalLM(tokenizer(), 9)
    try:
        model = auto.from_config(config(name, sizes), attn_implementation=attention).double()
    except ValueError as error:
        assert attention == "sdpa" and "scaled_dot_product_attention" in str(error), error
        pytest.skip(f"this transformers has no SDPA for {name}")
    return Stage(randomised(model, 1), lm, TEXTS, DECAY, name="pretrain")


def config(name: str, sizes: dict[str, Any]) -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    return AutoConfig.for_model(name, vocab_size=len(tokenizer()), max_position_embeddings=16, **special, **sizes)


def finetuning(parent: Stage, name: str, attention: str, transfer: str) -> Stage:
    """Another task's head: the architecture's own where the encoder stays, ours where it moves."""
    if transfer == "frozen":
        settings = config(name, MASKED.get(name) or CAUSAL[name])
        auto = AutoModelForSequenceClassification.from_config(settings, attn_implementation=attention)
        model = randomised(auto.double(), 2)
    else:
        model = randomised(TextClassifier.on(parent.model, HeadSettings("mean")), 2)
    theirs = dict(parent.model.named_parameters())
    shared = {n: n for n, _ in model.named_parameters() if n in theirs}
    assert len(shared) > 5
    moved = transfer != "frozen"
    inherit(model, parent.model, shared, lambda n: moved, 3)
    trained = [n for n, _ in model.named_parameters() if moved or n not in shared]
    return Stage(model, SequenceClassification(tokenizer(), 9), LABELLED, DECAY, trained=trained, name="finetune")


def pulled_back(chain: Chain, solver: CG) -> tuple[float, QueryVectors]:
    """The query vector under the first damping that makes all Hessians positive definite, as the solver tells."""
    for lam in (4.0, 16.0, 64.0, 256.0, 1024.0):
        with contextlib.suppress(NotConverged):
            return lam, query_vectors(chain, [Query.loss(ASKED)], curvature="hessian", damping=lam, solver=solver)
    raise AssertionError("no damping makes the Hessians positive definite")


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_query_vectors_and_scores(name: str, attention: str) -> None:
    transfer = "frozen" if attention == "eager" else "proximity"
    parent = pretraining(name, attention)
    stage = finetuning(parent, name, attention, transfer)
    first, last = Truth(parent), Truth(stage)
    # The objective is the model's own.
    expected = first.losses(parent.parameters)
    rounding = 1e-5 if first.mode.used else 1e-7  # some models compute norms and angles in float32 whatever their dtype
    with evaluation(parent.model):
        found = torch.cat([parent.example_losses(batch)[batch.rows.argsort()] for batch in parent.batches()]).detach()
    assert torch.allclose(found, expected, rtol=rounding, atol=0)

    # The solves, each by its residual.
    chain = Chain([parent, stage], "frozen" if transfer == "frozen" else Proximity(ALPHA))
    lam, vectors = pulled_back(chain, CG(1e-6 if first.mode.used else 1e-8))
    solutions, v = vectors.verdicts[0], vectors.vectors[0]
    y, theta = solutions["finetune"].vector, stage.parameters
    q = last.gradient(theta, lambda at: last.loss(None, at, ASKED))
    curved = last.along(y)
    pull = {n: lam + DECAY + (2 * ALPHA if n in parent.parameters else 0.0) for n in y}
    left = {n: curved[n] + pull[n] * y[n] for n in y}
    assert apart(left, P.select(q, y)) < rounding
    kept = [n for n in parent.parameters if n in theta and n not in y]
    w = {n: 2 * ALPHA * y[n] for n in y if n in parent.parameters}
    w |= {n: q[n] - curved[n] for n in kept}
    s = P.scaled(-1.0, v)
    curved = first.along(s)
    left = {n: curved[n] + (lam + DECAY) * s[n] for n in s}
    assert apart(left, P.embedded(w, s)) < rounding

    # The scores, forward and reverse mode, padded together and by differences of the losses alone.
    slopes = first.slopes(v)
    for scores in (forward_scores, lambda st, vs, batch: ReverseScorer(st, vs)(batch)):
        (batch,) = parent.batches()
        found = scores(parent, [v], batch).scores[:, 0][batch.rows.argsort()]
        assert torch.linalg.norm(found - slopes) < rounding * torch.linalg.norm(slopes)


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_gauss_newton_products(name: str) -> None:
    """uᵀ (JᵀBJ v) with J u and J v by differences of the logits and B written out."""
    parent = pretraining(name, "eager")
    u, v = (P.random_like(parent.theta, seed) for seed in (1, 2))
    mode, model = Doubles(), reference(parent.model)
    (batch,) = parent.batches()

    def logits(theta: P.Parameters) -> P.Parameters:
        with mode, torch.no_grad():
            out = functional_call(model, {**parent.parameters, **theta}, (), batch.inputs, tie_weights=True).logits
            return {"": out.flatten(0, 1)[batch.position]}

    ju, jv = (difference(lambda h, d=d: logits(P.axpy(h, d, parent.theta)))[""] for d in (u, v))
    p = logits(parent.theta)[""].softmax(-1)
    weights = 1 / (parent.size * torch.bincount(batch.example)[batch.example].double())

    def product(a: Tensor, b: Tensor) -> float:
        return float(weights @ ((p * a * b).sum(-1) - (p * a).sum(-1) * (p * b).sum(-1)))

    scale = (product(ju, ju) * product(jv, jv)) ** 0.5
    found = P.dot(u, Curvature(parent, "ggn") @ v)
    assert abs(found - product(ju, jv)) < scale * (1e-5 if mode.used else 1e-8)
