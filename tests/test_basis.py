"""A concept basis is orthonormal, immutable, equal by content, and says what is wrong with what is not one."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_gradproj.basis import BASIS_FILE_NAME, SPACES, ConceptBasis, LayerBasis
from peft_gradproj.errors import ConceptBasisError, GradProjError
from peft_gradproj.projection import orthonormal_basis, orthonormality_error

few = settings(deadline=None, max_examples=20)


def orthonormal(d: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthonormal_basis(torch.randn(d, k, generator=generator, dtype=torch.float64)).to(dtype)


def two_layers(seed: int = 0, **kwargs) -> ConceptBasis:
    layers = {
        "block.0.to_q": LayerBasis(input=orthonormal(12, 3, seed), output=orthonormal(8, 2, seed + 1)),
        "block.1.conv": LayerBasis(input=orthonormal(20, 4, seed + 2), rank=orthonormal(4, 1, seed + 3)),
    }
    return ConceptBasis(layers, **{"concept": "acme logo", **kwargs})


# LayerBasis


@few
@given(
    d=st.integers(1, 40),
    share=st.floats(0.01, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_every_float_dtype_becomes_orthonormal_float32_with_the_span_kept(d, share, dtype, seed):
    given_basis = orthonormal(d, max(1, int(share * d)), seed, dtype)
    kept = LayerBasis(output=given_basis).output
    assert kept.dtype == torch.float32
    assert orthonormality_error(kept.double()) < 1e-6
    assert torch.allclose(kept, given_basis.float(), atol=3e-2 if dtype.itemsize == 2 else 1e-6)


def test_columns_that_are_nearly_orthonormal_are_made_exactly_so():
    nearly = orthonormal(30, 5) + 1e-5 * torch.randn(30, 5)
    assert orthonormality_error(nearly.double()) > 1e-6
    assert orthonormality_error(LayerBasis(input=nearly).input.double()) < 1e-6


def test_a_layer_basis_owns_its_tensors():
    mine = orthonormal(6, 2)
    layer = LayerBasis(input=mine)
    mine.zero_()
    assert layer.input.norm() > 1
    with pytest.raises(AttributeError):
        layer.input = mine


def test_spaces_counts_and_items():
    layer = LayerBasis(output=orthonormal(8, 3), input=orthonormal(6, 2))
    assert layer.spaces() == ("input", "output")
    assert (layer.k("input"), layer.k("output"), layer.k("rank")) == (2, 3, 0)
    assert [(space, tuple(b.shape)) for space, b in layer.items()] == [("input", (6, 2)), ("output", (8, 3))]
    assert layer == copy.deepcopy(layer)
    assert layer != LayerBasis(input=layer.input)
    assert layer != LayerBasis(input=-layer.input, output=layer.output)
    with pytest.raises(ConceptBasisError, match="'inputs' is no space"):
        layer.k("inputs")


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4), "two dimensions"),
        (torch.zeros(4, 0), "0 directions of width 4"),
        (torch.eye(4)[:3], "4 directions of width 3"),
        (torch.full((4, 2), float("nan")), "not finite"),
        (2 * torch.eye(4)[:, :2], "not orthonormal"),
        (torch.eye(4)[:, [0, 0]], "not orthonormal"),
        (torch.eye(4, dtype=torch.int64), "dtype torch.int64"),
        ([[1.0]], "is a list"),
    ],
)
def test_a_malformed_layer_basis_is_refused_by_name(space, bad, message):
    with pytest.raises(ConceptBasisError, match=f"{space} basis.*{message}"):
        LayerBasis(**{space: bad})


def test_a_layer_basis_without_a_space_is_refused():
    with pytest.raises(ConceptBasisError, match="empty"):
        LayerBasis()


# ConceptBasis


def test_it_is_a_mapping_from_modules_to_layers():
    basis = two_layers(base_model="base", revision="main", fit={"rank": 3})
    assert list(basis) == ["block.0.to_q", "block.1.conv"]
    assert len(basis) == 2
    assert "block.0.to_q" in basis
    assert "other" not in basis
    assert basis.get("other") is None
    assert basis["block.1.conv"].spaces() == ("input", "rank")
    assert (basis.concept, basis.base_model, basis.revision, basis.fit) == ("acme logo", "base", "main", {"rank": 3})
    assert "acme logo" in repr(basis)
    assert "2 layers" in repr(basis)
    assert len(repr(basis)) < 120


def test_it_does_not_change():
    basis = two_layers(fit={"layers": {}})
    for name in ("concept", "base_model", "revision", "fit"):
        with pytest.raises(AttributeError):
            setattr(basis, name, None)
    with pytest.raises(TypeError):
        basis["block.0.to_q"] = basis["block.1.conv"]
    basis.fit["layers"]["injected"] = 1
    assert basis.fit == {"layers": {}}


def test_it_is_equal_by_content():
    assert two_layers() == two_layers()
    assert hash(two_layers()) == hash(two_layers())
    assert two_layers() != two_layers(seed=1)
    assert two_layers() != two_layers(concept="other")
    assert two_layers() != two_layers(base_model="base")
    assert two_layers() == copy.deepcopy(two_layers()) == pickle.loads(pickle.dumps(two_layers()))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "no layers"),
        ({"": LayerBasis(input=torch.eye(2))}, "no name of a layer"),
        ({"block": torch.eye(2)}, "layer block is a Tensor"),
    ],
)
def test_malformed_layers_are_refused(layers, message):
    with pytest.raises(ConceptBasisError, match=message):
        ConceptBasis(layers)


@pytest.mark.parametrize("fit", [{"loss": object()}, {"loss": float("nan")}])
def test_notes_that_are_not_json_are_refused(fit):
    with pytest.raises(ConceptBasisError, match="JSON"):
        two_layers(fit=fit)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"rank": 1e999}', '{"a": 1, "a": 2}', "[]", "\x00"])
def test_notes_of_strangers_that_are_none_are_refused(tmp_path, text):
    path = two_layers().save(tmp_path / "basis.safetensors")
    save_file(load_file(path), path, {"format_version": "1", "fit": text})
    with pytest.raises(ConceptBasisError, match="note on the fit"):
        ConceptBasis.load(path)


@pytest.mark.parametrize(
    "layers", [[], {"block.0.to_q": []}, {"block.0.to_q": {"input": "x"}}, {"block.0.to_q": {"input": {"energy": []}}}]
)
def test_notes_of_strangers_are_not_believed_to_be_a_fits(layers):
    assert "block.0.to_q" in two_layers(fit={"layers": layers}).summary()


def test_digest_depends_on_names_shapes_and_values_alone():
    basis = two_layers()
    reordered = ConceptBasis(dict(reversed(list(basis.items()))), concept="another name")
    assert basis.digest() == reordered.digest()
    assert len(basis.digest()) == 64
    renamed = ConceptBasis({name + "x": layer for name, layer in basis.items()})
    assert len({basis.digest(), two_layers(seed=5).digest(), renamed.digest()}) == 3


def test_restrict_keeps_the_named_layers_and_their_report():
    basis = two_layers(fit={"rank": 3, "layers": {"block.0.to_q": {}, "block.1.conv": {}}})
    part = basis.restrict(["block.1.conv"])
    assert dict(part) == {"block.1.conv": basis["block.1.conv"]}
    assert part.fit == {"rank": 3, "layers": {"block.1.conv": {}}}
    assert part.concept == basis.concept
    with pytest.raises(ConceptBasisError, match=r"no layers block\.2\.conv"):
        basis.restrict(["block.2.conv"])
    with pytest.raises(ConceptBasisError, match="no layers"):
        basis.restrict([])


# Union and overlap


@few
@given(
    d=st.integers(2, 24), k=st.integers(1, 8), m=st.integers(1, 8), shared=st.integers(0, 4), seed=st.integers(0, 99)
)
def test_a_union_is_orthonormal_and_spans_exactly_both(d, k, m, shared, seed):
    k, m = min(k, d), min(m, d)
    u, other = orthonormal(d, k, seed), orthonormal(d, m, seed + 1000)
    # The shared directions are rotated, so that they are equal but for rounding.
    v = orthonormal_basis(torch.cat([u[:, :shared], other], dim=1).double()).float()
    joined = ConceptBasis({"a": LayerBasis(input=u)}).union(ConceptBasis({"a": LayerBasis(input=v)}))["a"].input
    both = torch.cat([u.double(), v.double()], dim=1)
    assert orthonormality_error(joined.double()) < 1e-6
    assert joined.shape[1] == torch.linalg.matrix_rank(both, rtol=1e-5)
    assert torch.allclose(joined.double() @ (joined.double().mT @ both), both, atol=1e-5)


def test_a_union_with_itself_is_no_larger_and_joins_names():
    basis, other = two_layers(base_model="base"), ConceptBasis({"new": LayerBasis(input=torch.eye(3))}, concept="name")
    twice = basis.union(basis)
    assert twice.concept == "acme logo"
    assert {name: layer.k("input") for name, layer in twice.items()} == {"block.0.to_q": 3, "block.1.conv": 4}
    joined = basis.union(other)
    assert joined.concept == "acme logo + name"
    assert joined.base_model == "base"
    assert set(joined) == {*basis, "new"}
    assert joined["new"] == other["new"]
    assert joined.fit["method"] == "union"


def test_a_union_across_base_models_or_widths_is_refused():
    with pytest.raises(ConceptBasisError, match="different base models"):
        two_layers(base_model="a").union(two_layers(base_model="b"))
    wider = ConceptBasis({"block.0.to_q": LayerBasis(input=torch.eye(13))})
    with pytest.raises(ConceptBasisError, match=r"block\.0\.to_q has input bases of widths \[12, 13\]"):
        two_layers().union(wider)
    with pytest.raises(ConceptBasisError, match="widths"):
        two_layers().overlap(wider)


def test_overlap_is_that_of_the_principal_angles():
    angle = 0.3
    u = torch.eye(4)[:, :2]
    v = torch.eye(4)[:, [0, 1]].clone()
    v[:, 1] = torch.tensor([0, torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle)), 0])
    one = ConceptBasis({"a": LayerBasis(input=u, output=u), "b": LayerBasis(input=u)})
    two = ConceptBasis({"a": LayerBasis(input=v, rank=u)})
    overlap = one.overlap(two)
    assert set(overlap) == {"a"}
    assert set(overlap["a"]) == {"input"}
    expected = torch.tensor([1.0, torch.cos(torch.tensor(angle))])
    assert torch.allclose(overlap["a"]["input"].cosines, expected, atol=1e-6)
    assert overlap["a"]["input"].mean_square == pytest.approx(float(expected.square().mean()), abs=1e-6)
    assert two_layers().overlap(two_layers())["block.1.conv"]["input"].mean_square == pytest.approx(1, abs=1e-5)


def test_summary_has_a_line_for_each_space_with_what_the_fit_reported():
    report = {"block.0.to_q": {"input": {"energy": 0.9312, "reference_overlap": 0.0204}, "output": {"energy": None}}}
    lines = two_layers(fit={"layers": report}, base_model="base").summary().splitlines()
    assert "acme logo" in lines[0]
    assert "base" in lines[0]
    assert len(lines) == 2 + 4
    assert lines[2].split() == ["block.0.to_q", "input", "12", "3", "0.931", "0.020"]
    assert lines[3].split() == ["block.0.to_q", "output", "8", "2", "-", "-"]


# Files


@few
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    space=st.sampled_from(SPACES),
    concept=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    seed=st.integers(0, 99),
)
def test_saved_and_loaded_it_is_bit_identical(tmp_path_factory, shapes, space, concept, seed):
    layers = {f"l.{i}": LayerBasis(**{space: orthonormal(d, min(k, d), seed)}) for i, (d, k) in enumerate(shapes)}
    basis = ConceptBasis(layers, concept, base_model="base", revision="r1", fit={"layers": {}, "rank": 3})
    path = basis.save(tmp_path_factory.mktemp("basis") / "logo.safetensors")
    loaded = ConceptBasis.load(path)
    assert loaded == basis
    assert loaded.digest() == basis.digest()
    assert loaded.fit == basis.fit
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_layers_that_share_a_basis_are_saved_as_if_each_had_its_own(tmp_path):
    shared = LayerBasis(input=orthonormal(6, 2))
    basis = ConceptBasis({"query": shared, "key": shared})
    assert ConceptBasis.load(basis.save(tmp_path / "basis.safetensors")) == basis


def test_the_file_has_the_documented_keys_and_header(tmp_path):
    with safe_open(two_layers(base_model="base").save(tmp_path / "b.safetensors"), "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert set(tensors) == {"block.0.to_q.input", "block.0.to_q.output", "block.1.conv.input", "block.1.conv.rank"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert metadata == {"format_version": "1", "concept": "acme logo", "base_model": "base"}


def test_a_folder_is_written_to_and_read_from(tmp_path):
    basis = two_layers()
    assert basis.save(tmp_path) == tmp_path / BASIS_FILE_NAME
    assert ConceptBasis.load(tmp_path) == ConceptBasis.load(str(tmp_path)) == basis


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = two_layers().save(tmp_path / "b.safetensors")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        two_layers(seed=1).save(path)
    assert ConceptBasis.load(path) == two_layers()
    assert list(tmp_path.iterdir()) == [path]


def test_a_hub_id_is_downloaded_at_its_revision(tmp_path, monkeypatch):
    import huggingface_hub

    path = two_layers().save(tmp_path)
    asked = []

    def download(repo_id, filename, *, revision=None):
        asked.append((repo_id, filename, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert ConceptBasis.load("user/adapter", revision="v1") == two_layers()
    assert asked == [("user/adapter", BASIS_FILE_NAME, "v1")]


def test_a_hub_repository_without_a_basis_is_named(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def download(*args, **kwargs):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConceptBasisError, match="user/adapter is neither"):
        ConceptBasis.load("user/adapter")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ConceptBasisError, match="holds no concept_basis"):
        ConceptBasis.load(tmp_path)
    with pytest.raises(ConceptBasisError, match="does not exist"):
        ConceptBasis.load(tmp_path / "missing.safetensors")


U = torch.eye(4)[:, :2].contiguous()
HEADER = {"format_version": "1", "concept": "logo"}


def raw(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def entry(**changes) -> bytes:
    fields = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4], **changes}
    return json.dumps({"a.input": fields, "__metadata__": HEADER}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x80\x02]q", "a pickle"),
        (b"\xff" * 64, "no safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "cut short"),
        (raw(b"{not json"), "JSON"),
        (raw(b"\xff\xfe"), "no safetensors file"),
        (raw(b"[" * 100_000), "no safetensors file"),
        (raw(b"[1]"), "no safetensors file"),
        (raw(b'{"a.input": 3}'), "malformed"),
        (raw(b'{"__metadata__": {"concept": 3}}'), "metadata .*are not strings"),
        (raw(b'{"__metadata__": []}'), "metadata .*are not strings"),
        (raw(entry(dtype="I64", data_offsets=[0, 8]), b"\0" * 8), r"torch\.int64"),
        (raw(entry(shape=[1]), b"\0" * 4), r"shape \(1,\)"),
        (raw(entry(), b""), "cut short"),
        (raw(entry(shape=[1, 2]), b"\0" * 4), "4 bytes to shape"),
    ],
)
def test_a_file_that_is_no_safetensors_file_of_matrices_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConceptBasisError, match=message):
        ConceptBasis.load(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a.input": U}, {}, "format version None"),
        ({"a.input": U}, None, "format version None"),
        ({"a.input": U}, {**HEADER, "format_version": "2"}, "Update peft-gradproj"),
        ({"a.input": U}, {**HEADER, "fit": "{"}, "not valid JSON"),
        ({"a.input": U}, {**HEADER, "fit": "[]"}, "not an object"),
        ({"a.weight": U}, HEADER, "a.weight is no key"),
        ({"input": U}, HEADER, "input is no key"),
        ({}, HEADER, "no layers"),
        ({"a.input": 2 * U}, HEADER, "layer a: .*not orthonormal"),
        ({"a.input": torch.full((4, 2), float("inf"))}, HEADER, "layer a: .*not finite"),
        ({"a.input": torch.zeros(4, 0)}, HEADER, "without values"),
    ],
)
def test_a_safetensors_file_that_is_no_basis_is_refused(tmp_path, tensors, metadata, message):
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ConceptBasisError, match=message) as caught:
        ConceptBasis.load(path)
    assert isinstance(caught.value, GradProjError)


@settings(deadline=None, max_examples=60)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_loads_or_is_refused_but_never_crashes(tmp_path_factory, position, value, cut):
    path: Path = two_layers().save(tmp_path_factory.mktemp("fuzz") / "b.safetensors")
    data = bytearray(path.read_bytes())
    position %= len(data)
    data[position] = value
    path.write_bytes(data[:position] if cut else data)
    with contextlib.suppress(ConceptBasisError):
        ConceptBasis.load(path)
