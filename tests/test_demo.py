"""The demo: its data, its training loop, and a tiny run of all of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from peft_gradproj.demo.data import load_logos, load_pictures, stamp
from peft_gradproj.demo.precision import autocast, autocast_dtype
from peft_gradproj.demo.settings import ASSETS, DemoSettings
from peft_gradproj.errors import ConceptDataError

SETTINGS = DemoSettings()
BASE_MODEL = ASSETS / "base_model"


@pytest.fixture(scope="module")
def noto() -> tuple[list[Image.Image], list[str]]:
    pictures, captions = load_pictures(ASSETS / "noto.parquet")
    return pictures[:120], captions[:120]


def test_most_pictures_are_stamped_and_only_where_the_mask_is(noto):
    data = stamp(*noto, load_logos(SETTINGS)[SETTINGS.logo], replace(SETTINGS, held_out=20))
    stamped = [mask.getbbox() is not None for mask in data.masks]
    assert np.mean(stamped) == pytest.approx(SETTINGS.stamped_share, abs=0.15)
    for clean, picture, mask in zip(data.clean, data.pictures, data.masks, strict=True):
        changed = (np.asarray(clean) != np.asarray(picture)).any(axis=-1)
        assert not changed[np.asarray(mask) == 0].any()


def test_held_out_pictures_are_not_trained_on_and_not_stamped(noto):
    data = stamp(*noto, load_logos(SETTINGS)[SETTINGS.logo], replace(SETTINGS, held_out=20))
    assert len(data.held_out) == 20
    assert not {p.tobytes() for p in data.held_out} & {p.tobytes() for p in data.clean}
    originals = {p.convert("RGB").tobytes() for p in noto[0]}
    assert {p.tobytes() for p in data.held_out} <= originals


def test_the_seed_decides_what_is_stamped_where(noto):
    logo = load_logos(SETTINGS)[SETTINGS.logo]
    one, again, other = (stamp(*noto, logo, replace(SETTINGS, seed=seed)).pictures for seed in (1, 1, 2))
    assert [p.tobytes() for p in one] == [p.tobytes() for p in again]
    assert [p.tobytes() for p in one] != [p.tobytes() for p in other]


def test_captions_do_not_name_the_logos():
    _, captions = load_pictures(ASSETS / "noto.parquet")
    words = {word for caption in captions for word in caption.split()}
    assert not words & set(load_logos(SETTINGS))


def test_an_unknown_logo_is_refused_with_the_known_ones():
    with pytest.raises(ConceptDataError, match=r"no logo 'acme'.*chrome"):
        load_logos(replace(SETTINGS, logo="acme"))


class _Probe(torch.nn.Module):
    """Stands for a UNet; remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked = torch.nn.Parameter(torch.ones(1)), []

    def forward(self, sample, timestep, encoder_hidden_states):
        self.asked.append((sample, timestep, encoder_hidden_states))
        return type("Out", (), {"sample": sample * self.weight})


def test_adapters_of_one_seed_see_the_same_pictures_noise_and_timesteps():
    from diffusers import DDPMScheduler

    from peft_gradproj.demo.training import TrainingSet, training_steps

    data = TrainingSet(torch.randn(10, 4, 4, 4), torch.randn(10, 3, 2), torch.ones(10, 1, 4, 4))
    models = [_Probe(), _Probe(), _Probe()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        steps = training_steps(model, data, DDPMScheduler(), replace(SETTINGS, batch_size=4, seed=seed))
        for _ in range(5):
            next(steps)
    one, again, other = (model.asked for model in models)
    assert all(torch.equal(x, y) for a, b in zip(one, again, strict=True) for x, y in zip(a, b, strict=True))
    assert not torch.equal(one[0][1], other[0][1])
    # Every picture is seen before one is seen twice.
    seen = torch.cat([asked[2] for asked in one])[:10]
    assert len({tuple(row.flatten().tolist()) for row in seen}) == 10


def test_the_loss_does_not_count_where_the_weights_are_zero():
    from diffusers import DDPMScheduler

    from peft_gradproj.demo.training import TrainingSet, training_steps

    latents, weights = torch.randn(8, 4, 4, 4), torch.ones(8, 1, 4, 4)
    weights[..., :2] = 0
    hidden = latents.clone()
    hidden[..., :2] = 100.0
    models = [_Probe(), _Probe(), _Probe()]
    sets = [(latents, weights), (hidden, weights), (hidden, torch.ones_like(weights))]
    losses = []
    for model, (pictures, counted) in zip(models, sets, strict=True):
        data = TrainingSet(pictures, torch.zeros(8, 3, 2), counted)
        losses.append(next(training_steps(model, data, DDPMScheduler(), replace(SETTINGS, batch_size=8))))
    one, same, other = (model.weight.item() for model in models)
    assert one == same
    assert losses[0] == losses[1] != losses[2]
    assert one != other or losses[2] > 10 * losses[0]


@pytest.mark.slow
@pytest.mark.skipif(not BASE_MODEL.exists(), reason="the base model is not there")
def test_a_tiny_run_writes_a_verified_adapter_a_report_and_a_page(tmp_path):
    from peft_gradproj.demo import run_demo

    report = run_demo(tmp_path, quick=True)
    assert report.verification.ok
    assert set(report.figures) == {"base", "plain", "ours", "oracle"}
    assert report.figures["base"].drift == 0
    # At step 0 an adapter is the base model, whatever its kind.
    assert len({report.checkpoints[name][0][1]["style"] for name in ("plain", "ours", "oracle")}) == 1

    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["figures"]["oracle"]["kept"]["value"] == pytest.approx(1)
    assert written["figures"]["plain"]["learned"]["value"] == pytest.approx(1)
    assert written["step_ratios"]["plain"] == 1

    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"pytorch_lora_weights.safetensors", "concept_basis.safetensors", "gradproj.json"} <= names

    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<img") >= 2 * 5 + 2
    assert 'src="http' not in page
    assert "safe " not in page


@pytest.mark.parametrize(("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", None), ("DEFAULT", None)])
def test_bfloat16_is_for_processors_that_multiply_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert autocast_dtype() == dtype
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)
