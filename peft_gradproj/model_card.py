"""The model card of a published adapter: what was kept out, what the checks found, and what they do not say.

The Hub indexes the card's metadata. The rest is a section between two marks, which is replaced the next time; text
and metadata that others wrote, or the tools that made the adapter, stay as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ._version import __version__
from .adapter_folder import WEIGHT_NAMES, AdapterFolder, read_adapter_folder
from .errors import AdapterFolderError
from .files import is_hub_id, write_atomically
from .untrusted import MAX_JSON_BYTES, printable, read_file
from .verification import MAX_ROWS, Check, VerificationReport

__all__ = ["CARD_NAME", "is_unfilled", "read_model_card", "render_model_card", "with_metadata", "write_model_card"]

CARD_NAME = "README.md"

_BEGIN = "<!-- gradproj:begin"
_END = "<!-- gradproj:end -->"
# Never from a mark that lost its end to the end of another section: what lies between would be lost.
_SECTION = re.compile(f"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.DOTALL)
_METADATA = re.compile(r"\s*---\r?\n.*?\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)

_BLANK = "[More Information Needed]"
"""What templates of cards have where nobody has written anything yet."""

_GENERATED = "This model card has been automatically generated."
"""What transformers and diffusers say in the template."""

_BY_TOOLS = frozenset({"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"})
"""Metadata that PEFT, transformers and diffusers write into the cards that they save."""

_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


def write_model_card(
    folder: str | os.PathLike[str],
    report: VerificationReport,
    *,
    repo_id: str | None = None,
    existing: str | None = None,
    license: str | None = None,
    images: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write `README.md` into the folder of an adapter. It appears complete or not at all.

    Args:
        folder: Holds the adapter and its manifest.
        report: What verification found in it.
        repo_id: Where the adapter is, or will be, on the Hub; its commands then name the repository.
        existing: The card to start from; the one in the folder if `None`.
        license: Identifier of the licence; the one that the card has if `None`.
        images: Pairs of a prompt and the path in the repository of a picture that was sampled with it.

    Returns:
        The card's path.

    Raises:
        AdapterFolderError: If the adapter or the existing card cannot be read.
    """
    folder = Path(folder)
    existing = read_model_card(folder) if existing is None else existing
    text = render_model_card(
        read_adapter_folder(folder), report, repo_id=repo_id, existing=existing, license=license, images=images
    )
    write_atomically(folder / CARD_NAME, text.encode())
    return folder / CARD_NAME


def read_model_card(folder: str | os.PathLike[str]) -> str:
    """The text of the card in a folder, empty where there is none.

    Raises:
        AdapterFolderError: If it is too large, no text, or leads out of the folder.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / CARD_NAME):
        return ""
    try:
        return read_file(folder, CARD_NAME, limit=MAX_JSON_BYTES).data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterFolderError(f"{folder / CARD_NAME} is not UTF-8 text ({error}); save it as UTF-8.") from error


def is_unfilled(card: str) -> bool:
    """Whether a card's text holds nothing that somebody wrote: it is empty, or the template that PEFT saves."""
    text = _SECTION.sub("", _METADATA.sub("", card, count=1))
    return not text.strip() or (_BLANK in text and not any(map(_is_written, text.splitlines())))


def _is_written(line: str) -> bool:
    """Whether somebody wrote a line into the template: it is no heading or remark, has no blank, and is not its own."""
    line = line.strip()
    marks = _BLANK in line or line.startswith(("#", "<!--", "- PEFT ")) or line.endswith(_GENERATED)
    return bool(line) and not marks and line not in _own_lines()


@cache
def _own_lines() -> frozenset[str]:
    """The lines of the Hub's template, which PEFT saves."""
    from huggingface_hub import ModelCard, ModelCardData

    return frozenset(line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines())


def with_metadata(card: str, other: str) -> str:
    """A card with what somebody wrote into the metadata of another: all but what the tools that save adapters do.

    Raises:
        AdapterFolderError: If the metadata of either cannot be read.
    """
    written = {key: value for key, value in _parse(other).data.to_dict().items() if key not in _BY_TOOLS}
    parsed = _parse(card)
    for key, value in written.items():
        parsed.data[key] = value
    return str(parsed) if written else card


def render_model_card(
    folder: AdapterFolder,
    report: VerificationReport,
    *,
    repo_id: str | None = None,
    existing: str = "",
    license: str | None = None,
    images: Sequence[tuple[str, str]] = (),
) -> str:
    """The text of a card; arguments as in :func:`write_model_card`.

    Raises:
        AdapterFolderError: If the metadata of the existing card cannot be read.
    """
    card = _parse(existing.replace("\r\n", "\n"))
    _fill_metadata(card.data, folder, license, images, unfilled=is_unfilled(existing))
    section = _render_section(folder, report, repo_id)
    card.text = _place(card.text, section, title=(repo_id or folder.path.resolve().name).split("/")[-1])
    text = str(card)
    return text.replace("\n", "\r\n") if "\r\n" in existing else text


def _parse(existing: str) -> Any:
    from huggingface_hub import ModelCard

    if not _METADATA.match(existing):
        existing = f"---\n\n---\n{existing}"
    try:
        return ModelCard(existing)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise AdapterFolderError(
            f"the metadata at the head of {CARD_NAME} cannot be read ({' '.join(str(error).split())}); expected a YAML "
            "mapping between two lines '---'. Mend it, or remove the file to have a new one written."
        ) from error


# Metadata


def _fill_metadata(
    metadata: Any, folder: AdapterFolder, license: str | None, images: Sequence[tuple[str, str]], *, unfilled: bool
) -> None:
    """Add what the Hub indexes; what is there stays, unless the Hub would refuse it, or nobody wrote it."""
    if not _are_hub_ids(metadata.get("base_model")):
        # PEFT notes the path of a local base model, which the Hub takes no card with.
        metadata["base_model"] = _base_model(folder)
    found = {
        "base_model_relation": "adapter" if metadata.get("base_model") else None,
        "library_name": "peft" if WEIGHT_NAMES[0] in folder.weights else "diffusers",
        "pipeline_tag": _pipeline_tag(folder),
    }
    for key, value in found.items():
        # The empty card of transformers says that its library loads the adapter.
        if metadata.get(key) is None or (unfilled and key == "library_name"):
            metadata[key] = value
    if license is not None:
        metadata["license"] = license
    tags = [tag for tag in _items(metadata.get("tags")) if not isinstance(tag, list | dict)]
    metadata["tags"] = list(dict.fromkeys([*tags, "lora", "gradproj"]))
    if images:
        metadata["widget"] = list(_with_images(_items(metadata.get("widget")), images))


def _items(value: Any) -> list[Any]:
    """A list of the metadata, which people may write as its only item."""
    return value if isinstance(value, list) else [value] if isinstance(value, str | dict) else []


def _base_model(folder: AdapterFolder) -> str | None:
    named = folder.manifest["base_model"]["id"] or (folder.config or {}).get("base_model_name_or_path")
    return named if named and _are_hub_ids(named) and not os.path.exists(named) else None


def _are_hub_ids(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(v, str) and is_hub_id(v) for v in values)


def _pipeline_tag(folder: AdapterFolder) -> str | None:
    """What the base model does, where the adapter's config or the names of its layers tell."""
    task = (folder.config or {}).get("task_type")
    if isinstance(task, str) and task in _TASKS:
        return _TASKS[task]
    return "text-to-image" if _has_unet_blocks(folder) else None


def _has_unet_blocks(folder: AdapterFolder) -> bool:
    modules = (module for parsed in folder.layers().values() for module in parsed.pairs)
    return any(module.startswith(_UNET_BLOCKS) for module in modules)


def _with_images(widgets: Sequence[Any], images: Iterable[tuple[str, str]]) -> Iterator[Any]:
    fresh = {url: {"text": prompt, "output": {"url": url}} for prompt, url in images}
    for widget in widgets:
        output = widget.get("output") if isinstance(widget, dict) else None
        if not isinstance(output, dict) or output.get("url") not in fresh:
            yield widget
    yield from fresh.values()


# The section


def _place(text: str, section: str, title: str) -> str:
    """Put the section where it was; else at the end of what somebody wrote, or before a template nobody filled in."""
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: section, text, count=1)
    if not text.strip():
        return f"\n# {_plain(title)}\n\n{section}\n"
    if is_unfilled(text):
        return f"\n{section}\n\n{text.lstrip()}"
    return f"{text.rstrip()}\n\n{section}\n"


def _render_section(folder: AdapterFolder, report: VerificationReport, repo_id: str | None) -> str:
    strength = folder.manifest["settings"].get("strength")
    return _template().render(
        begin=_BEGIN,
        end=_END,
        version=__version__,
        concept=folder.manifest["concept"],
        base_model=_base_model(folder),
        basis=folder.basis_published,
        digest=folder.manifest["basis"]["digest"],
        strength=f"{strength:g}" if isinstance(strength, int | float) else str(strength),
        uncovered=folder.manifest["uncovered"],
        rows=list(_rows(folder, report)),
        failures=report.failures[:MAX_ROWS],
        more_failures=max(0, len(report.failures) - MAX_ROWS),
        notes=report.notes,
        where=repo_id or "path/to/this/folder",
        weights=next(iter(folder.weights)),
        is_peft=WEIGHT_NAMES[0] in folder.weights,
        bare=_bare_denoiser(folder),
    )


def _bare_denoiser(folder: AdapterFolder) -> str | None:
    """The pipeline's model whose own `save_lora_adapter` wrote the weights, without its name in their keys.

    `load_lora_weights` passes over such keys with a warning, and the pipeline stays as it was.
    """
    keys = next(iter(folder.weights.values())).keys()
    if any(key.startswith(("unet.", "transformer.", "text_encoder")) for key in keys):
        return None
    return "unet" if _has_unet_blocks(folder) else "transformer"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("peft_gradproj"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(plain=_plain, code=_code)
    return environment.get_template("model_card.md.jinja")


def _rows(folder: AdapterFolder, report: VerificationReport) -> Iterator[tuple[str, str, str]]:
    """Name, result and figures of the three checks."""
    figures = {"integrity": _integrity_figures(folder, report), "orthogonality": _leakage_figures(report)}
    for group in ("integrity", "orthogonality", "behaviour"):
        checks = [check for check in report.checks if check.group == group]
        if not checks:
            yield group, "not checked", "it needs the base model and examples of the concept"
            continue
        unchecked = "; ".join(check.detail for check in checks if check.passed is None)
        yield group, _result(checks), unchecked or figures.get(group) or "; ".join(c.detail for c in checks)


def _result(checks: Sequence[Check]) -> str:
    results = {check.passed for check in checks}
    return "**failed**" if False in results else "could not be checked" if None in results else "passed"


def _integrity_figures(folder: AdapterFolder, report: VerificationReport) -> str:
    checks = [check for check in report.checks if check.group == "integrity"]
    passed = sum(check.passed is True for check in checks)
    size = sum(file.size for file in folder.files.values())
    return f"{passed} of {len(checks)} checks; {len(folder.files)} files, {size:,} bytes"


def _leakage_figures(report: VerificationReport) -> str:
    measured = [(value, layer) for layer in report.layers for value in layer.leakage.values()]
    if not measured:
        return ""
    worst, layer = max(measured, key=lambda pair: pair[0])
    return (
        f"the largest share of a layer's update along the basis is {worst:.1e}; up to {layer.tolerance:.0e} is "
        f"rounding error in {layer.dtype}; {len(report.layers)} layers"
    )


def _plain(value: Any) -> str:
    """Text that Markdown and HTML take for nothing but text, on one line."""
    text = printable(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)


def _code(value: Any) -> str:
    text = printable(str(value)).replace("`", "'").replace("|", r"\|").replace("<!--", "<! --")
    return f"`{text}`"
