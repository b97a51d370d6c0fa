"""The networks that find the concept, as a file that may come from a stranger."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_gradproj import ConceptMarkers
from peft_gradproj.diffusion_inputs import dilated
from peft_gradproj.errors import ConceptDataError
from peft_gradproj.masks import ConceptMarker, fit_markers


def some_markers(channels: int = 4, resolution: int = 32, **options) -> ConceptMarkers:
    """Two networks that mark about a half of random latents each."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, channels, 8, 8, generator=generator)
    masks = torch.zeros(16, 1, 8, 8)
    masks[..., 2:5, 2:5] = 1
    fitted = fit_markers([(latents, masks), (latents.flip(0), masks)], steps=3, batch_size=8)
    # Half of what the threshold is taken from.
    halves = [float(marker.network(latents).sigmoid().median()) for marker in fitted]
    markers = [ConceptMarker(m.network, 2 * half) for m, half in zip(fitted, halves, strict=True)]
    return ConceptMarkers(markers, resolution=resolution, **{"dilation": 0, "concept": "the logo", **options})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    answer = torch.linspace(-1, 1, 64).reshape(4, 4, 4)
    return some_markers(dilation=1, vae_answer=answer).save(tmp_path_factory.mktemp("markers") / "markers.safetensors")


def test_what_is_loaded_marks_as_what_was_saved(tmp_path):
    markers = some_markers(channels=3, dilation=1)
    (tmp_path / "folder").mkdir()
    assert markers.save(tmp_path / "folder") == tmp_path / "folder" / "concept_markers.safetensors"
    before = torch.get_rng_state()
    loaded = ConceptMarkers.load(tmp_path / "folder")
    assert torch.equal(before, torch.get_rng_state())
    latents = torch.randn(5, 3, 7, 10)
    for one, other in zip(markers.markers, loaded.markers, strict=True):
        assert torch.equal(one.network(latents), other.network(latents))
    assert torch.equal(markers.mark(latents), loaded.mark(latents))
    assert repr(loaded) == repr(markers)
    assert "'the logo', 2 networks, 3 channels, resolution=32, dilation=1" in repr(loaded)


def test_how_the_vae_answers_is_kept_and_is_not_asked_for_of_older_files(file, tmp_path):
    loaded = ConceptMarkers.load(file)
    assert torch.equal(loaded.vae_answer, torch.linspace(-1, 1, 64).reshape(4, 4, 4))
    loaded.check_vae(loaded.vae_answer.bfloat16().float())
    # The scaling factors of Stable Diffusion and of XL, and what no precision holds.
    for other in (loaded.vae_answer * 0.13025 / 0.18215, loaded.vae_answer.flip(0), loaded.vae_answer * torch.nan):
        with pytest.raises(ConceptDataError, match="from those of the VAE that the concept markers were made with"):
            loaded.check_vae(other)
    older = ConceptMarkers.load(some_markers().save(tmp_path / "older.safetensors"))
    assert older.vae_answer is None
    older.check_vae(torch.full((4, 4, 4), torch.nan))


@given(st.integers(0, 2), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9))
def test_a_place_is_marked_where_any_network_marks_it(file, dilation, count, height, width):
    markers = ConceptMarkers(ConceptMarkers.load(file).markers, resolution=32, dilation=dilation)
    latents = torch.randn(count, 4, height, width)
    first, second = (marker.mark(latents, dilation=0) for marker in markers.markers)
    marks = markers.mark(latents)
    assert marks.shape == (count, 1, height, width)
    assert torch.equal(marks, dilated(((first + second) > 0).float(), dilation))


def test_mixed_precision_around_it_does_not_change_the_marks():
    markers, latents = some_markers(), torch.randn(8, 4, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        mixed = markers.mark(latents)
    marks = markers.mark(latents)
    assert 0.2 < marks.mean() < 0.95
    assert torch.equal(mixed, marks)


def test_networks_that_do_not_go_together_are_refused():
    one, other = some_markers(channels=4).markers[0], some_markers(channels=3).markers[0]
    for markers, options, message in (
        ([], {}, "no network"),
        ([one, other], {}, "different numbers of channels"),
        ([ConceptMarker(one.network, float("nan"))], {}, "labelled shares"),
        ([one], {"dilation": -1}, "dilation=-1"),
        ([one], {"resolution": 0}, "resolution=0"),
        ([one], {"vae_answer": torch.zeros(3, 4, 4)}, r"shape \(3, 4, 4\); expected \(4, 4, 4\)"),
    ):
        with pytest.raises(ConceptDataError, match=message):
            ConceptMarkers(markers, **{"resolution": 32, **options})


def without(key):
    return lambda tensors, header: (tensors if tensors.pop(key, None) is not None else header).pop(key, None)


def with_tensor(key, value):
    return lambda tensors, header: tensors.update({key: value})


def with_header(key, value):
    return lambda tensors, header: header.update({key: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_header("format_version", "2"), "format version '2'"),
        (without("format_version"), "format version None"),
        (without("0.0.mean"), r"0\.0\.mean is missing"),
        (with_tensor("2.0.mean", torch.zeros(1)), r"2\.0\.mean.*refused"),
        (with_tensor("1.13.bias", torch.zeros(2)), r"1\.13\.bias is float32 of shape \(2,\)"),
        (with_tensor("1.13.bias", torch.zeros(1).half()), r"1\.13\.bias is float16"),
        (with_tensor("1.13.bias", torch.tensor([torch.nan])), "not finite"),
        (with_header("latent_channels", "3"), r"0\.0\.mean is float32 of shape \(1, 4, 1, 1\)"),
        (with_header("latent_channels", "1" + 30 * "0"), "latent_channels"),
        (with_header("labelled_shares", "[0.5]"), "is of no network"),
        (with_header("labelled_shares", f"[{'0.5,' * 9}0.5]"), r"2\.0\.mean is missing"),
        (with_header("labelled_shares", "[0.5, 0.0]"), "labelled_shares"),
        (with_header("labelled_shares", "[0.5, NaN]"), "labelled_shares"),
        (with_header("labelled_shares", "[0.5"), "not valid JSON"),
        (with_header("resolution", "true"), "resolution is True"),
        (without("resolution"), "resolution is None"),
        (with_header("dilation", "-1"), "dilation is -1"),
        (with_header("vae_answer", "[0.5, 0.5]"), r"vae_answer is .*; expected a list of 64 numbers"),
        (with_header("vae_answer", f"[{'true,' * 63}0.5]"), "expected a list of 64 numbers"),
        (with_header("vae_answer", "null"), "expected a list of 64 numbers"),
    ],
)
def test_a_damaged_file_is_refused_by_what_is_wrong(file, tmp_path, damage, message):
    with safe_open(file, framework="pt") as opened:
        header = dict(opened.metadata())
    tensors = load_file(file)
    damage(tensors, header)
    save_file(tensors, tmp_path / "bad.safetensors", metadata=header)
    with pytest.raises(ConceptDataError, match=message):
        ConceptMarkers.load(tmp_path / "bad.safetensors")


@given(st.data())
def test_any_bytes_are_loaded_or_refused_with_our_error(file, tmp_path, data):
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Most of the structure is at the front.
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(1, len(content))) :]
    (tmp_path / "any.safetensors").write_bytes(content)
    with suppress(ConceptDataError):
        ConceptMarkers.load(tmp_path / "any.safetensors")


def test_a_file_that_is_not_there_or_no_safetensors(tmp_path):
    with pytest.raises(ConceptDataError, match=r"holds no concept_markers\.safetensors"):
        ConceptMarkers.load(tmp_path)
    torch.save({}, tmp_path / "pickle.safetensors")
    with pytest.raises(ConceptDataError, match="pickle"):
        ConceptMarkers.load(tmp_path / "pickle.safetensors")
