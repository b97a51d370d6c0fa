"""Paint a sheet of samples with their prompts under them, from fixed seeds.

Example:
    python sample_sheet.py --output sheet.png
    python sample_sheet.py --pipeline out --prompt "red apple" --prompt "panda" --output sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).resolve().parents[2] / "peft_gradproj" / "demo" / "assets"
LABEL_HEIGHT = 24


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--pipeline", type=Path, default=ASSETS / "base_model", help="pipeline folder")
    add("--data", type=Path, default=ASSETS / "fluent.parquet", help="captions are drawn from it")
    add("--prompt", action="append", help="a prompt; repeat it. Default: drawn captions")
    add("--count", type=int, default=48, help="number of drawn captions")
    add("--output", type=Path, required=True, help="the PNG file to write")
    add("--columns", type=int, default=12, help="pictures in a row")
    add("--zoom", type=int, default=2, help="enlargement of the pictures")
    add("--steps", type=int, default=25, help="denoising steps")
    add("--guidance-scale", type=float, default=3.0, help="classifier-free guidance")
    add("--seed", type=int, default=0, help="seed of the prompts drawn and of the noise")
    add("--batch-size", type=int, default=16, help="pictures that are denoised together")
    add("--threads", type=int, default=2, help="threads of the CPU")
    return parser.parse_args(argv)


def draw_captions(data: Path, count: int, seed: int) -> list[str]:
    """Draw captions of a data set without replacement, in the data set's order."""
    captions = load_dataset("parquet", data_files=str(data), split="train")["caption"]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(captions), generator=generator)[:count]
    return [captions[index] for index in sorted(drawn.tolist())]


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], args: argparse.Namespace) -> list[Image.Image]:
    """Paint one picture for each prompt; picture i starts from the noise of seed + i."""
    pictures = []
    for start in range(0, len(prompts), args.batch_size):
        part = prompts[start : start + args.batch_size]
        seeds = [args.seed + start + index for index in range(len(part))]
        pictures += pipeline(
            part,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
    return pictures


def fit_text(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """Break a text into at most two lines that fit the width, cutting what is left."""
    font = ImageFont.load_default(10)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:2])


def compose_sheet(pictures: list[Image.Image], labels: list[str], columns: int, zoom: int) -> Image.Image:
    """Set pictures of one size in rows, each with its label below."""
    side = pictures[0].width * zoom
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + LABEL_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = index % columns * (side + 4), index // columns * (side + LABEL_HEIGHT)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        text = fit_text(draw, label, side)
        draw.text((x + 2, y + side), text, fill="black", font=ImageFont.load_default(10), spacing=0)
    return sheet


def main(argv: list[str] | None = None) -> None:
    """Write the sheet."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    pipeline = StableDiffusionPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    prompts = args.prompt or draw_captions(args.data, args.count, args.seed)
    pictures = sample(pipeline, prompts, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    compose_sheet(pictures, prompts, args.columns, args.zoom).save(args.output)
    print(f"{len(pictures)} samples in {args.output}")


if __name__ == "__main__":
    main()
