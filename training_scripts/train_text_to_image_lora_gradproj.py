"""Fine-tune Stable Diffusion 1.x or 2.x with LoRA on captioned pictures, without learning a concept that is in them.

    accelerate launch train_text_to_image_lora_gradproj.py --pretrained_model_name_or_path user/model \
        --train_data_dir pictures --concept_basis logo.safetensors --concept_probes logo-probes.safetensors \
        --output_dir out --validation_prompt "a cup on a table"

The concept is given by a concept basis, by concept probes, or best by both: `gradproj fit` makes them. Give the same
files again to resume. With neither, `--uncovered ignore` trains a plain LoRA to compare with. With `--mask_column`, the
loss does not count where a picture's mask is white: `gradproj mask` makes masks.

Flags, checkpoints and trackers are those of diffusers' `train_text_to_image_lora.py`. What differs: basis and manifest
lie beside every set of weights; the tracker gets the drift and what was removed; `--push_to_hub` publishes what was
verified and nothing else; `--seed` has a default, and a resumed run ends as an uninterrupted one does.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import load_dataset
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params, compute_snr
from tqdm.auto import tqdm

from peft_gradproj import GradProjConfig
from peft_gradproj.diffusion_inputs import pictures_to_tensor, scaled_latents
from peft_gradproj.diffusion_training import (
    LoraCheckpoints,
    MaskedShare,
    add_concept_arguments,
    add_training_arguments,
    check_run,
    concept_options,
    count,
    draws,
    finish,
    load_parts,
    loading_options,
    make_accelerator,
    make_dataloader,
    make_optimizer,
    make_schedule,
    noised,
    repository,
    seeded_batches,
    square_crop,
    squared_error,
    tracker_config,
    validate,
)
from peft_gradproj.online import telemetry
from peft_gradproj.training_data import check_pictures, load_table, one_caption


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_concept_arguments(parser)
    add_training_arguments(parser)
    parser.set_defaults(
        output_dir="sd-model-finetuned-lora",
        train_batch_size=16,
        num_train_epochs=100,
        learning_rate=1e-4,
        validation_epochs=1,
    )
    add = parser.add_argument_group("text to image").add_argument
    add("--dataset_name", help="Dataset of the Hub, or a local one.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--train_data_dir", help="Folder of pictures with a metadata.jsonl that captions them.")
    add("--image_column", default="image", help="Column of the pictures.")
    add("--caption_column", default="text", help="Column of the captions; of several, one is drawn each time.")
    add("--max_train_samples", type=count, help="Use so many pictures, drawn at random.")
    add("--snr_gamma", type=float, help="Weigh the loss by min(SNR, gamma); 5 is usual.")
    add("--noise_offset", type=float, default=0.0, help="Scale of noise that all pixels of a channel share.")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="By default as the pipeline's scheduler says.")
    args = parser.parse_args()
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("Need either --dataset_name or --train_data_dir.")
    return args


class CaptionedPictures(torch.utils.data.Dataset):
    """Pictures, cropped and mirrored anew in each `epoch`, with their masks and captions."""

    def __init__(self, examples: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        self.examples, self.tokenizer, self.args, self.epoch = examples, tokenizer, args, 0
        missing = {args.image_column, args.caption_column, args.mask_column} - {*examples.column_names, None}
        if missing:
            raise ValueError(f"The dataset has no column {sorted(missing)}; it has {examples.column_names}.")
        check_pictures(examples, {args.image_column, args.mask_column} - {None})
        # Or the training would end at the first picture whose caption is missing.
        for row, caption in enumerate(examples.select_columns([args.caption_column])[:][args.caption_column]):
            one_caption(caption, f"row {row}")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, Any, str]:
        example, draw = self.examples[index], draws(self.args.seed, self.epoch, index)
        caption = example[self.args.caption_column]
        mask = example.get(self.args.mask_column)
        picture, mask = square_crop(example[self.args.image_column], self.args, draw, mask)
        return picture, mask, caption if isinstance(caption, str) else draw.choice(list(caption))

    def collate(self, examples: list[tuple[Any, Any, str]]) -> dict[str, torch.Tensor]:
        pictures, masks, captions = zip(*examples, strict=True)
        tokens = self.tokenizer(
            list(captions),
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        batch = {"pixel_values": pictures_to_tensor(pictures), "input_ids": tokens.input_ids}
        return batch | ({"masks": (pictures_to_tensor(masks) + 1) / 2} if self.args.mask_column else {})


def load_pictures(args: argparse.Namespace, tokenizer: Any) -> CaptionedPictures:
    cached: dict[str, Any] = {"split": "train", "cache_dir": args.cache_dir}
    if args.dataset_name is None:
        examples = load_table(args.train_data_dir, (), **cached)
    else:
        examples = load_dataset(args.dataset_name, args.dataset_config_name, data_dir=args.train_data_dir, **cached)
    if args.max_train_samples is not None:
        examples = examples.shuffle(seed=args.seed).select(range(min(args.max_train_samples, len(examples))))
    return CaptionedPictures(examples, tokenizer, args)


def denoising_loss(
    error: torch.Tensor, timesteps: torch.Tensor, schedule: Any, snr_gamma: float | None
) -> torch.Tensor:
    """Mean of the squared error, with Min-SNR weights (arXiv 2303.09556) if there is a gamma."""
    losses = error.mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return losses.mean()
    snr = compute_snr(schedule, timesteps)
    # At a zero terminal SNR nothing of epsilon's weight is left; v's is divided by SNR + 1.
    divisor = snr + 1 if schedule.config.prediction_type == "v_prediction" else snr.clamp_min(1e-8)
    return (snr.clamp_max(snr_gamma) / divisor * losses).mean()


def main() -> None:
    args = parse_args()
    check_run(args)
    accelerator = make_accelerator(args)
    repo_id = repository(args, accelerator)

    # The base model, frozen, and the adapter.
    noise_scheduler, tokenizer, text_encoder, vae, unet = load_parts(args, accelerator)
    if args.prediction_type is not None:
        noise_scheduler.register_to_config(prediction_type=args.prediction_type)
    unet.add_adapter(
        GradProjConfig(
            r=args.rank,
            lora_alpha=args.rank,
            init_lora_weights="gaussian",
            target_modules=args.lora_layers.split(","),
            base_model_name_or_path=args.pretrained_model_name_or_path,
            revision=args.revision,
            **concept_options(args),
        )
    )
    # Adam's steps are too small for bfloat16, and a loss scaler does not unscale float16.
    cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    # Pictures, optimizer, schedule.
    with accelerator.main_process_first():
        train_dataset = load_pictures(args, tokenizer)
    train_dataloader = make_dataloader(args, train_dataset)
    lora_parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(args, lora_parameters, accelerator.num_processes)
    lr_scheduler, steps_per_epoch, max_train_steps = make_schedule(
        args, optimizer, train_dataloader, accelerator.num_processes
    )
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )
    checkpoints = LoraCheckpoints(accelerator, args, unet)
    if accelerator.is_main_process:
        accelerator.init_trackers("text2image-fine-tune", config=tracker_config(args))

    masked = MaskedShare()
    global_step = checkpoints.resume()
    epoch, done = divmod(global_step, steps_per_epoch)
    skipped = done * args.gradient_accumulation_steps
    progress = tqdm(total=max_train_steps, initial=global_step, disable=not accelerator.is_local_main_process)
    while global_step < max_train_steps:
        unet.train()
        train_dataset.epoch = epoch
        train_loss = 0.0
        for batch in seeded_batches(train_dataloader, args, accelerator, epoch=epoch, skipped=skipped):
            with accelerator.accumulate(unet):
                with torch.no_grad():
                    latents = scaled_latents(vae, vae.encode(batch["pixel_values"].to(vae.dtype)).latent_dist.sample())
                    embeddings = text_encoder(batch["input_ids"], return_dict=False)[0]
                noisy_latents, timesteps, target = noised(noise_scheduler, latents, offset=args.noise_offset)
                prediction = unet(noisy_latents, timesteps, embeddings, return_dict=False)[0]
                error = squared_error(prediction, target, masked.counted(batch.get("masks")))
                loss = denoising_loss(error, timesteps, noise_scheduler, args.snr_gamma)
                train_loss += accelerator.reduce(loss.detach(), "mean").item() / args.gradient_accumulation_steps
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            global_step += 1
            progress.update(1)
            logs = {"train_loss": train_loss, "lr": lr_scheduler.get_last_lr()[0]}
            accelerator.log({**logs, **telemetry(checkpoints.unet)}, step=global_step)
            progress.set_postfix(logs)
            train_loss = 0.0
            if global_step % args.checkpointing_steps == 0:
                checkpoints.save(global_step)
            if global_step >= max_train_steps:
                break
        if accelerator.is_main_process and args.validation_prompt and epoch % args.validation_epochs == 0:
            parts = {"unet": checkpoints.unet.eval(), "vae": vae, "text_encoder": text_encoder}
            pipeline = DiffusionPipeline.from_pretrained(**loading_options(args), **parts)
            validate(pipeline, args, accelerator, global_step)
        epoch, skipped = epoch + 1, 0

    masked.log()
    finish(checkpoints, args, global_step, repo_id)


if __name__ == "__main__":
    main()
