r"""Prompt fidelity: how well samples show what their prompt names, where no CLIP model is at hand.

A small classifier learns which prompt belongs to which picture, from real pictures under heavy distortion, with
overlays pasted on, so that neither style nor a stamp decides. A sample is faithful if its own prompt is among the
classifier's first k. The accuracy on real pictures under fresh distortion is reported beside it: it is the most that
can be expected of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..concepts import Overlay
from ..diffusion_inputs import pictures_to_tensor
from ..errors import ConceptDataError
from ..small_networks import (
    batch_indices,
    blur,
    conv_block,
    fit_network,
    jitter_pictures,
    network_answers,
    shift_colours,
)
from .figures import Share

__all__ = ["PromptFidelity"]


class PromptFidelity:
    """How well pictures show what their prompts name.

    Args:
        network: From pictures `(N, 3, H, W)` in [-1, 1] to logits `(N, prompts)`.
        prompts: The prompts, one for each logit.
        real_ranks: Ranks of the true prompts of real pictures under fresh distortion, shape `(M,)`.
    """

    def __init__(self, network: nn.Module, prompts: Sequence[str], real_ranks: Tensor) -> None:
        self.network, self.prompts, self.real_ranks = network, tuple(prompts), real_ranks
        self._class = {prompt: index for index, prompt in enumerate(self.prompts)}

    @classmethod
    def fit(
        cls,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        *,
        overlays: Sequence[Overlay] = (),
        distort: Callable[[Tensor], Tensor] = lambda pixels: pixels,
        steps: int = 600,
        seed: int = 0,
        progress: Callable[[int], None] = lambda step: None,
    ) -> PromptFidelity:
        """Train the classifier.

        Args:
            pictures: RGB, of one size; several may have the same prompt, best in different styles.
            prompts: As many.
            overlays: Pasted onto half of the pictures.
            distort: What samples have been through, such as a VAE's encoder and decoder; done to those with an overlay.
            steps: Training steps of 64 pictures.
            seed: Of everything random.
            progress: Called with the number of each finished step.

        Raises:
            ConceptDataError: If there are fewer than two pictures, or not as many prompts.
        """
        if not pictures or len(pictures) != len(prompts):
            raise ConceptDataError(f"{len(pictures)} pictures and {len(prompts)} prompts were given.")
        names = sorted(set(prompts))
        labels = torch.tensor([names.index(prompt) for prompt in prompts])
        generator = torch.Generator().manual_seed(seed)
        plain = pictures_to_tensor(pictures)
        stamped = distort(pictures_to_tensor(_stamp(pictures, overlays, seed)))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = _network(len(names))
        batches = batch_indices(len(pictures), 64, generator)

        def loss() -> Tensor:
            index = next(batches)
            pixels = _augment(plain, stamped, index, generator)
            return F.cross_entropy(network(pixels), labels[index], label_smoothing=0.1)

        fit_network(network, loss, steps=steps, learning_rate=4e-3, progress=progress)
        every = torch.arange(len(pictures))
        fresh = _augment(plain, stamped, every, torch.Generator().manual_seed(seed + 1))
        return cls(network, names, _ranks(network, fresh, labels))

    def ranks(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Place of each picture's own prompt among all, 0 being first; shape `(N,)`.

        Raises:
            BehaviourError: If pictures, shape `(N, 3, H, W)`, are not finite.
        """
        return _ranks(self.network, pictures, torch.tensor([self._class[prompt] for prompt in prompts]))

    def top(self, k: int, ranks: Tensor | None = None) -> Share:
        """Share of ranks below `k`; of the real pictures by default."""
        return Share.of(((self.real_ranks if ranks is None else ranks) < k).tolist())


def _network(classes: int) -> nn.Module:
    return nn.Sequential(
        conv_block(3, 32, stride=2),
        conv_block(32, 64, stride=2),
        conv_block(64, 128, stride=2),
        conv_block(128, 192, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(192 * 4, classes),
    )


def _augment(plain: Tensor, stamped: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
    pixels = jitter_pictures(torch.where(chosen, stamped[index], plain[index]), generator)
    return blur(shift_colours(pixels, generator, amount=0.3), generator)


def _stamp(pictures: Sequence[Image.Image], overlays: Sequence[Overlay], seed: int) -> list[Image.Image]:
    if not overlays:
        return list(pictures)
    generator = np.random.default_rng(seed)
    stamped = []
    for picture in pictures:
        overlay = overlays[int(generator.integers(len(overlays)))]
        stamped.append(overlay.paste(picture, overlay.place(picture.size, generator))[0])
    return stamped


def _ranks(network: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    logits = network_answers(network, pictures)
    return (logits > logits.gather(1, labels[:, None])).sum(1)
