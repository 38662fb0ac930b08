"""Run folders of small models: a masked language model, and a classifier that went on from its encoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import BertForMaskedLM, BertForSequenceClassification

from nlpinf.adapters.huggingface import save_run
from nlpinf.stages import Stage
from nlpinf.tasks import MaskedLM, SequenceClassification
from tests.cases import ASKED, LABELLED, TEXTS, bert_config, inherit, randomised, tokenizer


@dataclass(frozen=True)
class Runs:
    """The stages in memory, and the folders that they were saved in."""

    pretrain: Stage
    finetune: Stage
    folder: Path

    @property
    def folders(self) -> list[Path]:
        """The run folders, the pretraining first."""
        return [self.folder / "pretrain", self.folder / "finetune"]


def sdpa(kind: Any) -> Any:
    """A model with the attention that from_pretrained chooses, as a folder does not hold which one it had."""
    return kind._from_config(bert_config(), attn_implementation="sdpa")


def make_runs(folder: Path, transfer: Any = None, **pretrain: Any) -> Runs:
    """Save both runs with their data beside them; `transfer` as the record has it, `pretrain` settings of the stage."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(TEXTS * 3) + "\n", encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*LABELLED, *ASKED]), encoding="utf-8")
    model = randomised(sdpa(BertForMaskedLM), 1)
    task = MaskedLM(tokenizer(), 9, probability=0.3, masks=2, seed=3)
    settings = {"weight_decay": 0.01, "reduction": "token", "name": "pretrain", **pretrain}
    first = Stage(model, task, TEXTS * 3, **settings)
    frozen = transfer == "frozen"
    later = randomised(sdpa(BertForSequenceClassification), 2)
    names = {n: n for n, _ in later.named_parameters() if n in first.parameters}
    inherit(later, model, names, lambda _: not frozen, 3)
    trained = ["classifier.weight", "classifier.bias"] if frozen else None
    decay = {n: 0.02 for n, p in later.named_parameters() if p.dim() > 1 and (trained is None or n in trained)}
    last = Stage(
        later, SequenceClassification(tokenizer(), 9), [*LABELLED, *ASKED], decay, trained=trained, name="finetune"
    )
    save_run(first, folder / "pretrain", data={"path": "../corpus.txt"})
    told = {} if transfer is None else {"transfer": transfer}
    save_run(last, folder / "finetune", data={"path": "../rows.jsonl"}, **told)
    return Runs(first, last, folder)
