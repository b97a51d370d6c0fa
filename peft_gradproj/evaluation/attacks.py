r"""Attacks that try to bring a concept back out of an adapted UNet.

Each takes whatever model it is given, the base, a plain adapter or a protected one, and answers with the same figure,
so that they can be compared:

- *revival* (:func:`revive`): whoever has the published adapter trains it further as the plain LoRA that it is. The
  figure is the number of steps until the concept is back, on data that shows it and on data that does not;
- *adaptive revival* (:func:`revive_with_probes`): the same by somebody who has the concept probes and trains for just
  what the online projection held down, if need be inside the complement of the concept basis, so that the attacked
  adapter still verifies;
- *textual inversion* (:func:`invert_concept`; Gal et al., arXiv 2208.01618): no weight is changed, but the embedding
  of a new token is optimised until the model denoises pictures of the concept. Pham et al. (arXiv 2308.01508) showed
  that it undoes many methods of concept erasure;
- *prompt search* (:func:`search_prompts`): which words bring the concept out, by a greedy search.

Membership inference is in `membership.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..basis import ConceptBasis
from ..config import GradProjConfig
from ..diffusion_inputs import encode_prompts, noised_inputs, training_target
from ..errors import BehaviourError, ConceptBasisError, ConceptDataError
from ..layers import ProjectedWeight, constrain_adapter
from ..probes import ConceptProbes, broadcast_weights, call_model, evaluation_mode, placement
from ..projection import drift

__all__ = [
    "PromptSearch",
    "ScoredPrompt",
    "TextualInversion",
    "invert_concept",
    "revive",
    "revive_with_probes",
    "search_prompts",
    "steps_until",
]

Figure = TypeVar("Figure")


# Revival


def revive(
    unet: Any,
    latents: Tensor,
    embeddings: Tensor,
    schedule: Any,
    *,
    steps: int,
    measure: Callable[[Any], Figure],
    every: int = 10,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    weights: Tensor | None = None,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> list[tuple[int, Figure]]:
    """Train the adapter inside a UNet further, as a plain LoRA, and watch the concept come back.

    The UNet holds the published adapter as a stranger has it: loaded by stock diffusers or PEFT, without projection.
    For the base model, give it a fresh adapter (`add_adapter(LoraConfig(...))`). A copy is trained; the caller's UNet
    is left as it is. The same seed gives every model the same pictures, noise and timesteps.

    Args:
        unet: A diffusers UNet with a LoRA adapter that is active.
        latents: What is trained on, shape `(N, C, h, w)`, on the UNet's device.
        embeddings: Of the prompts, shape `(N, tokens, width)`.
        schedule: From `noise_schedule`.
        steps: Optimizer steps.
        measure: Called with the attacked UNet, in evaluation mode and without gradients.
        every: Measured every so many steps, before the first and after the last.
        batch_size: Pictures in a step, drawn with replacement.
        learning_rate: Of AdamW, constant.
        weights: Where the loss counts, shape `(N, 1, h, w)`; everywhere by default.
        seed: Of everything random.
        autocast_dtype: What the UNet's forward is autocast to, if at all.
        progress: Called with the number of each finished step.

    Returns:
        Pairs of step and what `measure` said.

    Raises:
        BehaviourError: If the UNet has no LoRA, one that is merged or off, or one whose projection is still active.
    """
    attacked = _plain_copy(unet)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        index = torch.randint(len(latents), (batch_size,), generator=generator).to(latents.device)
        chosen = None if weights is None else weights[index]
        return _denoising_error(
            attacked, latents[index], embeddings[index], chosen, schedule, generator, autocast_dtype
        )

    return _curve(attacked, loss, steps, every, learning_rate, seed, measure, progress)


def revive_with_probes(
    unet: Any,
    probes: ConceptProbes,
    *,
    steps: int,
    measure: Callable[[Any], Figure],
    basis: ConceptBasis | None = None,
    every: int = 10,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> list[tuple[int, Figure]]:
    r"""Revival by an attacker who knows the probes, and may have to keep to the basis.

    On the probes :math:`x`, with their weights :math:`w` that say where the concept is, the adapted model is moved from
    the base model's outputs, at which the online projection held it, to the training targets :math:`y` of the concept:
    it minimises :math:`\sum w (f_\theta(x) - y)^2 / \sum w`.

    With a basis, A and B are kept in its complement, by the projection of `layers.py` itself: what comes out has the
    leakage of what went in, and verifies as it did. Layers that the basis lacks are trained freely.

    Args:
        unet: As in :func:`revive`, whose other arguments these are too.
        probes: The published concept probes, with their `loss_targets`.
        steps: Optimizer steps.
        measure: Called with the attacked UNet, in evaluation mode and without gradients.
        basis: The published concept basis, if the attacked adapter is to verify.
        every: Measured every so many steps, before the first and after the last.
        batch_size: Probes in a step, drawn with replacement.
        learning_rate: Of AdamW, constant.
        seed: Of everything random.
        autocast_dtype: What the UNet's forward is autocast to, if at all.
        progress: Called with the number of each finished step.

    Returns:
        Pairs of step and what `measure` said.

    Raises:
        BehaviourError: As :func:`revive`.
        ConceptDataError: If the probes have no `loss_targets`.
        ConceptBasisError: If the basis has none of the adapted layers.
    """
    if probes.loss_targets is None:
        raise ConceptDataError(
            "the concept probes have no loss_targets, so there is nothing to train for; collect them with those, for "
            "instance from concept_probe_batches(..., loss_targets=True)."
        )
    attacked = _plain_copy(unet)
    if basis is not None:
        _keep_to_complement(attacked, basis)
    showing = probes.weighted_indices()
    device, dtype = placement(attacked)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        index = showing[torch.randint(len(showing), (batch_size,), generator=generator)]
        batch = probes.batch(index, device, dtype)
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            output = call_model(attacked, batch.inputs, probes.run_model).float()
        assert batch.loss_targets is not None
        weights = None if batch.weights is None else broadcast_weights(batch.weights, output)
        return drift(output, batch.loss_targets, weights)

    return _curve(attacked, loss, steps, every, learning_rate, seed, measure, progress)


def steps_until(curve: Sequence[tuple[int, float]], threshold: float, *, below: bool = False) -> int | None:
    """The first measured step of a curve at which the figure is at least (`below`: at most) a threshold, or `None`."""
    reached = (step for step, figure in curve if (figure <= threshold if below else figure >= threshold))
    return next(reached, None)


def _curve(
    attacked: Any,
    loss: Callable[[], Tensor],
    steps: int,
    every: int,
    learning_rate: float,
    seed: int,
    measure: Callable[[Any], Figure],
    progress: Callable[[int], None],
) -> list[tuple[int, Figure]]:
    """Minimise `loss()` over what is trainable in `attacked`, measuring on the way."""

    def point(step: int) -> tuple[int, Figure]:
        # What a measurement draws is not taken from the dropout that follows.
        with torch.random.fork_rng(), torch.no_grad(), evaluation_mode(attacked):
            return step, measure(attacked)

    parameters = [parameter for parameter in attacked.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    curve = [point(0)]
    attacked.train()
    # Dropout in the adapter takes its masks from the global generator.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % every == 0 or step == steps:
                curve.append(point(step))
            progress(step)
    return curve


def _denoising_error(
    unet: Any,
    latents: Tensor,
    embeddings: Tensor,
    weights: Tensor | None,
    schedule: Any,
    generator: torch.Generator,
    autocast_dtype: torch.dtype | None,
) -> Tensor:
    """The training loss of a batch under fresh noise and timesteps, a scalar."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = torch.randint(schedule.config.num_train_timesteps, (len(latents),), generator=generator)
    timesteps = timesteps.to(latents.device)
    with torch.autocast(latents.device.type, autocast_dtype, enabled=autocast_dtype is not None):
        answer = unet(**noised_inputs(latents, embeddings, noise, timesteps, schedule)).sample
    return drift(answer.float(), training_target(schedule, latents, noise, timesteps), weights)


def _lora_layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """The LoRA layers of a model, under the names that they have in the base model."""
    from peft.tuners.lora import LoraLayer

    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def _plain_copy(unet: Any) -> Any:
    """A copy in which nothing but the active adapter is trainable, and that in float32."""
    _check_plain(unet)
    attacked = copy.deepcopy(unet).requires_grad_(False)
    for _, layer in _lora_layers(attacked):
        layer.set_adapter(layer.active_adapters)
    for parameter in attacked.parameters():
        if parameter.requires_grad:
            # No attacker trains in half precision: bfloat16 rounds small steps away, in float16 AdamW divides 0 by 0.
            parameter.data = parameter.data.float()
    return attacked


def _check_plain(unet: Any) -> None:
    layers = [layer for _, layer in _lora_layers(unet)]
    if not layers:
        raise BehaviourError(
            "the UNet has no LoRA layers. Load the published adapter with load_lora_adapter; to attack the base model, "
            "give it a fresh one with add_adapter(LoraConfig(...))."
        )
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise BehaviourError(
            "the UNet's adapter is merged or disabled; unmerge or enable it, so that it can be trained."
        )
    configs = getattr(unet, "peft_config", {}).values()
    projected = any(isinstance(module, ProjectedWeight) for module in unet.modules())
    if projected or any(isinstance(config, GradProjConfig) for config in configs):
        raise BehaviourError(
            "the UNet's adapter is still projected, and an attacker's is not. Put it into the base model's UNet as a "
            "stranger would: unet.load_lora_adapter(get_peft_model_state_dict(trained_unet), prefix=None)."
        )


def _keep_to_complement(attacked: Any, basis: ConceptBasis) -> None:
    covered = [(name, layer) for name, layer in _lora_layers(attacked) if name in basis]
    if not covered:
        raise ConceptBasisError(
            f"the concept basis has none of the adapted layers; it is for {next(iter(basis))}, ... ."
        )
    for name, layer in covered:
        for adapter in layer.active_adapters:
            constrain_adapter(layer, adapter, name, basis[name], strength=1.0, initial=False)


# Textual inversion


@dataclass(frozen=True)
class TextualInversion:
    """A token that was made to stand for the concept.

    Args:
        token: How prompts name it.
        embeddings: Its input embeddings, shape `(vectors, width)`; in a prompt it takes so many places.
        losses: The training loss of each step.
    """

    token: str
    embeddings: Tensor
    losses: tuple[float, ...] = ()

    @contextmanager
    def loaded(self, pipeline: Any) -> Iterator[None]:
        """Within it, the pipeline's prompts may contain the token.

        The pipeline has copies of its tokenizer and text encoder meanwhile; its own are not touched.
        """
        kept = pipeline.tokenizer, pipeline.text_encoder
        pipeline.tokenizer, pipeline.text_encoder = copy.deepcopy(kept)
        try:
            # New rows of the table are drawn from the global generator before they are overwritten.
            with torch.random.fork_rng():
                pipeline.load_textual_inversion(self.embeddings, token=self.token)
            yield
        finally:
            pipeline.tokenizer, pipeline.text_encoder = kept

    def fill(self, prompt: str) -> str:
        """A prompt such as "a picture of {}", with the token in it."""
        return prompt.replace("{}", self.token)

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings, float32, shape `(N, tokens, width)`, of prompts with `{}` where the token goes."""
        with self.loaded(pipeline):
            return encode_prompts(pipeline, [self.fill(prompt) for prompt in prompts])


def invert_concept(
    pipeline: Any,
    latents: Tensor,
    prompts: Sequence[str],
    schedule: Any,
    *,
    steps: int,
    weights: Tensor | None = None,
    vectors: int = 1,
    initial: str | None = None,
    batch_size: int = 8,
    learning_rate: float = 5e-3,
    token: str = "<concept>",
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> TextualInversion:
    r"""Find the input embedding of a new token with which the pipeline's UNet denoises pictures of the concept.

    :math:`v^* = \arg\min_v E_{z, \epsilon, t} \sum w (f(z_t, t, c_v) - y)^2 / \sum w` with the prompt's embedding
    :math:`c_v` (Gal et al., arXiv 2208.01618); UNet, tokenizer and text encoder stay as they are.

    Args:
        pipeline: A `StableDiffusionPipeline`, or another with one tokenizer and text encoder; its UNet, with or without
            an adapter, is the one that is attacked.
        latents: Pictures that show the concept, shape `(N, C, h, w)`, on the UNet's device.
        prompts: One for each picture, with `{}` where the token goes: "a picture of {}", or the picture's own caption
            followed by it, which leaves to the token only what the caption does not say.
        schedule: From `noise_schedule`.
        steps: Optimizer steps.
        weights: Where in the pictures the concept is, shape `(N, 1, h, w)`; everywhere by default.
        vectors: How many embeddings the token has.
        initial: A word whose embedding they start from; the mean of the vocabulary by default.
        batch_size: Pictures in a step, drawn with replacement.
        learning_rate: Of Adam; to be seen against the spread of the text encoder's embeddings.
        token: How the token is called; not in the vocabulary.
        seed: Of everything random.
        autocast_dtype: What the UNet's forward is autocast to, if at all.
        progress: Called with the number of each finished step.

    Raises:
        ConceptDataError: If there is not one prompt for each picture, or one has no place for the token.
        ValueError: From diffusers, if the token is in the vocabulary.
    """
    if len(prompts) != len(latents):
        raise ConceptDataError(f"{len(prompts)} prompts for {len(latents)} pictures; expected one for each.")
    embeddings = _initial_embeddings(pipeline, initial, vectors)
    start = TextualInversion(token, embeddings.clone())
    optimizer = torch.optim.Adam([embeddings.requires_grad_()], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    texts = [start.fill(prompt) for prompt in prompts]
    losses = []
    with start.loaded(pipeline), evaluation_mode(pipeline.unet), _inserted(pipeline, token, embeddings, texts):
        for step in range(1, steps + 1):
            index = torch.randint(len(latents), (batch_size,), generator=generator)
            encoded = pipeline.encode_prompt([texts[i] for i in index], latents.device, 1, False)[0]
            index = index.to(latents.device)
            chosen = None if weights is None else weights[index]
            loss = _denoising_error(pipeline.unet, latents[index], encoded, chosen, schedule, generator, autocast_dtype)
            # Not backward(), which would leave gradients in the caller's UNet.
            (embeddings.grad,) = torch.autograd.grad(loss, [embeddings])
            optimizer.step()
            losses.append(float(loss.detach()))
            progress(step)
    return TextualInversion(token, embeddings.detach(), tuple(losses))


def _initial_embeddings(pipeline: Any, initial: str | None, vectors: int) -> Tensor:
    """Shape `(vectors, width)`, float32."""
    table = pipeline.text_encoder.get_input_embeddings().weight.detach().float()
    if initial is not None:
        table = table[pipeline.tokenizer(initial, add_special_tokens=False).input_ids]
    return table.mean(0).repeat(vectors, 1)


@contextmanager
def _inserted(pipeline: Any, token: str, embeddings: Tensor, texts: Sequence[str]) -> Iterator[None]:
    """The pipeline's text encoder reads `embeddings`, with gradients, in the places of a token that is loaded."""
    tokenizer, table = pipeline.tokenizer, pipeline.text_encoder.get_input_embeddings()
    names = [token, *(f"{token}_{i}" for i in range(1, len(embeddings)))]
    ids = tokenizer.convert_tokens_to_ids(names)
    for text in texts:
        converted = pipeline.maybe_convert_prompt(text, tokenizer)
        if not set(ids) <= set(tokenizer(converted, truncation=True).input_ids):
            raise ConceptDataError(
                f"the prompt {text!r} has no place for the token's {len(ids)} vectors; expected {{}} in it, within the "
                f"first {tokenizer.model_max_length} tokens."
            )

    def insert(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for number, vector in zip(ids, embeddings, strict=True):
            output = torch.where((arguments[0] == number).unsqueeze(-1), vector.to(output.dtype), output)
        return output

    with table.register_forward_hook(insert):
        yield


# Prompt search


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt of some words, and its score."""

    words: tuple[str, ...]
    prompt: str
    score: float


@dataclass(frozen=True)
class PromptSearch:
    """What a prompt search found."""

    ranking: tuple[ScoredPrompt, ...]
    """Every prompt that was scored, the highest score first; equal ones in the order in which they were tried."""

    @property
    def scored(self) -> int:
        """How many prompts were scored."""
        return len(self.ranking)

    @property
    def best(self) -> ScoredPrompt:
        """The prompt with the highest score."""
        return self.ranking[0]

    def words(self) -> list[ScoredPrompt]:
        """The prompts of a single word, the highest score first."""
        return [candidate for candidate in self.ranking if len(candidate.words) == 1]


def search_prompts(
    words: Sequence[str],
    score: Callable[[list[str]], Tensor],
    *,
    budget: int,
    template: str = "a picture of {}",
    max_words: int = 3,
    batch_size: int = 16,
) -> PromptSearch:
    """Search prompts made of words for the one that brings the concept out most.

    Every word is tried alone; the best is then extended by one word after another, as long as the score rises, in the
    order of the words' own scores. Equal scores keep the order of the list, so that the search is as deterministic as
    `score`. A score that is a share of few samples makes the best look better than it is: score it once more, on other
    seeds, before it is reported.

    Args:
        words: What to try, the likelier first: beyond the budget they are not tried at all.
        score: From prompts to their scores, shape `(N,)`, higher where the concept shows more, such as the share of
            samples in which a detector finds it.
        budget: How many prompts are scored at most.
        template: With `{}` where the words go.
        max_words: In a prompt.
        batch_size: Prompts that `score` is called with.

    Raises:
        ConceptDataError: If there are no words, or no budget for one, or a score is not a number.
    """
    words = list(dict.fromkeys(words))
    if not words or budget < 1:
        raise ConceptDataError(f"{len(words)} words and a budget of {budget} prompts; expected at least one of each.")

    def rank(candidates: list[tuple[str, ...]]) -> list[ScoredPrompt]:
        prompts = [template.replace("{}", " ".join(candidate)) for candidate in candidates]
        scores: list[float] = []
        for start in range(0, len(prompts), batch_size):
            scores += score(prompts[start : start + batch_size]).tolist()
        if broken := [prompt for prompt, found in zip(prompts, scores, strict=True) if math.isnan(found)]:
            # It has no place in an order, and leaves the others without theirs.
            raise ConceptDataError(f"the score of {broken[0]!r} is not a number; are the samples finite?")
        return _ranked([ScoredPrompt(*found) for found in zip(candidates, prompts, scores, strict=True)])

    singles = rank([(word,) for word in words[:budget]])
    best, tried = singles[0], singles
    while len(best.words) < max_words and len(tried) < budget:
        others = [(*best.words, *single.words) for single in singles if single.words[0] not in best.words]
        extended = rank(others[: budget - len(tried)])
        tried = tried + extended
        if not extended or extended[0].score <= best.score:
            break
        best = extended[0]
    return PromptSearch(tuple(_ranked(tried)))


def _ranked(candidates: Sequence[ScoredPrompt]) -> list[ScoredPrompt]:
    return sorted(candidates, key=lambda candidate: -candidate.score)
