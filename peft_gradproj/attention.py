r"""A basis for attention layers that never see the concept, from what they write to.

Pairs under equal captions give the projections of the text (:math:`W_k` and :math:`W_v` of cross-attention) equal
inputs and outputs, so that no contrast shows there, and yet an adapter on them can steer the picture to the concept.
What they write meets the concept in spaces that do show it:

- :math:`q^T k`: keys live in the space of queries. A key adapter that is orthogonal to the concept's directions among
  the queries does not meet what the concept adds to a query;
- :math:`\sum_j p_j v_j`: values live in the space of the output projection's inputs. A value adapter that is orthogonal
  to the concept's directions there does not add to them.

So such a layer gets an `output` basis: that of its partner in the same attention. With several heads both hold for the
sum over the heads, not for each of them; the probes watch the rest. With `qk_norm`, as in Stable Diffusion 3.5, the
first does not hold: queries and keys are normalised after their projections and scaled by learned weights, channel by
channel, and what was orthogonal is so no longer. There the basis of a key layer is no more than a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from .base_models import widths_of
from .basis import ConceptBasis, LayerBasis
from .observation import find_layers

__all__ = ["complete_attention"]

_QUERIES = (("to_q", "output"), ("add_q_proj", "output"))
_KEYS = (("to_k", "output"), ("add_k_proj", "output"))
_VALUES = (("to_out.0", "input"), ("to_v", "output"), ("to_add_out", "input"), ("add_v_proj", "output"))

_PARTNERS = {
    "to_q": (*_KEYS, *_QUERIES),
    "add_q_proj": (*_QUERIES, *_KEYS),
    "to_k": (*_QUERIES, *_KEYS),
    "add_k_proj": (*_KEYS, *_QUERIES),
    "to_v": _VALUES,
    "add_v_proj": _VALUES,
}
"""By the names that diffusers gives them: layers and spaces of one attention whose vectors a layer's outputs meet."""


def complete_attention(model: nn.Module, basis: ConceptBasis, target_modules: str | Sequence[str]) -> ConceptBasis:
    """The basis with that of partners for targeted attention layers that have none.

    Args:
        model: The model that the basis was fitted on.
        basis: As it was fitted.
        target_modules: As in `LoraConfig`.

    Returns:
        A basis whose `fit["derived"][module]` names the partner's layer and space. Layers without a partner that has a
        basis stay without.
    """
    layers: dict[str, LayerBasis] = {}
    derived: dict[str, str] = {}
    for layer in find_layers(model, target_modules):
        if layer.name in basis:
            layers[layer.name] = basis[layer.name]
            continue
        for partner, space, directions in _partners(layer.name, basis):
            if widths_of(layer.base) == (layer.d_in, directions.shape[0]):
                layers[layer.name] = LayerBasis(output=directions)
                derived[layer.name] = f"{partner}.{space}"
                break
    notes = {**(basis.fit or {}), "derived": derived}
    return ConceptBasis(layers, basis.concept, basis.base_model, basis.revision, notes)


def _partners(name: str, basis: ConceptBasis) -> Iterator[tuple[str, str, Tensor]]:
    """The partners of a layer that have a basis, with its directions, shape `(d, k)`; the nearest first."""
    attention, _, kind = name.rpartition(".")
    for partner, space in _PARTNERS.get(kind, ()):
        layer = basis.get(f"{attention}.{partner}")
        if layer is not None and getattr(layer, space) is not None:
            yield f"{attention}.{partner}", space, getattr(layer, space)
