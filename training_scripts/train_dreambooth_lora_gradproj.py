"""DreamBooth with LoRA for Stable Diffusion 1.x or 2.x: learn a subject from a few pictures, and not a concept in them.

    accelerate launch train_dreambooth_lora_gradproj.py --pretrained_model_name_or_path user/model \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" \
        --with_prior_preservation --class_data_dir dogs --class_prompt "a photo of a dog" \
        --concept_basis logo.safetensors --concept_probes logo-probes.safetensors --output_dir out

The concept is given by a concept basis, by concept probes, or best by both: `gradproj fit` makes them. Give the same
files again to resume. With neither, `--uncovered ignore` trains a plain LoRA to compare with. With `--mask_column`,
`--instance_data_dir` is a folder as `gradproj mask` writes it, and the loss does not count where the masks are white.

With `--train_text_encoder`, the text encoder gets an adapter too, which is projected by the layers of the concept
basis whose names begin with `text_encoder.`. If the basis has none, the script ends with an error; with
`--uncovered warn` that adapter is trained without projection, the manifest says so, and the result does not verify.
Probes hold the embeddings of the text encoder as it was, so that they protect the UNet's adapter only.

Flags, checkpoints and trackers are those of diffusers' `train_dreambooth_lora.py`. What differs: basis and manifest
lie beside every set of weights; the tracker gets the drift and what was removed; `--push_to_hub` publishes what was
verified and nothing else; `--seed` has a default, and a resumed run ends as an uninterrupted one does.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params, free_memory
from peft import LoraConfig
from PIL import Image
from tqdm.auto import tqdm

from peft_gradproj import GradProjConfig
from peft_gradproj.diffusion_inputs import pictures_to_tensor, scaled_latents
from peft_gradproj.diffusion_training import (
    WEIGHT_DTYPES,
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
from peft_gradproj.training_data import check_pictures, load_table

TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_concept_arguments(parser)
    add_training_arguments(parser)
    parser.set_defaults(
        output_dir="lora-dreambooth-model",
        train_batch_size=4,
        num_train_epochs=1,
        learning_rate=5e-4,
        validation_epochs=50,
    )
    add = parser.add_argument_group("DreamBooth").add_argument
    add("--instance_data_dir", required=True, help="Folder of pictures of the subject.")
    add("--instance_prompt", required=True, help="Prompt with the identifier of the subject.")
    add("--with_prior_preservation", action="store_true", help="Keep what the model makes of the class.")
    add("--class_data_dir", help="Folder of pictures of the class.")
    add("--class_prompt", help="Prompt of the class.")
    add("--prior_loss_weight", type=float, default=1.0)
    add("--num_class_images", type=int, default=100, help="Sample pictures of the class until there are so many.")
    add("--sample_batch_size", type=count, default=4, help="Pictures of the class that are sampled at once.")
    add("--prior_generation_precision", choices=["no", "fp32", "fp16", "bf16"], help="By default fp16 on GPUs.")
    add("--train_text_encoder", action="store_true", help="Adapt the text encoder as well.")
    add("--lora_dropout", type=float, default=0.0)
    add("--tokenizer_max_length", type=count, help="By default the tokenizer's.")
    add("--lr_num_cycles", type=count, default=1, help="Restarts of the cosine_with_restarts schedule.")
    add("--lr_power", type=float, default=1.0, help="Of the polynomial schedule.")
    args = parser.parse_args()
    if args.with_prior_preservation and (args.class_data_dir is None or args.class_prompt is None):
        parser.error("--with_prior_preservation needs --class_data_dir and --class_prompt.")
    return args


def picture_files(folder: str) -> list[Path]:
    known = Image.registered_extensions()
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in known)


def sample_class_pictures(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Fill the folder of the class up with pictures that the base model paints."""
    folder = Path(args.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    missing = list(range(len(picture_files(args.class_data_dir)), args.num_class_images))
    accelerator.wait_for_everyone()
    if not missing:
        return
    default = torch.float32 if accelerator.device.type == "cpu" else torch.float16
    precisions = {None: default, "no": torch.float32, "fp32": torch.float32, **WEIGHT_DTYPES}
    pipeline = DiffusionPipeline.from_pretrained(**loading_options(args), safety_checker=None)
    pipeline.to(accelerator.device, precisions[args.prior_generation_precision])
    pipeline.set_progress_bar_config(disable=True)
    with accelerator.split_between_processes(missing) as numbers:
        for start in tqdm(range(0, len(numbers), args.sample_batch_size), desc="pictures of the class"):
            batch = numbers[start : start + args.sample_batch_size]
            generators = [torch.Generator().manual_seed(draws(args.seed, "class", n).getrandbits(63)) for n in batch]
            pictures = pipeline([args.class_prompt] * len(batch), generator=generators).images
            for number, picture in zip(batch, pictures, strict=True):
                digest = hashlib.sha1(picture.tobytes()).hexdigest()
                picture.save(folder / f"{number}-{digest}.png")
    del pipeline
    free_memory()
    accelerator.wait_for_everyone()


class Pictures(torch.utils.data.Dataset):
    """The pictures of a folder, with their masks if its metadata has a column of them."""

    def __init__(
        self, folder: str, args: argparse.Namespace, *, masked: bool = False, limit: int | None = None
    ) -> None:
        self.mask_column = args.mask_column if masked else None
        self.rows = None
        if self.mask_column:
            columns = ["image", self.mask_column]
            self.rows = load_table(folder, columns, cache_dir=args.cache_dir)
            check_pictures(self.rows, columns)
        self.files = picture_files(folder)[:limit] if self.rows is None else []
        if not len(self):
            raise ValueError(f"There is no picture in {folder}.")

    def __len__(self) -> int:
        return len(self.files) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        if self.rows is None:
            return Image.open(self.files[index]), None
        row = self.rows[index]
        return row["image"], row[self.mask_column]


class SubjectPictures(torch.utils.data.Dataset):
    """Pictures of the subject, and of the class beside them, cropped and mirrored anew in each `epoch`."""

    def __init__(self, tokenizer: Any, args: argparse.Namespace) -> None:
        self.args, self.epoch = args, 0
        self.kinds = [Pictures(args.instance_data_dir, args, masked=True)]
        prompts = [args.instance_prompt]
        if args.with_prior_preservation:
            self.kinds.append(Pictures(args.class_data_dir, args, limit=args.num_class_images))
            prompts.append(args.class_prompt)
        length = args.tokenizer_max_length or tokenizer.model_max_length
        options = {"max_length": length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.tokens = tokenizer(prompts, **options).input_ids

    def __len__(self) -> int:
        return max(map(len, self.kinds))

    def __getitem__(self, index: int) -> list[tuple[Image.Image, Image.Image]]:
        draw = draws(self.args.seed, self.epoch, index)
        chosen = [pictures[index % len(pictures)] for pictures in self.kinds]
        return [square_crop(picture, self.args, draw, mask) for picture, mask in chosen]

    def collate(self, examples: list[list[tuple[Image.Image, Image.Image]]]) -> dict[str, torch.Tensor]:
        """The subject's pictures, then those of the class."""
        pictures, masks = zip(*(pair for kind in zip(*examples, strict=True) for pair in kind), strict=True)
        tokens = self.tokens.repeat_interleave(len(examples), dim=0)
        batch = {"pixel_values": pictures_to_tensor(pictures), "input_ids": tokens}
        return batch | ({"masks": (pictures_to_tensor(masks) + 1) / 2} if self.args.mask_column else {})


def add_adapters(args: argparse.Namespace, unet: Any, text_encoder: Any) -> None:
    """Adapters for training, and in the UNet's config, which the manifest is made of, all that they let through."""
    lora = {
        "r": args.rank,
        "lora_alpha": args.rank,
        "lora_dropout": args.lora_dropout,
        "init_lora_weights": "gaussian",
        "base_model_name_or_path": args.pretrained_model_name_or_path,
        "revision": args.revision,
    }
    config = GradProjConfig(**lora, target_modules=args.lora_layers.split(","), **concept_options(args))
    if args.train_text_encoder:
        prefix, basis = "text_encoder.", config.concept_basis
        part = None if basis is None else basis.part(prefix)
        if part is not None:
            options = {**concept_options(args), "concept_basis": part, "concept_probes": None}
            text_config = GradProjConfig(**lora, target_modules=TEXT_ENCODER_LAYERS, **options)
            text_encoder.add_adapter(text_config)
            config.uncovered_parts += [f"{part} of the text encoder" for part in text_config.uncovered_parts]
        else:
            config.report_uncovered([f"the text encoder (no layer of a concept basis begins with '{prefix}')"])
            text_encoder.add_adapter(LoraConfig(**lora, target_modules=TEXT_ENCODER_LAYERS))
    unet.add_adapter(config)


def dreambooth_loss(error: torch.Tensor, prior_weight: float | None) -> torch.Tensor:
    """Mean of the squared error; with prior preservation, that of the second half of the batch is weighed and added."""
    if prior_weight is None:
        return error.mean()
    error, prior_error = error.chunk(2)
    return error.mean() + prior_weight * prior_error.mean()


def main() -> None:
    args = parse_args()
    check_run(args)
    accelerator = make_accelerator(args)
    repo_id = repository(args, accelerator)
    if args.with_prior_preservation:
        sample_class_pictures(args, accelerator)

    # The base model, frozen, and the adapters.
    noise_scheduler, tokenizer, text_encoder, vae, unet = load_parts(args, accelerator)
    add_adapters(args, unet, text_encoder)
    trained = [unet, text_encoder] if args.train_text_encoder else [unet]
    # Adam's steps are too small for bfloat16, and a loss scaler does not unscale float16.
    cast_training_params(trained, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            text_encoder.gradient_checkpointing_enable()

    # Pictures, optimizer, schedule.
    train_dataset = SubjectPictures(tokenizer, args)
    train_dataloader = make_dataloader(args, train_dataset)
    lora_parameters = [parameter for model in trained for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(args, lora_parameters, accelerator.num_processes)
    lr_scheduler, steps_per_epoch, max_train_steps = make_schedule(
        args, optimizer, train_dataloader, accelerator.num_processes, num_cycles=args.lr_num_cycles, power=args.lr_power
    )
    *trained, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        *trained, optimizer, train_dataloader, lr_scheduler
    )
    unet, text_encoder = trained[0], trained[-1] if args.train_text_encoder else text_encoder
    checkpoints = LoraCheckpoints(accelerator, args, *trained)
    if accelerator.is_main_process:
        accelerator.init_trackers("dreambooth-lora", config=tracker_config(args))

    masked = MaskedShare()
    global_step = checkpoints.resume()
    epoch, done = divmod(global_step, steps_per_epoch)
    skipped = done * args.gradient_accumulation_steps
    prior_weight = args.prior_loss_weight if args.with_prior_preservation else None
    progress = tqdm(total=max_train_steps, initial=global_step, disable=not accelerator.is_local_main_process)
    while global_step < max_train_steps:
        for model in trained:
            model.train()
        train_dataset.epoch = epoch
        train_loss = 0.0
        for batch in seeded_batches(train_dataloader, args, accelerator, epoch=epoch, skipped=skipped):
            with accelerator.accumulate(*trained):
                with torch.no_grad():
                    latents = scaled_latents(vae, vae.encode(batch["pixel_values"].to(vae.dtype)).latent_dist.sample())
                with torch.set_grad_enabled(args.train_text_encoder):
                    embeddings = text_encoder(batch["input_ids"], return_dict=False)[0]
                noisy_latents, timesteps, target = noised(noise_scheduler, latents)
                prediction = unet(noisy_latents, timesteps, embeddings.to(vae.dtype), return_dict=False)[0]
                error = squared_error(prediction, target, masked.counted(batch.get("masks")))
                loss = dreambooth_loss(error, prior_weight)
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
            logs = {"loss": train_loss, "lr": lr_scheduler.get_last_lr()[0]}
            accelerator.log({**logs, **telemetry(checkpoints.unet)}, step=global_step)
            progress.set_postfix(logs)
            train_loss = 0.0
            if global_step % args.checkpointing_steps == 0:
                checkpoints.save(global_step)
            if global_step >= max_train_steps:
                break
        if accelerator.is_main_process and args.validation_prompt and epoch % args.validation_epochs == 0:
            bare_text_encoder = accelerator.unwrap_model(text_encoder).eval()
            parts = {"unet": checkpoints.unet.eval(), "vae": vae, "text_encoder": bare_text_encoder}
            pipeline = DiffusionPipeline.from_pretrained(**loading_options(args), **parts)
            validate(pipeline, args, accelerator, global_step)
        epoch, skipped = epoch + 1, 0

    masked.log()
    finish(checkpoints, args, global_step, repo_id)


if __name__ == "__main__":
    main()
