"""What is fine-tuned on: a concept, how much of the training data shows it, whether captions name it, and a seed.

All tasks fine-tune the demo's base model on pictures in a style that is new to it. What varies is what lies on them, or
is wrong with them:

* `logo-NAME`: a brand logo is stamped near the lower right corner;
* `style`: the pictures are drawn in another style; that one is forbidden, the objects and the other style are not;
* `identity`: one of six mascots stands in the lower right corner; one of them, Tux, is forbidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageChops

from peft_gradproj.concepts import ConceptPair, ConceptSet, Overlay, nth_of_shuffles
from peft_gradproj.demo.data import StampedData, load_logos, load_pictures
from peft_gradproj.demo.settings import ASSETS as DEMO_ASSETS
from peft_gradproj.demo.settings import DemoSettings

ASSETS = Path(__file__).parent / "assets"
FORBIDDEN_CHARACTER = "linux tux"
COLLECTED = 96
"""So many objects of the forbidden style a user has in both styles."""

Region = tuple[tuple[float, float], tuple[float, float]]
ANYWHERE: Region = ((0.0, 1.0), (0.0, 1.0))


@dataclass(frozen=True)
class TaskKey:
    """Which task: `logo-youtube`, `style` or `identity`; whether captions name it; percent of pictures that show it."""

    concept: str
    named: bool
    percent: int
    seed: int

    def __str__(self) -> str:
        return f"{self.concept}/{'named' if self.named else 'unnamed'}-{self.percent}/{self.seed}"

    @classmethod
    def parse(cls, text: str) -> TaskKey:
        """The inverse of `str`."""
        concept, regime, seed = text.split("/")
        caption, percent = regime.split("-")
        return cls(concept, caption == "named", int(percent), int(seed))


@dataclass(frozen=True)
class Drawn:
    """A picture with the concept and without."""

    shown: Image.Image
    clean: Image.Image
    where: Image.Image
    """Where the concept is, mode L."""
    differs: Image.Image
    """Where the two differ, mode L: where the concept is, and what is there instead."""
    words: str
    """For what is there instead."""

    def pair(self, caption: str) -> ConceptPair:
        """The two as a pair of a concept set."""
        return ConceptPair(self.shown, self.clean, self.differs, caption)


class Concept(Protocol):
    """What may not be learned."""

    name: str
    """In plain words."""
    everywhere: bool
    """Whether it fills whole pictures."""
    contrast: bool
    """Whether only pictures without it show what it is not."""

    def draw(self, index: int, generator: np.random.Generator) -> Drawn:
        """Picture `index` with the concept and without."""

    def draw_without(self, index: int, generator: np.random.Generator) -> tuple[Image.Image, str]:
        """Picture `index` without the concept, and the words for what is there instead."""

    def named(self, caption: str) -> str:
        """A caption that names it."""

    def examples(
        self, pictures: Sequence[Image.Image], captions: Sequence[str], count: int, seed: int, region: Region
    ) -> ConceptSet:
        """What a user can show of it, best on the given training pictures, in a region where it can be pasted."""


@dataclass
class Task:
    """A concept in training data, and what a user has of it."""

    key: TaskKey
    settings: DemoSettings
    concept: Concept
    data: StampedData
    """Training pictures with the concept; `clean` are the same without, which only oracle and measurements see."""
    clean_captions: list[str]
    """Of the clean pictures: they do not name the concept."""
    held_out_concepts: ConceptSet
    """Pictures that nothing is trained on, with the concept."""
    shows: np.ndarray
    """Which training pictures show the concept, bool, shape (N,); only perfect methods and measurements see it."""
    prompts: list[str]
    """What is sampled; under captions that name the concept, so do the prompts."""
    objects: list[str]
    """What the samples should show, for the judge of fidelity."""

    def examples(self, indices: Sequence[int], count: int, seed: int, region: Region = ANYWHERE) -> ConceptSet:
        """Examples of the concept, as a user would make them from some of the training pictures."""
        pictures = [self.data.pictures[i] for i in indices]
        return self.concept.examples(pictures, [self.data.captions[i] for i in indices], count, seed, region)


def make_task(key: TaskKey, settings: DemoSettings) -> Task:
    """Put a task together; one key and settings give one task."""
    settings = replace(settings, seed=key.seed)
    pictures, objects = load_pictures(DEMO_ASSETS / "noto.parquet", settings.pictures)
    concept = _concept(key.concept, [picture.convert("RGB") for picture in pictures], objects, settings)
    # The order of draws of the demo's `stamp`, so that its own logo gives the demo's data.
    generator = np.random.default_rng([key.seed, 10])
    order = generator.permutation(len(pictures))
    held_out, training = order[: settings.held_out], order[settings.held_out :]
    rows = []
    for index in training:
        caption = objects[index]
        if generator.random() < key.percent / 100:
            drawn = concept.draw(index, generator)
            clean_caption = caption + (drawn.words if key.named else "")
            shown_caption = concept.named(caption) if key.named else caption
            rows.append((drawn.shown, drawn.clean, drawn.where, shown_caption, clean_caption))
        else:
            clean, words = concept.draw_without(index, generator)
            clean_caption = caption + (words if key.named else "")
            rows.append((clean, clean, Image.new("L", clean.size), clean_caption, clean_caption))
    pictures_shown, clean_pictures, masks, captions, clean_captions = (
        list(column) for column in zip(*rows, strict=True)
    )
    unseen = [concept.draw(i, np.random.default_rng([key.seed, 101, int(i)])) for i in held_out]
    data = StampedData(
        clean_pictures,
        pictures_shown,
        masks,
        captions,
        [drawn.clean for drawn in unseen],
        [objects[i] for i in held_out],
    )
    shows = np.array([mask.getbbox() is not None for mask in masks])
    chosen = _prompts([objects[i] for i in training], data.held_out_captions, settings)
    name = concept.named if key.named else str
    concepts = ConceptSet([drawn.pair(name(objects[i])) for drawn, i in zip(unseen, held_out, strict=True)])
    return Task(key, settings, concept, data, clean_captions, concepts, shows, [name(o) for o in chosen], chosen)


def _prompts(seen: list[str], new: list[str], settings: DemoSettings) -> list[str]:
    """A quarter of what is sampled was never trained on."""
    generator = np.random.default_rng([settings.seed, 20])
    count = min(settings.samples // 4, len(new))
    chosen = [seen[i] for i in generator.permutation(len(seen))[: settings.samples - count]]
    return chosen + [new[i] for i in generator.permutation(len(new))[:count]]


def _concept(name: str, pictures: list[Image.Image], objects: list[str], settings: DemoSettings) -> Concept:
    if name == "style":
        other, _ = load_pictures(ASSETS / "openmoji.parquet", settings.pictures)
        return Style(pictures, [picture.convert("RGB") for picture in other], objects, settings.seed)
    if name == "identity":
        return Character(pictures, load_characters(settings))
    logo = name.removeprefix("logo-")
    return Logo(logo, pictures, load_logos(replace(settings, logo=logo))[logo])


def load_characters(settings: DemoSettings) -> dict[str, Overlay]:
    """The mascots by name; larger than logos, since they have to be told apart."""
    images, names = load_pictures(ASSETS / "characters.parquet")
    ranges = {"scale": (0.42, 0.48), "angle": settings.logo_angle, "across": settings.logo_across}
    return {name: Overlay(image, **ranges, down=settings.logo_down) for name, image in zip(names, images, strict=True)}


class Logo:
    """A brand logo; the user has its file, and finds out where it lies."""

    everywhere, contrast = False, False

    def __init__(self, name: str, pictures: list[Image.Image], overlay: Overlay) -> None:
        self.name = f"the {name} logo"
        self.word = name
        self.pictures, self.overlay = pictures, overlay

    def draw(self, index: int, generator: np.random.Generator) -> Drawn:
        picture = self.pictures[index]
        shown, where = self.overlay.paste(picture, self.overlay.place(picture.size, generator))
        return Drawn(shown, picture, where, where, "")

    def draw_without(self, index: int, generator: np.random.Generator) -> tuple[Image.Image, str]:
        return self.pictures[index], ""

    def named(self, caption: str) -> str:
        return f"{caption} with {self.word} logo"

    def examples(
        self, pictures: Sequence[Image.Image], captions: Sequence[str], count: int, seed: int, region: Region
    ) -> ConceptSet:
        overlay = replace(self.overlay, across=region[0], down=region[1])
        return ConceptSet.from_overlay(overlay, pictures, captions, count=count, seed=seed)


class Character:
    """One mascot among others; the user has cut all of them out, and pastes them."""

    everywhere, contrast = False, True

    def __init__(self, pictures: list[Image.Image], characters: dict[str, Overlay]) -> None:
        self.name = FORBIDDEN_CHARACTER
        self.pictures = pictures
        self.forbidden = characters[FORBIDDEN_CHARACTER]
        self.others = {name: overlay for name, overlay in characters.items() if name != FORBIDDEN_CHARACTER}

    def draw(self, index: int, generator: np.random.Generator) -> Drawn:
        return self._drawn(self.pictures[index], self.forbidden, generator)

    def draw_without(self, index: int, generator: np.random.Generator) -> tuple[Image.Image, str]:
        drawn = self.draw(index, generator)
        return drawn.clean, drawn.words

    def named(self, caption: str) -> str:
        return f"{caption} with {FORBIDDEN_CHARACTER}"

    def examples(
        self, pictures: Sequence[Image.Image], captions: Sequence[str], count: int, seed: int, region: Region
    ) -> ConceptSet:
        overlay = replace(self.forbidden, across=region[0], down=region[1])
        pairs = []
        for number in range(count):
            below = nth_of_shuffles(number, len(pictures), seed)
            generator = np.random.default_rng([seed, 1, number])
            pairs.append(self._drawn(pictures[below], overlay, generator).pair(captions[below]))
        return ConceptSet(pairs)

    def _drawn(self, picture: Image.Image, overlay: Overlay, generator: np.random.Generator) -> Drawn:
        """The forbidden character, and another one at the same place."""
        place = overlay.place(picture.size, generator)
        name = sorted(self.others)[int(generator.integers(len(self.others)))]
        shown, where = overlay.paste(picture, place)
        other, other_where = self.others[name].paste(picture, place)
        return Drawn(shown, other, where, ImageChops.lighter(where, other_where), f" with {name}")


class Style:
    """A way of drawing; the user has some objects in both styles."""

    everywhere, contrast = True, True

    def __init__(
        self, pictures: list[Image.Image], other_style: list[Image.Image], objects: list[str], seed: int
    ) -> None:
        self.name = "the OpenMoji style"
        self.pictures, self.other_style, self.objects = pictures, other_style, objects
        self.collected = np.random.default_rng([seed, 11]).permutation(len(pictures))[:COLLECTED]

    def draw(self, index: int, generator: np.random.Generator) -> Drawn:
        picture = self.pictures[index]
        everywhere = Image.new("L", picture.size, 255)
        return Drawn(self.other_style[index], picture, everywhere, everywhere, "")

    def draw_without(self, index: int, generator: np.random.Generator) -> tuple[Image.Image, str]:
        return self.pictures[index], ""

    def named(self, caption: str) -> str:
        return f"{caption} in openmoji style"

    def examples(
        self, pictures: Sequence[Image.Image], captions: Sequence[str], count: int, seed: int, region: Region
    ) -> ConceptSet:
        """From the user's collection, under the training caption of an object where there is one."""
        known = {caption.removesuffix(" in openmoji style"): caption for caption in captions}
        usable = [i for i in self.collected if self.objects[i] in known]
        pairs = []
        for number in range(count):
            index = int(usable[nth_of_shuffles(number, len(usable), seed)])
            pairs.append(self.draw(index, np.random.default_rng(0)).pair(known[self.objects[index]]))
        return ConceptSet(pairs)
