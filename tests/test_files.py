"""Files on disk and the ids of repositories on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_gradproj.errors import ConceptBasisError
from peft_gradproj.files import check_can_hold, is_hub_id, is_repository, locate_file

IDS = ["org/name", "org-1/Name_2.0", "0/a", "_/b", "a.b/c"]
PATHS = [
    "./base",
    "../base",
    "~/base",
    "/base",
    "base/",
    "org//name",
    "a/b/c",
    "C:\\base",
    "-a/b",
    "org/name.git",
    "",
    "a b",
]


@pytest.mark.parametrize("name", [*IDS, "gpt2"])
def test_what_the_hub_takes_as_a_name_is_an_id(name):
    assert is_hub_id(name)


@pytest.mark.parametrize("name", PATHS)
def test_what_the_hub_refuses_as_a_name_is_none(name):
    assert not is_hub_id(name)
    assert not is_repository(name)


def test_a_repository_has_an_owner_and_is_no_path_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(is_repository(name) for name in IDS)
    assert not is_repository("gpt2")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_repository("org/name")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a").touch()
    assert not is_repository("0/a")


@pytest.mark.parametrize("name", [*PATHS[:-2], "gpt2", "org/name.safetensors"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    def reached(*args: object, **kwargs: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", reached)
    with pytest.raises(ConceptBasisError, match="does not exist; expected a file, a folder, or a Hub id"):
        locate_file(name, "basis.safetensors", revision=None, error=ConceptBasisError)


def test_a_folder_without_the_file_says_which_is_missing(tmp_path):
    with pytest.raises(ConceptBasisError, match="holds no basis"):
        locate_file(tmp_path, "basis.safetensors", revision=None, error=ConceptBasisError)
    (tmp_path / "basis.safetensors").touch()
    expected = tmp_path / "basis.safetensors"
    for given in (tmp_path, expected):
        assert locate_file(given, "basis.safetensors", revision=None, error=ConceptBasisError) == expected


def test_a_folder_that_cannot_be_made_is_refused_and_one_that_can_be_is_not_made(tmp_path):
    (tmp_path / "file").write_text("own")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for folder in (tmp_path, tmp_path / "a" / "b", tmp_path / "link"):
        check_can_hold(folder, ConceptBasisError)
    refused = [tmp_path / "file", tmp_path / "file" / "a" / "b"]
    if Path("/proc/self").exists():
        # Nobody may write there, root included.
        refused.append(Path("/proc/a"))
    for folder in refused:
        with pytest.raises(ConceptBasisError, match="nothing can be written"):
            check_can_hold(folder, ConceptBasisError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
