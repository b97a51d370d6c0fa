r"""Fitting a concept basis: which directions of a layer's spaces the concept takes, in contrast to a reference.

Raw activations are dominated by what all examples share, a mean or the first token, and a basis of those would block
all learning. Two contrasts leave it out:

- `pairs`: the reference batches are the concept batches without the concept, with the same noise and timestep; the
  basis holds the leading eigenvectors of the second moments of the differences, :math:`E[(x - x')(x - x')^T]`;
- `generalized`: any two sets; the solutions of :math:`C_c u = \lambda R u`, with :math:`R = C_r + \epsilon \bar c_r I`
  and large :math:`\lambda`, the ratio of the energies, tell the concept best; the basis holds what it adds there, the
  patterns :math:`R u` (see `second_moments.contrast_patterns`). Both moments are about the mean of the reference.

| space | vectors | contrast |
|---|---|---|
| `input` | the inputs x of the base's layer, one a token; of a convolution its patches | pairs or generalized |
| `output` | the outputs y of the base's layer, without any adapter | pairs or generalized |
| `rank` | :math:`z = A x` and :math:`B^T \delta`, each scaled to unit energy on the reference set | generalized |
| `gradient` | the flattened gradients of A and B, one a batch | pairs, generalized, or none |

Activations are not collected: those of at most `max_positions` positions of a batch, or of both halves of a pair, enter
second moments and are let go. Padding, which an `attention_mask` of shape `(b, n)` tells, does not enter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._version import __version__
from .base_models import unwrapped
from .basis import SPACES, ConceptBasis, LayerBasis
from .contrast import BatchesDigest
from .errors import ConceptBasisError, ConceptDataError
from .model_arguments import attention_masks, place_arguments, unshared
from .observation import (
    Choice,
    Features,
    LayerGradients,
    TargetLayer,
    Vectors,
    find_adapter,
    find_layers,
    observe_features,
    observe_gradients,
    undisturbed,
)
from .probes import placement
from .projection import dtype_name, truncation_rank
from .second_moments import SecondMoment, common_subspace, contrast_patterns, excess_share

__all__ = ["Contrast", "fit_concept_basis"]

Contrast = Literal["pairs", "generalized"]
RunModel = Callable[[nn.Module, Any], Any]
LossFn = Callable[[Any, Any], Tensor]
Role = Literal["fit", "held_out", "reference"]

_HALF_PRECISION = 1e-8
"""Above it, and below the square of float16's epsilon, is no dtype's."""

_NO_CONTRAST = 1e-10
"""Differences with less than this share of the energy are rounding; half precision has its own, larger floor."""

_TINY = torch.finfo(torch.float32).tiny

_NO_DIRECTION = 1e-6
"""Eigenvalues of differences below this share of the largest are rounding."""


@dataclass(frozen=True)
class _Options:
    """The arguments of :func:`fit_concept_basis` that say how to fit."""

    spaces: tuple[str, ...]
    rank: int | None
    energy: float | None
    contrast: Contrast
    epsilon: float
    threshold: float
    held_out: float
    max_reference_overlap: float
    unfit: Literal["refuse", "skip"]
    max_positions: int
    seed: int

    def __post_init__(self) -> None:
        if not self.spaces or any(space not in SPACES for space in self.spaces):
            raise ConceptBasisError(f"spaces={self.spaces!r}; expected a list of some of {', '.join(SPACES)}.")
        if self.contrast not in ("pairs", "generalized"):
            raise ConceptBasisError(f"contrast={self.contrast!r}; expected 'pairs' or 'generalized'.")
        if self.unfit not in ("refuse", "skip"):
            raise ConceptBasisError(f"unfit={self.unfit!r}; expected 'refuse' or 'skip'.")
        if self.rank is None and self.energy is None:
            raise ConceptBasisError("neither rank nor energy is given; expected one, to say how much to keep.")
        if self.rank is not None and self.rank < 1:
            raise ConceptBasisError(f"rank={self.rank}; expected at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConceptBasisError(f"energy={self.energy}; expected a share in (0, 1].")
        if not 0 <= self.held_out <= 0.5:
            raise ConceptBasisError(f"held_out={self.held_out}; expected a share in [0, 0.5].")
        if self.epsilon <= 0 or self.max_positions < 1:
            raise ConceptBasisError(
                f"epsilon={self.epsilon}, max_positions={self.max_positions}; expected a positive number of each."
            )

    def wants(self, *spaces: str) -> bool:
        """Whether one of `spaces` is asked for."""
        return any(space in self.spaces for space in spaces)


def fit_concept_basis(
    model: nn.Module,
    concept_batches: Iterable[Any],
    reference_batches: Iterable[Any] | None = None,
    *,
    target_modules: str | Sequence[str],
    run_model: RunModel | None = None,
    spaces: Sequence[str] = ("input", "output"),
    rank: int | None = 16,
    energy: float | None = None,
    contrast: Contrast = "pairs",
    epsilon: float = 1e-3,
    threshold: float = 2.0,
    held_out: float = 0.2,
    max_reference_overlap: float = 0.9,
    unfit: Literal["refuse", "skip"] = "refuse",
    loss_fn: LossFn | None = None,
    adapter_name: str | None = None,
    max_positions: int = 512,
    concept: str = "",
    base_model: str | None = None,
    revision: str | None = None,
    source: str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> ConceptBasis:
    r"""Fit a concept basis to a model, from examples with the concept and examples without.

    The model is left as it was found. Every layer's report is in `basis.fit["layers"][module][space]`: `k`, `d`,
    `energy` (share of the contrast energy of held-out concept batches that the basis holds, `None` without any) and
    `reference_overlap` (share of the reference set's energy that it holds: what of other learning it blocks). Layers
    without contrast, such as the text projections of pairs under equal captions, get no basis;
    `basis.fit["left_out"][module][space]` says why. The rest of `basis.fit` is the recipe, by which others can fit the
    basis anew from the same batches (see `refit`); `basis.fit["concept_set"]["sha256"]` is the digest of these, or
    `None` if they hold something else than tensors.

    Args:
        model: A bare model, or one with adapters injected. Names of layers are those of the bare model. Of one of
            `torch.compile` or `DistributedDataParallel`, the model within is run.
        concept_batches: Batches that show the concept, as `run_model` takes them. Positions that an `attention_mask`
            of shape `(b, n)` in them leaves out do not count.
        reference_batches: Batches that do not; with `contrast="pairs"` the same batches without the concept, in the
            same order and of the same shapes. Only the `gradient` space can do without.
        target_modules: Layers to fit, as in `LoraConfig`: names, ends of names, a regular expression, `"all-linear"`.
        run_model: `run_model(model, batch)` runs the forward pass; `model(**batch)` by default, on the model's device
            and in its dtype. The random state is the same for both halves of a pair, so that noise drawn here is the
            same noise.
        spaces: Some of `input`, `output`, `rank`, `gradient`; the latter two need an adapter and `loss_fn`.
        rank: Most directions per layer and space.
        energy: Keep the fewest directions that hold this share, in (0, 1], of the contrast energy; within `rank`.
        contrast: `pairs` or `generalized`.
        epsilon: Ridge of the generalised eigenproblem, relative to the mean energy of a direction.
        threshold: Least :math:`\lambda` of a direction in the generalised eigenproblem.
        held_out: Share in [0, 0.5] of the batches that is not fitted but reported on, at least one of two.
        max_reference_overlap: A basis with more of the reference set's energy is harmful.
        unfit: What is done with a basis that is harmful, or has more directions than half the width: `refuse` raises
            an error that names the layers, `skip` leaves them out.
        loss_fn: `loss_fn(output, batch)`, with what `run_model` returned, gives the scalar loss of `batch`.
        adapter_name: The adapter of the `rank` and `gradient` spaces; may be omitted if there is one.
        max_positions: Tokens or patches per layer and batch that enter the statistics, a random choice beyond.
        concept: What the concept is called.
        base_model: Identifier of the base model, kept in the basis.
        revision: Its revision, likewise.
        source: Where the batches can be had, such as a data set on the Hub and its revision; likewise.
        progress: Show progress bars.
        seed: Seeds the choice of positions and the model's random state.

    Returns:
        The concept basis, of all layers that have one.

    Raises:
        ConceptBasisError: If an argument is out of range, no module matches, one is of a kind that has no basis, or
            no layer, or a harmful one, would get a basis.
        ConceptDataError: If there are no batches, halves do not pair, a value is not finite, or an adapter is merged
            into a layer.
    """
    options = _Options(
        (spaces,) if isinstance(spaces, str) else tuple(spaces),
        rank,
        energy,
        contrast,
        epsilon,
        threshold,
        held_out,
        max_reference_overlap,
        unfit,
        max_positions,
        seed,
    )
    if loss_fn is None and options.wants("rank", "gradient"):
        raise ConceptBasisError("the rank and gradient spaces need loss_fn(output, batch), the loss to differentiate.")
    if reference_batches is None and options.wants("input", "output", "rank"):
        raise ConceptDataError(
            "reference_batches are missing; without them a basis holds what all examples share, and blocks all "
            "learning. Only spaces=('gradient',) can be fitted without."
        )
    model = unwrapped(model)
    layers = find_layers(model, target_modules)
    if options.wants("rank", "gradient"):
        adapter_name = find_adapter(layers, adapter_name)
    statistics = _Statistics(layers, options)
    with undisturbed(model, seed=seed), _Observer(model, layers, options, run_model, loss_fn, adapter_name) as observe:
        digest = BatchesDigest()
        counts = _stream(statistics, observe, concept_batches, reference_batches, digest, progress)
    solutions = _solve_all(statistics, layers, options, progress)
    _refuse_unfit(solutions, options)
    bases = _bases(layers, solutions)
    fit = {
        "method": contrast,
        "spaces": list(options.spaces),
        "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
        "rank": rank,
        "energy": energy,
        "epsilon": epsilon,
        "threshold": threshold,
        "held_out": held_out,
        "max_reference_overlap": max_reference_overlap,
        "max_positions": max_positions,
        "unfit": unfit,
        "run_model": "model(**batch)" if run_model is None else "custom",
        "concept_set": {"sha256": digest.hexdigest(), "source": source},
        "batches": counts,
        "adapter_name": adapter_name,
        "seed": seed,
        "model_class": type(model).__name__,
        "dtype": next((dtype_name(p.dtype) for p in model.parameters() if p.is_floating_point()), None),
        "versions": _versions(),
        "layers": _by_layer(solutions, lambda solution: None if solution.reason else solution.report),
        "left_out": _by_layer(solutions, lambda solution: solution.reason),
    }
    return ConceptBasis(bases, concept, base_model, revision, fit)


def _versions() -> dict[str, str]:
    import peft

    return {"peft_gradproj": __version__, "peft": peft.__version__, "torch": str(torch.__version__)}


# Observing batches


@dataclass(frozen=True)
class _Observed:
    """What the layers showed on one batch."""

    features: Features | None
    gradients: dict[str, LayerGradients] | None


class _Observer:
    """Runs the model on a batch, with the hooks that the spaces need, while it is entered."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[TargetLayer],
        options: _Options,
        run_model: RunModel | None,
        loss_fn: LossFn | None,
        adapter_name: str | None,
    ) -> None:
        self.model, self._layers, self._options = model, layers, options
        self._run_model, self._loss_fn, self._adapter_name = run_model or _call, loss_fn, adapter_name
        self._stack = ExitStack()

    def __enter__(self) -> _Observer:
        self._features = self._gradients = None
        if self._options.wants("input", "output"):
            context = observe_features(self.model, self._layers, self._options.spaces)
            self._features = self._stack.enter_context(context)
        if self._loss_fn is not None and self._adapter_name is not None and self._options.wants("rank", "gradient"):
            self._gradients = self._stack.enter_context(observe_gradients(self.model, self._layers, self._adapter_name))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def __call__(self, index: int, batch: Any, choose: Choice) -> _Observed:
        """Observe the batch of one index; the random state depends on the index alone."""

        def forward() -> Any:
            torch.manual_seed(self._options.seed + index)
            return self._run_model(self.model, unshared(batch))  # it is run twice, and is the loss's as well

        def loss() -> Tensor:
            assert self._loss_fn is not None
            return self._loss_fn(forward(), batch)

        # The batches may draw from the same random state, and would draw the same again and again.
        with torch.random.fork_rng():
            return _Observed(
                None if self._features is None else self._features(forward, choose),
                None if self._gradients is None else self._gradients(loss),
            )


def _choice(options: _Options, index: int, masks: Sequence[Tensor]) -> Choice:
    """Which positions of the batch of one index enter, of all layers alike, and of both halves of a pair."""

    @cache
    def choose(shape: tuple[int, ...]) -> Tensor | None:
        """All that are no padding (`None`: all), or `max_positions` of them."""
        # Of several sequences of one length, none can be told from the other.
        known = [mask for mask in masks if shape in (tuple(mask.shape), (mask.numel(),))]
        content = known[0].flatten().nonzero().flatten() if len(known) == 1 and not known[0].all() else None
        count = prod(shape) if content is None else len(content)
        if count <= options.max_positions:
            return content
        generator = torch.Generator().manual_seed((options.seed * 1_000_003 + index) % 2**63)
        chosen = torch.randperm(count, generator=generator, device="cpu")[: options.max_positions]
        return chosen if content is None else content[chosen]

    return choose


def _content(model: nn.Module, *halves: Any) -> list[Tensor]:
    """Which positions are no padding, in all halves: a mask `(b, n)` for each sequence that the batches say it of."""
    masks = [attention_masks(model, half) if isinstance(half, Mapping) else [] for half in halves]
    if len({tuple(mask.shape for mask in of_half) for of_half in masks}) > 1:
        return masks[0]
    return [torch.stack(of_halves).all(0) for of_halves in zip(*masks, strict=True)]


def _call(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)`, on the model's device and in its dtype, with names with dots nested, as probes are run."""
    if not isinstance(batch, Mapping):
        raise ConceptDataError(
            f"a batch is a {type(batch).__name__}, and model(**batch) needs a mapping; pass run_model=lambda model, "
            "batch: ... to say how the model is called."
        )
    return model(**place_arguments(batch, *placement(model)))


def _stream(
    statistics: _Statistics,
    observe: _Observer,
    concept_batches: Iterable[Any],
    reference_batches: Iterable[Any] | None,
    digest: BatchesDigest,
    progress: bool,
) -> dict[str, int]:
    """Take the statistics of all batches; returns how many there were."""
    counts = {"concept": 0, "reference": 0, "held_out": 0}
    paired = reference_batches is not None and statistics.options.contrast == "pairs"
    stream = _in_pairs(concept_batches, reference_batches or ()) if paired else ((b, None) for b in concept_batches)
    total = len(concept_batches) if isinstance(concept_batches, Sized) else None
    for index, (batch, partner) in enumerate(_progress(stream, total, "concept batches", progress)):
        role = _role(index, statistics.options.held_out)
        digest.add("concept", batch)
        if paired:
            digest.add("reference", partner)
        halves = (batch, partner) if paired else (batch,)
        choose = _choice(statistics.options, index, _content(observe.model, *halves))
        statistics.add(role, choose, *(observe(index, half, choose) for half in halves))
        counts["concept"] += 1
        counts["held_out"] += role == "held_out"
        counts["reference"] += paired
    if reference_batches is not None and not paired:
        total = len(reference_batches) if isinstance(reference_batches, Sized) else None
        for index, batch in enumerate(_progress(reference_batches, total, "reference batches", progress)):
            digest.add("reference", batch)
            choose = _choice(statistics.options, index, _content(observe.model, batch))
            statistics.add("reference", choose, observe(index, batch, choose))
            counts["reference"] += 1
    for name in ("concept",) if reference_batches is None else ("concept", "reference"):
        if not counts[name]:
            raise ConceptDataError(f"{name}_batches are empty; expected at least one batch.")
    return counts


def _in_pairs(concept_batches: Iterable[Any], reference_batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    missing = object()
    for index, pair in enumerate(zip_longest(concept_batches, reference_batches, fillvalue=missing)):
        for batch, name in zip(pair, ("concept_batches", "reference_batches"), strict=True):
            if batch is missing:
                raise ConceptDataError(
                    f"{name} ended after {index} batches, before the other half; contrast='pairs' needs, for each "
                    "batch with the concept, the same batch without. Use contrast='generalized' for sets that differ."
                )
        yield pair


def _role(index: int, held_out: float) -> Role:
    """Every n-th batch is held out, from the second on, so that two batches suffice."""
    return "held_out" if held_out > 0 and index % round(1 / held_out) == 1 else "fit"


def _progress(items: Iterable[Any], total: int | None, what: str, show: bool) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, total=total, desc=f"Concept basis: {what}", disable=not show)


# Statistics


@dataclass
class _Contrasted:
    """The second moments of one kind of vectors of one layer."""

    fit: SecondMoment
    """Of the concept, or of the differences of pairs."""

    held_out: SecondMoment
    """The same, of batches that are not fitted."""

    reference: SecondMoment
    """Of the reference set."""

    centred: bool = True
    """Whether the generalised contrast is about the reference's mean; gradients are about 0, where nothing moves."""

    floor: float = _NO_CONTRAST
    """Share of the reference's energy below which differences are rounding."""

    @classmethod
    def of_width(cls, width: int, options: _Options, *, centred: bool = True) -> _Contrasted:
        """Without any vectors yet."""
        rows = max(64, 4 * (options.rank or 32))
        fit, held_out, reference = (SecondMoment(width, sketch_rows=rows) for _ in range(3))
        return cls(fit, held_out, reference, centred)

    @property
    def origin(self) -> Tensor:
        """The point from which the generalised contrast counts vectors, shape `(d,)`."""
        return self.reference.mean if self.centred else torch.zeros_like(self.reference.mean)

    def add(self, role: Role, vectors: Tensor) -> None:
        """Take in vectors of shape `(n, d)`."""
        if vectors.is_floating_point():
            self.floor = max(self.floor, torch.finfo(vectors.dtype).eps ** 2)
        getattr(self, role).update(vectors)


class _Statistics:
    """The second moments of all layers and spaces, fed batch by batch."""

    def __init__(self, layers: Sequence[TargetLayer], options: _Options) -> None:
        self.options = options
        self._layers = {layer.name: layer for layer in layers}
        self._of: dict[str, dict[str, _Contrasted]] = {"output": {}, "down": {}, "up": {}, "gradient": {}}
        # All layers of one width begin with one statistic, and part when their inputs do.
        by_width: dict[int, _Contrasted] = {}
        if options.wants("input"):
            for layer in layers:
                by_width.setdefault(layer.d_in, _Contrasted.of_width(layer.d_in, options))
        self._of["input"] = {layer.name: by_width[layer.d_in] for layer in layers} if by_width else {}

    def __getitem__(self, key: tuple[str, str]) -> _Contrasted | None:
        """The statistic of a kind of vectors (`input`, `output`, `down`, `up`, `gradient`) and a layer, if any."""
        return self._of[key[0]].get(key[1])

    def add(self, role: Role, choose: Choice, observed: _Observed, without: _Observed | None = None) -> None:
        """Take in a batch, of the concept or the reference set; of a pair, the difference and the reference half."""
        self._add_features(role, observed.features, None if without is None else without.features)
        self._add_gradients(role, choose, observed.gradients, None if without is None else without.gradients)

    def _add_features(self, role: Role, features: Features | None, without: Features | None) -> None:
        if features is None:
            return
        for name in self._input_leaders(features, without):
            pairs = _calls(
                name, "input", features.inputs[name], None if without is None else without.inputs.get(name, [])
            )
            self._add(role, self._of["input"][name], "input", name, pairs)
        for name, outputs in features.outputs.items():
            pairs = _calls(name, "output", outputs, None if without is None else without.outputs.get(name, []))
            self._add(role, self._statistic("output", name, self._layers[name].d_out), "output", name, pairs)

    def _input_leaders(self, features: Features, without: Features | None) -> list[str]:
        """One layer of each group that has had the same inputs in every forward pass so far.

        Layers whose inputs are the same so far share one statistic. Where they part, each goes on with a copy.
        """
        groups: dict[tuple[int, Any], tuple[str, _Contrasted]] = {}
        taken: set[int] = set()
        for name, statistic in self._of["input"].items():
            source = (features.sources.get(name), None if without is None else without.sources.get(name))
            key = (id(statistic), source)
            if key not in groups:
                groups[key] = (name, copy.deepcopy(statistic) if id(statistic) in taken else statistic)
                taken.add(id(statistic))
            self._of["input"][name] = groups[key][1]
        return [name for name, _ in groups.values() if name in features.inputs]

    def _add_gradients(
        self,
        role: Role,
        choose: Choice,
        gradients: Mapping[str, LayerGradients] | None,
        without: Mapping[str, LayerGradients] | None,
    ) -> None:
        for name, layer in (gradients or {}).items():
            partner = None if without is None else without.get(name)
            if self.options.wants("rank"):
                self._add_rank(role, choose, name, layer)
                if partner is not None:
                    self._add_rank("reference", choose, name, partner)
            if self.options.wants("gradient"):
                statistic = self._statistic("gradient", name, layer.flat.numel())
                pairs = [(layer.flat[None], None if partner is None else partner.flat[None])]
                self._add(role, statistic, "gradient", name, pairs)

    def _add_rank(self, role: Role, choose: Choice, name: str, layer: LayerGradients) -> None:
        for kind, tensors in (("down", layer.down), ("up", layer.up)):
            vectors = [self._layers[name].output_vectors(tensor, choose) for tensor in tensors]
            statistic = self._statistic(kind, name, vectors[0].shape[1])
            self._add(role, statistic, "rank", name, [(part, None) for part in vectors])

    def _statistic(self, kind: str, name: str, width: int) -> _Contrasted:
        if name not in self._of[kind]:
            centred = kind not in ("up", "gradient")
            self._of[kind][name] = _Contrasted.of_width(width, self.options, centred=centred)
        return self._of[kind][name]

    def _add(
        self,
        role: Role,
        statistic: _Contrasted,
        space: str,
        name: str,
        pairs: Iterable[tuple[Tensor, Tensor | None]],
    ) -> None:
        for vectors, others in pairs:
            difference = vectors
            if others is not None:
                self._add_finite("reference", statistic, space, name, others)
                # The difference is in float32, but the floor is that of the dtype in which the halves were rounded.
                statistic.floor = max(statistic.floor, torch.finfo(others.dtype).eps ** 2)
                difference = vectors.float() - others.float()
            self._add_finite(role, statistic, space, name, difference)

    def _add_finite(self, role: Role, statistic: _Contrasted, space: str, name: str, vectors: Tensor) -> None:
        # A sum is finite only if all are, and cheaper than a mask; a sum that overflows by itself is looked at again.
        if not torch.isfinite(vectors.sum()) and not torch.isfinite(vectors).all():
            raise ConceptDataError(
                f"the {space} vectors of {name} are not all finite on a {role.replace('_', '-')} batch; check the "
                "batch, and the precision of the model."
            )
        statistic.add(role, vectors)


def _calls(
    name: str, space: str, seen: list[Vectors], without: list[Vectors] | None
) -> list[tuple[Tensor, Tensor | None]]:
    """The vectors of a layer, one entry per call, each with those of the other half if there is one."""
    if without is None:
        return [(vectors.chosen, None) for vectors in seen]
    shapes, others = ([vectors.shape for vectors in half] for half in (seen, without))
    if shapes != others:
        raise ConceptDataError(
            f"the halves of a pair differ in the {space}s of {name}: {shapes} with the concept, {others} without. "
            "contrast='pairs' needs batches of equal shapes; use contrast='generalized' for sets that differ."
        )
    return [(vectors.chosen, other.chosen) for vectors, other in zip(seen, without, strict=True)]


# Solving


@dataclass(frozen=True)
class _Solution:
    """The basis of one layer in one space, or why there is none."""

    basis: Tensor | None = None
    report: dict[str, Any] | None = None
    reason: str | None = None


def _solve_all(
    statistics: _Statistics, layers: Sequence[TargetLayer], options: _Options, progress: bool
) -> dict[tuple[str, str], _Solution]:
    """A solution for each layer and space; layers that share a statistic share it."""
    solutions: dict[tuple[str, str], _Solution] = {}
    solved: dict[int, _Solution] = {}
    for layer in _progress(layers, len(layers), "layers", progress):
        for space in options.spaces:
            if space == "rank":
                statistic = _scaled_sum(statistics["down", layer.name], statistics["up", layer.name])
                solution = _solve(statistic, "generalized", options)
            else:
                statistic = statistics[space, layer.name]
                solution = solved.get(id(statistic)) or _solve(statistic, options.contrast, options)
                solved[id(statistic)] = solution
            solutions[layer.name, space] = solution
    return solutions


def _scaled_sum(down: _Contrasted | None, up: _Contrasted | None) -> _Contrasted | None:
    r"""The statistics of the rank space: of :math:`A x` and :math:`B^T \delta`, each with unit reference energy."""
    if down is None or up is None:
        return None

    def scaled_sum(role: Role) -> SecondMoment:
        sums = torch.zeros(down.fit.width, down.fit.width, dtype=torch.float64)
        for part in (down, up):
            energy = max(part.reference.trace_about(part.origin), _NO_CONTRAST * part.reference.trace, _TINY)
            sums += getattr(part, role).within(about=part.origin) / energy
        return SecondMoment.from_matrix(sums, count=getattr(down, role).count)

    return _Contrasted(scaled_sum("fit"), scaled_sum("held_out"), scaled_sum("reference"), centred=False)


def _solve(statistic: _Contrasted | None, contrast: Contrast, options: _Options) -> _Solution:
    if statistic is None or not statistic.fit.count:
        return _Solution(reason="the layer was not called")
    without_reference = not statistic.reference.count
    if contrast == "generalized" and without_reference and statistic.centred:
        # What is common to all would take the basis. Gradients are about 0, and may be fitted without a reference.
        return _Solution(reason="the layer was not called on the reference batches")
    if contrast == "pairs" or without_reference:
        if statistic.fit.trace <= statistic.floor * statistic.reference.trace:
            half = " to the rounding of half precision; fit in float32" if statistic.floor > _HALF_PRECISION else ""
            return _Solution(reason=f"with and without the concept are equal{half}")
        basis = _leading_directions(statistic.fit, options)
        energy = statistic.held_out.share_in(basis)
    else:
        basis = _contrasting_directions(statistic, options)
        if not basis.shape[1]:
            return _Solution(reason=f"no direction has {options.threshold} times the reference's energy")
        energy = _excess_energy(statistic, basis, options)
    report = {
        "k": basis.shape[1],
        "d": basis.shape[0],
        "energy": energy if statistic.held_out.count else None,
        "reference_overlap": None if without_reference else statistic.reference.share_in(basis),
    }
    return _Solution(basis, report, _harm(report, options))


def _leading_directions(moment: SecondMoment, options: _Options) -> Tensor:
    """Leading eigenvectors, shape `(d, k)`."""
    subspace = common_subspace([moment])
    eigenvalues, vectors = torch.linalg.eigh(moment.within(subspace))
    eigenvalues, vectors = eigenvalues.flip(0).clamp_min(0.0), vectors.flip(1)
    eigenvalues = torch.where(eigenvalues > _NO_DIRECTION * eigenvalues[0], eigenvalues, 0.0)
    vectors = vectors[:, : truncation_rank(eigenvalues, rank=options.rank, energy=options.energy)]
    return vectors if subspace is None else subspace @ vectors


def _contrasting_directions(statistic: _Contrasted, options: _Options) -> Tensor:
    """Patterns of the generalised eigenproblem above the threshold, orthonormal, shape `(d, k)`."""
    concept, reference, epsilon, subspace = _about_origin(statistic, "fit", options)
    eigenvalues, vectors = contrast_patterns(concept, reference, epsilon=epsilon)
    eigenvalues = torch.where(eigenvalues > options.threshold, eigenvalues, 0.0)
    vectors = vectors[:, : truncation_rank(eigenvalues, rank=options.rank, energy=options.energy)]
    return vectors if subspace is None else subspace @ vectors


def _excess_energy(statistic: _Contrasted, basis: Tensor, options: _Options) -> float:
    concept, reference, epsilon, subspace = _about_origin(statistic, "held_out", options, basis)
    inside = basis if subspace is None else subspace.mT @ basis
    return excess_share(concept, reference, inside, epsilon=epsilon)


def _about_origin(
    statistic: _Contrasted, role: Role, options: _Options, *extra: Tensor
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """The second moments of the concept and the reference set about one point.

    Returns:
        Both, the ridge relative to the latter, and the subspace that they are in.
    """
    concept, reference, origin = getattr(statistic, role), statistic.reference, statistic.origin
    subspace = common_subspace([concept, reference], origin[:, None], *extra)
    inside = reference.within(subspace, about=origin)
    energy = float(inside.diagonal().mean())
    # Sketches hold the large directions, whose mean energy is above that of the whole space.
    share = reference.trace_about(origin) / reference.width / energy if energy > 0 else 1.0
    return concept.within(subspace, about=origin), inside, options.epsilon * share, subspace


def _harm(report: Mapping[str, Any], options: _Options) -> str | None:
    """Why a basis is not fit for use, if it is not."""
    if report["k"] > report["d"] / 2:
        return f"{report['k']} directions of {report['d']} are more than half"
    if (report["reference_overlap"] or 0.0) > options.max_reference_overlap:
        return f"it holds {report['reference_overlap']:.2f} of the reference set's energy"
    return None


def _refuse_unfit(solutions: Mapping[tuple[str, str], _Solution], options: _Options) -> None:
    unfit = {key: s.reason for key, s in solutions.items() if s.reason is not None and s.basis is not None}
    if unfit and options.unfit == "refuse":
        named = [f"{module}, {space} space: {reason}" for (module, space), reason in unfit.items()]
        raise ConceptBasisError(
            f"the basis would block other learning in {len(named)} places: {'; '.join(named[:5])}"
            f"{'; ...' if len(named) > 5 else ''}. Lower rank or energy, leave these layers out of target_modules, or "
            "leave out these spaces of them with unfit='skip'."
        )


def _bases(layers: Sequence[TargetLayer], solutions: Mapping[tuple[str, str], _Solution]) -> dict[str, LayerBasis]:
    """The layers that have a basis in some space.

    Raises:
        ConceptBasisError: If there is none.
    """
    spaces: dict[str, dict[str, Tensor]] = {}
    for (name, space), solution in solutions.items():
        if solution.basis is not None and solution.reason is None:
            spaces.setdefault(name, {})[space] = solution.basis
    if not spaces:
        reasons = sorted({solution.reason for solution in solutions.values() if solution.reason is not None})
        raise ConceptBasisError(
            f"no layer has a concept basis: {'; '.join(reasons)}. Check that the concept batches show the concept, "
            "that the reference batches do not, and that target_modules name layers that see it."
        )
    return {layer.name: LayerBasis(**spaces[layer.name]) for layer in layers if layer.name in spaces}


def _by_layer(
    solutions: Mapping[tuple[str, str], _Solution], value: Callable[[_Solution], Any]
) -> dict[str, dict[str, Any]]:
    """`{module: {space: value}}`, without `None`."""
    result: dict[str, dict[str, Any]] = {}
    for (name, space), solution in solutions.items():
        if value(solution) is not None:
            result.setdefault(name, {})[space] = value(solution)
    return result
