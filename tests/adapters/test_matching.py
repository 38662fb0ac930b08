"""Which parameters came from the parent: across prefixes, grown embeddings, poolers, adapters; and the runs that these open."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from transformers import BertForMaskedLM, BertForSequenceClassification

from nlpinf.adapters.matching import match, received
from nlpinf.errors import BadInput
from nlpinf.influence import ImplicitSolve, query_vectors
from nlpinf.parameters import dot
from nlpinf.queries import Query
from nlpinf.solvers import CG
from nlpinf.stages import Chain, Proximity, Stage, evaluation
from nlpinf.tasks import MaskedLM, SequenceClassification
from tests.cases import ASKED, LABELLED, TEXTS, bert_config, tokenizer

WORDS = "bert.embeddings.word_embeddings"


def _parent(**changes: Any) -> Stage:
    torch.manual_seed(0)
    return Stage(
        BertForMaskedLM(bert_config(**changes)).double(), MaskedLM(tokenizer(), 9), TEXTS, 0.02, name="pretrain"
    )


def _child(parent: Stage, words: int = 0, trained: Any = None) -> Stage:
    torch.manual_seed(1)
    model = BertForSequenceClassification(bert_config()).double()
    model.bert.load_state_dict(parent.model.bert.state_dict(), strict=False)  # type: ignore[attr-defined]
    if words:
        model.resize_token_embeddings(len(tokenizer()) + words, mean_resizing=False)
    return Stage(model, SequenceClassification(tokenizer(), 9), LABELLED, 0.1, trained=trained, name="finetune")


def test_a_pooler_and_a_head_are_the_stages_own() -> None:
    parent = _parent()
    matching = match(parent, _child(parent))
    assert all(n.startswith("bert.") for n in matching.shared)
    assert {n.split(".")[1] for n in matching.own} == {"pooler", "weight", "bias"}
    assert matching.left and all(n.startswith("cls.") for n in matching.left)
    assert "of its own: bert.pooler.dense, classifier" in str(matching)


def test_encoders_of_other_sizes_are_refused_by_their_first_tensors() -> None:
    with pytest.raises(BadInput, match=r"intermediate.dense.weight' has shape \(5, 4\), its parent's \(7, 4\)"):
        match(_parent(intermediate_size=7), _child(_parent()))


def test_missing_and_surplus_layers_are_refused() -> None:
    deep, flat = _parent(num_hidden_layers=2), _parent()
    with pytest.raises(BadInput, match=r"its parent's 'bert.encoder.layer.1.*' is not in it"):
        match(deep, _child(flat))


def test_shrunk_embeddings_are_refused() -> None:
    parent = _parent(vocab_size=20)
    with pytest.raises(BadInput, match=r"word_embeddings.weight' has shape \(16, 4\), its parent's \(20, 4\)"):
        match(parent, _child(_parent()))


def _score(chain: Chain, parent: Stage) -> list[float]:
    vectors = query_vectors(chain, [Query.mean_loss(ASKED)], damping=0.05, curvature="ggn", solver=CG(1e-12, 2000))
    return [dot(vectors.vectors[0], parent.gradient(list(vectors.vectors[0]), [i])) for i in range(parent.size)]


def test_new_rows_of_an_embedding_belong_to_theta() -> None:
    """Words that no text has change no score: their rows are Θ, in whose directions the loss is flat."""
    parent = _parent()
    plain, grown = _child(parent), _child(parent, words=3)
    with torch.no_grad():
        for one, other in zip(plain.model.parameters(), grown.model.parameters()):
            shift = 0.05 * torch.randn(one.shape, dtype=one.dtype, generator=torch.Generator().manual_seed(one.numel()))
            one += shift
            other[: len(one)] += shift
    before = copy.deepcopy(grown.model.state_dict())
    matching = match(parent, grown)
    assert matching.grown == {f"{WORDS}.weight": 16} and f"{WORDS}.weight grew from 16 rows" in str(matching)
    split, names = received(grown, matching)
    first, others = (f"{WORDS}.parametrizations.weight.original{i}" for i in (0, 1))
    assert names[first] == f"{WORDS}.weight" and others not in names
    assert split.parameters[first].shape == (16, 4) and split.parameters[others].shape == (3, 4)
    assert split.decay[first] == split.decay[others] == 0.1
    assert all(torch.equal(before[n], t) for n, t in grown.model.state_dict().items())  # the given model stays as it is
    assert split.objective() == pytest.approx(grown.objective(), abs=1e-13)
    expected = _score(Chain([parent, plain], Proximity(0.3)), parent)
    assert _score(Chain([parent, split], Proximity(0.3), [names]), parent) == pytest.approx(expected, rel=1e-7)


def test_a_grown_embedding_stays_tied() -> None:
    parent = _parent()
    stage = copy.copy(parent)
    model = copy.deepcopy(parent.model)
    model.resize_token_embeddings(18, mean_resizing=False)  # type: ignore[operator]
    grown = Stage(model, stage.task, TEXTS, 0.02, name="domain")
    matching = match(parent, grown)
    split, _ = received(grown, matching)
    names = [n for n in split.parameters if "parametrizations" in n]
    assert len([n for n in names if n.endswith("weight.original1")]) == 1
    assert split.objective() == pytest.approx(grown.objective(), abs=1e-13)


def _lora(parent: Stage, folder: Path, heads: list[str]) -> Path:
    from peft import LoraConfig, get_peft_model

    parent.model.save_pretrained(folder / "base")  # type: ignore[operator]
    tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(2)
    model = BertForSequenceClassification.from_pretrained(folder / "base", num_labels=2, torch_dtype=torch.float64)
    settings = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], modules_to_save=heads, lora_dropout=0.1
    )
    wrapped = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder / "adapters")
    return folder / "adapters"


def test_adapters_are_case_1_with_theta_the_adapters_and_the_head(tmp_path: Path) -> None:
    parent = _parent(initializer_range=0.3)
    folder = _lora(parent, tmp_path, ["classifier", "pooler"])
    stage = Stage.from_run(folder, data=LABELLED, base=tmp_path / "base")
    stage = Stage(stage.model.double(), stage.task, LABELLED, 0.05, name="finetune")
    assert {("lora" in n, "modules_to_save" in n) for n in stage.trained or ()} == {(True, False), (False, True)}
    matching = match(parent, stage)
    assert f"{WORDS}.weight" in matching.shared
    query = "bert.encoder.layer.0.attention.self.query"
    assert matching.shared[f"{query}.base_layer.weight"] == f"{query}.weight"
    chain = Chain([parent, stage], "frozen", [matching.shared])
    step = ImplicitSolve("hessian", 1.0, CG(1e-13, 2000))
    pulled = step(chain.links[1], [Query.mean_loss(ASKED).gradient(stage)])[0].cotangent
    expected = _dense(stage, list(matching.shared), 1.0 + 0.05)
    assert pulled.keys() == set(matching.shared.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(pulled[matching.shared[name]], tensor, rtol=1e-8, atol=1e-12)
    assert query_vectors(chain, [Query.mean_loss(ASKED)]).converged


def _dense(stage: Stage, w: list[str], shift: float) -> dict[str, torch.Tensor]:
    """q_W − F_WΘ (F_ΘΘ + shift)⁻¹ q_Θ by whole matrices, from autograd's Hessian of the model's own loss."""
    names = [*(stage.trained or ()), *w]
    shapes = [stage.parameters[n].shape for n in names]
    flat = torch.cat([stage.parameters[n].flatten() for n in names])

    def loss(examples: Any) -> Any:
        text = tokenizer()([e["text"] for e in examples], padding=True, return_tensors="pt")
        labels = torch.tensor([e["label"] for e in examples])

        def of(x: torch.Tensor) -> torch.Tensor:
            parts = [p.view(s) for p, s in zip(x.split([s.numel() for s in shapes]), shapes)]
            inputs = {k: text[k] for k in ("input_ids", "attention_mask")}
            return functional_call(stage.model, dict(zip(names, parts)), (), {**inputs, "labels": labels}).loss

        return of

    n = sum(stage.parameters[name].numel() for name in stage.trained or ())
    with evaluation(stage.model):
        f = torch.autograd.functional.hessian(loss(LABELLED), flat)
        q = torch.autograd.functional.jacobian(loss(ASKED), flat)
    y = torch.linalg.solve(f[:n, :n] + shift * torch.eye(n, dtype=f.dtype), q[:n])  # type: ignore[index]
    cotangent = q[n:] - f[n:, :n] @ y  # type: ignore[index]
    parts = cotangent.split([stage.parameters[name].numel() for name in w])
    return {name: part.view(stage.parameters[name].shape) for name, part in zip(w, parts)}


def test_adapters_without_the_pooler_that_was_trained_are_refused(tmp_path: Path) -> None:
    folder = _lora(_parent(), tmp_path, ["classifier"])
    with pytest.raises(BadInput, match=r"'bert.pooler.*made at random.*modules_to_save"):
        Stage.from_run(folder, data=LABELLED)
