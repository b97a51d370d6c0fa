r"""How each family of diffusion pipelines turns pictures, prompts and noise into its denoiser's arguments.

| family | pipeline | denoiser | noised latents | target of the loss |
|---|---|---|---|---|
| `sd` | Stable Diffusion 1.x, 2.x | `unet` | :math:`\alpha_t z + \sigma_t \epsilon` | as the scheduler predicts |
| `sdxl` | Stable Diffusion XL | `unet` | the same | the same |
| `sd3` | Stable Diffusion 3, 3.5 | `transformer` | :math:`(1 - \sigma) z + \sigma \epsilon` | :math:`\epsilon - z` |

What a denoiser is called with is what the pipeline itself calls it with, and what diffusers' training scripts do.
Batches are flat mappings: a name with a dot is an entry of a nested argument, as in
:class:`~peft_gradproj.ConceptProbes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from .diffusion_inputs import encode_images, encode_prompts, noise_schedule, training_target
from .errors import ConceptDataError
from .model_arguments import place_arguments
from .probes import call_model, placement
from .training_data import Frame, first_line

__all__ = [
    "FAMILIES",
    "PictureEncoder",
    "PipelineFamily",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "check_vae",
    "checked_resolution",
    "load_encoder",
    "load_pipeline",
]


class PipelineFamily(ABC):
    """A pipeline, seen as a way to make its denoiser's arguments.

    Args:
        pipeline: Of the family's class, with all its components.

    Raises:
        ConceptDataError: If a component is missing, or is of a kind whose inputs are not known here.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    """Its name in diffusers."""
    component: ClassVar[str]
    """The attribute of the pipeline that is the denoiser, which LoRA adapts."""
    sample: ClassVar[str]
    """The denoiser's argument for noised latents."""
    target_modules: ClassVar[tuple[str, ...]]
    """What diffusers' training scripts adapt by default."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        missing = [name for name in ("vae", self.component, "scheduler") if getattr(pipeline, name, None) is None]
        if missing:
            raise ConceptDataError(f"the pipeline has no {', '.join(missing)}; load it with all its components.")
        vae = pipeline.vae.config
        check_vae(vae)
        channels = self.denoiser.config["in_channels"]
        if channels != vae.latent_channels:
            raise ConceptDataError(
                f"the {self.component} takes {channels} channels and the VAE gives {vae.latent_channels}: a pipeline "
                "that is given further pictures, as for inpainting, is not supported."
            )
        self._check()

    @staticmethod
    def of(pipeline: Any) -> PipelineFamily:
        """The family of a pipeline.

        Raises:
            ConceptDataError: If it belongs to none.
        """
        import diffusers

        for family in FAMILIES:
            if isinstance(pipeline, getattr(diffusers, family.pipeline_class)):
                return family(pipeline)
        raise ConceptDataError(
            f"a {type(pipeline).__name__} is of no family that is known here ({_known()}). For other models give "
            "batches of their inputs to fit_concept_basis and collect_concept_probes yourself."
        )

    @property
    def denoiser(self) -> Any:
        """The model that is adapted."""
        return getattr(self.pipeline, self.component)

    @property
    def resolution(self) -> int:
        """The side of the pictures that the pipeline makes by default, in pixels."""
        size = self.denoiser.config["sample_size"]
        return int(size if isinstance(size, int) else min(size)) * int(self.pipeline.vae_scale_factor)

    @property
    def resolution_step(self) -> int:
        """Sides of pictures are a multiple of this, in pixels."""
        return int(self.pipeline.vae_scale_factor) * int(self.denoiser.config.get("patch_size") or 1)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's output, shape `(n, C, h, w)`, on a batch with names and numbers as they are in probes."""
        return call_model(model, self.placed(inputs))

    def placed(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """A batch as the denoiser takes it: nested, on its device, in its dtype, which timesteps never take."""
        return place_arguments(inputs, *placement(self.denoiser))

    def latents(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Latents as the denoiser sees them, float32 on the CPU, shape `(n, C, h, w)`."""
        return encode_images(self.pipeline, pictures, batch_size=4).cpu()

    def inputs(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> dict:
        """Arguments for latents `(n, C, h, w)`, noise of that shape, timesteps `(n,)` and :meth:`conditions`."""
        return {self.sample: self.noised(latents, noise, timesteps), "timestep": timesteps, **conditions}

    def reads(self, prompt: str) -> bool:
        """Whether the first text encoder reads a prompt to its end."""
        tokens = self.pipeline.tokenizer
        # Cut one token later than it is read, so that nothing longer is made, nor warned of.
        return len(tokens(prompt, truncation=True, max_length=tokens.model_max_length + 1).input_ids) <= (
            tokens.model_max_length
        )

    @abstractmethod
    def conditions(self, prompts: Sequence[str], frames: Sequence[Frame]) -> dict[str, Tensor]:
        """What the denoiser is told beside latents and timestep, float32 on the CPU, each of shape `(n, *)`."""

    @abstractmethod
    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps for training, uniform over the training schedule, as the denoiser takes them, shape `(count,)`."""

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at their timesteps."""

    @abstractmethod
    def loss_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is trained to answer."""

    @abstractmethod
    def _check(self) -> None:
        """Refuse what only looks like a pipeline of the family."""

    def _encode(self, prompts: Sequence[str], count: int) -> tuple[Tensor, ...]:
        """The first `count` kinds of embeddings without those of a negative prompt, as the pipeline makes them."""
        with torch.no_grad():
            made = self.pipeline.encode_prompt(
                prompt=list(prompts),
                device=self.denoiser.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                **dict.fromkeys(self._further_prompts),
            )
        return tuple(x.float().cpu() for x in made[: 2 * count : 2])

    _further_prompts: ClassVar[tuple[str, ...]] = ()
    """Arguments of `encode_prompt` that the first prompt fills where they are `None`."""


class _DiscreteSchedule(PipelineFamily):
    """Families whose schedule has a fixed number of steps, and a type of prediction."""

    component = "unet"
    sample = "sample"
    target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def _check(self) -> None:
        config = self.pipeline.scheduler.config
        if "beta_schedule" not in config:
            raise ConceptDataError(
                f"the pipeline's scheduler is a {type(self.pipeline.scheduler).__name__}; expected one with a schedule "
                "of betas, such as DDPMScheduler."
            )
        self.schedule = noise_schedule(self.pipeline)
        if self.schedule.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ConceptDataError(f"predictions of type {self.schedule.config.prediction_type!r} are not supported.")
        if self.denoiser.config.get("time_cond_proj_dim") is not None:
            raise ConceptDataError("the UNet is told the guidance scale (LCM); fit its base model instead.")

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.schedule.config.num_train_timesteps, (count,), generator=generator)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.add_noise(latents, noise, timesteps)

    def loss_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return training_target(self.schedule, latents, noise, timesteps)


class StableDiffusion(_DiscreteSchedule):
    """Stable Diffusion 1.x and 2.x."""

    name = "sd"
    pipeline_class = "StableDiffusionPipeline"

    def _check(self) -> None:
        super()._check()
        config = self.denoiser.config
        takes_classes = config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None
        # "text" makes one more embedding of the prompt's own, and asks for nothing.
        if takes_classes or config.get("addition_embed_type") not in (None, "text"):
            raise ConceptDataError("the UNet takes conditions that StableDiffusionPipeline does not give it.")

    def conditions(self, prompts: Sequence[str], frames: Sequence[Frame]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": encode_prompts(self.pipeline, prompts).cpu()}


class StableDiffusionXL(_DiscreteSchedule):
    """Stable Diffusion XL, the base model: it is also told a pooled embedding and how the picture was cropped."""

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    _further_prompts = ("prompt_2",)

    def _check(self) -> None:
        super()._check()
        if self.denoiser.config.get("addition_embed_type") != "text_time":
            raise ConceptDataError(
                f"the UNet has addition_embed_type={self.denoiser.config.get('addition_embed_type')!r}; expected "
                "'text_time', as of Stable Diffusion XL."
            )

    def conditions(self, prompts: Sequence[str], frames: Sequence[Frame]) -> dict[str, Tensor]:
        embeddings, pooled = self._encode(prompts, 2)
        return {
            "encoder_hidden_states": embeddings,
            "added_cond_kwargs.text_embeds": pooled,
            "added_cond_kwargs.time_ids": torch.tensor([frame.time_ids for frame in frames], dtype=torch.float32),
        }


class StableDiffusion3(PipelineFamily):
    """Stable Diffusion 3 and 3.5: flow matching with a transformer."""

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    component = "transformer"
    sample = "hidden_states"
    target_modules = (
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
    )
    _further_prompts = ("prompt_2", "prompt_3")

    def _check(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = self.pipeline.scheduler
        if not type(scheduler).__name__.startswith("FlowMatch"):
            raise ConceptDataError(
                f"the pipeline's scheduler is a {type(scheduler).__name__}; expected one of flow matching, such as "
                "FlowMatchEulerDiscreteScheduler."
            )
        # A fresh one: sampling shortens the schedule of the pipeline's own.
        self.schedule = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def conditions(self, prompts: Sequence[str], frames: Sequence[Frame]) -> dict[str, Tensor]:
        embeddings, pooled = self._encode(prompts, 2)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return self.schedule.timesteps[torch.randint(len(self.schedule.timesteps), (count,), generator=generator)]

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = (timesteps / self.schedule.config.num_train_timesteps).to(latents)[:, None, None, None]
        return (1 - sigmas) * latents + sigmas * noise

    def loss_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents


@dataclass(frozen=True)
class PictureEncoder:
    """The part of a pipeline that makes latents of pictures."""

    vae: Any
    resolution: int
    """The side of the pictures that the pipeline makes by default, in pixels."""
    resolution_step: int
    """Sides of pictures are a multiple of this, in pixels."""

    @classmethod
    def of(cls, pipeline: Any) -> PictureEncoder:
        """That of a pipeline.

        Raises:
            ConceptDataError: If it belongs to no family that is known here.
        """
        family = PipelineFamily.of(pipeline)
        return cls(pipeline.vae, family.resolution, family.resolution_step)

    def latents(self, pictures: Sequence[Image.Image], *, batch_size: int = 4) -> Tensor:
        """Latents as the denoiser sees them, float32, on the VAE's device, shape `(n, C, h, w)`."""
        return encode_images(self, pictures, batch_size=batch_size)


def checked_resolution(pipeline: PipelineFamily | PictureEncoder, resolution: int | None) -> int:
    """The side of pictures that was asked for, or the pipeline's own.

    Raises:
        ConceptDataError: If the pipeline has no latents of it.
    """
    side, step = resolution or pipeline.resolution, pipeline.resolution_step
    if side < step or side % step:
        raise ConceptDataError(f"a resolution of {side} does not fit the pipeline; expected a multiple of {step}.")
    return side


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FAMILIES: tuple[type[PipelineFamily], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3)


def load_pipeline(
    path_or_id: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | None = None,
) -> Any:
    """Load a pipeline from a folder or the Hub; from safetensors only, and no code of the repository is run.

    Args:
        path_or_id: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        variant: Of the weights, such as `fp16`.
        dtype: `float32`, `bfloat16` or `float16`, of all but the VAE, which keeps float32: some overflow in half.
        device: Where to; a GPU of CUDA if there is one.

    Raises:
        ConceptDataError: If there is no such pipeline, it is of no known family, or the dtype is none of these.
    """
    from diffusers import DiffusionPipeline

    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ConceptDataError(f"dtype={dtype!r}; expected one of {', '.join(_DTYPES)}.")
        dtype = _DTYPES[dtype]
    index, _ = _read_index(path_or_id, revision)
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    options |= {"variant": variant, "use_safetensors": True}
    if dtype != torch.float32:
        options["torch_dtype"] = dtype
    # A pipeline that was saved without a part, such as Stable Diffusion 3 without T5, is loaded without it.
    options |= {name: None for name, kind in index.items() if isinstance(kind, list | tuple) and kind[0] is None}
    if index["_class_name"] == StableDiffusion.pipeline_class:
        # Nothing is sampled, so that there is nothing to check.
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = DiffusionPipeline.from_pretrained(path_or_id, **options)
    except (OSError, ValueError, RuntimeError, TypeError, ImportError) as error:
        raise ConceptDataError(f"the pipeline {path_or_id} cannot be loaded: {first_line(error)}") from error
    for name, part in pipeline.components.items():
        wanted = torch.float32 if name == "vae" else dtype
        # Parts that were saved in another dtype come in that one, whatever is asked for.
        if isinstance(part, nn.Module) and getattr(part, "dtype", wanted) != wanted:
            part.to(wanted)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device or _default_device())


def load_encoder(
    path_or_id: str, *, revision: str | None = None, variant: str | None = None, device: str | None = None
) -> PictureEncoder:
    """Load what makes latents of pictures from a pipeline's folder or Hub id, and no more; arguments as above.

    Raises:
        ConceptDataError: If there is no such pipeline, it is of no known family, or its VAE is of no known kind.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    index, family = _read_index(path_or_id, revision)
    kind = (index.get("vae") or [None, None])[1]
    if kind != "AutoencoderKL":
        raise ConceptDataError(f"the VAE of {path_or_id} is a {kind}; expected an AutoencoderKL.")
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        # Only the class's reader of `config.json` is used, which is the same for every kind of denoiser.
        denoiser = UNet2DConditionModel.load_config(path_or_id, subfolder=family.component, **options)
        options |= {"variant": variant, "use_safetensors": True, "torch_dtype": torch.float32}
        vae = AutoencoderKL.from_pretrained(path_or_id, subfolder="vae", **options)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ConceptDataError(f"the VAE of {path_or_id} cannot be loaded: {first_line(error)}") from error
    check_vae(vae.config)
    factor, size = 2 ** (len(vae.config.block_out_channels) - 1), denoiser["sample_size"]
    return PictureEncoder(
        vae.to(device or _default_device()),
        int(size if isinstance(size, int) else min(size)) * factor,
        factor * int(denoiser.get("patch_size") or 1),
    )


def _read_index(path_or_id: str, revision: str | None) -> tuple[dict[str, Any], type[PipelineFamily]]:
    """The `model_index.json` of a pipeline, and its family."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(path_or_id, **({} if revision is None else {"revision": revision}))
    except (OSError, ValueError) as error:
        raise ConceptDataError(
            f"there is no pipeline at {path_or_id}: expected a folder or a Hub id with a model_index.json of "
            f"diffusers ({first_line(error)})."
        ) from error
    for family in FAMILIES:
        if index.get("_class_name") == family.pipeline_class:
            return index, family
    raise ConceptDataError(f"{path_or_id} is a {index.get('_class_name')}; known are {_known()}.")


def check_vae(config: Any) -> None:
    """Refuse a VAE whose latents are not brought to the denoiser's scale by a factor and a shift.

    Raises:
        ConceptDataError: If its configuration says so.
    """
    if getattr(config, "latents_mean", None) is not None or getattr(config, "latents_std", None) is not None:
        raise ConceptDataError("the VAE's latents have a mean and deviation of their own, which is not supported.")


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _known() -> str:
    return ", ".join(family.pipeline_class for family in FAMILIES)
