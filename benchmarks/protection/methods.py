"""What is compared: ways to fine-tune with LoRA while a concept is in the training data.

Every method gets the same start, the same pictures, noise and timesteps in the same order, and the same number of
steps; methods that filter see the pictures that are left more often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from peft_gradproj import GradProjConfig
from peft_gradproj.online import ONLINE_OPTIONS

__all__ = [
    "ALL_METHODS",
    "BY_DEFAULT",
    "DEFAULTS",
    "DEFAULT_SWEEPS",
    "FEWER_STEPS",
    "GUARDED_ONLINE",
    "GUIDANCE_SWEEPS",
    "GUIDED",
    "GUIDED_FURTHER",
    "MAIN",
    "METHODS",
    "OTHERWISE",
    "SECOND_LOOK",
    "SWEEPS",
    "VARIED",
    "Method",
    "online_options",
]

Knowledge = Literal["perfect", "missing-20", "found", "found-missing-20", "found-by-any"]
"""Where the concept is: as it was pasted; the same with a fifth of the pictures missed; as a network found it that did
not learn from the picture; the same, mistakes and all, with a fifth missed; as any network found it, which is what
`gradproj launch` has."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        name: Of the row in the tables.
        clean: Train on the pictures without the concept, under captions that do not name it.
        filtered: Leave out the pictures that show the concept.
        masked: Where the concept is, the loss does not count.
        guarded: Nor does it where others show it, in pictures in which it was not found there.
        second_look: Nor where networks find it, in pictures in which it was not found, that learned from the others.
        dilation: By how many latents masks are widened.
        placed: Whether the concept is pasted, for basis and probes, where the masks found it.
        spaces: Of the subspace projection.
        online: Whether probes correct the steps.
        correction: How, if not as the product does: a name in `corrections.CORRECTIONS`.
        penalty: Weight of the drift on as many probes in every step's loss; 0 for none.
        text_penalty: Weight of Coffee's penalty (arXiv 2511.14113) in every step's loss: the prompts' embeddings, which
            are adapted then too, may not come closer to those of the words for the concept; 0 for none.
        steps_share: Of the steps that the others take.
    """

    name: str
    clean: bool = False
    filtered: Knowledge | None = None
    masked: Knowledge | None = None
    guarded: bool = False
    second_look: bool = False
    dilation: int = 0
    placed: bool = True
    spaces: tuple[str, ...] = ()
    online: bool = False
    correction: str | None = None
    penalty: float = 0.0
    text_penalty: float = 0.0
    rule: Literal["half-space", "orthogonal"] = "half-space"
    probe_every: int = 4
    probe_batch_size: int = 8
    probe_history: int = 1
    restore: float = 0.5
    negative_guidance: float = 0.0
    probes: int = 768
    basis_rank: int = 8
    basis_pairs: int = 96
    strength: float = 1.0
    rank: int = 16
    weight_decay: float = 1e-2
    steps_share: float = 1.0

    @property
    def protected(self) -> bool:
        """Whether it is one of ours, a GradProj adapter."""
        return bool(self.spaces) or self.online


OURS = Method("ours", masked="found", spaces=("input", "output"), online=True)


def online_options(of: Any) -> dict[str, Any]:
    """How a method, or `GradProjConfig` by default, corrects steps, by the names of the latter."""
    return {name: getattr(of, name) for name in ONLINE_OPTIONS}


GUARDED_ONLINE = Method("masked, missing 20 %, guarded + online", masked="missing-20", guarded=True, online=True)

GUIDANCE: dict[str, Any] = {
    "probe_every": 8,
    "probe_batch_size": 2,
    "probe_history": 4,
    "negative_guidance": 0.3,
}
"""Steps are drawn past the base model, with two probes at every eighth step as by default, and half-spaces that are
kept instead of more probes."""

GUIDED = (
    replace(GUARDED_ONLINE, name=f"{GUARDED_ONLINE.name}, guided", **GUIDANCE),
    replace(OURS, name="ours, guided", **GUIDANCE),
)

SECOND_LOOK = Method("masked, missing 20 %, second look", masked="missing-20", second_look=True)

GUIDANCE_FURTHER: dict[str, Any] = {**GUIDANCE, "probe_history": 16, "negative_guidance": 3.0}
"""The same farther past it, against four times as many half-spaces."""

GUIDED_FURTHER = (
    replace(SECOND_LOOK, name=f"{SECOND_LOOK.name} + online, guided further", online=True, **GUIDANCE_FURTHER),
    replace(OURS, name="ours, guided further", **GUIDANCE_FURTHER),
)

OTHERWISE = tuple(
    replace(GUARDED_ONLINE, name=f"{GUARDED_ONLINE.name}, {correction}", correction=correction)
    for correction in ("layers apart", "restore adapts")
)
"""The same with steps corrected as the product does not."""

BY_DEFAULT = replace(
    OURS,
    name="ours, by default",
    placed=False,
    probes=64,
    basis_rank=16,
    basis_pairs=64,
    **online_options(GradProjConfig),
)

METHODS = {
    method.name: method
    for method in (
        Method("plain"),
        Method("oracle", clean=True),
        OURS,
        BY_DEFAULT,
        Method("masked, found", masked="found"),
        Method("masked, found by any", masked="found-by-any"),
        Method("online", online=True),
        Method("online, history 8", online=True, probe_history=8),
        Method("online, history 8, guided", online=True, probe_history=8, negative_guidance=0.3),
        replace(BY_DEFAULT, name="online, by default", masked=None, spaces=()),
        Method("online, every step, restore 1", online=True, probe_every=1, restore=1.0),
        Method("masked, found + online", masked="found", online=True),
        Method("subspace + online", spaces=("input", "output"), online=True),
        Method("filtered, perfect", filtered="perfect"),
        Method("filtered, missing 20 %", filtered="missing-20"),
        Method("filtered, found", filtered="found"),
        Method("masked, perfect", masked="perfect"),
        Method("masked, missing 20 %", masked="missing-20"),
        Method("masked, missing 20 % + online", masked="missing-20", online=True),
        Method("masked, found, guarded", masked="found", guarded=True),
        Method("masked, missing 20 %, guarded", masked="missing-20", guarded=True),
        Method("masked, found but for 20 %, guarded", masked="found-missing-20", guarded=True),
        SECOND_LOOK,
        GUARDED_ONLINE,
        replace(GUARDED_ONLINE, name=f"{GUARDED_ONLINE.name}, history 4, restore 1", probe_history=4, restore=1.0),
        *OTHERWISE,
        *GUIDED,
        *GUIDED_FURTHER,
        replace(GUARDED_ONLINE, name=f"{GUARDED_ONLINE.name}, probes anywhere", placed=False),
        Method("masked, missing 20 % + online, every step", masked="missing-20", online=True, probe_every=1),
        Method("rank 4, weight decay 1", rank=4, weight_decay=1.0),
        Method("penalty 0.3", penalty=0.3),
        Method("Coffee-style", text_penalty=1.0),
        Method("literal rule", online=True, rule="orthogonal", probe_every=1),
        Method("subspace: input", spaces=("input",)),
        Method("subspace: output", spaces=("output",)),
        Method("subspace: input and output", spaces=("input", "output")),
        Method("subspace: rank", spaces=("rank",), basis_rank=4),
        Method("subspace: gradient", spaces=("gradient",)),
    )
}

FEWER_STEPS = {
    method.name: method
    for share, words, names in (
        (1 / 4, "a quarter", ("oracle", "ours", "masked, found", "filtered, perfect", "filtered, found")),
        (1 / 16, "a sixteenth", ("filtered, perfect", "filtered, found")),
    )
    for method in (replace(METHODS[name], name=f"{name}, {words} of the steps", steps_share=share) for name in names)
}
"""Where a quarter of the pictures is without the concept: filtered runs see each of those as often in a quarter of the
steps as the oracle sees its own in all, and in a sixteenth as often as masked runs do in a quarter."""

MAIN = ("plain", "oracle", "ours", "masked, found")
"""Run on every concept and regime; the others on one logo."""

BY_NAME = ("literal rule", "Coffee-style", "subspace: input and output")
"""What the papers describe by words; run where captions name the concept as well."""

HALF_FOUND = (
    "masked, missing 20 %",
    "masked, missing 20 %, guarded",
    GUARDED_ONLINE.name,
    SECOND_LOOK.name,
)
"""Masks that miss pictures; run on both logos, not named."""


def _varied(method: Method, name: str, values: Sequence[Any]) -> list[Method]:
    return [
        replace(method, name=f"{method.name}, {name.replace('_', ' ')} {value}", **{name: value})
        for value in values
        if value != getattr(method, name)
    ]


SWEEPS = {
    method.name: method
    for name, values in {
        "dilation": (0, 1),
        "restore": (0.0, 0.5, 1.0),
        "probe_every": (2, 4, 8),
        "probe_batch_size": (2, 8),
        "probes": (48, 192, 768),
        "basis_rank": (4, 8, 16),
        "strength": (0.5, 1.0),
        "probe_history": (1, 4),
    }.items()
    for method in _varied(OURS, name, values)
}

GUIDANCE_SWEEPS = {
    method.name: method
    for guided, name, values in (
        (GUIDED[0], "negative_guidance", (0.0,)),
        (GUIDED[1], "negative_guidance", (1.0,)),
        (GUIDED_FURTHER[0], "probe_history", (8,)),
    )
    for method in _varied(guided, name, values)
}

DEFAULT_SWEEPS = {
    method.name: method
    for name, values in {"probe_every": (4, 8), "restore": (0.5, 1.0), "probe_history": (1, 2, 4)}.items()
    for method in _varied(BY_DEFAULT, name, values)
}

DEFAULTS = (BY_DEFAULT.name, "ours, by default, probe every 4")
"""The commands' defaults, and what they were before, for twice as many probes; run on both logos, not named."""

VARIED = {**SWEEPS, **GUIDANCE_SWEEPS, **DEFAULT_SWEEPS}
"""One setting of another method changed."""

ALL_METHODS = {**METHODS, **FEWER_STEPS, **VARIED}
"""In the order of the tables."""
