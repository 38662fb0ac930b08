"""The ELMo network: invariances, derivatives of first and second order in both modes, sizes, and its losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nlpinf.adapters import elmo
from nlpinf.adapters.elmo import packed
from nlpinf.adapters.elmo.network import ProjectedLSTM
from nlpinf.errors import NlpinfError

SENTENCES = [
    ["a", "bad", "film"],
    ["good"],
    ["the", "film", "was", "not", "a", "bad", "film", ",", "but", "an", "extraordinarily-uninteresting", "one"],
    ["it", "was", "good", ",", "good", "and", "naïve", "…"],
    ["films", "was"],
]
VOCABULARY = elmo.Vocabulary.build(SENTENCES, size=12)
# Clips this low, with weights this large, act on a fair share of the states.
TINY = elmo.ElmoConfig(
    character_dim=3,
    filters=((1, 3), (2, 4), (3, 3)),
    highways=2,
    lstm_dim=7,
    projection_dim=4,
    cell_clip=0.5,
    projection_clip=0.3,
)


def language_model(config: elmo.ElmoConfig = TINY, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Any:
    torch.manual_seed(0)
    model = elmo.ElmoLM(config, len(VOCABULARY)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(scale * parameter + 0.1 * torch.randn_like(parameter) * ("convolutions" in name))
    return model


def batch(sentences: list[list[str]] = SENTENCES) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = elmo.character_batch(sentences)
    return b.distinct, b.index, b.lengths, VOCABULARY.batch(sentences)


def losses_of(
    model: torch.nn.Module, arguments: tuple[Tensor, ...], parameters: dict[str, Tensor] | None = None
) -> Tensor:
    """½ (mean forward + mean backward) cross-entropy of each sentence, from the logits of the batch."""
    *inputs, words = arguments
    logits, start, losses = functional_call(model, parameters or {}, tuple(inputs)), 0, []
    for row, length in enumerate(inputs[2].tolist()):
        ahead, back = logits[start : start + 2 * (length - 1)].chunk(2)
        start += 2 * (length - 1)
        targets = words[row, 1:length], words[row, : length - 1]
        losses.append(0.5 * sum(F.cross_entropy(o, t) for o, t in zip((ahead, back), targets)))
    return torch.stack(losses)


def loss_of(model: torch.nn.Module, arguments: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
    return losses_of(model, arguments, parameters).mean()


def parameters_and_direction(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return parameters, {name: torch.randn_like(p) for name, p in parameters.items()}


def test_clipping_is_in_force() -> None:
    model = language_model()
    layers = model.encoder(*batch()[:3])
    assert (layers[1].abs() == 0.3).double().mean() > 0.02
    assert (layers[1].abs() < 0.3).double().mean() > 0.2


def test_forward_mode_against_differences() -> None:
    model, arguments = language_model(), batch()
    parameters, direction = parameters_and_direction(model)
    _, tangent = torch.func.jvp(lambda p: losses_of(model, arguments, p), (parameters,), (direction,))
    step = 1e-6

    def at(t: float) -> Tensor:
        return losses_of(model, arguments, {k: p + t * direction[k] for k, p in parameters.items()})

    torch.testing.assert_close(tangent, (at(step) - at(-step)) / (2 * step), rtol=1e-6, atol=1e-7)
    gradient = torch.func.grad(lambda p: loss_of(model, arguments, p))(parameters)
    reverse = sum((gradient[k] * direction[k]).sum() for k in gradient)
    torch.testing.assert_close(tangent.mean(), reverse, rtol=1e-12, atol=1e-12)


def test_dual_tensors_as_parameters() -> None:
    from torch.autograd import forward_ad

    model, arguments = language_model(), batch()
    parameters, direction = parameters_and_direction(model)
    with torch.no_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, direction[name]) for name, p in parameters.items()}
        tangent = forward_ad.unpack_dual(losses_of(model, arguments, duals)).tangent
    _, expected = torch.func.jvp(lambda p: losses_of(model, arguments, p), (parameters,), (direction,))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives(dtype: torch.dtype) -> None:
    """Hessian-vector products by reverse over reverse, forward over reverse and differences of gradients."""
    model, arguments = language_model(dtype=dtype), batch()
    parameters, direction = parameters_and_direction(model)

    def gradient(p: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda q: loss_of(model, arguments, q))(p)

    forward_over_reverse = torch.func.jvp(gradient, (parameters,), (direction,))[1]
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    first = torch.autograd.grad(loss_of(model, arguments, leaves), list(leaves.values()), create_graph=True)
    product = sum((g * direction[name]).sum() for g, name in zip(first, leaves))
    second = dict(zip(leaves, torch.autograd.grad(product, list(leaves.values()))))
    scale = max(value.abs().max().item() for value in second.values())
    step = 1e-5
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for name in parameters:
        torch.testing.assert_close(second[name], forward_over_reverse[name], rtol=0, atol=tolerance * scale)
    if dtype == torch.float64:
        ahead = gradient({k: p + step * direction[k] for k, p in parameters.items()})
        behind = gradient({k: p - step * direction[k] for k, p in parameters.items()})
        for name in parameters:
            difference = (ahead[name] - behind[name]) / (2 * step)
            torch.testing.assert_close(second[name], difference, rtol=0, atol=1e-5 * scale)


def test_against_one_sentence_loop() -> None:
    """The batched, packed layer against the formulas of its docstring, one sentence and step at a time."""
    model, (distinct, index, lengths, _) = language_model(), batch()
    encoder = model.encoder
    got = encoder(distinct, index, lengths)
    words = encoder.characters(distinct)
    for row, length in enumerate(lengths.tolist()):
        for direction in range(2):
            x = list(words[index[row, :length]])
            x = x if direction == 0 else x[::-1]
            for k, layer in enumerate(encoder.layers):
                assert isinstance(layer, ProjectedLSTM)
                h, c, out = words.new_zeros(4), words.new_zeros(7), []
                for value in x:
                    gates = layer.weight_ih[direction] @ value + layer.weight_hh[direction] @ h + layer.bias[direction]
                    i, j, f, o = gates.chunk(4)
                    c = (torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(j)).clamp(-0.5, 0.5)
                    h = (layer.weight_hr[direction] @ (torch.sigmoid(o) * torch.tanh(c))).clamp(-0.3, 0.3)
                    out.append(h + value if k else h)
                x = out
                expected = torch.stack(x if direction == 0 else x[::-1])[1:-1]
                half = got[k + 1][row, : length - 2, 4 * direction : 4 * direction + 4]
                torch.testing.assert_close(half, expected, rtol=0, atol=1e-12)


def test_padding_and_order_change_nothing() -> None:
    config = elmo.ElmoConfig.preset("small", lstm_dim=64, projection_dim=32)
    model = language_model(config, torch.float32, scale=1.0)
    distinct, index, lengths, words = batch()
    losses = losses_of(model, (distinct, index, lengths, words))
    layers = model.encoder(distinct, index, lengths)
    alone = torch.cat([losses_of(model, batch([sentence])) for sentence in SENTENCES])
    torch.testing.assert_close(losses, alone, rtol=0, atol=1e-6)
    for row, sentence in enumerate(SENTENCES):
        for got, single in zip(layers, model.encoder(*batch([sentence])[:3])):
            torch.testing.assert_close(got[row, : len(sentence)], single[0], rtol=0, atol=1e-6)
            assert not got[row, len(sentence) :].any()
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(losses_of(model, batch([SENTENCES[k] for k in order])), losses[order], rtol=0, atol=1e-6)
    wide = torch.full((5, 9), len(distinct) - 1)
    padded = (distinct, torch.cat([index, wide], 1), lengths, torch.cat([words, wide * 0 + 5], 1))
    torch.testing.assert_close(losses_of(model, padded), losses, rtol=0, atol=1e-6)
    # More distinct words than tokens: the gate inputs are then taken by token.
    rows = distinct.repeat(9, 1)
    torch.testing.assert_close(
        losses_of(model, (rows, index + 2 * len(distinct), lengths, words)), losses, rtol=0, atol=1e-6
    )


def test_dropout_acts_in_training_only() -> None:
    plain = language_model(dtype=torch.float32)
    dropped = language_model(elmo.ElmoConfig(**{**vars(TINY), "dropout": 0.5}), dtype=torch.float32)
    torch.testing.assert_close(losses_of(dropped, batch()), losses_of(plain, batch()))
    dropped.train()
    assert (losses_of(dropped, batch()) - losses_of(plain, batch())).abs().max() > 1e-3


def test_carried_states() -> None:
    """Two sentences with carried states are as one run over both, for the forward direction."""
    encoder = language_model().encoder
    first, second = SENTENCES[2], SENTENCES[0]
    with torch.no_grad():
        a, states = encoder(*batch([first, SENTENCES[1]])[:3], carry=True)
        b, _ = encoder(*batch([second, SENTENCES[4]])[:3], states=states, carry=True)
        joined = [*first, "</S>", "<S>", *second]
        whole = encoder(*batch([joined])[:3])
        fresh = encoder(*batch([first])[:3])
        half = slice(0, 4)
        torch.testing.assert_close(whole[-1][0, -len(second) :, half], b[-1][0, : len(second), half])
        torch.testing.assert_close(fresh[-1][0], a[-1][0, : len(first)])
    assert states[0][0].shape == (2, 2, 4) and states[0][1].shape == (2, 2, 7)
    with pytest.raises(NlpinfError, match="carry=True"):
        encoder(*batch([second, SENTENCES[4]])[:3], states=states)


def test_items_and_loss() -> None:
    model, (distinct, index, lengths, words) = language_model(), batch()
    items = model.items(distinct, index, lengths)
    assert items.hidden.shape == (2 * int((lengths - 1).sum()), 4)
    layers, _ = model.encoder(distinct, index, lengths, carry=True)
    start = 0
    for row, length in enumerate(lengths.tolist()):
        one = slice(start, start + 2 * (length - 1))
        start = one.stop
        assert (items.sentences[one] == row).all()
        assert items.directions[one].tolist() == [0] * (length - 1) + [1] * (length - 1)
        assert items.positions[one].tolist() == [*range(1, length), *range(length - 1)]
        # The forward state before word p is the layer's vector of word p - 1.
        torch.testing.assert_close(items.hidden[one][1 : length - 1], layers[-1][row, : length - 2, :4])
        torch.testing.assert_close(items.hidden[one][length - 1 : -1], layers[-1][row, : length - 2, 4:])
    targets = words[items.sentences, items.positions]
    losses = elmo.full_softmax_losses(items.hidden, targets, model.head.weight, model.head.bias)
    for row in range(len(lengths)):
        halves = [losses[(items.sentences == row) & (items.directions == d)].mean() for d in range(2)]
        torch.testing.assert_close(
            losses_of(model, (distinct, index, lengths, words))[row], 0.5 * (halves[0] + halves[1])
        )


def test_sampled_softmax() -> None:
    torch.manual_seed(0)
    size, count = 500, 60
    negatives = elmo.draw_negatives(size, (7, 3), count)
    assert len(negatives.ids) == count == len(set(negatives.ids.tolist()))
    assert torch.equal(negatives.ids, elmo.draw_negatives(size, (7, 3), count).ids)
    assert not torch.equal(negatives.ids, elmo.draw_negatives(size, (7, 4), count).ids)
    # The expected counts sum to about the number drawn, and are the frequencies over many seeds.
    every = torch.arange(size)
    assert negatives.log_expected(every, torch.float64).exp().sum().item() == pytest.approx(count, rel=0.15)
    draws = [elmo.draw_negatives(size, seed, count) for seed in range(400)]
    frequency = torch.stack([torch.isin(every, draw.ids) for draw in draws]).double().mean(0)
    expected = torch.stack([draw.log_expected(every, torch.float64).exp() for draw in draws]).mean(0)
    assert ((frequency - expected).abs() / (expected * (1 - expected) / 400).sqrt().clamp(min=1e-6)).mean() < 1.0
    hidden, targets = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, size, (9,))
    targets[0] = negatives.ids[0]
    weight, bias = torch.randn(size, 6, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    losses = elmo.sampled_softmax_losses(hidden, targets, weight, bias, negatives)
    for k in range(9):
        chosen = [int(targets[k]), *(int(word) for word in negatives.ids if word != targets[k])]
        p = [math.log((word + 2) / (word + 1)) / math.log(size + 1) for word in chosen]
        correction = torch.tensor([math.log(1 - (1 - q) ** negatives.tries) for q in p], dtype=torch.float64)
        logits = weight[chosen] @ hidden[k] + bias[chosen] - correction
        torch.testing.assert_close(losses[k], -torch.log_softmax(logits, 0)[0])
    # Derivatives of both kinds stay finite where a negative is left out.
    f = lambda w: elmo.sampled_softmax_losses(hidden, targets, w, bias, negatives).sum()  # noqa: E731
    v = torch.randn_like(weight)
    product = torch.func.jvp(torch.func.grad(f), (weight,), (v,))[1]
    leaf = weight.clone().requires_grad_()
    gradient = torch.autograd.grad(f(leaf), leaf, create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad((gradient * v).sum(), leaf)[0], product)
    assert product.isfinite().all()
    with pytest.raises(NlpinfError, match="use the full softmax"):
        elmo.draw_negatives(100, 0, 100)
    with pytest.raises(NlpinfError, match="the head has 499"):
        elmo.sampled_softmax_losses(hidden, targets % 499, weight[:499], bias[:499], negatives)


def test_sizes_of_the_released_model() -> None:
    with torch.device("meta"):
        model = elmo.ElmoLM(elmo.ElmoConfig.preset("original"), 793_471)
    assert sum(p.numel() for p in model.encoder.parameters()) == 93_600_848
    assert sum(p.numel() for p in model.head.parameters()) == 407_050_623


def test_configurations() -> None:
    for name in ("small", "medium", "original"):
        config = elmo.ElmoConfig.preset(name)
        assert elmo.ElmoConfig.from_options(config.to_options()) == config
    with pytest.raises(NlpinfError, match="no preset 'large'"):
        elmo.ElmoConfig.preset("large")
    with pytest.raises(NlpinfError, match="an LSTM can only project down"):
        elmo.ElmoConfig(lstm_dim=4, projection_dim=8)
    with pytest.raises(NlpinfError, match="dropout"):
        elmo.ElmoConfig(dropout=1.0)
    with pytest.raises(NlpinfError, match="40 a word, expected 50"):
        language_model().encoder.characters(torch.ones(2, 40, dtype=torch.int64))


def test_long_sentences_and_words() -> None:
    """A sentence of 2,000 words beside one of 1 word, and a word of 40,000 characters beside it."""
    model = language_model(dtype=torch.float32)
    long = ["film"] * 2000
    losses = losses_of(model, batch([["good"], long, ["x" * 40_000]]))
    assert losses.isfinite().all()
    torch.testing.assert_close(losses[0], losses_of(model, batch([["good"]]))[0], rtol=0, atol=1e-6)


PLAIN = elmo.ElmoConfig(character_dim=3, filters=((1, 4),), lstm_dim=4, projection_dim=4)


class Unpacked:
    """What packed weights compute, in any precision."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self._weight.T

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return x @ self._weight.T + other


@pytest.mark.parametrize("loop", ["in place", "packed"])
@pytest.mark.parametrize("config", [TINY, PLAIN])
@pytest.mark.parametrize("part", ["", "weight_hh", "weight_hr", "weight_ih", "bias", "embedding", "head"])
def test_steps_without_gradients(
    part: str, config: elmo.ElmoConfig, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place and by hand: the values and tangents of the differentiable loop, whichever parameters move."""
    from torch.autograd import forward_ad

    if loop == "packed":
        monkeypatch.setattr(packed, "applies", lambda x, dtype: True)
        monkeypatch.setattr(packed, "_Packed", Unpacked)
    model, arguments = language_model(config), batch()
    parameters, direction = parameters_and_direction(model)
    direction = {name: v if part in name else torch.zeros_like(v) for name, v in direction.items()}
    expected, tangent = torch.func.jvp(lambda p: losses_of(model, arguments, p), (parameters,), (direction,))
    with torch.no_grad(), forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, direction[n]) if part in n else p for n, p in parameters.items()}
        got = forward_ad.unpack_dual(losses_of(model, arguments, duals))
    torch.testing.assert_close(got.primal, expected, rtol=1e-13, atol=1e-13)
    if got.tangent is None:  # nothing of that name: a model without projections
        assert not tangent.any()
    else:
        torch.testing.assert_close(got.tangent, tangent, rtol=1e-11, atol=1e-12)


class Layer(ProjectedLSTM):
    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:  # type: ignore[override]
        return super().forward(self.gates(x), sizes, None, False)[0]


@pytest.mark.parametrize("autocast", [True, False])
def test_steps_in_bfloat16(autocast: bool) -> None:
    """Packed weights, of sizes that fill no tile: values and tangents of float64, as far as bfloat16 carries."""
    from torch.autograd import forward_ad

    if not packed.applies(torch.zeros(1), torch.bfloat16):
        pytest.skip("this processor has no products of bfloat16, or this PyTorch cannot pack weights for them")
    torch.manual_seed(0)
    layer, sizes = Layer(20, 36, 12, None, None), [9, 9, 6, 2, 1]
    x = torch.randn(2, sum(sizes), 20)
    direction = {name: torch.randn_like(p) for name, p in layer.named_parameters()}

    def at(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        layer.to(dtype)
        with (
            torch.no_grad(),
            forward_ad.dual_level(),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype.itemsize == 4),
        ):
            duals = {n: forward_ad.make_dual(p.detach(), direction[n].to(dtype)) for n, p in layer.named_parameters()}
            out = forward_ad.unpack_dual(functional_call(layer, duals, (x.to(dtype), sizes)))
        return out.primal.double(), out.tangent.double()

    exact, low = at(torch.float64), at(torch.float32 if autocast else torch.bfloat16)
    for truth, got in zip(exact, low):
        assert 1e-4 < (got - truth).norm() / truth.norm() < 2e-2
