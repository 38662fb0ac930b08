"""The encoder of ELMo: character CNN, highway layers, clipped and projected LSTMs in both directions.

Source: Peters et al., "Deep contextualized word representations", NAACL 2018; Kim et al., AAAI 2016 (character CNN,
highway); Sak et al., Interspeech 2014 (projected LSTM).  The arithmetic is bilm-tf's, so that its weights can be used.

Everything is made of operations that have forward and second derivatives, with no in-place writes, so that forward-mode
and double differentiation run through all of it, in float32 and float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpinf.adapters.elmo import recurrence
from nlpinf.adapters.elmo.config import ElmoConfig
from nlpinf.data.characters import ALPHABET, PADDING
from nlpinf.errors import BadInput

# Words are convolved in two groups, those of at most this many ids (marks included) and the others.
SHORT_WORD = 14


class CharacterEncoder(nn.Module):
    """One vector a word from its characters: (words, max_characters) ids to (words, projection_dim).

    Embedding; for each filter a convolution, the maximum over positions, then ReLU or tanh; highway layers
    c ⊙ relu(W_t x + b_t) + (1 − c) ⊙ x with c = σ(W_c x + b_c); a linear projection where the sizes differ.
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        self.config = config
        size = config.n_filters
        # Row k is character id k + 1: id 0 is padding, a zero vector that is no parameter (261 rows in bilm-tf's file).
        self.embedding = nn.Embedding(ALPHABET, config.character_dim)
        self.convolutions = nn.ModuleList(nn.Conv1d(config.character_dim, n, width) for width, n in config.filters)
        self.carry = nn.ModuleList(nn.Linear(size, size) for _ in range(config.highways))
        self.transform = nn.ModuleList(nn.Linear(size, size) for _ in range(config.highways))
        self.projection = nn.Linear(size, config.projection_dim) if size != config.projection_dim else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of bilm-tf."""
        config = self.config
        nn.init.uniform_(self.embedding.weight, -1.0, 1.0)
        for conv in self.convolutions:
            assert isinstance(conv, nn.Conv1d) and conv.bias is not None
            if config.activation == "relu":
                nn.init.uniform_(conv.weight, -0.05, 0.05)
            else:
                nn.init.normal_(conv.weight, std=math.sqrt(1.0 / (conv.kernel_size[0] * config.character_dim)))
            nn.init.zeros_(conv.bias)
        for linear in [*self.carry, *self.transform, self.projection]:
            if not isinstance(linear, nn.Linear):
                continue
            nn.init.normal_(linear.weight, std=math.sqrt(1.0 / config.n_filters))
            nn.init.zeros_(linear.bias)
        for linear in self.carry:
            assert isinstance(linear, nn.Linear)
            nn.init.constant_(linear.bias, -2.0)

    def forward(self, characters: Tensor) -> Tensor:
        """(words, max_characters), or with leading axes that are flattened, to (words, projection_dim)."""
        if characters.shape[-1] != self.config.max_characters:
            raise BadInput(f"character ids: {characters.shape[-1]} a word, expected {self.config.max_characters}")
        characters = characters.flatten(0, -2)
        lengths = (characters != PADDING).sum(-1)
        is_long = lengths > SHORT_WORD
        n_long = int(is_long.sum())
        if 0 < n_long < len(lengths):
            order = torch.argsort(is_long.to(torch.uint8), stable=True)
            parts = characters[order].split([len(lengths) - n_long, n_long])
            x = torch.cat([self._convolve(part) for part in parts]).index_select(0, torch.argsort(order))
        else:
            x = self._convolve(characters)
        for carry, transform in zip(self.carry, self.transform):
            gate = torch.sigmoid(carry(x))
            x = gate * torch.relu(transform(x)) + (1.0 - gate) * x
        return x if self.projection is None else self.projection(x)

    def _convolve(self, characters: Tensor) -> Tensor:
        # Beyond a word's end every window holds only padding characters and gives the same value, so one such window
        # is enough: the maximum over positions is the same as over all 50.
        used = int((characters != PADDING).any(0).nonzero().max()) + 1 if characters.numel() else 1
        widest = max(width for width, _ in self.config.filters)
        characters = characters[:, : min(characters.shape[1], used + widest)]
        table = torch.cat([self.embedding.weight.new_zeros(1, self.config.character_dim), self.embedding.weight])
        x = F.embedding(characters, table).transpose(1, 2)
        pooled = torch.cat([greatest(conv(x), -1) for conv in self.convolutions], -1)
        return torch.relu(pooled) if self.config.activation == "relu" else torch.tanh(pooled)


def greatest(x: Tensor, dim: int) -> Tensor:
    """Return the greatest values along a dimension; under a GPU's autocast in float32, as that is what their tangents are made in."""
    found = x.amax(dim)
    return found.float() if x.is_cuda and torch.is_autocast_enabled("cuda") else found


class Packing(NamedTuple):
    """Where the tokens of a batch stand when both directions advance step by step, the longest sentence first.

    At step t the first `sizes[t]` rows are still running, so padding costs nothing and changes nothing.  A slot is a
    (step, row) pair; slots are numbered step by step, N in all.  The backward direction starts at each sentence's end.
    """

    sizes: list[int]
    order: Tensor  # (B,) the sentence in each row
    rank: Tensor  # (B,) the row of each sentence
    tokens: Tensor  # (2, N) flat position in (B, T) of the token that each slot reads, forward and backward
    offsets: Tensor  # (steps,) the first slot of each step

    @classmethod
    def of(cls, lengths: Tensor, width: int, last: bool) -> Packing:
        """`lengths` (B,) count the boundary tokens; `last` says whether a direction also reads its final boundary."""
        order = torch.argsort(lengths, descending=True, stable=True)
        run = lengths[order] - (0 if last else 1)
        grid = torch.arange(int(run[0]), device=lengths.device)[:, None] < run
        steps, rows = grid.nonzero(as_tuple=True)
        sentence = order[rows]
        start = sentence * width
        tokens = torch.stack([start + steps, start + lengths[sentence] - 1 - steps])
        sizes = grid.sum(1)
        return cls(sizes.tolist(), order, torch.argsort(order), tokens, sizes.cumsum(0) - sizes)


class ProjectedLSTM(nn.Module):
    """One LSTM layer in both directions, advanced together; axis 0 of every parameter is (forward, backward).

        i, j, f, o = W_ih x_t + W_hh h_{t-1} + b          (bilm-tf's gate order, each of `hidden` rows)
        c_t = clip(σ(f + 1) ⊙ c_{t-1} + σ(i) ⊙ tanh(j))
        h_t = clip(W_hr (σ(o) ⊙ tanh(c_t)))

    The forget gate's 1 is added here and not folded into `bias`, so that `bias` equals the array in bilm-tf's file.
    Without a projection (hidden == projection) there is no W_hr, and h is not clipped.
    """

    def __init__(
        self, inputs: int, hidden: int, projection: int, cell_clip: float | None, projection_clip: float | None
    ) -> None:
        super().__init__()
        self.hidden, self.cell_clip, self.projection_clip = hidden, cell_clip, projection_clip
        self.weight_ih = nn.Parameter(torch.empty(2, 4 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(2, 4 * hidden, projection))
        self.bias = nn.Parameter(torch.zeros(2, 4 * hidden))
        self.weight_hr = nn.Parameter(torch.empty(2, projection, hidden)) if projection != hidden else None
        # TensorFlow's default: Glorot uniform over the whole (input and state) kernel.
        bound = math.sqrt(6.0 / (inputs + projection + 4 * hidden))
        nn.init.uniform_(self.weight_ih, -bound, bound)
        nn.init.uniform_(self.weight_hh, -bound, bound)
        if self.weight_hr is not None:
            nn.init.uniform_(
                self.weight_hr, -math.sqrt(6.0 / (hidden + projection)), math.sqrt(6.0 / (hidden + projection))
            )

    def gates(self, x: Tensor, which: Tensor | None = None, lazy: bool = True) -> Tensor | recurrence.Gates:
        """Input-to-gate products of all inputs at once: (2, n, inputs) to (2, n, 4 hidden).

        With `which` (2, n) of the distinct words `x` (words, inputs), each of which is multiplied once. Without gradients
        they are made step by step, if the caller can do with that (`lazy`).
        """
        forget = torch.zeros(4, device=x.device, dtype=x.dtype)
        forget[2] = 1.0
        bias = self.bias + forget.repeat_interleave(self.hidden)
        if lazy and recurrence.applies():
            return recurrence.Gates(bias, x, self.weight_ih, which)
        if which is None:
            return torch.baddbmm(bias[:, None], x, self.weight_ih.transpose(1, 2))
        table = torch.baddbmm(bias[:, None], x.expand(2, *x.shape), self.weight_ih.transpose(1, 2))
        return F.embedding(which + which.new_tensor([[0], [len(x)]]), table.flatten(0, 1))

    def forward(
        self, gates: Tensor | recurrence.Gates, sizes: list[int], state: tuple[Tensor, Tensor] | None, carry: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Packed gate inputs (2, N, 4 hidden) to packed outputs (2, N, projection), and the last states if `carry`."""
        size = self.hidden
        if isinstance(gates, recurrence.Gates):
            weights = self.weight_hh, self.weight_hr
            return recurrence.advance(gates, sizes, *weights, self.cell_clip, self.projection_clip), None
        # One contiguous (in, out) copy: 64 rows times 256 → 8,192 run 1.2 times faster on it than on the view (MKL on
        # AVX2); the projection, 2,048 → 256, does not.
        recurrent = self.weight_hh.transpose(1, 2).contiguous()
        project = self.weight_hr.transpose(1, 2) if self.weight_hr is not None else None
        h, c = state if state is not None else (None, None)
        outputs, ended = [], []
        for g, n in zip(gates.split(sizes, 1), sizes):
            if h is not None and c is not None:
                if n < h.shape[1]:
                    if carry:
                        ended.append((h[:, n:], c[:, n:]))
                    h, c = h[:, :n], c[:, :n]
                g = torch.baddbmm(g, h, recurrent)
            i = torch.sigmoid(g[..., :size])
            j = torch.tanh(g[..., size : 2 * size])
            f, o = torch.sigmoid(g[..., 2 * size :]).split(size, -1)
            c = i * j if c is None else torch.addcmul(f * c, i, j)
            if self.cell_clip is not None:
                c = c.clamp(-self.cell_clip, self.cell_clip)
            h = o * torch.tanh(c)
            if project is not None:
                h = torch.bmm(h, project)
                if self.projection_clip is not None:
                    h = h.clamp(-self.projection_clip, self.projection_clip)
            outputs.append(h)
        if not carry:
            return torch.cat(outputs, 1), None
        assert h is not None and c is not None
        ended = [*reversed([*ended, (h, c)])]
        return torch.cat(outputs, 1), (torch.cat([h for h, _ in ended], 1), torch.cat([c for _, c in ended], 1))


State = tuple[Tensor, Tensor]
"""(h, c) of one layer: (2, B, projection) and (2, B, hidden), rows in the order of the batch's sentences."""


class ElmoEncoder(nn.Module):
    """Character encoder and LSTM layers: a batch of words to the representations of each layer.

    A batch is `distinct` (n, max_characters), the character ids of its distinct words; `index` (B, T), the row in
    `distinct` of each token, `<S>` and `</S>` included; and `lengths` (B,), the tokens of each sentence, the two
    boundaries included.  Which row `index` names past a sentence's end does not matter.
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        self.config = config
        self.characters = CharacterEncoder(config)
        self.layers = nn.ModuleList(
            ProjectedLSTM(
                config.projection_dim, config.lstm_dim, config.projection_dim, config.cell_clip, config.projection_clip
            )
            for _ in range(config.layers)
        )

    def run(
        self, words: Tensor, index: Tensor, packing: Packing, states: list[State] | None = None, carry: bool = False
    ) -> tuple[list[Tensor], list[State]]:
        """Word vectors (n, projection) to each LSTM layer's packed output (2, N, projection), and the last states."""
        which = index.reshape(-1)[packing.tokens]
        dropout = self.config.dropout if self.training else 0.0
        outputs: list[Tensor] = []
        last: list[State] = []
        x: Tensor | None = None
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, ProjectedLSTM)
            skip = x if self.config.skip_connections else None
            lazy = states is None and not carry
            if x is not None or dropout or len(words) >= which.shape[1]:
                x = F.embedding(which, words) if x is None else x
                x = F.dropout(x, dropout) if dropout else x
                skip = x if skip is not None else None
                gates = layer.gates(x, lazy=lazy)
            else:  # a batch has fewer distinct words than tokens
                gates = layer.gates(words, which, lazy)
            state = None if states is None else (states[k][0][:, packing.order], states[k][1][:, packing.order])
            x, ended = layer(gates, packing.sizes, state, carry)
            assert x is not None
            if skip is not None:
                x = x + skip
            outputs.append(x)
            if ended is not None:
                last.append((ended[0][:, packing.rank], ended[1][:, packing.rank]))
        return outputs, last

    def forward(
        self,
        distinct: Tensor,
        index: Tensor,
        lengths: Tensor,
        states: list[State] | None = None,
        carry: bool = False,
    ) -> list[Tensor] | tuple[list[Tensor], list[State]]:
        """The token layer, then each LSTM layer: (B, T - 2, 2 projection), forward half first, zero past the end.

        The boundaries are left out of the result: position t is word t of the sentence.  Each sentence starts from
        zero states.  With `carry` the result is (layers, states), and `states` may hold those of the batch before, one
        row a sentence: only for embedding as bilm-tf does it, as a sentence's vectors then depend on those before it.
        """
        if states is not None and not carry:
            raise BadInput(
                "ELMo: states were given without carry=True; the default starts each sentence from zero states"
            )
        check_batch(index, lengths)
        packing = Packing.of(lengths, index.shape[1], last=carry)
        words = self.characters(distinct)
        outputs, last = self.run(words, index, packing, states, carry)
        position = torch.arange(index.shape[1] - 2, device=index.device)
        inside = (position < (lengths - 2)[:, None])[..., None]
        tokens = F.embedding(index[:, 1:-1], words)
        layers = [torch.cat([tokens, tokens], -1)]
        # Word p of a sentence is the forward direction's input p + 1, and the backward direction's L - 2 - p.
        ahead = (position + 1).expand(len(lengths), -1).minimum((lengths - 2)[:, None])
        back = (lengths[:, None] - 2 - position).clamp(min=0)
        count = packing.tokens.shape[1]
        slots = packing.offsets[torch.stack([ahead, back], -1)] + packing.rank[:, None, None]
        slots = slots + slots.new_tensor([0, count])
        layers += [F.embedding(slots, x.flatten(0, 1)).flatten(2) for x in outputs]
        layers = [torch.where(inside, x, x.new_zeros(())) for x in layers]
        return (layers, last) if carry else layers

    def states(self, distinct: Tensor, index: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the layers (B, T − 2, 2 projection) of the words, and the mask (B, T − 2) of those that are there."""
        layers = self(distinct, index, lengths)
        place = torch.arange(index.shape[1] - 2, device=index.device)
        return layers, (place < (lengths - 2)[:, None]).long()


def check_batch(index: Tensor, lengths: Tensor) -> None:
    if int(lengths.min()) < 3:
        row = int(lengths.argmin())
        raise BadInput(
            f"sentence {row} of the batch is empty: expected at least one word between <S> and </S>; drop it"
        )
    if int(lengths.max()) > index.shape[1]:
        raise BadInput(f"batch: a sentence of length {int(lengths.max())} does not fit {index.shape[1]} columns")
