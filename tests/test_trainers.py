"""Training loops that users have: transformers' Trainer, TRL's trainers, accelerate, and a loop with GradScaler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from conftest import SmallNet
from distributed_case import PROBE_OPTIONS, small_probes
from helpers import LAYERS, saved_leakage, small_net_basis, trainable
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import FLOORS, LLAMA_TARGETS, basis_for, folder_leakage, tensors_leakage, tiny_llama
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from peft_gradproj import GradProjConfig, collect_concept_probes, online_projections, verify_adapter

TOKENS = torch.randint(3, 32, (16, 10), generator=torch.Generator().manual_seed(0))


# transformers' Trainer


def llama_for_training():
    torch.manual_seed(0)
    base = tiny_llama()
    config = llama_config(base)
    return get_peft_model(base, config), config.concept_basis


def llama_config(base) -> GradProjConfig:
    return GradProjConfig(
        r=4,
        lora_alpha=8,
        target_modules=LLAMA_TARGETS,
        concept_basis=basis_for(base, LLAMA_TARGETS),
        concept_probes=collect_concept_probes(base, [({"input_ids": TOKENS[:4].flip(0)}, None)]),
        probe_every=3,
        probe_batch_size=2,
        task_type="CAUSAL_LM",
    )


def steps_seen(model) -> int:
    return online_projections(model)["default"].step


def trainer_for(model, folder, **options):
    from transformers import Trainer, TrainingArguments

    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-2,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 1,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
        **options,
    }
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **arguments), train_dataset=data)


def logged_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_with_fused_adamw_bf16_accumulation_and_resume(tmp_path):
    model, basis = llama_for_training()
    trainer = trainer_for(model, tmp_path / "whole")
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[-1] < losses[0]
    assert steps_seen(model) == 8
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-4", tmp_path / "whole" / "checkpoint-8"):
        assert folder_leakage(folder, basis) <= FLOORS[torch.float32]
        assert verify_adapter(folder).ok

    resumed, _ = llama_for_training()
    again = trainer_for(resumed, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.state.global_step == 8
    expected = get_peft_model_state_dict(model)
    for key, value in get_peft_model_state_dict(resumed).items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)


def test_a_trainer_resumed_within_an_epoch_sees_the_same_batches_and_ends_alike(tmp_path):
    seen = {}

    def run(name, **options):
        model, basis = llama_for_training()
        trainer = trainer_for(model, tmp_path / name, bf16=False, max_steps=6, save_steps=3)  # an epoch has 4 steps
        batches = seen[name] = []
        # Of the PeftModel, through which only the training goes: the probes are run on the model in it.
        model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True)
        trainer.train(**options)
        assert steps_seen(model) == 6
        assert folder_leakage(tmp_path / name / "checkpoint-6", basis) <= FLOORS[torch.float32]
        return get_peft_model_state_dict(model)

    expected = run("whole")
    ended = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    whole, resumed = torch.cat(seen["whole"]), torch.cat(seen["resumed"])
    assert len(whole) == 6 * 4
    assert not torch.equal(whole[:16], TOKENS), "the data were not shuffled"
    assert torch.equal(resumed, whole[3 * 4 :])
    for key, value in ended.items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("added", ["get_peft_model", "add_adapter"])
def test_trainer_keeps_an_adapter_that_was_added_either_way(added, tmp_path):
    model, basis = llama_for_training()
    if added == "add_adapter":
        model = tiny_llama()
        model.add_adapter(llama_config(model))
    trainer = trainer_for(model, tmp_path, bf16=False, max_steps=4, gradient_checkpointing=added == "add_adapter")
    trainer.train()
    assert steps_seen(model) == 4
    assert folder_leakage(tmp_path / "checkpoint-4", basis) <= FLOORS[torch.float32]
    assert verify_adapter(tmp_path / "checkpoint-4").ok


# TRL


def words_tokenizer(folder: Path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(28))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TEXTS = [" ".join(f"w{t % 28}" for t in row.tolist()) for row in TOKENS]


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("SFT", {"text": TEXTS}),
        # Its reference is the model with the adapter switched off, in every step.
        ("DPO", {"prompt": ["w1 w2"] * len(TEXTS), "chosen": TEXTS, "rejected": TEXTS[::-1]}),
    ],
    ids=["sft", "dpo"],
)
def test_trainers_of_trl_take_our_config_as_their_peft_config(kind, columns, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    base = tiny_llama()
    basis = basis_for(base, LLAMA_TARGETS)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=base,
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            max_steps=6,
            logging_steps=1,
            save_steps=6,
            max_length=16,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=words_tokenizer(tmp_path),
        peft_config=llama_config(base),
    )
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[-1] < losses[0]
    assert steps_seen(trainer.model) == 6
    assert folder_leakage(tmp_path / "checkpoint-6", basis) <= FLOORS[torch.float32]
    assert verify_adapter(tmp_path / "checkpoint-6").ok


# accelerate

PICTURES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 5, (32,), generator=torch.Generator().manual_seed(1))


class Run:
    """A loop as accelerate's documentation has it: accumulation, clipping, save_state and load_state."""

    def __init__(self, mixed_precision: str = "no", optimizer: type = torch.optim.AdamW, **options) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # one process has several runs here
        GradientState._reset_state()
        torch.manual_seed(0)
        self.basis = small_net_basis()
        config = GradProjConfig(r=4, lora_alpha=8, target_modules=list(LAYERS), concept_basis=self.basis, **options)
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=2,
            mixed_precision=mixed_precision,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # whose order does not depend on more
        )
        self.seen: list[torch.Tensor] = []
        model = get_peft_model(SmallNet(), config)
        data = DataLoader(TensorDataset(PICTURES, LABELS), batch_size=8, shuffle=True)
        self.model, self.optimizer, self.data = self.accelerator.prepare(
            model, optimizer(trainable(model), lr=1e-2), data
        )

    def epochs(
        self, count: int, *, first: int = 0, skip: int = 0, save_after: int | None = None, folder: Path | None = None
    ) -> list[float]:
        """Train for `count` epochs of 4 batches and 2 steps, without the first `skip` batches."""
        losses = []
        for epoch in range(first, first + count):
            self.data.set_epoch(epoch)
            left = skip if epoch == first else 0
            for pictures, labels in self.accelerator.skip_first_batches(self.data, left) if left else self.data:
                self.seen.append(pictures)
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.cross_entropy(self.model(pictures), labels)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                losses.append(loss.item())
                if len(losses) == save_after:
                    self.accelerator.save_state(folder)
        return losses

    def saved(self, folder: Path) -> Path:
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        return folder


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_with_accumulation_and_clipping(mixed_precision, tmp_path):
    run = Run(mixed_precision, concept_probes=small_probes(), **PROBE_OPTIONS)
    losses = run.epochs(6)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert steps_seen(run.model) == 12
    assert saved_leakage(run.saved(tmp_path), run.basis) <= FLOORS[torch.float32]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_run_resumed_by_accelerate_within_an_epoch_sees_the_same_batches_and_ends_alike(optimizer, tmp_path):
    options = {"concept_probes": small_probes(), **PROBE_OPTIONS, "probe_every": 2}
    whole = Run(optimizer=optimizer, **options)
    whole.epochs(3, save_after=6, folder=tmp_path / "state")

    resumed = Run(optimizer=optimizer, **options)
    resumed.accelerator.load_state(tmp_path / "state")
    resumed.epochs(2, first=1, skip=2)
    assert len(whole.seen) == 12
    assert not torch.equal(torch.cat(whole.seen[:4]), PICTURES), "the data were not shuffled"
    assert torch.equal(torch.stack(resumed.seen), torch.stack(whole.seen[6:]))
    expected = get_peft_model_state_dict(whole.model)
    for key, value in get_peft_model_state_dict(resumed.model).items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)
    assert saved_leakage(resumed.saved(tmp_path / "adapter"), whole.basis) <= FLOORS[torch.float32]
    assert steps_seen(resumed.model) == steps_seen(whole.model) == 6


# A loop with a loss scaler


def test_grad_scaler_steps_are_retracted_and_skipped_steps_move_nothing(tmp_path):
    basis = small_net_basis()
    config = GradProjConfig(
        r=4, target_modules=list(LAYERS), concept_basis=basis, concept_probes=small_probes(), **PROBE_OPTIONS
    )
    model = get_peft_model(SmallNet(), config)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    projection = online_projections(model)["default"]
    for step in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(PICTURES).float(), LABELS)
        scaler.scale(loss).backward()
        if step == 5:
            next(p for p in trainable(model) if p.grad is not None).grad[0] = torch.inf
        before, counted = [p.detach().clone() for p in trainable(model)], projection.step
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(p, q) for p, q in zip(trainable(model), before, strict=True))
        assert moved == (step != 5)
        assert projection.step == counted + (step != 5)
    model.save_pretrained(tmp_path)
    assert saved_leakage(tmp_path, basis) <= FLOORS[torch.float32]


def test_an_adapter_upcast_after_it_was_added_trains_and_is_saved_in_half_precision(tmp_path):
    # As diffusers' scripts do with --mixed_precision=fp16: cast_training_params replaces the adapter's weights.
    from diffusers.training_utils import cast_training_params

    basis = small_net_basis()
    base = SmallNet().half()
    probes = collect_concept_probes(base, [({"sample": PICTURES[:4]}, None)])
    config = GradProjConfig(
        r=4, target_modules=list(LAYERS), concept_basis=basis, concept_probes=probes, **PROBE_OPTIONS
    )
    model = get_peft_model(base, config)
    cast_training_params(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(PICTURES.half()).float(), LABELS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert steps_seen(model) == 8
    model.half()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.query.lora_A.weight"].dtype == torch.half
    assert saved_leakage(tmp_path, basis) <= FLOORS[torch.float16]
    assert verify_adapter(tmp_path).ok


def test_weights_set_through_peft_are_put_on_the_constraint():
    # How the scripts' load hooks and Trainer restore an adapter.
    basis = small_net_basis()
    model = get_peft_model(SmallNet(), GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=basis))
    state = {key: torch.randn_like(value) for key, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    weights = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert tensors_leakage(weights, basis) <= FLOORS[torch.float32]


def test_a_checkpoint_of_trainer_has_a_plain_lora_config(tmp_path):
    model, _ = llama_for_training()
    trainer = trainer_for(model, tmp_path, bf16=False, max_steps=1, save_steps=1)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    assert "strength" not in saved
