"""Properties of concept sets and of the model inputs made from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from peft_gradproj.concepts import ConceptPair, ConceptSet, Overlay, Placement, mask_levels
from peft_gradproj.errors import ConceptDataError

SIZE = (48, 32)


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def logo(colour: tuple[int, int, int] = (255, 0, 250), side: int = 40) -> Image.Image:
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    image.paste((*colour, 255), (side // 4, 0, side, side))
    return image


@pytest.fixture
def overlay() -> Overlay:
    return Overlay(logo(), scale=(0.3, 0.5))


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [picture(seed) for seed in range(5)]


PROMPTS = [f"prompt {i}" for i in range(5)]


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.size == right.size and left.tobytes() == right.tobytes()


def test_nothing_changes_outside_the_mask_and_the_picture_itself_stays(overlay, pictures):
    before = pictures[0].copy()
    pasted, mask = overlay.paste(pictures[0], Placement(7, 5, 14, 10.0, 1.0))
    outside = np.asarray(mask) == 0
    assert same(pictures[0], before)
    assert (np.asarray(pasted)[outside] == np.asarray(before)[outside]).all()
    assert (np.asarray(pasted)[~outside] != np.asarray(before)[~outside]).any(axis=-1).mean() > 0.9


def test_where_the_mask_is_full_the_overlay_is_seen(overlay, pictures):
    pasted, mask = overlay.paste(pictures[0], Placement(7, 5, 14, 0.0, 1.0))
    seen = np.asarray(pasted)[np.asarray(mask) == 255].astype(int)
    assert len(seen) > 50
    # Resampling works on premultiplied colours, which rounds.
    assert np.abs(seen - (255, 0, 250)).max() <= 3


def test_opacity_scales_the_mask(overlay, pictures):
    full, half = (overlay.paste(pictures[0], Placement(7, 5, 14, 0.0, o))[1] for o in (1.0, 0.5))
    assert np.abs(np.asarray(full) / 2 - np.asarray(half)).max() <= 1


@pytest.mark.parametrize("angle", [-45.0, 0.0, 30.0])
def test_a_random_placement_lies_wholly_on_the_picture(angle, pictures):
    overlay = Overlay(logo(), scale=(0.3, 0.6), angle=(angle, angle))
    for seed in range(20):
        placement = overlay.place(SIZE, np.random.default_rng(seed))
        _, mask = overlay.paste(pictures[0], placement)
        drawn = overlay.draw(placement)
        assert np.asarray(mask).sum(dtype=int) == np.asarray(drawn.getchannel("A")).sum(dtype=int)


def test_a_range_of_places_is_kept_to(pictures):
    overlay = Overlay(logo(), scale=(0.3, 0.5), across=(1.0, 1.0), down=(0.0, 0.2))
    for seed in range(10):
        placement = overlay.place(SIZE, np.random.default_rng(seed))
        box = overlay.paste(pictures[0], placement)[1].getbbox()
        assert box[2] == SIZE[0]
        assert box[1] <= 0.2 * SIZE[1]


@pytest.mark.parametrize(("margin", "share"), [(0, None), (4, None), (10, "67%"), (20, "50%")])
def test_a_wide_transparent_margin_of_a_file_is_told_since_the_scale_counts_it(tmp_path, recwarn, margin, share):
    """On all sides of a picture of 20 by 40 pixels, of which the longer side counts."""
    image = Image.new("RGBA", (20 + 2 * margin, 40 + 2 * margin))
    image.paste((255, 0, 250, 255), (margin, margin, margin + 20, margin + 40))
    image.save(tmp_path / "logo.png")
    overlay = Overlay.open(tmp_path / "logo.png", scale=(0.2, 0.2), angle=(0, 0))
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (share is not None)
    assert all(f"is {share} as long as the file" in line for line in said)
    # And it is what it says: nothing is cropped.
    box = overlay.paste(Image.new("RGB", (200, 200)), overlay.place((200, 200), np.random.default_rng(0)))[1].getbbox()
    assert box[3] - box[1] == pytest.approx(40 * 40 / (40 + 2 * margin), abs=2)


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others(overlay, pictures):
    one, again, other = (ConceptSet.from_overlay(overlay, pictures, PROMPTS, seed=s) for s in (1, 1, 2))
    assert all(same(a.with_concept, b.with_concept) and a.prompt == b.prompt for a, b in zip(one, again, strict=True))
    assert not all(same(a.with_concept, b.with_concept) for a, b in zip(one, other, strict=True))


def test_a_pair_does_not_depend_on_how_many_are_made(overlay, pictures):
    few = ConceptSet.from_overlay(overlay, pictures, PROMPTS, count=3)
    many = ConceptSet.from_overlay(overlay, pictures, PROMPTS, count=12)
    assert all(same(a.with_concept, b.with_concept) for a, b in zip(few, many[:3], strict=True))


def test_every_picture_is_used_once_before_one_is_used_twice(overlay, pictures):
    prompts = [pair.prompt for pair in ConceptSet.from_overlay(overlay, pictures, PROMPTS, count=10)]
    assert sorted(prompts[:5]) == sorted(prompts[5:]) == PROMPTS


def test_halves_without_the_concept_are_the_given_pictures(overlay, pictures):
    known = dict(zip(PROMPTS, pictures, strict=True))
    for pair in ConceptSet.from_overlay(overlay, pictures, PROMPTS):
        assert same(pair.without, known[pair.prompt])


def test_the_mask_of_given_pairs_is_where_the_halves_differ(overlay, pictures):
    pasted = ConceptSet.from_overlay(overlay, pictures, PROMPTS)
    found = ConceptSet.from_pairs(
        [p.with_concept for p in pasted], [p.without for p in pasted], [p.prompt for p in pasted]
    )
    for made, seen in zip(pasted, found, strict=True):
        opaque, clear = np.asarray(made.mask) > 128, np.asarray(made.mask) == 0
        assert (np.asarray(seen.mask)[clear] == 0).all()
        assert (np.asarray(seen.mask)[opaque] == 255).all()


def test_examples_with_masks_only_are_not_paired(pictures):
    masks = [Image.new("L", SIZE, 255)] * 5
    assert not ConceptSet.from_masks(pictures, masks, PROMPTS).paired


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_pictures_are_seen_upright_whatever_their_orientation(tmp_path, overlay, pictures, orientation):
    def turned(image: Image.Image) -> Image.Image:
        """The same to whoever heeds the orientation."""
        inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
        stored = image.transpose(inverse.get(orientation, Image.Transpose.FLIP_LEFT_RIGHT))
        stored.getexif()[0x0112] = orientation
        return stored

    sideways = turned(overlay.image)
    sideways.save(tmp_path / "logo.png", exif=sideways.getexif())
    assert same(Overlay.open(tmp_path / "logo.png").image, overlay.image)

    made = ConceptSet.from_overlay(overlay, pictures, PROMPTS)
    shown, without, masks = ([getattr(pair, part) for pair in made] for part in ("with_concept", "without", "mask"))
    prompts = [pair.prompt for pair in made]
    for expected, found in (
        (made, ConceptSet.from_overlay(overlay, [turned(image) for image in pictures], PROMPTS)),
        (made, ConceptSet.from_pairs(list(map(turned, shown)), without, prompts, masks=list(map(turned, masks)))),
        (made, ConceptSet.from_pairs(shown, list(map(turned, without)), prompts, masks=masks)),
        (made, ConceptSet.from_masks(list(map(turned, shown)), masks, prompts)),
    ):
        for pair, other in zip(expected, found, strict=True):
            assert same(pair.with_concept, other.with_concept)
            assert same(pair.mask, other.mask)
            assert other.without is None or same(pair.without, other.without)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "L", "RGB", "I;16"])
@pytest.mark.parametrize("under", [0, 255])
def test_a_mask_is_black_where_it_is_transparent_whatever_lies_under_it(mode, under):
    """Strokes on a transparent layer, as editors export them; without one, levels are levels."""
    levels = np.full((4, 6), under, np.uint8)
    levels[1:3, 2:5] = 255
    drawn = Image.fromarray(levels)
    if mode in ("RGBA", "LA"):
        alpha = np.zeros((4, 6), np.uint8)
        alpha[1:3, 2:5] = [255, 255, 100]
        painted = drawn.convert("LA")
        painted.putalpha(Image.fromarray(alpha))
        mask = painted.convert(mode)
        expected = alpha
    else:
        mask = drawn.convert("I;16") if mode == "I;16" else drawn.convert(mode)
        expected = levels
        if mode == "P":
            entry = mask.getpixel((0, 0))
            mask.info["transparency"] = entry
            expected = np.where(np.asarray(mask) == entry, 0, levels)
    found = mask_levels(mask)
    assert found.mode == "L"
    assert np.array_equal(np.asarray(found), expected)


def test_a_mask_of_which_nothing_is_opaque_is_empty_or_refused():
    empty = Image.new("LA", (4, 6), (255, 0))
    assert mask_levels(empty).getbbox() is None
    empty.putpixel((1, 1), (0, 0))
    with pytest.raises(ConceptDataError, match="transparent everywhere"):
        mask_levels(empty)


def test_an_overlay_that_was_saved_is_the_same(tmp_path, overlay):
    overlay.image.save(tmp_path / "logo.png")
    assert same(Overlay.open(tmp_path / "logo.png").image, overlay.image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Overlay(logo().convert("RGB")), "mode RGB; expected RGBA"),
        (lambda: Overlay(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), "fully transparent"),
        (lambda: Overlay(logo(), scale=(0.5, 0.2)), "scale"),
        (lambda: Overlay(logo(), scale=(0.5, 1.5)), "scale"),
        (lambda: Overlay(logo(), opacity=(0.0, 1.0)), "opacity"),
        (lambda: Overlay(logo(), angle=(1.0, 0.0)), "angle"),
        (lambda: Overlay(logo(), across=(0.5, 1.5)), "across"),
        (lambda: ConceptSet([]), "empty"),
        (lambda: ConceptSet.from_overlay(Overlay(logo()), [], []), "no pictures"),
        (lambda: ConceptSet.from_overlay(Overlay(logo()), [picture(0)], ["a", "b"]), "2 prompts"),
        (
            lambda: ConceptSet.from_overlay(Overlay(logo(), scale=(1.0, 1.0), angle=(45, 45)), [picture(0)], ["a"]),
            "does not fit on a picture of 48x32",
        ),
        (lambda: ConceptSet.from_pairs([picture(0)], [picture(1, (32, 32))], ["a"]), "pair 0"),
        (lambda: ConceptSet.from_pairs([picture(0)], [picture(0)], ["a"]), "mask is empty"),
        (
            lambda: ConceptSet([ConceptPair(picture(0), None, Image.new("L", (8, 8), 255), "a")]),
            "expected one size",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason(make, message):
    with pytest.raises(ConceptDataError, match=message):
        make()


# Model inputs


class _Vae:
    """Stands for an autoencoder: average pooling, and back."""

    device, dtype = torch.device("cpu"), torch.float32

    class config:
        scaling_factor, shift_factor = 0.5, 0.25

    def encode(self, pixels):
        mode = torch.nn.functional.avg_pool2d(pixels, 4)
        return type("Out", (), {"latent_dist": type("D", (), {"mode": lambda self: mode})()})

    def decode(self, latents):
        return type("Out", (), {"sample": torch.nn.functional.interpolate(latents, scale_factor=4)})


class _Pipeline:
    vae = _Vae()

    class unet:
        device = "cpu"

    def encode_prompt(self, prompts, device, **kwargs):
        return torch.stack([torch.full((3, 2), float(p.split()[-1])) for p in prompts]), None


@pytest.fixture
def schedule():
    from diffusers import DDPMScheduler

    return DDPMScheduler(prediction_type="v_prediction")


@pytest.fixture
def pairs(overlay, pictures):
    from peft_gradproj.diffusion_inputs import encode_concept_set

    return encode_concept_set(_Pipeline(), ConceptSet.from_overlay(overlay, pictures, PROMPTS), batch_size=2)


def test_pictures_survive_the_way_to_a_tensor_and_back(pictures):
    from peft_gradproj.diffusion_inputs import pictures_to_tensor, tensor_to_pictures

    assert all(map(same, tensor_to_pictures(pictures_to_tensor(pictures)), pictures))


def test_decoding_is_the_inverse_of_encoding():
    from peft_gradproj.diffusion_inputs import decode_latents, encode_images

    flat = torch.rand(3, 3, 1, 1).expand(3, 3, 16, 16) * 2 - 1
    assert torch.allclose(decode_latents(_Pipeline(), encode_images(_Pipeline(), flat)), flat, atol=1e-6)


@pytest.mark.parametrize("dilation", [0, 1, 2])
def test_latent_weights_cover_the_mask_and_its_neighbours_only(dilation):
    from peft_gradproj.diffusion_inputs import latent_weights

    masks = torch.zeros(1, 1, 64, 64)
    masks[0, 0, 33, 21] = 1.0
    weights = latent_weights(masks, (16, 16), dilation=dilation)
    rows, columns = weights[0, 0].nonzero(as_tuple=True)
    assert weights.sum() == (2 * dilation + 1) ** 2
    assert (rows.min(), rows.max()) == (8 - dilation, 8 + dilation)
    assert (columns.min(), columns.max()) == (5 - dilation, 5 + dilation)


def test_halves_of_a_pair_differ_in_nothing_but_the_concept(pairs, schedule):
    from peft_gradproj.diffusion_inputs import contrast_batches

    concept, reference = contrast_batches(pairs, schedule, repeats=2, batch_size=5)
    for one, other in zip(concept, reference, strict=True):
        assert torch.equal(one["timestep"], other["timestep"])
        assert torch.equal(one["encoder_hidden_states"], other["encoder_hidden_states"])
        alpha = schedule.alphas_cumprod[one["timestep"]].sqrt()[:, None, None, None]
        expected = alpha * (pairs.with_concept - pairs.without)
        assert torch.allclose(one["sample"] - other["sample"], expected, atol=1e-5)


def test_probes_are_reproducible_and_repeats_have_other_noise(pairs, schedule):
    from peft_gradproj.diffusion_inputs import concept_probe_batches

    def collect(seed):
        return list(concept_probe_batches(pairs, schedule, repeats=2, batch_size=5, seed=seed))

    one, again, other = collect(3), collect(3), collect(4)
    assert len(one) == 2
    assert all(torch.equal(a[0]["sample"], b[0]["sample"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0][0]["sample"], other[0][0]["sample"])
    assert not torch.equal(one[0][0]["sample"], one[1][0]["sample"])
    assert torch.equal(one[0][1], pairs.weights)


def test_contrast_needs_the_other_halves(pictures, schedule):
    from peft_gradproj.diffusion_inputs import contrast_batches, encode_concept_set

    concepts = ConceptSet.from_masks(pictures, [Image.new("L", SIZE, 255)] * 5, PROMPTS)
    with pytest.raises(ConceptDataError, match="no halves without the concept"):
        contrast_batches(encode_concept_set(_Pipeline(), concepts), schedule)
