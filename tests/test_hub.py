"""Publishing and fetching over HTTP: what was checked goes up, in one commit or none, and can be checked again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallNet
from helpers import LAYERS, small_net_basis
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from published_folders import (
    BASIS,
    BOUND_FILES,
    DIFFUSERS_WEIGHTS,
    MANIFEST,
    WEIGHTS,
    contents,
    directions,
    edit_json,
    honest_folder,
)
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_TARGETS, basis_for, tiny_llama

from peft_gradproj import (
    ConceptBasis,
    GradProjConfig,
    LayerBasis,
    collect_concept_probes,
    push_adapter_to_hub,
    verify_adapter,
)
from peft_gradproj.adapter_folder import write_sidecars
from peft_gradproj.cli import main
from peft_gradproj.errors import AdapterFolderError, ConceptBasisError, GradProjError, HubError
from peft_gradproj.hub import DEFAULT_MESSAGE
from peft_gradproj.projection import remove_component

pytest_plugins = ("hub_server",)

NAME = "user/name"
PUBLISHED = {WEIGHTS, "adapter_config.json", BASIS, MANIFEST, "README.md"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    honest_folder(tmp_path / "adapter")
    return tmp_path / "adapter"


def resolved(hub: Any) -> set[tuple[str, str]]:
    """Revision and path of every file that was asked for."""
    paths = (path for _, path in hub.requests if "/resolve/" in path)
    return {tuple(path.split("/resolve/")[1].split("/", 1)) for path in paths}  # type: ignore[misc]


# Publishing


@pytest.mark.parametrize("lfs", [False, True], ids=["in the commit", "by LFS"])
@pytest.mark.parametrize("style", ["peft", "unet, old"])
def test_exactly_the_published_files_go_up_in_one_commit(hub, tmp_path, style, lfs):
    hub.lfs = lfs
    honest_folder(tmp_path, style=style)
    for private in ("optimizer.pt", "adapter_model.bin", "training.log", "scheduler.safetensors"):
        (tmp_path / private).write_bytes(b"mine")
    (tmp_path / "checkpoint-5").mkdir()
    before = contents_of_files(tmp_path)
    result = push_adapter_to_hub(tmp_path, NAME)
    there = hub.files(NAME)
    assert {name: data for name, data in there.items() if name != "README.md"} == {
        name: before[name] for name in (*BOUND_FILES, MANIFEST) if name in before
    }
    assert "gradproj:begin" in there["README.md"].decode()
    assert hub.history(NAME) == [DEFAULT_MESSAGE]
    assert result.files == {name: len(data) for name, data in there.items()}
    assert result.commit == hub.repos[NAME].refs["main"]
    assert result.url == f"{hub.url}/{NAME}/commit/{result.commit}"
    assert result.report.ok
    assert contents_of_files(tmp_path) == before
    assert verify_adapter(NAME).ok


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_publishing_again_commits_nothing(hub, folder):
    first = push_adapter_to_hub(folder, NAME)
    again = push_adapter_to_hub(folder, NAME)
    assert again.commit == first.commit
    assert hub.history(NAME) == [DEFAULT_MESSAGE]


def test_a_dry_run_asks_nothing_of_the_hub_and_tells_what_would_go_up(hub, folder):
    before = contents(folder)
    planned = push_adapter_to_hub(folder, NAME, dry_run=True)
    assert hub.requests == []
    assert contents(folder) == before
    assert planned.dry_run
    done = push_adapter_to_hub(folder, NAME)
    assert not done.dry_run
    assert planned.files == done.files
    assert set(planned.files) == PUBLISHED


def test_an_existing_repository_keeps_its_other_files(hub, folder):
    hub.add_repo(NAME, {"notes.txt": b"hello"})
    push_adapter_to_hub(folder, NAME, commit_message="Second")
    assert set(hub.files(NAME)) == {*PUBLISHED, "notes.txt"}
    assert hub.history(NAME) == ["Second"]


def test_a_private_repository_is_private(hub, folder, monkeypatch):
    push_adapter_to_hub(folder, NAME, private=True)
    assert hub.repos[NAME].private
    assert verify_adapter(NAME).ok
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(AdapterFolderError, match=NAME):
        verify_adapter(NAME)


@pytest.mark.parametrize("private", [True, False])
def test_nothing_goes_into_a_repository_that_others_can_see_unexpectedly(hub, folder, private):
    hub.add_repo(NAME, private=not private)
    with pytest.raises(HubError, match="exists and is public" if private else "exists and is private"):
        push_adapter_to_hub(folder, NAME, private=private)
    assert hub.files(NAME) == {}


def test_a_branch_is_made_and_main_is_left_alone(hub, folder):
    result = push_adapter_to_hub(folder, NAME, revision="v2/try")
    assert set(hub.files(NAME, "v2/try")) == PUBLISHED
    assert hub.files(NAME) == {}
    report = verify_adapter(NAME, revision="v2/try")
    assert (report.ok, report.commit) == (True, result.commit)
    push_adapter_to_hub(folder, NAME, revision="v2/try", commit_message="Again", license="mit")
    assert hub.history(NAME, "v2/try") == [DEFAULT_MESSAGE, "Again"]


def test_a_pull_request_leaves_the_branch_alone(hub, folder):
    hub.add_repo(NAME)
    result = push_adapter_to_hub(folder, NAME, create_pr=True)
    assert set(hub.files(NAME, "refs/pr/1")) == PUBLISHED
    assert hub.files(NAME) == {}
    assert result.url == f"{hub.url}/{NAME}/discussions/1"
    assert verify_adapter(NAME, revision="refs/pr/1").commit == result.commit


def test_a_pull_request_can_be_opened_where_one_may_not_write(hub, folder):
    hub.add_repo("somebody/else")
    with pytest.raises(HubError, match="answered 403"):
        push_adapter_to_hub(folder, "somebody/else")
    push_adapter_to_hub(folder, "somebody/else", create_pr=True)
    assert set(hub.files("somebody/else", "refs/pr/1")) == PUBLISHED
    assert hub.files("somebody/else") == {}


def test_pictures_go_up_with_the_card_when_they_are_named(hub, folder, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"a picture")
    (folder / "private.png").write_bytes(b"training data")
    push_adapter_to_hub(folder, NAME, images=[("a cat", tmp_path / "cat.png")])
    assert set(hub.files(NAME)) == {*PUBLISHED, "images/cat.png"}
    assert "url: images/cat.png" in hub.files(NAME)["README.md"].decode()
    assert verify_adapter(NAME).ok
    with pytest.raises(AdapterFolderError, match="is no picture"):
        push_adapter_to_hub(folder, NAME, images=[("a pickle", tmp_path / "weights.pt")])


# The card on the Hub


def test_text_written_on_the_hub_is_kept_where_the_folder_has_none(hub, folder):
    push_adapter_to_hub(folder, NAME)
    card = hub.files(NAME)["README.md"].decode().replace("# name", "# name\n\nWritten on the Hub.")
    repo = hub.repos[NAME]
    repo.commit("main", repo.refs["main"], {**hub.files(NAME), "README.md": card.encode()}, "edit")
    push_adapter_to_hub(folder, NAME, license="mit")
    there = hub.files(NAME)["README.md"].decode()
    assert "Written on the Hub." in there
    assert "license: mit" in there


def test_text_written_in_the_folder_replaces_that_on_the_hub(hub, folder):
    hub.add_repo(NAME, {"README.md": b"Old text.\n"})
    (folder / "README.md").write_text("New text.\n")
    push_adapter_to_hub(folder, NAME)
    there = hub.files(NAME)["README.md"].decode()
    assert "New text." in there
    assert "Old text." not in there


TEMPLATE = """---
{}library_name: peft
---

# Model Card for Model ID

<!-- Provide a quick summary of what the model is/does. -->

{}

- **Developed by:** [More Information Needed]

### Framework versions

- PEFT 0.21.2
"""


def test_a_template_filled_in_in_part_replaces_the_card_on_the_hub(hub, folder):
    for words, license in (("First version.", "mit"), ("Second version.", "cc-by-nc-4.0")):
        (folder / "README.md").write_text(TEMPLATE.format(f"license: {license}\n", words))
        push_adapter_to_hub(folder, NAME)
        there = hub.files(NAME)["README.md"].decode()
        assert words in there
        assert f"license: {license}" in there
    assert "First version." not in there


def test_of_a_template_that_nobody_filled_in_the_metadata_count(hub, folder):
    hub.add_repo(NAME, {"README.md": b"---\nlicense: mit\nlanguage: en\n---\n# Mine\n\nWritten on the Hub.\n"})
    (folder / "README.md").write_text(TEMPLATE.format("license: cc-by-nc-4.0\n", ""))
    push_adapter_to_hub(folder, NAME)
    there = hub.files(NAME)["README.md"].decode()
    for kept in ("Written on the Hub.", "license: cc-by-nc-4.0", "language: en", "library_name: peft"):
        assert kept in there
    assert "[More Information Needed]" not in there


def test_a_card_on_the_hub_that_cannot_be_read_is_told_from_the_folders(hub, folder):
    hub.add_repo(NAME, {"README.md": b"---\na: [\n---\n# Mine\n"})
    with pytest.raises(HubError, match=rf"of {NAME} on the Hub, the metadata .* cannot be read"):
        push_adapter_to_hub(folder, NAME)
    assert set(hub.files(NAME)) == {"README.md"}


def test_without_a_card_the_one_on_the_hub_stays(hub, folder):
    hub.add_repo(NAME, {"README.md": b"Old text.\n"})
    assert "README.md" not in push_adapter_to_hub(folder, NAME, card=False).files
    assert hub.files(NAME)["README.md"] == b"Old text.\n"


# What is withheld, and what is refused


def test_a_withheld_basis_stays_at_home_and_leaves_the_repository(hub, tmp_path):
    basis = honest_folder(tmp_path)
    push_adapter_to_hub(tmp_path, NAME)
    before = contents(tmp_path)
    result = push_adapter_to_hub(tmp_path, NAME, basis="digest")
    assert contents(tmp_path) == before
    there = hub.files(NAME)
    assert set(there) == PUBLISHED - {BASIS}
    assert json.loads(there[MANIFEST])["basis"] == {"published": "digest", "digest": basis.digest()}
    assert basis.digest() in there["README.md"].decode()
    assert result.report.ok
    assert verify_adapter(NAME).status == "could not be checked"
    assert verify_adapter(NAME, basis=basis).ok


def test_withholding_would_break_a_signature(hub, folder):
    (folder / "model.sig").write_text("{}")
    with pytest.raises(AdapterFolderError, match="signed with its concept basis"):
        push_adapter_to_hub(folder, NAME, basis="digest")
    assert "model.sig" in push_adapter_to_hub(folder, NAME).files


def test_files_of_the_former_publication_are_removed_and_told(hub, tmp_path):
    honest_folder(tmp_path / "peft")
    honest_folder(tmp_path / "unet", style="unet")
    assert push_adapter_to_hub(tmp_path / "peft", NAME).removed == ()
    result = push_adapter_to_hub(tmp_path / "unet", NAME)
    assert result.removed == ("adapter_config.json", WEIGHTS)
    assert result.to_dict()["removed"] == ["adapter_config.json", WEIGHTS]
    assert set(hub.files(NAME)) == {DIFFUSERS_WEIGHTS, BASIS, MANIFEST, "README.md"}


def test_an_adapter_of_somebody_else_is_not_removed(hub, tmp_path):
    honest_folder(tmp_path, style="unet")
    files = {WEIGHTS: b"somebody's own", "adapter_config.json": b"{}", "notes.txt": b"x"}
    hub.add_repo(NAME, files)
    with pytest.raises(HubError, match=f"holds {WEIGHTS} of an adapter that was not published with"):
        push_adapter_to_hub(tmp_path, NAME)
    assert hub.files(NAME) == files


def test_a_branch_is_made_only_for_what_can_be_published(hub, folder):
    hub.add_repo(NAME, {"adapter_model.bin": b"x"})
    with pytest.raises(HubError, match=r"also holds adapter_model\.bin"):
        push_adapter_to_hub(folder, NAME, revision="try")
    assert set(hub.repos[NAME].refs) == {"main"}
    hub.add_repo("user/other", {DIFFUSERS_WEIGHTS: b"somebody's own"})
    with pytest.raises(HubError, match="was not published with peft-gradproj"):
        push_adapter_to_hub(folder, "user/other", revision="try")
    assert set(hub.repos["user/other"].refs) == {"main"}


def test_a_stale_signature_is_removed(hub, folder):
    hub.add_repo(NAME, {"model.sig": b"{}"})
    push_adapter_to_hub(folder, NAME)
    assert set(hub.files(NAME)) == PUBLISHED


def test_what_does_not_verify_is_refused_unless_told_otherwise(hub, tmp_path):
    honest_folder(tmp_path, strength=0.5, uncovered=["a bias"])
    with pytest.raises(AdapterFolderError, match=r"strength: is 0\.5.*coverage \(a bias\)"):
        push_adapter_to_hub(tmp_path, NAME)
    assert hub.requests == []
    result = push_adapter_to_hub(tmp_path, NAME, allow_unverified=True)
    assert not result.report.ok
    assert "did not verify" in hub.files(NAME)["README.md"].decode()


def test_an_adapter_trained_with_probes_only_is_published_as_what_it_is(hub, tmp_path):
    honest_folder(tmp_path, published_basis=None)
    assert push_adapter_to_hub(tmp_path, NAME).report.status == "could not be checked"
    assert "| orthogonality | could not be checked |" in hub.files(NAME)["README.md"].decode()


def test_behaviour_is_measured_for_the_card_where_a_base_model_and_probes_are_given(hub, tmp_path):
    _, base = small_adapter(tmp_path)
    probes = collect_concept_probes(base, [({"sample": torch.randn(4, 3, 8, 8)}, None)])
    measured = {"base_model": base, "probes": probes, "reference": probes}
    with pytest.raises(AdapterFolderError, match=r"What failed: drift: .*the ratio is 1"):
        push_adapter_to_hub(tmp_path, NAME, **measured)
    assert push_adapter_to_hub(tmp_path, NAME, allow_unverified=True, **measured).report.behaviour is not None
    assert re.search(r"\| behaviour \| \*\*failed\*\* \| .*the ratio is 1", hub.files(NAME)["README.md"].decode())


def test_weights_of_others_in_the_repository_are_refused(hub, folder):
    hub.add_repo(NAME, {"adapter_model.bin": b"a pickle"})
    with pytest.raises(HubError, match=r"also holds adapter_model\.bin"):
        push_adapter_to_hub(folder, NAME)
    assert set(hub.files(NAME)) == {"adapter_model.bin"}


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "user/na me", "../x", ""])
def test_a_malformed_name_is_refused_before_anything_is_asked(hub, folder, repo_id):
    with pytest.raises(HubError, match="expected 'user/name'"):
        push_adapter_to_hub(folder, repo_id)
    assert hub.requests == []


def test_errors_name_the_users_folder_and_not_our_copy(hub, folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(AdapterFolderError, match=str(folder)):
        push_adapter_to_hub(folder, NAME)
    with pytest.raises(AdapterFolderError, match="is not a folder"):
        push_adapter_to_hub(folder / "nothing", NAME)


# Faults


@dataclass(frozen=True)
class Failure:
    """A fault while publishing, and what the error must say of it."""

    kind: str | int
    where: str
    says: str
    times: int = 1
    headers: tuple[tuple[str, str], ...] = ()
    commits: int = 0


FAILURES = [
    Failure("drop", "POST /api/repos/create", "connection was lost.*preparing user/name. Nothing was published"),
    Failure("drop", "POST .*/preupload/", "connection was lost.*uploading to user/name. Nothing was", times=9),
    Failure("drop", "PUT /lfs/", "connection was lost.*uploading to user/name. Nothing was published", times=99),
    Failure("drop", "POST .*/commit/", "connection was lost.*All of it was committed, or nothing: publish again"),
    Failure("drop after", "POST .*/commit/", "All of it was committed, or nothing: publish again", commits=1),
    Failure("truncate", "POST .*/commit/", "All of it was committed, or nothing: publish again", commits=1),
    Failure("truncate", "GET /api/models/user/name", "connection was lost.*Nothing was published"),
    Failure(401, "POST .*/preupload/", "answered 401.*Nothing was published.*hf auth login"),
    Failure(403, "POST .*/commit/", "answered 403.*Nothing was published.*token"),
    Failure(404, "GET /api/models/user/name", "answered 404.*Check the name"),
    Failure(409, "POST .*/commit/", "answered 409.*Nothing was published.*try again in a moment"),
    Failure(412, "POST .*/commit/", "answered 412.*Nothing was published.*committed meanwhile"),
    Failure(429, "POST .*/commit/", "answered 429.*Wait 30 seconds", headers=(("Retry-After", "30"),)),
    Failure(429, "POST .*/preupload/", "answered 429.*Wait and try again", times=9),
    Failure(500, "POST .*/commit/", "answered 500.*All of it was committed, or nothing.*try again later"),
    Failure(500, "POST /api/repos/create", "answered 500.*Nothing was published.*try again later"),
    Failure(503, "POST .*/preupload/", "answered 503.*Nothing was published", times=9),
    Failure(400, "POST /api/validate-yaml", "Invalid metadata in README.*Nothing was published"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f"{f.kind} at {f.where}")
def test_a_fault_is_told_and_leaves_one_commit_or_none(hub, folder, no_waiting, failure):
    hub.lfs = True
    hub.fail(failure.kind, failure.where, failure.times, **{n.replace("-", "_"): v for n, v in failure.headers})
    with pytest.raises(HubError, match=failure.says):
        push_adapter_to_hub(folder, NAME)
    there = hub.files(NAME) if NAME in hub.repos else {}
    assert set(there) == (PUBLISHED if failure.commits else set())
    hub.faults.clear()
    result = push_adapter_to_hub(folder, NAME)
    assert hub.history(NAME) == [DEFAULT_MESSAGE]
    assert (set(hub.files(NAME)), result.commit) == (PUBLISHED, hub.repos[NAME].refs["main"])


@pytest.mark.parametrize(("token", "says"), [("hf_wrong", "answered 401.*log"), ("hf_reader", "answered 403.*token")])
def test_a_token_that_may_not_write_is_told(hub, folder, token, says):
    hub.add_repo("user/other")
    with pytest.raises(HubError, match=says):
        push_adapter_to_hub(folder, NAME, token=token)
    assert NAME not in hub.repos


def test_a_commit_that_came_between_is_not_overwritten(hub, folder):
    repo = hub.add_repo(NAME)
    original = hub.take_fault

    def meanwhile(request: str) -> Any:
        if "/preupload/" in request:
            repo.commit("main", repo.refs["main"], {"notes.txt": b"hello"}, "Meanwhile")
        return original(request)

    hub.take_fault = meanwhile
    with pytest.raises(HubError, match=r"answered 412.*committed meanwhile"):
        push_adapter_to_hub(folder, NAME)
    assert hub.history(NAME) == ["Meanwhile"]


@pytest.mark.parametrize("kind", ["drop", 500, 429])
def test_a_passing_fault_is_survived(hub, folder, no_waiting, kind):
    hub.fail(kind, "POST .*/preupload/", Retry_After="7")
    push_adapter_to_hub(folder, NAME)
    assert set(hub.files(NAME)) == PUBLISHED
    assert no_waiting
    if kind == 429:
        assert no_waiting[0] >= 7


def test_offline_mode_is_told(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"offline mode is on.*Nothing was published.*HF_HUB_OFFLINE"):
        push_adapter_to_hub(folder, NAME)


def test_no_server_is_told(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="connection was lost, or never made"):
        push_adapter_to_hub(folder, NAME)


# Fetching


def test_verify_pins_the_commit_and_fetches_the_published_files_alone(hub, folder):
    hub.add_repo(NAME, {"optimizer.pt": b"a pickle", "images/cat.png": b"a picture"})
    first = push_adapter_to_hub(folder, NAME)
    report = verify_adapter(NAME)
    assert (report.ok, report.commit) == (True, first.commit)
    assert resolved(hub) == {(first.commit, name) for name in PUBLISHED}
    repo = hub.repos[NAME]
    repo.commit("main", first.commit, {**hub.files(NAME), WEIGHTS: b"something else"}, "swap")
    assert verify_adapter(NAME, revision=first.commit).commit == first.commit
    with pytest.raises(AdapterFolderError, match=f"{NAME} at commit {repo.refs['main']}/{WEIGHTS} is cut short"):
        verify_adapter(NAME)


@pytest.mark.parametrize(
    ("files", "sizes", "message"),
    [
        ({}, {MANIFEST: 9 * 2**20}, "at most 8,388,608 are read"),
        ({}, {WEIGHTS: 3 * 2**30}, "at most 2,147,483,648 are read"),
        ({"README.md": b"x"}, {"README.md": 2**30}, "at most 8,388,608 are read"),
        ({"adapter_model.bin": b"x"}, {}, "a loader may take"),
        ({"unet/pytorch_lora_weights.safetensors": b"x"}, {}, "a loader may take"),
        ({"Adapter_Model.safetensors": b"x"}, {}, "beside, or for, adapter_model.safetensors"),
        ({"gradproj․json": b"{}"}, {}, "beside, or for, gradproj.json"),
        ({MANIFEST: None}, {}, "was not published with"),
    ],
    ids=str,
)
def test_a_repository_is_refused_before_anything_is_fetched(hub, folder, files, sizes, message):
    there = {**contents(folder), "checkpoint-5/pytorch_lora_weights.safetensors": b"x", **files}
    hub.add_repo(NAME, {name: data for name, data in there.items() if data is not None})
    hub.listed_sizes.update(sizes)
    with pytest.raises(AdapterFolderError, match=message):
        verify_adapter(NAME)
    assert resolved(hub) == set()


def test_a_lost_connection_is_told(hub, folder):
    push_adapter_to_hub(folder, NAME)
    hub.fail("drop", "GET /api/models/", times=9)
    with pytest.raises(AdapterFolderError, match=f"{NAME} is neither a folder"):
        verify_adapter(NAME)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, WEIGHTS) for kind in ("drop", "truncate", 401, 403, 429, 500)), ("drop", BASIS), ("truncate", MANIFEST)],
)
def test_a_fault_while_fetching_is_an_error_and_never_an_answer(hub, folder, no_waiting, kind, name):
    push_adapter_to_hub(folder, NAME)
    hub.fail(kind, f"GET .*/resolve/.*/{name}", times=99)
    with pytest.raises(GradProjError, match=NAME):
        verify_adapter(NAME)
    hub.faults.clear()
    assert verify_adapter(NAME).ok


def test_a_truncated_body_is_fetched_on_from_where_it_broke(hub, folder, no_waiting):
    push_adapter_to_hub(folder, NAME)
    hub.fail("truncate", f"GET .*/resolve/.*/{WEIGHTS}")
    assert verify_adapter(NAME).ok
    assert sum(method == "GET" and path.endswith(WEIGHTS) for method, path in hub.requests) == 2


@pytest.mark.parametrize("kind", ["drop", "truncate", 500])
def test_a_config_is_not_made_of_half_a_download(hub, folder, no_waiting, kind):
    push_adapter_to_hub(folder, NAME)
    hub.fail(kind, f"(HEAD|GET) .*/resolve/.*/{BASIS}", times=99)
    with pytest.raises(GradProjError, match=NAME):
        GradProjConfig.from_pretrained(NAME)


@pytest.mark.parametrize("kind", ["drop", "truncate", 403, 500])
def test_a_basis_that_cannot_be_fetched_is_our_error(hub, folder, no_waiting, kind):
    push_adapter_to_hub(folder, NAME)
    hub.fail(kind, f"GET .*/resolve/.*/{BASIS}", times=99)
    hub.fail(kind, f"HEAD .*/resolve/.*/{BASIS}", times=99 * (kind != "truncate"))
    for fetch in (lambda: ConceptBasis.load(NAME), lambda: verify_adapter(folder, basis=NAME)):
        with pytest.raises(ConceptBasisError, match=NAME):
            fetch()


def small_adapter(folder: Path) -> tuple[PeftModel, SmallNet]:
    """A GradProj adapter that does something, saved, and the base model that it belongs to."""
    base = SmallNet()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    config = GradProjConfig(r=4, lora_alpha=8, target_modules=list(LAYERS), concept_basis=small_net_basis())
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    fresh = SmallNet()
    fresh.load_state_dict(state)
    return model, fresh


def test_the_published_adapter_loads_and_resumes_by_its_id(hub, tmp_path):
    model, base = small_adapter(tmp_path)
    push_adapter_to_hub(tmp_path, NAME)
    config = GradProjConfig.from_pretrained(NAME)
    assert config.concept_basis == small_net_basis()
    resumed = PeftModel.from_pretrained(base, NAME, config=config, is_trainable=True)
    found, expected = (get_peft_model_state_dict(m) for m in (resumed, model))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)


def test_a_pinned_commit_is_what_is_loaded(hub, tmp_path):
    model, base = small_adapter(tmp_path)
    pinned = push_adapter_to_hub(tmp_path, NAME).commit
    small_adapter(tmp_path)
    assert push_adapter_to_hub(tmp_path, NAME).commit != pinned
    config = GradProjConfig.from_pretrained(NAME, revision=pinned)
    assert config.revision is None, "the revision of a config is that of the base model"
    loaded = PeftModel.from_pretrained(base, NAME, config=config, revision=pinned)
    found, expected = (get_peft_model_state_dict(m) for m in (loaded, model))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)
    assert {revision for revision, name in resolved(hub) if name != "README.md"} == {pinned}


def test_a_config_of_a_withheld_basis_has_none(hub, tmp_path):
    small_adapter(tmp_path)
    push_adapter_to_hub(tmp_path, NAME, basis="digest")
    config = GradProjConfig.from_pretrained(NAME, concept_basis=small_net_basis())
    assert config.concept_basis == small_net_basis()
    assert not any(path.endswith(BASIS) and method == "GET" for method, path in hub.requests)


def test_pefts_own_push_publishes_the_same_files(hub, tmp_path):
    model, _ = small_adapter(tmp_path)
    model.push_to_hub(NAME)
    assert set(hub.files(NAME)) == PUBLISHED
    assert len(hub.history(NAME)) == 1
    report = verify_adapter(NAME)
    assert report.ok, report.render()
    card = hub.files(NAME)["README.md"].decode()
    assert f"$ gradproj verify {NAME}\n" in card
    assert "| orthogonality | passed |" in card
    assert "library_name: peft" in card


def test_pefts_own_push_keeps_the_text_of_a_card_on_the_hub(hub, tmp_path):
    model, _ = small_adapter(tmp_path)
    hub.add_repo(NAME, {"README.md": b"---\nlicense: mit\n---\n# Mine\n\nWritten on the Hub.\n"})
    model.push_to_hub(NAME)
    card = hub.files(NAME)["README.md"].decode()
    assert "Written on the Hub." in card
    assert "license: mit" in card
    assert f"$ gradproj verify {NAME}\n" in card


@pytest.mark.parametrize("while_saving", [False, True])
def test_transformers_own_push_publishes_the_same_files(hub, tmp_path, while_saving):
    model = tiny_llama()
    basis = basis_for(model, LLAMA_TARGETS)
    model.add_adapter(GradProjConfig(r=4, target_modules=LLAMA_TARGETS, concept_basis=basis))
    if while_saving:
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=NAME)
    else:
        model.push_to_hub(NAME)
    # Where the model generates text, transformers adds how.
    assert set(hub.files(NAME)) - {"generation_config.json"} == PUBLISHED
    assert verify_adapter(NAME).ok
    assert f"$ gradproj verify {NAME}\n" in hub.files(NAME)["README.md"].decode()


STOCK = """
import sys
import torch
torch.set_num_threads(1)
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel
sys.path.insert(0, {tests!r})
from diffusers import AutoencoderKL, UNet2DConditionModel
from conftest import SmallNet

model = PeftModel.from_pretrained(SmallNet(), "user/peft")
save_file(get_peft_model_state_dict(model), {output!r} + "/peft.safetensors")
assert type(PeftConfig.from_pretrained("user/peft")).__name__ == "LoraConfig"

text = CLIPTextConfig(vocab_size=16, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
pipeline = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
    text_encoder=CLIPTextModel(text),
    tokenizer=None,
    unet=UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=12,
        attention_head_dim=4,
    ),
    scheduler=DDIMScheduler(),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)
pipeline.load_lora_weights("user/diffusers")
state = get_peft_model_state_dict(pipeline.unet, adapter_name="default_0")
save_file(state, {output!r} + "/diffusers.safetensors")
assert "peft_gradproj" not in sys.modules
"""


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def diffusers_adapter(folder: Path) -> None:
    """A LoRA of two layers of the UNet in `STOCK`, in diffusers' layout, with the sidecars of its basis."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    names = [f"{ATTENTION}.to_q", f"{ATTENTION}.to_k"]
    basis = ConceptBasis({name: LayerBasis(input=directions(8, 2, generator)) for name in names}, "logo")
    tensors = {}
    for name, layer in basis.items():
        a = remove_component(torch.randn(4, 8, generator=generator), layer.input, side="right")
        tensors[f"unet.{name}.lora.down.weight"] = a
        tensors[f"unet.{name}.lora.up.weight"] = torch.randn(8, 4, generator=generator)
    save_file(tensors, folder / DIFFUSERS_WEIGHTS, {"format": "pt"})
    write_sidecars(folder, basis, settings={"strength": 1.0}, base_model="someone/model")


def test_loaders_without_us_take_it_by_its_id(hub, tmp_path):
    small_adapter(tmp_path / "peft")
    diffusers_adapter(tmp_path / "diffusers")
    for layout in ("peft", "diffusers"):
        push_adapter_to_hub(tmp_path / layout, f"user/{layout}")
    assert "pipeline_tag: text-to-image" in hub.files("user/diffusers")["README.md"].decode()
    script = STOCK.format(tests=str(Path(__file__).parent), output=str(tmp_path))
    environment = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, published = load_file(tmp_path / "peft.safetensors"), load_file(tmp_path / "peft" / WEIGHTS)
    assert loaded.keys() == published.keys()
    assert all(torch.equal(loaded[key], published[key]) for key in published)
    loaded = load_file(tmp_path / "diffusers.safetensors")
    published = load_file(tmp_path / "diffusers" / DIFFUSERS_WEIGHTS)
    assert len(loaded) == len(published) == 4
    for key, tensor in published.items():
        new = key.replace("lora.down", "lora_A").replace("lora.up", "lora_B").removeprefix("unet.")
        assert torch.equal(loaded[new], tensor)


# The command line


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradproj", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return call


def test_publish_and_verify_from_the_command_line(hub, folder, run):
    status, out, _ = run("publish", folder, NAME, "--dry-run")
    assert (status, hub.requests) == (0, [])
    assert "dry run" in out
    assert all(name in out for name in PUBLISHED)
    status, out, _ = run("publish", folder, NAME, "--private", "--message", "Hello", "--basis", "digest", "--json")
    answer = json.loads(out)
    assert (status, answer["dry_run"], answer["report"]["ok"]) == (0, False, True)
    assert hub.history(NAME) == ["Hello"]
    assert hub.repos[NAME].private
    status, out, _ = run("verify", NAME, "--basis", folder / BASIS)
    assert status == 0
    assert f"commit {answer['commit']}" in out


def test_a_refusal_is_one_line_and_status_two(hub, folder, run):
    edit_json(folder, MANIFEST, lambda manifest: manifest["settings"].update(strength=0.5))
    status, out, err = run("publish", folder, NAME)
    assert (status, out) == (2, "")
    assert err.startswith("gradproj: ")
    assert err.count("\n") == 1
    status, _, err = run("publish", folder, NAME, "--allow-unverified", "--revision", "try")
    assert status == 0, err
    assert set(hub.files(NAME, "try")) == PUBLISHED
