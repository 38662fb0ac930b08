"""Stage and Chain: the objective, its gradient, evaluation mode, and what descends from what."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import nn
from transformers import activations

from nlpinf import parameters as P
from nlpinf.curvature import Curvature, cross_product
from nlpinf.errors import BadInput
from nlpinf.influence import query_vectors
from nlpinf.queries import Query
from nlpinf.stages import Chain, Proximity, Stage, evaluation, fingerprint, length_batches
from nlpinf.tasks import Classification
from tests import oracle
from tests.cases import FAMILIES, Mlp, Tagger, case, scores_of
from tests.gated import gated_stage

DATA = [(torch.tensor([1.0, -1.0, 0.5]), 0), (torch.tensor([0.3, 2.0, -1.0]), 1)]


def kernels() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled(),
    )  # fmt: skip


def test_evaluation_restores_what_it_found() -> None:
    """Every module's own mode and the attention and recurrent kernels, also when the inside raises."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), Tagger(2)))
    model.train()
    model[1][0].eval()  # a mixed state
    modes, before = [m.training for m in model.modules()], kernels()
    assert len(set(modes)) == 2
    with evaluation(model):
        assert not any(m.training for m in model.modules())
        assert kernels() == (False, False, True, False, False, before[5] and not torch.cuda.is_available(), False)
        with evaluation(model):
            pass
        assert kernels() == (False, False, True, False, False, before[5] and not torch.cuda.is_available(), False)
    assert ([m.training for m in model.modules()], kernels()) == (modes, before)
    with pytest.raises(RuntimeError, match="inside"), evaluation(model):
        raise RuntimeError("inside")
    assert ([m.training for m in model.modules()], kernels()) == (modes, before)


def test_evaluation_takes_experts_one_by_one() -> None:
    """Fused products of experts have no forward mode; the choice is put back, also when the inside raises."""
    model = gated_stage("mixtral").model
    wrapped = nn.Sequential(model)  # a model inside the user's own
    if not hasattr(model.config, "_experts_implementation"):
        pytest.skip("this version of transformers has one way of computing experts")
    before = model.config._experts_implementation
    assert before != "eager"
    with evaluation(wrapped):
        assert model.config._experts_implementation == "eager"
    assert model.config._experts_implementation == before
    with pytest.raises(RuntimeError, match="inside"), evaluation(wrapped):
        raise RuntimeError("inside")
    assert model.config._experts_implementation == before


class Encoder(nn.Module):
    """`nn.TransformerEncoder` under a padding mask, mean over the words, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.words, self.encoder, self.out = nn.Embedding(7, 4), nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        padding = ids == 0
        hidden = self.encoder(self.words(ids), src_key_padding_mask=padding)
        kept = (~padding)[..., None].to(hidden)
        return self.out((hidden * kept).sum(1) / kept.sum(1))


def test_transformer_encoder_keeps_off_its_fast_path() -> None:
    """The fast path, taken without gradients, has no derivatives: scores are compared with backward passes."""
    torch.manual_seed(0)
    data = [
        (torch.tensor(ids), i % 3) for i, ids in enumerate([[1, 2, 3, 4], [5, 6, 0, 0], [2, 0, 0, 0], [4, 4, 1, 0]])
    ]
    stage = Stage(Encoder().double(), Classification(), data)
    v = P.random_like(stage.theta, 1)
    found = scores_of(stage, [v])[:, 0]
    for i, (ids, label) in enumerate(data):
        theta = {n: t.clone().requires_grad_(True) for n, t in stage.theta.items()}
        short = ids[ids != 0][None]  # alone, without padding, with gradients: no fast path
        loss = nn.functional.cross_entropy(
            torch.func.functional_call(stage.model.eval(), theta, (short,)), torch.tensor([label])
        )
        gradient = torch.autograd.grad(loss, list(theta.values()))
        expected = sum(float((g * v[n]).sum()) for n, g in zip(theta, gradient))
        assert float(found[i]) == pytest.approx(expected, rel=1e-9)
        with evaluation(stage.model), torch.no_grad():
            (batch,) = stage.batches([i])
            assert float(stage.example_losses(batch)) == pytest.approx(float(loss), rel=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_the_models(family: str) -> None:
    """Query vectors and scores leave weights, modes, gradients, requires_grad, hooks and kernels as they were."""
    c = case(family, "frozen")

    def state() -> Any:
        return [
            (
                fingerprint(P.of_model(s.model)), [m.training for m in s.model.modules()],
                [(p.grad is None, p.requires_grad) for p in s.model.parameters()],
                sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in s.model.modules()),
                [b.clone().tolist() for b in s.model.buffers()],
            )
            for s in c.chain.stages
        ]  # fmt: skip

    before, flags = state(), kernels()
    made = query_vectors(c.chain, [Query.mean_loss(list(c.asked))], damping=1.0)
    scores_of(c.chain.stages[0], list(made.vectors))
    assert (state(), kernels()) == (before, flags)


@pytest.mark.parametrize("family", FAMILIES)
def test_objective_and_gradient(family: str) -> None:
    """Against losses and weight decay written a second time; twice the same with dropout in the model."""
    stage, d = case(family, "frozen").chain.stages[0], oracle.dense(family, "frozen", 0)
    shift = d.shift(case(family, "frozen").chain.links[0])
    losses = torch.stack([d.loss(d.theta, i) for i in range(stage.size)])
    assert stage.objective() == pytest.approx(float(losses.mean() + (shift * d.theta**2).sum() / 2), rel=1e-12)
    assert stage.objective() == stage.objective()
    expected = d.gradients.mean(0) + shift * d.theta
    assert torch.linalg.norm(d.flat(stage.gradient()) - expected) <= 1e-12 * torch.linalg.norm(expected)
    few = d.gradients[[0, 2]].mean(0)
    assert torch.linalg.norm(d.flat(stage.gradient(indices=[2, 0], decay=False)) - few) <= 1e-12 * torch.linalg.norm(
        few
    )
    for batch in stage.batches():
        with evaluation(stage.model):
            assert torch.allclose(stage.example_losses(batch), losses[batch.rows], rtol=1e-12)


def test_objective_at_other_parameters() -> None:
    stage = case("bert sdpa", "frozen").chain.stages[0]
    name = "bert.embeddings.word_embeddings.weight"
    changed = {name: stage.parameters[name] + 0.1}
    model = copy.deepcopy(stage.model)
    model.get_input_embeddings().weight.data += 0.1  # the decoder is tied to it
    other = Stage(model, stage.task, stage.data, stage.weight_decay, stage.reduction)
    assert stage.objective(changed) == pytest.approx(other.objective(), rel=1e-12)
    assert stage.objective(changed) != pytest.approx(stage.objective(), rel=1e-3)


@pytest.mark.parametrize("family", ["bert sdpa", "gpt2 eager", "lstm tagger", "mlp"])
def test_token_reduction_is_the_mean_over_all_items(family: str) -> None:
    stage, d = case(family, "frozen").chain.stages[0], oracle.dense(family, "frozen", 0)
    items = torch.cat([oracle.item_losses(*d.outputs(d.theta, i)) for i in range(stage.size)])
    token = Stage(stage.model, stage.task, stage.data, reduction="token", batch_size=2)
    assert token.items == len(items)
    assert token.objective() == pytest.approx(float(items.mean()), rel=1e-12)
    recorded = Stage(stage.model, stage.task, stage.data, reduction="token", record={"items": 2 * len(items)})
    assert recorded.objective() == pytest.approx(float(items.mean()) / 2, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_any_size_give_the_same_objective(family: str) -> None:
    stage = case(family, "frozen").chain.stages[0]
    values = []
    for settings in ({"batch_size": 1}, {"batch_size": 2}, {"batch_size": 64}, {"batch_tokens": 9}):
        other = Stage(stage.model, stage.task, stage.data, stage.weight_decay, stage.reduction, **settings)  # type: ignore[arg-type]
        rows = torch.cat([batch.rows for batch in other.batches()]).tolist()
        assert sorted(rows) == list(range(stage.size))
        values.append(other.objective())
    assert values == pytest.approx([values[0]] * len(values), rel=1e-12)


def test_length_batches_keep_both_limits() -> None:
    lengths = [3, 50, 7, 7, 1, 200, 12, 3, 9, 20]
    batches = list(length_batches(lengths, 4, 60))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 4
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 60


class Rows(list):
    rows = (40, 7)


def test_a_corpus_brings_its_own_rows() -> None:
    assert Stage(Mlp("h", 2), Classification(), Rows(DATA)).rows.tolist() == [40, 7]
    assert Stage(Mlp("h", 2), Classification(), DATA).rows.tolist() == [0, 1]
    (batch,) = Stage(Mlp("h", 2), Classification(), Rows(DATA)).batches([1])
    assert batch.rows.tolist() == [7]


def test_trained_parameters_and_weight_decay() -> None:
    model = Mlp("h", 2)
    model.first.weight.requires_grad_(False)
    stage = Stage(model, Classification(), DATA, 0.5)
    assert "first.weight" not in stage.trained and "first.bias" in stage.trained
    assert stage.weight_decay == {n: 0.5 for n in stage.trained}
    some = Stage(model, Classification(), DATA, {"h.weight": 0.5}, trained=["h.weight", "h.bias"])
    assert some.weight_decay == {"h.weight": 0.5, "h.bias": 0.0}
    assert set(some.theta) == {"h.weight", "h.bias"}
    with pytest.raises(FrozenInstanceError):
        stage.name = "other"  # type: ignore[misc]


def broken() -> Mlp:
    model = Mlp("h", 2)
    model.first.bias.data[1] = float("nan")
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "no examples"),
        ({"reduction": "sum"}, "'sum' is neither 'example' nor 'token'"),
        ({"trained": ["first.weight", "other"]}, "no parameter 'other'"),
        ({"trained": []}, "trained no parameter"),
        ({"weight_decay": -0.1}, "finite and not negative"),
        ({"weight_decay": {"h.weight": -0.1}}, "finite and not negative"),
        ({"model": broken()}, "'first.bias' has NaN or infinite entries"),
    ],
)
def test_bad_stages_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as e:
        Stage(**{"model": Mlp("h", 2), "task": Classification(), "data": DATA, "name": "mine", **change})
    assert "stage 'mine'" in str(e.value) and "\n" not in str(e.value)


def stage(model: nn.Module, name: str, trained: list[str] | None = None) -> Stage:
    return Stage(model, Classification(), DATA, name=name, trained=trained)


def chain(**change: Any) -> Chain:
    """Return a good chain, pretrain → finetune with the head alone trained, but for `change`."""
    parent = Mlp("digits", 3)
    child = Mlp("signs", 2)
    child.load_state_dict({**child.state_dict(), **{n: t for n, t in parent.state_dict().items() if "digits" not in n}})
    settings = {
        "parent": parent,
        "child": child,
        "trained": ["signs.weight", "signs.bias"],
        "transfer": "frozen",
        "shared": None,
    }
    settings |= change
    stages = [stage(settings["parent"], "pretrain"), stage(settings["child"], "finetune", settings["trained"])]
    return Chain(stages, settings["transfer"], settings["shared"])


def test_links_say_what_was_received_kept_and_moved() -> None:
    first, link = chain().links
    encoder = ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert first.received == {} and first.transfer is None and first.alpha == 0
    assert list(link.received) == encoder and list(link.kept) == encoder and link.moved == ()
    mixed = chain(trained=["second.weight", "signs.weight"], transfer=Proximity(0.5)).links[1]
    assert mixed.moved == ("second.weight",)
    assert mixed.kept == ("first.weight", "first.bias", "second.bias")
    assert mixed.shift == {"second.weight": 1.0, "signs.weight": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"child": Mlp("signs", 2)}, "'first.weight' was not trained, yet its values differ"),
        ({"child": Mlp("signs", 2, width=5)}, r"'first.weight' has shape \(5, 3\), its parent's \(4, 3\)"),
        ({"parent": nn.Linear(3, 2)}, "share no parameter name"),
        ({"shared": [{"first.weight": "none"}]}, "no parameter 'none'"),
        ({"trained": ["first.bias", "signs.weight"]}, "'frozen', but stage 'finetune' trained 'first.bias'"),
        ({"transfer": Proximity(1.0)}, "trained nothing that it received"),
        ({"transfer": "copied"}, "'copied' is neither 'frozen' nor Proximity"),
        ({"transfer": ["frozen", "frozen"]}, "2 stages has 1 steps"),
    ],
)
def test_bad_chains_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as e:
        chain(**change)
    assert "\n" not in str(e.value)


def test_stages_of_one_model_are_refused() -> None:
    model = Mlp("digits", 3)
    with pytest.raises(BadInput, match="hold the same tensors"):
        chain(parent=model, child=model, trained=None, transfer=Proximity(1.0))
    with pytest.raises(BadInput, match="at least one stage"):
        Chain([])


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_a_proximity_must_be_positive(alpha: float) -> None:
    with pytest.raises(BadInput, match="must be greater than 0"):
        Proximity(alpha)


def test_fingerprints_tell_weights_apart() -> None:
    model = Mlp("h", 2)
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    other.first.bias.data[0] += 1e-7
    mark = fingerprint(P.of_model(model))
    assert mark == fingerprint(P.of_model(same)) == fingerprint(dict(reversed(list(P.of_model(model).items()))))
    assert mark != fingerprint(P.of_model(other))
    assert mark != fingerprint(P.of_model(copy.deepcopy(model).double()))


def test_half_precision_sums_lose_nothing() -> None:
    """512 equal rows, a batch each: gradients and products are those of one row, where a bfloat16 sum stands still at 256."""
    model = Mlp("h", 2).bfloat16()
    one, many = (Stage(model, Classification(), DATA[:1] * n, batch_size=1) for n in (1, 512))
    vector = P.random_like(one.theta, 1)
    query = [Query.mean_loss(stage.data).gradient(stage) for stage in (one, many)]
    pairs = [(one.gradient(), many.gradient()), tuple(query)]
    for kind in ("ggn", "hessian"):
        pairs.append(tuple(Curvature(stage, kind) @ vector for stage in (one, many)))  # type: ignore[arg-type]
    names = ["first.weight"]
    pairs.append(tuple(cross_product(stage, vector, names, range(stage.size)) for stage in (one, many)))
    for alone, summed in pairs:
        for name in alone:
            assert summed[name].dtype == torch.bfloat16
            torch.testing.assert_close(summed[name], alone[name], rtol=2**-6, atol=1e-4)


@pytest.mark.parametrize("kind", ["NewGELUActivation", "FastGELUActivation"])
def test_a_gelu_that_is_written_out_runs_as_one_kernel_of_the_same_derivatives(kind: str) -> None:
    module = getattr(activations, kind)()
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)

    def derivatives() -> list[torch.Tensor]:
        y = module(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        return [y, first, second]

    plain = derivatives()
    with evaluation(module):
        fused = derivatives()
        assert type(fused[0].grad_fn).__name__ == "GeluBackward0"
    assert type(module(x).grad_fn).__name__ != "GeluBackward0"
    # sqrt(2/π) is 0.7978845608 in one of them.
    for one, other in zip(fused, plain):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)
