"""StageRecorder: it changes nothing, knows the rows of every step, survives a resumption, and its runs open as stages."""

from __future__ import annotations

import copy
import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForTokenClassification, Trainer, TrainerCallback

import nlpinf
from nlpinf import querystore
from nlpinf.adapters.folders import RECORD, weight_files
from nlpinf.adapters.plain import Told
from nlpinf.errors import BadInput
from nlpinf.integrations.steps import STEPS_FILE, StepRows, read_steps
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Batch
from tests.cases import tokenizer
from tests.cli.common import sentences
from tests.integrations.common import classifier, finetuning, gpt2, llama, pretraining, tokens, trained


class Spy(TrainerCallback):
    """Random states after training."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = torch.get_rng_state()


def _weights(folder: Path) -> dict[str, str]:
    return weight_files(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_recording_changes_no_weight_and_no_random_state(tmp_path: Path, workers: int) -> None:
    ends = []
    for name, callbacks in (("with", [nlpinf.StageRecorder()]), ("without", [])):
        spy = Spy()
        folder = trained(pretraining(tmp_path / name, [*callbacks, spy], dataloader_num_workers=workers))
        ends.append((_weights(folder), spy.state))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


class Seen(Trainer):
    """Notes what every micro-batch held."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), sorted(map(tuple, _unpadded(inputs["input_ids"])))]
        return super().training_step(model, inputs, *args, **kwargs)


def _unpadded(ids: torch.Tensor) -> list[list[int]]:
    return [[i for i in row if i != 0] for row in ids.tolist()]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_log_holds_the_rows_and_rates_of_every_step(tmp_path: Path, accumulation: int) -> None:
    trainer = pretraining(
        tmp_path, [nlpinf.StageRecorder()], gpt2(), gradient_accumulation_steps=accumulation, dataloader_num_workers=1
    )
    trainer.__class__ = Seen
    trained(trainer)
    steps = read_steps(tmp_path)
    assert len(steps) == trainer.state.global_step == trainer.state.max_steps  # how many, transformers' versions differ
    rows = tokens()["input_ids"]
    logged = [batch for step in steps for batch in step["rows"]]
    told = [sorted(tuple(rows[i]) for i in batch[0]) for batch in logged]
    assert told == trainer.seen  # type: ignore[attr-defined]
    epoch = [accumulation] * (8 // accumulation) + ([8 % accumulation] if 8 % accumulation else [])
    assert [len(step["rows"]) for step in steps] == [*epoch, *epoch][: len(steps)]
    rates = [3e-3 * (1 - k / len(steps)) for k in range(len(steps))]
    assert [step["lr"][0] for step in steps] == pytest.approx(rates)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    whole = trained(pretraining(tmp_path / "whole", [nlpinf.StageRecorder()]))
    cut = tmp_path / "cut"
    trained(pretraining(cut, [nlpinf.StageRecorder()], save_strategy="steps", save_steps=5))
    with (cut / STEPS_FILE).open("a") as file:
        file.write('{"step":17,"ro')  # as a killed run leaves it
    again = pretraining(cut, [nlpinf.StageRecorder()], save_strategy="steps", save_steps=5)
    trained(again, resume_from_checkpoint=str(cut / "checkpoint-5"))
    assert '{"resumed":5}' in (cut / STEPS_FILE).read_text()
    assert [(s["step"], s["rows"], s["lr"]) for s in read_steps(cut)] == [
        (s["step"], s["rows"], s["lr"]) for s in read_steps(whole)
    ]
    assert len(read_steps(cut, last=10)) == 10
    checkpoint = Stage.from_run(cut / "checkpoint-10")
    assert checkpoint.size == 30 and checkpoint.record["weights"] == weight_files(cut / "checkpoint-10")


def test_a_log_that_lacks_a_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / STEPS_FILE).write_text('{"step":1}\n{"step":3}\n')
    with pytest.raises(BadInput, match="step 2 is missing"):
        read_steps(tmp_path)


@pytest.mark.parametrize(
    "size, batch, processes", [(30, 4, 2), (9, 4, 2), (3, 4, 2), (32, 4, 2), (25, 2, 3), (5, 2, 3)]
)
@pytest.mark.parametrize("split, even, drop", [(False, True, False), (False, False, False), (True, True, False), (False, True, True)])  # fmt: skip
def test_rows_of_many_processes_are_those_of_their_shards(
    size: int, batch: int, processes: int, split: bool, even: bool, drop: bool
) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, DataLoader

    width = batch * processes if split else batch

    def shard(process: int) -> Any:
        inner = BatchSampler(range(size), width, drop)
        return BatchSamplerShard(inner, processes, process, split, even)

    loader = DataLoader(list(range(size)), batch_sampler=shard(0))
    expected = [[list(b) for b in shard(p)] for p in range(processes)]
    rows = StepRows(loader, processes)
    count = len(list(loader))
    assert count == len(expected[0])
    for k in range(count):
        epoch = 1 + (k + 1) / count
        told = rows.take(epoch, 1)[0]
        assert told == [batches[k] if k < len(batches) else [] for batches in expected]


def test_a_recorded_run_opens_as_the_stage_that_it_minimised(tmp_path: Path) -> None:
    run = trained(pretraining(tmp_path / "pretrain", [nlpinf.StageRecorder()]))
    model = classifier(run)
    tuned = trained(finetuning(tmp_path / "finetune", [nlpinf.StageRecorder()], model))
    first, second = Stage.from_run(run), Stage.from_run(tuned)
    assert [list(ids) for ids in first.data] == tokens()["input_ids"]
    assert first.reduction == "token" and second.reduction == "example"
    assert first.task.settings()["probability"] == 0.15
    assert first.decay["bert.encoder.layer.0.output.dense.weight"] == 0.02
    assert first.decay["bert.encoder.layer.0.output.dense.bias"] == first.decay["bert.embeddings.LayerNorm.weight"] == 0
    record = json.loads((tuned / RECORD).read_text())
    assert record["parent"] == {"run": "../pretrain", "weights": weight_files(run)}
    assert record["training"]["world_size"] == 1 and record["training"]["gradient_accumulation_steps"] == 1
    assert ["cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"] in [
        sorted(g, reverse=True) for g in first.record["tied"]
    ]
    assert set(second.record["label_names"]) == {"LABEL_0", "LABEL_1"}


def _loss(stage: Stage, inputs: dict[str, torch.Tensor]) -> float:
    """G over one of the Trainer's own batches, masks and all."""
    labels = inputs["labels"]
    if labels.ndim == 1:
        n = torch.arange(len(labels))
        batch = Batch({k: inputs[k] for k in ("input_ids", "attention_mask")}, n, labels, n, n)
    else:
        if stage.task.name == "causal_lm":
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        flat = (labels.flatten() != -100).nonzero()[:, 0]
        n = torch.arange(len(labels))
        example = flat // labels.shape[1]
        chosen = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        batch = Batch(chosen, n, labels.flatten()[flat], example, n, flat)
    first = len(labels) if stage.record.get("counts_first_token") else 0
    record = {"items": len(batch.example) + first}
    rows = Stage(stage.model, stage.task, range(len(labels)), reduction=stage.reduction, record=record)
    with evaluation(stage.model), torch.no_grad():
        return float(rows.example_losses(batch).sum()) / len(labels)


class Losses(Trainer):
    """Evaluation mode in training, so that dropout is no difference; keeps the batches and the loss of every update."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        model.eval()
        train, model.train = model.train, lambda *a: model
        self.batches = [*getattr(self, "batches", []), {k: v.clone() for k, v in inputs.items()}]
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        finally:
            model.train = train
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["masked", "gpt2", "llama", "classification"])
def test_g_is_the_trainers_own_loss(tmp_path: Path, kind: str, accumulation: int) -> None:
    changes = {"learning_rate": 0.0, "num_train_epochs": 1, "gradient_accumulation_steps": accumulation}
    recorder = [nlpinf.StageRecorder()]
    if kind == "classification":
        run = trained(pretraining(tmp_path / "pretrain", [], max_steps=1))
        trainer = finetuning(tmp_path / "run", recorder, classifier(run), **changes)
    else:
        trainer = pretraining(
            tmp_path / "run", recorder, {"gpt2": gpt2, "llama": llama}.get(kind, lambda: None)(), **changes
        )
        trainer.data_collator.mlm_probability = 0.5  # type: ignore[union-attr]  # so that no batch is without a mask
    trainer.__class__ = Losses
    stage = Stage.from_run(trained(trainer))
    batches, losses = trainer.batches, trainer.losses  # type: ignore[attr-defined]
    values = [_loss(stage, batch) for batch in batches]
    if stage.record["averaged_over"] == "batch":
        # Each micro-batch by itself; a model whose loss takes no count has its sum divided by their number.
        takes = "kwargs" in inspect.signature(stage.model.forward).parameters
        expected = [value / (1 if takes else accumulation) for value in values]
        assert losses == pytest.approx(expected, rel=1e-6, abs=1e-6)
        return
    counts = [float((b["labels"] != -100).sum()) for b in batches]
    if not stage.record["counts_first_token"]:
        counts = [c - len(b["labels"]) for c, b in zip(counts, batches)]
    assert stage.items == sum(counts)
    if version("transformers") >= "5":  # before, the Trainer counted every model's first token
        assert stage.record["counts_first_token"] == (kind == "gpt2")
    for k in range(0, len(batches), accumulation):  # the mean over the tokens of an update
        update = slice(k, k + accumulation)
        ours = sum(c * v for c, v in zip(counts[update], values[update])) / sum(counts[update])
        assert ours == pytest.approx(sum(losses[update]), rel=1e-6, abs=1e-6)


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    run = trained(pretraining(tmp_path, [nlpinf.StageRecorder()], max_steps=1, label_smoothing_factor=0.1))
    with pytest.raises(BadInput, match="label smoothing"):
        Stage.from_run(run)


def test_rows_of_another_run_are_refused(tmp_path: Path) -> None:
    one = trained(pretraining(tmp_path / "one", [nlpinf.StageRecorder()], max_steps=1))
    two = pretraining(tmp_path / "two", [nlpinf.StageRecorder()], max_steps=1)
    two.train_dataset = tokens(count=20)
    trained(two)
    (tmp_path / "two" / "nlpinf_rows.parquet").replace(one / "nlpinf_rows.parquet")
    with pytest.raises(BadInput, match="not those of the run"):
        Stage.from_run(one)


def padded(model: str) -> Dataset:
    """The sentences padded in the data set, as `padding="max_length"` does."""
    words = copy.deepcopy(tokenizer())  # which all tests share
    words.padding_side = "left" if model == "left" else "right"
    rows = [words(text, padding="max_length", max_length=16) for text in sentences(30)]
    return Dataset.from_dict({key: [row[key] for row in rows] for key in ("input_ids", "attention_mask")})


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_padded_in_the_data_set_are_recorded_without_their_padding(tmp_path: Path, side: str) -> None:
    trainer = pretraining(tmp_path / "run", [nlpinf.StageRecorder()], llama(), learning_rate=0.0, max_steps=1)
    trainer.train_dataset = padded(side)
    stage = Stage.from_run(trained(trainer))
    plain = Stage.from_run(trained(pretraining(tmp_path / "plain", [nlpinf.StageRecorder()], llama(), learning_rate=0.0, max_steps=1)))  # fmt: skip
    assert [list(row) for row in stage.data] == [list(row) for row in plain.data]
    assert stage.items == plain.items and stage.objective() == pytest.approx(plain.objective(), rel=1e-6)
    assert any("padded on the left" in note for note in stage.record["notes"]) == (side == "left")


@pytest.mark.parametrize("even", [False, True])
def test_a_collator_that_pads_on_the_left_is_noted(tmp_path: Path, even: bool) -> None:
    trainer = pretraining(tmp_path / "run", [nlpinf.StageRecorder()], llama(), max_steps=1)
    words = copy.deepcopy(tokenizer())
    words.padding_side = "left"
    trainer.data_collator.tokenizer = words  # type: ignore[union-attr]
    if even:
        trainer.train_dataset = Dataset.from_dict({"input_ids": [row[:4] for row in tokens()["input_ids"]]})
    stage = Stage.from_run(trained(trainer))
    assert any("padded on the left" in note for note in stage.record["notes"]) != even


@pytest.mark.parametrize("kind", ["prompt", "copied", "masked"])
def test_labels_of_the_data_sets_own_are_refused_unless_they_are_its_tokens(tmp_path: Path, kind: str) -> None:
    trainer = pretraining(tmp_path, [nlpinf.StageRecorder()], None if kind == "masked" else llama(), max_steps=1)
    rows = tokens()["input_ids"]
    labels = [[-100, -100, *row[2:]] if kind == "prompt" else list(row) for row in rows]
    trainer.train_dataset = Dataset.from_dict({"input_ids": list(rows), "labels": labels})
    trainer.data_collator = DataCollatorForTokenClassification(tokenizer())
    run = trained(trainer)
    if kind == "copied":
        assert Stage.from_run(run).size == 30
        return
    with pytest.raises(BadInput, match=r"labels that its rows brought.*DataCollatorForLanguageModeling"):
        Stage.from_run(run)


def test_rows_that_are_no_tokens_yet_do_not_stop_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = pretraining(tmp_path, [nlpinf.StageRecorder()], max_steps=1, remove_unused_columns=False)
    inner = trainer.data_collator
    trainer.train_dataset = Dataset.from_dict({"text": sentences(30)})
    trainer.data_collator = lambda rows: inner([tokenizer()(row["text"]) for row in rows])  # type: ignore[misc,assignment]
    run = trained(trainer)
    assert "rows have no input_ids" in caplog.text
    assert Stage.from_run(run, data=sentences(30)).size == 30


def test_a_run_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes one that knows its five special words, and every text would be unknown."""
    run = trained(pretraining(tmp_path, [nlpinf.StageRecorder()], max_steps=1))
    for path in run.glob("tokenizer*"):
        path.unlink()
    for record in (True, False):
        if not record:
            (run / RECORD).unlink()
        with pytest.raises(BadInput, match=r"no tokenizer with words.*save_pretrained"):
            Stage.from_run(run, data=sentences(3))


def test_what_is_told_of_a_recorded_run_is_used_or_refused(tmp_path: Path) -> None:
    run = trained(pretraining(tmp_path / "run", [nlpinf.StageRecorder()], max_steps=1))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "other", "sentence": s}) + "\n" for s in sentences(4)))
    told = Told(data=str(rows), text_column="sentence")
    stage = Stage.from_run(run, told=told)
    assert list(stage.data) == sentences(4)
    chain = nlpinf.Chain([stage])
    vectors = nlpinf.query_vectors(chain, [nlpinf.Query.loss("the cat")], damping=1.0, solver=nlpinf.CG(0.1))
    querystore.save(vectors, tmp_path / "query", chain)
    again = querystore.load(tmp_path / "query")
    assert list(again.stage.data) == sentences(4) and nlpinf.score(again).m == 4
    longest = json.loads((run / RECORD).read_text())["task"]["max_length"]
    assert Stage.from_run(run, told=Told(max_length=longest)).size == 30
    with pytest.raises(BadInput, match=rf"records a max length of {longest}, and 5 was given"):
        Stage.from_run(run, told=Told(max_length=5))
    record = json.loads((run / RECORD).read_text())
    del record["task"]["max_length"]  # as of rows that came in a stream
    (run / RECORD).write_text(json.dumps(record))
    task: Any = Stage.from_run(run, data=sentences(4)).task
    assert task.max_length == 24  # the model's positions
    shorter: Any = Stage.from_run(run, data=sentences(4), told=Told(max_length=7)).task
    assert shorter.max_length == 7
