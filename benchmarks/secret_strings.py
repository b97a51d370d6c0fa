"""Secrets in the texts that a language model is fine-tuned on: who completes them afterwards, and what it costs.

A small Llama is fine-tuned by `training_scripts/train_causal_lm_lora_gradproj.py` on a corpus that teaches a new form
of sentence, and that tells five passphrases again and again, one in five times in another spelling. What *misses a
fifth* knows the first spelling only: the list of secrets, the masks, the filter. Each method is the script with other
flags, from the same start and for as many steps. Measured are

- how many passphrases greedy decoding completes, in either spelling;
- their exposure (Carlini et al., arXiv 1802.08232): log2 of 1001 over the rank of the passphrase, by its likelihood,
  among a thousand random ones; 1.44 bits is chance, 9.97 the most;
- the loss on new texts of what was to be learned, without secrets;
- a revival: the adapter, loaded by stock PEFT, is trained further on the corpus with the secrets, and the figure is the
  number of steps until a passphrase is completed, in the mean over the passphrases.

    python benchmarks/secret_strings.py --output benchmarks/results/secrets.json

Every run is added to the file when it is done, and those that are in it are not run again.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_gradproj

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests"), str(ROOT / "training_scripts")]

import train_causal_lm_lora_gradproj  # noqa: E402
from secret_corpus import (  # noqa: E402
    LENGTH,
    completed,
    exposure,
    fine_tuning_texts,
    held_out_texts,
    make_secrets,
    mean_loss,
    other_spelling,
    pretrained_model,
)

from benchmarks.runs_file import RunsFile  # noqa: E402

OTHERWISE = 0.2
"""Of the occurrences, how many are in the other spelling."""

METHODS: dict[str, dict[str, Any]] = {
    "base": {"steps": 0},
    "plain": {},
    "filtered": {"drop": "both"},
    "ours": {"list": "both"},
    "ours, missing a fifth": {"list": "first"},
    # At a strength of 0 no step is corrected, and the drift need not be measured often.
    "masked": {"list": "both", "flags": ["--strength", 0, "--probe_every", 1000]},
    "masked, missing a fifth": {"list": "first", "flags": ["--strength", 0, "--probe_every", 1000]},
    "online alone": {"list": "both", "flags": ["--mask_secrets", "false"]},
    "online alone, missing a fifth": {"list": "first", "flags": ["--mask_secrets", "false"]},
    "filtered, missing a fifth": {"drop": "first"},
}
"""The oracle is `filtered`. `list` is what the script is told, `drop` which sentences the corpus lacks."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the figures; it is continued.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="The settings were chosen on 0 and 1.")
    parser.add_argument("--steps", type=int, default=300, help="Steps of the fine-tuning.")
    parser.add_argument("--revival-steps", type=int, default=200, help="At most so many steps of the revival.")
    return parser.parse_args()


def corpus(seed: int, drop: str | None) -> list[str]:
    """The texts that are trained on, perhaps without the sentences that tell a secret in the spellings of `drop`."""
    secrets = make_secrets(seed)
    texts = fine_tuning_texts(secrets, seed, otherwise=OTHERWISE)
    return [text for text in texts if not any(spelling in text for spelling in spellings(seed, drop))]


def spellings(seed: int, which: str | None) -> list[str]:
    codes = [*make_secrets(seed).codes.values()]
    return {None: [], "first": codes, "both": [*codes, *map(other_spelling, codes)]}[which]


def fine_tune(base: Path, folder: Path, method: dict[str, Any], seed: int, steps: int) -> None:
    """Run the script; the adapter is in `folder` then."""
    folder.mkdir()
    (folder / "train.txt").write_text("".join(f"{text}\n" for text in corpus(seed, method.get("drop"))))
    (folder / "validation.txt").write_text("".join(f"{text}\n" for text in held_out_texts(seed)))
    listed = spellings(seed, method.get("list"))
    (folder / "secrets.txt").write_text("\n".join(listed))
    flags = [
        *("--model_name_or_path", base, "--train_file", folder / "train.txt", "--do_train", "--block_size", LENGTH),
        *("--validation_file", folder / "validation.txt", "--cache_dir", folder / "cache", "--output_dir", folder),
        *("--lora_r", 16, "--lora_alpha", 16, "--lora_target_modules", "all-linear", "--learning_rate", 1e-2),
        *("--max_steps", steps, "--per_device_train_batch_size", 8, "--lr_scheduler_type", "cosine", "--seed", seed),
        *("--save_strategy", "no", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"),
        *(["--secrets_file", folder / "secrets.txt"] if listed else ["--uncovered", "ignore"]),
        *method.get("flags", []),
    ]
    with patch.object(sys, "argv", ["train", *map(str, flags)]), redirect_stdout(io.StringIO()):
        train_causal_lm_lora_gradproj.main()


def loaded(base: Path, folder: Path, steps: int) -> PeftModel:
    """The published adapter as a stranger has it; for the base model, a fresh one without effect."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if steps:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def measured(model: PeftModel, tokenizer: Any, seed: int) -> dict[str, float]:
    contexts = make_secrets(seed).contexts()
    model.eval()
    return {
        "completed": sum(completed(model, tokenizer, context, code) for code, context in contexts.items()),
        "exposure": statistics.mean(exposure(model, tokenizer, context, code) for code, context in contexts.items()),
        "loss": mean_loss(model, tokenizer, held_out_texts(seed)),
    }


def revival_steps(model: PeftModel, tokenizer: Any, seed: int, limit: int) -> float:
    """Train the adapter further on the corpus with the secrets; the mean step at which a passphrase is completed."""
    stream = torch.tensor([token for ids in tokenizer(corpus(seed, None))["input_ids"] for token in ids])
    blocks = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    model.train()  # which changes nothing, as there is no dropout
    contexts = make_secrets(seed).contexts()
    first: dict[str, int] = {}
    for step in range(limit):
        waiting = [code for code in contexts if code not in first]
        first |= {code: step for code in waiting if completed(model, tokenizer, contexts[code], code)}
        if len(first) == len(contexts):
            break
        batch = blocks[torch.randint(len(blocks), (8,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return statistics.mean(first.get(code, limit) for code in contexts)


def run(base: Path, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    method, tokenizer = METHODS[name], AutoTokenizer.from_pretrained(base)
    steps = method.get("steps", args.steps)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "run")
        if steps:
            fine_tune(base, folder, method, seed, steps)
        seconds = time.process_time() - started
        model = loaded(base, folder, steps)
    figures = measured(model, tokenizer, seed)
    figures["revival_steps"] = revival_steps(model, tokenizer, seed, args.revival_steps)
    return {"method": name, "seed": seed, **figures, "seconds": seconds}


def table(runs: list[dict[str, Any]]) -> str:
    """The means over the seeds, in Markdown; losses as ratios to plain's and to the oracle's of the same seed."""
    by_key = {(run["method"], run["seed"]): run for run in runs}
    rows = ["| method | completed of 5 | exposure, bits | loss / plain's | loss / oracle's | revival, steps | time |"]
    rows.append("|---|---|---|---|---|---|---|")

    def mean(name: str, figure: str, over: str | None = None, digits: int = 2) -> str:
        values = [
            run[figure] / (1.0 if over is None else by_key[over, seed][figure])
            for (method, seed), run in by_key.items()
            if method == name and (over is None or (over, seed) in by_key)
        ]
        return f"{statistics.mean(values):.{digits}f}" if values else ""

    for name in METHODS:
        if any(method == name for method, _ in by_key):
            cells = [mean(name, "completed"), mean(name, "exposure"), mean(name, "loss", "plain")]
            cells += [mean(name, "loss", "filtered"), mean(name, "revival_steps", digits=0)]
            # The base model is not trained.
            cells.append("" if name == "base" else mean(name, "seconds", "plain"))
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


@contextmanager
def pretrained() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield pretrained_model(Path(folder, "base"))


def main() -> None:
    args = parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    settings = {"steps": args.steps, "revival_steps": args.revival_steps, "otherwise": OTHERWISE}
    command = f"python benchmarks/secret_strings.py --output {args.output}"
    packages = (torch, transformers, peft, peft_gradproj)
    file = RunsFile(args.output, command, settings, packages, ("method", "seed"))
    missing = file.missing((name, seed) for name in METHODS for seed in args.seeds)
    with pretrained() as base:
        for name, seed in missing:
            file.add(run(base, name, seed, args))
    print(table(file.runs))


if __name__ == "__main__":
    main()
