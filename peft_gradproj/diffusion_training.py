"""What training scripts for latent diffusion models share, in the conventions of diffusers' own.

Flags and their names, the order of pictures and all that is drawn, noise, checkpoints, validation and publication. Used
by the scripts in `training_scripts/`, which hold the model and the loop.

Everything random is drawn from a seed of its own, which depends on the run's seed and on what it is for, and on nothing
that was drawn before: so that a resumed run ends as an uninterrupted one does.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .concepts import mask_levels, upright
from .config import GradProjConfig
from .diffusion_inputs import latent_weights, training_target
from .errors import AdapterFolderError, ConceptDataError, GradProjConfigError
from .files import checkpoint_step, saved_checkpoints
from .folder_swap import replaced_folder
from .hub import push_adapter_to_hub
from .online import ONLINE_OPTIONS, online_projections
from .saving import check_output, write_sidecars_of_weights
from .verification import verify_adapter

__all__ = [
    "LoraCheckpoints",
    "MaskedShare",
    "Parts",
    "Schedule",
    "add_concept_arguments",
    "add_training_arguments",
    "check_run",
    "concept_options",
    "count",
    "draws",
    "finish",
    "load_parts",
    "loading_options",
    "make_accelerator",
    "make_dataloader",
    "make_optimizer",
    "make_schedule",
    "noised",
    "repository",
    "seeded_batches",
    "square_crop",
    "squared_error",
    "tracker_config",
    "validate",
]

logger = logging.getLogger(__name__)

VALIDATION_STEPS = 30
WEIGHT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_IMAGES = "images"
_PROJECTION_OPTIONS = tuple(name for name in ONLINE_OPTIONS if name != "rule")


# Flags


def count(text: str) -> int:
    """A whole number above 0, for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: If it is another number.
        ValueError: If it is no number.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; expected a whole number above 0.")
    return number


def add_concept_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that diffusers' scripts do not have."""
    add = parser.add_argument_group("concept").add_argument
    add("--concept_basis", help="Concept basis: file, folder or Hub id.")
    add("--concept_probes", help="Concept probes: file, folder or Hub id.")
    add("--strength", type=float, help="Share of the concept that is removed; only 1 gives a guarantee.")
    add("--probe_every", type=count, help="A step is corrected every so many optimizer steps.")
    add("--probe_batch_size", type=count, help="Concept probes per correction, over all processes.")
    add("--restore", type=float, help="Share of the drift that a corrected step takes back.")
    add("--probe_history", type=count, help="So many recent half-spaces are satisfied by a correction.")
    add("--negative_guidance", type=float, help="How far past the base model's outputs those on probes are drawn.")
    add("--mask_column", help="Column of masks, white where the loss does not count; `gradproj mask` makes them.")
    add("--uncovered", choices=["error", "warn", "ignore"], default="error", help="About what is not projected.")
    parser.set_defaults(**{name: getattr(GradProjConfig, name) for name in _PROJECTION_OPTIONS})


def concept_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_concept_arguments` parsed, as arguments of `GradProjConfig`."""
    names = ("concept_basis", "concept_probes", *_PROJECTION_OPTIONS, "uncovered")
    return {name: getattr(args, name) for name in names}


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that diffusers' LoRA scripts have in common; give defaults of your own with `set_defaults`."""
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Folder or Hub id of the pipeline.")
    add("--revision", help="Branch, tag or commit of the pipeline.")
    add("--variant", help="Variant of the weights, such as fp16.")
    add("--cache_dir", help="Where downloads are kept.")
    add("--rank", type=count, default=4, help="Rank of the LoRA, and its alpha.")
    add("--lora_layers", default="to_k,to_q,to_v,to_out.0", help="Layers of the UNet to adapt, with commas.")
    add = parser.add_argument_group("pictures").add_argument
    add("--resolution", type=count, default=512, help="Side of the square that pictures are scaled and cropped to.")
    add("--center_crop", action="store_true", help="Crop in the centre, not at random.")
    add("--random_flip", action="store_true", help="Mirror half of the pictures.")
    add("--image_interpolation_mode", default="lanczos", choices=[m.name.lower() for m in Image.Resampling])
    add("--dataloader_num_workers", type=int, default=0, help="Processes that load pictures.")
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", help="Weights, checkpoints and logs.")
    add("--seed", type=int, default=0, help="Of the order of the pictures and of all that is drawn.")
    add("--train_batch_size", type=count, help="Pictures in a batch, per process.")
    add("--num_train_epochs", type=count)
    add("--max_train_steps", type=count, help="Optimizer steps; overrides --num_train_epochs.")
    add("--gradient_accumulation_steps", type=count, default=1)
    add("--gradient_checkpointing", action="store_true", help="Save memory at the cost of time.")
    add("--learning_rate", type=float)
    add("--scale_lr", action="store_true", help="Scale the learning rate by the size of the joined batch.")
    add("--lr_scheduler", default="constant", help="As diffusers' get_scheduler calls them.")
    add("--lr_warmup_steps", type=int, default=500)
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default as accelerate is configured.")
    add("--allow_tf32", action="store_true")
    add("--checkpointing_steps", type=count, default=500, help="Save the training state every so many steps.")
    add("--checkpoints_total_limit", type=count, help="Keep so many checkpoints, the latest.")
    add("--resume_from_checkpoint", help="Name of a checkpoint in --output_dir, or latest.")
    add = parser.add_argument_group("validation, logs and the Hub").add_argument
    add("--validation_prompt", help="Prompt that is sampled during the training and at its end.")
    add("--num_validation_images", type=int, default=4)
    add("--validation_epochs", type=count, help="Sample every so many epochs.")
    add("--report_to", default="tensorboard", help="Tracker: tensorboard, wandb, comet_ml, all, none.")
    add("--logging_dir", default="logs", help="Folder of the tracker's logs, in --output_dir.")
    add("--push_to_hub", action="store_true", help="Publish the verified adapter at the end.")
    add("--hub_token", help="Token of the Hub; by default the one that is logged in with.")
    add("--hub_model_id", help="Repository; by default the name of --output_dir.")


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline, as arguments of `from_pretrained` of it and of its parts."""
    return {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "variant": args.variant,
        "cache_dir": args.cache_dir,
    }


def _without_variant(args: argparse.Namespace) -> dict[str, Any]:
    """The same, for what has no weights."""
    return {name: value for name, value in loading_options(args).items() if name != "variant"}


# Set-up


def check_run(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded or made, what would end the run in its training or after it.

    Raises:
        AdapterFolderError: If the output folder holds a concept basis, and none is given.
        GradProjConfigError: If the base model is another pipeline than a `StableDiffusionPipeline`.
        OSError: If there is no pipeline.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    if args.concept_basis is None:
        check_output(args.output_dir)
    kind = DiffusionPipeline.load_config(**_without_variant(args)).get("_class_name")
    if kind != StableDiffusionPipeline.__name__:
        raise GradProjConfigError(
            f"{args.pretrained_model_name_or_path} is a {kind}; expected a StableDiffusionPipeline, of Stable "
            "Diffusion 1.x or 2.x. Train others with diffusers' own script for them, run by `gradproj launch`."
        )


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """An accelerator whose data loaders shuffle by the seed and the epoch alone; logging and seeds are set up too.

    Raises:
        GradProjConfigError: If there is a token on the command line, and a tracker that may record it.
    """
    if args.hub_token is not None and args.report_to not in ("none", "tensorboard"):
        raise GradProjConfigError(
            f"--hub_token would be logged by --report_to {args.report_to}, since some trackers record the command "
            "line. Log in with `hf auth login`, or set HF_TOKEN, instead."
        )
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=level)
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return accelerator


def tracker_config(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that trackers may write down: all but tokens."""
    return {name: value for name, value in vars(args).items() if not name.endswith("_token")}


def repository(args: argparse.Namespace, accelerator: Accelerator) -> str | None:
    """The repository to publish to, made before the training, so that a wrong token or name shows at once."""
    if not args.push_to_hub or not accelerator.is_main_process:
        return None
    from huggingface_hub import create_repo

    name = args.hub_model_id or Path(args.output_dir).name
    return create_repo(name, exist_ok=True, token=args.hub_token).repo_id


def make_optimizer(args: argparse.Namespace, parameters: list[nn.Parameter], processes: int) -> torch.optim.Optimizer:
    """AdamW over `parameters`, with the learning rate scaled to the joined batch if so asked."""
    scale = args.gradient_accumulation_steps * args.train_batch_size * processes if args.scale_lr else 1
    kind: Any = torch.optim.AdamW
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as kind
    betas = (args.adam_beta1, args.adam_beta2)
    return kind(parameters, args.learning_rate * scale, betas, args.adam_epsilon, args.adam_weight_decay)


class Parts(NamedTuple):
    """The parts of Stable Diffusion that a training takes."""

    schedule: Any
    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any


def load_parts(args: argparse.Namespace, accelerator: Accelerator) -> Parts:
    """The base model, frozen, on the device and in the dtype of the mixed precision."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    loading, without_weights = loading_options(args), _without_variant(args)
    parts = Parts(
        DDPMScheduler.from_pretrained(**without_weights, subfolder="scheduler"),
        CLIPTokenizer.from_pretrained(**without_weights, subfolder="tokenizer"),
        CLIPTextModel.from_pretrained(**loading, subfolder="text_encoder"),
        AutoencoderKL.from_pretrained(**loading, subfolder="vae"),
        UNet2DConditionModel.from_pretrained(**loading, subfolder="unet"),
    )
    for model in (parts.text_encoder, parts.vae, parts.unet):
        model.requires_grad_(False).to(accelerator.device, dtype=_base_dtype(accelerator))
    return parts


def _base_dtype(accelerator: Accelerator) -> torch.dtype:
    return WEIGHT_DTYPES.get(accelerator.mixed_precision, torch.float32)


def make_dataloader(args: argparse.Namespace, dataset: Any) -> DataLoader:
    """Shuffled batches of a data set that has `collate`."""
    return DataLoader(
        dataset,
        shuffle=True,
        collate_fn=dataset.collate,
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
    )


class Schedule(NamedTuple):
    """How long a training is, and its learning rates."""

    lr_scheduler: Any
    steps_per_epoch: int
    max_train_steps: int


def make_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, dataloader: DataLoader, processes: int, **options: Any
) -> Schedule:
    """Count optimizer steps, and make the schedule of learning rates over them.

    Args:
        args: The flags.
        optimizer: Whose learning rates are scheduled.
        dataloader: As it was before `accelerator.prepare`.
        processes: So many share its batches.
        **options: Further arguments of diffusers' `get_scheduler`.
    """
    from diffusers.optimization import get_scheduler

    steps_per_epoch = math.ceil(math.ceil(len(dataloader) / processes) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * processes,
        num_training_steps=max_train_steps * processes,
        **options,
    )
    return Schedule(lr_scheduler, steps_per_epoch, max_train_steps)


# What is drawn


def seeded_batches(
    dataloader: Any, args: argparse.Namespace, accelerator: Accelerator, *, epoch: int, skipped: int
) -> Iterator[Any]:
    """The batches of an epoch after the first `skipped`, with a seed of its own set before each.

    So a resumed run draws what an uninterrupted one does.
    """
    dataloader.set_epoch(epoch)
    batches = skip_first_batches(dataloader, skipped) if skipped else dataloader
    for position, batch in enumerate(batches, start=skipped):
        torch.manual_seed(draws(args.seed, epoch, position, accelerator.process_index).getrandbits(63))
        yield batch


def draws(*key: object) -> random.Random:
    """Random numbers that depend on nothing but `key`."""
    return random.Random(" ".join(map(str, key)))


def square_crop(
    picture: Image.Image, args: argparse.Namespace, draw: random.Random, mask: Image.Image | None = None
) -> tuple[Image.Image, Image.Image]:
    """A picture and its mask, scaled and cropped to the resolution's square, perhaps mirrored, as the flags say.

    Args:
        picture: Turned upright by its EXIF orientation.
        args: The flags.
        draw: What place and mirroring are drawn from.
        mask: White where the loss does not count, of the upright picture's size; by default it counts everywhere.

    Returns:
        The picture, RGB, and the mask, L.

    Raises:
        ConceptDataError: If the mask's levels are 0 and 1, which would mask next to nothing.
        ValueError: If picture and mask have different sizes.
    """
    place = (0.5, 0.5) if args.center_crop else (draw.random(), draw.random())
    mirrored = args.random_flip and draw.random() < 0.5
    whole = upright(picture, "RGB")
    mask = Image.new("L", whole.size) if mask is None else _levels(mask)
    if mask.size != whole.size:
        raise ValueError(f"A picture of {whole.size} has a mask of {mask.size}; expected the same size.")
    # A filter that overshoots would leave specks in masks.
    methods = (Image.Resampling[args.image_interpolation_mode.upper()], Image.Resampling.BILINEAR)
    squares = [
        ImageOps.fit(image, (args.resolution, args.resolution), method=method, centering=place)
        for image, method in zip((whole, mask), methods, strict=True)
    ]
    square, mask_square = map(ImageOps.mirror, squares) if mirrored else squares
    return square, mask_square


def _levels(mask: Image.Image) -> Image.Image:
    """A mask as it is looked at, mode L."""
    levels = mask_levels(mask)
    # Of more than 8 bits as they are: converted, all of them may be 0.
    brightest = float(np.asarray(mask if mask.mode[0] in "FI" else levels).max())
    if 0 < brightest <= 1:
        raise ConceptDataError(
            f"the brightest level of a mask is {brightest:.2g}, so that it masks next to nothing; expected levels from "
            "0 to 255, white where the loss does not count. Multiply masks of 0 and 1 by 255."
        )
    return levels


class MaskedShare:
    """The mean share of the pictures that masks took out of the loss of a run."""

    def __init__(self) -> None:
        self._sum: float | Tensor = 0.0
        self._batches = 0

    def counted(self, masks: Tensor | None) -> Tensor | None:
        """The masks of a batch, as they were given, after they were counted."""
        if masks is not None:
            self._sum, self._batches = self._sum + masks.mean(), self._batches + 1
        return masks

    def log(self) -> None:
        """Say once how large it was, if there were masks; and warn if nothing was masked."""
        if not self._batches:
            return
        said = f"masks applied in {self._batches} batches; mean masked share {float(self._sum) / self._batches:.1%}"
        if self._sum:
            logger.info(said)
        else:
            logger.warning(f"{said}: all were black. Is it the right column?")


def squared_error(prediction: Tensor, target: Tensor, masks: Tensor | None = None) -> Tensor:
    """What a loss is the mean of, float32, shape `(b, C, h, w)` of both.

    Args:
        prediction: The model's.
        target: What it should have been.
        masks: In [0, 1], shape `(b, 1, H, W)`, H and W those of the pictures: where the error does not count, so that
            it is 0; a latent counts as little as any of its pixels.

    Raises:
        ConceptDataError: If the masks have another shape.
    """
    error = (prediction.float() - target.float()).square()
    if masks is None:
        return error
    if masks.ndim != 4 or masks.shape[:2] != (len(error), 1):
        # Without the second dimension, masks of as many pictures as latents have channels would be taken for theirs.
        raise ConceptDataError(
            f"masks have shape {tuple(masks.shape)}; expected ({len(error)}, 1, H, W), one of a single channel for "
            "each of the pictures. Add the channel with masks[:, None] where it is missing."
        )
    return (1 - latent_weights(masks, (error.shape[-2], error.shape[-1]), dilation=0)) * error


def noised(schedule: Any, latents: Tensor, *, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw noise and timesteps for a batch.

    Args:
        schedule: A scheduler of diffusers with `add_noise` and `get_velocity`.
        latents: Shape `(b, C, h, w)`.
        offset: Scale of noise that all pixels of a channel share.

    Returns:
        The noised latents, the timesteps with shape `(b,)`, and what the model is to predict, shaped as the latents.
    """
    noise = torch.randn_like(latents)
    noise = noise + offset * torch.randn_like(noise[:, :, :1, :1])
    timesteps = torch.randint(schedule.config.num_train_timesteps, latents.shape[:1], device=latents.device)
    kind = schedule.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"Unknown prediction type {kind}; expected epsilon or v_prediction.")
    target = training_target(schedule, latents, noise, timesteps)
    return schedule.add_noise(latents, noise, timesteps), timesteps, target


# Checkpoints


class LoraCheckpoints:
    """Saves and restores a run under accelerate: LoRA weights as diffusers loads them, with basis and manifest.

    Args:
        accelerator: What has prepared the models.
        args: The flags.
        unet: Its adapter's config is what the manifest is about.
        text_encoder: Where it is trained too.
    """

    def __init__(
        self, accelerator: Accelerator, args: argparse.Namespace, unet: nn.Module, text_encoder: nn.Module | None = None
    ) -> None:
        self.accelerator, self.args = accelerator, args
        self.unet = accelerator.unwrap_model(unet, keep_torch_compile=False)
        self.text_encoder = None
        if text_encoder is not None:
            self.text_encoder = accelerator.unwrap_model(text_encoder, keep_torch_compile=False)
        accelerator.register_save_state_pre_hook(self._save_hook)
        accelerator.register_load_state_pre_hook(self._load_hook)
        for projection in online_projections(self.unet).values():
            accelerator.register_for_checkpointing(projection)

    def save_weights(self, folder: str) -> None:
        """Write LoRA weights, basis and manifest; that the last two cannot be is a warning."""
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        models = {"unet": self.unet, "text_encoder": self.text_encoder}
        layers = {
            f"{name}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
            for name, model in models.items()
            if model is not None
        }
        StableDiffusionPipeline.save_lora_weights(folder, **layers)
        write_sidecars_of_weights(self.unet.peft_config["default"], folder)

    def _save_hook(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        weights.clear()  # those of the whole models, which accelerate would save
        if self.accelerator.is_main_process:
            self.save_weights(output_dir)

    def _load_hook(self, models: list[nn.Module], input_dir: str) -> None:
        from diffusers import StableDiffusionPipeline
        from diffusers.training_utils import _set_state_dict_into_text_encoder
        from diffusers.utils import convert_unet_state_dict_to_peft
        from peft.utils import set_peft_model_state_dict

        models.clear()
        state, _ = StableDiffusionPipeline.lora_state_dict(input_dir)
        layers = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
        set_peft_model_state_dict(self.unet, convert_unet_state_dict_to_peft(layers))
        if self.text_encoder is not None:
            _set_state_dict_into_text_encoder(state, prefix="text_encoder.", text_encoder=self.text_encoder)

    def save(self, step: int) -> None:
        """Write `checkpoint-{step}`, in all processes, and remove the oldest beyond the limit.

        It has another name until it is whole, so that none is resumed from that was cut off.
        """
        stage = Path(self.args.output_dir, "unfinished-checkpoint")
        if self.accelerator.is_main_process:
            shutil.rmtree(stage, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(stage))
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        with replaced_folder(Path(self.args.output_dir, f"checkpoint-{step}")) as empty:
            empty.rmdir()
            stage.rename(empty)
        if self.args.checkpoints_total_limit is not None:
            for old in saved_checkpoints(self.args.output_dir)[: -self.args.checkpoints_total_limit]:
                shutil.rmtree(old)

    def resume(self) -> int:
        """Load what `--resume_from_checkpoint` says, if anything; the number of steps that were done.

        Raises:
            GradProjConfigError: If there is no checkpoint of that name, or it has concept probes and this run has none,
                or the other way round.
        """
        name = self.args.resume_from_checkpoint
        if not name:
            return 0
        saved = saved_checkpoints(self.args.output_dir)
        found = saved[-1:] if name == "latest" else [path for path in saved if path.name == Path(name).name]
        if not found and name != "latest":
            names = ", ".join(path.name for path in saved) or "none"
            raise GradProjConfigError(
                f"there is no checkpoint '{name}' in {self.args.output_dir}; expected latest, or one of these: {names}."
            )
        if not found:
            logger.warning(f"no checkpoint in {self.args.output_dir}: starting anew")
            return 0
        # The state of the online projection; accelerate would not say what it misses.
        had_probes = any(found[0].glob("custom_checkpoint_*.pkl"))
        if had_probes != bool(online_projections(self.unet)):
            fault, cure = ("with", "give them again") if had_probes else ("without", "leave them out")
            raise GradProjConfigError(
                f"{found[0]} was written {fault} --concept_probes; {cure}, or start anew in another --output_dir."
            )
        logger.info(f"resuming from {found[0]}")
        self.accelerator.load_state(str(found[0]))
        return checkpoint_step(found[0])


# Validation, publication


def validate(
    pipeline: Any, args: argparse.Namespace, accelerator: Accelerator, step: int, phase: str = "validation"
) -> list[Image.Image]:
    """Sample the validation prompt, show the pictures to the trackers, and return them."""
    pipeline = pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(device=accelerator.device).manual_seed(args.seed)
    dtype = WEIGHT_DTYPES.get(accelerator.mixed_precision)
    with torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None):
        pictures = [
            pipeline(args.validation_prompt, num_inference_steps=VALIDATION_STEPS, generator=generator).images[0]
            for _ in range(args.num_validation_images)
        ]
    for tracker in accelerator.trackers:
        if pictures and tracker.name == "tensorboard":
            tracker.writer.add_images(phase, np.stack([np.asarray(p) for p in pictures]), step, dataformats="NHWC")
        elif pictures and tracker.name == "wandb":
            tracker.log_images({phase: pictures}, step=step)
    return pictures


def finish(checkpoints: LoraCheckpoints, args: argparse.Namespace, step: int, repo_id: str | None) -> None:
    """Save the adapter, verify it, sample from it as everybody loads it, and publish it if so asked."""
    from diffusers import DiffusionPipeline

    accelerator = checkpoints.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoints.save_weights(args.output_dir)
        try:
            logger.info(f"{verify_adapter(args.output_dir)}")
        except AdapterFolderError as error:
            # Without a manifest, of which there was a warning, the adapter can still be sampled from.
            logger.warning(f"the adapter cannot be verified: {error}")
        pictures: list[tuple[str, Path]] = []
        if args.validation_prompt and args.num_validation_images:
            pipeline = DiffusionPipeline.from_pretrained(**loading_options(args))
            # Of a base model in half precision, text encoders come in it, and the UNet does not.
            pipeline.to(dtype=_base_dtype(accelerator))
            pipeline.load_lora_weights(args.output_dir)
            Path(args.output_dir, _IMAGES).mkdir(exist_ok=True)
            for number, picture in enumerate(validate(pipeline, args, accelerator, step, phase="test")):
                path = Path(args.output_dir, _IMAGES, f"image_{number}.png")
                picture.save(path)
                pictures.append((args.validation_prompt, path))
        if repo_id is not None:
            published = push_adapter_to_hub(args.output_dir, repo_id, token=args.hub_token, images=pictures)
            logger.info(f"published: {published.url}")
    accelerator.end_training()
