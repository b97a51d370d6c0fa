r"""The metric in which an optimizer measures steps, read from its state.

An adaptive optimizer goes along :math:`-M^{-1} m` with a diagonal :math:`M` and a first moment :math:`m`. The nearest
step that fulfils a constraint is nearest in this metric: with the identity instead, the correction falls on the
parameters that the optimizer moves least, and destroys what was learned.

| optimizer | diagonal of :math:`M`, divided by the group's learning rate |
|---|---|
| Adam, AdamW, NAdam, RAdam | :math:`\sqrt{\hat v} + \epsilon`, with `max_exp_avg_sq` for amsgrad |
| RMSprop | :math:`\sqrt{v} + \epsilon`, less the square of the mean if centered |
| Adagrad | :math:`\sqrt{\sum g^2} + \epsilon` |
| SGD, ASGD, and those with a `momentum_buffer` that have neither betas nor `square_avg` (Muon) | 1 |
| others (Adafactor, Lion, 8-bit) | a running estimate of :math:`\sqrt{E g^2}` of our own |

Some keep a second moment that can be read of some parameters alone: 8-bit optimizers, which leave small tensors as they
are. The estimate stands for the others. What bitsandbytes calls `state1` and `state2` is read under the names above.

Only ratios matter, so the learning rates are taken relative to the largest. The diagonal is infinite where the
optimizer has never seen a gradient: there it has moved nothing, and the correction shall not either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Blocks
from .projection import project_half_space, project_momentum

__all__ = ["RunningSecondMoment", "needs_estimate", "optimizer_metric", "project_moments"]


class RunningSecondMoment:
    r"""Exponential average of squared gradients, for optimizers that keep none: :math:`v \leftarrow \beta v + (1 -
    \beta) g^2`, with bias correction as in Adam.

    Args:
        beta: Share :math:`\beta` that is kept at each step.
    """

    epsilon = 1e-8

    def __init__(self, beta: float = 0.999) -> None:
        self.beta = beta
        self.values: dict[str, Tensor] = {}
        """Per parameter, float32, in its shape."""
        self.steps: dict[str, int] = {}
        """Per parameter, how many gradients were seen."""

    def __bool__(self) -> bool:
        return bool(self.values)

    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Take in the `.grad` of each parameter; gradients that are not finite are the loss scaler's affair."""
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if not gradients or not _all_finite(gradients.values()):
            return
        for name, gradient in gradients.items():
            square = gradient.detach().float().square()
            known = self.values.get(name)
            if known is None or known.shape != square.shape:
                self.values[name], self.steps[name] = square * (1 - self.beta), 1
            else:
                self.values[name] = known.to(square.device).lerp_(square, 1 - self.beta)
                self.steps[name] += 1

    def metric(self, name: str) -> Tensor | None:
        r""":math:`\sqrt{\hat v} + 10^{-8}`, or `None` where no gradient was seen."""
        if name not in self.values:
            return None
        return _root(self.values[name] / (1 - self.beta ** self.steps[name]), self.epsilon)

    def forget(self, names: Iterable[str]) -> None:
        """Forget what was seen of some parameters, if anything."""
        for name in names:
            self.values.pop(name, None)
            self.steps.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"values": {name: v.clone() for name, v in self.values.items()}, "steps": dict(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.values = {name: v.clone() for name, v in state["values"].items()}
        self.steps = dict(state["steps"])


def needs_estimate(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> list[str]:
    """The names of parameters of which the optimizer keeps no second moment that can be read; all, before its first."""
    groups = _groups(optimizer)
    states = {name: _state(optimizer, p) for name, p in parameters.items()}
    unknown = [name for name, p in parameters.items() if _kind(states[name], groups[id(p)], p) is None]
    return [name for name in unknown if not _is_unscaled(optimizer, states[name], groups[id(parameters[name])])]


def optimizer_metric(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], estimate: RunningSecondMoment
) -> dict[str, Tensor]:
    """The diagonal of the metric for each parameter that the optimizer can move.

    Args:
        optimizer: After its step.
        parameters: By name; all of this optimizer.
        estimate: Used where the optimizer keeps no second moment.

    Returns:
        Positive tensors, of the parameter's shape or of no dimension, float32. Parameters without state, or with
        learning rate 0, are missing.
    """
    groups = _groups(optimizer)
    rates = {name: _rate(groups[id(p)]) for name, p in parameters.items()}
    fastest = max(rates.values(), default=0.0)
    diagonals = _diagonals(optimizer, parameters, groups, estimate)
    return {
        name: diagonal if rates[name] == fastest else diagonal * (fastest / rates[name])
        for name, diagonal in diagonals.items()
        if rates[name] > 0
    }


def _rate(group: Mapping[str, Any]) -> float:
    """The group's learning rate; 1 for an optimizer that finds its own (Adafactor of transformers), alike for all."""
    rate = group.get("lr")
    # With relative_step the entry is None, or what a scheduler noted there, which may be 0.
    return 1.0 if rate is None or group.get("relative_step") else float(rate)


def _diagonals(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    groups: Mapping[int, dict[str, Any]],
    estimate: RunningSecondMoment,
) -> dict[str, Tensor]:
    found: dict[str, Tensor | None]
    estimated = needs_estimate(optimizer, parameters)
    if len(estimated) == len(parameters) and not estimate:
        # Before any gradient was seen, as in the first step of a closure, no coordinate is known to differ.
        found = {name: _one(p) for name, p in parameters.items()}
    else:
        found = {name: _own_diagonal(optimizer, p, groups[id(p)]) for name, p in parameters.items()}
        found |= {name: estimate.metric(name) for name in estimated}
    return {name: diagonal for name, diagonal in found.items() if diagonal is not None}


def _is_unscaled(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether all coordinates of a parameter are stepped at one rate, told by the keys as there are many classes."""
    if "momentum_buffer" in state and "square_avg" not in state and "betas" not in group:
        return True
    return isinstance(optimizer, _UNSCALED) or _bitsandbytes_kind(optimizer) == "momentum"


_UNSCALED = (torch.optim.SGD, torch.optim.ASGD)


_BITSANDBYTES = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "ademamix": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "lars": ("momentum_buffer",),
    "lion": ("exp_avg",),
    "momentum": ("momentum_buffer",),
    "rmsprop": ("square_avg",),
    "adagrad": ("sum",),
}
"""What `state1` and `state2` are, by the kind of optimizer. AdEMAMix keeps two first moments in one tensor."""

_BITSANDBYTES_BLOCK = 256
"""So many values of an 8-bit moment have a scale in common."""


def _bitsandbytes_kind(optimizer: torch.optim.Optimizer) -> str | None:
    module = sys.modules.get("bitsandbytes")
    if module is None or not isinstance(optimizer, module.optim.optimizer.Optimizer8bit):
        return None
    return getattr(optimizer, "optimizer_name", None)


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    """The optimizer's state of a parameter, under the names that PyTorch has for it."""
    state = optimizer.state.get(parameter, {})
    if "state1" not in state:  # as at every step of most optimizers
        return state
    names = _BITSANDBYTES.get(_bitsandbytes_kind(optimizer) or "", ())
    return {**state, **{name: state.get(key) for key, name in zip(("state1", "state2"), names, strict=False)}}


def _kind(state: Mapping[str, Any], group: Mapping[str, Any], parameter: Tensor) -> str | None:
    """Whose second moment `state` holds, told by its keys, since there are many classes of Adam."""
    if "betas" in group and _readable(state.get("exp_avg_sq"), parameter):
        return "adam"
    if "acc_delta" not in state and _readable(state.get("square_avg"), parameter):
        return "rmsprop"
    return "adagrad" if _readable(state.get("sum"), parameter) else None


def _own_diagonal(optimizer: torch.optim.Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    state = _state(optimizer, parameter)
    if _is_unscaled(optimizer, state, group):
        return _one(parameter)
    kind, epsilon = _kind(state, group, parameter), group.get("eps", 1e-8)
    if {"d", "d0"} <= group.keys():
        epsilon = epsilon * group["d"]  # Prodigy's moments are of gradients times its estimate d
    if kind == "adam":
        second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        return _root(_bias_corrected(second.float(), state.get("step"), group["betas"][1]), epsilon)
    if kind == "rmsprop":
        second = state["square_avg"].float()
        if group.get("centered"):
            second = (second - state["grad_avg"].float().square()).clamp_min(0.0)
        return _root(second, epsilon)
    return _root(state["sum"].float(), epsilon) if kind == "adagrad" else None


def _readable(moment: Any, parameter: Tensor) -> bool:
    # Of a tensor's own class: those of 8-bit optimizers (torchao) look like one, and compute nothing.
    plain = type(moment) in (Tensor, nn.Parameter)
    return plain and moment.is_floating_point() and moment.shape == parameter.shape


def _bias_corrected(second: Tensor, step: Any, beta: Any) -> Tensor:
    if step is None:
        return second
    if isinstance(step, Tensor) and step.device == second.device and step.device.type != "cpu":
        return second / (1 - beta**step).clamp_min(torch.finfo(torch.float32).tiny)  # without waiting for the device
    correction = 1 - float(beta) ** float(step)
    return second / correction if correction > 0 else second


def _root(second: Tensor, epsilon: Any) -> Tensor:
    return torch.where(second > 0, second.sqrt() + epsilon, torch.inf)


def _one(parameter: Tensor) -> Tensor:
    return torch.ones((), device=parameter.device)


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _all_finite(tensors: Any) -> bool:
    return bool(torch.stack([t.detach().float().sum().isfinite() for t in tensors]).all())


# First moments


@dataclass(frozen=True)
class _FirstMoment:
    """A first moment in the optimizer's state."""

    value: Tensor
    """Floating, in the parameter's shape."""

    write: Callable[[Tensor], Any]
    """Puts another value in its place."""

    of_steps: bool
    r"""Whether it averages steps, gradients divided by the metric, and not gradients."""


def project_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    metric: Mapping[str, Tensor],
    *,
    strength: float = 1.0,
) -> list[str]:
    r"""Project the optimizer's first moments in place, so that they do not push the drift up.

    A moment of gradients is projected as :func:`~peft_gradproj.projection.project_momentum` says. One that already
    holds steps, divided by the metric (RMSprop, Adafactor), is minus a step :math:`\Delta`, and is projected as one.
    Quantised moments, of bitsandbytes and torchao, are quantised again.

    Args:
        optimizer: After its step.
        parameters: By name.
        gradient: The gradient :math:`s` of the drift.
        metric: As :func:`optimizer_metric` gives it.
        strength: Share of the change that is made.

    Returns:
        The names of parameters whose first moment is there and cannot be read.
    """
    groups = _groups(optimizer)
    moments: dict[str, _FirstMoment] = {}
    unread = []
    for name in metric:
        state = _state(optimizer, parameters[name])
        key = "exp_avg" if "exp_avg" in state else "momentum_buffer"
        if state.get(key) is None:
            continue
        moment = _first_moment(state, key, groups[id(parameters[name])], parameters[name])
        if moment is None:
            unread.append(name)
        else:
            moments[name] = moment
    of_gradients, of_steps = (
        {name: moment.value for name, moment in moments.items() if moment.of_steps is kind} for kind in (False, True)
    )
    for name, new in (_of_gradients(of_gradients, gradient, metric) | _of_steps(of_steps, gradient, metric)).items():
        moments[name].write(moments[name].value.lerp(new, strength))
    return unread


def _first_moment(
    state: Mapping[str, Any], key: str, group: Mapping[str, Any], parameter: Tensor
) -> _FirstMoment | None:
    moment: Any = state[key]
    if key == "momentum_buffer":
        of_steps = "square_avg" in state
    else:
        # CAME has betas, and averages what it has divided by its factors already.
        of_steps = "betas" not in group or any(kept.endswith(("_row", "_col")) for kept in state)
    if _readable(moment, parameter):
        return _FirstMoment(moment, moment.copy_, of_steps)
    if "state1" in state and moment.dtype == torch.uint8 and moment.shape == parameter.shape:
        return _of_bitsandbytes(state, of_steps)
    if type(moment).dequantize is not Tensor.dequantize and moment.shape == parameter.shape:
        # torchao's kinds, which quantise what is copied into them.
        return _FirstMoment(moment.dequantize().to(parameter.dtype), moment.copy_, of_steps)
    return None


def _of_bitsandbytes(state: Mapping[str, Any], of_steps: bool) -> _FirstMoment | None:
    """A moment of 8 bits, scaled block by block."""
    functional = sys.modules["bitsandbytes"].functional
    moment, code, scales = state["state1"], state.get("qmap1"), state.get("absmax1")
    if code is None or scales is None or len(scales) != -(-moment.numel() // _BITSANDBYTES_BLOCK):
        return None
    if moment.device != scales.device:
        return None  # a paged one

    def write(value: Tensor) -> None:
        quantised, found = functional.quantize_blockwise(value.contiguous(), code=code, blocksize=_BITSANDBYTES_BLOCK)
        moment.copy_(quantised.view_as(moment))
        scales.copy_(found.absmax)

    value = functional.dequantize_blockwise(moment, absmax=scales, code=code, blocksize=_BITSANDBYTES_BLOCK)
    return _FirstMoment(value.view_as(moment).float(), write, of_steps)


def _of_gradients(
    moments: dict[str, Tensor], gradient: Mapping[str, Tensor], metric: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if not moments:
        return {}
    blocks = Blocks(moments)
    diagonal = blocks.joined(metric)
    # Where the metric is infinite the optimizer itself divides by its epsilon alone: no moment may arise there.
    s = [torch.where(m.isinf(), 0.0, x) for m, x in zip(diagonal, blocks.joined(gradient), strict=True)]
    projected = project_momentum(blocks.joined(moments), s, metric=diagonal)
    return blocks.split(projected)


def _of_steps(
    moments: dict[str, Tensor], gradient: Mapping[str, Tensor], metric: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if not moments:
        return {}
    blocks = Blocks(moments)
    steps = [-m for m in blocks.joined(moments)]
    s = blocks.joined(gradient)
    projected = project_half_space(steps, s, 0.0, restore=0.0, metric=blocks.joined(metric))
    return {name: -new for name, new in blocks.split(projected).items()}
