"""Honest published folders, and what can be done to them.

`honest_folder` makes one from tensors alone, in either layout. `TAMPERINGS` lists what strangers may do to it, each
with the answer that the verifier owes: the checks that fail, or the reason for which the folder is refused. `HARMLESS`
lists what may lie beside an adapter, since nobody loads it. Extend the lists, and every test that runs over them grows.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_gradproj import ConceptBasis, LayerBasis
from peft_gradproj.adapter_folder import BOUND_FILES, write_sidecars
from peft_gradproj.projection import orthonormal_basis, remove_component

WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
CONFIG = "adapter_config.json"
BASIS = "concept_basis.safetensors"
MANIFEST = "gradproj.json"

SHAPES = {
    "down.attn.to_q": ((12,), 10),
    "down.attn.to_out.0": ((10,), 12),
    "down.conv": ((3, 3, 3), 8),
}
"""`(input shape, d_out)` per layer; an input shape of three is a convolution's `(c_in, kh, kw)`."""

KEY_STYLES = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "unet": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "transformer": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "unet, old": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
}


# Honest folders


def directions(d: int, k: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns, shape `(d, k)`."""
    return orthonormal_basis(torch.randn(d, k, generator=generator, dtype=torch.float64)).float()


def random_basis(
    spaces: Iterable[str] = ("input", "output"),
    *,
    k: int = 2,
    ranks: dict[str, int] | None = None,
    seed: int = 0,
    **named: Any,
) -> ConceptBasis:
    """A basis of the layers of `SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (shape, d_out) in SHAPES.items():
        d_in, r = torch.Size(shape).numel(), (ranks or {}).get(name, 4)
        widths = {"input": d_in, "rank": r, "output": d_out, "gradient": r * (d_in + d_out)}
        layers[name] = LayerBasis(**{space: directions(widths[space], k, generator) for space in spaces})
    return ConceptBasis(layers, "logo", **{"base_model": "someone/model", "revision": "abc", **named})


def orthogonal_factors(
    name: str, layer: LayerBasis, r: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B of a layer, as training under projection leaves them; convolutions in their own shape."""
    shape, d_out = SHAPES[name]
    a = torch.randn(r, torch.Size(shape).numel(), generator=generator, dtype=torch.float64)
    b = 0.01 * torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    if layer.input is not None:
        a = remove_component(a, layer.input.double(), side="right")
    if layer.output is not None:
        b = remove_component(b, layer.output.double(), side="left")
    if layer.rank is not None:
        b = remove_component(b, layer.rank.double(), side="right")
    kernel = (1,) * (len(shape) - 1)
    return a.reshape(r, *shape).to(dtype).contiguous(), b.reshape(d_out, r, *kernel).to(dtype).contiguous()


def honest_tensors(
    basis: ConceptBasis,
    *,
    style: str = "peft",
    dtype: torch.dtype = torch.float32,
    ranks: dict[str, int] | None = None,
    seed: int = 1,
) -> dict[str, Tensor]:
    """The tensors of an adapter that is orthogonal to `basis`, under the keys of `style`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in SHAPES:
        a, b = orthogonal_factors(name, basis[name], (ranks or {}).get(name, 4), dtype, generator)
        for key, tensor in zip(KEY_STYLES[style], (a, b), strict=True):
            tensors[key.format(name)] = tensor
    return tensors


def adapter_config(**changes: Any) -> dict[str, Any]:
    """An `adapter_config.json` as PEFT writes it, the fields that matter here."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "someone/model",
        "revision": "abc",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["to_q", "to_out.0", "conv"],
        "bias": "none",
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": None,
    }
    return {**config, **changes}


def honest_folder(
    folder: Path,
    *,
    basis: ConceptBasis | None = None,
    style: str = "peft",
    dtype: torch.dtype = torch.float32,
    rank_pattern: dict[str, int] | None = None,
    config: dict[str, Any] | None = None,
    extra_tensors: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
    strength: float = 1.0,
    **sidecars: Any,
) -> ConceptBasis:
    """Publish an honest adapter in `folder`; returns the basis that it is orthogonal to."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: r for name in SHAPES for key, r in (rank_pattern or {}).items() if name.endswith(key)}
    basis = random_basis(ranks=ranks) if basis is None else basis
    tensors = {**honest_tensors(basis, style=style, dtype=dtype, ranks=ranks), **(extra_tensors or {})}
    save_file(
        tensors, folder / (WEIGHTS if style == "peft" else DIFFUSERS_WEIGHTS), {"format": "pt", **(metadata or {})}
    )
    if style == "peft":
        written = adapter_config(rank_pattern=rank_pattern or {}, **(config or {}))
        (folder / CONFIG).write_text(json.dumps(written))
    options = {"settings": {"strength": strength}, "base_model": "someone/model", "revision": "abc", **sidecars}
    write_sidecars(folder, options.pop("published_basis", basis), **options)
    return basis


# Changing a folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    with safe_open(folder / name, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / name)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata)


def reseal(folder: Path) -> None:
    """Give the manifest the digests of the files as they are: what anybody who tampers would do."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"] = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in contents(folder).items()
            if name in BOUND_FILES
        }

    edit_json(folder, MANIFEST, change)


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 4, shape: Any = (1,), dtype: str = "F32", **more: Any) -> dict[str, Any]:
    """A header's entry for one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


@dataclass(frozen=True)
class Tampering:
    """What a stranger does to an honest folder, and the answer that it deserves."""

    name: str
    change: Callable[[Path], Any]
    fails: tuple[str, ...] = ()
    """Exactly the checks that fail; none if the folder is refused."""

    reason: str = ""
    """Part of the detail of a failed check, or of the error."""

    def __str__(self) -> str:
        return self.name


def on_tensors(file: str, change: Callable[[dict[str, Tensor]], Any], *, sealed: bool = True) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit_tensors(folder, file, change)
        if sealed:
            reseal(folder)

    return apply


def on_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit_json(folder, name, change)
        if name != MANIFEST:
            reseal(folder)

    return apply


def on_manifest(**values: Any) -> Callable[[Path], None]:
    return on_json(MANIFEST, lambda manifest: manifest.update(values))


def on_config(**values: Any) -> Callable[[Path], None]:
    return on_json(CONFIG, lambda config: config.update(values))


def with_bytes(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def with_text(name: str, old: str, new: str) -> Callable[[Path], Any]:
    """Replace text in a file, as a JSON library would not write it."""

    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text, f"{old!r} is not in {name}: the tampering would change nothing"
        (folder / name).write_text(text.replace(old, new, 1))

    return apply


PREFIX = "base_model.model.down.attn.to_q"
A, B = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"
INPUT, OUTPUT = "down.attn.to_q.input", "down.attn.to_q.output"


def _set(key: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: make(tensors[key])})


def _renamed(key: str, name: str) -> Callable[[dict[str, Tensor]], None]:
    """Under a name that loaders pass over: the layer's other factor is loaded onto one that is drawn."""
    return lambda tensors: tensors.update({name: tensors.pop(key)})


def _under_another_name(folder: Path) -> None:
    """What is learned stands under the name that transformers takes for the layer's, with a basis of its own."""
    for space in ("input", "output"):
        edit_tensors(folder, BASIS, lambda t, space=space: t.update(
            {f"model.down.attn.to_q.{space}": t[f"down.attn.to_q.{space}"].clone()}))  # fmt: skip
    edit_tensors(folder, WEIGHTS, lambda t: t.update(
        {key.replace(".down.", ".model.down."): t[key].clone() for key in (A, B)}))  # fmt: skip
    basis = load_file(folder / BASIS)
    digest = ConceptBasis({
        module: LayerBasis(**{space: basis[f"{module}.{space}"] for space in ("input", "output")})
        for module in {key.rpartition(".")[0] for key in basis}
    }, "logo", base_model="someone/model", revision="abc").digest()  # fmt: skip
    edit_json(folder, MANIFEST, lambda m: m["basis"].update(digest=digest))
    reseal(folder)


def _one_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def _leak(tensors: dict[str, Tensor], folder: Path, size: float = 1e-4) -> None:
    tensors[A] += size * torch.randn(tensors[A].shape, generator=torch.Generator().manual_seed(5))


def _cancel(tensors: dict[str, Tensor], folder: Path) -> None:
    """All but what lies along the concept cancels: float32 holds that, and the squares of float64 do not."""
    a, b = torch.zeros_like(tensors[A]), torch.zeros_like(tensors[B])
    a[:2, 0] = 1.0
    a[0, 1:] = 2.0**-30 * load_file(folder / BASIS)[INPUT][1:, 0]
    b[:, 0] = 2.0**30 * torch.randn(len(b), generator=torch.Generator().manual_seed(5))
    b[:, 1] = -b[:, 0]
    tensors.update({A: a, B: b})


def _swap_file(name: str, *, sealed: bool) -> Callable[[Path], None]:
    """The same file of another adapter, orthogonal to another basis."""

    def apply(folder: Path) -> None:
        other = folder.parent / "other"
        honest_folder(other, basis=random_basis(seed=9))
        (folder / name).write_bytes((other / name).read_bytes())
        if sealed:
            reseal(folder)

    return apply


def _lying_publisher(change: Callable[[dict[str, Tensor], Path], Any]) -> Callable[[Path], None]:
    """Publishes something else in earnest: every digest and claim fits what is there."""

    def apply(folder: Path) -> None:
        basis = ConceptBasis.load(folder)
        edit_tensors(folder, WEIGHTS, lambda tensors: change(tensors, folder))
        write_sidecars(folder, basis, settings={"strength": 1.0}, base_model="someone/model", revision="abc")

    return apply


def _link_out(name: str, target: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(target if target.startswith("/") else outside)

    return apply


def _named_pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def _in_folder(act: Callable[[], Any]) -> Callable[[Path], None]:
    """Done from within, since paths of sockets and of deep trees have a length that the system takes."""

    def apply(folder: Path) -> None:
        before = os.getcwd()
        os.chdir(folder)
        try:
            act()
        finally:
            os.chdir(before)

    return apply


def _socket(name: str) -> Callable[[Path], None]:
    def bind() -> None:
        Path(name).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)

    return _in_folder(bind)


def _deep_tree() -> None:
    for _ in range(200):
        os.mkdir("deeper")
        os.chdir("deeper")


def _not_utf8(name: bytes) -> Callable[[Path], None]:
    return _in_folder(lambda: open(name, "wb").close())


def _sparse(name: str, size: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return apply


def _hard_link(folder: Path) -> None:
    os.link(folder / CONFIG, folder.parent / "another name of the config")


def _adapter_in_subfolder(folder: Path) -> None:
    (folder / "unet").mkdir()
    save_file(honest_tensors(random_basis(seed=9), style="unet"), folder / "unet" / DIFFUSERS_WEIGHTS)


def _digest_of_subfolder(folder: Path) -> None:
    _adapter_in_subfolder(folder)
    edit_json(folder, MANIFEST, lambda m: m["files"].update({f"unet/{WEIGHTS}": m["files"][WEIGHTS]}))


def _folder_for_file(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


def _shortened(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, size if size >= 0 else (folder / name).stat().st_size + size)


class Evil:
    """A pickle of this makes a file: proof that it was opened."""

    def __reduce__(self) -> Any:
        return (open, ("pickle-was-opened", "w"))


def _nested(levels: int) -> str:
    return "[" * levels + "]" * levels


# In each of these the tampering would pass if the one check were not there: digests are made to fit ("sealed").
NOT_VERIFIED = [
    Tampering("bit flip in the weights", lambda f: flip_bit(f / WEIGHTS, -1, 7), ("digests", "leakage", "claims")),
    Tampering("bit flip in the basis", lambda f: flip_bit(f / BASIS, -4), ("digests", "basis"), "SHA-256"),
    Tampering("bit flip in the config", with_text(CONFIG, '"lora_alpha": 8', '"lora_alpha": 9'), ("digests",), "SHA"),
    Tampering(
        "bit flip in the manifest",
        lambda f: edit_json(f, MANIFEST, lambda m: m["files"][WEIGHTS].update(sha256="0" * 64)),
        ("digests",),
        "adapter_model",
    ),
    Tampering("longer config", lambda f: (f / CONFIG).open("a").write("\n\n"), ("digests",), "bytes; the manifest"),
    Tampering("swapped adapter", _swap_file(WEIGHTS, sealed=False), ("digests", "leakage", "claims"), "SHA-256"),
    Tampering("swapped adapter, sealed", _swap_file(WEIGHTS, sealed=True), ("leakage", "claims"), "expected at most"),
    Tampering("swapped basis", _swap_file(BASIS, sealed=False), ("digests", "basis", "leakage", "claims"), "SHA-256"),
    Tampering("swapped basis, sealed", _swap_file(BASIS, sealed=True), ("basis", "leakage", "claims"), "digest"),
    Tampering(
        "basis of random numbers",
        on_tensors(BASIS, _set(INPUT, torch.randn_like)),
        ("basis", "leakage", "claims"),
        "not orthonormal",
    ),
    Tampering("basis of zeros", on_tensors(BASIS, _set(INPUT, torch.zeros_like)), ("basis",), "not orthonormal"),
    Tampering("scaled basis", on_tensors(BASIS, _set(INPUT, lambda u: 1e-9 * u)), ("basis",), "not orthonormal"),
    Tampering("basis with NaN", on_tensors(BASIS, _set(INPUT, _one_value(torch.nan))),
              ("basis", "leakage", "claims"), "not finite"),
    Tampering("too few columns", on_tensors(BASIS, _set(INPUT, lambda u: u[:, :1])), ("basis",), "digest"),
    Tampering("repeated columns", on_tensors(BASIS, _set(INPUT, lambda u: u[:, [0, 0]])), ("basis",), "orthonormal"),
    Tampering(
        "transposed basis", on_tensors(BASIS, _set(INPUT, lambda u: u.T)), ("basis", "claims"), "expected 1 to 2"
    ),
    Tampering(
        "basis of another width",
        on_tensors(BASIS, _set(INPUT, lambda u: torch.cat([u, 0 * u[:1]]))),
        ("basis", "claims"),
        "width 13",
    ),
    Tampering("basis in half precision", on_tensors(BASIS, _set(INPUT, lambda u: u.half())),
              ("basis", "leakage", "claims"), "float32 matrix"),
    Tampering("flat basis", on_tensors(BASIS, _set(INPUT, lambda u: u.flatten())), ("basis", "claims"), "shape"),
    Tampering(
        "a layer that the basis lacks",
        on_tensors(BASIS, lambda t: [t.pop(INPUT), t.pop(OUTPUT)]),
        ("basis", "coverage", "claims"),
        "covers it in none",
    ),
    Tampering(
        "basis for other layers",
        on_tensors(BASIS, lambda t: [t.update({f"x.{key}": t.pop(key)}) for key in list(t)]),
        ("basis", "coverage", "leakage", "claims"),
        "no adapted layer could be measured",
    ),
    Tampering(
        "an extra layer",
        on_tensors(WEIGHTS, lambda t: t.update({k.replace("to_q", "to_k"): t[k] + 0 for k in (A, B)})),
        ("coverage",),
        "covers it in none",
    ),
    Tampering(
        "a layer left out",
        on_tensors(WEIGHTS, lambda t: [t.pop(A), t.pop(B)]),
        ("claims",),
        "nothing was found",
    ),
    Tampering("no layer at all", on_tensors(WEIGHTS, lambda t: t.clear()), ("shapes", "leakage", "claims"), "no LoRA"),
    Tampering("only half of a layer", on_tensors(WEIGHTS, lambda t: t.pop(B)), ("shapes", "claims"), "0 for B"),
    Tampering(
        "a magnitude vector",
        on_tensors(WEIGHTS, lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(10)})),
        ("coverage",),
        "no part of a LoRA pair",
    ),
    Tampering(
        "a bias",
        on_tensors(WEIGHTS, lambda t: t.update({f"{PREFIX}.bias": torch.ones(10)})),
        ("coverage",),
        "uncovered",
    ),
    Tampering(
        "a bias of B",
        on_tensors(WEIGHTS, lambda t: t.update({f"{PREFIX}.lora_B.bias": torch.ones(10)})),
        ("coverage",),
        "uncovered",
    ),
    Tampering(
        "a saved module",
        on_tensors(WEIGHTS, lambda t: t.update({"base_model.model.head.weight": torch.ones(3, 3)})),
        ("coverage",),
        "uncovered",
    ),
    Tampering(
        "an embedding",
        on_tensors(
            WEIGHTS,
            lambda t: t.update(
                {f"{PREFIX}.lora_embedding_A": torch.ones(4, 12), f"{PREFIX}.lora_embedding_B": torch.ones(10, 4)}
            ),
        ),
        ("coverage",),
        "uncovered",
    ),
    Tampering(
        "a layer in two layouts",
        on_tensors(WEIGHTS, lambda t: t.update({f"{PREFIX}.lora.down.weight": torch.ones_like(t[A])})),
        ("shapes", "claims"),
        "2 tensors for A",
    ),
    Tampering("an A in an older spelling", on_tensors(WEIGHTS, _renamed(A, f"{PREFIX}.lora.down.weight")),
              ("shapes", "claims"), "different spellings"),
    Tampering("an A without the prefix", on_tensors(WEIGHTS, _renamed(A, A.removeprefix("base_model.model."))),
              ("shapes", "claims"), "different spellings"),
    Tampering("a layer under two names", _under_another_name, ("shapes",), "adapted as down.attn.to_q as well"),
    Tampering("a huge alpha tensor", on_tensors(WEIGHTS, lambda t: t.update({f"{PREFIX}.alpha": torch.tensor(1e9)})),
              ("config",), "alpha"),
    Tampering("NaN", on_tensors(WEIGHTS, _set(A, _one_value(torch.nan))), ("values", "leakage", "claims"),
              "not finite"),
    Tampering("infinity", on_tensors(WEIGHTS, _set(B, _one_value(torch.inf))), ("values", "leakage", "claims"),
              "not finite"),
    Tampering("denormals", on_tensors(WEIGHTS, _set(B, lambda b: b * 1e-38)), ("values", "leakage", "claims"),
              "denormal"),
    Tampering("integers", on_tensors(WEIGHTS, _set(A, lambda a: a.to(torch.int8))), ("dtypes", "claims"), "int8"),
    Tampering(
        "eight-bit floats",
        on_tensors(WEIGHTS, _set(A, lambda a: a.to(torch.float8_e4m3fn))),
        ("dtypes", "claims"),
        "float8",
    ),
    Tampering("ranks that differ", on_tensors(WEIGHTS, _set(B, lambda b: b[:, :3])), ("shapes", "claims"), "one r"),
    Tampering("a transposed factor", on_tensors(WEIGHTS, _set(A, lambda a: a.T)), ("shapes", "claims"), "one r"),
    Tampering("a flat factor", on_tensors(WEIGHTS, _set(A, lambda a: a.flatten())), ("shapes", "claims"), "matrices"),
    Tampering(
        "a kernel in B",
        on_tensors(
            WEIGHTS,
            lambda t: t.update({"base_model.model.down.conv.lora_B.weight": torch.ones(8, 4, 3, 3)}),
        ),
        ("shapes", "claims"),
        "kernel size 1",
    ),
    Tampering("another rank than the config's", on_config(r=8), ("config",), "rank 4; the config says 8"),
    Tampering("a rank pattern that lies", on_config(rank_pattern={"to_q": 2}), ("config",), "the config says 2"),
    Tampering("a pattern of text", on_config(alpha_pattern={"to_q": "8"}), ("config",), "alpha_pattern"),
    Tampering("a huge alpha", on_config(lora_alpha=10**8), ("config",), "lora_alpha / r"),
    Tampering("a huge alpha in a pattern", on_config(alpha_pattern={"to_q": 1e8}), ("config",), "lora_alpha / r"),
    Tampering("an alpha of text", on_config(lora_alpha="8"), ("config",), "lora_alpha is '8'"),
    Tampering("another type", on_config(peft_type="GRADPROJ"), ("config",), "expected 'LORA'"),
    Tampering("DoRA", on_config(use_dora=True), ("config",), "magnitudes"),
    Tampering("biases", on_config(bias="all"), ("config",), "bias is 'all'"),
    Tampering("LoRA biases", on_config(lora_bias=True), ("config",), "biases are trained"),
    Tampering("modules to save", on_config(modules_to_save=["head"]), ("config",), "whole modules"),
    Tampering("trained tokens", on_config(trainable_token_indices=[1]), ("config",), "embeddings"),
    Tampering("an init that changes the base", on_config(init_lora_weights="pissa_niter_4"), ("config",), "pissa"),
    Tampering("random weights for layers that are targeted and not saved", on_config(init_lora_weights=False),
              ("config",), "random weights"),
    *(
        Tampering(f"random weights by {value!r}", on_config(init_lora_weights=value), ("config",), "random weights")
        for value in (None, 0, "", [])
    ),
    Tampering("an init of tomorrow", on_config(init_lora_weights="newest"), ("config",), "not known to leave the base"),
    Tampering("an option that is there though it is empty", on_config(kasa_config={}), ("config",), "kasa_config"),
    *(
        Tampering(f"{option} that takes for ever to match", on_config(**{option: value}), ("config",), "take for ever")
        for option, value in {
            "target_modules": "(a+)+$",
            "exclude_modules": r"([\w.]+)*!",
            "rank_pattern": {r"(\w+\.?)+!": 4},
            "alpha_pattern": {"(.|a){2,}!": 8},
            "layers_pattern": [r"([\w.]+)*!"],
        }.items()
    ),
    Tampering("code to be run", on_config(trust_remote_code=True, auto_map={"AutoModel": "evil.Model"}), ("config",),
              "trust_remote_code' is set, which this release does not know"),
    Tampering("a bias of megabytes", on_config(bias="all" * 2**20), ("config",), "expected 'none'"),
    Tampering("an option of megabytes", on_config(**{"x" * 2**20: 1}), ("config",), "does not know"),
    Tampering("adapters shared with tied layers", on_config(ensure_weight_tying=True), ("config",), "share an adapter"),
    Tampering("double precision, which loaders round", on_tensors(WEIGHTS, _set(A, lambda a: a.double())),
              ("dtypes",), "float64"),
    Tampering("a file that diffusers takes where its own is missing",
              lambda f: save_file(honest_tensors(random_basis(seed=9), style="unet"), f / "aaa.safetensors"),
              ("files",), "may take aaa.safetensors"),
    Tampering("a config for diffusers in the header of PEFT's weights", lambda f: [
        save_file(load_file(f / WEIGHTS), f / WEIGHTS, {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 1e8}'}),
        reseal(f)], ("config",), "lora_alpha / r"),
    Tampering("an unknown option", on_config(use_newest_trick=True), ("config",), "does not know"),
    Tampering("no config", lambda f: [(f / CONFIG).unlink(), reseal(f)], ("config",), "expected 'LORA'"),
    Tampering("another base in the config", on_config(base_model_name_or_path="x/y"), ("base model",), "x/y"),
    Tampering("another base in the manifest", on_manifest(base_model={"id": "x/y", "revision": "abc"}),
              ("base model",), "x/y"),
    Tampering("another revision", on_manifest(base_model={"id": "someone/model", "revision": "d"}),
              ("base model",), "revision of the base model differs"),
    Tampering("a small leak", _lying_publisher(_leak), ("leakage",), "of the update lies in the input basis"),
    Tampering("an update of the concept that other rows hide by cancelling", _lying_publisher(_cancel),
              ("leakage", "claims"), "less than 0.001 of factors that cancel; publish"),
    Tampering("leakage claimed too high", on_json(MANIFEST, lambda m: m["leakage"]["down.conv"].update(input=0.1)),
              ("claims",), "claims 0.1"),
    Tampering("leakage not claimed", on_manifest(leakage={}), ("claims",), "claims nothing"),
    Tampering("leakage claimed as null", on_json(MANIFEST, lambda m: m["leakage"]["down.conv"].update(input=None)),
              ("claims",), "claims nothing"),
    Tampering("leakage claimed for more layers", on_json(MANIFEST, lambda m: m["leakage"].update(x={"input": 0.0})),
              ("claims",), "nothing was found"),
    Tampering("half strength", on_manifest(settings={"strength": 0.5}), ("strength",), "only 1"),
    Tampering("no strength", on_manifest(settings={}), ("strength",), "only 1"),
    Tampering("uncovered parts admitted", on_manifest(uncovered=["layer 'x'"]), ("coverage",), "says the publisher"),
    Tampering("another digest of the basis", on_manifest(basis={"published": "full", "digest": "0"}),
              ("basis",), "digest"),
    Tampering("a basis said to be withheld", on_manifest(basis={"published": "digest", "digest": "0"}),
              ("files", "basis"), "the manifest says of the basis"),
    Tampering("weights that nobody listed", lambda f: (f / DIFFUSERS_WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()),
              ("files",), "added afterwards"),
    Tampering("a pickle beside the weights", lambda f: (f / "adapter_model.bin").write_bytes(pickle.dumps(Evil())),
              ("files",), "adapter_model.bin for the adapter"),
    Tampering("a pickle beside, as diffusers has it", lambda f: (f / "a_pytorch_lora_weights.bin").write_bytes(b"x"),
              ("files",), "a loader may take"),
    Tampering("weights under a name that is no text", _not_utf8(b"\xff\x1b.safetensors"), ("files",),
              "a loader may take"),
    Tampering("a file that diffusers may prefer",
              lambda f: (f / "a_pytorch_lora_weights.safetensors").write_bytes(b"x"), ("files",), "a loader may take"),
    Tampering("a basis with another label", lambda f: [
        save_file(load_file(f / BASIS), f / BASIS, {"format_version": "1", "concept": "sun"}), reseal(f)],
        ("basis",), "is for 'sun'; the manifest says 'logo'"),
    Tampering("other weights in the other layout", lambda f: [
        save_file(honest_tensors(random_basis(seed=9), style="unet"), f / DIFFUSERS_WEIGHTS), reseal(f)],
        ("leakage", "claims"), "expected at most"),
]  # fmt: skip

REFUSED = [
    Tampering("empty", with_bytes(WEIGHTS, b""), reason="is empty"),
    Tampering("cut short in the header", _shortened(WEIGHTS, 100), reason="cut short"),
    Tampering("cut short in the data", _shortened(WEIGHTS, -4), reason="cut short"),
    Tampering("cut short in the length", _shortened(WEIGHTS, 5), reason="cut short"),
    Tampering("weights over the limit", _shortened(WEIGHTS, 3 * 2**30), reason="at most 2,147,483,648 are read"),
    Tampering("bytes after the end", lambda f: (f / WEIGHTS).open("ab").write(b"x"), reason="hides"),
    Tampering("a pickle for the weights", with_bytes(WEIGHTS, pickle.dumps(Evil())), reason="pickle can run code"),
    Tampering("a zip for the weights", with_bytes(WEIGHTS, b"PK\3\4" + bytes(90)), reason="zip archive"),
    Tampering("a pickle for the basis", with_bytes(BASIS, pickle.dumps(Evil())), reason="pickle can run code"),
    Tampering("a header of no end", with_bytes(WEIGHTS, safetensors_bytes({}, length=2**63)), reason="cut short"),
    Tampering(
        "a header over the limit",
        with_bytes(WEIGHTS, safetensors_bytes(b"{" + b" " * (9 * 2**20) + b"}")),
        reason="has a header of",
    ),
    Tampering("a header of text", with_bytes(WEIGHTS, safetensors_bytes(b"hello")), reason="does not start with"),
    Tampering("a header of broken JSON", with_bytes(WEIGHTS, safetensors_bytes(b"{]")), reason="not valid JSON"),
    Tampering("a header of broken text", with_bytes(WEIGHTS, safetensors_bytes(b'{"\xff')), reason="not valid JSON"),
    Tampering(
        "a header with a key twice",
        with_bytes(WEIGHTS, safetensors_bytes(b'{"a": 1, "a": 2}')),
        reason="key 'a' twice",
    ),
    Tampering(
        "overlapping tensors",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4))),
        reason="overlaps another",
    ),
    Tampering(
        "a gap between tensors",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))),
        reason="leaves a gap",
    ),
    Tampering(
        "negative offsets", with_bytes(WEIGHTS, safetensors_bytes({"a": entry(-4, 0)}, bytes(4))), reason="offsets"
    ),
    Tampering("offsets past the end", with_bytes(WEIGHTS, safetensors_bytes({"a": entry(0, 4)})), reason="cut short"),
    Tampering(
        "fractional offsets", with_bytes(WEIGHTS, safetensors_bytes({"a": entry(0.0, 4.0)}, bytes(4))), reason="offsets"
    ),
    Tampering(
        "bytes that do not fit the shape",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(0, 4, (2,))}, bytes(4))),
        reason="expected 8",
    ),
    Tampering(
        "a negative shape",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(0, 4, (-1, -1))}, bytes(4))),
        reason="has shape",
    ),
    Tampering(
        "a shape beyond all memory",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(0, 4, (2**39, 2**39, 2**39))}, bytes(4))),
        reason="expected",
    ),
    Tampering(
        "a tensor of nothing",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(0, 0, (0, 2**39))})),
        reason="without values",
    ),
    Tampering(
        "an unknown dtype",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(dtype="F42")}, bytes(4))),
        reason="has dtype 'F42'",
    ),
    Tampering(
        "a dtype of megabytes",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(dtype="F" * 2**20)}, bytes(4))),
        reason="has dtype 'FFFF",
    ),
    Tampering(
        "a shape of a million sizes",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(shape=[1] * 2**20)}, bytes(4))),
        reason="has shape [1, 1,",
    ),
    Tampering(
        "metadata that no other reader takes",
        with_bytes(WEIGHTS, safetensors_bytes(b'{"__metadata__": {"a": "\\ud800"}}')),
        reason="metadata",
    ),
    Tampering(
        "an unhashable dtype",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry() | {"dtype": [1]}}, bytes(4))),
        reason="has dtype",
    ),
    Tampering(
        "a field too many",
        with_bytes(WEIGHTS, safetensors_bytes({"a": entry(code="x")}, bytes(4))),
        reason="expected exactly dtype",
    ),
    Tampering(
        "a name that a terminal obeys",
        with_bytes(WEIGHTS, safetensors_bytes({"\x1b[2J": entry()}, bytes(4))),
        reason="printable",
    ),
    Tampering(
        "a name that is no text",
        with_bytes(WEIGHTS, safetensors_bytes(b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}", bytes(4))),
        reason="printable",
    ),
    Tampering(
        "metadata that are no text",
        with_bytes(WEIGHTS, safetensors_bytes({"__metadata__": {"a": 1}})),
        reason="metadata",
    ),
    Tampering(
        "too many directions",
        with_bytes(
            BASIS,
            safetensors_bytes(
                {"__metadata__": {"format_version": "1"}, "a.input": entry(0, 20000, (1, 5000))}, bytes(20000)
            ),
        ),
        reason="at most 4096 directions",
    ),
    Tampering(
        "a basis of one number",
        on_tensors(BASIS, _set(INPUT, lambda u: u[0, 0])),
        reason="is a single number",
    ),
    Tampering(
        "a basis of another version",
        with_bytes(BASIS, safetensors_bytes({"__metadata__": {"format_version": "2"}, "a.input": entry()}, bytes(4))),
        reason="format version '2'",
    ),
    Tampering(
        "a basis of no space",
        with_bytes(BASIS, safetensors_bytes({"__metadata__": {"format_version": "1"}, "a.soul": entry()}, bytes(4))),
        reason="a.soul",
    ),
    Tampering("a link out of the folder", _link_out(WEIGHTS, ""), reason="link out of the folder"),
    Tampering("a link to a device", _link_out(CONFIG, "/dev/zero"), reason="link out of the folder"),
    Tampering("a dangling link", _link_out(CONFIG, "/nowhere"), reason="holds no readable"),
    Tampering("a link for the manifest", _link_out(MANIFEST, ""), reason="link out of the folder"),
    Tampering("a named pipe", _named_pipe, reason="not a regular file"),
    Tampering("a socket", _socket(CONFIG), reason="cannot be read"),
    Tampering("a folder for a file", _folder_for_file, reason="Is a directory"),
    Tampering("no manifest", lambda f: (f / MANIFEST).unlink(), reason="was not published with"),
    Tampering("no weights", lambda f: (f / WEIGHTS).unlink(), reason="lacks adapter_model"),
    Tampering("no weights, sealed", lambda f: [(f / WEIGHTS).unlink(), reseal(f)], reason="no adapter to check"),
    Tampering("no basis", lambda f: (f / BASIS).unlink(), reason="lacks concept_basis"),
    Tampering("names that differ by case", lambda f: (f / "Adapter_Model.safetensors").touch(), reason="Adapter_Model"),
    Tampering(
        "a look-alike of the config", lambda f: (f / "аdapter_config.json").touch(), reason="for, adapter_config"
    ),
    Tampering("a look-alike of the manifest", lambda f: (f / "gradproj․json").touch(), reason="for, gradproj.json"),
    Tampering("a name with an invisible letter", lambda f: (f / "gradproj\u200b.json").touch(), reason="for, gradproj"),
    Tampering("a digest of a file in a subfolder", _digest_of_subfolder, reason="without any path"),
    Tampering("a path in the manifest", with_text(MANIFEST, f'"{CONFIG}"', '"../secret"'), reason="without any path"),
    Tampering("an absolute path", with_text(MANIFEST, f'"{CONFIG}"', '"/etc/passwd"'), reason="without any path"),
    Tampering("a look-alike name", with_text(MANIFEST, "adapter_model", "аdapter_model"), reason="names out of"),
    Tampering("a manifest of bytes", with_bytes(MANIFEST, b"\xff\xfe{}"), reason="not valid JSON"),
    Tampering("an empty manifest", with_bytes(MANIFEST, b""), reason="not valid JSON"),
    Tampering("a manifest that is a list", with_bytes(MANIFEST, b"[]"), reason="expected a JSON object"),
    Tampering("a manifest over the limit", with_bytes(MANIFEST, b" " * (9 * 2**20)), reason="at most"),
    Tampering(
        "a thousand levels", with_text(MANIFEST, '"recipe": null', f'"recipe": {_nested(1000)}'), reason="levels deep"
    ),
    Tampering(
        "a million levels", with_text(MANIFEST, '"recipe": null', f'"recipe": {_nested(10**6)}'), reason="levels deep"
    ),
    Tampering("a huge number", with_text(MANIFEST, '"recipe": null', '"recipe": ' + "9" * 100), reason="100 digits"),
    Tampering("a number of no end", with_text(MANIFEST, '"recipe": null', '"recipe": 1e999'), reason="not finite"),
    Tampering("NaN in the manifest", with_text(MANIFEST, '"recipe": null', '"recipe": NaN'), reason="not finite"),
    Tampering("a key twice", with_text(MANIFEST, '"recipe"', '"settings": {}, "recipe"'), reason="'settings' twice"),
    Tampering("a version of megabytes", on_manifest(format_version="1" * 2**20), reason="has format version '1111"),
    Tampering("an unknown version", on_manifest(format_version=2), reason="format version 2"),
    Tampering("a version of truth", on_manifest(format_version=True), reason="format version True"),
    Tampering("a version of text", on_manifest(format_version="1"), reason="format version '1'"),
    *(
        Tampering(f"{key} malformed", on_manifest(**{key: value}), reason=f"'{key}' is missing or malformed")
        for key, value in {
            "concept": 1,
            "base_model": "someone/model",
            "settings": [],
            "files": {WEIGHTS: {"size": -1, "sha256": "x"}},
            "basis": {"published": "maybe", "digest": None},
            "leakage": {"down.conv": {"input": "none"}},
            "uncovered": [1],
            "versions": None,
            "recipe": [],
        }.items()
    ),
    Tampering(
        "a field missing", on_json(MANIFEST, lambda m: m.pop("uncovered")), reason="'uncovered' is missing or malformed"
    ),
    Tampering("a config of text", with_bytes(CONFIG, b'"hello"'), reason="expected a JSON object"),
    Tampering("a config of broken JSON", with_bytes(CONFIG, b"{"), reason="not valid JSON"),
]

TAMPERINGS = [*NOT_VERIFIED, *REFUSED]

HARMLESS = [
    Tampering("metadata of megabytes", lambda f: [
        save_file(load_file(f / WEIGHTS), f / WEIGHTS, {"x": "y" * 2**22}), reseal(f)]),
    Tampering("a card of a gigabyte", _sparse("README.md", 2**30)),
    Tampering("a log of five gigabytes", _sparse("training.log", 5 * 2**30)),
    Tampering("a pipe for a card", lambda f: os.mkfifo(f / "README.md")),
    Tampering("a socket beside it", _socket("socket")),
    Tampering("a deep tree beside it", _in_folder(_deep_tree)),
    Tampering("a name that is no text", _not_utf8(b"\xff\x1b.json")),
    Tampering("a name in another script", lambda f: (f / "адаптер_конфиг.json").touch()),
    Tampering("a second name of a file", _hard_link),
    Tampering("an adapter in a subfolder", _adapter_in_subfolder),
    Tampering("pickles that nobody loads", lambda f: [(f / "adapter_model.pt").touch(), (f / "lora.ckpt").touch()]),
    Tampering("an index of shards", lambda f: (f / "adapter_model.safetensors.index.json").write_text("{}")),
    Tampering("a regular expression", on_config(target_modules=r".*\.(to_q|to_out\.0|conv)")),
]  # fmt: skip
"""What changes nothing for those who load the adapter, so that it is verified all the same."""
