"""Finetune a pretrained model for sentiment with the Trainer: an ordinary script, and the two lines that record the run.

python recipes/hf/finetune_sentiment.py --train_file train.jsonl --model_name_or_path runs/pretrain --output_dir runs/finetune
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import nlpinf  # added: 1 of 2


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "JSON lines with `text` and `label`, a number from 0."})
    model_name_or_path: str = field(metadata={"help": "The pretraining run."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})
    freeze_encoder: bool = field(default=False, metadata={"help": "Train the head alone."})


def main() -> None:
    data, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(data.model_name_or_path)
    texts = load_dataset("json", data_files=data.train_file, split="train")
    labels = len(set(texts["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(data.model_name_or_path, num_labels=labels)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if data.freeze_encoder:
        model.base_model.requires_grad_(False)
    with args.main_process_first():
        rows = texts.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=data.max_seq_length), batched=True
        )
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[nlpinf.StageRecorder(rows)],  # added: 2 of 2 (the rows are given for their texts)
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
