"""The published folder: what is written and how, and a reader that believes nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_folders import (
    BASIS,
    CONFIG,
    DIFFUSERS_WEIGHTS,
    KEY_STYLES,
    MANIFEST,
    SHAPES,
    WEIGHTS,
    contents,
    edit_tensors,
    honest_folder,
    honest_tensors,
    random_basis,
    safetensors_bytes,
)
from safetensors.torch import load, load_file, save, save_file

from peft_gradproj import ConceptBasis, adapter_folder, verify_adapter
from peft_gradproj.adapter_folder import (
    PUBLISHED_FILES,
    LoraPair,
    has_adapter_weights,
    layer_leakage,
    locate_adapter_folder,
    parse_lora_layers,
    read_adapter_folder,
    read_basis_or_adapter,
    read_settings,
    write_sidecars,
)
from peft_gradproj.errors import AdapterFolderError
from peft_gradproj.projection import leakage
from peft_gradproj.untrusted import (
    MAX_JSON_BYTES,
    SAFETENSORS_DTYPES,
    FileBytes,
    _read_exactly,
    parse_json,
    parse_safetensors,
    printable,
    read_file,
)

SETTINGS = {"strength": 1.0, "rule": "half-space", "uncovered": "error"}


def weights_only(folder: Path, **options) -> ConceptBasis:
    """A folder as PEFT leaves it, without sidecars, and the basis that its adapter is orthogonal to."""
    basis = honest_folder(folder, **options)
    for name in (BASIS, MANIFEST):
        (folder / name).unlink()
    return basis


# Writing


def test_the_manifest_binds_what_is_published(tmp_path):
    basis = weights_only(tmp_path)
    path = write_sidecars(
        tmp_path, basis, settings=SETTINGS, base_model=None, uncovered=["layer 'x'"], recipe={"seed": 3}
    )
    assert path == tmp_path / MANIFEST
    manifest = json.loads(path.read_text())
    published = {name: data for name, data in contents(tmp_path).items() if name != MANIFEST}
    assert set(published) == {WEIGHTS, CONFIG, BASIS}
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in published.items()
    }
    assert manifest["format_version"] == 1
    assert manifest["settings"] == SETTINGS
    assert manifest["concept"] == "logo"
    assert manifest["base_model"] == {"id": "someone/model", "revision": "abc"}
    assert manifest["basis"] == {"published": "full", "digest": basis.digest()}
    assert manifest["uncovered"] == ["layer 'x'"]
    assert manifest["recipe"] == {"seed": 3}
    assert {"torch", "peft", "peft-gradproj"} <= set(manifest["versions"])
    assert set(contents(tmp_path)) <= set(PUBLISHED_FILES)
    assert ConceptBasis.load(tmp_path) == basis


def test_what_a_kill_leaves_is_not_taken_for_the_adapter(tmp_path, monkeypatch):
    basis = weights_only(tmp_path)
    staged = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: [staged.append(Path(old).name), replace(old, new)])
    write_sidecars(tmp_path, basis, settings=SETTINGS, base_model=None)
    assert len(staged) >= 2
    for name in staged:
        (tmp_path / name).write_bytes(b"half a file")
    assert verify_adapter(tmp_path).ok


def test_the_leakage_in_the_manifest_is_that_of_the_file(tmp_path):
    basis = weights_only(tmp_path)
    edit_tensors(tmp_path, WEIGHTS, lambda t: [t.update({k: torch.randn_like(v)}) for k, v in list(t.items())])
    write_sidecars(tmp_path, basis, settings=SETTINGS, base_model=None)
    claimed = json.loads((tmp_path / MANIFEST).read_text())["leakage"]
    tensors = load_file(tmp_path / WEIGHTS)
    assert set(claimed) == set(SHAPES)
    for name, spaces in claimed.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].flatten(1) for part in "AB")
        dense = b.double() @ a.double()
        u, o = basis[name].input.double(), basis[name].output.double()
        assert spaces["input"] == pytest.approx(float((dense @ u).norm() / dense.norm()))
        assert spaces["output"] == pytest.approx(float((o.T @ dense).norm() / dense.norm()))


def test_weights_that_are_not_finite_are_published_with_leakage_unknown(tmp_path):
    basis = weights_only(tmp_path)
    edit_tensors(tmp_path, WEIGHTS, lambda t: [v.fill_(torch.nan) for v in t.values()])
    write_sidecars(tmp_path, basis, settings=SETTINGS, base_model=None)
    assert json.loads((tmp_path / MANIFEST).read_text())["leakage"]["down.conv"] == {"input": None, "output": None}


def test_a_withheld_basis_leaves_no_trace_but_its_digest(tmp_path):
    basis = weights_only(tmp_path)
    write_sidecars(tmp_path, basis, settings=SETTINGS, base_model=None, publish_basis="digest")
    assert set(contents(tmp_path)) == {WEIGHTS, CONFIG, MANIFEST}
    assert json.loads((tmp_path / MANIFEST).read_text())["basis"] == {"published": "digest", "digest": basis.digest()}


@pytest.mark.parametrize("withheld", [True, False])
def test_a_basis_that_is_not_to_be_published_is_neither_left_there_nor_deleted(tmp_path, withheld):
    basis = weights_only(tmp_path)
    basis.save(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(AdapterFolderError, match="move it out of the folder"):
        write_sidecars(
            tmp_path, basis if withheld else None, settings=SETTINGS, base_model=None, publish_basis="digest"
        )
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"base_model": None}, {"id": "someone/model", "revision": "abc"}),
        ({"base_model": "x/y"}, {"id": "x/y", "revision": None}),
        ({"base_model": "x/y", "revision": "1"}, {"id": "x/y", "revision": "1"}),
    ],
)
def test_a_revision_is_taken_from_the_basis_only_for_the_same_model(tmp_path, given, expected):
    write_sidecars(tmp_path, weights_only(tmp_path), settings=SETTINGS, **given)
    assert json.loads((tmp_path / MANIFEST).read_text())["base_model"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"strength": torch.ones(1)}}, "cannot be written as JSON"),
        ({"settings": {"strength": float("nan")}}, "cannot be written as JSON"),
        ({"recipe": {"data": object()}}, "cannot be written as JSON"),
        ({"publish_basis": "some"}, "expected 'full' or 'digest'"),
    ],
)
def test_what_cannot_be_published_is_refused_and_leaves_the_former_state(tmp_path, options, message):
    basis = honest_folder(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(AdapterFolderError, match=message):
        write_sidecars(tmp_path, basis, **{"settings": SETTINGS, "base_model": None, **options})
    assert contents(tmp_path) == before


def test_sidecars_need_weights(tmp_path):
    assert not has_adapter_weights(tmp_path)
    with pytest.raises(AdapterFolderError, match="save the adapter there first"):
        write_sidecars(tmp_path, random_basis(), settings=SETTINGS, base_model=None)
    assert not list(tmp_path.iterdir())
    save_file({"a": torch.ones(1)}, tmp_path / DIFFUSERS_WEIGHTS)
    assert has_adapter_weights(tmp_path)


# Atomicity


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
def test_an_error_while_writing_leaves_whole_files_and_nothing_else(tmp_path, monkeypatch, call, nth):
    basis = honest_folder(tmp_path)
    before = contents(tmp_path)
    real, count = getattr(os, call), 0

    def failing(*args):
        nonlocal count
        count += 1
        if count == nth:
            raise OSError("disk full")
        return real(*args)

    monkeypatch.setattr(adapter_folder.os, call, failing)
    with pytest.raises(OSError, match="disk full"):
        write_sidecars(tmp_path, basis, settings={"strength": 0.5}, base_model=None)
    monkeypatch.undo()
    # The basis is the same, so that the former state holds even where it was put in place again already.
    assert contents(tmp_path) == before
    assert verify_adapter(tmp_path).ok


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("moment", range(1, 8))
def test_a_kill_at_any_moment_leaves_whole_files_that_never_verify_in_part(tmp_path, moment):
    folder = tmp_path / "adapter"
    basis = honest_folder(folder, basis=random_basis(seed=0))
    before = contents(folder)
    other = random_basis(seed=1)
    process = os.fork()
    if process == 0:
        _write_and_die(folder, other, moment)
    _, status = os.waitpid(process, 0)
    after = {name: data for name, data in contents(folder).items() if name in PUBLISHED_FILES}
    assert os.WIFSIGNALED(status) == (moment <= 6), "the test has to kill at each moment of a write, and let one end"
    assert ConceptBasis.load(folder) in (basis, other)
    if after[MANIFEST] == before[MANIFEST]:
        # Between the two renames basis and manifest are apart; then no one takes them for a pair.
        assert verify_adapter(folder).ok == (after == before)
    else:
        assert json.loads(after[MANIFEST])["basis"]["digest"] == other.digest()
        assert ConceptBasis.load(folder) == other


def _write_and_die(folder: Path, basis: ConceptBasis, moment: int) -> None:
    """In a forked child: write, and be killed at the nth system call that matters. Never returns."""
    count = 0

    def deadly(real):
        def call(*args):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    try:
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        write_sidecars(folder, basis, settings={"strength": 1.0}, base_model=None)
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)


# Reading


@pytest.mark.parametrize("style", KEY_STYLES)
def test_layers_come_under_the_names_of_the_base_model(tmp_path, style):
    basis = honest_folder(tmp_path, style=style)
    folder = read_adapter_folder(tmp_path)
    (parsed,) = folder.layers().values()
    assert not parsed.uncovered
    assert not parsed.malformed
    original = honest_tensors(basis, style=style)
    for name in SHAPES:
        a, b = (original[key.format(name)] for key in KEY_STYLES[style])
        assert torch.equal(parsed.pairs[name].a, a.flatten(1))
        assert torch.equal(parsed.pairs[name].b, b.flatten(1))
    assert folder.basis is not None
    assert folder.basis.to_concept_basis() == basis
    assert (folder.config is None) == (style != "peft")


def test_alpha_tensors_belong_to_their_layers_and_others_to_none():
    pair = {"unet.x.lora_A.weight": torch.ones(2, 3), "unet.x.lora_B.weight": torch.ones(4, 2)}
    parsed = parse_lora_layers({**pair, "unet.x.alpha": torch.tensor(8.0), "unet.y.alpha": torch.tensor(1.0)})
    assert parsed.pairs["x"].alpha == 8.0
    assert parsed.uncovered == ("unet.y.alpha",)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_alphas_of_a_layer_neither_hides_the_other(order):
    """diffusers takes the one with the prefix, wherever it stands."""
    alphas = {"unet.x.alpha": torch.tensor(1e9), "x.alpha": torch.tensor(2.0)}
    pair = {"unet.x.lora_A.weight": torch.ones(2, 3), "unet.x.lora_B.weight": torch.ones(4, 2)}
    parsed = parse_lora_layers({**pair, **dict(list(alphas.items())[::order])})
    assert set(parsed.uncovered) == set(alphas)


def test_settings_are_read_back(tmp_path):
    assert read_settings(tmp_path) is None
    write_sidecars(tmp_path, weights_only(tmp_path), settings=SETTINGS, base_model=None)
    assert read_settings(tmp_path) == SETTINGS
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(AdapterFolderError, match="not valid JSON"):
        read_settings(tmp_path)


def test_a_basis_or_an_adapter_is_read_by_what_it_is(tmp_path):
    basis = honest_folder(tmp_path / "adapter")
    assert read_basis_or_adapter(tmp_path / "adapter").to_dict()["settings"] == {"strength": 1.0}
    (tmp_path / "bare").mkdir()
    for path in (basis.save(tmp_path / "bare"), tmp_path / "bare"):
        found = read_basis_or_adapter(path)
        assert found.to_dict()["layers"]["down.conv"] == {"input": [27, 2], "output": [8, 2]}
    with pytest.raises(AdapterFolderError, match="does not exist"):
        read_basis_or_adapter(tmp_path / "nothing")


def test_a_link_within_the_folder_is_followed(tmp_path):
    honest_folder(tmp_path)
    (tmp_path / CONFIG).rename(tmp_path / "real.json")
    (tmp_path / CONFIG).symlink_to("real.json")
    assert verify_adapter(tmp_path).ok


@given(
    d_in=st.integers(1, 20), d_out=st.integers(1, 20), r=st.integers(1, 8), k=st.integers(1, 8), seed=st.integers(0, 99)
)
def test_layer_leakage_is_the_projection_modules_and_at_least_b_r_in_the_rank_space(d_in, d_out, r, k, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
    bases = {
        space: torch.linalg.qr(torch.randn(d, min(k, d), generator=generator))[0]
        for space, d in {"input": d_in, "rank": r, "output": d_out}.items()
    }
    found = layer_leakage(LoraPair(a, b), {**bases, "gradient": torch.ones(3, 1)})
    assert set(found) == {"input", "rank", "output"}
    shares = {space: leakage(a, b, bases[space], space=space) for space in bases}
    share_of_b = float((b @ bases["rank"]).norm() / b.norm())
    assert found == pytest.approx({**shares, "rank": max(shares["rank"], share_of_b)}, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("fit", ["[]", "{", '{"a": 1, "a": 2}'])
def test_a_note_on_the_fit_that_is_no_object_is_refused(tmp_path, fit):
    path = random_basis().save(tmp_path / BASIS)
    save_file(load_file(path), path, {"format_version": "1", "fit": fit})
    with pytest.raises(AdapterFolderError, match="the note on the fit"):
        read_basis_or_adapter(path).to_dict()


def test_a_folder_is_read_before_a_repository_of_its_name(tmp_path, monkeypatch):
    honest_folder(tmp_path / "user" / "name")
    monkeypatch.chdir(tmp_path)
    path, commit = locate_adapter_folder("user/name")
    assert (path.resolve(), commit) == (tmp_path / "user" / "name", None)


# The untrusted formats


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "C:x", "a\\b", "a\0b"])
def test_only_plain_names_are_read(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder").mkdir()
    with pytest.raises(AdapterFolderError, match="no plain file name"):
        read_file(tmp_path / "folder", name, limit=100)


def test_what_was_hashed_is_what_is_looked_at_whatever_happens_to_the_file(tmp_path):
    honest_folder(tmp_path)
    read, before = read_adapter_folder(tmp_path), load((tmp_path / WEIGHTS).read_bytes())
    with open(tmp_path / WEIGHTS, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\xff" * 100)
    assert read.files == read.claimed_files
    assert all(torch.equal(read.weights[WEIGHTS][key], tensor) for key, tensor in before.items())
    assert read_adapter_folder(tmp_path).files != read.files


def test_a_file_that_shrinks_while_it_is_read_is_refused():
    with pytest.raises(AdapterFolderError, match="changed while it was read"):
        _read_exactly(io.BytesIO(b"abc"), 5, Path("weights"))


def test_a_text_over_the_limit_is_not_parsed():
    with pytest.raises(AdapterFolderError, match="at most"):
        parse_json(" " * (MAX_JSON_BYTES + 1), "x")


@given(
    names=st.lists(st.text("abc._", min_size=1, max_size=5), min_size=1, max_size=4, unique=True),
    shape=st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from(sorted(SAFETENSORS_DTYPES)),
)
def test_the_reader_agrees_with_the_library_on_sound_files(names, shape, dtype):
    tensors = {name: torch.randint(0, 2, shape).to(SAFETENSORS_DTYPES[dtype]) for name in names}
    read = parse_safetensors(FileBytes("x", bytearray(save(tensors, {"format": "pt"}))), "x")
    assert read.metadata == {"format": "pt"}
    assert set(read) == set(names)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        # Not every dtype can be compared.
        assert torch.equal(read[name].to(torch.float64), tensor.to(torch.float64))


def test_data_that_other_writers_left_unaligned_are_read(tmp_path):
    values = torch.tensor([1.0, 2.0])
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    for padding in range(4):
        text = json.dumps(header).encode() + b" " * padding
        data = safetensors_bytes(text, values.numpy().tobytes())
        assert torch.equal(parse_safetensors(FileBytes("x", bytearray(data)), "x")["a"], values)


@given(data=st.binary(max_size=200))
def test_any_bytes_give_tensors_or_our_error(data):
    for candidate in (data, safetensors_bytes(data), safetensors_bytes(b"{" + data + b"}")):
        try:
            read = parse_safetensors(FileBytes("x", bytearray(candidate)), "x")
        except AdapterFolderError:
            continue
        assert all(tensor.numel() > 0 for tensor in read.values())


numbers = st.integers(-(10**60), 10**60) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(value=json_values)
def test_json_of_honest_size_is_read_as_the_library_does(value):
    assert parse_json(json.dumps(value), "x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "x") == value


@given(text=st.text('[]{}"\\:,019-.eE', max_size=60))
def test_any_text_gives_a_value_or_our_error(text):
    try:
        value = parse_json(text, "x")
    except AdapterFolderError:
        return
    assert value == json.loads(text)


@pytest.mark.parametrize("text", ['"' + '\\"' * 10**6 + "\\", "[" + '"\\' * 10**6, '{"a":' * 10**5])
def test_hostile_text_is_refused_in_no_time(text):
    with pytest.raises(AdapterFolderError):
        parse_json(text, "x")


def test_brackets_in_strings_do_not_nest():
    assert parse_json(json.dumps("[" * 1000), "x") == "[" * 1000


@given(text=st.text())
def test_printable_text_has_one_line_and_no_commands(text):
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
