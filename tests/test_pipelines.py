"""What a family feeds a denoiser is what the pipeline itself feeds it: names, shapes, dtypes and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, SIDE, logo, picture, sd, sd3, sdxl, unet, vae

from peft_gradproj import TrainingData, find_concept, fit_concept
from peft_gradproj.concepts import Overlay
from peft_gradproj.errors import ConceptDataError
from peft_gradproj.pipelines import PipelineFamily, load_pipeline
from peft_gradproj.training_data import Frame

PROMPT = "a red house"


def fed(pipeline: Any, **options: Any) -> list[dict[str, Any]]:
    """What a pipeline calls its denoiser with, step by step, by name, `None` left out."""
    denoiser = PipelineFamily.of(pipeline).denoiser
    seen: list[dict[str, Any]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}
        given.pop("return_dict", None)
        seen.append({name: value for name, value in given.items() if value is not None})

    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        # A scale of 1 is no guidance: the prompt alone.
        pipeline(PROMPT, guidance_scale=1.0, output_type="latent", **{"num_inference_steps": 1, **options})
    finally:
        hook.remove()
    return seen


def flat(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    nested = {f"{name}.{key}": v for name, x in inputs.items() if isinstance(x, dict) for key, v in x.items()}
    return {name: x for name, x in inputs.items() if not isinstance(x, dict)} | nested


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_denoiser_is_fed_what_the_pipeline_feeds_it(kind):
    pipeline = PIPELINES[kind]()
    theirs = flat(fed(pipeline)[0])
    family = PipelineFamily.of(pipeline)
    assert family.resolution == SIDE
    latents = family.latents([picture(0, (SIDE, SIDE))])
    timesteps = family.draw_timesteps(1, torch.Generator().manual_seed(0))
    conditions = family.conditions([PROMPT], [Frame((SIDE, SIDE), 0, 0, SIDE)])
    inputs = family.inputs(latents, torch.randn(latents.shape), timesteps, conditions)
    ours = flat(family.placed(inputs))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Euler's sampler has floats for timesteps; training draws from the integers, as diffusers' scripts do.
        assert value.dtype == theirs[name].dtype or (kind, name) == ("sdxl", "timestep"), name
        # A UNet is given one timestep for all pictures.
        assert value.shape == (theirs[name] if theirs[name].ndim else theirs[name][None]).shape, name
    for name in ours.keys() - {family.sample, "timestep"}:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_unet_that_makes_more_of_the_prompt_by_itself_is_stable_diffusion():
    pipeline = sd()
    pipeline.unet = unet(addition_embed_type="text", addition_embed_type_num_heads=4)
    family = PipelineFamily.of(pipeline)
    latents = family.latents([picture(0, (SIDE, SIDE))])
    inputs = family.inputs(latents, latents, torch.tensor([5]), family.conditions([PROMPT], []))
    assert family.run(family.denoiser, inputs).shape == latents.shape


def test_time_ids_are_original_size_crop_and_target_size_each_height_first():
    pipeline = sdxl()
    frame = Frame(original_size=(48, 64), top=3, left=7, side=SIDE)
    theirs = fed(pipeline, original_size=(48, 64), crops_coords_top_left=(3, 7), target_size=(SIDE, SIDE))[0]
    ours = PipelineFamily.of(pipeline).conditions([PROMPT], [frame])["added_cond_kwargs.time_ids"]
    assert torch.equal(ours, theirs["added_cond_kwargs"]["time_ids"])


def test_flow_timesteps_are_a_thousand_times_the_shifted_sigmas():
    pipeline = sd3()
    family = PipelineFamily.of(pipeline)
    seen = fed(pipeline, num_inference_steps=3)
    # The pipeline itself: each timestep is a thousand times the share of noise.
    times = torch.cat([inputs["timestep"] for inputs in seen])
    torch.testing.assert_close(times, pipeline.scheduler.sigmas[:3] * 1000)
    latents, noise = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    drawn = family.draw_timesteps(3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        family.noised(latents, noise, drawn), family.schedule.scale_noise(latents, drawn, noise), atol=1e-6, rtol=1e-5
    )
    assert torch.equal(family.noised(latents, noise, torch.full((3,), 1000.0)), noise)
    # Shifted by 3: half of the steps have more than three quarters of noise. Sampling has not shortened the schedule.
    many = family.draw_timesteps(2000, torch.Generator().manual_seed(0))
    assert abs(float(many.median()) - 750) < 30
    assert len(many.unique()) > 500
    # Euler's step from there along the target leads to the latents.
    sigmas = (drawn / 1000)[:, None, None, None]
    back = family.noised(latents, noise, drawn) - sigmas * family.loss_target(latents, noise, drawn)
    torch.testing.assert_close(back, latents, atol=1e-5, rtol=1e-4)


def test_latents_are_scaled_and_shifted_as_the_pipeline_undoes_it():
    pipeline = sd3()
    family = PipelineFamily.of(pipeline)
    pixels = picture(0, (SIDE, SIDE))
    raw = family.latents([pixels]) / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    x = pipeline.image_processor.preprocess(pixels)
    with torch.no_grad():
        expected = pipeline.vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(raw, expected, atol=1e-5, rtol=1e-4)


def test_latents_that_are_no_numbers_are_refused_where_they_are_made():
    pipeline = PIPELINES["sd"]()
    pipeline.vae.to(torch.float16)
    # As in the VAE of Stable Diffusion XL, whose activations float16 cannot hold.
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.bias.fill_(6e4)
        pipeline.vae.encoder.down_blocks[0].resnets[0].conv2.bias.fill_(6e4)
    data = TrainingData([picture(0), picture(1)], ["", ""])
    for search in (find_concept, fit_concept):
        with pytest.raises(ConceptDataError, match=r"the VAE, in float16, gives latents .* not finite"):
            search(pipeline, Overlay(logo()), data, num_pairs=16, progress=False)
    pipeline.vae.to(torch.float32)
    find_concept(pipeline, Overlay(logo()), data, num_pairs=16, steps=1, progress=False)


def test_half_precision_reaches_the_denoiser_but_not_its_timesteps():
    pipeline = sd3()
    pipeline.transformer.to(torch.bfloat16)
    family = PipelineFamily.of(pipeline)
    latents = torch.randn(1, 4, 16, 16)
    conditions = family.conditions([PROMPT], [])
    inputs = family.inputs(latents, latents, torch.tensor([999.0]), conditions)
    placed = family.placed(inputs)
    assert placed["hidden_states"].dtype == placed["pooled_projections"].dtype == torch.bfloat16
    assert placed["timestep"].dtype == torch.float32
    assert family.run(family.denoiser, inputs).dtype == torch.bfloat16


def test_loaded_pipelines_are_in_one_dtype_but_for_the_vae(tmp_path):
    pipeline = sd3()
    pipeline.text_encoder.half()
    pipeline.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        loaded = load_pipeline(str(tmp_path), dtype=dtype, device="cpu")
        assert loaded.transformer.dtype == loaded.text_encoder.dtype == getattr(torch, dtype)
        assert loaded.vae.dtype == torch.float32
        assert loaded.text_encoder_3 is None
    with pytest.raises(ConceptDataError, match="float32, bfloat16, float16"):
        load_pipeline(str(tmp_path), dtype="int8")


# What is refused


def test_pipelines_that_only_look_like_a_family():
    from diffusers import DDPMPipeline, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    with pytest.raises(ConceptDataError, match="DDPMPipeline is of no family"):
        PipelineFamily.of(DDPMPipeline(unet(), DDPMScheduler()))
    cases = [
        (sd(), "scheduler", FlowMatchEulerDiscreteScheduler(), "schedule of betas"),
        (sdxl(), "scheduler", EDMEulerScheduler(), "schedule of betas"),
        (sd3(), "scheduler", DDPMScheduler(), "flow matching"),
        (sd(), "unet", unet(in_channels=9), "9 channels and the VAE gives 4"),
        (sd(), "unet", unet(time_cond_proj_dim=8), "LCM"),
        (sd(), "unet", sdxl().unet, "does not give it"),
        (sd(), "unet", unet(num_class_embeds=3), "does not give it"),
        (sdxl(), "unet", unet(), "text_time"),
        (sd(), "vae", vae(latents_mean=(0.0,) * 4), "mean and deviation"),
        (sd(), "vae", None, "has no vae"),
    ]
    for pipeline, name, part, message in cases:
        setattr(pipeline, name, part)
        with pytest.raises(ConceptDataError, match=message):
            PipelineFamily.of(pipeline)


def test_what_is_no_pipeline_folder(tmp_path):
    with pytest.raises(ConceptDataError, match="no pipeline at"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ConceptDataError, match="no pipeline at"):
        load_pipeline(str(tmp_path / "absent"))
    pipeline = sd()
    pipeline.save_pretrained(tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(ConceptDataError, match="is a FluxPipeline; known are"):
        load_pipeline(str(tmp_path / "base"))
    index.write_text(index.read_text().replace("FluxPipeline", "StableDiffusionPipeline"))
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConceptDataError, match="cannot be loaded"):
        load_pipeline(str(tmp_path / "base"))
