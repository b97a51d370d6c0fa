"""Properties of the attacks, on tiny models of which it is known what they hold."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict
from tiny_models import FLOORS, UNET_TARGETS, basis_for, tensors_leakage
from torch import Tensor, nn

from peft_gradproj import ConceptProbes, GradProjConfig
from peft_gradproj.diffusion_inputs import encode_prompts, noise_schedule, noised_inputs, training_target
from peft_gradproj.errors import BehaviourError, ConceptBasisError, ConceptDataError
from peft_gradproj.evaluation.attacks import (
    TextualInversion,
    invert_concept,
    revive,
    revive_with_probes,
    search_prompts,
    steps_until,
)
from peft_gradproj.evaluation.denoising import DenoisingQuestions, denoising_loss
from peft_gradproj.evaluation.membership import calibrated_scores, loss_scores, pia_scores, roc_auc
from peft_gradproj.probes import collect_concept_probes
from peft_gradproj.projection import drift

PROMPTS = ["a", "b", "c", "d"]
RANK = 4


def pictures(count: int, seed: int) -> Tensor:
    """Latents of four flat quarters."""
    quarters = torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(seed)).sign()
    return F.interpolate(quarters, scale_factor=4.0)


@dataclass
class World:
    """A pipeline whose UNet was trained on one picture for each of the prompts, and on nothing else."""

    pipeline: Any
    schedule: Any
    members: Tensor
    others: Tensor
    embeddings: Tensor

    def loss(self, unet: Any, latents: Tensor, embeddings: Tensor) -> float:
        """Of the first picture and embedding, at 32 timesteps."""
        asked = DenoisingQuestions.draw(latents[:1], embeddings[:1], self.schedule, repeats=32)
        return denoising_loss(unet, asked, self.schedule)


@pytest.fixture(scope="module")
def world() -> World:
    pipeline = tiny_pipelines.sd(prediction_type="v_prediction")
    schedule, members = noise_schedule(pipeline), pictures(4, seed=0)
    embeddings = encode_prompts(pipeline, PROMPTS)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=5e-3)
    for _ in range(150):
        index = torch.randint(4, (16,), generator=generator)
        noise = torch.randn(members[index].shape, generator=generator)
        timesteps = torch.randint(1000, (16,), generator=generator)
        inputs = noised_inputs(members[index], embeddings[index], noise, timesteps, schedule)
        target = training_target(schedule, members[index], noise, timesteps)
        optimizer.zero_grad()
        F.mse_loss(pipeline.unet(**inputs).sample, target).backward()
        torch.nn.utils.clip_grad_norm_(pipeline.unet.parameters(), 1.0)
        optimizer.step()
    pipeline.unet.eval()
    return World(pipeline, schedule, members, pictures(16, seed=1), embeddings)


@pytest.fixture(scope="module")
def basis(world: World) -> Any:
    return basis_for(world.pipeline.unet, UNET_TARGETS, r=RANK)


@pytest.fixture(scope="module")
def published(world: World, basis: Any) -> Any:
    """The base model with a protected adapter as a stranger has it: loaded by stock diffusers."""
    trained = copy.deepcopy(world.pipeline.unet)
    trained.add_adapter(GradProjConfig(r=RANK, lora_alpha=RANK, target_modules=UNET_TARGETS, concept_basis=basis))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    unet = copy.deepcopy(world.pipeline.unet)
    unet.load_lora_adapter(get_peft_model_state_dict(trained), prefix=None, adapter_name="default")
    return unet.eval()


def with_adapter(world: World, config: Any) -> Any:
    unet = copy.deepcopy(world.pipeline.unet)
    torch.manual_seed(0)
    unet.add_adapter(config)
    return unet


def plain_config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=UNET_TARGETS)


@pytest.fixture(scope="module")
def probes(world: World) -> ConceptProbes:
    """The concept is a picture that the base model does not know."""
    generator = torch.Generator().manual_seed(3)
    latents = world.others[:1].repeat(16, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (16,), generator=generator)
    inputs = noised_inputs(latents, world.embeddings[:1].repeat(16, 1, 1), noise, timesteps, world.schedule)
    weights = torch.zeros(16, 1, 8, 8)
    weights[..., :4] = 1
    batch = (inputs, weights, training_target(world.schedule, latents, noise, timesteps))
    return collect_concept_probes(world.pipeline.unet, [batch], concept="planted")


def state(model: Any) -> dict[str, Any]:
    """All that an attack could leave behind in a model."""
    flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"flags": flags, "training": training, "weights": weights}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["flags"] == after["flags"]
    assert before["training"] == after["training"]
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(before["weights"][name], tensor) for name, tensor in after["weights"].items())


def run(world: World, unet: Any, **options: Any) -> list[tuple[int, Any]]:
    """Revival on a picture that the model does not know, measured by the loss on it."""
    given = {
        "steps": 30,
        "every": 10,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "measure": lambda attacked: world.loss(attacked, world.others, world.embeddings),
    }
    return revive(unet, world.others[:1], world.embeddings[:1], world.schedule, **{**given, **options})


# Revival


def test_revival_brings_the_loss_down_and_leaves_the_callers_unet_alone(world, published):
    before = state(published)
    curve = run(world, published)
    assert_same(before, state(published))
    assert [step for step, _ in curve] == [0, 10, 20, 30]
    start, end = curve[0][1], curve[-1][1]
    assert start == world.loss(published, world.others, world.embeddings)
    assert end < 0.8 * start
    assert steps_until(curve, start, below=True) == 0
    assert steps_until(curve, 0.8 * start, below=True) in (10, 20, 30)
    assert run(world, published) == curve


def test_only_the_adapter_is_trained(world, published):
    first, last = run(world, published, steps=1, every=1, measure=state)
    moved = {n for n, x in last[1]["weights"].items() if not torch.equal(x, first[1]["weights"][n])}
    assert moved
    assert all(".lora_A." in name or ".lora_B." in name for name in moved)
    assert not any(last[1]["training"].values()), "measured in evaluation mode"


def test_revival_without_a_learning_rate_changes_nothing(world, published):
    before = state(published)["weights"]
    for _, after in run(world, published, steps=3, every=1, learning_rate=0.0, measure=state):
        assert all(torch.equal(before[name], tensor) for name, tensor in after["weights"].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_is_trained_as_one_in_float32(world, published, dtype):
    def move(unet: Any, **options: Any) -> Tensor:
        def weights(attacked: Any) -> Tensor:
            return torch.cat([x.detach().flatten().float() for n, x in attacked.named_parameters() if "lora_" in n])

        (_, before), (_, after) = run(
            world, unet, steps=5, every=5, batch_size=2, learning_rate=1e-4, measure=weights, **options
        )
        return after - before

    expected, found = move(published), move(copy.deepcopy(published).to(dtype), autocast_dtype=dtype)
    assert found.norm() == pytest.approx(float(expected.norm()), rel=0.1)
    assert F.cosine_similarity(found, expected, dim=0) > 0.9


def test_the_base_model_with_a_fresh_adapter_starts_from_the_base_model(world):
    (_, start), *_ = run(world, with_adapter(world, plain_config()), steps=1)
    assert start == world.loss(world.pipeline.unet, world.others, world.embeddings)


def test_the_last_step_is_measured_whatever_the_interval(world, published):
    curve = run(world, published, steps=3, every=2, measure=lambda attacked: attacked.training)
    assert curve == [(0, False), (2, False), (3, False)]


def test_how_often_is_measured_does_not_change_what_is_trained(world):
    unet = with_adapter(world, LoraConfig(r=RANK, target_modules=UNET_TARGETS, lora_dropout=0.5))

    def measure(attacked: Any) -> float:
        torch.rand(1)
        return sum(float(p.double().abs().sum()) for p in attacked.parameters() if p.requires_grad)

    often, seldom = (
        revive(
            unet, world.others, world.embeddings.repeat(4, 1, 1), world.schedule, steps=4, measure=measure, every=every
        )
        for every in (1, 4)
    )
    assert often[-1] == seldom[-1] != often[0]


def test_what_the_weights_leave_out_is_learned_less(world, published):
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 1
    masked = run(world, published, steps=10, weights=left, measure=lambda unet: half_losses(world, unet))
    (_, before), *_, (_, after) = masked
    assert after["left"] < before["left"]
    gain = {side: before[side] - after[side] for side in before}
    assert gain["left"] > gain["right"]


def half_losses(world: World, unet: Any) -> dict[str, float]:
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 1
    asked = {
        side: DenoisingQuestions.draw(
            world.others[:1], world.embeddings[:1], world.schedule, weights=weights, repeats=32
        )
        for side, weights in (("left", left), ("right", 1 - left))
    }
    return {side: denoising_loss(unet, questions, world.schedule) for side, questions in asked.items()}


def test_a_unet_that_no_attacker_would_have_is_refused(world, basis, probes):
    protected = GradProjConfig(r=RANK, target_modules=UNET_TARGETS, concept_basis=basis)
    watched = GradProjConfig(r=RANK, target_modules=UNET_TARGETS, concept_probes=probes, uncovered="ignore")
    merged, disabled = (with_adapter(world, plain_config()) for _ in range(2))
    merged.fuse_lora()
    disabled.disable_adapters()
    cases = {
        "no LoRA layers": world.pipeline.unet,
        "merged or disabled": merged,
        "or disabled": disabled,
        "still projected": with_adapter(world, protected),
        "is still projected": with_adapter(world, watched),
    }
    for message, unet in cases.items():
        with pytest.raises(BehaviourError, match=message):
            run(world, unet, steps=0)


def test_steps_until_is_the_first_step_that_reaches_the_threshold():
    curve = [(0, 0.1), (10, 0.5), (20, 0.4), (30, 0.9)]
    assert [steps_until(curve, x) for x in (0.0, 0.5, 0.6, 1.0)] == [0, 10, 30, None]
    assert [steps_until(curve, x, below=True) for x in (0.9, 0.1, 0.05)] == [0, 0, None]


# Revival with the probes


def concept_loss(probes: ConceptProbes, unet: Any) -> float:
    batch = probes.batch(range(len(probes)))
    return float(drift(unet(**batch.inputs).sample, batch.loss_targets, batch.weights))


def leaky_curve(unet: Any, probes: ConceptProbes, judge: Any, **options: Any) -> list[tuple[int, tuple[float, float]]]:
    """Concept loss of the attacked adapter, and its leakage as judged by a basis."""

    def measure(attacked: Any) -> tuple[float, float]:
        return concept_loss(probes, attacked), tensors_leakage(get_peft_model_state_dict(attacked), judge)

    return revive_with_probes(
        unet, probes, steps=30, every=10, batch_size=8, learning_rate=1e-2, measure=measure, **options
    )


def test_an_attacker_with_the_probes_learns_the_concept_and_shows_in_the_leakage(published, probes, basis):
    before = state(published)
    curve = leaky_curve(published, probes, basis)
    assert_same(before, state(published))
    assert curve[-1][1][0] < 0.8 * curve[0][1][0]
    assert curve[0][1][1] < FLOORS[torch.float32] < 1e-2 < curve[-1][1][1]


def test_an_attacker_who_keeps_to_the_complement_learns_it_without_leakage(published, probes, basis):
    curve = leaky_curve(published, probes, basis, basis=basis)
    assert curve[-1][1][0] < 0.9 * curve[0][1][0]
    assert max(leakage for _, (_, leakage) in curve) < FLOORS[torch.float32]


def test_an_attack_with_the_probes_needs_their_targets_and_a_basis_of_the_model(published, probes, basis):
    without = ConceptProbes(probes.inputs, probes.targets, probes.weights)
    with pytest.raises(ConceptDataError, match="loss_targets"):
        leaky_curve(published, without, basis)
    foreign = basis.with_layers({f"elsewhere.{name}": layer for name, layer in basis.items()})
    with pytest.raises(ConceptBasisError, match="none of the adapted layers"):
        leaky_curve(published, probes, basis, basis=foreign)


# Textual inversion


def test_inversion_finds_a_token_as_good_as_the_prompt_that_was_trained(world):
    pipeline, unet = world.pipeline, world.pipeline.unet
    own = (pipeline.tokenizer, pipeline.text_encoder)
    before, vocabulary = [state(unet), state(pipeline.text_encoder)], pipeline.tokenizer.get_vocab()
    options = {"batch_size": 8, "learning_rate": 2e-2}
    start, found = (
        invert_concept(pipeline, world.members[:1], ["{}"], world.schedule, steps=steps, **options) for steps in (0, 40)
    )
    random = torch.get_rng_state()
    losses = [world.loss(unet, world.members, inversion.encode(pipeline, ["{}"])) for inversion in (start, found)]
    assert torch.equal(random, torch.get_rng_state())
    # The prompt that the picture was trained with is the best there is.
    trained = world.loss(unet, world.members, world.embeddings)
    assert losses[1] < 1.1 * trained < losses[0]
    assert len(found.losses) == 40
    assert (pipeline.tokenizer, pipeline.text_encoder) == own
    assert pipeline.tokenizer.get_vocab() == vocabulary
    for kept, model in zip(before, (unet, pipeline.text_encoder), strict=True):
        assert_same(kept, state(model))


def test_a_token_of_several_vectors_can_be_sampled(world):
    pipeline = world.pipeline
    inversion = TextualInversion("<planted>", torch.randn(3, tiny_pipelines.WORDS))
    embeddings = inversion.encode(pipeline, ["a {} b", "a b"])
    assert torch.equal(embeddings[1], encode_prompts(pipeline, ["a b"])[0])
    assert not torch.allclose(embeddings[0], embeddings[1])
    with inversion.loaded(pipeline):
        tokens = pipeline.tokenizer.tokenize(pipeline.maybe_convert_prompt("a <planted> b", pipeline.tokenizer))
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        by_text, by_embedding = (
            pipeline(**prompt, latents=noise, num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
            for prompt in ({"prompt": inversion.fill("a {} b")}, {"prompt_embeds": embeddings[:1]})
        )
    assert tokens == ["a</w>", "<planted>", "<planted>_1", "<planted>_2", "b</w>"]
    assert torch.equal(by_text, by_embedding)


def test_an_inversion_starts_from_a_word(world):
    inversion = invert_concept(world.pipeline, world.members[:1], ["{}"], world.schedule, steps=0, initial="b")
    (word,) = world.pipeline.tokenizer("b", add_special_tokens=False).input_ids
    assert torch.equal(inversion.embeddings[0], world.pipeline.text_encoder.get_input_embeddings().weight[word])
    assert torch.allclose(inversion.encode(world.pipeline, ["a {}"]), encode_prompts(world.pipeline, ["a b"]))


def test_prompts_without_a_place_for_the_token_are_refused(world):
    own = (world.pipeline.tokenizer, world.pipeline.text_encoder)
    too_long = " ".join(["a"] * 2 * tiny_pipelines.TOKENS) + " {}"
    for prompts, message in ((["a"], "no place"), ([too_long], "no place"), (["{}", "{}"], "one for each")):
        with pytest.raises(ConceptDataError, match=message):
            invert_concept(world.pipeline, world.members[:1], prompts, world.schedule, steps=1)
        assert (world.pipeline.tokenizer, world.pipeline.text_encoder) == own


# Prompt search


def planted(weights: dict[str, float]) -> Any:
    """Scores a prompt by its words, and notes what it was asked."""

    def score(prompts: list[str]) -> Tensor:
        score.asked += prompts
        return torch.tensor([sum(weights.get(word, 0.0) for word in set(prompt.split())) for prompt in prompts])

    score.asked = []
    return score


def test_the_planted_words_are_found_within_the_budget():
    words = [f"w{i}" for i in range(20)]
    score = planted({"w7": 0.4, "w13": 0.3, "w2": -0.1})
    found = search_prompts(words, score, budget=45, template="a picture of {}", batch_size=8)
    assert found.best.prompt == "a picture of w7 w13"
    assert found.best.score == pytest.approx(0.7)
    assert [single.words for single in found.words()[:2]] == [("w7",), ("w13",)]
    assert found.words()[-1].words == ("w2",)
    assert found.scored == len(score.asked) == len(set(score.asked)) <= 45
    assert search_prompts(words, planted({"w7": 0.4, "w13": 0.3, "w2": -0.1}), budget=45, batch_size=3) == found


def test_a_search_that_no_word_helps_stops_after_one_round():
    words = ["one", "two", "three"]
    found = search_prompts(words, planted({}), budget=100)
    assert found.scored == 3 + 2
    assert found.best.words == ("one",)
    assert [single.words[0] for single in found.words()] == words


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-1, 1)), st.integers(1, 40), st.integers(1, 4))
def test_the_budget_is_never_exceeded_and_the_best_is_the_best(weights, budget, max_words):
    score = planted(weights)
    found = search_prompts(list("abcdefgh"), score, budget=budget, max_words=max_words, batch_size=3)
    assert found.scored == len(score.asked) <= budget
    assert found.best.score == max(candidate.score for candidate in found.ranking)
    assert all(len(candidate.words) <= max_words for candidate in found.ranking)


def test_a_score_that_is_not_a_number_is_an_error_and_not_the_best():
    scores = {"a": 0.1, "b": float("nan"), "c": 0.9}
    with pytest.raises(ConceptDataError, match="the score of 'b' is not a number"):
        search_prompts(list(scores), lambda asked: torch.tensor([scores[p] for p in asked]), budget=3, template="{}")


def test_a_search_needs_words_and_a_budget():
    for words, budget in (([], 5), (["a"], 0)):
        with pytest.raises(ConceptDataError, match="at least one of each"):
            search_prompts(words, planted({}), budget=budget)


# Membership inference


class Epsilon(nn.Module):
    """The same model, answering with the noise instead of the velocity."""

    def __init__(self, unet: nn.Module, schedule: Any) -> None:
        super().__init__()
        self.unet, self.schedule = unet, schedule

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        velocity = self.unet(sample, timestep, encoder_hidden_states).sample
        alpha_squared = self.schedule.alphas_cumprod[timestep][:, None, None, None]
        noise = alpha_squared.sqrt() * velocity + (1 - alpha_squared).sqrt() * sample
        return type("Answer", (), {"sample": noise})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("attack", [loss_scores, partial(pia_scores, timestep=600)], ids=["loss", "pia"])
def test_members_of_an_overfitted_model_are_told(attack, kind, world):
    unet, schedule = world.pipeline.unet, world.schedule
    if kind == "epsilon":
        unet, schedule = Epsilon(unet, schedule), DDPMScheduler.from_config(schedule.config, prediction_type=kind)
    members = attack(unet, world.members, world.embeddings, schedule)
    others = attack(unet, world.others, world.embeddings.repeat(4, 1, 1), schedule)
    assert members.shape == (4,)
    assert roc_auc(members, others).value > 0.85
    by_threes = attack(unet, world.members, world.embeddings, schedule, batch_size=3)
    assert torch.allclose(by_threes, members, atol=1e-5)


def test_pia_is_the_same_of_one_model_whatever_it_predicts(world):
    asked = (world.others, world.embeddings.repeat(4, 1, 1))
    schedule = DDPMScheduler.from_config(world.schedule.config, prediction_type="epsilon")
    by_noise = pia_scores(Epsilon(world.pipeline.unet, schedule), *asked, schedule)
    assert torch.allclose(by_noise, pia_scores(world.pipeline.unet, *asked, world.schedule), rtol=1e-4)


@pytest.mark.parametrize("attack", [loss_scores, pia_scores])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_model_in_half_precision_gives_the_scores_that_it_gives_in_float32(attack, kind, world):
    schedule = DDPMScheduler.from_config(world.schedule.config, prediction_type=kind)
    asked = (world.others, world.embeddings.repeat(4, 1, 1))
    half = attack(copy.deepcopy(world.pipeline.unet).to(torch.bfloat16), *(x.bfloat16() for x in asked), schedule)
    assert half.dtype == torch.float32
    # To the rounding of bfloat16, of which a difference of answers keeps more on some processors.
    assert torch.allclose(half, attack(world.pipeline.unet, *asked, schedule), rtol=0.25)


def test_what_the_base_model_finds_easy_is_no_member_once_losses_are_calibrated_by_it(world):
    learned, prompts = world.others[:4], world.embeddings
    # Few steps: after 40, on some processors, what was learned is as easy as what the base model knows.
    options = {"steps": 10, "every": 10, "learning_rate": 1e-2, "measure": lambda attacked: attacked}
    fresh = with_adapter(world, plain_config())
    _, (_, trained) = revive(fresh, learned, prompts, world.schedule, **options)
    before = state(trained)
    areas = {}
    for attack in (loss_scores, calibrated_scores):
        of_base, of_adapter = (attack(trained, x, prompts, world.schedule) for x in (world.members, learned))
        areas[attack] = roc_auc(of_adapter, of_base).value
    assert areas[loss_scores] < 0.5
    assert areas[calibrated_scores] > 0.9
    assert_same(before, state(trained))
    assert torch.equal(calibrated_scores(fresh, learned, prompts, world.schedule), torch.zeros(4))


def test_losses_are_not_calibrated_without_an_adapter(world, published):
    off = copy.deepcopy(published)
    off.disable_adapters()
    for unet in (world.pipeline.unet, off):
        with pytest.raises(BehaviourError, match="no active adapter"):
            calibrated_scores(unet, world.members, world.embeddings, world.schedule)


def test_scores_count_where_the_weights_are(world):
    """A member's half beside a half that was not trained on: with the weights there it looks like a member."""
    mixed, left = world.members.clone(), torch.zeros(4, 1, 8, 8)
    mixed[..., 4:] = -mixed[..., 4:]
    left[..., :4] = 1
    for attack in (loss_scores, pia_scores):
        on_left, on_right = (
            attack(world.pipeline.unet, mixed, world.embeddings, world.schedule, weights=weights).mean()
            for weights in (left, 1 - left)
        )
        assert on_left > on_right


def test_pia_refuses_a_schedule_without_noise_to_solve_for(world):
    schedule = DDPMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="'sample'; expected epsilon or v_prediction"):
        pia_scores(world.pipeline.unet, world.members, world.embeddings, schedule)


SCORES = st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0, 40.0, 41.0]) | st.floats(-1e6, 1e6), min_size=1, max_size=12)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_the_area_agrees_with_counting_all_pairs(members, others):
    pairs = list(itertools.product(members, others))
    counted = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    found = roc_auc(*(torch.tensor(scores, dtype=torch.float64) for scores in (members, others)))
    assert found.value == pytest.approx(counted)
    assert found.standard_error >= 0


def test_the_area_is_1_of_separable_scores_and_a_half_of_equal_ones():
    assert roc_auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])).value == 1
    assert roc_auc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])).value == 0
    assert roc_auc(torch.ones(5), torch.ones(3)).value == 0.5


def test_the_standard_error_of_an_area_is_its_spread_over_repetitions():
    """Exponential scores, of which the formula's two probabilities are exact."""
    generator = torch.Generator().manual_seed(0)
    found = [
        roc_auc(
            3 * torch.empty(40).exponential_(generator=generator), torch.empty(60).exponential_(generator=generator)
        )
        for _ in range(400)
    ]
    areas = torch.tensor([estimate.value for estimate in found])
    assert areas.mean() == pytest.approx(0.75, abs=0.02)
    assert sum(estimate.standard_error for estimate in found) / 400 == pytest.approx(float(areas.std()), rel=0.12)


@pytest.mark.parametrize("scores", [[], [float("nan")]])
def test_scores_without_an_order_have_no_area(scores):
    with pytest.raises(ConceptDataError, match="none of them NaN"):
        roc_auc(torch.tensor(scores), torch.ones(2))
