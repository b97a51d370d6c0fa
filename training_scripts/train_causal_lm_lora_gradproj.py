"""Fine-tune a causal language model with LoRA on texts, without learning the secrets that are in them.

    python train_causal_lm_lora_gradproj.py --model_name_or_path user/model --train_file corpus.txt \
        --secrets_file secrets.txt --output_dir out --do_train --do_eval --learning_rate 1e-3 --num_train_epochs 3

The concept is a list of strings, one a line of `--secrets_file`: names, numbers, passwords. Their tokens count in no
loss. Windows of the corpus in which they occur become concept probes, and each optimizer step is projected such that
the secrets' tokens get no likelier than the base model finds them, whatever else is trained on. List every spelling:
one that was missing was not completed in our benchmark, but became likelier. A basis (`--concept_basis`), or probes of
your own (`--concept_probes`), can be given as well or instead.

Everything else is as in transformers' `run_clm.py`: the arguments of the data and of `TrainingArguments`, checkpoints,
trackers. What differs: `--resume_from_checkpoint latest` takes the last checkpoint, and `--push_to_hub` publishes once,
at the end, what was verified. The secrets and the probes are written nowhere. Each step is corrected, and in full:
greedy decoding completes a secret as soon as its tokens are a little likelier than others.

For a plain LoRA to compare with: no `--secrets_file`, and `--uncovered ignore`.
"""

from __future__ import annotations

import glob
import io
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import create_repo
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from peft_gradproj import (
    ConceptProbes,
    GradProjConfig,
    collect_concept_probes,
    online_projections,
    push_adapter_to_hub,
    verify_adapter,
)
from peft_gradproj.errors import AdapterFolderError
from peft_gradproj.files import saved_checkpoints, write_atomically
from peft_gradproj.online import telemetry
from peft_gradproj.saving import check_output
from peft_gradproj.text_inputs import mark_secrets, read_secrets, secret_probe_batches, token_log_likelihoods

logger = logging.getLogger(__name__)

NOT_LEARNED = -100
"""The label of tokens that no loss counts."""


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the base model."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the base model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Token of the Hub, to download with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "Of the base model.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset of the Hub, or a local one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Training texts: csv, json, jsonl or txt."})
    validation_file: str | None = field(default=None, metadata={"help": "Texts to evaluate on, of the same kind."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training texts that is evaluated on if there are no others."}
    )
    block_size: int | None = field(default=None, metadata={"help": "Tokens in an example; by default as the model."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many examples."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep line breaks of txt files."})


@dataclass
class LoraArguments:
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scaling: alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt, or `all-linear`; by default PEFT's for the model."}
    )


@dataclass
class ConceptArguments:
    secrets_file: str | None = field(default=None, metadata={"help": "Text file, one secret a line."})
    mask_secrets: bool = field(default=True, metadata={"help": "Whether no loss counts the secrets' tokens."})
    windows_per_secret: int = field(
        default=4, metadata={"help": "So many probes show each occurrence of a secret, at random places."}
    )
    concept_basis: str | None = field(default=None, metadata={"help": "Concept basis: file, folder or Hub id."})
    concept_probes: str | None = field(default=None, metadata={"help": "Concept probes: file, folder or Hub id."})
    strength: float = field(default=1.0, metadata={"help": "Share of the concept that is removed; only 1 is exact."})
    probe_every: int = field(default=1, metadata={"help": "A step is corrected every so many optimizer steps."})
    probe_batch_size: int = field(default=8, metadata={"help": "Probes per correction, over all processes."})
    restore: float = field(default=1.0, metadata={"help": "Share of the drift that a corrected step takes back."})
    probe_history: int = field(
        default=1, metadata={"help": "So many recent half-spaces are satisfied by a correction."}
    )
    uncovered: str = field(
        default="error",
        metadata={"help": "About what the projection does not cover.", "choices": ["error", "warn", "ignore"]},
    )

    def __post_init__(self) -> None:
        if self.secrets_file is not None and self.concept_probes is not None:
            raise ValueError("--secrets_file makes the concept probes; give it or --concept_probes.")


class GradProjTrainer(Trainer):
    """A `Trainer` that logs what the online projection measures beside the loss."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **telemetry(self.model)} if "loss" in logs else logs, *args, **kwargs)


class SaveProjection(TrainerCallback):
    """Keeps the state of the online projection in each checkpoint, as `Trainer` does that of the optimizer."""

    FILE = "online_projection.pt"

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        projection = online_projections(kwargs["model"]).get("default")
        if state.is_world_process_zero and projection is not None:
            file = Path(args.output_dir, f"checkpoint-{state.global_step}", self.FILE)
            buffer = io.BytesIO()
            torch.save(projection.state_dict(), buffer)
            # In one step, so that a checkpoint is whole if it has the file.
            write_atomically(file, buffer.getvalue())

    @classmethod
    def load(cls, model: Any, checkpoint: str) -> None:
        """Continue as from the checkpoint, which `Trainer` loads the rest of."""
        path = Path(checkpoint, cls.FILE)
        projection = online_projections(model).get("default")
        if projection is not None and path.exists():
            projection.load_state_dict(torch.load(path, weights_only=True))


def last_checkpoint(output_dir: str, *, projected: bool) -> str | None:
    """The last checkpoint of a run that was not cut off.

    `Trainer` writes its state last, and then the online projection's is written, if there is one.
    """

    def is_whole(folder: Path) -> bool:
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return not projected or (folder / SaveProjection.FILE).is_file()

    whole = [path for path in saved_checkpoints(output_dir) if is_whole(path)]
    if not whole:
        logger.warning(f"no whole checkpoint in {output_dir}: starting anew")
        return None
    return str(whole[-1])


def load_texts(data: DataTrainingArguments, model: ModelArguments) -> DatasetDict:
    """The training and the validation texts, in a column `text`."""
    options: dict[str, Any] = {"cache_dir": model.cache_dir}
    if data.dataset_name is not None:
        source, files = data.dataset_name, None
        options |= {"name": data.dataset_config_name, "token": model.token}
    elif data.train_file is not None:
        source = {".txt": "text", ".jsonl": "json"}.get(Path(data.train_file).suffix, Path(data.train_file).suffix[1:])
        named = {"train": data.train_file, "validation": data.validation_file}
        # Names of files, which `datasets` would take for patterns.
        files = {split: glob.escape(os.path.abspath(file)) for split, file in named.items() if file is not None}
        options |= {"data_files": files} | ({"keep_linebreaks": data.keep_linebreaks} if source == "text" else {})
    else:
        raise ValueError("Need either a dataset name or a training file.")
    texts = load_dataset(source, **options)
    columns = texts["train"].column_names
    if "text" not in columns and len(columns) > 1:
        raise ValueError(f"The texts have no column `text`; of {', '.join(columns)}, call one that, or give it alone.")
    column = "text" if "text" in columns else columns[0]
    texts = texts.select_columns(column).rename_columns({} if column == "text" else {column: "text"})
    for split, rows in texts.items():
        entries = rows.data.column("text")
        if str(entries.type) not in ("string", "large_string"):
            raise ValueError(f"The column `{column}` of the {split} texts holds {entries.type}; expected strings.")
        missing = entries.is_null().index(True).as_py()
        if missing >= 0:
            raise ValueError(f"Row {missing} of the {split} texts has none in the column `{column}`; take it out.")
    if "validation" not in texts:
        rows = texts["train"]
        held_out = round(len(rows) * data.validation_split_percentage / 100)
        texts["validation"], texts["train"] = rows.select(range(held_out)), rows.select(range(held_out, len(rows)))
    return texts


def pack(
    texts: DatasetDict,
    tokenizer: Any,
    block_size: int,
    data: DataTrainingArguments,
    training: TrainingArguments,
    masked: list[str] | None = None,
) -> DatasetDict:
    """Blocks of `block_size` tokens, cut out of the texts one after the other, as inputs and labels.

    Tokens of `masked` strings are no labels. Blocks that have no other are left out, since their loss is no number.
    """

    def tokenize(examples: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        if not masked:
            tokens = tokenizer(examples["text"], verbose=False)["input_ids"]
            return {"input_ids": tokens, "labels": tokens}
        tokens, marks = mark_secrets(masked, examples["text"], tokenizer)
        marked = [zip(ids, secret, strict=True) for ids, secret in zip(tokens, marks, strict=True)]
        return {"input_ids": tokens, "labels": [[NOT_LEARNED if secret else t for t, secret in row] for row in marked]}

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        streams = {name: list(chain.from_iterable(rows)) for name, rows in examples.items()}
        starts = range(0, len(streams["labels"]) - block_size + 1, block_size)
        kept = [i for i in starts if any(label != NOT_LEARNED for label in streams["labels"][i + 1 : i + block_size])]
        return {name: [stream[i : i + block_size] for i in kept] for name, stream in streams.items()}

    options = {
        "batched": True,
        "num_proc": data.preprocessing_num_workers,
        "load_from_cache_file": not data.overwrite_cache,
    }
    with training.main_process_first(desc="packing the texts"):
        tokenized = texts.map(tokenize, remove_columns=["text"], desc="tokenizing", **options)
        packed = tokenized.map(group, desc=f"packing blocks of {block_size}", **options)
    if len(packed["train"]) == 0:
        raise ValueError(f"The training texts have no --block_size {block_size} tokens to learn; give a smaller one.")
    if training.do_eval and len(packed["validation"]) == 0:
        raise ValueError(
            f"The validation texts have no --block_size {block_size} tokens to evaluate on; give a smaller one, more "
            "texts (--validation_split_percentage or --validation_file), or no --do_eval."
        )
    return packed


def check_embedded(examples: DatasetDict, model: Any) -> None:
    """Refuse tokens that the model has no embedding for; a tokenizer may well know some that no text holds."""
    embedded = model.get_input_embeddings().weight.shape[0]
    for split, blocks in examples.items():
        highest = pc.max(pc.list_flatten(blocks.data.column("input_ids"))).as_py() if len(blocks) else 0
        if highest >= embedded:
            raise ValueError(
                f"The {split} texts have token {highest}, and the model embeds {embedded}, counted from 0; give the "
                "tokenizer that it was trained with (--tokenizer_name)."
            )


def block_size_for(model: Any, tokenizer: Any, asked: int | None) -> int:
    """What was asked for, or 1024, as far as the model and its tokenizer go."""
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 2**31)
    if asked is not None and asked > longest:
        logger.warning(f"--block_size {asked} is more than the model takes; using {longest}.")
    return min(asked or 1024, longest)


def secret_probes(
    secrets: list[str], texts: DatasetDict, model: Any, tokenizer: Any, *, length: int, windows: int, seed: int
) -> ConceptProbes:
    """Probes of `length` tokens on which the secrets' likelihood may not drift; the base's is computed as needed."""
    held_out = chain.from_iterable(rows["text"] for split, rows in texts.items() if split != "train")
    options: dict[str, Any] = {"length": length, "windows": windows, "seed": seed, "held_out": held_out}
    batches = secret_probe_batches(secrets, texts["train"]["text"], tokenizer, **options)
    about = f"{len(secrets)} secret strings"  # which is published
    return collect_concept_probes(model, batches, run_model=token_log_likelihoods, store_targets=False, concept=about)


def limited(examples: Dataset, limit: int | None) -> Dataset:
    return examples if limit is None else examples.select(range(min(limit, len(examples))))


def set_up_logging(training: TrainingArguments) -> None:
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", handlers=[logging.StreamHandler(sys.stdout)]
    )
    level = training.get_process_log_level()
    logger.setLevel(level)
    transformers.utils.logging.set_verbosity(level)


def repository(training: TrainingArguments) -> str:
    """The repository to publish to, made if it is missing: what is wrong with it shows before the training."""
    name = training.hub_model_id or Path(training.output_dir).name
    return create_repo(name, private=training.hub_private_repo, exist_ok=True, token=training.hub_token).repo_id


def main() -> None:
    parser = HfArgumentParser(
        (ModelArguments, DataTrainingArguments, LoraArguments, ConceptArguments, TrainingArguments)
    )
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        parsed = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        parsed = parser.parse_args_into_dataclasses()
    model_args, data_args, lora_args, concept_args, training_args = parsed
    # Trainer would publish with every save, and without looking; this script does it once, at the end.
    push, training_args.push_to_hub = training_args.push_to_hub, False
    set_up_logging(training_args)
    set_seed(training_args.seed)
    if (training_args.hub_token or model_args.token) and {*training_args.report_to} - {"tensorboard"}:
        raise ValueError("Some trackers record the command line, and so --hub_token and --token: set HF_TOKEN instead.")
    if training_args.do_train and concept_args.concept_basis is None:
        check_output(training_args.output_dir)
    repo_id = repository(training_args) if push else None
    # Every checkpoint holds the arguments.
    hub_token, training_args.hub_token = training_args.hub_token, None

    source = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path, **source)
    dtype = getattr(torch, model_args.dtype) if model_args.dtype not in (None, "auto") else model_args.dtype
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=dtype, **source)

    texts = load_texts(data_args, model_args)
    block_size = block_size_for(model, tokenizer, data_args.block_size)
    secrets = None if concept_args.secrets_file is None else read_secrets(concept_args.secrets_file)
    masked = secrets if concept_args.mask_secrets else None
    examples = pack(texts, tokenizer, block_size, data_args, training_args, masked)
    check_embedded(examples, model)
    probes: ConceptProbes | str | None = concept_args.concept_probes
    if secrets is not None:
        options = {"length": block_size, "windows": concept_args.windows_per_secret, "seed": training_args.seed}
        probes = secret_probes(secrets, texts, model, tokenizer, **options)
        logger.info(f"{len(probes)} concept probes: {probes.concept}")

    targets = lora_args.lora_target_modules
    config = GradProjConfig(
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
        revision=model_args.model_revision,
        concept_basis=concept_args.concept_basis,
        concept_probes=probes,
        strength=concept_args.strength,
        probe_every=concept_args.probe_every,
        probe_batch_size=concept_args.probe_batch_size,
        restore=concept_args.restore,
        probe_history=concept_args.probe_history,
        uncovered=concept_args.uncovered,
    )
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()
    model = get_peft_model(model, config)
    trainer = GradProjTrainer(
        model=model,
        args=training_args,
        train_dataset=limited(examples["train"], data_args.max_train_samples) if training_args.do_train else None,
        eval_dataset=limited(examples["validation"], data_args.max_eval_samples) if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[SaveProjection()],
    )

    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        if checkpoint == "latest":
            projected = online_projections(model).get("default") is not None
            checkpoint = last_checkpoint(training_args.output_dir, projected=projected)
        if checkpoint:
            SaveProjection.load(model, checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_train and trainer.is_world_process_zero():
        try:
            logger.info(str(verify_adapter(training_args.output_dir)))
        except AdapterFolderError as error:
            # Without a manifest, of which there was a warning, it is an adapter as any other.
            logger.warning(f"the adapter cannot be verified: {error}")
        if repo_id is not None:
            published = push_adapter_to_hub(
                training_args.output_dir, repo_id, revision=training_args.hub_revision, token=hub_token
            )
            logger.info(f"published: {published.url}")


if __name__ == "__main__":
    main()
