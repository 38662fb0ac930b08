"""What `evaluation` puts in the place of fused kernels computes the same, with derivatives of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import profile

from nlpinf.evaluation import written_out_recurrence

LAYERS: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"proj_size": 2, "bias": False}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"batch_first": True}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


def run(layer: Any, x: torch.Tensor, packed: bool) -> torch.Tensor:
    given: Any = x
    if packed:
        lengths = torch.tensor([x.shape[1 if layer.batch_first else 0], 2, 1])
        given = pack_padded_sequence(x, lengths, batch_first=layer.batch_first, enforce_sorted=False)
    out, hidden = layer(given)
    parts = [out.data if packed else out, *(hidden if isinstance(hidden, tuple) else (hidden,))]
    return torch.cat([part.flatten() for part in parts])


class At:
    """A layer at other parameters."""

    def __init__(self, layer: nn.RNNBase, parameters: dict[str, torch.Tensor]) -> None:
        self.layer, self.parameters, self.batch_first = layer, parameters, layer.batch_first

    def __call__(self, x: Any) -> Any:
        return functional_call(self.layer, self.parameters, (x,))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "settings"), LAYERS)
def test_written_out_recurrence_is_the_fused_one(
    kind: type[nn.RNNBase], settings: dict[str, Any], packed: bool
) -> None:
    layer = kind(3, 4, **settings).double().eval()
    x = torch.randn((3, 5, 3) if layer.batch_first else (5, 3, 3), dtype=torch.float64)
    theta = {n: p.detach() for n, p in layer.named_parameters()}
    v = {n: torch.randn_like(p) for n, p in theta.items()}
    expected = run(layer, x, packed)
    fused = {"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"}
    with profile() as told, written_out_recurrence():
        assert torch.allclose(run(layer, x, packed), expected, atol=1e-12)
        found = jvp(lambda p: run(At(layer, p), x, packed), (theta,), (v,))[1]
    assert not fused & {event.key for event in told.key_averages()}
    step = 1e-6
    ahead, back = (run(At(layer, {n: t + h * v[n] for n, t in theta.items()}), x, packed) for h in (step, -step))
    assert torch.allclose(found, (ahead - back) / (2 * step), atol=1e-7)
    with profile() as told:  # and afterwards all is as before
        assert torch.equal(run(layer, x, packed), expected)
    assert fused & {event.key for event in told.key_averages()}
