r"""Fitting a published concept basis anew, to see whether it is what its recipe gives.

The recipe is what the file of the basis says of how it was fitted. It is a stranger's: numbers are checked for type and
bounds, and of `target_modules`, which may be a regular expression, nothing is used but the names of the layers that it
gave. For a layer and space with the published basis :math:`U` and the new one :math:`V`, the figure is the sine of
their largest principal angle, :math:`\|(I - V V^T) U\|_2`.

A basis may have more than its recipe: a rank or gradient basis that was put in during training, or layers of a text
encoder beside a UNet's. What no recipe of that base model could give is not checked, and so told.

What agrees is what the recipe, these batches and this base model give. Whether the batches show the concept is to be
seen in the batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from .basis import ConceptBasis
from .contrast import ContrastBatches
from .errors import BehaviourError, ConceptBasisError, GradProjError
from .fitting import fit_concept_basis
from .model_arguments import place_arguments
from .probes import placement
from .untrusted import printable, shown

__all__ = ["REFIT_TOLERANCE", "Comparison", "Difference", "Recipe", "compare_bases", "largest_sine", "refit_basis"]

REFIT_TOLERANCE = 0.05
"""Largest sine of a principal angle that rounding explains. Other hardware, thread counts and precisions round
otherwise, which turns directions the more, the closer the energies of the last one kept and the first one left are. In
half precision some may turn further."""

_MAX_RANK = 4096
_MAX_POSITIONS = 2**20
_MAX_LAYERS = 10_000
_FITTED_SPACES = frozenset({"input", "output"})
_OF_TRAINING = "the rank and gradient spaces depend on the adapter's start and on a loss, which are not published"


# The recipe


@dataclass(frozen=True)
class Recipe:
    """How a basis was fitted, as far as it can be done again."""

    layers: tuple[str, ...]
    """The layers that were targeted, and those that others of them have their basis from."""

    options: dict[str, Any]
    """Arguments of `fit_concept_basis`."""

    completed: bool
    """Whether attention layers without contrast were given the basis of a partner afterwards."""

    digest: str | None
    """Of the batches, where they were tensors."""

    custom_call: bool
    """Whether the publisher called the model by code of his own, which is not published."""

    dtype: str | None
    """Of the model that it was fitted on."""

    @classmethod
    def of(cls, fit: Mapping[str, Any] | None) -> Recipe:
        """The recipe in the notes on a fit.

        Raises:
            ConceptBasisError: If there is none that can be followed; it says why.
        """
        if fit is None or "method" not in fit:
            raise ConceptBasisError("its file does not say how it was fitted.")
        if fit["method"] == "union":
            raise ConceptBasisError("it is a union of several bases; only one fit can be done again.")
        spaces = fit.get("spaces")
        if not isinstance(spaces, list) or not spaces or not all(isinstance(space, str) for space in spaces):
            raise ConceptBasisError(f"its recipe is malformed: spaces is {shown(spaces)}.")
        if not _FITTED_SPACES.issuperset(spaces):
            raise ConceptBasisError(f"{_OF_TRAINING}.")
        options = {name: fit.get(name) for name in _OPTIONS}
        for name, value in options.items():
            if not _OPTIONS[name](value):
                raise ConceptBasisError(f"its recipe is malformed: {name} is {shown(value)}.")
        parts = [part if isinstance(part := fit.get(key), dict) else {} for key in ("layers", "left_out", "derived")]
        # Of a basis that was restricted, "layers" may lack the partners of layers that were kept.
        partners = {str(partner).rpartition(".")[0] for partner in parts[-1].values()}
        layers = tuple(sorted(partners.union(*parts)))
        if not 0 < len(layers) <= _MAX_LAYERS:
            raise ConceptBasisError(f"its recipe names {len(layers):,} layers; expected 1 to {_MAX_LAYERS:,}.")
        concept_set = fit.get("concept_set")
        digest = concept_set.get("sha256") if isinstance(concept_set, dict) else None
        return cls(
            layers,
            {**options, "contrast": fit["method"], "spaces": spaces, "unfit": fit.get("unfit", "skip")},
            bool(fit.get("derived")),
            digest if isinstance(digest, str) else None,
            fit.get("run_model") == "custom",
            dtype if isinstance(dtype := fit.get("dtype"), str) else None,
        )

    @property
    def caveats(self) -> str:
        """Why an honest basis may not be found again, for the end of a sentence; empty if there is no reason."""
        reasons = []
        if self.dtype in ("float16", "bfloat16"):
            reasons.append(f"it was fitted in {self.dtype}, whose rounding may turn directions further")
        if self.custom_call:
            reasons.append("the publisher called the model by code of his own, which is not published")
        return "".join(f"; {reason}" for reason in reasons)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_count(value: Any, largest: int) -> bool:
    return type(value) is int and 0 <= value <= largest


_OPTIONS: dict[str, Any] = {
    "rank": lambda v: v is None or _is_count(v, _MAX_RANK),
    "energy": lambda v: v is None or _is_number(v),
    "epsilon": _is_number,
    "threshold": _is_number,
    "held_out": _is_number,
    "max_reference_overlap": _is_number,
    "max_positions": lambda v: _is_count(v, _MAX_POSITIONS),
    "seed": lambda v: _is_count(v, 2**62),
}
"""The options of a recipe, and what is taken for a value of each; `fit_concept_basis` checks ranges."""


# The fit


def refit_basis(recipe: Recipe, model: nn.Module, batches: ContrastBatches) -> ConceptBasis:
    """Fit a basis by a recipe; the model is left as it was.

    Raises:
        ConceptBasisError: If the recipe gives no basis on this model.
        ConceptDataError: If the halves of the batches do not pair, or a value is not finite.
        BehaviourError: If the model cannot be run on the batches.
    """
    try:
        basis = fit_concept_basis(
            model,
            batches.concept,
            batches.reference or None,
            target_modules=list(recipe.layers),
            run_model=_run_model,
            progress=False,
            **recipe.options,
        )
    except GradProjError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        reason = printable(" ".join(str(error).split()))[:300]
        raise BehaviourError(
            f"the base model cannot be run on the contrast batches ({type(error).__name__}: {reason}). Were they made "
            "for it?"
        ) from error
    if recipe.completed:
        from .attention import complete_attention

        basis = complete_attention(model, basis, list(recipe.layers))
    return basis


def _run_model(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    return model(**place_arguments(batch, *placement(model)))


# The comparison


@dataclass(frozen=True)
class Difference:
    """A layer and space in which the published basis is not the new one."""

    layer: str
    detail: str
    sine: float | None = None


@dataclass(frozen=True)
class Comparison:
    """How a published basis compares with the new one."""

    differences: list[Difference]

    unchecked: dict[str, list[str]]
    """What of the published basis could not be compared, as `{module}.{space}`, by the reason."""

    worst: float | None
    """Largest sine of a principal angle; `None` if nothing could be compared."""


def largest_sine(u: Tensor, v: Tensor) -> float:
    """Sine of the largest principal angle between the spans of orthonormal columns, each of shape `(d, k)`."""
    u, v = u.double(), v.double()
    return float(torch.linalg.matrix_norm(u - v @ (v.mT @ u), 2))


def compare_bases(
    published: Mapping[str, Mapping[str, Tensor]],
    refitted: ConceptBasis,
    adapted: Collection[str],
    of_model: Collection[str],
    *,
    tolerance: float = REFIT_TOLERANCE,
) -> Comparison:
    """Where two bases differ: in directions, in their number, or in that one has none.

    Args:
        published: `{module: {space: basis}}`, orthonormal, each of shape `(d, k)`.
        refitted: The basis that was fitted anew.
        adapted: Layers that the adapter has. What was fitted for others may be left out of what is published.
        of_model: Layers that the base model has. Those of others, and the rank and gradient spaces, are not compared.
        tolerance: Largest sine of a principal angle that is no difference.
    """
    found: list[Difference] = []
    unchecked: dict[str, list[str]] = {}
    worst: float | None = None
    for module, space, u, v in _aligned(published, refitted, adapted):
        if space not in _FITTED_SPACES:
            unchecked.setdefault(_OF_TRAINING, []).append(f"{module}.{space}")
        elif module not in of_model:
            unchecked.setdefault("the base model has no such layers", []).append(f"{module}.{space}")
        elif v is None:
            found.append(Difference(module, f"has a published {space} basis, and the recipe gives none"))
        elif u is None:
            found.append(Difference(module, f"is published without the {space} basis that the recipe gives"))
        elif u.shape != v.shape:
            shapes = f"{tuple(u.shape)}, the recipe gives {tuple(v.shape)}"
            found.append(Difference(module, f"the published {space} basis has shape {shapes}"))
        else:
            sine = largest_sine(u, v)
            worst = sine if worst is None else max(worst, sine)
            # Written so that NaN is a difference.
            if not sine <= tolerance:
                detail = f"the published {space} basis is another than the recipe gives: the sine of their largest "
                found.append(Difference(module, f"{detail}angle is {sine:.2g}; expected at most {tolerance:g}", sine))
    return Comparison(found, unchecked, worst)


def _aligned(
    published: Mapping[str, Mapping[str, Tensor]], refitted: ConceptBasis, adapted: Collection[str]
) -> Iterator[tuple[str, str, Tensor | None, Tensor | None]]:
    """Module, space, and its two bases, of which one may be missing."""
    for module in sorted({*published, *(name for name in refitted if name in adapted)}):
        spaces, layer = published.get(module, {}), refitted.get(module)
        others = {} if layer is None else dict(layer.items())
        for space in sorted({*spaces, *others}):
            yield module, space, spaces.get(space), others.get(space)
