"""ELMo: a bidirectional language model that opens bilm-tf's and AllenNLP's files, and trains its own."""

from nlpinf.adapters.elmo.config import ElmoConfig
from nlpinf.adapters.elmo.files import (
    read_encoder,
    read_language_model,
    read_options,
    read_softmax,
    write_encoder,
    write_softmax,
)
from nlpinf.adapters.elmo.folder import ElmoFiles, Headless
from nlpinf.adapters.elmo.language_model import ElmoLM, Items
from nlpinf.adapters.elmo.network import ElmoEncoder
from nlpinf.data.characters import CharacterBatch, character_batch, word_characters
from nlpinf.data.vocabulary import Vocabulary
from nlpinf.tasks.softmax import (
    DEFAULT_NEGATIVES,
    Negatives,
    draw_negatives,
    full_softmax_losses,
    sampled_softmax_logits,
    sampled_softmax_losses,
)

__all__ = [
    "DEFAULT_NEGATIVES",
    "CharacterBatch",
    "ElmoConfig",
    "ElmoEncoder",
    "ElmoFiles",
    "ElmoLM",
    "Headless",
    "Items",
    "Negatives",
    "Vocabulary",
    "character_batch",
    "draw_negatives",
    "full_softmax_losses",
    "read_encoder",
    "read_language_model",
    "read_options",
    "read_softmax",
    "sampled_softmax_logits",
    "sampled_softmax_losses",
    "word_characters",
    "write_encoder",
    "write_softmax",
]
