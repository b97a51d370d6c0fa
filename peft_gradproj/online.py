r"""Online projection: each optimizer step is corrected against what the adapter does to the concept now.

Before every `probe_every`-th step a batch of concept probes gives the drift :math:`D(\theta)` and its gradient
:math:`s`. After the step, :math:`\Delta`, the parameters are moved to :math:`\theta + \Delta'` with

.. math:: \Delta' = \Delta - M^{-1} s \max(0, \langle s, \Delta\rangle + \kappa D) / \langle s, M^{-1} s\rangle ,

the nearest step, in the optimizer's metric :math:`M`, that does not increase the drift and takes back the share
:math:`\kappa` of what is there; the optimizer's first moment is projected with the same :math:`s`. Both happen in the
optimizer's step hooks, so that no training loop has to be changed.

With `negative_guidance` :math:`\eta`, and probes that have the training targets, :math:`D` is
:func:`~peft_gradproj.projection.guided_drift_terms`: steps are drawn to where the concept's loss is not below the base
model's, not just to where the outputs are near the base model's.

Two bounds keep rounding out of the rule. The *floor*, which is what the model without adapter drifts from the stored
outputs (autocast, half precision), is subtracted from :math:`D`, since no step can take it back. And what a correction
does beyond cancelling :math:`\langle s, \Delta\rangle` is at most as long, in the metric, as the `probe_every` steps
since the last correction together, taking :math:`\Delta` for each: :math:`\kappa D` over a vanishing :math:`s` would
ask for steps of any length.

`rule="orthogonal"` is the literal rule of arXiv 2512.11194 instead: before the step, the training gradients lose their
component along the gradient of the concept loss. It is there for comparison; it leaks.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed
from torch import Tensor, nn

from .blocks import Blocks
from .errors import ConceptDataError, GradProjConfigError, OnlineProjectionError
from .optimizer_metric import RunningSecondMoment, needs_estimate, optimizer_metric, project_moments
from .probes import (
    ConceptProbes,
    ProbeBatch,
    active_beside,
    adapters_disabled,
    broadcast_weights,
    call_model,
    check_loss_targets,
    evaluation_mode,
    placement,
)
from .projection import (
    drift_terms,
    guided_drift_terms,
    inner,
    metric_norm,
    metric_squares,
    project_half_space,
    project_orthogonal,
)
from .step_hooks import ORDER_CORRECTION, observe_steps

__all__ = [
    "FLOOR_PROBES",
    "ONLINE_OPTIONS",
    "RESTORE_LIMIT",
    "OnlineProjection",
    "OnlineReport",
    "Rule",
    "attach_online_projection",
    "check_options",
    "detach_online_projection",
    "online_projections",
    "telemetry",
]

Rule = Literal["half-space", "orthogonal"]

ONLINE_OPTIONS = (
    "rule",
    "strength",
    "probe_every",
    "probe_batch_size",
    "restore",
    "probe_history",
    "negative_guidance",
)
"""Options of :class:`OnlineProjection` that `GradProjConfig` has under the same names."""

RESTORE_LIMIT = 1.0
r"""How long the restoring part of a correction may be, in multiples of `probe_every` :math:`\|\Delta\|_M`.

Below 1 a correction could not take back steps that all went along the concept: in a trial on a small network under
AdamW, one :math:`\|\Delta\|_M` every fourth step left the drift at .90 of the plain adapter's .95, four left .03."""

FLOOR_PROBES = 32
"""So many probes are also run without the adapter, whose mean is the floor of later batches."""

_STEPS_BEFORE_WARNING = 20
_PARAMETER_SETS = 4
"""At least so many sets of parameters keep half-spaces, as where layers are trained in turn, and one an optimizer."""
_FORKED_DEVICES = ("cuda", "xpu")


@dataclass(frozen=True)
class OnlineReport:
    """What one correction measured and did."""

    step: int
    """Number of the optimizer step, from 0."""

    drift: float
    """The drift on the probe batch before the step, less the floor; for `rule="orthogonal"` the concept loss."""

    excess: float
    """What the step was to reduce: the drift, or with `negative_guidance` the guided drift, less the floor. The latter
    may be negative, which is by how much the step might raise it."""

    floor: float
    """The drift of the model without adapter on this batch: rounding, which no step can take back."""

    removed_share: float
    r""":math:`\|\Delta' - \Delta\|_M / \|\Delta\|_M`, or of the gradient's norm for `rule="orthogonal"`."""

    layers: Mapping[str, float]
    """The removed share of each adapted layer, by its name."""

    seconds: float
    """Time that the correction took, without the optimizer's own."""


@dataclass
class _HalfSpace:
    r"""An earlier constraint, :math:`D(\theta) \approx b + \langle s, \theta\rangle`, to be asked again later.

    With the offset instead of the drift of then, what later steps took back is not taken back again.
    """

    blocks: Blocks
    vectors: list[Tensor]
    """The gradient, in bfloat16, but for parameters in float64."""
    offset: Tensor

    @classmethod
    def through(cls, blocks: Blocks, point: Sequence[Tensor], gradient: Iterable[Tensor], excess: float) -> _HalfSpace:
        """With the excess that was measured at a point."""
        # Half of the memory, of which many half-spaces take most. The offset is that of the rounded gradient, so that
        # what rounding changes grows with the distance from the point alone.
        vectors = [s if s.dtype == torch.float64 else s.to(torch.bfloat16) for s in gradient]
        return cls(blocks, vectors, excess - inner(vectors, point))

    @classmethod
    def loaded(cls, gradient: Mapping[str, Tensor], offset: Tensor) -> _HalfSpace:
        blocks = Blocks(gradient)
        return cls(blocks, blocks.join(gradient), offset)

    @property
    def gradient(self) -> dict[str, Tensor]:
        return self.blocks.split(self.vectors)

    def laid_out_as(self, blocks: Blocks) -> _HalfSpace:
        if self.blocks is blocks:
            return self
        vectors = self.vectors if self.blocks == blocks else blocks.join(self.gradient)
        return _HalfSpace(blocks, vectors, self.offset)

    def excess_at(self, point: Sequence[Tensor]) -> Tensor:
        linear = inner(self.vectors, point)
        return self.offset.to(linear.device) + linear


_Asked = tuple[Sequence[Tensor], float | Tensor]
"""A half-space at the point of a step: the gradient, and the excess that the step is to reduce."""


@dataclass(frozen=True)
class _Measured:
    """What a batch of probes says before a step."""

    gradient: dict[str, Tensor]
    """Of the excess, in the parameters' shapes."""
    excess: float
    drift: float
    floor: float


@dataclass
class _Pending:
    """What was measured before a step, for the correction after it."""

    parameters: dict[str, nn.Parameter]
    before: dict[str, Tensor]
    measured: _Measured
    seconds: float


@dataclass(frozen=True)
class _Stepping:
    """The step that is being taken."""

    optimizer: int
    """Its identity."""

    number: int
    names: list[str]
    """Of the parameters that it may move."""


@dataclass
class _Autocast:
    """How the last training forward computed; `None` before there was one."""

    enabled: bool | None = None
    dtype: torch.dtype = torch.float32


@dataclass
class _Floor:
    """What the base model drifts from the stored outputs, for one way to compute: the terms of the probes so far."""

    key: Any = None
    numerator: float | Tensor = 0.0
    denominator: float | Tensor = 0.0
    probes: int = 0

    def add(self, numerator: Tensor, denominator: Tensor, probes: int) -> None:
        self.numerator = self.numerator + numerator
        self.denominator = self.denominator + denominator
        self.probes += probes

    def of(self, denominator: Tensor) -> Tensor:
        return denominator * (self.numerator / torch.as_tensor(self.denominator).clamp_min(1e-300))


class OnlineProjection:
    r"""Corrects the steps that any optimizer takes on one adapter, see the module's formula.

    It holds the model weakly and lives as long as somebody refers to it; :func:`attach_online_projection` keeps it for
    as long as the model lives.

    Args:
        model: The base model into which the adapter is injected; it is called on the probes.
        adapter_name: Which adapter. Others, and all `.grad`, stay untouched (`rule="orthogonal"` changes the adapter's
            `.grad`).
        probes: The concept probes.
        rule: `half-space`, or `orthogonal` for the paper's literal rule.
        strength: Share :math:`\alpha` in [0, 1] of the correction that is made; at 0 the drift is only measured.
        probe_every: A step of so many is corrected, the first included. A step counts per optimizer, when it happens:
            accumulated backwards do not, nor steps that a loss scaler skips, unless the optimizer is fused and finds
            the overflow by itself.
        probe_batch_size: Probes per correction, over all processes.
        restore: Share :math:`\kappa` in [0, 1] of the drift that a corrected step takes back.
        probe_history: So many of the last half-spaces, of each optimizer, are kept and swept from the oldest to the
            newest.
        negative_guidance: How far past the base model's outputs, in multiples :math:`\eta \ge 0` of their errors
            against the probes' `loss_targets`, the outputs on probes are drawn. Without `loss_targets`, and with
            `rule="orthogonal"`, it has no effect.
        seed: Of the order in which probes are drawn.
        on_report: Called with each :class:`OnlineReport`.
        config: The adapter's config; by default what `model.peft_config` holds. Once another config has its place, the
            adapter is another one, and is not corrected.

    Raises:
        GradProjConfigError: If an option is out of range, or the model has no such adapter.
        ConceptDataError: If `rule="orthogonal"` and the probes have no `loss_targets`.
    """

    last: OnlineReport | None
    """The report of the last correction."""
    probing: bool
    """Whether the model is being run on probes just now, and not trained."""

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        probes: ConceptProbes,
        *,
        rule: Rule = "half-space",
        strength: float = 1.0,
        probe_every: int = 8,
        probe_batch_size: int = 2,
        restore: float = 0.5,
        probe_history: int = 1,
        negative_guidance: float = 0.0,
        seed: int = 0,
        on_report: Callable[[OnlineReport], None] | None = None,
        config: Any = None,
    ) -> None:
        check_options(rule, strength, probe_every, probe_batch_size, restore, probe_history, negative_guidance)
        if rule == "orthogonal":
            check_loss_targets(probes)
        self.adapter_name = adapter_name
        self.probes = probes
        self.rule = rule
        self.strength = strength
        self.probe_every = probe_every
        self.probe_batch_size = probe_batch_size
        self.restore = restore
        self.probe_history = probe_history
        self.negative_guidance = negative_guidance
        self.seed = seed
        self.on_report = on_report
        self.last = None
        self._model = weakref.ref(model)
        config = _config_of(model, adapter_name) if config is None else config
        self._config = None if config is None else weakref.ref(config)
        self._drawable = probes.weighted_indices()
        self._attached = False
        self._hook: Any = None
        self.probing = False
        self._autocast = _Autocast()
        self._floor = _Floor()
        self._estimate = RunningSecondMoment()
        self._history: dict[frozenset[str], deque[_HalfSpace]] = {}
        self._counts: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._first_count = 0
        self._reached: dict[str, int] = {}
        self._strangers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._stepping: _Stepping | None = None
        self._pending: _Pending | None = None
        self._foreign_steps: int | None = 0
        self._noticed_others = False
        self._noticed_moments = False
        self._noticed_distance = False
        self._layers: list[tuple[str, weakref.ref[Any]]] = []
        self._find_layers(model)
        if not self._layers:
            raise GradProjConfigError(
                f"the model {type(model).__name__} has no LoRA layer with an adapter {adapter_name!r}; inject the "
                "adapter first, and give the model that it was injected into."
            )

    def __repr__(self) -> str:
        return (
            f"OnlineProjection(adapter={self.adapter_name!r}, rule={self.rule!r}, strength={self.strength}, "
            f"probe_every={self.probe_every}, restore={self.restore}, probes={len(self.probes)}, step={self.step})"
        )

    # Life

    def attach(self) -> OnlineProjection:
        """Correct steps from now on; attaching twice is the same as once."""
        model = self._model()
        if model is not None and not self._attached:
            self._attached = True
            self._hook = model.register_forward_pre_hook(_RememberAutocast(self))
            observe_steps(self, ORDER_CORRECTION)
        return self

    def detach(self) -> None:
        """Correct no further step."""
        self._attached = False
        self._first_count = self.step
        self._forget_counts()
        self._pending = self._stepping = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def outlived(self) -> bool:
        """Whether the adapter is gone and another one has its name."""
        model = self._model()
        current = None if model is None else _config_of(model, self.adapter_name)
        return self._config is not None and current is not None and self._config() is not current

    @property
    def step(self) -> int:
        """Number of optimizer steps that were seen."""
        return max([*self._counts.values(), *self._reached.values()], default=self._first_count)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly: the step, and what was learned from earlier ones."""
        kept = [half_space for earlier in self._history.values() for half_space in earlier]
        history = [{"gradient": h.gradient, "offset": h.offset} for h in kept]
        return {"step": self.step, "estimate": self._estimate.state_dict(), "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            OnlineProjectionError: If it is something else.
        """
        missing = {"step", "estimate", "history"} - set(state)
        if missing:
            raise OnlineProjectionError(
                f"the state of an online projection lacks {sorted(missing)}; was it saved by one?"
            )
        self._forget_counts()
        self._first_count = int(state["step"])
        self._estimate.load_state_dict(state["estimate"])
        self._history = {}
        for half_space in state["history"]:
            self._earlier(half_space["gradient"]).append(_HalfSpace.loaded(**half_space))

    def log(self, prefix: str = "gradproj") -> dict[str, float]:
        """The last report as flat numbers, for any tracker; empty before the first correction."""
        if self.last is None:
            return {}
        names = ("drift", "excess", "floor", "removed_share", "seconds")
        return {f"{prefix}/{name}": float(getattr(self.last, name)) for name in names}

    # The observed step

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the drift and its gradient, where it is this step's turn."""
        self._pending = self._stepping = None
        model = self._model()
        if not self._attached or model is None:
            return
        if self.outlived:
            self._give_way(model)
            return
        counted = self._counted(optimizer)
        refresh = counted is None or counted % self.probe_every == 0
        parameters = self._parameters_of(optimizer, model, refresh=refresh)
        if not parameters:
            configs = getattr(model, "peft_config", None)
            if self._layers:
                self._notice_foreign_step()
            elif configs is not None and self.adapter_name not in configs:
                # Deleted. Not unloaded, after which a model has no configs: who takes the name then is to be told.
                self._retire(model)
            return
        number = self._next_count(parameters) if counted is None else counted
        _refuse_partitioned(optimizer)
        if self.rule == "half-space":
            _refuse_schedule_free(optimizer)
            _refuse_remembered_steps(optimizer)
            self._notice_distance(optimizer)
        self._foreign_steps = None
        self._stepping = _Stepping(id(optimizer), number, [*parameters])
        if self.rule == "half-space":
            needed = needs_estimate(optimizer, parameters)
            self._estimate.update({name: parameters[name] for name in needed})
            self._estimate.forget(parameters.keys() - needed)
        if number % self.probe_every == 0:
            started = time.perf_counter()
            if self.rule == "orthogonal":
                self._project_gradients(model, parameters, number, started)
            else:
                self._pending = self._prepared(model, parameters, number, started)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Correct the step that was measured."""
        # A wrapper's step may enclose that of the optimizer it wraps: the innermost, which moved, is the one corrected.
        if self._stepping is None or self._stepping.optimizer != id(optimizer):
            return
        # The number of before: by now, an adapter of this name in another model may have counted the step in the group.
        stepping, pending, self._pending, self._stepping = self._stepping, self._pending, None, None
        self._counts[optimizer] = optimizer.param_groups[0][self._count_key] = stepping.number + 1
        self._reached.update(dict.fromkeys(stepping.names, stepping.number + 1))
        if pending is not None:
            with torch.no_grad():
                self._correct(optimizer, pending, stepping.number)

    @property
    def _count_key(self) -> str:
        return f"gradproj_step.{self.adapter_name}"

    def _counted(self, optimizer: torch.optim.Optimizer) -> int | None:
        """How many steps of an optimizer were seen; `None` of one that is new."""
        # In a group of the optimizer, which every training loop saves and restores: a resumed run goes on with it.
        # An adapter of this name in another model, once detached, takes the number out of the group; the own one stays.
        count = optimizer.param_groups[0].get(self._count_key, self._counts.get(optimizer))
        return None if count is None else int(count)

    def _next_count(self, names: Iterable[str]) -> int:
        """Where a new optimizer begins to count.

        Not anew, where another one has moved its parameters: of many probes, the same few would be drawn in every round
        of a training that makes an optimizer for each. Its first step is corrected.
        """
        reached = [self._reached[name] for name in names if name in self._reached]
        return -(-max(reached) // self.probe_every) * self.probe_every if reached else self._first_count

    def _forget_counts(self) -> None:
        for optimizer in self._counts:
            optimizer.param_groups[0].pop(self._count_key, None)
        self._counts.clear()
        self._reached.clear()

    def _give_way(self, model: nn.Module) -> None:
        warnings.warn(
            f"another adapter has taken the name {self.adapter_name!r}, so the concept probes of the former do not "
            "correct its steps. To keep the concept out of it, give concept_probes in its config.",
            stacklevel=2,
        )
        self._retire(model)

    def _retire(self, model: nn.Module) -> None:
        self.detach()
        if _registry.get(model, {}).get(self.adapter_name) is self:
            del _registry[model][self.adapter_name]

    def _notice_foreign_step(self) -> None:
        if self._foreign_steps is None or self._frozen():
            return
        self._foreign_steps += 1
        if self._foreign_steps == _STEPS_BEFORE_WARNING:
            self._foreign_steps = None
            warnings.warn(
                f"{_STEPS_BEFORE_WARNING} optimizer steps had none of the active, trainable parameters of adapter "
                f"{self.adapter_name!r}, so the online projection has corrected nothing. If the adapter is being "
                "trained, its optimizer holds other tensors (DeepSpeed, FSDP1), which is not supported.",
                stacklevel=2,
            )

    def _notice_distance(self, optimizer: torch.optim.Optimizer) -> None:
        # Prodigy, D-Adaptation: what they infer from the way that the parameters went is not so of corrected steps.
        groups = optimizer.param_groups
        if self._noticed_distance or not any("d" in group and {"d0", "growth_rate"} & group.keys() for group in groups):
            return
        self._noticed_distance = True
        warnings.warn(
            f"the optimizer, {type(optimizer).__name__}, finds its learning rate from how far its steps went, and "
            "corrected steps go another way: it may stay near its start, and learn nothing, or go further. See that "
            "the loss falls and that its `d` grows, or take another optimizer, such as AdamW.",
            stacklevel=2,
        )

    def _notice_others(self, model: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        if self._noticed_others:
            return
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
        others = sorted({repr(name) for layer in layers for name in active_beside(layer, self.adapter_name)})
        if others:
            self._noticed_others = True
            warnings.warn(
                f"beside adapter {self.adapter_name!r}, {', '.join(others)} is active, and the targets of the concept "
                "probes are stored. They are the base model's, so what the others change counts as drift, and "
                f"{self.adapter_name!r} learns to undo it. Collect the probes with store_targets=False to compare "
                "with the model without this adapter alone, or merge the others into the base model before "
                "collecting.",
                stacklevel=2,
            )

    def _frozen(self) -> bool:
        """Whether nobody trains the adapter, as far as it shows: FSDP1 leaves views where parameters were."""
        layers = [layer for layer in (reference() for _, reference in self._layers) if layer is not None]
        weights = [weight for layer in layers for weight in _weights_of(layer, self.adapter_name).values()]
        return all(isinstance(weight, nn.Parameter) and not weight.requires_grad for weight in weights)

    # Parameters, through the modules: PEFT and FSDP replace Parameter objects

    def _find_layers(self, model: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
        self._layers = [(name, weakref.ref(m)) for name, m in layers if _weights_of(m, self.adapter_name)]

    def _parameters_of(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, *, refresh: bool
    ) -> dict[str, nn.Parameter]:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # For an optimizer that has none of them, the model is not walked through at every step.
        stranger = optimizer in self._strangers
        found = {} if refresh and not stranger else self._trainable(known)
        if not found and (not stranger or self._has_lost_layers()):
            self._find_layers(model)
            found = self._trainable(known)
        if found:
            self._strangers.discard(optimizer)
        else:
            self._strangers.add(optimizer)
        return found

    def _has_lost_layers(self) -> bool:
        layers: list[Any] = [reference() for _, reference in self._layers]
        return any(layer is None or not _weights_of(layer, self.adapter_name) for layer in layers)

    def _trainable(self, known: set[int]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for name, reference in self._layers:
            layer: Any = reference()
            if layer is None or layer.disable_adapters or self.adapter_name not in layer.active_adapters:
                continue
            for part, weight in _weights_of(layer, self.adapter_name).items():
                if weight.requires_grad and id(weight) in known and id(weight) not in seen:
                    _refuse_sharded(f"{name}.{part}", weight)
                    seen.add(id(weight))
                    found[f"{name}.{part}"] = weight
        return found

    # Measuring

    def _prepared(self, model: nn.Module, parameters: dict[str, nn.Parameter], step: int, started: float) -> _Pending:
        measured = self._measured(model, parameters, step)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        return _Pending(parameters, before, measured, time.perf_counter() - started)

    def _measured(self, model: nn.Module, parameters: dict[str, nn.Parameter], step: int) -> _Measured:
        """What the step's batch says, over all processes."""
        indices = _shard(self._draw(step // self.probe_every))
        device = next(iter(parameters.values())).device
        terms = torch.zeros(4, dtype=torch.float64, device=device)
        if len(indices):
            placed = placement(model)
            with self._probe_context(model, device, placed):
                batch = self.probes.batch(indices, *placed)
                targets, output = self._compared_with(model, batch), self._output(model, batch)
                loss_targets = batch.loss_targets if self._guided else None
                guided, denominator = self._terms(output, targets, batch.weights, loss_targets)
                drift_term = guided
                if loss_targets is not None:
                    drift_term, _ = self._terms(output.detach(), targets, batch.weights)
                # The gradient of the sum, not of the mean, whose elements would vanish in float16.
                gradients = _gradients(guided, parameters)
                floor = self._floor_term(model, batch, denominator, len(indices))
                terms += torch.stack([x.detach().double() for x in (guided, drift_term, floor, denominator)])
        else:
            gradients = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in parameters.items()}
        gradients = _reduced(terms, gradients)
        gradients = {name: (g / terms[-1].clamp_min(1e-300)).to(g.dtype) for name, g in gradients.items()}
        excess, drift, floor_value = self._checked(terms, gradients, step)
        if excess == 0 and not self._guided:
            # What is left is the gradient of the floor: rounding, along which no step is to be corrected. Before the
            # first step it would take a random direction from it, and another one on each number of processes.
            gradients = {name: torch.zeros_like(g) for name, g in gradients.items()}
        return _Measured(gradients, excess, drift, floor_value)

    def _checked(self, terms: Tensor, gradients: dict[str, Tensor], step: int) -> tuple[float, float, float]:
        """Excess, drift less the floor, which is not negative, and the floor."""
        square = inner([*gradients.values()], [*gradients.values()])
        *numerators, denominator, square_value = torch.stack([*terms, square]).tolist()
        guided, drift, floor = (numerator / max(denominator, 1e-300) for numerator in numerators)
        if not all(map(_finite, (guided, drift, floor, square_value))):
            raise OnlineProjectionError(
                f"the drift of adapter {self.adapter_name!r} on the concept probes, or its gradient, is not finite at "
                f"step {step} (drift {drift}). The weights or the activations have overflowed: lower "
                "the learning rate, clip gradients, or train in bfloat16 or float32 instead of float16."
            )
        drift = max(0.0, drift - floor)
        return guided - floor if self._guided else drift, drift, floor

    def _draw(self, number: int) -> Tensor:
        """Indices of the probes of correction `number`: each probe once before any twice, whatever came before."""
        count = len(self._drawable)
        size = min(self.probe_batch_size, count)
        positions = range(number * size, (number + 1) * size)
        orders = {epoch: self._order(epoch, count) for epoch in {p // count for p in positions}}
        return self._drawable[[int(orders[p // count][p % count]) for p in positions]]

    def _order(self, epoch: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(count, generator=generator, device="cpu")

    @contextmanager
    def _probe_context(self, model: nn.Module, device: torch.device, placed: Any) -> Iterator[None]:
        """The model as in its last training forward, but in evaluation mode and unseen by the training's RNG."""
        enabled, dtype = self._autocast.enabled, self._autocast.dtype
        if enabled is None:
            enabled, dtype = _autocast_state(device.type)
        forked = device.type if device.type in _FORKED_DEVICES else "cuda"
        self.probing = True
        try:
            with (
                torch.random.fork_rng([device] if device.type == forked else [], device_type=forked),
                evaluation_mode(model, keep_checkpointing=True),
                # Without the cache, whose entries may stem from a training forward or from under no_grad.
                torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False),
                torch.enable_grad(),
            ):
                self._expire_floor((enabled, dtype, placed))
                yield
        finally:
            self.probing = False

    def _expire_floor(self, key: Any) -> None:
        if self._floor.key != key:
            self._floor = _Floor(key)

    def _output(self, model: nn.Module, batch: ProbeBatch) -> Tensor:
        output = call_model(model, batch.inputs, self.probes.run_model)
        if not output.requires_grad:
            raise OnlineProjectionError(
                f"the model's output on the concept probes does not depend on adapter {self.adapter_name!r}: run_model "
                "must neither detach it nor run under no_grad, and checkpointing needs use_reentrant=False."
            )
        return output

    def _compared_with(self, model: nn.Module, batch: ProbeBatch) -> Tensor:
        if self.rule == "orthogonal":
            assert batch.loss_targets is not None
            return batch.loss_targets
        if batch.targets is not None:
            self._notice_others(model)
            return batch.targets
        return self._base_output(model, batch, only=self.adapter_name)

    def _base_output(self, model: nn.Module, batch: ProbeBatch, *, only: str | None = None) -> Tensor:
        with torch.no_grad(), adapters_disabled(model, only=only):
            return call_model(model, batch.inputs, self.probes.run_model)

    @property
    def _guided(self) -> bool:
        """Whether the concept's loss counts, and not the drift alone."""
        return self.rule == "half-space" and self.negative_guidance > 0 and self.probes.loss_targets is not None

    def _terms(
        self, output: Tensor, targets: Tensor, weights: Tensor | None, loss_targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the drift, or, with `loss_targets`, of the guided drift."""
        for name, compared in (("targets", targets), ("loss_targets", loss_targets)):
            if compared is not None and output.shape != compared.shape:
                raise ConceptDataError(
                    f"the model's output on the concept probes has shape {tuple(output.shape)}, their {name} have "
                    f"{tuple(compared.shape)}; were they collected with this model and run_model?"
                )
        weights = None if weights is None else broadcast_weights(weights, output)
        if loss_targets is None:
            return drift_terms(output, targets, weights)
        return guided_drift_terms(output, targets, loss_targets, weights, negative_guidance=self.negative_guidance)

    def _floor_term(self, model: nn.Module, batch: ProbeBatch, denominator: Tensor, count: int) -> Tensor:
        """Numerator of the drift that the batch has without the adapter: measured at first, then by the mean."""
        if self.rule == "orthogonal" or batch.targets is None:
            return torch.zeros_like(denominator)
        if self._floor.probes >= FLOOR_PROBES:
            return self._floor.of(denominator)
        numerator, _ = self._terms(self._base_output(model, batch), batch.targets, batch.weights)
        self._floor.add(numerator.double(), denominator.double(), count)
        return numerator

    # Correcting

    def _correct(self, optimizer: torch.optim.Optimizer, pending: _Pending, number: int) -> None:
        started = time.perf_counter()
        if self._estimate:
            # What the optimizer knows by now. Kept until the next step, it would be one more copy in the passes before.
            self._estimate.forget(pending.parameters.keys() - needs_estimate(optimizer, pending.parameters))
        metric = optimizer_metric(optimizer, pending.parameters, self._estimate)
        after = {name: p.detach().to(_wide(p)) for name, p in pending.parameters.items()}
        # Where the adapter is large beside the activations, each copy of all parameters raises the peak memory.
        blocks = Blocks(after)
        without_metric = {name: torch.tensor(torch.inf) for name in after.keys() - metric.keys()}
        steps, diagonal = blocks.join(after), blocks.joined(metric | without_metric)
        before = blocks.joined(pending.before)
        if self.probe_history > 1:
            before = list(before)  # since each of the half-spaces asks for all of it
            pending.before.clear()
        _subtract(steps, before)
        if not any(bool(d.any()) for d in steps):
            # Nothing moved: a fused optimizer whose loss scaler found an overflow, or a learning rate of 0.
            self._report(pending, number, (0.0, {}), started)
            return
        newest = (blocks.joined(pending.measured.gradient), pending.measured.excess)
        half_spaces: list[_Asked] = [newest]
        if self.probe_history > 1:
            half_spaces = [*self._earlier_half_spaces(blocks, before), newest]
            self._remember(blocks, before, *newest)
        del before
        pending.before.clear()
        corrections = self._swept(steps, diagonal, blocks, half_spaces)
        del half_spaces, newest
        for correction, step in zip(corrections, steps, strict=True):
            correction.sub_(step).mul_(self.strength)
        for name, correction in blocks.split(corrections).items():
            pending.parameters[name].copy_(after[name] + correction)
        shares = _removed_shares(corrections, steps, diagonal, blocks)
        del steps, corrections, correction, step
        if pending.measured.excess >= 0:
            self._correct_moments(optimizer, pending, metric)
        self._report(pending, number, shares, started)

    def _earlier_half_spaces(self, blocks: Blocks, before: Sequence[Tensor]) -> list[_Asked]:
        """What those that are kept ask for, the oldest first."""
        earlier = self._earlier(blocks.names)
        if earlier and earlier[-1].blocks == blocks:
            blocks = earlier[-1].blocks  # the same object, so that the others need not be compared
        found: list[_Asked] = []
        for number, kept in enumerate(earlier):
            earlier[number] = half_space = kept.laid_out_as(blocks)
            excess = half_space.excess_at(before)
            # No drift is negative; a line through it may be.
            found.append((half_space.vectors, excess if self._guided else excess.clamp_min(0.0)))
        return found

    def _remember(self, blocks: Blocks, before: Sequence[Tensor], gradient: Sequence[Tensor], excess: float) -> None:
        earlier = self._earlier(blocks.names)
        blocks = earlier[-1].blocks if earlier else blocks
        earlier.append(_HalfSpace.through(blocks, before, gradient, excess))
        while len(self._history) > max(_PARAMETER_SETS, len(self._counts)):
            del self._history[next(iter(self._history))]

    def _swept(
        self, step: list[Tensor], diagonal: Sequence[Tensor], blocks: Blocks, half_spaces: Sequence[_Asked]
    ) -> list[Tensor]:
        """The step after a sweep over the half-spaces, the newest last (Kaczmarz)."""
        limit = RESTORE_LIMIT * self.probe_every * metric_norm(step, diagonal)
        for s, excess in half_spaces:
            step = project_half_space(step, s, excess, restore=self.restore, metric=diagonal, restore_limit=limit)
        return step

    def _earlier(self, names: Iterable[str]) -> deque[_HalfSpace]:
        """The half-spaces of earlier corrections of these parameters, from the oldest on."""
        # Each optimizer has its own: those of another one are about parameters that this one does not move.
        key = frozenset(names)
        self._history[key] = found = self._history.pop(key, deque(maxlen=self.probe_history - 1))
        return found

    def _correct_moments(self, optimizer: torch.optim.Optimizer, pending: _Pending, metric: dict[str, Tensor]) -> None:
        unread = project_moments(
            optimizer, pending.parameters, pending.measured.gradient, metric, strength=self.strength
        )
        if unread and not self._noticed_moments and self.probe_every > 1:
            self._noticed_moments = True
            warnings.warn(
                f"the optimizer, {type(optimizer).__name__}, keeps moments that cannot be read, of {unread[0]} and "
                f"{len(unread) - 1} more: what they push towards the concept between corrections is not taken out of "
                "them. Take another optimizer, or probe_every=1.",
                stacklevel=2,
            )

    def _report(self, pending: _Pending, step: int, shares: tuple[float, dict[str, float]], started: float) -> None:
        seconds = pending.seconds + time.perf_counter() - started
        measured = pending.measured
        self._publish(OnlineReport(step, measured.drift, measured.excess, measured.floor, *shares, seconds))

    def _publish(self, report: OnlineReport) -> None:
        self.last = report
        if self.on_report is not None:
            self.on_report(report)

    # The paper's literal rule

    def _project_gradients(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], step: int, started: float
    ) -> None:
        parameters = {name: p for name, p in parameters.items() if p.grad is not None}
        if not parameters:
            raise OnlineProjectionError(
                f"no parameter of adapter {self.adapter_name!r} has a gradient before the step. rule='orthogonal' "
                "changes gradients, so it cannot be used with closures, which compute them within the step."
            )
        measured = self._measured(model, parameters, step)
        s, loss = measured.gradient, measured.drift
        gradients = {name: p.grad.detach() for name, p in parameters.items() if p.grad is not None}
        projected = project_orthogonal([*gradients.values()], [s[n] for n in gradients], strength=self.strength)
        with torch.no_grad():
            blocks = Blocks(gradients)
            removed = blocks.join({n: g - new for (n, g), new in zip(gradients.items(), projected, strict=True)})
            whole = blocks.join(gradients)
            total, layers = _removed_shares(removed, whole, [torch.ones_like(g) for g in whole], blocks)
            for gradient, new in zip(gradients.values(), projected, strict=True):
                gradient.copy_(new)
        self._publish(OnlineReport(step, loss, loss, 0.0, total, layers, time.perf_counter() - started))


class _RememberAutocast:
    """Forward pre-hook that notes how the training computes; a copy or pickle of the model gets an inert one."""

    def __init__(self, projection: OnlineProjection | None = None) -> None:
        self.projection = None if projection is None else weakref.ref(projection)

    def __reduce__(self) -> tuple[Any, ...]:
        return _RememberAutocast, ()

    def __call__(self, model: nn.Module, args: Any) -> None:
        # Under torch.compile the state is a constant of the graph, and cannot be noted.
        if self.projection is None or torch.compiler.is_compiling():
            return
        projection = self.projection()
        if projection is None or projection.probing or not (model.training or torch.is_grad_enabled()):
            return
        kind = next((p.device.type for p in model.parameters()), "cpu")
        projection._autocast = _Autocast(*_autocast_state(kind))


def _autocast_state(kind: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def check_options(
    rule: str,
    strength: float,
    probe_every: int,
    probe_batch_size: int,
    restore: float,
    probe_history: int,
    negative_guidance: float,
) -> None:
    """Refuse options out of range; `ONLINE_OPTIONS` says where they are explained.

    Raises:
        GradProjConfigError: If there is one; it names it.
    """
    if rule not in get_args(Rule):
        raise GradProjConfigError(f"rule is {rule!r}; expected one of {list(get_args(Rule))}.")
    for name, share in (("strength", strength), ("restore", restore)):
        if not 0.0 <= share <= 1.0:
            raise GradProjConfigError(f"{name} is {share}; expected a share in [0, 1].")
    if not 0.0 <= negative_guidance < math.inf:
        raise GradProjConfigError(f"negative_guidance is {negative_guidance}; expected a finite number of at least 0.")
    counts = {"probe_every": probe_every, "probe_batch_size": probe_batch_size, "probe_history": probe_history}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise GradProjConfigError(f"{name} is {count!r}; expected a whole number of at least 1.")


def _config_of(model: nn.Module, adapter_name: str) -> Any:
    """PEFT's config of an adapter, a new object with each adapter; `None` where the model does not hold it."""
    return (getattr(model, "peft_config", None) or {}).get(adapter_name)


def _weights_of(layer: Any, adapter_name: str) -> dict[str, nn.Parameter]:
    weights = {}
    for part in ("lora_A", "lora_B"):
        if adapter_name in getattr(layer, part, ()):
            weights[part] = getattr(layer, part)[adapter_name].weight
    for part in ("lora_embedding_A", "lora_embedding_B"):
        if adapter_name in getattr(layer, part, ()):
            weights[part] = getattr(layer, part)[adapter_name]
    return weights


def _refuse_sharded(name: str, weight: Tensor) -> None:
    tensor_module = sys.modules.get("torch.distributed.tensor")
    if tensor_module is not None and isinstance(weight, tensor_module.DTensor):
        raise OnlineProjectionError(
            f"{name} is a DTensor (FSDP2 or tensor parallelism), whose steps the online projection cannot correct. "
            "Train with DDP, or use the projection on a concept basis, which works with shards."
        )


def _refuse_partitioned(optimizer: torch.optim.Optimizer) -> None:
    # Each process steps other parameters: sums over the processes would mix them up, or wait forever.
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer):
        raise OnlineProjectionError(
            "the optimizer is a ZeroRedundancyOptimizer, of which each process holds a part, so that the online "
            "projection cannot correct its steps. Give DDP the optimizer itself, or use the projection on a concept "
            "basis, which works with it."
        )


def _refuse_schedule_free(optimizer: torch.optim.Optimizer) -> None:
    # The parameters hold an interpolation of two iterates. If it alone is corrected, the average that is used in the
    # end goes further from the other with every correction: in a trial, to ten times the drift of the plain adapter.
    # Its kinds (schedulefree and others) have the sum of the average's weights in common.
    if any("weight_sum" in group for group in optimizer.param_groups):
        raise OnlineProjectionError(
            f"the optimizer, {type(optimizer).__name__}, is schedule-free: the parameters that it steps are not those "
            "that are used in the end, so that the online projection cannot correct its steps. Take another "
            "optimizer, such as AdamW."
        )


def _refuse_remembered_steps(optimizer: torch.optim.Optimizer) -> None:
    # It learns the curvature from the steps that it believes to have taken. Of corrected ones that is wrong, and its
    # next steps go anywhere: in a trial the drift came to that of the plain adapter, or above, and less was learned.
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OnlineProjectionError(
            "the optimizer is LBFGS, which reckons with the steps that it took, and not with corrected ones, so that "
            "the online projection would mislead it. Take another optimizer, such as AdamW, or use the projection on a "
            "concept basis, which works with it."
        )


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _subtract(vectors: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    # A function, whose variables do not outlive it: each holds a vector of some MB.
    for vector, other in zip(vectors, others, strict=True):
        vector -= other


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _gradients(numerator: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    # Not backward(): it would write into .grad, and wake the hooks of DDP.
    found = torch.autograd.grad(numerator, [*parameters.values()], allow_unused=True)
    return {
        name: torch.zeros_like(p, dtype=_wide(p)) if gradient is None else gradient.to(_wide(p))
        for (name, p), gradient in zip(parameters.items(), found, strict=True)
    }


# Several processes


def _processes() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _shard(indices: Tensor) -> Tensor:
    rank, size = _processes()
    return indices[rank::size]


def _reduced(terms: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the processes, of `terms` in place; one message for all gradients."""
    if _processes()[1] == 1:
        return gradients
    torch.distributed.all_reduce(terms)
    flat = torch.cat([g.flatten() for g in gradients.values()])
    torch.distributed.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients.values()])
    return {name: part.view(g.shape) for (name, g), part in zip(gradients.items(), parts, strict=True)}


def _removed_shares(
    correction: list[Tensor], whole: list[Tensor], metric: Sequence[Tensor], blocks: Blocks
) -> tuple[float, dict[str, float]]:
    """Norm of the correction over that of the whole, in the metric: of all, and of each layer."""
    squares = torch.stack([blocks.sums(metric_squares(x, metric)) for x in (correction, whole)], dim=1)
    layers: dict[str, tuple[float, float]] = {}
    for name, (removed, all_) in zip(blocks.names, squares.tolist(), strict=True):
        layer = name.rpartition(".")[0]
        so_far = layers.get(layer, (0.0, 0.0))
        layers[layer] = so_far[0] + removed, so_far[1] + all_
    total = [sum(column) for column in zip(*layers.values(), strict=True)]
    return _share(*total), {layer: _share(*pair) for layer, pair in layers.items()}


def _share(removed: float, all_: float) -> float:
    return math.sqrt(removed / all_) if all_ > 0 else 0.0


# The projections of a model

_registry: weakref.WeakKeyDictionary[nn.Module, dict[str, OnlineProjection]] = weakref.WeakKeyDictionary()


def attach_online_projection(
    model: nn.Module, adapter_name: str, probes: ConceptProbes, **options: Any
) -> OnlineProjection:
    """Correct all steps on an adapter for as long as the model lives; an earlier projection of it is replaced.

    Args:
        model: The base model into which the adapter is injected.
        adapter_name: Which adapter.
        probes: The concept probes. A `run_model` that holds the model would keep it alive.
        **options: As in :class:`OnlineProjection`.
    """
    projection = OnlineProjection(model, adapter_name, probes, **options)
    detach_online_projection(model, adapter_name)
    _registry.setdefault(model, {})[adapter_name] = projection
    return projection.attach()


def detach_online_projection(model: nn.Module, adapter_name: str) -> None:
    """Stop correcting steps on an adapter; nothing happens if none was."""
    projection = _registry.get(model, {}).pop(adapter_name, None)
    if projection is not None:
        projection.detach()


def telemetry(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """What the online projection of an adapter measured last, for a tracker; empty if it has none."""
    projection = online_projections(model).get(adapter_name)
    return {} if projection is None else projection.log()


def online_projections(model: nn.Module) -> dict[str, OnlineProjection]:
    """The projections of a model and of its parts, such as the base model within a `PeftModel`, by adapter."""
    found: dict[str, OnlineProjection] = {}
    for module in model.modules():
        found.update({name: p for name, p in _registry.get(module, {}).items() if not p.outlived})
    return found
