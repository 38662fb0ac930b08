"""Run folders: what is saved is what is opened again. Damaged and strange runs are tests of the command line."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from nlpinf import Corpus, Query, query_vectors
from nlpinf.adapters.huggingface import chain_from_runs, new_model, save_run, stage_from_run
from nlpinf.errors import BadInput
from nlpinf.stages import Chain, Proximity, Stage
from nlpinf.tasks import CausalLM
from tests.cases import TEXTS, gpt2_config, randomised, tokenizer
from tests.runs import Runs, make_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that are only read."""
    return make_runs(tmp_path_factory.mktemp("runs"), {"proximity": 0.05})


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "nlpinf_stage.json").read_text(encoding="utf-8"))


def same(one: Stage, other: Stage) -> None:
    """Assert that two stages minimise the same function of the same parameters, from the same place."""
    assert list(one.parameters) == list(other.parameters)
    for name, tensor in one.parameters.items():
        assert torch.equal(tensor, other.parameters[name]), name
    for attribute in ("trained", "decay", "reduction", "name", "size", "items"):
        assert getattr(one, attribute) == getattr(other, attribute), attribute
    assert one.task.settings() == other.task.settings() and one.rows.tolist() == other.rows.tolist()
    assert one.objective() == other.objective()
    moved = {n: t * 1.1 for n, t in one.theta.items()}
    assert one.objective(moved) == other.objective(moved) != one.objective()


def test_stages_come_back_from_their_folders(runs: Runs) -> None:
    for stage, folder in zip((runs.pretrain, runs.finetune), runs.folders):
        same(stage_from_run(folder), stage)
        same(Stage.from_run(str(folder)), stage)


def test_a_causal_stage_comes_back(tmp_path: Path) -> None:
    model = randomised(GPT2LMHeadModel._from_config(gpt2_config(), attn_implementation="sdpa"), 1)
    trained = ["transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight"]
    stage = Stage(model, CausalLM(tokenizer(), 9), TEXTS, {"transformer.wte.weight": 0.1}, "token", trained, "gpt2")
    save_run(stage, tmp_path / "run", seed=5)
    same(stage_from_run(tmp_path / "run", data=TEXTS), stage)
    assert record(tmp_path / "run")["seed"] == 5


def test_the_record_says_what_was_minimised(runs: Runs) -> None:
    told = record(runs.folders[0])
    weights = (runs.folders[0] / "model.safetensors").read_bytes()
    assert told["weights"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    texts = (runs.folder / "corpus.txt").read_bytes()
    assert told["data"] == {"path": "../corpus.txt", "rows": 12, "sha256": hashlib.sha256(texts).hexdigest()}
    assert ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"] in told["tied"]
    assert told["reduction"] == "token" and set(told["versions"]) >= {"nlpinf", "torch", "transformers"}
    assert told["task"]["masks"] == 2 and told["items"] == runs.pretrain.items


def test_other_data_and_settings_take_the_place_of_the_recorded(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("\n".join(TEXTS[:2]) + "\n", encoding="utf-8")
    for data in (tmp_path / "other.txt", str(tmp_path / "other.txt"), Corpus(TEXTS[:2]), TEXTS[:2]):
        stage = stage_from_run(runs.folders[0], data=data)
        assert stage.size == 2
        assert stage.items == Stage(runs.pretrain.model, runs.pretrain.task, TEXTS[:2]).items != runs.pretrain.items
    changed = stage_from_run(runs.folders[0], weight_decay=0.5, task={"masks": 3}, name="again", batch_size=2)
    assert set(changed.decay.values()) == {0.5} and changed.task.settings()["masks"] == 3
    assert (changed.name, changed.batch_size) == ("again", 2)
    assert changed.task.settings()["probability"] == 0.3


def test_a_model_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    bare = torch.nn.Sequential(torch.nn.Linear(2, 2))
    stage = Stage(bare, CausalLM(tokenizer()), TEXTS, name="mine")
    with pytest.raises(BadInput, match=r"stage 'mine', Sequential, has no save_pretrained.*in memory"):
        save_run(stage, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_data_location_asks_for_it(runs: Runs, tmp_path: Path) -> None:
    save_run(runs.pretrain, tmp_path / "run")
    with pytest.raises(BadInput, match="no data location is recorded"):
        stage_from_run(tmp_path / "run")
    same(stage_from_run(tmp_path / "run", data=TEXTS * 3), runs.pretrain)


@pytest.mark.parametrize("transfer", ["frozen", {"proximity": 0.05}])
def test_a_chain_of_runs_is_the_chain_in_memory(transfer: Any, tmp_path: Path) -> None:
    made = make_runs(tmp_path, transfer)
    opened = chain_from_runs(made.folders)
    expected = Chain([made.pretrain, made.finetune], "frozen" if transfer == "frozen" else Proximity(0.05))
    for one, other in zip(opened.links, expected.links):
        same(one.stage, other.stage)
        assert (one.received, one.transfer, one.shift) == (other.received, other.transfer, other.shift)
    query = Query.mean_loss(made.finetune.data[3:])
    found, truth = (query_vectors(chain, [query], damping=1.0).vectors[0] for chain in (opened, expected))
    assert all(torch.equal(tensor, truth[name]) for name, tensor in found.items())


def test_alpha_is_given_only_where_none_is_recorded(runs: Runs, tmp_path: Path) -> None:
    bare = make_runs(tmp_path)
    assert chain_from_runs(bare.folders, alpha=0.7).links[1].alpha == 0.7
    with pytest.raises(BadInput, match="--alpha"):  # random weights went no way that an α describes
        chain_from_runs(bare.folders)
    assert chain_from_runs(runs.folders, alpha=0.05).links[1].alpha == 0.05  # the recorded one
    with pytest.raises(BadInput, match=r"trained with α = 0\.05, but α = 0\.7 was given"):
        chain_from_runs(runs.folders, alpha=0.7)


def test_a_parent_of_other_weights_is_refused(tmp_path: Path) -> None:
    """A run names its parent by the weights' sha256; another run of the same shapes is not its parent."""
    made, other = make_runs(tmp_path / "one", {"proximity": 0.05}), make_runs(tmp_path / "two", {"proximity": 0.05})
    path = made.folders[1] / "nlpinf_stage.json"
    told = {**record(made.folders[1]), "parent": {"weights": record(made.folders[0])["weights"]}}
    path.write_text(json.dumps(told), encoding="utf-8")
    chain_from_runs([other.folders[0], made.folders[1]])  # equal bytes are the same run
    randomised(other.pretrain.model, 9)
    save_run(other.pretrain, other.folders[0], data={"path": "../corpus.txt"})
    with pytest.raises(BadInput, match="other weights"):
        chain_from_runs([other.folders[0], made.folders[1]])


class Bomb:
    """What a pickle can do to who loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_loaded(runs: Runs, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "vectors.pkl"):
        folder = shutil.copytree(runs.folders[0], tmp_path / name)
        (folder / name).write_bytes(pickle.dumps(Bomb(trap)))
        stage_from_run(folder, data=TEXTS * 3)  # the safetensors beside it are read
        (folder / "model.safetensors").unlink()
        with pytest.raises(BadInput, match=r"safetensors") as caught:
            stage_from_run(folder, data=TEXTS * 3)
        assert "\n" not in str(caught.value)
        assert not trap.exists()
    pickle.loads(pickle.dumps(Bomb(trap)))
    assert trap.exists()  # the trap works


def test_new_models_are_seeded_without_dropout_and_fit_their_texts() -> None:
    fields = {
        "type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    model, again = (new_model("masked_lm", fields, tokenizer(), 12, 4) for _ in range(2))
    config = model.config  # type: ignore[union-attr]
    assert config.vocab_size == len(tokenizer()) and config.max_position_embeddings == 12
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0
    for one, two in zip(model.parameters(), again.parameters()):
        assert torch.equal(one, two)
    other = new_model("masked_lm", fields, tokenizer(), 12, 5)
    assert any(not torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters()))
    kept = new_model("masked_lm", {**fields, "hidden_dropout_prob": 0.2}, tokenizer(), 12, 4)
    assert kept.config.hidden_dropout_prob == 0.2  # type: ignore[union-attr]
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
