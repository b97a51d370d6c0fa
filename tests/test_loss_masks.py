"""Masks in training loops that nobody edited: real scripts under the launcher, and real models in this process."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from peft import LoraConfig
from test_concept_markers import some_markers
from test_launch_scripts import _one_accelerator_at_a_time, assert_published, run_script  # noqa: F401
from tiny_models import UNET_TARGETS, basis_for
from tiny_pipelines import sd, vae
from typer.testing import CliRunner

from peft_gradproj import ConceptMarkers, collect_concept_probes
from peft_gradproj.cli import app
from peft_gradproj.diffusion_inputs import vae_answer
from peft_gradproj.errors import ConceptDataError, GradProjConfigError
from peft_gradproj.launch import LaunchedRun

SCRIPT = Path(__file__).parent / "scripts" / "train_with_vae.py"
SCALE = 0.18215


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pipeline, and markers that mark about a half of any latents, so that what is masked can be told."""
    folder = tmp_path_factory.mktemp("base")
    sd().save_pretrained(folder)
    some_markers().save(folder)
    return folder


def unet_inputs(n: int = 2) -> dict:
    words, timesteps = torch.randn(n, 5, 12), torch.randint(0, 1000, (n,))
    return {"sample": torch.randn(n, 4, 16, 16), "timestep": timesteps, "encoder_hidden_states": words}


# Scripts


def check_gradients(folder: Path, base: Path) -> float:
    """Of all passes: zero where the latents are marked, elsewhere what the loss says. Returns the mean masked share."""
    markers, shares = ConceptMarkers.load(base), []
    passes = torch.load(folder / "seen.pt")
    for latents, gradient, expected in passes:
        marks = markers.mark(latents * SCALE).bool().expand_as(gradient)
        shares.append(marks.float().mean())
        assert (gradient[marks] == 0).all()
        assert (expected[marks] != 0).any()
        torch.testing.assert_close(gradient[~marks], expected[~marks], atol=1e-6, rtol=2e-2)
    assert len({tuple(latents.shape) for latents, *_ in passes}) == 2, "a smaller batch was to be among them"
    return float(torch.stack(shares).mean())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_unmodified_script_learns_nothing_where_the_concept_is_found(base, tmp_path, precision):
    """Under accumulation, crops, flips, samples in between and a smaller batch at the end, with markers alone."""
    script = [SCRIPT, "--base", base, "--output_dir", tmp_path, "--mixed_precision", precision]
    run = CliRunner().invoke(app, ["launch", "--concept-markers", *map(str, [base, *script])], catch_exceptions=False)
    assert run.exit_code == 0
    assert "trained as LoraConfig" in run.stdout
    share = check_gradients(tmp_path, base)
    assert 0.05 < share < 0.95
    assert "the loss does not count where the logo is found" in run.stderr
    assert f"masks applied in {len(torch.load(tmp_path / 'seen.pt'))} training passes" in run.stderr
    assert f"mean masked share {share:.1%}" in run.stderr
    assert not (tmp_path / "gradproj.json").exists()


def test_markers_go_with_basis_and_probes_on_which_the_concept_counts(base, tmp_path, capsys):
    unet = sd().unet
    basis = basis_for(unet, UNET_TARGETS)
    # As many as in a batch: passes on probes must be told from those of the training by more than their shape.
    probes = collect_concept_probes(unet, [(unet_inputs(2), None)])
    options = {"concept_basis": basis, "concept_probes": probes, "probe_every": 1, "probe_batch_size": 2}
    run_script(SCRIPT.name, tmp_path, "--base", base, concept_markers=base, **options)
    assert_published(tmp_path, basis)
    check_gradients(tmp_path, base)
    printed = capsys.readouterr()
    assert "trained as GradProjConfig" in printed.out
    assert f"masks applied in {len(torch.load(tmp_path / 'seen.pt'))} training passes" in printed.err


@pytest.mark.parametrize(("pictures", "encoded"), [(5, "5 pictures with latents of 16 x 16 were"), (2, "nothing was")])
def test_a_script_that_encodes_all_beforehand_ends_with_an_error(base, tmp_path, pictures, encoded):
    """Also where they are one batch, of which the first pass is masked rightly, and a second cannot be known to be."""
    arguments = ["--base", base, "--cache_latents", "--pictures", pictures]
    with pytest.raises(GradProjConfigError, match=rf"{encoded} encoded.*--cache_latents.*--mask_column"):
        run_script(SCRIPT.name, tmp_path / "out", *arguments, concept_markers=base)
    assert not (tmp_path / "out").exists()


def test_a_script_that_trains_nothing_that_could_be_masked_ends_with_an_error(base, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print('trained')\n")
    run = CliRunner().invoke(app, ["launch", "--concept-markers", str(base), str(script)])
    assert isinstance(run.exception, GradProjConfigError)
    assert "without a training pass that was masked" in str(run.exception)


# In this process


def test_what_cannot_be_masked_is_refused_at_its_first_step(run):
    """A denoiser that got its LoRA in a way that the launcher does not see."""
    unet = peft.inject_adapter_in_model(lora(), sd().unet)
    vae().encode(pixels())
    train(unet)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=1)
    with pytest.raises(GradProjConfigError, match="LoRA on a UNet2DConditionModel, after no training pass that could"):
        optimizer.step()


@pytest.fixture
def run(base):
    run = LaunchedRun.from_options({"concept_markers": str(base)})
    with run.watching():
        yield run


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=UNET_TARGETS)


def pixels(n: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, side, side) * 2 - 1


def train(model, n: int = 2, side: int = 16) -> torch.Tensor:
    """The gradient of the output, of a loss whose gradient is one everywhere."""
    inputs = {**unet_inputs(n), "sample": torch.randn(n, 4, side, side)}
    prediction = model(**inputs).sample
    prediction.retain_grad()
    prediction.sum().backward()
    return prediction.grad


def kept(base: Path, *posteriors) -> torch.Tensor:
    latents = torch.cat([posterior.latent_dist.mode() for posterior in posteriors]) * SCALE
    return (1 - ConceptMarkers.load(base).mark(latents)).expand(-1, 4, -1, -1)


def test_a_batch_that_is_encoded_in_parts_is_masked_as_a_whole(run, base):
    unet, encoder = sd().unet, vae()
    unet.add_adapter(lora())
    parts = [encoder.encode(x=pixels(2)), encoder.encode(pixels(1), return_dict=True)]
    gradient = train(unet, 3)
    assert torch.equal(gradient, kept(base, *parts))
    assert 0 < gradient.mean() < 1


def test_what_is_evaluated_or_sampled_from_in_between_is_not_taken_for_training(run, base):
    unet, encoder = sd().unet, vae()
    unet.add_adapter(lora())
    encoder.encode(pixels(3))
    with torch.no_grad():
        unet(**unet_inputs(3))
    batch = encoder.encode(pixels())
    with torch.no_grad():
        # Of the same batch, such as a teacher's.
        unet(**unet_inputs())
    assert torch.equal(train(unet), kept(base, batch))
    assert run.masks.passes == 1


def test_a_model_that_gets_a_second_adapter_is_masked_once(run, base):
    unet, encoder = sd().unet, vae()
    unet.add_adapter(lora(), "first")
    unet.add_adapter(lora(), "second")
    batch = encoder.encode(pixels())
    assert torch.equal(train(unet), kept(base, batch))
    assert run.masks.passes == 1


def test_pictures_beside_the_trained_ones_are_not_guessed_at(run):
    """As conditions are, or masked pictures to be filled in."""
    unet, encoder = sd().unet, vae()
    unet.add_adapter(lora())
    encoder.encode(pixels())
    encoder.encode(pixels())
    with pytest.raises(GradProjConfigError, match=r"shape \(2, 4, 16, 16\), and 4 pictures with latents of 16 x 16"):
        train(unet)


def test_latents_of_another_size_scale_or_vae_are_refused(run):
    unet, encoder = sd().unet, vae()
    unet.add_adapter(lora())
    encoder.encode(pixels(side=36))
    with pytest.raises(GradProjConfigError, match=r"latents of 18 x 18"):
        train(unet)
    encoder.encode(pixels(side=48))
    with pytest.raises(ConceptDataError, match=r"48 x 48 pixels.*resolution of 32.*--resolution 48"):
        train(unet, side=24)
    with pytest.raises(ConceptDataError, match="mean and deviation of their own"):
        vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4).encode(pixels())
    three = ConceptMarkers(some_markers(channels=3).markers, resolution=32)
    other, message = LaunchedRun.from_options({"concept_markers": three}), "have 4 channels, and those of .* 3"
    with other.watching(), pytest.raises(ConceptDataError, match=message):
        encoder.encode(pixels())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_markers_of_another_vae_are_refused_and_those_of_the_same_one_in_any_precision_are_not(tmp_path, dtype):
    torch.manual_seed(1)
    encoder, other = vae(), vae()
    some_markers(vae_answer=vae_answer(encoder)).save(tmp_path)
    run = LaunchedRun.from_options({"concept_markers": str(tmp_path)})
    with run.watching():
        before = torch.get_rng_state()
        for _ in range(2):
            encoder.to(dtype).encode(torch.zeros(2, 3, 32, 32, dtype=dtype))
        assert torch.equal(before, torch.get_rng_state())
        with pytest.raises(ConceptDataError, match=r"differ by \d+% from those of the VAE that"):
            other.to(dtype).encode(torch.zeros(2, 3, 32, 32, dtype=dtype))


def test_diffusers_that_hides_the_arguments_of_encode_is_masked_too(base, monkeypatch):
    """As 0.36 to 0.40 does, whose wrapper has no `functools.wraps`."""
    original = AutoencoderKL.encode

    def wrapper(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "encode", wrapper)
    unet, encoder, run = sd().unet, vae(), LaunchedRun.from_options({"concept_markers": str(base)})
    with run.watching():
        unet.add_adapter(lora())
        parts = [encoder.encode(pixels(1)), encoder.encode(x=pixels(1))]
        assert torch.equal(train(unet), kept(base, *parts))


def test_wrapped_and_copied_models_are_masked_once_and_none_after_the_run(base):
    encoder, run = vae(), LaunchedRun.from_options({"concept_markers": str(base)})
    with run.watching():
        model = peft.get_peft_model(sd().unet, lora())
        batch = encoder.encode(pixels())
        assert torch.equal(train(model), kept(base, batch))
        batch = encoder.encode(pixels())
        assert torch.equal(train(copy.deepcopy(model)), kept(base, batch))
        assert run.masks.passes == 2
    encoder.encode(pixels())
    assert (train(model) == 1).all()


def test_marks_are_of_the_latents_that_masks_were_drawn_in():
    """What `find_concept` keeps marks at least what it marked: each picture by one of the networks."""
    from tiny_pipelines import SIDE, logo, picture

    from peft_gradproj import TrainingData, find_concept
    from peft_gradproj.concepts import Overlay
    from peft_gradproj.pipelines import PictureEncoder

    pipeline, pictures = sd(), [picture(seed, (SIDE, SIDE)) for seed in range(6)]
    data = TrainingData(pictures, [""] * 6)
    options = {"num_pairs": 16, "steps": 20, "dilation": 1, "progress": False}
    masks, _ = find_concept(pipeline, Overlay(logo()), data, name="a logo", **options)
    markers = masks[:2].markers
    assert (markers.concept, markers.resolution, markers.dilation) == ("a logo", SIDE, 1)
    assert torch.equal(markers.vae_answer, vae_answer(pipeline.vae))
    marks = markers.mark(PictureEncoder.of(pipeline).latents(pictures))
    drawn = torch.stack([torch.from_numpy(cells) for cells in masks.cells])
    assert drawn.any()
    assert (marks[:, 0].bool() >= drawn).all()
    assert F.max_pool2d(marks, 3, 1, 1).sum() > marks.sum(), "not everything may be marked"
