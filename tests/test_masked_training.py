"""A mask goes where its picture goes, and the loss does not count there."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_training_scripts import logged, run, script_module
from tiny_pipelines import SIDE, image_folder, sd, tokenizer

from peft_gradproj.diffusion_training import MaskedShare, square_crop, squared_error
from peft_gradproj.errors import ConceptDataError
from peft_gradproj.masked_data import write_masked
from peft_gradproj.training_data import load_table


def flags(**options) -> argparse.Namespace:
    usual = {"resolution": 24, "center_crop": False, "random_flip": True, "image_interpolation_mode": "bilinear"}
    return argparse.Namespace(**{**usual, **options})


@given(st.integers(8, 90), st.integers(8, 90), st.integers(0, 1000), st.booleans(), st.sampled_from([0, 3, 6]))
def test_a_mask_follows_scale_crop_flip_and_turn(width, height, seed, center, orientation):
    """A mask that is a channel of its picture still is, after both were cropped."""
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8) * 255
    image = Image.fromarray(np.stack([255 - mask, mask, np.full_like(mask, 9)], -1))
    shown = Image.fromarray(mask)
    if orientation:
        # The picture as a camera stores it; masks are of it as it is looked at.
        turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}
        shown = shown.transpose(turns[orientation])
        image.getexif()[0x0112] = orientation
    square, cropped = square_crop(image, flags(center_crop=center), random.Random(seed), shown)
    assert cropped.size == square.size == (24, 24)
    assert (square.mode, cropped.mode) == ("RGB", "L")
    assert square.getchannel("G").tobytes() == cropped.tobytes()


def test_a_picture_is_cropped_alike_with_a_mask_and_without_which_counts_everywhere():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8))
    with_mask, _ = square_crop(image, flags(), random.Random(3), Image.new("L", image.size, 255))
    without, mask = square_crop(image, flags(), random.Random(3))
    assert with_mask.tobytes() == without.tobytes()
    assert mask.getextrema() == (0, 0)
    with pytest.raises(ValueError, match="expected the same size"):
        square_crop(image, flags(), random.Random(0), Image.new("L", (40, 70)))


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(np.eye(40, 70, dtype=np.uint8)),
        Image.fromarray(np.eye(40, 70, dtype=np.uint16)),
        Image.fromarray(np.eye(40, 70, dtype=np.float32) * 0.9),
    ],
    ids=lambda mask: mask.mode,
)
def test_masks_of_0_and_1_are_refused_instead_of_masking_nothing(mask):
    with pytest.raises(ConceptDataError, match="expected levels from 0 to 255"):
        square_crop(Image.new("RGB", mask.size), flags(), random.Random(0), mask)


def test_masks_of_two_colours_are_white_where_they_are_set():
    mask = Image.new("1", (40, 40))
    mask.paste(1, (0, 0, 40, 40))
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    for white in (mask, palette):
        _, cropped = square_crop(Image.new("RGB", (40, 40)), flags(), random.Random(0), white)
        assert cropped.getextrema() == (255, 255)


def test_the_mean_masked_share_is_said_once(caplog):
    caplog.set_level("INFO")
    share, masks = MaskedShare(), torch.zeros(2, 1, 4, 4)
    share.log()
    assert share.counted(None) is None
    assert share.counted(masks) is masks
    share.log()
    masks[0] = 1
    share.counted(masks)
    share.log()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "masks applied in 1 batches; mean masked share 0.0%: all were black. Is it the right column?"),
        ("INFO", "masks applied in 2 batches; mean masked share 25.0%"),
    ]


@pytest.mark.parametrize("name", ["train_text_to_image_lora_gradproj", "train_dreambooth_lora_gradproj"])
def test_a_column_of_the_names_of_masks_is_refused_by_what_to_call_it(base, tmp_path, monkeypatch, name):
    folder = image_folder(tmp_path / "pictures", ["ab", "cd"])
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(line | {"mask": f"masks/{line['file_name']}"}) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    script, arguments = script_module(name), [*training_flags(base, tmp_path)]
    arguments += ["--train_data_dir", folder] if "text" in name else ["--instance_data_dir", folder]
    arguments += [] if "text" in name else ["--instance_prompt", "xa"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    load = script.load_pictures if "text" in name else lambda args, tokens: script.SubjectPictures(tokens, args)
    with pytest.raises(ConceptDataError, match=r"column 'mask' holds .*string.*; expected pictures.*'mask_file_name'"):
        load(script.parse_args(), tokenizer())


def test_the_error_does_not_count_in_any_latent_that_the_mask_touches():
    prediction, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, 3:5, 0] = 1  # touches the latents of rows 1 and 2
    weights = torch.ones(2, 1, 8, 8)
    weights[0, :, 1:3, 0] = 0
    expected = weights * (prediction - target) ** 2
    torch.testing.assert_close(squared_error(prediction, target, masks), expected)
    torch.testing.assert_close(squared_error(prediction, target).mean(), F.mse_loss(prediction, target))


@pytest.mark.parametrize("shape", [(4, 16, 16), (1, 1, 16, 16), (4, 4, 16, 16)], ids=str)
def test_masks_that_would_be_taken_for_those_of_other_pictures_or_channels_are_refused(shape):
    prediction, target = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    with pytest.raises(ConceptDataError, match=r"expected \(4, 1, H, W\)"):
        squared_error(prediction, target, torch.ones(shape))


def test_losses_of_the_scripts_weigh_what_is_left_as_before():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    error, schedule, timesteps = torch.rand(4, 3, 2, 2), DDPMScheduler(), torch.tensor([10, 300, 600, 900])
    error[0] = 0
    loss = script_module("train_text_to_image_lora_gradproj").denoising_loss
    snr = compute_snr(schedule, timesteps)
    expected = (snr.clamp_max(5) / snr * error.mean((1, 2, 3))).mean()
    torch.testing.assert_close(loss(error, timesteps, schedule, 5.0), expected)
    torch.testing.assert_close(loss(error, timesteps, schedule, None), error.mean())
    loss = script_module("train_dreambooth_lora_gradproj").dreambooth_loss
    torch.testing.assert_close(loss(error, 0.5), error[:2].mean() + 0.5 * error[2:].mean())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    sd().save_pretrained(folder)
    return folder


def masked_folder(folder: Path, level: int) -> Path:
    """Pictures with masks of one level."""
    captions = ["ab", "cd", "ef", "gh"]
    table = load_table(image_folder(folder / "plain", captions), ["image"], cache_dir=str(folder / "cache"))
    write_masked(table, [Image.new("L", row["image"].size, level) for row in table], folder / "masked")
    return folder / "masked"


def training_flags(base: Path, tmp_path: Path) -> list[object]:
    return [
        *("--pretrained_model_name_or_path", base, "--uncovered", "ignore", "--mask_column", "mask"),
        *("--resolution", SIDE, "--train_batch_size", 2, "--max_train_steps", 2, "--learning_rate", 1e-2),
        *(
            "--random_flip",
            "--adam_weight_decay",
            0,
            "--output_dir",
            tmp_path / "out",
            "--cache_dir",
            tmp_path / "cache",
        ),
    ]


def effects(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "out" / "pytorch_lora_weights.safetensors")
    return torch.stack([value.abs().max() for name, value in weights.items() if "lora.up" in name or "lora_B" in name])


@pytest.mark.slow
def test_text_to_image_learns_nothing_under_masks_of_everything(base, tmp_path):
    folder = masked_folder(tmp_path, 255)
    said = run("train_text_to_image_lora_gradproj", *training_flags(base, tmp_path), "--train_data_dir", folder)
    assert said.count("masks applied in 2 batches; mean masked share 100.0%") == 1
    assert logged(tmp_path / "out")["train_loss"] == [0.0, 0.0]
    assert len(effects(tmp_path)) > 0
    assert effects(tmp_path).max() == 0


def subject_flags(base: Path, tmp_path: Path) -> list[object]:
    image_folder(tmp_path / "class", ["a", "b"], metadata=False)
    prior = ["--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a"]
    prior += ["--num_class_images", 2, "--instance_prompt", "xa", "--instance_data_dir", masked_folder(tmp_path, 255)]
    return [*training_flags(base, tmp_path), *prior]


def test_dreambooth_masks_the_subject_and_not_the_class(base, tmp_path, monkeypatch):
    script = script_module("train_dreambooth_lora_gradproj")
    monkeypatch.setattr(sys, "argv", ["script", *map(str, subject_flags(base, tmp_path))])
    pictures = script.SubjectPictures(tokenizer(), script.parse_args())
    assert len(pictures) == 4
    batch = pictures.collate([pictures[0], pictures[3]])
    assert batch["pixel_values"].shape == (4, 3, SIDE, SIDE)
    assert batch["masks"].shape == (4, 1, SIDE, SIDE)
    assert batch["masks"].flatten(1).unique(dim=1).tolist() == [[1.0], [1.0], [0.0], [0.0]]


@pytest.mark.slow
def test_dreambooth_learns_of_the_class_under_masks_of_the_subject(base, tmp_path):
    said = run("train_dreambooth_lora_gradproj", *subject_flags(base, tmp_path))
    assert said.count("masks applied in 2 batches; mean masked share 50.0%") == 1
    assert min(logged(tmp_path / "out")["loss"]) > 0
    assert effects(tmp_path).min() > 0
