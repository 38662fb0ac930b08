"""The table of cases: small chains of every architecture, and each stage's losses written a second time, for oracles.

A `Case` is a chain of stages with random weights: the formulas of the score are algebra at any point, so nothing needs
training. `outputs(k, theta, i)` is the independent route to the outputs of stage k on its example i: one example at
a time, without padding, without the counted-positions shortcut, with eager attention, LSTM cells written out, and tied
weights put under all of their names by hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from nlpinf.adapters.elmo import ElmoConfig, ElmoLM, Vocabulary
from nlpinf.adapters.heads import HeadSettings, TextClassifier
from nlpinf.scoring.forward import forward_scores
from nlpinf.stages import Chain, Proximity, Stage
from nlpinf.tasks import (
    BidirectionalLM,
    CausalLM,
    Classification,
    MaskedLM,
    Regression,
    SequenceClassification,
    Task,
    WordClassification,
)

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "good", "bad", "film"]
TEXTS = ["the cat sat on the mat", "a dog ran", "a good film", "the bad dog sat"]
MORE_TEXTS = ["bad film", "the good cat ran on"]
LABELLED = [
    {"text": "good film", "label": 1},
    {"text": "the bad bad film", "label": 0},
    {"text": "bad dog", "label": 0},
]
ASKED = [{"text": "the good film", "label": 0}, {"text": "a bad dog ran on mat", "label": 1}]


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of 16 words that puts [CLS] and [SEP] around a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", bos_token="[CLS]", eos_token="[SEP]",
    )  # fmt: skip


def bert_config(**changes: Any) -> BertConfig:
    """Return a BERT of one layer, 4 wide; dropout is on, for evaluation mode is the stage's to see to."""
    return BertConfig(
        **{
            "vocab_size": len(tokenizer()), "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 5, "max_position_embeddings": 9, "type_vocab_size": 1, "pad_token_id": 0, "num_labels": 2,
            **changes,
        }
    )  # fmt: skip


def gpt2_config(**changes: Any) -> GPT2Config:
    """Return a GPT-2 of one layer, 4 wide."""
    return GPT2Config(
        **{
            "vocab_size": len(tokenizer()), "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 5, "n_positions": 9,
            "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "num_labels": 2, **changes,
        }
    )  # fmt: skip


def randomised(model: nn.Module, seed: int, scale: float = 0.5) -> nn.Module:
    """Give every parameter random entries (LayerNorm gains about 1), so that no derivative is zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        gain = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = (1 + 0.2 * draw if gain else scale * draw).to(parameter)
    return model.train()


def inherit(
    model: nn.Module, parent: nn.Module, names: dict[str, str], moved: Callable[[str], bool], seed: int
) -> None:
    """Copy the parent's parameters into `model`; those that `moved` selects are taken a random step away."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = dict(model.named_parameters()), dict(parent.named_parameters())
    for mine, other in names.items():
        step = 0.1 * torch.randn(ours[mine].shape, generator=generator, dtype=torch.float64).to(ours[mine])
        ours[mine].data = theirs[other].detach() + (step if moved(mine) else 0.0)


class Mlp(nn.Module):
    """Two tanh layers and a head of the given name, so that heads of other tasks have other names."""

    def __init__(self, head: str, classes: int, inputs: int = 3, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        self.add_module(head, nn.Linear(width, classes))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.head)(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Tagger(nn.Module):
    """Embedding, LSTM and a linear layer: one label a step."""

    def __init__(self, classes: int, words: int = 7, width: int = 4) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(words, 3), nn.LSTM(3, width, batch_first=True)
        self.dropout, self.tag = nn.Dropout(0.3), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tag(self.dropout(self.lstm(self.words(ids))[0]))


Outputs = Callable[[Stage, nn.Module, dict[str, Tensor], int], tuple[Tensor, Tensor]]


def _plain_outputs(stage: Stage, model: nn.Module, theta: dict[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
    x, y = stage.data[i]
    out = functional_call(model, theta, (x[None].double() if x.is_floating_point() else x[None],), tie_weights=False)
    return out, y[None].double() if y.is_floating_point() else y[None]


def _tagger_outputs(stage: Stage, model: nn.Module, theta: dict[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
    ids, tags = stage.data[i]
    h = c = theta["lstm.bias_hh_l0"].new_zeros(theta["lstm.weight_hh_l0"].shape[1])
    steps = []
    for word in ids.tolist():
        gates = theta["lstm.weight_ih_l0"] @ theta["words.weight"][word] + theta["lstm.bias_ih_l0"]
        gates = gates + theta["lstm.weight_hh_l0"] @ h + theta["lstm.bias_hh_l0"]
        enter, forget, new, leave = gates.chunk(4)
        c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
        h = torch.sigmoid(leave) * torch.tanh(c)
        steps.append(theta["tag.weight"] @ h + theta["tag.bias"])
    kept = [t for t in range(len(tags)) if tags[t] != -100]
    return torch.stack([steps[t] for t in kept]), tags[kept]


def _text_outputs(stage: Stage, model: nn.Module, theta: dict[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
    task = stage.task
    example = stage.data[i]
    ids = torch.tensor([tokenizer()(example["text"] if isinstance(example, dict) else example)["input_ids"]])
    target_of: list[tuple[int, int, int]] = []  # sequence, place, word
    if isinstance(task, MaskedLM):  # the masks are part of the objective's definition; tests/tasks has their tests
        batch = task.collate(task.encode([example]), [i])
        corrupted = batch.inputs["input_ids"]
        for place, word in zip(batch.position.tolist(), batch.targets.tolist()):
            target_of.append((place // ids.shape[1], place % ids.shape[1], word))
        ids = corrupted
    logits = functional_call(
        model, theta, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tie_weights=False
    ).logits
    if isinstance(task, MaskedLM):
        return torch.stack([logits[s, t] for s, t, _ in target_of]), torch.tensor([w for _, _, w in target_of])
    if isinstance(task, CausalLM):
        return logits[0, :-1], ids[0, 1:]
    return logits, torch.tensor([example["label"]])


ELMO = ElmoConfig(
    character_dim=1, filters=((1, 2), (2, 2)), highways=1, max_characters=8, lstm_dim=3, projection_dim=2,
    cell_clip=0.3, projection_clip=0.15, dropout=0.3,
)  # fmt: skip
VOCABULARY = Vocabulary(["<S>", "</S>", "<UNK>", "the", "a", "dog", "film", "sat"])


def _elmo_layers(theta: dict[str, Tensor], words: list[str]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The token layer and the two LSTM layers of `<S>`, the words and `</S>`: (forward, backward) vectors of each."""

    def codes(word: str) -> list[int]:
        body = {"<S>": [257], "</S>": [258]}.get(word) or [byte + 1 for byte in word.encode()]
        return ([259, *body, 260] + [261] * 8)[:8]

    def linear(name: str, x: Tensor) -> Tensor:
        return theta[f"encoder.characters.{name}.weight"] @ x + theta[f"encoder.characters.{name}.bias"]

    tokens = []
    for word in ["<S>", *words, "</S>"]:
        letters = theta["encoder.characters.embedding.weight"][[code - 1 for code in codes(word)]]
        parts = []
        for k, (width, _) in enumerate(ELMO.filters):
            kernel = theta[f"encoder.characters.convolutions.{k}.weight"]
            windows = torch.einsum("ncw,tcw->tn", kernel, letters.unfold(0, width, 1))
            parts.append(windows.amax(0) + theta[f"encoder.characters.convolutions.{k}.bias"])
        x = torch.relu(torch.cat(parts))
        gate = torch.sigmoid(linear("carry.0", x))
        x = gate * torch.relu(linear("transform.0", x)) + (1 - gate) * x
        tokens.append(linear("projection", x))
    layers = [(tokens, tokens)]
    for k in range(2):
        both = []
        for way, below in enumerate(layers[-1]):
            p = {n: theta[f"encoder.layers.{k}.{n}"][way] for n in ("weight_ih", "weight_hh", "bias", "weight_hr")}
            h, c, out = below[0].new_zeros(2), below[0].new_zeros(3), []
            for x in below if way == 0 else below[::-1]:
                enter, new, forget, leave = (p["weight_ih"] @ x + p["weight_hh"] @ h + p["bias"]).chunk(4)
                c = (torch.sigmoid(forget + 1) * c + torch.sigmoid(enter) * torch.tanh(new)).clamp(-0.3, 0.3)
                h = (p["weight_hr"] @ (torch.sigmoid(leave) * torch.tanh(c))).clamp(-0.15, 0.15)
                out.append(h + x if k else h)
            both.append(out if way == 0 else out[::-1])
        layers.append((both[0], both[1]))
    return layers


def _elmo_outputs(stage: Stage, model: nn.Module, theta: dict[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
    task, example = stage.task, stage.data[i]
    words = (example["text"] if isinstance(example, dict) else example).split()
    layers = _elmo_layers(theta, words)
    if isinstance(task, BidirectionalLM):
        ahead, back = layers[-1]
        ids = [VOCABULARY.ids.get(word, 2) for word in ["<S>", *words, "</S>"]]
        hidden, own = [*ahead[:-1], *back[1:]], [*ids[1:], *ids[:-1]]
        logits = [theta["head.weight"] @ h + theta["head.bias"] for h in hidden]
        if not task.negatives:
            return torch.stack(logits), torch.tensor(own)

        def expected(word: int) -> float:
            p = math.log((word + 2) / (word + 1)) / math.log(len(VOCABULARY) + 1)
            return math.log(1 - (1 - p) ** task.fixed.tries)

        rows = []
        for o, word in zip(logits, own):
            others = [
                o[other] - expected(other) if other != word else o.new_tensor(-math.inf)
                for other in task.fixed.ids.tolist()
            ]
            rows.append(torch.stack([o[word] - expected(word), *others]))
        return torch.stack(rows), torch.zeros(len(rows), dtype=torch.long)
    states = [torch.stack([torch.cat([f, b]) for f, b in zip(*layer)][1:-1]) for layer in layers]
    return _head_outputs(model.head.settings, theta, states), torch.tensor([example["label"]])


def _head_outputs(settings: HeadSettings, theta: dict[str, Tensor], layers: list[Tensor]) -> Tensor:
    """Logits (1, labels) of a head on the layers (T, width) of one text."""
    x = layers[-1]
    if settings.layers == "mix":
        weights = torch.exp(theta["head.mix"]) / torch.exp(theta["head.mix"]).sum()
        x = theta["head.scale"] * sum(w * layer for w, layer in zip(weights, layers))
    if settings.lstm:
        both = []
        for way in range(2):
            p = {n: theta[f"head.lstm.{n}"][way] for n in ("weight_ih", "weight_hh", "bias")}
            h = c = x.new_zeros(settings.lstm)
            out = []
            for value in x if way == 0 else x.flip(0):
                enter, new, forget, leave = (p["weight_ih"] @ value + p["weight_hh"] @ h + p["bias"]).chunk(4)
                c = torch.sigmoid(forget + 1) * c + torch.sigmoid(enter) * torch.tanh(new)
                h = torch.sigmoid(leave) * torch.tanh(c)
                out.append(h)
            both.append(torch.stack(out if way == 0 else out[::-1]))
        x = torch.cat(both, 1)
    if settings.pooling == "attention":
        weights = torch.softmax(x @ theta["head.attention.weight"][0] + theta["head.attention.bias"], 0)
        x = weights @ x
    else:
        x = {"mean": x.mean(0), "max": x.amax(0), "first": x[0]}[settings.pooling]
    if settings.hidden:
        x = torch.tanh(theta["head.hidden.weight"] @ x + theta["head.hidden.bias"])
    return (theta["head.classifier.weight"] @ x + theta["head.classifier.bias"])[None]


@dataclass(frozen=True)
class Case:
    """A chain, the independent route to its outputs, and examples to ask about."""

    name: str
    chain: Chain
    route: Outputs
    asked: Sequence[Any]

    def outputs(self, k: int, theta: dict[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
        """Return outputs and targets of the counted items of example i of stage k at `theta` (float64)."""
        return self.asked_outputs(self.chain.stages[k], theta, i)

    def asked_outputs(self, stage: Stage, theta: dict[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
        groups: dict[int, str] = {}
        full = {}
        for name, parameter in stage.model.named_parameters(remove_duplicate=False):
            full[name] = theta[groups.setdefault(id(parameter), name)]
        return self.route(stage, reference(stage.model), full, i)


_REFERENCES: dict[int, tuple[nn.Module, nn.Module]] = {}


def reference(model: nn.Module) -> nn.Module:
    """Return a float64 twin of the model in evaluation mode, with eager attention where it has any."""
    if id(model) not in _REFERENCES:
        if hasattr(model, "_from_config"):
            twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").double()
            twin.load_state_dict(model.state_dict())
        else:
            twin = copy.deepcopy(model)
        _REFERENCES[id(model)] = (model, twin.double().eval())
    return _REFERENCES[id(model)][1]


PATHS = ("frozen", "proximity", "three stages", "frozen then proximity")


@dataclass(frozen=True)
class Family:
    """How to build the stages of one architecture: models, tasks and data of the pretraining, the next and the last stage."""

    models: tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], nn.Module]]
    tasks: tuple[Task, Task, Task]
    data: tuple[Sequence[Any], Sequence[Any], Sequence[Any]]
    reductions: tuple[str, str, str]
    frozen_part: str  # prefix of what a mixture keeps
    route: Outputs
    asked: Sequence[Any]
    batch_size: int = 3  # fewer than there are examples, so that a pass has several batches
    renamed: tuple[
        str, ...
    ] = ()  # parameters of the last stage that are not received though their names are the parent's


def build(family: Family, path: str, dtype: torch.dtype, name: str) -> Case:
    """Return the family's chain along a path.

    frozen                 pretrain → finetune, what is received stays
    proximity              pretrain → finetune, all that is received moves
    three stages           pretrain → continue (a part kept, the rest moved) → finetune (a part kept, the rest moved)
    frozen then proximity  pretrain → finetune, frozen → finetune again, all moved
    """
    kinds = {
        "frozen": ("last frozen",),
        "proximity": ("last moved",),
        "three stages": ("next mixed", "last mixed"),
        "frozen then proximity": ("last frozen", "last moved"),
    }[path]
    model = randomised(family.models[0]().to(dtype), 1)
    decays: list[Any] = [0.01, {n: 0.03 for n, p in model.named_parameters() if p.dim() > 1}]
    stages = [
        Stage(
            model,
            family.tasks[0],
            family.data[0],
            decays[1],
            family.reductions[0],
            name="pretrain",
            batch_size=family.batch_size,
        )
    ]
    transfers: list[Any] = []
    maps = []
    for step, kind in enumerate(kinds):
        which, how = kind.split()
        index = {"next": 1, "last": 2}[which]
        parent = stages[-1].model
        model = randomised(family.models[index]().to(dtype), 10 + step)
        theirs = {n for n, _ in parent.named_parameters()}
        last_again = step == 1 and kinds[0].startswith("last")
        names = {
            n: n
            for n, _ in model.named_parameters()
            if n in theirs and (which == "next" or last_again or n not in family.renamed)
        }

        def moved(n: str, how: str = how) -> bool:
            return how == "moved" or (how == "mixed" and not n.startswith(family.frozen_part))

        inherit(model, parent, names, moved, 20 + step)
        trained = [n for n, _ in model.named_parameters() if n not in names or moved(n)]
        stages.append(
            Stage(
                model,
                family.tasks[index],
                family.data[index],
                decays[0],
                family.reductions[index],
                trained,
                name=f"{kind} {step}",
                batch_size=family.batch_size,
            )
        )
        transfers.append("frozen" if how == "frozen" else Proximity(0.2 + 0.1 * step))
        maps.append(names if family.renamed else None)
    return Case(name, Chain(stages, transfers, maps), family.route, family.asked)


def _points(seed: int, count: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return [(a, y) for a, y in zip(x, torch.randint(0, classes, (count,), generator=generator))]


def _values(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, 3, generator=generator, dtype=torch.float64)) for _ in range(count)]  # type: ignore[misc]


def _tags(seed: int, count: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    data = []
    for i in range(count):
        length = 3 + i % 4
        tags = torch.randint(0, classes, (length,), generator=generator)
        if i % 2:
            tags[0] = -100
        data.append((torch.randint(1, 7, (length,), generator=generator), tags))
    return data


def _bert(attention: str, masks: int, reduction: str) -> Family:
    def masked() -> nn.Module:
        return BertForMaskedLM._from_config(bert_config(), attn_implementation=attention)

    def classifier() -> nn.Module:
        return BertForSequenceClassification._from_config(bert_config(), attn_implementation=attention)

    lm = MaskedLM(tokenizer(), 9, probability=0.3, masks=masks, seed=3)
    return Family(
        (masked, masked, classifier),
        (lm, MaskedLM(tokenizer(), 9, probability=0.3, seed=4), SequenceClassification(tokenizer(), 9)),
        (TEXTS, MORE_TEXTS, LABELLED),
        (reduction, reduction, "example"),
        "bert.embeddings.",
        _text_outputs,
        ASKED,
        batch_size=3 if attention == "eager" else 8,
    )


def _gpt2(attention: str, reduction: str) -> Family:
    def causal() -> nn.Module:
        return GPT2LMHeadModel._from_config(gpt2_config(), attn_implementation=attention)

    def classifier() -> nn.Module:
        return GPT2ForSequenceClassification._from_config(gpt2_config(), attn_implementation=attention)

    lm = CausalLM(tokenizer(), 9)
    return Family(
        (causal, causal, classifier),
        (lm, lm, SequenceClassification(tokenizer(), 9)),
        (TEXTS, MORE_TEXTS, LABELLED),
        (reduction, reduction, "example"),
        "transformer.wpe",
        _text_outputs,
        ASKED,
        batch_size=8,
    )


def _elmo(negatives: int, head: HeadSettings, reduction: str) -> Family:
    def language_model() -> nn.Module:
        return ElmoLM(ELMO, len(VOCABULARY))

    def classifier() -> nn.Module:
        return TextClassifier.on(language_model(), head)

    lm = BidirectionalLM(VOCABULARY, 9, max_characters=8, negatives=negatives, seed=3)
    return Family(
        (language_model, language_model, classifier),
        (lm, lm, WordClassification(9, max_characters=8)),
        (["the cat sat on", "a dog", "film"], ["bad film", "sat"], LABELLED),
        (reduction, reduction, "example"),
        "encoder.characters.",
        _elmo_outputs,
        ASKED,
        batch_size=3 if negatives else 8,
    )


FAMILIES: dict[str, Family] = {
    "mlp": Family(
        (lambda: Mlp("digits", 3), lambda: Mlp("digits", 3), lambda: Mlp("signs", 2)),
        (Classification(), Classification(), Classification()),
        (_points(1, 7, 3), _points(2, 5, 3), _points(3, 6, 2)),
        ("example", "example", "token"),
        "first.",
        _plain_outputs,
        _points(4, 3, 2),
    ),
    "mlp regression": Family(
        (lambda: Mlp("values", 3), lambda: Mlp("values", 3), lambda: Mlp("signs", 2)),
        (Regression(), Regression(), Classification()),
        (_values(1, 6), _values(2, 5), _points(3, 6, 2)),
        ("example", "example", "example"),
        "second.",
        _plain_outputs,
        _points(4, 3, 2),
    ),
    "bert eager": _bert("eager", 1, "example"),
    "bert sdpa": _bert("sdpa", 2, "token"),
    "gpt2 eager": _gpt2("eager", "token"),
    "gpt2 sdpa": _gpt2("sdpa", "example"),
    "lstm tagger": Family(
        (lambda: Tagger(3), lambda: Tagger(3), lambda: Tagger(4)),
        (Classification(), Classification(), Classification()),
        (_tags(1, 6, 3), _tags(2, 4, 3), _tags(3, 5, 4)),
        ("example", "token", "token"),
        "words.",
        _tagger_outputs,
        _tags(4, 2, 4),
        renamed=("tag.weight", "tag.bias"),
    ),
    "elmo": _elmo(0, HeadSettings("max", hidden=2, layers="mix", lstm=2), "example"),
    "elmo sampled": _elmo(3, HeadSettings("attention"), "token"),
}

NAMES = [(family, path) for family in FAMILIES for path in PATHS[:3]] + [("mlp", PATHS[3])]


@lru_cache
def case(family: str, path: str, dtype: torch.dtype = torch.float64) -> Case:
    """Return the case of the table; built once."""
    return build(FAMILIES[family], path, dtype, f"{family}, {path}")


def scores_of(stage: Stage, vectors: list[dict[str, Tensor]]) -> Tensor:
    """Return the scores (rows, queries) of every example of the stage, in the corpus's order."""
    result = torch.zeros(stage.size, len(vectors), dtype=torch.float64)
    for batch in stage.batches():
        result[batch.rows.cpu()] = forward_scores(stage, vectors, batch).scores.cpu()
    return result
