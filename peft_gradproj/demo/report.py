"""What a run of the demo found, as one object that becomes JSON and a page."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .._version import installed_versions
from ..evaluation.figures import Share, json_value
from ..verification import VerificationReport
from .measuring import Figures, Judges
from .precision import autocast_dtype
from .settings import DemoSettings
from .training import TrainingRun

__all__ = ["DemoReport"]

LIBRARIES = ("torch", "peft", "diffusers", "transformers")


@dataclass(frozen=True)
class DemoReport:
    """All figures of a run of the demo."""

    settings: DemoSettings
    figures: dict[str, Figures]
    """By model: `base`, `plain`, `ours`, `oracle`."""
    detector: dict[str, Any]
    """Threshold and error rates."""
    real_fidelity: tuple[Share, Share]
    """Top-1 and top-5 accuracy of the prompt classifier on real pictures under fresh distortion."""
    masks: dict[str, float | None]
    """Of the latents that a stamp covers, the share that was masked; and of the others, beyond the margin."""
    verification: VerificationReport
    losses: dict[str, list[float]]
    """Training loss of each step, by adapter."""
    checkpoints: dict[str, list[tuple[int, dict[str, float]]]]
    """Denoising losses on held-out pictures during training, by adapter."""
    step_seconds: dict[str, float]
    stage_seconds: dict[str, tuple[float, float]]
    """Wall and CPU seconds of each stage."""
    versions: dict[str, str]

    @classmethod
    def gather(
        cls,
        *,
        settings: DemoSettings,
        figures: dict[str, Figures],
        judges: Judges,
        masks: dict[str, float | None],
        verification: VerificationReport,
        runs: Mapping[str, TrainingRun],
        step_seconds: dict[str, float],
        stage_seconds: dict[str, tuple[float, float]],
    ) -> DemoReport:
        """Put together what was measured."""
        detector = judges.detector
        return cls(
            settings=settings,
            figures=figures,
            detector={
                "threshold": detector.threshold,
                "false_positives": detector.errors.false_positives,
                "misses": detector.errors.misses,
            },
            real_fidelity=(judges.fidelity.top(1), judges.fidelity.top(5)),
            masks=masks,
            verification=verification,
            losses={name: run.history.losses for name, run in runs.items()},
            checkpoints={name: run.history.checkpoints for name, run in runs.items()},
            step_seconds=step_seconds,
            stage_seconds=stage_seconds,
            versions={
                **installed_versions(*LIBRARIES),
                "python": platform.python_version(),
                "threads": str(torch.get_num_threads()),
                "autocast": str(autocast_dtype() or "off"),
            },
        )

    @property
    def minutes(self) -> float:
        """Wall time of all stages."""
        return sum(wall for wall, _ in self.stage_seconds.values()) / 60

    def step_ratios(self) -> dict[str, float]:
        """Time of a step as a multiple of stock LoRA's."""
        return {name: seconds / self.step_seconds["plain"] for name, seconds in self.step_seconds.items()}

    def to_dict(self) -> dict[str, Any]:
        """The report, JSON-able."""
        return {
            "settings": asdict(self.settings),
            "figures": {name: json_value(vars(figures)) for name, figures in self.figures.items()},
            "detector": json_value(self.detector),
            "real_fidelity": json_value(dict(zip(("top1", "top5"), self.real_fidelity, strict=True))),
            "masks": self.masks,
            "verification": self.verification.to_dict(),
            "step_ratios": self.step_ratios(),
            "step_seconds": self.step_seconds,
            "stage_seconds": {name: {"wall": w, "cpu": c} for name, (w, c) in self.stage_seconds.items()},
            "minutes": self.minutes,
            "losses": self.losses,
            "checkpoints": self.checkpoints,
            "versions": self.versions,
        }

    def __str__(self) -> str:
        lines = []
        for name, row in self.figures.items():
            kept, learned = ("-" if e is None else f"{e.value:.2f}" for e in (row.kept, row.learned))
            lines.append(
                f"{name:<8} leak {row.leak.value:.3f}  kept {kept}  learned {learned}  top-5 {row.top5.value:.2f}"
            )
        return "\n".join([*lines, f"verify: {self.verification.status}", f"{self.minutes:.1f} minutes"])
