"""Training data: cropped as diffusers' scripts do, read from folders and data sets, refused with reasons."""

from __future__ import annotations

import json
import re
import unicodedata
from io import BytesIO

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features
from tiny_pipelines import image_folder, picture

from peft_gradproj import TrainingData
from peft_gradproj.errors import ConceptDataError
from peft_gradproj.training_data import Frame, draw_frame, read_pictures, without_phrase

CAPTIONS = ["a house", "a tree", "a dog"]


@given(
    width=st.integers(8, 90),
    height=st.integers(8, 90),
    side=st.integers(8, 64),
    center=st.booleans(),
    seed=st.integers(0),
)
def test_a_frame_is_a_square_that_lies_on_the_scaled_picture(width, height, side, center, seed):
    frame = draw_frame((width, height), side, center=center, generator=np.random.default_rng(seed))
    square = frame.apply(Image.new("RGB", (width, height), (10, 20, 30)))
    assert square.size == (side, side)
    # Beyond its edge a crop would be black.
    assert square.getextrema() == ((10, 10), (20, 20), (30, 30))
    assert frame.time_ids == (height, width, frame.top, frame.left, side, side)
    assert 0 in (frame.top, frame.left)


def test_a_frame_in_the_middle_and_the_same_for_mask_and_picture():
    frame = draw_frame((64, 32), 16, center=True, generator=np.random.default_rng(0))
    assert frame == Frame((32, 64), 0, 8, 16)
    mask = Image.new("L", (64, 32))
    mask.paste(255, (16, 0, 48, 32))
    assert frame.apply(mask, mask=True).mode == "L"
    # Scaling softens its edges.
    assert frame.apply(mask, mask=True).getextrema()[0] > 200
    with pytest.raises(ConceptDataError, match="have sizes"):
        frame.apply(Image.new("RGB", (32, 32)))


def test_random_frames_are_everywhere():
    generator = np.random.default_rng(0)
    lefts = {draw_frame((40, 32), 32, center=False, generator=generator).left for _ in range(200)}
    assert lefts == set(range(9))


def test_data_of_ones_own():
    data = TrainingData([picture(i) for i in range(3)], ["one", ["two", "other words"], None])
    assert data[1][1] == "two"
    assert len(data[:2]) == 2
    with pytest.raises(ConceptDataError, match="caption of picture 2 is a NoneType"):
        data.caption(2)
    with pytest.raises(ConceptDataError, match="one of the captions of picture 0 is a NoneType"):
        TrainingData([picture(0)], [["one", None]]).caption(0)
    with pytest.raises(ConceptDataError, match="empty"):
        TrainingData([], [])
    with pytest.raises(ConceptDataError, match="3 pictures but 1 captions"):
        TrainingData([picture(i) for i in range(3)], ["one"])


def load(folder, tmp_path, **options):
    return TrainingData.load(folder, cache_dir=str(tmp_path / "cache"), **options)


def test_a_folder_with_metadata(tmp_path):
    data = load(image_folder(tmp_path / "data", CAPTIONS), tmp_path)
    assert [caption for _, caption in data] == CAPTIONS
    assert data[1][0].size == (48, 40)
    assert data[0][0].convert("RGB").tobytes() == picture(0, (36, 44)).tobytes()


def test_a_data_set_of_another_kind(tmp_path):
    table = datasets.Dataset.from_dict({"photo": [picture(i) for i in range(3)], "caption": CAPTIONS})
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train.parquet")
    data = load(tmp_path / "data", tmp_path, image_column="photo", caption_column="caption")
    assert [caption for _, caption in data] == CAPTIONS
    with pytest.raises(ConceptDataError, match=r"no column 'image', 'text'\. It has photo, caption"):
        load(tmp_path / "data", tmp_path)
    with pytest.raises(ConceptDataError, match="holds a str"):
        load(tmp_path / "data", tmp_path, image_column="caption", caption_column="caption")[0]


@pytest.mark.parametrize(
    ("name", "other"), [("pictures [1]", "pictures 1"), ("pictures*", "pictures-old"), ("picture?", "pictures")]
)
def test_a_folder_named_with_the_characters_of_patterns_is_that_folder_and_no_other(tmp_path, name, other, monkeypatch):
    image_folder(tmp_path / other / "data", ["of another folder"])
    folder = image_folder(tmp_path / name / "data", CAPTIONS)
    assert [caption for _, caption in load(folder, tmp_path)] == CAPTIONS
    monkeypatch.chdir(tmp_path / name)
    assert [caption for _, caption in load("data", tmp_path)] == CAPTIONS


def test_a_data_set_in_a_folder_with_such_characters_is_refused(tmp_path):
    for name in ("data*", "data-old"):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict({"text": CAPTIONS}).to_parquet(tmp_path / name / "train.parquet")
    with pytest.raises(ConceptDataError, match=r"has one of the characters \* \? \["):
        load(tmp_path / "data*", tmp_path)


def test_folders_that_will_not_do(tmp_path):
    with pytest.raises(ConceptDataError, match=r"no metadata\.jsonl"):
        load(image_folder(tmp_path / "bare", CAPTIONS, metadata=False), tmp_path)
    with pytest.raises(ConceptDataError, match="no column 'prompt'"):
        load(image_folder(tmp_path / "data", CAPTIONS), tmp_path, caption_column="prompt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConceptDataError, match="no pictures can be read"):
        load(tmp_path / "empty", tmp_path)
    (tmp_path / "empty" / "metadata.jsonl").write_text("")
    with pytest.raises(ConceptDataError, match="no pictures can be read"):
        load(tmp_path / "empty", tmp_path)
    with pytest.raises(ConceptDataError, match="no pictures can be read"):
        load(tmp_path / "absent", tmp_path)
    with pytest.raises(ConceptDataError, match="is a file"):
        load(tmp_path / "empty" / "metadata.jsonl", tmp_path)


def test_pictures_that_cannot_be_read_are_named_when_they_are_needed(tmp_path):
    folder = image_folder(tmp_path / "data", CAPTIONS)
    (folder / "1.png").write_bytes(b"no picture")
    data = load(folder, tmp_path)
    assert data[0][1] == "a house"
    with pytest.raises(ConceptDataError, match=r"picture 1 of column 'image', .*1\.png, cannot be read"):
        data[1]


@pytest.mark.parametrize("kind", ["bomb", "avif", "truncated"])
def test_whatever_pillow_raises_of_a_damaged_picture_is_an_error_of_ours(kind, tmp_path):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    stored = BytesIO()
    if kind == "bomb":
        Image.new("1", (20_000, 9_500)).save(stored, "PNG")
    else:
        picture(0).save(stored, "AVIF" if kind == "avif" else "PNG")
    content = stored.getvalue()
    if kind == "avif":
        # The picture's item is called something else, of which Pillow raises a RuntimeError.
        content = content.replace(b"av01", b"none")
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": content[: 150 if kind == "truncated" else None], "path": None}]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    with pytest.raises(ConceptDataError, match="picture 0 of column 'image' cannot be read"):
        read_pictures(table, "image")[0]


def test_metadata_of_a_missing_picture(tmp_path):
    folder = image_folder(tmp_path / "data", CAPTIONS)
    lines = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]
    lines[1]["file_name"] = "absent.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConceptDataError, match="cannot be read"):
        load(folder, tmp_path)[1]


# Phrases


def partly_composed(text: str) -> str:
    """As Vietnamese is typed: of two marks on a letter the first composed."""
    parts = unicodedata.normalize("NFD", text)
    return re.sub(r"(.[\u0300-\u036f])(?=[\u0300-\u036f])", lambda m: unicodedata.normalize("NFC", m[1]), parts)


FORMS = {
    "composed": lambda text: unicodedata.normalize("NFC", text),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "partly composed": partly_composed,
    "upper case": str.upper,
    "curly": lambda text: text.replace("'", "\u2019"),
    "other curly": lambda text: text.replace("'", "\u2018"),
    "broken": lambda text: text.replace(" ", "\n "),
}


@given(
    phrase=st.sampled_from(["Pokémon", "McDonald's", "by Amélie's café", "chữ Tiếng Việt", "한국", "ガンダム"]),
    given_as=st.sampled_from(sorted(FORMS)),
    stored_as=st.sampled_from(sorted(FORMS)),
)
def test_a_phrase_is_taken_out_in_whatever_form_it_is_stored_and_the_rest_stays_as_it_was(phrase, given_as, stored_as):
    for before, after in (("a cup", ""), ("l\u2019été, e\u0301te\u0301", "of Zoe\u0308's"), ("", "on grass")):
        caption = f"{before} {FORMS[stored_as](phrase)} {after}"
        assert without_phrase(caption, FORMS[given_as](phrase)) == (f"{before} {after}".strip(), True)


@pytest.mark.parametrize(
    ("caption", "phrase"),
    [
        ("a café", "caf"),
        ("a café", "cafe"),
        ("émilie", "milie"),
        ("각", "가"),
        ("が", "か"),
        ("McDonalds", "McDonald's"),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_what_is_another_word_is_left_in_whatever_form(caption, phrase, form):
    caption = unicodedata.normalize(form, caption)
    assert without_phrase(caption, phrase) == (caption, False)
