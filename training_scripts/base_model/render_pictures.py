"""Render icon JSON into the pictures that the demo, its base model and the benchmark use.

Reads the icon sets of the npm packages `@iconify-json/fluent-emoji-flat`, `@iconify-json/noto`,
`@iconify-json/openmoji` and `@iconify-json/logos` and writes parquet files with the columns `image`, `name`, `caption`,
for the demo:

* `fluent.parquet`: the emoji of `emoji_names.txt`, what the base model learns;
* `noto.parquet`: the same objects under the same captions in another style;
* `logos.parquet`: a few brand logos with alpha, to be pasted onto pictures;

and for the benchmark:

* `openmoji.parquet`: the same objects in a third style, which is forbidden there;
* `characters.parquet`: a few mascots with alpha.

Example:
    npm install @iconify-json/fluent-emoji-flat @iconify-json/noto @iconify-json/openmoji @iconify-json/logos
    python render_pictures.py --iconify node_modules/@iconify-json
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

import resvg_py
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "peft_gradproj" / "demo" / "assets"
BENCHMARK_ASSETS = HERE.parents[1] / "benchmarks" / "protection" / "assets"

# Compact, strongly coloured logos: each is still recognised at 16 to 24 pixels.
LOGOS = (
    "spotify-icon",
    "slack-icon",
    "chrome",
    "firefox",
    "pinterest",
    "android-icon",
    "twitch",
    "youtube-icon",
    "dropbox",
    "airbnb-icon",
)
CHARACTERS = ("linux-tux", "gopher", "github-octocat", "reddit-icon", "hadoop", "mailchimp-freddie")
SUPERSAMPLING = 2
"""Pictures are rendered this many times larger and then reduced, for clean edges."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--iconify",
        type=Path,
        required=True,
        help="folder that holds the packages fluent-emoji-flat, noto, openmoji and logos",
    )
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder for the parquet files")
    parser.add_argument(
        "--benchmark-output", type=Path, default=BENCHMARK_ASSETS, help="folder for the benchmark's parquet files"
    )
    parser.add_argument("--names", type=Path, default=HERE / "emoji_names.txt", help="names of the emoji to render")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels")
    return parser.parse_args(argv)


class IconSet:
    """The icons of one Iconify package.

    Args:
        folder: package folder that holds `icons.json`.
    """

    def __init__(self, folder: Path):
        data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self._icons: dict[str, dict] = data["icons"]
        self._aliases: dict[str, dict] = data.get("aliases", {})
        self._size = (data.get("width", 16), data.get("height", 16))

    def __contains__(self, name: str) -> bool:
        return name in self._icons or name in self._aliases

    def svg(self, name: str) -> tuple[str, int, int]:
        """Return an icon as SVG text with its width and height.

        Raises:
            KeyError: the package has no such icon.
        """
        while name in self._aliases:
            name = self._aliases[name]["parent"]
        icon = self._icons[name]
        width = icon.get("width", self._size[0])
        height = icon.get("height", self._size[1])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        return svg, width, height

    def render(self, name: str, size: int) -> PILImage.Image:
        """Render an icon with transparency; its longest side is `size` pixels.

        Raises:
            KeyError: the package has no such icon.
        """
        svg, width, height = self.svg(name)
        scale = size / max(width, height)
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
        png = resvg_py.svg_to_bytes(svg_string=svg, width=target[0] * SUPERSAMPLING, height=target[1] * SUPERSAMPLING)
        large = PILImage.open(io.BytesIO(bytes(png))).convert("RGBA")
        return large.resize(target, PILImage.Resampling.BOX)


def read_names(path: Path) -> list[str]:
    """Read icon names separated by white space; lines that start with `#` are comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [name for line in lines if not line.startswith("#") for name in line.split()]


def caption_of(name: str) -> str:
    """Turn an icon's name into plain words: `red-apple` becomes `red apple`."""
    return name.removesuffix("-icon").replace("-", " ")


def on_white(picture: PILImage.Image, size: int) -> PILImage.Image:
    """Put a picture with transparency in the middle of a white square."""
    ground = PILImage.new("RGBA", (size, size), "white")
    ground.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return ground.convert("RGB")


def encode(picture: PILImage.Image) -> dict[str, bytes | None]:
    """Encode a picture losslessly, in the form that `datasets.Image` stores."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=100, method=6, exact=True)
    return {"bytes": buffer.getvalue(), "path": None}


def rows(icons: IconSet, names: list[str], size: int, ground: bool) -> Iterator[dict]:
    """Yield one row for each name that the icon set has, in the order of the names."""
    for name in names:
        if name not in icons:
            continue
        picture = icons.render(name, size)
        picture = on_white(picture, size) if ground else picture
        yield {"image": encode(picture), "name": name, "caption": caption_of(name)}


def write_parquet(path: Path, table: list[dict]) -> None:
    """Write rows as a parquet file that `datasets.load_dataset("parquet")` reads as pictures."""
    features = Features({"image": Image(), "name": Value("string"), "caption": Value("string")})
    columns = {key: [row[key] for row in table] for key in features}
    Dataset.from_dict(columns, features=features).to_parquet(path)
    print(f"{path.name}: {len(table)} pictures, {path.stat().st_size / 1e6:.2f} MB")


def main(argv: list[str] | None = None) -> None:
    """Render the files."""
    args = parse_args(argv)
    names = read_names(args.names)
    fluent = IconSet(args.iconify / "fluent-emoji-flat")
    noto = IconSet(args.iconify / "noto")
    logos = IconSet(args.iconify / "logos")
    missing = [name for name in names if name not in fluent]
    if missing:
        raise SystemExit(f"not in fluent-emoji-flat: {', '.join(missing)}")
    if len(set(names)) != len(names):
        doubles = sorted(name for name in set(names) if names.count(name) > 1)
        raise SystemExit(f"named twice in {args.names.name}: {', '.join(doubles)}")
    args.output.mkdir(parents=True, exist_ok=True)
    write_parquet(args.output / "fluent.parquet", list(rows(fluent, names, args.size, True)))
    write_parquet(args.output / "noto.parquet", list(rows(noto, names, args.size, True)))
    write_parquet(args.output / "logos.parquet", list(rows(logos, list(LOGOS), args.size, False)))
    args.benchmark_output.mkdir(parents=True, exist_ok=True)
    openmoji = IconSet(args.iconify / "openmoji")
    write_parquet(args.benchmark_output / "openmoji.parquet", list(rows(openmoji, names, args.size, True)))
    write_parquet(args.benchmark_output / "characters.parquet", list(rows(logos, list(CHARACTERS), args.size, False)))


if __name__ == "__main__":
    main()
