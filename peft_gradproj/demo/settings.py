"""The settings of the demo, in one place; the page prints them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["ASSETS", "DEFAULT_LOGO", "DemoSettings"]

ASSETS = Path(__file__).parent / "assets"
DEFAULT_LOGO = "youtube"


@dataclass(frozen=True)
class DemoSettings:
    """What a run of the demo does. The defaults take some minutes on two cores; `quick()` takes seconds."""

    logo: str = DEFAULT_LOGO
    seed: int = 0

    pictures: int = 460
    """Pictures of each style that are used, of 460."""
    held_out: int = 64
    """Pictures of the new style that nothing is trained on."""
    stamped_share: float = 0.75
    logo_scale: tuple[float, float] = (0.3, 0.38)
    """Longer side of the logo, as a share of the picture's side: 19 to 24 pixels of 64."""
    logo_across: tuple[float, float] = (0.85, 1.0)
    logo_down: tuple[float, float] = (0.85, 1.0)
    """Where the logo is stamped: near the lower right corner, as watermarks are."""
    logo_angle: tuple[float, float] = (-8.0, 8.0)

    rank: int = 16
    steps: int = 800
    batch_size: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    target_modules: str = (
        r".*\.(attn1\.to_[qkv]|attn2\.to_q|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2)"
    )
    checkpoints: int = 6
    """How often during training the denoising losses are measured, for the curves."""

    basis_rank: int = 8
    basis_pairs: int = 96
    mask_pairs: int = 384
    """Pictures onto which the logo is pasted, for each of the two networks that find it."""
    mask_steps: int = 200
    mask_crop: float = 0.5
    """Side of what such a network sees in a step, as a share of a picture's: it then learns the logo, not its place."""
    probes: int = 768
    probe_dilation: int = 0
    """By how many latents the probes' weights are wider than the logo."""
    probe_every: int = 4
    probe_batch_size: int = 8
    probe_history: int = 1
    restore: float = 0.5

    samples: int = 96
    sampling_steps: int = 20
    guidance: float = 1.5
    guidance_rescale: float = 0.0

    detector_steps: int = 350
    detector_scenes: int = 800
    fidelity_steps: int = 400
    timing_rounds: int = 6
    sheet_rows: int = 10

    def quick(self) -> DemoSettings:
        """The same code path in less than a minute; its figures mean nothing."""
        return replace(
            self,
            steps=6,
            batch_size=4,
            checkpoints=2,
            pictures=64,
            held_out=8,
            basis_pairs=32,
            mask_pairs=32,
            mask_steps=60,
            probes=32,
            samples=4,
            sampling_steps=3,
            detector_steps=4,
            detector_scenes=64,
            fidelity_steps=3,
            timing_rounds=1,
            sheet_rows=2,
        )
