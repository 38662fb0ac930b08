"""Trees of tensors as vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM

from nlpinf import parameters as P
from nlpinf.errors import BadInput
from tests.cases import bert_config

A = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([[3.0]])}
B = {"y": torch.tensor([[0.5]]), "x": torch.tensor([-1.0, 4.0])}


def test_vector_operations() -> None:
    assert P.dot(A, B) == -1 + 8 + 1.5  # names pair the tensors, not their order
    assert P.norm(A) == pytest.approx(14**0.5)
    total = P.axpy(2.0, A, B)
    assert total["x"].tolist() == [1.0, 8.0] and total["y"].tolist() == [[6.5]]
    assert P.scaled(-1.0, A)["x"].tolist() == [-1.0, -2.0]
    assert P.size(A) == 3
    assert list(P.select(A, ["y"])) == ["y"]
    assert A["x"].tolist() == [1.0, 2.0] and B["x"].tolist() == [-1.0, 4.0]


def test_embedded_puts_zeros_where_nothing_is() -> None:
    whole = P.embedded({"y": A["y"], "z": torch.ones(1)}, A)
    assert list(whole) == ["x", "y"]
    assert whole["x"].tolist() == [0.0, 0.0] and whole["y"].tolist() == [[3.0]]


def test_sums_run_in_double_precision() -> None:
    """4,000,001 products: their float32 sum would lose the small ones beside the large one."""
    a = {"w": torch.full((4_000_001,), 0.25)}
    a["w"][0] = 4096.0
    assert P.dot(a, a) == 4096.0**2 + 4_000_000 * 0.0625
    half = {"w": torch.full((5000,), 1.0, dtype=torch.bfloat16)}
    assert P.dot(half, half) == 5000.0
    for other in (torch.ones(4_000_002), torch.ones(4_000_000)):
        with pytest.raises(RuntimeError, match="size"):
            P.dot(a, {"w": other})


def test_tied_weights_appear_once() -> None:
    model = BertForMaskedLM(bert_config())
    parameters = P.of_model(model)
    embeddings, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    assert embeddings in parameters and decoder not in parameters
    groups = P.tied_groups(model)
    assert [embeddings, decoder] in groups
    assert len({t.data_ptr() for t in parameters.values()}) == len(parameters)
    assert parameters[embeddings].data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert not parameters[embeddings].requires_grad
    assert P.tied_groups(nn.Linear(2, 2)) == []


def test_random_vectors_are_a_function_of_the_seed() -> None:
    a, b, c = P.random_like(A, 1), P.random_like(A, 1), P.random_like(A, 2)
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in A)
    signs = P.random_like({"w": torch.zeros(1000)}, 0, P.rademacher)["w"]
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4.5 / 1000**0.5


def test_finite() -> None:
    assert P.finite(A)
    assert not P.finite({**A, "y": torch.tensor([[float("nan")]])})
    assert not P.finite({**A, "y": torch.tensor([[float("inf")]])})


def test_other_names_are_refused() -> None:
    for operation in (P.dot, lambda a, b: P.axpy(1.0, a, b)):
        with pytest.raises(BadInput, match="different names, first 'z'"):
            operation(A, {**A, "z": torch.zeros(1)})
