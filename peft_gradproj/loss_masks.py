"""Masks of the loss in training loops that are not ours, made of the very latents that are encoded.

Every `AutoencoderKL.encode` marks where the concept is in the latents that it returns. In the next training pass of the
denoiser, the gradient of its output is zero there: what the loss says of these places does not count, whatever the loss
is. Marks follow crops and flips, since they are made after them, and accumulation, since each batch is encoded.

Which pictures a pass trains on is not said anywhere, only that they were encoded since the pass before. So that no
batch is trained with the masks of another, a pass must have the shape of all that was encoded since then; anything else
is an error, and never a pass without masks. What the model was sampled from or evaluated on in between does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .concept_markers import ConceptMarkers
from .diffusion_inputs import scaled_latents, vae_answer
from .errors import ConceptDataError, GradProjConfigError
from .online import online_projections
from .pipelines import check_vae
from .probes import model_output

__all__ = ["MAX_SCALE", "LossMasks"]

MAX_SCALE = 1.25
"""By how much, as a factor, pictures may be larger or smaller than those in which the networks learned to find it."""


class LossMasks:
    """Takes the gradient away where the concept is, in every training pass of the watched models.

    Args:
        markers: The networks that find it.
        report: Called with a line that says that masks apply, when they first do.
    """

    passes: int
    """Training passes that masks were applied in, so far."""

    def __init__(self, markers: ConceptMarkers, report: Callable[[str], None] = lambda line: None) -> None:
        self.markers, self.report = markers, report
        self.passes = 0
        self._share: float | Tensor = 0.0
        self._encoded: list[_Encoded] = []
        self._sampled = False
        self._known_vaes: WeakSet[nn.Module] = WeakSet()
        self._watched: WeakSet[nn.Module] = WeakSet()
        self._hooks: list[RemovableHandle] = []

    @property
    def share(self) -> float:
        """The mean share of the latents' places that was masked in them."""
        return float(self._share) / max(1, self.passes)

    def __str__(self) -> str:
        found = "" if self._share else f"; {self._name} was found nowhere: are these the right markers?"
        return f"masks applied in {self.passes} training passes; mean masked share {self.share:.1%}{found}"

    # What is encoded

    def marking(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`AutoencoderKL.encode`, such that what it encodes is marked."""

        # By its own first arguments: until 0.41, diffusers does not say in its signature what they are.
        @wraps(encode)
        def marked(vae: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = encode(vae, x, *args, **kwargs)
            latents = result[0].mode()
            if vae not in self._known_vaes:
                self._check_vae(vae, latents, lambda pixels: encode(vae, pixels), x)
                self._known_vaes.add(vae)
            self._mark(vae, x, latents)
            return result

        return marked

    def _check_vae(self, vae: Any, latents: Tensor, encode: Callable[[Tensor], Any], pixels: Tensor) -> None:
        check_vae(vae.config)
        if latents.shape[1] != self.markers.channels:
            raise ConceptDataError(
                f"the VAE's latents have {latents.shape[1]} channels, and those of the concept markers "
                f"{self.markers.channels}. Make the markers with `gradproj mask` on the base model that is trained."
            )
        if self.markers.vae_answer is not None:
            self.markers.check_vae(vae_answer(vae, encode, like=pixels))

    @torch.no_grad()
    def _mark(self, vae: Any, pixels: Tensor, latents: Tensor) -> None:
        if self._sampled:
            # What was encoded before went through the model without a gradient: to sample from it, or to evaluate.
            self._encoded.clear()
            self._sampled = False
        marks = self.markers.mark(scaled_latents(vae, latents.float())).bool()
        self._encoded.append(_Encoded(marks, (pixels.shape[-1], pixels.shape[-2])))

    # What is trained

    def watch(self, model: nn.Module) -> None:
        """Mask the training passes of a model from now on; watching it twice is the same as once."""
        if model in self._watched:
            return
        self._watched.add(model)

        # A function, which copies of the model share: an attribute of theirs would be copied with its counts.
        def passed(module: nn.Module, args: Any, output: Any) -> None:
            self._pass(module, model_output(output))

        self._hooks.append(model.register_forward_hook(passed))

    def stop(self) -> None:
        """Mask no further pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._watched.clear()
        self._encoded.clear()

    def _pass(self, model: nn.Module, prediction: Tensor) -> None:
        if any(projection.probing for projection in online_projections(model).values()):
            # The concept has to count in the drift.
            return
        if not prediction.requires_grad:
            self._sampled = True
            return
        marks = self._marks_of(model, prediction).to(prediction.device)
        prediction.register_hook(lambda gradient: gradient.masked_fill(marks, 0))
        self._share = self._share + marks.float().mean()
        self.passes += 1
        if self.passes == 1:
            self.report(f"the loss does not count where {self._name} is found: {self.share:.1%} of the first batch")

    @property
    def _name(self) -> str:
        return self.markers.concept or "the concept"

    def _marks_of(self, model: nn.Module, prediction: Tensor) -> Tensor:
        """The marks of what a pass trains on, bool, shape `(b, 1, h, w)`."""
        encoded, self._encoded, self._sampled = self._encoded, [], False
        pictures, sizes = sum(len(part.marks) for part in encoded), {tuple(part.marks.shape[2:]) for part in encoded}
        shape = tuple(prediction.shape)
        if len(shape) == 4 and pictures == shape[0] and sizes == {shape[2:]}:
            for part in encoded:
                self._check_scale(*part.size)
            return torch.cat([part.marks for part in encoded])
        shown = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise GradProjConfigError(
            f"a batch cannot be masked: {type(model).__name__} was trained on one with outputs of shape {shape}, and "
            + (f"{pictures} pictures with latents of {shown} were" if encoded else "nothing was")
            + " encoded by AutoencoderKL.encode since the training pass before. Concept markers need a script that "
            "encodes each batch before it trains on it, once: leave out options such as --cache_latents, which encode "
            "all pictures beforehand. Or take masks from the data, with `gradproj mask` and --mask_column of the "
            "training scripts of this project."
        )

    def _check_scale(self, width: int, height: int) -> None:
        side, learned = min(width, height), self.markers.resolution
        if not learned / MAX_SCALE <= side <= learned * MAX_SCALE:
            raise ConceptDataError(
                f"the script trains on pictures of {width} x {height} pixels, and the concept markers learned at a "
                f"resolution of {learned}: at another scale they may miss the concept. Make them with `gradproj mask "
                f"--resolution {side}`, or train at {learned}."
            )


@dataclass(frozen=True)
class _Encoded:
    """What one call has encoded."""

    marks: Tensor
    """Where the concept is, bool, shape `(n, 1, h, w)`."""
    size: tuple[int, int]
    """Width and height of the pictures."""
