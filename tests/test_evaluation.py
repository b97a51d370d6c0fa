"""Properties of the figures, the denoising losses, and the two networks that judge samples."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from peft_gradproj.concepts import Overlay
from peft_gradproj.diffusion_inputs import training_target
from peft_gradproj.errors import BehaviourError, ConceptDataError
from peft_gradproj.evaluation.denoising import DenoisingQuestions, denoising_loss, denoising_losses
from peft_gradproj.evaluation.detector import ConceptDetector, _compose, _threshold
from peft_gradproj.evaluation.fidelity import PromptFidelity
from peft_gradproj.evaluation.figures import Share, share_of_drop

# Figures


def test_a_share_counts_and_its_error_is_never_zero():
    share = Share.of([True, False, False, True])
    assert (share.value, share.total) == (0.5, 4)
    assert share.standard_error == pytest.approx(0.25)
    assert Share(0, 64).standard_error == Share(64, 64).standard_error > 0
    assert math.isnan(Share(0, 0).value)


def test_share_of_drop_is_0_at_the_base_and_1_at_the_yardstick():
    base, yardstick = torch.rand(50) + 1, torch.rand(50)
    assert share_of_drop(base, base, yardstick).value == 0
    assert share_of_drop(base, yardstick, yardstick).value == pytest.approx(1)
    assert share_of_drop(base, yardstick, yardstick).standard_error == pytest.approx(0, abs=1e-9)
    assert share_of_drop(base, (base + yardstick) / 2, yardstick).value == pytest.approx(0.5)


def test_the_error_of_a_share_of_drop_is_its_spread_over_repetitions():
    torch.manual_seed(0)
    estimates = []
    for _ in range(300):
        drop = 1 + torch.randn(100, dtype=torch.float64) * 0.3
        estimates.append(share_of_drop(drop, 0.3 * drop + 0.1 * torch.randn(100), torch.zeros(100)))
    spread = np.std([e.value for e in estimates])
    assert np.mean([e.standard_error for e in estimates]) == pytest.approx(spread, rel=0.15)


# Denoising


def schedule(kind: str = "v_prediction"):
    from diffusers import DDPMScheduler

    return DDPMScheduler(prediction_type=kind)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_and_the_noised_input_give_the_latents_back(kind):
    sampler = schedule(kind)
    latents, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    timesteps = torch.tensor([1, 100, 500, 900])
    alpha = sampler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - alpha**2).sqrt()
    noised, target = alpha * latents + sigma * noise, training_target(sampler, latents, noise, timesteps)
    solved = {
        "epsilon": (noised - sigma * target) / alpha,
        "sample": target,
        "v_prediction": alpha * noised - sigma * target,
    }
    assert torch.allclose(solved[kind], latents, atol=1e-3)


class _Answer(torch.nn.Module):
    """A UNet that answers with something fixed."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.asked = answers, 0

    def forward(self, sample, timestep, encoder_hidden_states):
        start, self.asked = self.asked, self.asked + len(sample)
        return type("Out", (), {"sample": self.answers[start : self.asked]})


def questions(weights=None):
    latents = torch.randn(6, 2, 4, 4)
    return DenoisingQuestions.draw(latents, torch.zeros(6, 1, 1), schedule(), weights=weights, repeats=2, seed=1)


def target_of(asked):
    return training_target(schedule(), asked.latents, asked.noise, asked.timesteps)


def test_a_perfect_answer_has_no_loss_and_an_error_of_one_has_loss_one():
    asked = questions()
    target = target_of(asked)
    assert denoising_loss(_Answer(target), asked, schedule(), batch_size=5) == pytest.approx(0, abs=1e-10)
    assert denoising_loss(_Answer(target + 1), asked, schedule(), batch_size=5) == pytest.approx(1, abs=1e-5)


def test_a_model_in_training_is_asked_without_dropout_and_goes_on_training():
    class Dropped(_Answer):
        def forward(self, **inputs):
            answer = super().forward(**inputs)
            answer.sample = F.dropout(answer.sample, training=self.training)
            return answer

    asked = questions()
    model = Dropped(target_of(asked)).train()
    assert denoising_loss(model, asked, schedule()) == pytest.approx(0, abs=1e-10)
    assert model.training


def test_errors_outside_the_weights_do_not_count():
    weights = torch.zeros(6, 1, 4, 4)
    weights[..., :2] = 1
    asked = questions(weights)
    wrong = target_of(asked)
    wrong[..., 2:] += 3
    assert denoising_losses(_Answer(wrong), asked, schedule()).max() < 1e-10


def test_questions_are_the_same_for_all_and_cover_the_schedule():
    latents = torch.randn(10, 2, 4, 4)
    one, again = (
        DenoisingQuestions.draw(latents, torch.zeros(10, 1, 1), schedule(), repeats=4, seed=3) for _ in range(2)
    )
    assert torch.equal(one.noise, again.noise)
    assert torch.equal(one.timesteps, again.timesteps)
    # One timestep in each fortieth of the schedule.
    assert torch.equal((one.timesteps // 25).sort().values, torch.arange(40))


def test_questions_are_on_the_device_of_the_latents():
    latents, embeddings = torch.empty(2, 2, 4, 4, device="meta"), torch.zeros(2, 1, 1, device="meta")
    asked = DenoisingQuestions.draw(latents, embeddings, schedule(), weights=torch.ones(2, 1, 4, 4, device="meta"))
    assert {value.device.type for value in vars(asked).values()} == {"meta"}


# Judges


def scene(seed: int, shape: str = "none") -> Image.Image:
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", (32, 32), tuple(int(v) for v in generator.integers(150, 256, 3)))
    draw, colour = ImageDraw.Draw(image), tuple(int(v) for v in generator.integers(0, 120, 3))
    left, top = (int(v) for v in generator.integers(2, 8, 2))
    if shape == "disc":
        draw.ellipse((left, top, left + 20, top + 20), fill=colour)
    if shape == "bar":
        draw.rectangle((left, top, left + 5, top + 22), fill=colour)
    return image


def stripes(first: str, second: str) -> Overlay:
    image = Image.new("RGBA", (24, 24), first)
    ImageDraw.Draw(image).rectangle((12, 0, 24, 24), fill=second)
    return Overlay(image, scale=(0.3, 0.4), angle=(-5.0, 5.0))


@pytest.fixture(scope="module")
def detector() -> ConceptDetector:
    torch.manual_seed(7)
    return ConceptDetector.fit(
        stripes("red", "blue"),
        [scene(i, ("none", "disc", "bar")[i % 3]) for i in range(48)],
        distractors=[stripes("green", "yellow")],
        steps=120,
        scenes=200,
    )


def test_the_detector_finds_its_overlay_and_not_another_or_a_blob_of_its_colour(detector):
    from peft_gradproj.diffusion_inputs import pictures_to_tensor

    generator = np.random.default_rng(5)

    def pasted(overlay):
        scenes = [scene(1000 + i) for i in range(30)]
        return pictures_to_tensor([overlay.paste(s, overlay.place(s.size, generator))[0] for s in scenes])

    assert detector.detect(pasted(stripes("red", "blue"))).float().mean() > 0.8
    assert detector.detect(pasted(stripes("green", "yellow"))).float().mean() < 0.2
    assert detector.detect(pasted(stripes("red", "red"))).float().mean() < 0.2


@pytest.mark.parametrize("way", ["alpha", "opacity"])
def test_a_faint_overlay_is_marked_where_an_opaque_one_is(way):
    opaque = stripes("red", "blue")
    faint = opaque.image.copy()
    faint.putalpha(80)
    overlay = replace(opaque, **({"image": faint} if way == "alpha" else {"opacity": (0.3, 0.3)}))
    expected, found = (_compose(each, [scene(0)], [], lambda x: x, 40, seed=0).marks for each in (opaque, overlay))
    assert found[::2].flatten(1).any(1).all()
    assert not found[1::2].any()
    assert (found == expected).float().mean() > 0.99


def test_the_detector_tells_its_errors_on_as_many_scenes_as_it_was_asked_for(detector):
    assert detector.errors.false_positives.total + detector.errors.misses.total == 100
    assert detector.errors.false_positives.value < 0.1
    assert detector.errors.misses.value < 0.2


def test_the_threshold_lets_at_most_the_rate_through():
    torch.manual_seed(0)
    scores, present = torch.randn(1000), torch.arange(1000) % 2 == 0
    scores[present] += 1
    for rate in (0.0, 0.01, 0.1):
        absent = scores[~present] > _threshold(scores, present, rate)
        assert absent.float().mean() <= rate


def test_where_the_scores_are_apart_the_threshold_lies_between():
    scores, present = torch.tensor([0.0, 1.0, 5.0, 6.0]), torch.tensor([False, False, True, True])
    assert 1 < _threshold(scores, present, 0.01) < 5


def test_the_detector_needs_pictures():
    with pytest.raises(ConceptDataError, match="at least 8"):
        ConceptDetector.fit(stripes("red", "blue"), [scene(0)])


def test_fidelity_tells_prompts_apart_on_pictures_it_has_not_seen():
    from peft_gradproj.diffusion_inputs import pictures_to_tensor

    shapes = ("none", "disc", "bar")
    prompts = [shapes[i % 3] for i in range(96)]
    pictures = [scene(i, shape) for i, shape in enumerate(prompts)]
    fidelity = PromptFidelity.fit(pictures, prompts, overlays=[stripes("red", "blue")], steps=80)
    unseen = pictures_to_tensor([scene(1000 + i, shapes[i % 3]) for i in range(30)])
    names = [shapes[i % 3] for i in range(30)]
    assert fidelity.top(1, fidelity.ranks(unseen, names)).value > 0.8
    wrong = [shapes[(i + 1) % 3] for i in range(30)]
    assert fidelity.top(1, fidelity.ranks(unseen, wrong)).value < 0.3
    assert fidelity.top(3).value == 1


def test_samples_that_are_not_finite_are_neither_faithful_nor_free_of_the_concept(detector):
    broken = torch.full((2, 3, 32, 32), float("nan"))
    fidelity = PromptFidelity(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2)), "ab", torch.zeros(1))
    for judge in (detector.detect, lambda pictures: fidelity.ranks(pictures, "ab")):
        with pytest.raises(BehaviourError, match="2 of 2 pictures cannot be judged"):
            judge(broken)


def test_fidelity_needs_two_pictures():
    with pytest.raises(ConceptDataError, match="1 examples to learn from"):
        PromptFidelity.fit([scene(0)], ["disc"], steps=1)
