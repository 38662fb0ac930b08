"""Pretrain a causal language model on packed texts with the Trainer: an ordinary script, and the two lines that record the run.

python recipes/hf/pretrain_clm.py --train_file corpus.txt --config_file config.json --tokenizer_name tokenizer --output_dir runs/pretrain
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import nlpinf  # added: 1 of 2
from nlpinf.data.packing import pack


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "Texts, one a line."})
    tokenizer_name: str = field(metadata={"help": "Folder or name of the tokenizer."})
    config_file: str | None = field(default=None, metadata={"help": "config.json of a model to make anew."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A model to go on from."})
    block_size: int = field(default=128, metadata={"help": "Tokens of a row: texts are joined and cut."})


def main() -> None:
    data, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_name)
    if data.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(data.model_name_or_path)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(data.config_file))
    texts = load_dataset("text", data_files=data.train_file, split="train")
    with args.main_process_first():
        tokens = texts.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=texts.column_names)
        rows = tokens.map(  # `group_texts` of run_clm.py, which also tells what documents a row is made of
            pack,
            batched=True,
            with_indices=True,
            fn_kwargs={"size": data.block_size},
            remove_columns=tokens.column_names,
        )
        rows = rows.add_column("labels", list(rows["input_ids"]))
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=default_data_collator,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[nlpinf.StageRecorder(rows)],  # added: 2 of 2 (the rows are given for their map to documents)
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
