r"""Where the concept is in training pictures that nobody has labelled.

Where the concept can be found, its pressure can be taken away at the source: the training loss does not count there,
and what is missed is left to the online projection. A small network finds it in the latents. It learns from the
concept set alone, pictures onto which the concept was pasted, and so from positive and unlabelled examples: what was
pasted is the concept, the rest may hold it as well, since it comes from the user's own pictures. A classifier
:math:`g` of pasted against the rest says of a place that shows the concept, pasted or not, a constant
:math:`c = P(\mathrm{pasted} \mid \mathrm{concept})`, which its mean over held-out pasted places estimates; it is the
concept where :math:`g > c / 2` (Elkan and Noto, *Learning classifiers from only positive and unlabeled data*, 2008).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .diffusion_inputs import dilated
from .errors import ConceptDataError
from .small_networks import fit_network

__all__ = [
    "GUARDED_SHARE",
    "ConceptMarker",
    "fit_markers",
    "guarded",
    "mark_by_any",
    "mark_concept",
    "mark_missed",
    "marker_network",
    "places",
]


GUARDED_SHARE = 0.05
"""Where at least so many of the pictures that show the concept show it, others are guarded."""


class ConceptMarker:
    """Finds the concept in latents.

    Args:
        network: From latents `(N, C, h, w)` to logits `(N, 1, h, w)`, a :func:`marker_network`.
        labelled_share: The share :math:`c` of the concept's places that were pasted, in (0, 1].
    """

    def __init__(self, network: nn.Module, labelled_share: float) -> None:
        self.network, self.labelled_share = network, labelled_share

    @property
    def channels(self) -> int:
        """How many channels the latents have."""
        return int(self.network.get_buffer("0.mean").shape[1])

    @classmethod
    def fit(
        cls,
        latents: Tensor,
        masks: Tensor,
        *,
        steps: int = 300,
        batch_size: int = 64,
        crop: float = 1.0,
        seed: int = 0,
        progress: Callable[[int], None] = lambda step: None,
    ) -> ConceptMarker:
        """Train on pictures onto which the concept was pasted.

        Args:
            latents: As the denoiser is trained on, shape `(N, C, h, w)`; an eighth of them, the last, gives
                `labelled_share`, which is too high where they show the same pictures as the others.
            masks: Where it was pasted, in [0, 1], shape `(N, 1, h, w)`; such as `latent_weights(..., dilation=0)`.
            steps: Training steps.
            batch_size: Latents in a step.
            crop: Sides of the part of the latents that a step sees, as a share of theirs, in (0, 1]. Where the concept
                always lies in one place of the pictures, and was pasted anywhere, a network that sees where it is takes
                it for unlabelled there: the share that was pasted is no constant then.
            seed: Of weights, order and crops.
            progress: Called with the number of each finished step.

        Raises:
            ConceptDataError: If there are fewer than 16, the shapes do not agree, or nothing was pasted.
        """
        _check(latents, masks)
        held_out = len(latents) // 8
        seen, labels = latents[:-held_out], (masks[:-held_out] > 0.5).float()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = marker_network(seen).to(latents.device)

        def loss() -> Tensor:
            index = torch.randint(len(seen), (batch_size,), generator=generator)
            rows, columns = (_random_part(length, crop, generator) for length in seen.shape[2:])
            here = labels[index][..., rows, columns]
            return F.binary_cross_entropy_with_logits(network(seen[index][..., rows, columns]), here)

        with torch.enable_grad():
            fit_network(network, loss, steps=steps, learning_rate=3e-3, progress=progress)
        network.requires_grad_(False)
        pasted = masks[-held_out:] > 0.5
        return cls(network, float(network(latents[-held_out:]).sigmoid()[pasted].mean()))

    @torch.no_grad()
    def mark(self, latents: Tensor, *, dilation: int = 0, batch_size: int = 64) -> Tensor:
        """Where the concept is.

        Args:
            latents: Shape `(N, C, h, w)`.
            dilation: By how many latents to widen what was found: a latent depends on its neighbours' pixels, too.
            batch_size: Latents at once.

        Returns:
            1 where it is and 0 elsewhere, float32, shape `(N, 1, h, w)`.
        """
        parts = [self.network(part).sigmoid() > self.labelled_share / 2 for part in latents.split(batch_size)]
        return dilated(torch.cat(parts).float(), dilation)


def fit_markers(
    pasted: Sequence[tuple[Tensor, Tensor]],
    *,
    steps: int = 300,
    batch_size: int = 64,
    crop: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> list[ConceptMarker]:
    """For each fold of the training pictures a marker that learned from the others.

    A network that had learned from a picture itself would have learned that what is there was not pasted.

    Args:
        pasted: For each fold latents `(M, C, h, w)` and masks `(M, 1, h, w)` of the concept pasted onto the fold's
            pictures.
        steps: Training steps of each network.
        batch_size: Latents in a step.
        crop: See :meth:`ConceptMarker.fit`.
        seed: Likewise.
        progress: Called with the number of steps done, over all networks.
    """
    markers = []
    for number in range(len(pasted)):

        def report(done: int, before: int = number * steps) -> None:
            progress(before + done)

        others = [part for index, part in enumerate(pasted) if index != number]
        latents, masks = (torch.cat(tensors) for tensors in zip(*others, strict=True))
        options: Any = {"steps": steps, "batch_size": batch_size, "crop": crop, "seed": seed + number}
        markers.append(ConceptMarker.fit(latents, masks, progress=report, **options))
    return markers


def mark_concept(
    latents: Tensor,
    pasted: Sequence[tuple[Tensor, Tensor]],
    folds: Sequence[Tensor],
    *,
    dilation: int = 0,
    steps: int = 300,
    crop: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Mark the concept in training pictures, each by a network that learned from others.

    Args:
        latents: Of the training pictures, shape `(N, C, h, w)`.
        pasted: As in :func:`fit_markers`, for each fold.
        folds: For each fold the indices of its pictures; together all of `range(N)`.
        dilation: See :meth:`ConceptMarker.mark`.
        steps: Training steps of each network.
        crop: See :meth:`ConceptMarker.fit`.
        seed: See :meth:`ConceptMarker.fit`.
        progress: Called with the number of steps done, over all networks.

    Returns:
        1 where the concept is and 0 elsewhere, float32, shape `(N, 1, h, w)`.

    Raises:
        ConceptDataError: If there are fewer than two folds, or they are not all pictures, each once.
    """
    if len(folds) < 2 or len(pasted) != len(folds):
        raise ConceptDataError(f"{len(folds)} folds and {len(pasted)} pasted sets; expected as many, at least two.")
    if not torch.equal(torch.cat(list(folds)).sort().values, torch.arange(len(latents))):
        raise ConceptDataError(f"the folds are not all of the {len(latents)} pictures, each once.")
    masks = latents.new_zeros(len(latents), 1, *latents.shape[2:], dtype=torch.float32)
    markers = fit_markers(pasted, steps=steps, crop=crop, seed=seed, progress=progress)
    for fold, marker in zip(folds, markers, strict=True):
        masks[fold] = marker.mark(latents[fold], dilation=dilation)
    return masks


def mark_by_any(markers: Sequence[ConceptMarker], latents: Tensor) -> Tensor:
    """Where any of several networks finds the concept in latents `(N, C, h, w)`: as :meth:`ConceptMarker.mark`."""
    return torch.stack([marker.mark(latents) for marker in markers]).amax(0)


def mark_missed(latents: Tensor, masks: Tensor, folds: Sequence[Tensor], **options: Any) -> Tensor:
    """A second look: mark the concept also in pictures in which nothing is marked, as in others it is.

    The marks that there are are what networks learn from, each from those of other pictures, and what is marked nowhere
    is unlabelled. So what was missed by accident is found, wherever it lies, if most pictures of its kind are marked.
    What was missed because it looks different from all that is marked may be missed again.

    Args:
        latents: Of the training pictures, shape `(N, C, h, w)`.
        masks: What is marked in them, 0 or 1, shape `(N, 1, h, w)`; stays as it is in pictures in which anything is.
        folds: As in :func:`mark_concept`.
        **options: Further arguments of :func:`mark_concept`; what is marked already is not widened.

    Returns:
        1 where the concept is and 0 elsewhere, the dtype of the masks, shape `(N, 1, h, w)`.

    Raises:
        ConceptDataError: As :func:`mark_concept`; or if too few pictures are marked to learn from.
    """
    marked = masks.flatten(1).any(1)
    spread = [fold[_spread(marked[fold])] for fold in folds]
    shown = [(latents[fold], masks[fold]) for fold in spread]
    found = mark_concept(latents, shown, folds, **options)
    return torch.where(marked[:, None, None, None], masks, found.to(masks))


def _spread(marked: Tensor) -> Tensor:
    """An order of pictures in which any part holds as many of the marked ones as any other."""
    shown, others = marked.nonzero()[:, 0], (~marked).nonzero()[:, 0]
    places = [(torch.arange(len(part)) + 0.5) / max(1, len(part)) for part in (shown, others)]
    return torch.cat([shown, others])[torch.cat(places).argsort(stable=True)]


def guarded(masks: Tensor, *, share: float = GUARDED_SHARE) -> Tensor:
    """Masks that, in pictures in which the concept was not found where others show it, cover that as well.

    Either it is not there, or it was missed; and what is missed is learned. Marks elsewhere are kept, and do not stand
    for it: they are mistakes more often than not. A concept that always lies in one place, as watermarks do, costs
    little to guard against. One that lies anywhere costs most of such pictures if it is large; a small one lies nowhere
    often enough to be covered.

    Args:
        masks: Of training pictures, shape `(N, 1, h, w)`.
        share: Of the pictures that show the concept, in (0, 1]; what fewer of them show it at is not covered.

    Returns:
        1 where the concept is or may be and 0 elsewhere, the dtype of the masks, shape `(N, 1, h, w)`.
    """
    marked = masks.flatten(1).any(1)
    if not marked.any():
        return masks.clone()
    usual = masks[marked].bool().sum(0) >= share * int(marked.sum())
    found = (masks.bool() & usual).flatten(1).any(1)
    return torch.where(found[:, None, None, None], masks, torch.maximum(masks, usual.to(masks.dtype)))


def places(masks: Tensor, *, quantile: float = 0.05) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where pictures show the concept, as an overlay's ranges `across` and `down`.

    Args:
        masks: Of training pictures, not widened, shape `(N, 1, h, w)`.
        quantile: Share of the pictures that show it which is left out at either end of a range.

    Raises:
        ConceptDataError: If all masks are empty.
    """
    found = masks[:, 0].bool()
    if not found.any():
        raise ConceptDataError("the concept was found in none of the training pictures; is it the right overlay?")
    ranges = []
    for axis in (1, 2):
        lines = found.any(axis)[found.any(1).any(1)].float()
        size = lines.shape[1]
        first, last = lines.argmax(1), size - 1 - lines.flip(1).argmax(1)
        # An overlay that fills the axis lies everywhere on it.
        place = first / (size - 1 - last + first).clamp_min(1)
        low, high = place.float().quantile(torch.tensor([quantile, 1 - quantile])).tolist()
        ranges.append((low, high))
    return ranges[0], ranges[1]


def _random_part(length: int, share: float, generator: torch.Generator) -> slice:
    """A share of a length, cut out at random; nothing is drawn for the whole."""
    kept = max(1, round(share * length))
    start = int(torch.randint(length - kept + 1, (), generator=generator)) if kept < length else 0
    return slice(start, start + kept)


class _Standardise(nn.Module):
    """Brings channels to the mean 0 and the deviation 1 that they have in given latents `(N, C, h, w)`."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        deviation, mean = torch.std_mean(latents, (0, 2, 3), keepdim=True)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation.clamp_min(1e-3))

    def forward(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.deviation


def marker_network(latents: Tensor) -> nn.Module:
    """An untrained network for latents that are distributed as these, shape `(N, C, h, w)`."""
    layers: list[nn.Module] = [_Standardise(latents)]
    for inputs, outputs in ((latents.shape[1], 32), (32, 48), (48, 48), (48, 48)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(48, 1, 1))


def _check(latents: Tensor, masks: Tensor) -> None:
    if len(latents) < 16:
        raise ConceptDataError(f"{len(latents)} latents with the concept were given; expected at least 16.")
    if masks.shape != (len(latents), 1, *latents.shape[2:]):
        raise ConceptDataError(
            f"masks have shape {tuple(masks.shape)}; expected {(len(latents), 1, *latents.shape[2:])}, one for each of "
            "the latents."
        )
    if not (masks[-(len(latents) // 8) :] > 0.5).any() or not (masks > 0.5).any():
        raise ConceptDataError("the masks are empty: the concept was pasted nowhere.")
