"""bilm-tf's TensorFlow checkpoint to its .hdf5 files: the softmax, which `dump_weights` leaves out, and on request the encoder.

    python data_scripts/convert_bilm_checkpoint.py CHECKPOINT --out FOLDER
    python data_scripts/convert_bilm_checkpoint.py CHECKPOINT --out FOLDER --encoder --vocabulary vocab.txt

CHECKPOINT is the folder that bilm-tf trained into, or the prefix of one checkpoint in it (`model.ckpt-935588`). Writes
`softmax.hdf5`, and with --encoder `options.json` and `weights.hdf5` too, as bilm-tf, AllenNLP and nlpinf read them.
Needs TensorFlow: pip install 'nlpinf[elmo,tensorflow]'.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nlpinf.adapters import elmo
from nlpinf.adapters.elmo.files import load_arrays
from nlpinf.errors import BadInput

SCOPE = "lm/"
SOFTMAX = ("softmax/W", "softmax/b")
# What an optimizer or moving average keeps beside a variable, under the variable's own name.
_SLOTS = re.compile(r"/(Adagrad|Adam|Adam_1|Momentum|RMSProp|RMSProp_1|ExponentialMovingAverage)$")
# TensorFlow's names of a recurrent cell's variables, and those of the .hdf5 file.
_NAMES = {
    "/rnn/": "/RNN/",
    "/multi_rnn_cell/": "/MultiRNNCell/",
    "/cell_": "/Cell",
    "/lstm_cell/": "/LSTMCell/",
    "/projection/kernel": "/W_P_0",
    "/kernel": "/W_0",
    "/bias": "/B",
}


def file_name(variable: str) -> str:
    """Return the name in the .hdf5 file of a variable of the checkpoint.

    lm/RNN_0/rnn/multi_rnn_cell/cell_0/lstm_cell/projection/kernel is RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/W_P_0.
    """
    name = variable.removeprefix(SCOPE)
    if name.startswith("RNN_"):
        for old, new in _NAMES.items():
            name = name.replace(old, new)
    return name


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Return the model's variables of a checkpoint under their names in .hdf5 files; optimizer state is left out."""
    try:
        import tensorflow as tf
    except ImportError:
        raise BadInput(
            "reading a checkpoint needs TensorFlow; install it with: pip install 'nlpinf[tensorflow]'"
        ) from None
    try:
        reader: Any = tf.train.load_checkpoint(str(path))
        names = [n for n in reader.get_variable_to_shape_map() if n.startswith(SCOPE) and not _SLOTS.search(n)]
        found = {file_name(name): np.asarray(reader.get_tensor(name)) for name in names}
    except (ValueError, RuntimeError, IndexError, tf.errors.OpError) as error:
        detail = " ".join(str(error).split())[:160]
        raise BadInput(f"{path}: no checkpoint of TensorFlow, or a damaged one ({detail}); give the folder or the prefix of its files") from None  # fmt: skip
    if not found:
        raise BadInput(f"{path}: no variable of the checkpoint is named {SCOPE}...; expected one that bilm-tf trained")
    return found


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    encoder: bool = False,
    options: str | Path | None = None,
    vocabulary: str | Path | None = None,
) -> list[Path]:
    """Write a checkpoint's softmax, and with `encoder` its options and weights, into `out`; return the files.

    `options`     bilm-tf's options.json; default: the one beside the checkpoint. Needed for the encoder alone, but the
                  softmax is checked against it where it is there
    `vocabulary`  checked to have a word for each row of the softmax

    Everything is checked before anything is written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    arrays = read_checkpoint(checkpoint)
    for name in SOFTMAX:
        if name not in arrays:
            raise BadInput(f"{checkpoint}: no variable {SCOPE}{name}; expected a training checkpoint of bilm-tf")
    weight, bias = (arrays.pop(name).astype(np.float32) for name in SOFTMAX)
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise BadInput(f"{checkpoint}: softmax W is {weight.shape} and b {bias.shape}; expected (V, P) and (V,)")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise BadInput(f"{checkpoint}: the softmax holds NaN or infinity; use an earlier checkpoint")
    if vocabulary is not None:
        elmo.Vocabulary.read(vocabulary).check_size(len(bias), f"the softmax of {checkpoint}")
    beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "options.json"
    config = elmo.read_options(options or beside) if options or encoder or beside.is_file() else None
    if config is not None and config.projection_dim != weight.shape[1]:
        raise BadInput(
            f"{checkpoint}: the softmax takes {weight.shape[1]} numbers, {options or beside} says projection_dim "
            f"{config.projection_dim}; use the options of the same model"
        )
    model = None
    if encoder and config is not None:
        model = elmo.ElmoEncoder(config)
        load_arrays(model, arrays, str(checkpoint), str(options or beside))
    head = nn.Linear(weight.shape[1], len(bias), device="meta")
    head.weight, head.bias = nn.Parameter(torch.from_numpy(weight)), nn.Parameter(torch.from_numpy(bias))
    out.mkdir(parents=True, exist_ok=True)
    written = [] if model is None else list(elmo.write_encoder(model, out))
    elmo.write_softmax(head, out / "softmax.hdf5")
    return [*written, out / "softmax.hdf5"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="training folder, or the prefix of a checkpoint in it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--encoder", action="store_true", help="convert the encoder too")
    parser.add_argument("--options", type=Path, help="bilm-tf's options.json (default: the one beside the checkpoint)")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary file; must fit the softmax")
    args = parser.parse_args(arguments)
    try:
        for path in convert(
            args.checkpoint, args.out, encoder=args.encoder, options=args.options, vocabulary=args.vocabulary
        ):
            print(path)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
