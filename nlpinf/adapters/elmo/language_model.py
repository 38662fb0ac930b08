"""The bidirectional language model: an ELMo encoder, one softmax for both directions, and its run folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nlpinf.adapters.elmo.config import ElmoConfig
from nlpinf.adapters.elmo.network import ElmoEncoder, Packing, check_batch
from nlpinf.errors import BadInput
from nlpinf.files import save_tensors
from nlpinf.tasks.softmax import Negatives, sampled_softmax_logits


class Items(NamedTuple):
    """The predicted positions of a batch, sentence by sentence: the forward direction's, then the backward one's."""

    hidden: Tensor  # (items, projection)
    sentences: Tensor  # (items,) row in the batch
    directions: Tensor  # (items,) 0 forward, 1 backward
    positions: Tensor  # (items,) the predicted token, counting <S> as 0


class ElmoLM(nn.Module):
    """ELMo's pretraining model: an encoder, and one softmax over words that both directions share.

    Called with `distinct`, `index` and `lengths` (see `ElmoEncoder`) it returns the logits of the batch's items. The loss
    of a sentence of n words is ½ (mean forward + mean backward) cross-entropy; each direction predicts n + 1 tokens
    (</S> or <S> among them), so it is the mean over the sentence's items.
    """

    base_model_prefix = "encoder"

    def __init__(self, config: ElmoConfig, vocabulary_size: int, encoder: ElmoEncoder | None = None) -> None:
        super().__init__()
        self.config, self.vocabulary_size = config, vocabulary_size
        self.encoder = ElmoEncoder(config) if encoder is None else encoder
        self.head = nn.Linear(config.projection_dim, vocabulary_size)
        nn.init.normal_(self.head.weight, std=1.0 / math.sqrt(config.projection_dim))
        nn.init.zeros_(self.head.bias)

    def items(self, distinct: Tensor, index: Tensor, lengths: Tensor) -> Items:
        """The top layer's state before each predicted token.

        The forward direction predicts tokens 1 to L - 1 of a sentence from those before, the backward direction
        tokens 0 to L - 2 from those after.
        """
        check_batch(index, lengths)
        width = index.shape[1]
        packing = Packing.of(lengths, width, last=False)
        outputs, _ = self.encoder.run(self.encoder.characters(distinct), index, packing)
        target = packing.tokens + packing.tokens.new_tensor([[1], [-1]])  # flat (B, T) position of what is predicted
        sentence = target // width
        direction = torch.arange(2, device=index.device)[:, None].expand_as(target)
        key = (sentence * 2 + direction) * width + target % width
        order = torch.argsort(key.flatten())
        hidden = outputs[-1].flatten(0, 1).index_select(0, order)
        if self.training and self.config.dropout:
            hidden = F.dropout(hidden, self.config.dropout)
        target = target.flatten()[order]
        return Items(hidden, target // width, direction.flatten()[order], target % width)

    def forward(
        self,
        distinct: Tensor,
        index: Tensor,
        lengths: Tensor,
        words: Tensor | None = None,
        negatives: Tensor | None = None,
        tries: Tensor | None = None,
    ) -> Tensor:
        """The logits of every item over all words, (items, V).

        With `negatives` (1, K) and `tries` (1,) of `draw_negatives`, and the word ids `words` (B, T), boundaries
        included: the logits (items, 1 + K) of `sampled_softmax_logits`, whose class 0 is the item's own word.
        """
        items = self.items(distinct, index, lengths)
        if negatives is None:
            return self.head(items.hidden)
        if words is None or tries is None:
            raise BadInput("ELMo: negatives were given without words and tries; give all three or none")
        drawn = Negatives(negatives.flatten(), int(tries), self.vocabulary_size, ())
        own = words[items.sentences, items.positions]
        return sampled_softmax_logits(items.hidden, own, self.head.weight, self.head.bias, drawn)

    def get_output_embeddings(self) -> nn.Module:
        """Return the softmax, as Hugging Face models do."""
        return self.head

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each under another name first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_tensors(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
        (folder / "model.safetensors.part").replace(folder / "model.safetensors")
        more = {"architectures": [type(self).__name__], "vocabulary_size": self.vocabulary_size}
        self.config.save_pretrained(folder, **more)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ElmoLM:
        """Read what `save_pretrained` wrote; the model comes in evaluation mode, in the dtype of its weights."""
        path, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        for file in (path, weights):
            if not file.is_file():
                raise BadInput(f"{file}: no such file; expected a folder written by save_pretrained")
        sizes, more = ElmoConfig.from_pretrained(folder)
        vocabulary_size = more.get("vocabulary_size")
        if not isinstance(vocabulary_size, int):
            raise BadInput(f"{path}: no vocabulary_size; expected the config.json of a language model, save it again")
        try:
            tensors = load_file(weights)
        except SafetensorError as error:
            raise BadInput(f"{weights}: damaged or truncated ({error}); save or copy it again") from None
        with torch.device("meta"):
            model = cls(sizes, vocabulary_size)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                raise BadInput(
                    f"{weights}: {name} has shape {found.get(name)}, expected {expected.get(name)} by {path.name}; "
                    "use the two files of one model"
                )
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_(True).eval()
