"""Pretrain a masked language model with the Trainer: an ordinary script, and the two lines that record the run.

python recipes/hf/pretrain_mlm.py --train_file corpus.txt --config_file config.json --tokenizer_name tokenizer --output_dir runs/pretrain
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import nlpinf  # added: 1 of 2


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "Texts, one a line."})
    tokenizer_name: str = field(metadata={"help": "Folder or name of the tokenizer."})
    config_file: str | None = field(default=None, metadata={"help": "config.json of a model to make anew."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A model to go on from."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are masked."})


def main() -> None:
    data, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_name)
    if data.model_name_or_path:
        model = AutoModelForMaskedLM.from_pretrained(data.model_name_or_path)
    else:
        model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(data.config_file))
    texts = load_dataset("text", data_files=data.train_file, split="train")
    with args.main_process_first():
        rows = texts.map(
            lambda batch: tokenizer(
                batch["text"], truncation=True, max_length=data.max_seq_length, return_special_tokens_mask=True
            ),
            batched=True,
        )
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=data.mlm_probability),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[nlpinf.StageRecorder(rows)],  # added: 2 of 2 (the rows are given for their texts)
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
