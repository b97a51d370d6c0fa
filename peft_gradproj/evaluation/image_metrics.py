r"""Metrics of samples, by models that the user brings: copy detection, agreement with the prompt, likeness to a set.

*Copy detection.* An embedder such as SSCD (arXiv 2202.10261) maps copies of a picture to vectors of high cosine. With
:math:`e` the normalised embedding, the score of a sample is :math:`\max_{q, c} e(q)^T e(c)`, over pictures :math:`q` of
the concept and crops :math:`c` of the sample: the whole sample, or a grid of squares of the sizes that the concept has
in its own pictures. The maximum over many crops is above 0 for any picture, so that it means something only beside
the scores of pictures without the concept.

*Agreement with the prompt* is torchmetrics' CLIP score; *likeness to a set* the kernel inception distance (KID), on
whatever features are brought.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import BehaviourError
from ..training_data import first_line
from .figures import Estimate

__all__ = ["ClipScorer", "CopyDetector", "KernelDistance", "concept_box", "crop_sizes", "square_crops"]

Progress = Callable[[int], object]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BATCH = 32
_ROWS = 256
"""Of a kernel's matrix at once, which may be larger than the memory."""


# Copy detection


class CopyDetector:
    """A copy-detection model from a file.

    | file | what it is called with |
    |---|---|
    | TorchScript | float32 `(n, 3, 288, 288)`, normalised with ImageNet's mean and deviation |
    | `.onnx` with an input of floats | the same, in the size that the input has, if it has one |
    | `.onnx` with an input of bytes | uint8 `(n, 288, 288, 3)` |

    Args:
        path: The file.
        device: Where TorchScript runs; ONNX runs where onnxruntime finds best.

    Raises:
        BehaviourError: If the file is no such model, or onnxruntime is needed and not installed.
    """

    def __init__(self, path: str | Path, *, device: str | torch.device = "cpu") -> None:
        self._path, self._side = Path(path), 288
        if not self._path.is_file():
            raise BehaviourError(f"there is no copy-detection model at {path}; expected a TorchScript or ONNX file.")
        if self._path.suffix == ".onnx":
            self._run, self._takes_bytes, self._batch = self._opened_onnx()
        else:
            self._run, self._takes_bytes, self._batch = _on(device, _torchscript(self._path)), False, _BATCH

    def _opened_onnx(self) -> tuple[Callable[[Tensor], Tensor], bool, int]:
        try:
            import onnxruntime
        except ImportError as error:
            raise BehaviourError(
                f"{self._path} is an ONNX model, and onnxruntime is not installed: pip install 'peft-gradproj[eval]'."
            ) from error
        try:
            session = onnxruntime.InferenceSession(str(self._path), providers=onnxruntime.get_available_providers())
        except Exception as error:  # its own, of many classes
            raise BehaviourError(f"{self._path} cannot be loaded as an ONNX model: {first_line(error)}") from error
        (argument, *others) = session.get_inputs()
        shape, takes_bytes = argument.shape, argument.type == "tensor(uint8)"
        channels = shape[-1 if takes_bytes else 1] if len(shape) == 4 else None
        if others or argument.type not in ("tensor(uint8)", "tensor(float)") or channels != 3:
            raise BehaviourError(
                f"{self._path} takes {argument.type} of shape {shape}; expected one input, uint8 (n, h, w, 3) or float "
                "(n, 3, h, w)."
            )
        side = shape[1 if takes_bytes else 2]
        self._side = side if isinstance(side, int) else self._side

        fixed = shape[0] if isinstance(shape[0], int) else None

        def run(pixels: Tensor) -> Tensor:
            count = len(pixels)
            if fixed is not None and count < fixed:
                pixels = torch.cat([pixels, pixels[-1:].expand(fixed - count, *pixels.shape[1:])])
            try:
                found = session.run(None, {argument.name: pixels.numpy()})[0]
            except Exception as error:  # its own, of many classes
                raise ValueError(str(error)) from error
            return torch.from_numpy(found[:count] if fixed is not None else found)

        return run, takes_bytes, fixed or _BATCH

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of pictures of any size, which are scaled to squares; float32, shape `(n, d)`, of norm 1.

        Raises:
            BehaviourError: If the model does not give one finite vector for each picture.
        """
        parts = []
        for start in range(0, len(pictures), self._batch):
            part = pictures[start : start + self._batch]
            try:
                found = self._run(self._pixels(part)).float().cpu()
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise BehaviourError(f"{self._path} does not take pictures: {first_line(error)}") from error
            parts.append(nn.functional.normalize(_vectors(found, len(part), self._path), dim=1))
        return torch.cat(parts)

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        squares = _scaled(pictures, self._side)
        if self._takes_bytes:
            return squares.permute(0, 2, 3, 1).contiguous()
        mean, std = (torch.tensor(values)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD))
        return (squares / 255 - mean) / std

    def scores(
        self,
        pictures: Sequence[Image.Image],
        concept: Tensor,
        *,
        sizes: Sequence[float] = (1.0,),
        progress: Progress = lambda count: None,
    ) -> Tensor:
        """The largest cosine of any crop of a picture with each of the concept's embeddings, shape `(N, M)`.

        Args:
            pictures: `N` of them.
            concept: From :meth:`embed`, shape `(M, d)`.
            sizes: Sides of the crops, as shares of the picture's shorter side; 1 alone is the whole picture.
            progress: Called with 1 after each picture.
        """
        scores = []
        for picture in pictures:
            crops = [picture] if list(sizes) == [1.0] else square_crops(picture, sizes)
            scores.append((self.embed(crops) @ concept.T).amax(0))
            progress(1)
        return torch.stack(scores)


def square_crops(picture: Image.Image, sizes: Sequence[float], *, stride: float = 0.5) -> list[Image.Image]:
    """Squares on a grid that covers a picture.

    Args:
        picture: Any.
        sizes: Sides of the squares, as shares of the picture's shorter side, in (0, 1].
        stride: Largest distance between neighbours, as a share of their side.
    """
    crops = []
    for size in sizes:
        side = max(1, round(size * min(picture.size)))
        for top in _places(picture.height - side, stride * side):
            for left in _places(picture.width - side, stride * side):
                crops.append(picture.crop((left, top, left + side, top + side)))
    return crops


def _places(room: int, step: float) -> list[int]:
    return [round(place) for place in np.linspace(0, room, math.ceil(room / max(step, 1)) + 1)]


def concept_box(mask: Image.Image, *, smallest: float = 0.0) -> tuple[int, int, int, int]:
    """The smallest square in a picture around its mask, as left, top, right and lower edge.

    Where the mask is longer than the picture is wide or high, the square is as large as the picture allows.

    Args:
        mask: Mode L, not empty.
        smallest: Least side of the square, as a share of the picture's shorter side, in [0, 1].
    """
    box: Any = mask.getbbox()
    side = min(max(box[2] - box[0], box[3] - box[1], math.ceil(smallest * min(mask.size))), *mask.size)
    left, top = (min(max(0, (box[i] + box[i + 2] - side) // 2), mask.size[i] - side) for i in (0, 1))
    return left, top, left + side, top + side


def crop_sizes(boxes: Sequence[tuple[int, int, int, int]], shorter_sides: Sequence[int]) -> list[float]:
    """Sizes for :func:`square_crops` from the smallest to the largest of boxes, at most a factor of 1.4 apart."""
    shares = [(box[2] - box[0]) / side for box, side in zip(boxes, shorter_sides, strict=True)]
    low, high = min(shares), max(shares)
    return [float(size) for size in np.geomspace(low, high, math.ceil(math.log(high / low, 1.4) - 1e-9) + 1)]


# Agreement with the prompt


class ClipScorer:
    """torchmetrics' CLIP score with a CLIP model from a folder or the Hub.

    Args:
        path_or_id: With model, tokenizer and image processor.
        device: Where it runs.

    Raises:
        BehaviourError: If there is no such model, or torchmetrics is not installed.
    """

    def __init__(self, path_or_id: str, *, device: str | torch.device = "cpu") -> None:
        _require_torchmetrics()
        from torchmetrics.multimodal import CLIPScore
        from transformers import CLIPModel, CLIPProcessor

        self._name = path_or_id
        model: Any = _Features(_pretrained(CLIPModel, path_or_id))
        most = model.config.text_config.max_position_embeddings
        processor: Any = _Inputs(_pretrained(CLIPProcessor, path_or_id), most)
        self._metric: Any = CLIPScore(model_name_or_path=lambda: (model, processor)).to(device)

    def scores(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], *, progress: Progress = lambda count: None
    ) -> Tensor:
        """100 times the cosine of each picture with its prompt, as far as it is read, at least 0; shape `(N,)`.

        Raises:
            BehaviourError: If they are not finite.
        """
        scores = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            self._metric.reset()
            with torch.no_grad():
                self._metric.update(_bytes(picture).to(self._metric.device), prompt)
            scores.append(self._metric.compute().cpu())
            progress(1)
        return _finite(torch.stack(scores), self._name, "scores")


class _Inputs:
    """A CLIP processor that cuts prompts before their end token.

    torchmetrics cuts it off with the rest, and CLIP takes the embedding of a text from its place: without it from that
    of the start token, which is the same for all texts.
    """

    def __init__(self, processor: Any, most: int) -> None:
        self.processor, self.most = processor, most

    def __call__(self, **given: Any) -> Any:
        options = {"truncation": True, "max_length": self.most} if "text" in given else {}
        return self.processor(**given, **options)


class _Features(nn.Module):
    """A CLIP model that gives tensors, as torchmetrics expects; transformers gives objects that hold them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model.eval(), model.config

    def get_image_features(self, *arguments: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(*arguments))  # type: ignore[operator]

    def get_text_features(self, *arguments: Tensor) -> Tensor:
        return _pooled(self.model.get_text_features(*arguments))  # type: ignore[operator]


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


# Likeness to a set


class KernelDistance:
    r"""Kernel inception distance (arXiv 1801.01401) between two sets of pictures, with torchmetrics' kernel.

    It is the squared maximum mean discrepancy

    .. math:: \overline{k(x_i, x_j)}_{i \ne j} + \overline{k(y_i, y_j)}_{i \ne j} - 2\,\overline{k(x_i, y_j)}

    of all features, unbiased, so that it may be below 0 where two sets are alike. Its standard error is the delete-half
    jackknife's: how far the distance between halves of both sets, drawn at random, is from it. Where the sets are alike
    the terms of second order matter, which halves have more of, and it is up to :math:`\sqrt{3}` times too large.

    Args:
        path_or_id: TorchScript that takes uint8 `(n, 3, H, W)` and gives features `(n, d)` (with `return_features=True`
            where it has that argument); or a CLIP model's folder or Hub id, of which the part that sees is used.
        device: Where the features are computed.
        seed: Of the halves.

    Raises:
        BehaviourError: If there is no such model, or torchmetrics is not installed.
    """

    halves = 100
    fewest = 4
    """Pictures of each set, that halves of it can differ."""

    def __init__(self, path_or_id: str, *, device: str | torch.device = "cpu", seed: int = 0) -> None:
        _require_torchmetrics()
        model = _ScriptFeatures(path_or_id) if Path(path_or_id).is_file() else _ClipVision(path_or_id)
        self._model, self._name, self._device, self._seed = model.eval().to(device), path_or_id, device, seed

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], *, progress: Progress = lambda count: None) -> Tensor:
        """Features of pictures of one size, float64 on the CPU, shape `(N, d)`.

        Raises:
            BehaviourError: If the model does not give one finite vector for each picture.
        """
        parts = []
        for start in range(0, len(pictures), _BATCH):
            part = torch.stack([_bytes(picture) for picture in pictures[start : start + _BATCH]])
            try:
                found = self._model(part.to(self._device)).double().cpu()
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise BehaviourError(f"{self._name} does not take pictures: {first_line(error)}") from error
            parts.append(_vectors(found, len(part), self._name))
            progress(len(part))
        return torch.cat(parts)

    def distance(self, features: Tensor, reference: Tensor) -> Estimate:
        """The distance of features `(N, d)` from those of the reference `(M, d)`, both at least `fewest`."""
        generator = torch.Generator().manual_seed(self._seed)
        whole, *halves = _discrepancies(
            features, reference, *(self._parts(len(x), generator) for x in (features, reference))
        )
        return Estimate(float(whole), float((torch.stack(halves) - whole).square().mean().sqrt()))

    def _parts(self, count: int, generator: torch.Generator) -> Tensor:
        """All of a set, then halves of it: 1 for what is in a part, shape `(1 + halves, count)`."""
        orders = torch.rand(self.halves, count, generator=generator).argsort(1)
        return torch.cat([torch.ones(1, count), orders < count // 2]).double()


def _discrepancies(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """Squared maximum mean discrepancies of parts of two sets, shape `(S,)`.

    Args:
        x: Features, float64, shape `(N, d)`.
        y: Others, shape `(M, d)`.
        in_x: Which of the first are in each part, shape `(S, N)`.
        in_y: Which of the others are, shape `(S, M)`.
    """
    from torchmetrics.image.kid import poly_kernel

    def mean(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor) -> Tensor:
        total = torch.zeros(len(in_a), dtype=a.dtype)
        for start in range(0, len(a), _ROWS):
            rows = slice(start, start + _ROWS)
            kernel = poly_kernel(a[rows], b)
            if a is b:
                kernel.diagonal(start).zero_()
            total += ((in_a[:, rows] @ kernel) * in_b).sum(1)
        return total / (in_a.sum(1) * (in_b.sum(1) - int(a is b)))

    return mean(x, x, in_x, in_x) + mean(y, y, in_y, in_y) - 2 * mean(x, y, in_x, in_y)


class _ScriptFeatures(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.script = _torchscript(Path(path))
        names = {argument.name for argument in self.script.forward.schema.arguments}
        self.options = {"return_features": True} if "return_features" in names else {}

    def forward(self, pictures: Tensor) -> Tensor:
        return self.script(pictures, **self.options)


class _ClipVision(nn.Module):
    def __init__(self, path_or_id: str) -> None:
        super().__init__()
        from transformers import AutoConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection

        self.whole = _pretrained(AutoConfig, path_or_id).model_type == "clip"
        self.model = _pretrained(CLIPModel if self.whole else CLIPVisionModelWithProjection, path_or_id)
        self.processor = _pretrained(CLIPImageProcessor, path_or_id)

    def forward(self, pictures: Tensor) -> Tensor:
        pixels = self.processor(list(pictures.cpu()), return_tensors="pt")["pixel_values"].to(pictures.device)
        return _pooled(self.model.get_image_features(pixels)) if self.whole else self.model(pixels).image_embeds


# Models and pictures


def _pretrained(kind: Any, path_or_id: str) -> Any:
    try:
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(path_or_id)
        model, info = kind.from_pretrained(path_or_id, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, ImportError, KeyError) as error:
        raise BehaviourError(
            f"there is no {kind.__name__} of transformers at {path_or_id}: {first_line(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers draws them at random, and only logs it.
        raise BehaviourError(
            f"there is no {kind.__name__} of transformers at {path_or_id}: {len(missing)} of its weights, such as "
            f"{missing[0]}, are not in the file. Is it another kind of model, or a part of one?"
        )
    return model


def _torchscript(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise BehaviourError(f"{path} cannot be loaded as TorchScript: {first_line(error)}") from error


def _on(device: str | torch.device, script: Any) -> Callable[[Tensor], Tensor]:
    script = script.to(device)
    return lambda pixels: script(pixels.to(device))


def _vectors(found: Tensor, count: int, name: str | Path) -> Tensor:
    if found.ndim != 2 or found.shape[0] != count:
        raise BehaviourError(f"{name} gives shape {tuple(found.shape)} for {count} pictures; expected one vector each.")
    # No similarity is above a threshold then, and the concept would pass for not found.
    return _finite(found, name, "vectors")


def _finite(found: Tensor, name: str | Path, what: str) -> Tensor:
    if not found.isfinite().all():
        raise BehaviourError(f"{name} gives {what} that are not finite; does it overflow in half precision?")
    return found


def _require_torchmetrics() -> None:
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise BehaviourError("torchmetrics is not installed: pip install 'peft-gradproj[eval]'.") from error


def _bytes(picture: Image.Image) -> Tensor:
    """uint8, shape `(3, H, W)`."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _scaled(pictures: Sequence[Image.Image], side: int) -> Tensor:
    """uint8, shape `(n, 3, side, side)`."""
    resampling = Image.Resampling.BILINEAR
    return torch.stack([_bytes(picture.convert("RGB").resize((side, side), resampling)) for picture in pictures])
