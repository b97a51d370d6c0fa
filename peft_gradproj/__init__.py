"""Selective fine-tuning with LoRA: a PEFT plugin that keeps a concept out by gradient projection.

Importing it costs next to nothing: each name is imported when it is first used, and the PEFT type GRADPROJ is
registered with the first `GradProjConfig`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .basis import ConceptBasis, LayerBasis
    from .concept_fit import FitReport, fit_concept
    from .concept_markers import ConceptMarkers
    from .concept_masks import MaskReport, find_concept, find_missed
    from .concepts import ConceptSet
    from .config import GradProjConfig
    from .contrast import ContrastBatches
    from .fitting import fit_concept_basis
    from .hub import PublishResult, push_adapter_to_hub
    from .model import GradProjModel, refresh_concept_basis
    from .online import online_projections
    from .probes import ConceptProbes, collect_concept_probes
    from .saving import save_adapter, save_sidecars
    from .signing import sign_adapter
    from .training_data import TrainingData
    from .verification import VerificationReport, verify_adapter

_MODULES = {
    "ConceptBasis": "basis",
    "ConceptMarkers": "concept_markers",
    "ConceptProbes": "probes",
    "ConceptSet": "concepts",
    "ContrastBatches": "contrast",
    "FitReport": "concept_fit",
    "GradProjConfig": "config",
    "GradProjModel": "model",
    "LayerBasis": "basis",
    "MaskReport": "concept_masks",
    "PublishResult": "hub",
    "TrainingData": "training_data",
    "VerificationReport": "verification",
    "collect_concept_probes": "probes",
    "find_concept": "concept_masks",
    "find_missed": "concept_masks",
    "fit_concept": "concept_fit",
    "fit_concept_basis": "fitting",
    "online_projections": "online",
    "push_adapter_to_hub": "hub",
    "refresh_concept_basis": "model",
    "save_adapter": "saving",
    "save_sidecars": "saving",
    "sign_adapter": "signing",
    "verify_adapter": "verification",
}

__all__ = [
    "ConceptBasis",
    "ConceptMarkers",
    "ConceptProbes",
    "ConceptSet",
    "ContrastBatches",
    "FitReport",
    "GradProjConfig",
    "GradProjModel",
    "LayerBasis",
    "MaskReport",
    "PublishResult",
    "TrainingData",
    "VerificationReport",
    "__version__",
    "collect_concept_probes",
    "find_concept",
    "find_missed",
    "fit_concept",
    "fit_concept_basis",
    "online_projections",
    "push_adapter_to_hub",
    "refresh_concept_basis",
    "save_adapter",
    "save_sidecars",
    "sign_adapter",
    "verify_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
