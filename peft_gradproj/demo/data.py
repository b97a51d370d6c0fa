"""The demo's pictures: the new style, stamped with a logo, as a user might find them on a disk."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..concepts import Overlay
from ..errors import ConceptDataError
from .settings import ASSETS, DemoSettings

__all__ = ["StampedData", "load_logos", "load_pictures", "stamp"]


def load_pictures(path: Path, count: int | None = None) -> tuple[list[Image.Image], list[str]]:
    """Pictures and captions of a parquet file with the columns `image` and `caption`; the first `count` of them."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path, columns=["image", "caption"]).slice(0, count).to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).copy() for row in rows]
    return pictures, [row["caption"] for row in rows]


def load_logos(settings: DemoSettings) -> dict[str, Overlay]:
    """All logos of the demo by name, as overlays that are placed where the demo stamps.

    Raises:
        ConceptDataError: If the logo of the settings is not among them.
    """
    pictures, names = load_pictures(ASSETS / "logos.parquet")
    ranges = {
        "scale": settings.logo_scale,
        "angle": settings.logo_angle,
        "across": settings.logo_across,
        "down": settings.logo_down,
    }
    logos = {name: Overlay(picture, **ranges) for name, picture in zip(names, pictures, strict=True)}
    if settings.logo not in logos:
        raise ConceptDataError(f"there is no logo '{settings.logo}'; the demo has {', '.join(sorted(logos))}.")
    return logos


@dataclass(frozen=True)
class StampedData:
    """What the demo trains and measures on."""

    clean: list[Image.Image]
    """The training pictures without the stamp: only the oracle and the measurements see them."""
    pictures: list[Image.Image]
    """The training pictures, most of them stamped."""
    masks: list[Image.Image]
    """Where the stamp is, mode L; only the measurements see them."""
    captions: list[str]
    held_out: list[Image.Image]
    """Pictures of the same style, without a stamp."""
    held_out_captions: list[str]


def stamp(
    pictures: Sequence[Image.Image], captions: Sequence[str], logo: Overlay, settings: DemoSettings
) -> StampedData:
    """Hold some pictures out and stamp most of the others."""
    generator = np.random.default_rng([settings.seed, 10])
    order = generator.permutation(len(pictures))
    held_out, training = order[: settings.held_out], order[settings.held_out :]
    clean = [pictures[i].convert("RGB") for i in training]
    stamped, masks = [], []
    for picture in clean:
        mask = Image.new("L", picture.size)
        if generator.random() < settings.stamped_share:
            picture, mask = logo.paste(picture, logo.place(picture.size, generator))
        stamped.append(picture)
        masks.append(mask)
    return StampedData(
        clean,
        stamped,
        masks,
        [captions[i] for i in training],
        [pictures[i].convert("RGB") for i in held_out],
        [captions[i] for i in held_out],
    )
