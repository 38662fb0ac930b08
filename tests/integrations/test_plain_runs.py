"""Plain output folders of a Trainer, recorded by nobody: opened with what is told and assumed, through the command line too."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from nlpinf.adapters.arguments import read_arguments
from nlpinf.adapters.chains import chain_from_runs, open_chain
from nlpinf.adapters.plain import Told
from nlpinf.adapters.runs import stage_from_run
from nlpinf.errors import BadInput
from tests.cases import tokenizer
from tests.cli.common import labelled, nlpinf, refused, write_data
from tests.integrations.common import arguments, classifier, finetuning, gpt2, pretraining, trained


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pretrain, causal, finetune and data: folders as the example scripts leave them."""
    folder = tmp_path_factory.mktemp("plain")
    write_data(folder / "data")
    trained(pretraining(folder / "pretrain", [], hub_token=None))
    trained(pretraining(folder / "causal", [], gpt2(), num_train_epochs=1))
    trained(
        finetuning(folder / "finetune", [], classifier(folder / "pretrain"), num_train_epochs=3, learning_rate=1e-3)
    )
    return folder


def _told(root: Path, **changes: Any) -> list[Told]:
    return [
        Told(str(root / "data/corpus.txt"), packed=False, max_length=16, **changes),
        Told(str(root / "data/rows.jsonl"), max_length=16),
    ]


def test_a_chain_of_plain_folders_says_what_it_assumed(root: Path) -> None:
    opened = open_chain([root / "pretrain", root / "finetune"], alpha=0.1, told=_told(root, weight_decay=0.02))
    first, second = opened.chain.stages
    assert first.size == 60 and second.size == 24
    assert first.reduction == "token" and second.reduction == "example"
    decayed = {n for n, value in first.decay.items() if value}
    assert {first.decay[n] for n in decayed} == {0.02}
    assert (
        not any("bias" in n or "LayerNorm" in n for n in decayed)
        and "bert.embeddings.word_embeddings.weight" in decayed
    )
    lines = "\n".join(opened.lines)
    for words in ("15 % of the tokens", "mean over the tokens", "(--mask-probability)", "tensors", "classifier"):
        assert words in lines
    assert "no weight decay" not in "\n".join(opened.facts["assumed"]["pretrain"])
    assert "no weight decay" in "\n".join(opened.facts["assumed"]["finetune"])


def _stepped(root: Path, run: Path, size: float) -> float:
    """Make `run` the finetuned run with W** = W* + size · ∇_W F(W*, Θ*); return α̂ = −⟨∇_W F(W**), Δ⟩ / (2 ‖Δ‖²).

    Gradients are those of the model's own loss, in double precision.
    """
    shutil.copytree(root / "finetune", run)
    model = BertForSequenceClassification.from_pretrained(run)
    start = {n: t for n, t in load_file(root / "pretrain/model.safetensors").items() if n.startswith("bert.")}
    model.load_state_dict(start, strict=False)

    def gradient() -> dict[str, torch.Tensor]:
        double = copy.deepcopy(model).double().eval()
        encoded = [
            (torch.tensor([tokenizer()(r["text"])["input_ids"]]), torch.tensor([r["label"]])) for r in labelled()
        ]
        loss = sum(double(input_ids=ids, labels=label).loss for ids, label in encoded) / len(encoded)
        loss.backward()
        return {n: p.grad for n, p in double.named_parameters() if n in start}

    named = dict(model.named_parameters())
    for name, slope in gradient().items():
        named[name].data += size * slope
    model.save_pretrained(run)
    slopes = gradient()
    moved = {n: t.double() - start[n].double() for n, t in load_file(run / "model.safetensors").items() if n in start}
    return float(
        -sum((slopes[n] * moved[n]).sum() for n in slopes) / (2 * sum(d.square().sum() for d in moved.values()))
    )


def _query(root: Path, run: Path, out: Path) -> list[Any]:
    rows = root / "data/rows.jsonl"
    return [
        "query", "--pretrain", root / "pretrain", "--corpus", root / "data/corpus.txt", "--no-packed", "--max-length", 16,
        "--finetune", run, "--train", rows, "--train-max-length", 16, "--test", rows, "--out", out, "--sample", 8,
        "--damping", 1, "--tolerance", 0.1,
    ]  # fmt: skip


def test_alpha_is_fitted_where_nobody_gave_one(root: Path, tmp_path: Path) -> None:
    expected = _stepped(root, tmp_path / "finetune", -0.5)  # downhill
    assert expected > 0.1
    ended = nlpinf(*_query(root, tmp_path / "finetune", tmp_path / "query"))
    assert ended.status == 0 and f"α̂ = {expected:.3g}" in ended.out and "relative residual" in ended.out, ended
    manifest = json.loads((tmp_path / "query/manifest.json").read_text())
    assert manifest["found"]["fitted"][0]["alpha"] == pytest.approx(expected, rel=1e-4)
    chain = open_chain([root / "pretrain", tmp_path / "finetune"], told=_told(root)).chain
    assert chain.links[1].alpha == pytest.approx(expected, rel=1e-4)


def test_a_run_that_moved_uphill_has_no_alpha(root: Path, tmp_path: Path) -> None:
    assert _stepped(root, tmp_path / "finetune", 0.5) < -0.1
    command = _query(root, tmp_path / "finetune", tmp_path / "query")
    refused(nlpinf(*command), "finetune: the fitted proximity α̂ is -", "--alpha")
    assert not (tmp_path / "query").exists()
    assert nlpinf(*command, "--alpha", 0.2).status == 0


def test_an_encoder_that_equals_its_parents_was_frozen(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "finetune", tmp_path / "finetune")
    weights = load_file(tmp_path / "finetune/model.safetensors")
    parent = load_file(root / "pretrain/model.safetensors")
    weights |= {n: t for n, t in parent.items() if n in weights}
    save_file(weights, tmp_path / "finetune/model.safetensors", metadata={"format": "pt"})
    chain = chain_from_runs([root / "pretrain", tmp_path / "finetune"], told=_told(root))
    assert chain.links[1].transfer == "frozen"
    assert all(n.startswith(("bert.pooler", "classifier")) for n in chain.stages[1].decay)


def test_packed_rows_are_those_of_the_script(root: Path) -> None:
    """`group_texts` of run_clm.py written a second time."""
    stage = stage_from_run(root / "causal", told=Told(str(root / "data/corpus.txt"), max_length=12))
    texts = (root / "data/corpus.txt").read_text().splitlines()
    joined = [i for text in texts for i in tokenizer()(text)["input_ids"]]
    assert [list(ids) for ids in stage.data] == [joined[k : k + 12] for k in range(0, len(joined) - 11, 12)]
    assert stage.data.documents(0)[0] == (0, 0)


def test_the_command_line_takes_plain_folders(root: Path, tmp_path: Path) -> None:
    options = [
        "--corpus", root / "data/corpus.txt", "--no-packed", "--max-length", 16, "--train", root / "data/rows.jsonl",
        "--train-max-length", 16, "--alpha", 0.2, "--read-training-args", "--tolerance", 0.01, "--damping", 0.1,
    ]  # fmt: skip
    runs = ["--pretrain", root / "pretrain", "--finetune", root / "finetune"]
    before = sorted(p.name for p in (root / "pretrain").iterdir())
    ended = nlpinf("query", *runs, "--test", root / "data/rows.jsonl", "--out", tmp_path / "query", *options)
    assert ended.status == 0 and "assumed: 15 %" in ended.out, ended
    manifest = json.loads((tmp_path / "query/manifest.json").read_text())
    assert manifest["chain"][0]["record"]["weight_decay"]["cls.predictions.transform.dense.weight"] == 0.02
    assert any("15 %" in line for line in manifest["found"]["assumed"]["pretrain"])
    assert sorted(p.name for p in (root / "pretrain").iterdir()) == before
    ended = nlpinf("score", "--query", tmp_path / "query", "--out", tmp_path / "scores")
    assert ended.status == 0 and "60 sentences" in ended.out, ended


def test_check_takes_plain_folders_with_their_data(root: Path) -> None:
    options = ["--max-length", 16, "--no-packed", "--examples", 2, "--json"]
    runs = [root / "pretrain", root / "finetune"]
    data = ["--data", root / "data/corpus.txt", "--data", root / "data/rows.jsonl"]
    ended = nlpinf("check", *runs, *data, *options)
    assert ended.status == 0, ended
    for run, words in zip(ended.json, ("15 %", "mean over sentences")):
        assert len(run["checks"]) >= 5 and any(words in line for line in run["assumed"])
    refused(nlpinf("check", runs[0]), "pretrain", "no data location is recorded", "--data")
    refused(nlpinf("check", *runs, *data[:2]), "--data", "1 times for 2 runs")


CODE = """from transformers import BertForMaskedLM


class Mine(BertForMaskedLM):
    pass
"""


def test_code_of_the_folder_is_run_when_allowed_alone(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "pretrain"
    shutil.copytree(root / "pretrain", run)
    (run / "mine.py").write_text(CODE)
    _config(auto_map={"AutoModelForMaskedLM": "mine.Mine"}, architectures=["BertForMaskedLM"])(run)
    told = ["--corpus", root / "data/corpus.txt", "--no-packed", "--max-length", 16]
    finetuned = ["--finetune", root / "finetune", "--train", root / "data/rows.jsonl", "--train-max-length", 16]
    solve = ["--alpha", 0.2, "--damping", 1, "--tolerance", 0.1, "--sample", 8]
    asked = ["--test", root / "data/rows.jsonl", "--out", tmp_path / "query"]
    query = ["query", "--pretrain", run, *told, *finetuned, *solve, *asked]
    trusted = "--trust-remote-code"
    refused(nlpinf(*query), "mine.Mine", trusted)
    assert nlpinf(*query, trusted).status == 0
    score = ["score", "--query", tmp_path / "query", "--out", tmp_path / "scores"]
    refused(nlpinf(*score), "mine.Mine", trusted)
    assert not (tmp_path / "scores").exists()
    assert nlpinf(*score, trusted).status == 0
    check = ["check", run, "--data", root / "data/corpus.txt", "--no-packed", "--max-length", 16, "--examples", 2]
    refused(nlpinf(*check), "mine.Mine", trusted)
    assert nlpinf(*check, trusted).status == 0


class _Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


def test_training_arguments_are_read_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments(tmp_path, label_smoothing_factor=0.1)
    given.trap = _Trap()
    torch.save(given, tmp_path / "training_args.bin")
    found = read_arguments(tmp_path)
    assert found["weight_decay"] == 0.02 and found["label_smoothing_factor"] == 0.1
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps({"weight_decay": 1}))
    with pytest.raises(BadInput, match="is not what the Trainer saves"):
        read_arguments(tmp_path)


# --- bad input ---


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        content = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def _sharded(run: Path) -> None:
    weights = load_file(run / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00002-of-00002.safetensors")}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    (run / "model.safetensors").rename(run / "model-00001-of-00002.safetensors")


def _pickled(run: Path) -> None:
    (run / "model.safetensors").rename(run / "pytorch_model.bin")


def _no_pad(run: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (run / name).exists():
            content = json.loads((run / name).read_text())
            content.pop("pad_token", None)
            (run / name).write_text(json.dumps(content))


def _more_words(run: Path) -> None:
    words = tokenizer().__class__.from_pretrained(run)
    words.add_tokens(["one", "two"])
    words.save_pretrained(run)


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no weights": (lambda run: (run / "model.safetensors").unlink(), ["pretrain", "no .safetensors weights"]),
    "pickled weights": (_pickled, ["pytorch_model.bin may be a pickle", "safe_serialization"]),
    "a missing shard": (_sharded, ["model-00002-of-00002.safetensors", "this shard is missing"]),
    "a tokenizer with more words": (_more_words, ["the tokenizer has 18 words, the embedding 16"]),
    "no pad token": (_no_pad, ["no pad token", "tokenizer.pad_token"]),
    "an encoder-decoder": (_config(model_type="t5", is_encoder_decoder=True), ["config.json", "encoder-decoder"]),
    "quantised weights": (_config(quantization_config={"bits": 4}), ["config.json", "quantised", "no derivative"]),
    "code of its own": (_config(auto_map={"AutoModel": "mine.Model"}), ["mine.Model", "--trust-remote-code"]),
    "another task": (_config(architectures=["BertForTokenClassification"]), ["BertForTokenClassification", "--task"]),
    "no run": (lambda run: (run / "config.json").unlink(), ["pretrain", "neither nlpinf_stage.json nor"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_folders_that_cannot_be_opened_are_refused(case: str, root: Path, tmp_path: Path) -> None:
    damage, named = DAMAGES[case]
    run = tmp_path / "pretrain"
    shutil.copytree(root / "pretrain", run)
    damage(run)
    with pytest.raises(BadInput) as caught:
        stage_from_run(run, told=_told(root)[0])
    message = str(caught.value)
    assert "\n" not in message
    for words in named:
        assert words in message, message


def test_a_checkpoint_of_another_architecture_is_refused(root: Path, tmp_path: Path) -> None:
    told = [Told(str(root / "data/corpus.txt"), max_length=12), _told(root)[1]]
    with pytest.raises(BadInput, match="no parameter of its bert encoder has a name of the parent's gpt2"):
        chain_from_runs([root / "causal", root / "finetune"], told=told)


def test_columns_and_labels_that_do_not_fit_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"rows.jsonl: line 1 has no column 'sentence', but 'text', 'label'"):
        stage_from_run(root / "finetune", told=Told(str(root / "data/rows.jsonl"), text_column="sentence"))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    Dataset.from_list(labelled(), features=features).save_to_disk(tmp_path / "set")
    run = tmp_path / "finetune"
    shutil.copytree(root / "finetune", run)
    assert stage_from_run(run, told=Told(str(tmp_path / "set"))).size == 24
    _config(id2label={"0": "bad", "1": "good"})(run)
    with pytest.raises(BadInput, match="its classes are good, bad, the model's bad, good, in this order"):
        stage_from_run(run, told=Told(str(tmp_path / "set")))
    (tmp_path / "words.jsonl").write_text('{"text": "a plot", "label": "fine"}\n')
    with pytest.raises(BadInput, match="the label 'fine' is none of the model's"):
        stage_from_run(run, told=Told(str(tmp_path / "words.jsonl")))


def test_a_run_without_its_corpus_is_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    runs = ["--pretrain", root / "pretrain", "--finetune", root / "finetune"]
    ended = nlpinf("query", *runs, "--test", root / "data/rows.jsonl", "--out", tmp_path / "query")
    refused(ended, "pretrain", "no data location is recorded", "--corpus")
