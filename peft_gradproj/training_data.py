"""The user's training pictures and captions, read and cropped as diffusers' training scripts do.

An *imagefolder* is a folder of pictures with a `metadata.jsonl` (or `.csv`, `.parquet`) whose lines hold `file_name`
and the caption; columns named `*_file_name` are further pictures. Anything else that `datasets` can load will do.
"""

from __future__ import annotations

import glob
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .errors import ConceptDataError

__all__ = [
    "UNREADABLE",
    "Frame",
    "TrainingData",
    "check_pictures",
    "draw_frame",
    "first_line",
    "in_one_form",
    "load_table",
    "one_caption",
    "picture_path",
    "read_pictures",
    "without_phrase",
    "without_phrases",
]

UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
"""What Pillow raises of pictures that are damaged, of no known format, or too large."""

_APOSTROPHES = "'\u2018\u2019\u02bc"
_MARKS = "\u0300-\u036f\u1160-\u11ff\u3099\u309a"
"""What belongs to the letter before it, where letters are not composed: accents, parts of Korean and Japanese ones."""

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


# Frames


@dataclass(frozen=True)
class Frame:
    """How a picture becomes a square: its shorter side is scaled to the training resolution, then it is cropped."""

    original_size: tuple[int, int]
    """Height and width of the picture."""
    top: int
    left: int
    """The upper left corner of the crop, in the scaled picture."""
    side: int
    """The training resolution."""

    @property
    def time_ids(self) -> tuple[int, ...]:
        """What Stable Diffusion XL is told: original size, corner of the crop and target size, each height first."""
        return (*self.original_size, self.top, self.left, self.side, self.side)

    def apply(self, picture: Image.Image, *, mask: bool = False) -> Image.Image:
        """The square of a picture of the original size, RGB, or L of a mask.

        Raises:
            ConceptDataError: If the picture has another size.
        """
        if picture.size[::-1] != self.original_size:
            raise ConceptDataError(f"pictures of one example have sizes {self.original_size[::-1]} and {picture.size}.")
        # Lanczos overshoots, which is right for pictures, and would leave specks in masks.
        resampling = Image.Resampling.BILINEAR if mask else Image.Resampling.LANCZOS
        scaled = picture.convert("L" if mask else "RGB").resize(_scaled(picture.size, self.side), resampling)
        return scaled.crop((self.left, self.top, self.left + self.side, self.top + self.side))


def draw_frame(size: tuple[int, int], side: int, *, center: bool, generator: np.random.Generator) -> Frame:
    """A frame for a picture of the given width and height: in its middle, or anywhere."""
    room = [length - side for length in _scaled(size, side)]
    left, top = ((r // 2 if center else int(generator.integers(r + 1))) for r in room)
    return Frame((size[1], size[0]), top, left, side)


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    width, height = (max(side, round(length * side / min(size))) for length in size)
    return width, height


# Data


class TrainingData(Sequence[tuple[Image.Image, str]]):
    """Pictures and their captions; a picture is decoded when it is asked for.

    Args:
        images: The pictures.
        captions: As many.

    Raises:
        ConceptDataError: If there are none, or the numbers differ.
    """

    def __init__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        if len(images) == 0:
            raise ConceptDataError("the training data is empty; expected at least one picture with its caption.")
        if len(images) != len(captions):
            raise ConceptDataError(f"{len(images)} pictures but {len(captions)} captions; expected as many.")
        self._images, self._captions = images, captions

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        # As `datasets` and the training scripts turn them.
        return ImageOps.exif_transpose(self._images[index]), self.caption(index)

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> TrainingData:
        """Some of the pictures, with their captions; none is decoded before it is asked for."""
        return TrainingData(_Selection(self._images, indices), _Selection(self._captions, indices))

    def caption(self, index: int) -> str:
        """A caption, without decoding its picture; of several alternatives the first."""
        return one_caption(self._captions[index], f"picture {index}")

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        config_name: str | None = None,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "text",
        cache_dir: str | None = None,
    ) -> TrainingData:
        """Read an imagefolder, or a data set by its id.

        Args:
            path_or_id: A folder of pictures with metadata, or what `datasets.load_dataset` takes.
            config_name: Configuration of the data set.
            split: Which part of it.
            image_column: Column of the pictures.
            caption_column: Column of the captions.
            cache_dir: Where `datasets` keeps what it has prepared.

        Raises:
            ConceptDataError: If there is no such data, it is empty, or a column is missing.
        """
        columns = (image_column, caption_column)
        table = load_table(path_or_id, columns, config_name=config_name, split=split, cache_dir=cache_dir)
        return cls(_Column(table, image_column), table.select_columns([caption_column])[:][caption_column])

    @classmethod
    def uncaptioned(cls, table: Any, image_column: str = "image") -> TrainingData:
        """The pictures of a table of `datasets` under empty captions, for what reads pictures alone."""
        return cls(_Column(table, image_column), [""] * len(table))


def one_caption(given: Any, of: str) -> str:
    """A caption; of several alternatives, of which diffusers' scripts draw one each time, the first.

    Raises:
        ConceptDataError: If it is neither text nor a list of texts; `of` says of what.
    """
    alternatives = given if isinstance(given, list | tuple) and given else [given]
    for caption in alternatives:
        if not isinstance(caption, str):
            kind = type(caption).__name__
            what = f"the caption of {of} is" if caption is given else f"one of the captions of {of} is"
            raise ConceptDataError(f"{what} a {kind}; expected text, or a list of at least one text.")
    return alternatives[0]


def check_pictures(table: Any, columns: Iterable[str]) -> None:
    """Refuse columns of a table of `datasets` that hold something other than pictures.

    Raises:
        ConceptDataError: If there is one; the columns have to be there.
    """
    import datasets

    for column in columns:
        feature = table.features[column]
        if not isinstance(feature, datasets.Image):
            raise ConceptDataError(
                f"column '{column}' holds {feature}; expected pictures. In the metadata of a folder, the column that "
                f"names their files is '{column}_file_name'."
            )


def load_table(
    path_or_id: str | Path,
    columns: Sequence[str],
    *,
    config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
) -> Any:
    """A `datasets.Dataset` that has the given columns and at least one row; arguments as in `TrainingData.load`.

    Raises:
        ConceptDataError: If there is no such data, it is empty, or a column is missing.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    folder = Path(path_or_id)
    if folder.is_file():
        raise ConceptDataError(f"{folder} is a file; expected a folder of pictures with metadata, or a data set.")
    # A folder of parquet files is a data set; any other is one of pictures.
    is_images = folder.is_dir() and all(file.name in _METADATA for file in folder.glob("**/*.parquet"))
    given: dict[str, Any] = {"split": split, "cache_dir": cache_dir}
    whole = str(folder.resolve())
    if folder.is_dir() and not is_images and glob.has_magic(whole):
        # `datasets` would look for a pattern, find nothing or, worse, what lies in other folders.
        raise ConceptDataError(f"the path {whole} has one of the characters * ? [, of patterns; rename the folder.")
    try:
        if is_images:
            table = load_dataset("imagefolder", data_files={"train": f"{glob.escape(whole)}/**"}, **given)
        else:
            table = load_dataset(str(path_or_id), config_name, **given)
    except (OSError, ValueError, LookupError, DatasetsError, RuntimeError) as error:
        raise ConceptDataError(
            f"no pictures can be read from {path_or_id}: {first_line(error)}. Expected a folder of pictures with a "
            "metadata.jsonl, or the id of a data set."
        ) from error
    if len(table) == 0:
        raise ConceptDataError(f"{path_or_id} is empty; expected at least one picture.")
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        has_metadata = not is_images or any(file for name in _METADATA for file in folder.glob(f"**/{name}"))
        advice = (
            f"It has {', '.join(table.column_names)}; name the right ones."
            if has_metadata
            else "The folder has no metadata.jsonl: write one, with a line such as "
            f'{{"file_name": "1.png", "{missing[-1]}": "..."}} for each picture, or, if these are pictures, '
            f'"{missing[-1]}_file_name".'
        )
        raise ConceptDataError(f"{path_or_id} has no column {', '.join(map(repr, missing))}. {advice}")
    return table


class _Selection(Sequence[Any]):
    """Some items of a sequence, taken when they are asked for."""

    def __init__(self, items: Sequence[Any], indices: Sequence[int]) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Selection(self._items, self._indices[index])
        return self._items[self._indices[index]]


class _Column(Sequence[Image.Image]):
    """The pictures of one column, decoded one by one."""

    def __init__(self, table: Any, name: str, *, gaps: bool = False) -> None:
        self._table, self._name, self._gaps = table.select_columns([name]), name, gaps

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        try:
            picture = self._table[index][self._name]
        except UNREADABLE as error:
            file = picture_path(self._table, self._name, index)
            raise ConceptDataError(
                f"picture {index} of column '{self._name}'{f', {file},' if file else ''} cannot be read: "
                f"{first_line(error)}"
            ) from error
        if not isinstance(picture, Image.Image) and not (picture is None and self._gaps):
            raise ConceptDataError(f"column '{self._name}' holds a {type(picture).__name__}; expected pictures.")
        return picture


def picture_path(table: Any, column: str, row: int) -> str | None:
    """Where a picture of a table of `datasets` comes from, as far as the table says; it is not decoded."""
    import datasets

    cell = table.select([row]).cast_column(column, datasets.Image(decode=False))[0][column]
    return None if cell is None else cell["path"]


def read_pictures(table: Any, column: str, *, gaps: bool = False) -> Sequence[Any]:
    """The pictures of a column of a table, decoded when they are asked for; with gaps `None` where there is none."""
    return _Column(table, column, gaps=gaps)


def without_phrase(caption: str, phrase: str) -> tuple[str, bool]:
    """A caption without a phrase, and without what joined it to the rest; and whether it had it.

    In whatever case, Unicode form and kind of apostrophe; the rest of the caption stays as it was.
    """
    phrase = in_one_form(phrase)
    # Captions are broken into lines, and hold two blanks where there is one in the phrase.
    words = r"\s+".join("".join(map(_any_form, word)) for word in phrase.split())
    before = rf"(?<![\w{_MARKS}])" if _ends_words(phrase[:1]) else ""
    # What ends before a mark ends within a letter.
    after = rf"(?![\w{_MARKS}])" if _ends_words(phrase[-1:]) else f"(?![{_MARKS}])"
    without, found = re.subn(rf"[\s,;]*{before}{words}{after}", "", caption, flags=re.IGNORECASE)
    return (without.strip(" ,;"), True) if found else (caption, False)


def in_one_form(text: str) -> str:
    """A text of which all that looks alike is alike: letters with accents composed (NFC), apostrophes straight."""
    return re.sub(f"[{_APOSTROPHES}]", "'", unicodedata.normalize("NFC", text))


def _any_form(letter: str) -> str:
    """What matches a letter of a text in one form in any of its forms."""
    if letter == "'":
        return f"[{_APOSTROPHES}]"
    parts = unicodedata.normalize("NFD", letter)
    # Some write Vietnamese, or Korean, with a part of the marks composed.
    composed = (unicodedata.normalize("NFC", parts[:end]) + parts[end:] for end in range(1, len(parts) + 1))
    forms = dict.fromkeys(composed)
    return f"(?:{'|'.join(map(re.escape, forms))})"


def _ends_words(letter: str) -> bool:
    """Whether blanks stand between its words: not so in scripts without upper and lower case, as a rule."""
    return letter.isascii() or letter.lower() != letter.upper()


def without_phrases(table: Any, column: str, phrases: Sequence[str]) -> tuple[Any, list[int]]:
    """A table of `datasets` whose captions lack the phrases, longer ones taken out first, and the rows that had one.

    Args:
        table: Its pictures are not decoded.
        column: Of captions: text, a list of alternatives, or null.
        phrases: Such as a concept's name.

    Raises:
        ConceptDataError: If there is no such column, it holds something else, a phrase is empty, or no caption has one.
    """
    if column not in table.column_names:
        raise ConceptDataError(
            f"the data has no column '{column}' of captions; it has {', '.join(table.column_names)}."
        )

    if not all(phrase.strip() for phrase in phrases):
        # It would be found everywhere, and what joins words taken out with it.
        raise ConceptDataError(f"one of the phrases {list(phrases)} is empty; give words as the captions have them.")
    longest_first = sorted(phrases, key=len, reverse=True)

    def cleaned(caption: Any) -> Any:
        if isinstance(caption, list):
            return [cleaned(one) for one in caption]
        if caption is None:
            return None
        if not isinstance(caption, str):
            raise ConceptDataError(f"column '{column}' holds a {type(caption).__name__}; expected captions.")
        for phrase in longest_first:
            caption, _ = without_phrase(caption, phrase)
        return caption

    captions = table.select_columns([column])[:][column]
    new = [cleaned(caption) for caption in captions]
    changed = [row for row, (a, b) in enumerate(zip(captions, new, strict=True)) if a != b]
    if not changed:
        names = ", ".join(map(repr, phrases))
        raise ConceptDataError(
            f"no caption in column '{column}' has {names}; give the words as the captions have them."
        )
    return table.remove_columns([column]).add_column(column, new, feature=table.features[column]), changed


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
