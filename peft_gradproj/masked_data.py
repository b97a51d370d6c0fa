"""A copy of training data with a column of masks, as the training scripts read it.

It is an imagefolder: pictures, bit for bit as they were, masks as PNG, and a `metadata.jsonl` in which each line holds
what the other columns held and, if the picture came from a file, that file's name in `original_name`. Beside them lie
the networks that found the concept. Pictures are copied, not linked: the folder is whole, may be moved, and nobody who
edits a picture in one place finds it changed in the other.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, time
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from .concept_fit import Concept
from .concept_markers import ConceptMarkers
from .concept_masks import MaskReport, find_concept, find_missed
from .errors import ConceptDataError
from .files import check_can_hold
from .folder_swap import entries, replaced_folder
from .training_data import (
    UNREADABLE,
    TrainingData,
    check_pictures,
    first_line,
    picture_path,
    read_pictures,
    without_phrases,
)

__all__ = ["mask_table", "write_masked"]

ORIGINAL_NAME = "original_name"
"""Column of the names of the files that the pictures came from; names that end in `file_name` are those of pictures."""


def mask_table(
    pipeline_or_id: Any,
    concept: Concept | None,
    table: Any,
    output_dir: str | Path,
    *,
    image_column: str = "image",
    mask_column: str | None = None,
    given_masks: str | None = None,
    second_look: bool = False,
    caption_column: str = "text",
    remove_phrases: str | Sequence[str] = (),
    remove_telling_phrases: bool = False,
    leave_out_above: float = 1.0,
    **options: Any,
) -> MaskReport:
    """Find a concept in the pictures of a table, and write a copy of the table with the masks.

    Args:
        pipeline_or_id: As in :func:`find_concept`.
        concept: Likewise; `None` with `given_masks`.
        table: Of `datasets`, as :func:`load_table` gives it.
        output_dir: The folder to write, which appears when it is whole.
        image_column: Column of the training pictures.
        mask_column: Column of the masks, a new one or that of the given ones, which it is by default; else `mask`.
        given_masks: Column of masks that miss some pictures, which are completed (:func:`find_missed`); in rows without
            one it was missed, or is not there. The copy has the completed ones instead.
        second_look: As in :func:`find_concept`; given masks have one anyhow.
        caption_column: Column of the captions, if there are any.
        remove_phrases: One or more that name the concept; the copy's captions lack them, so that nothing else is
            learned under its name.
        remove_telling_phrases: Whether they lack the report's `telling_phrases` too, if any: what captions of pictures
            in which the concept was found have, and others have not.
        leave_out_above: Pictures of which more than this share is masked are not written.
        **options: Further arguments of :func:`find_concept` or :func:`find_missed`.

    Raises:
        ConceptDataError: If the folder holds something already or cannot be made, the table cannot be written as an
            imagefolder, pictures cannot be read, the concept cannot be looked for, no caption has a phrase that is to
            be taken out, or all pictures would be left out; or if a concept and given masks are given, or neither.
    """
    mask_column = mask_column or given_masks or "mask"
    if (concept is None) == (given_masks is None):
        raise ConceptDataError("give the concept, or the column of masks that are to be completed; one of the two.")
    if not 0 <= leave_out_above <= 1:
        raise ConceptDataError(f"leave_out_above={leave_out_above}; expected a share, 0 to 1.")
    output = _new_folder(output_dir)
    check_can_hold(output, ConceptDataError)
    given: Sequence[Image.Image | None] = ()
    if given_masks is not None:
        if given_masks not in table.column_names or given_masks == image_column:
            others = ", ".join(name for name in table.column_names if name != image_column)
            raise ConceptDataError(f"no column '{given_masks}' of masks beside the pictures; there are {others}.")
        check_pictures(table, [given_masks])
        given = read_pictures(table, given_masks, gaps=True)
        table = table.remove_columns([given_masks])
    pictures = _picture_columns(table, image_column, mask_column)
    # Before the search, which takes long: what cannot be written would be found when it is over.
    others = table.select_columns([name for name in table.column_names if name not in pictures])
    for number, row in enumerate(others if others.column_names else ()):
        _line(row, number)
    if caption_column not in table.column_names:
        _warn_of_captions_in_files(picture_path(table, image_column, 0), caption_column)
    changed: list[int] = []
    if remove_phrases:
        phrases = [remove_phrases] if isinstance(remove_phrases, str) else remove_phrases
        table, changed = without_phrases(table, caption_column, phrases)
    data = TrainingData(read_pictures(table, image_column), _captions(table, caption_column))
    if concept is None:
        masks, report = find_missed(pipeline_or_id, given, data, **options)
    else:
        masks, report = find_concept(pipeline_or_id, concept, data, second_look=second_look, **options)
    if remove_telling_phrases and report.telling_phrases:
        table, named = without_phrases(table, caption_column, [told.phrase for told in report.telling_phrases])
        changed += named
    areas = masks.areas()
    kept = [number for number, area in enumerate(areas) if area <= leave_out_above]
    if not kept:
        raise ConceptDataError(
            f"all {len(areas)} pictures would be left out: of each more than leave_out_above={leave_out_above} is "
            f"masked, of the least {min(areas):.2f}."
        )
    columns = {"image_column": image_column, "mask_column": mask_column}
    write_masked(table.select(kept), masks.select(kept), output, markers=masks.markers, **columns)
    return replace(
        report,
        folder=str(output),
        telling_phrases_removed=remove_telling_phrases,
        left_out=len(areas) - len(kept),
        leave_out_above=leave_out_above,
        captions_changed=len({*changed} & {*kept}),
    )


def write_masked(
    table: Any,
    masks: Sequence[Image.Image],
    output_dir: str | Path,
    *,
    markers: ConceptMarkers | None = None,
    image_column: str = "image",
    mask_column: str = "mask",
) -> None:
    """Write a copy of a table with a column of masks, one for each row in its order; arguments and errors as above.

    The networks that drew the masks are written beside them, as `concept_markers.safetensors`, where they are given.
    """
    import datasets

    output = _new_folder(output_dir)
    folders = _picture_columns(table, image_column, mask_column)
    if len(masks) != len(table):
        raise ConceptDataError(f"{len(table)} pictures but {len(masks)} masks; expected as many.")
    for column in folders:
        table = table.cast_column(column, datasets.Image(decode=False))
    # Who has a column of that name, as a copy of a copy has, keeps it.
    named = ORIGINAL_NAME not in table.column_names and picture_path(table, image_column, 0) is not None
    digits = max(5, len(str(len(table))))
    with replaced_folder(output) as stage:
        for folder in {*folders.values(), "masks"} - {""}:
            (stage / folder).mkdir()
        with open(stage / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            for number, row in enumerate(table):
                name = f"{number:0{digits}}"
                path = row[image_column]["path"]
                line: dict[str, Any] = {
                    f"{column}_file_name": _copied(row.pop(column), stage, f"{folder}{name}")
                    for column, folder in folders.items()
                }
                masks[number].save(stage / "masks" / f"{name}.png")
                line[f"{mask_column}_file_name"] = f"masks/{name}.png"
                if named:
                    # In an archive: `zip://name::archive`.
                    line[ORIGINAL_NAME] = path and os.path.basename(path.partition("::")[0])
                metadata.write(_line({**line, **row}, number) + "\n")
        if markers is not None:
            markers.save(stage)
        # Somebody else may have written there meanwhile.
        _new_folder(output)


def _captions(table: Any, column: str) -> list[str]:
    """What there is of captions, alternatives one after the other; they are not needed."""
    if column not in table.column_names:
        return [""] * len(table)
    given = (cell if isinstance(cell, list) else [cell] for cell in table.select_columns([column])[:][column])
    return ["; ".join(text for text in cell if isinstance(text, str)) for cell in given]


def _warn_of_captions_in_files(picture: str | None, column: str) -> None:
    """As some trainers take them: a text file beside each picture, of which one is looked for."""
    text = "" if picture is None else f"{os.path.splitext(picture)[0]}.txt"
    if os.path.isfile(text):
        warnings.warn(
            f"captions lie beside the pictures, such as {text}: they are not read, and will not be in the copy. Write "
            f'a metadata.jsonl with a line such as {{"file_name": "1.png", "{column}": "..."}} for each picture.',
            stacklevel=3,
        )


def _new_folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not entries(folder)):
        raise ConceptDataError(f"{folder} exists; give a new folder to write the pictures and masks to.")
    return folder


def _picture_columns(table: Any, image_column: str, mask_column: str) -> dict[str, str]:
    """The columns of pictures, and where in the folder they go: the training pictures to the top.

    Raises:
        ConceptDataError: If there are others that an imagefolder cannot hold beside them.
    """
    import datasets

    if mask_column in table.column_names:
        raise ConceptDataError(f"the data has a column '{mask_column}' already; name another for the masks.")
    for column in table.column_names:
        if re.fullmatch(r"(.*_)?file_names?", column):
            raise ConceptDataError(f"`datasets` would take column '{column}' for names of files; rename it first.")
    pictures = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if image_column not in pictures:
        raise ConceptDataError(f"column '{image_column}' holds no pictures.")
    others = [name for name in pictures if name != image_column]
    return {image_column: "", **{name: f"pictures-{number}/" for number, name in enumerate(others, start=1)}}


def _copied(cell: dict[str, Any] | None, stage: Path, stem: str) -> str | None:
    """Write a picture as it is stored, and return its name in the folder."""
    import fsspec

    if cell is None:
        return None
    data, path = cell["bytes"], cell["path"]
    try:
        if data is None:
            # May lie in an archive.
            with fsspec.open(path, "rb") as file:
                data = file.read()
        suffix = os.path.splitext(path or "")[1].lower()
        if suffix not in Image.registered_extensions():
            with Image.open(BytesIO(data)) as picture:
                suffix = f".{str(picture.format).lower()}"
    except UNREADABLE as error:
        raise ConceptDataError(f"the picture {path or stem} cannot be copied: {first_line(error)}") from error
    (stage / f"{stem}{suffix}").write_bytes(data)
    return f"{stem}{suffix}"


def _line(row: dict[str, Any], number: int) -> str:
    for column, value in row.items():
        try:
            json.dumps(value, allow_nan=False, default=_iso)
        except (TypeError, ValueError) as error:
            raise ConceptDataError(
                f"column '{column}' of row {number} holds what no metadata.jsonl can: {first_line(error)}"
            ) from error
    return json.dumps(row, ensure_ascii=False, default=_iso)


def _iso(value: Any) -> str:
    """Dates and times, which `datasets` makes of texts that look like them, and does so again."""
    if isinstance(value, date | time):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} is no JSON")
