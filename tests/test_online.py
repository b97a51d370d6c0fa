"""The online projection keeps each step inside its half-space, in any training loop, and touches nothing else.

The model is a small network with two objectives: inputs whose last features are off shall be fitted (wanted), inputs
that have them on are pulled away from the base model's outputs (the concept), and are the probes.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import pickle
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from helpers import PackedAdam, PackedTensor, UnpackableTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.functional import delete_adapter
from torch import Tensor, nn
from transformers.optimization import Adafactor, AdafactorSchedule

import peft_gradproj.blocks as module_of_blocks
import peft_gradproj.online as online
from benchmarks.overhead import TrackTensors
from peft_gradproj.config import GradProjConfig
from peft_gradproj.errors import ConceptDataError, GradProjConfigError, OnlineProjectionError
from peft_gradproj.online import (
    OnlineProjection,
    attach_online_projection,
    detach_online_projection,
    online_projections,
)
from peft_gradproj.optimizer_metric import RunningSecondMoment, optimizer_metric, project_moments
from peft_gradproj.probes import ConceptProbes, adapters_disabled, collect_concept_probes
from peft_gradproj.projection import metric_norm, project_half_space

PROBES = 12
EMPTY_ESTIMATE: dict[str, Any] = {"values": {}, "steps": {}}

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class OthersSGD(torch.optim.Optimizer):
    """SGD with momentum by somebody else."""

    def __init__(self, parameters: list[nn.Parameter], lr: float = 0.02) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["momentum_buffer"] = group["momentum"] * state.get("momentum_buffer", 0.0) + p.grad
                p.sub_(group["lr"] * state["momentum_buffer"])


OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd of others": OthersSGD,
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=3e-2, betas=(0.9, 0.3), amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "rmsprop centered momentum": lambda p: torch.optim.RMSprop(p, lr=1e-4, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adam packed": lambda p: PackedAdam(p, packed_from=0),
    "adam packed in part": lambda p: PackedAdam(p, packed_from=50),
    "adafactor of transformers": Adafactor,
    "adafactor of transformers, scheduled": lambda p: AdafactorSchedule(Adafactor(p)).optimizer,
}


# The task


@dataclass
class Task:
    """A network with adapters, what it shall learn, what it shall not, and its concept probes."""

    net: nn.Sequential
    x: Tensor
    wanted: Tensor
    concept: Tensor
    unwanted: Tensor
    probes: ConceptProbes

    def loss(self) -> Tensor:
        return self.wanted_loss() + (self.net(self.concept) - self.unwanted).square().mean()

    def wanted_loss(self) -> Tensor:
        return (self.net(self.x) - self.wanted).square().mean()

    def parameters(self, adapter: str = "default") -> list[nn.Parameter]:
        return [p for name, p in self.net.named_parameters() if f".{adapter}." in name]

    def drift(self) -> Tensor:
        """The drift on all probes, computed here and not by the package."""
        square = (self.net(self.concept) - self.probes.targets).square()
        weights = self.probes.weights.expand_as(square)
        return (weights * square).sum() / weights.sum()


def make_task(*, started: bool = True, dropout: float = 0.0, adapters: tuple[str, ...] = ("default",)) -> Task:
    """Always the same task; `started` adapters are not zero, so that there is drift from the first step."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)).eval()
    x = torch.randn(24, 12)
    x[:, 8:] = 0.0
    concept = torch.randn(PROBES, 12)
    with torch.no_grad():
        targets, wanted = net(concept), net(x) + torch.sin(x[:, :4])
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "3"], lora_dropout=dropout)
    for adapter in adapters:
        inject_adapter_in_model(config, net, adapter)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in net.named_parameters():
        if started and "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        # Away from the base model, and from where the adapter starts.
        unwanted = targets + 1.0 + 3.0 * (net(concept) - targets)
    weights = 0.1 + torch.rand(PROBES, 4, generator=generator)
    probes = ConceptProbes({"input": concept}, targets, weights)
    return Task(net.train(), x, wanted, concept, unwanted, probes)


def in_dtype(task: Task, dtype: torch.dtype) -> Task:
    probes = ConceptProbes(
        {name: x.to(dtype) for name, x in task.probes.inputs.items()},
        *(None if x is None else x.to(dtype) for x in (task.probes.targets, task.probes.weights)),
    )
    tensors = {name: getattr(task, name).to(dtype) for name in ("x", "wanted", "concept", "unwanted")}
    return dataclasses.replace(task, net=task.net.to(dtype), probes=probes, **tensors)


def take_steps(task: Task, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def dot(u: list[Tensor], v: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(u, v, strict=True))


def drift_and_gradient(task: Task, parameters: list[nn.Parameter]) -> tuple[float, list[Tensor]]:
    drift = task.drift()
    return float(drift.detach()), list(torch.autograd.grad(drift, parameters))


def started_at(projection: OnlineProjection, step: int) -> OnlineProjection:
    projection.load_state_dict({"step": step, "estimate": EMPTY_ESTIMATE, "history": []})
    return projection


# The half-space


def _violations(make_optimizer: Optimizers, strength: float, restore: float) -> list[float]:
    """How far each of some steps is outside its half-space, relative to rounding; positive is outside."""
    task = make_task()
    attach_online_projection(
        task.net, "default", task.probes, probe_every=1, probe_batch_size=PROBES, restore=restore, strength=strength
    )
    parameters = task.parameters()
    optimizer = make_optimizer(parameters)
    found = []
    for _ in range(5):
        before, (drift, s) = copies(parameters), drift_and_gradient(task, parameters)
        take_steps(task, optimizer)
        step = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        scale = drift + (dot(s, s) * dot(step, step)) ** 0.5
        found.append((dot(s, step) + restore * drift) / scale)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("restore", [0.0, 0.7])
def test_every_step_fulfils_the_constraint(name: str, restore: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "RESTORE_LIMIT", 1e9)

    assert max(_violations(OPTIMIZERS[name], 1.0, restore)) < 1e-5
    assert max(_violations(OPTIMIZERS[name], 0.0, restore)) > 1e-2


def with_loss_targets(probes: ConceptProbes, loss_targets: Tensor) -> ConceptProbes:
    return ConceptProbes(probes.inputs, probes.targets, probes.weights, loss_targets)


def guided_excess(task: Task, guidance: float) -> Tensor:
    """(1 + eta) times the drift, and eta times what the concept's loss fell, computed here and not by the package."""
    output, base = task.net(task.concept), task.probes.targets
    weights = task.probes.weights.expand_as(base)

    def mean(values: Tensor) -> Tensor:
        return (weights * values).sum() / weights.sum()

    fell = mean((task.unwanted - base).square()) - mean((task.unwanted - output).square())
    return (1 + guidance) * task.drift() + guidance * fell


@pytest.mark.parametrize("guidance", [0.1, 1.0])
def test_with_negative_guidance_every_step_is_corrected_against_the_guided_drift(
    guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "RESTORE_LIMIT", 1e9)
    task = make_task()
    projection = attach_online_projection(
        task.net,
        "default",
        with_loss_targets(task.probes, task.unwanted),
        probe_every=1,
        probe_batch_size=PROBES,
        restore=0.5,
        negative_guidance=guidance,
    )
    parameters = task.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(5):
        before, drift, excess = copies(parameters), float(task.drift().detach()), guided_excess(task, guidance)
        s = list(torch.autograd.grad(excess, parameters))
        take_steps(task, optimizer)
        step = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        assert float(excess.detach()) > 0
        assert dot(s, step) <= -0.5 * float(excess.detach()) + 1e-5
        assert projection.last.excess == pytest.approx(float(excess.detach()), rel=1e-4)
        assert projection.last.drift == pytest.approx(drift, rel=1e-4)


def test_negative_guidance_keeps_the_concepts_loss_where_it_was() -> None:
    def fell(**options: Any) -> float:
        task = make_task(started=False)
        probes = with_loss_targets(task.probes, task.unwanted)
        attach_online_projection(task.net, "default", probes, probe_every=4, probe_batch_size=PROBES, **options)
        take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-2), 200)
        with torch.no_grad():
            return float(guided_excess(task, 1.0) - 2 * task.drift())

    drawn_back, drawn_past = fell(), fell(negative_guidance=0.5)

    assert drawn_back > 0.0
    assert drawn_past < 0.5 * drawn_back


@pytest.mark.parametrize("history", [1, 2])
def test_a_concept_loss_that_is_high_enough_leaves_room_for_steps(history: int) -> None:
    task = make_task()
    with torch.no_grad():
        # The adapter went away from these, and going on would soon be more of a drift than of a loss.
        away = task.probes.targets - 0.75 * (task.net(task.concept) - task.probes.targets)
    probes = with_loss_targets(task.probes, away)
    projection = attach_online_projection(
        task.net,
        "default",
        probes,
        negative_guidance=1.0,
        probe_batch_size=PROBES,
        probe_every=1,
        probe_history=history,
    )
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    take_steps(task, optimizer, 2)

    assert projection.last.drift > 0
    assert projection.last.excess < 0
    assert projection.last.removed_share == 0
    free = make_task()
    of_free = torch.optim.AdamW(free.parameters(), lr=1e-3)
    take_steps(free, of_free, 2)
    for p, q in zip(task.parameters(), free.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], of_free.state[q]["exp_avg"])

    for group in optimizer.param_groups:
        group["lr"] = 10.0
    take_steps(task, optimizer)
    assert projection.last.removed_share > 0, "more than there was room for"


def test_with_negative_guidance_the_first_step_of_a_fresh_adapter_does_not_go_towards_the_concept() -> None:
    def towards(stored: bool, **options: Any) -> float:
        """By how much the first step raises the guided drift, to first order."""
        task = make_task(started=False)
        probes = task.probes
        probes = ConceptProbes(probes.inputs, probes.targets if stored else None, probes.weights, task.unwanted)
        attach_online_projection(task.net, "default", probes, probe_batch_size=PROBES, **options)
        parameters = task.parameters()
        before, s = copies(parameters), list(torch.autograd.grad(guided_excess(task, 0.5), parameters))
        take_steps(task, torch.optim.SGD(parameters, lr=0.1))
        return dot(s, [p.detach() - b for p, b in zip(parameters, before, strict=True)])

    assert towards(True) > 1e-3
    for stored in (True, False):
        assert towards(stored, negative_guidance=0.5) < 1e-6


@pytest.mark.parametrize("options", [{}, {"rule": "orthogonal", "probe_every": 1}])
def test_negative_guidance_has_no_effect_without_loss_targets_nor_on_the_literal_rule(options: dict[str, Any]) -> None:
    ends = []
    for guidance in (0.0, 1.0):
        task = make_task()
        probes = with_loss_targets(task.probes, task.unwanted) if options else task.probes
        attach_online_projection(task.net, "default", probes, negative_guidance=guidance, **options)
        take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-2), 3)
        ends.append(copies(task.parameters()))

    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class SharpnessAware(torch.optim.Optimizer):
    """SGD by the gradient a little uphill, so that each step calls the closure twice, at other weights (SAM)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        (group,) = self.param_groups
        loss = closure()
        uphill = [0.01 * p.grad for p in group["params"]]
        with torch.no_grad():
            for p, up in zip(group["params"], uphill, strict=True):
                p.add_(up)
        closure()
        with torch.no_grad():
            for p, up in zip(group["params"], uphill, strict=True):
                p.sub_(up).sub_(p.grad, alpha=group["lr"])
        return loss


def test_steps_with_a_closure_fulfil_the_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "RESTORE_LIMIT", 1e9)
    task = make_task()
    projection = attach_online_projection(
        task.net, "default", task.probes, probe_every=1, probe_batch_size=PROBES, restore=0.7
    )
    parameters = task.parameters()
    optimizer = SharpnessAware(parameters, lr=0.05)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        return loss

    for _ in range(3):
        before, (drift, s) = copies(parameters), drift_and_gradient(task, parameters)
        optimizer.step(closure)
        step = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        assert dot(s, step) <= -0.7 * drift + 1e-5
    assert projection.last.removed_share > 0.0


def _adam(state: dict[str, Tensor], key: str = "exp_avg_sq", beta: float = 0.999) -> Tensor:
    return (state[key] / (1 - beta ** float(state["step"]))).sqrt() + 1e-8


METRICS: dict[str, Callable[[dict[str, Tensor], list[Tensor], bool], Tensor]] = {
    "sgd": lambda state, gradients, is_b: torch.ones(()),
    "sgd nesterov": lambda state, gradients, is_b: torch.ones(()),
    "sgd of others": lambda state, gradients, is_b: torch.ones(()),
    "asgd": lambda state, gradients, is_b: torch.ones(()),
    "adamw": lambda state, gradients, is_b: _adam(state),
    "adamw fused": lambda state, gradients, is_b: _adam(state),
    "adam amsgrad": lambda state, gradients, is_b: _adam(state, "max_exp_avg_sq", 0.3),
    "adamw, lora+": lambda state, gradients, is_b: _adam(state) / (4.0 if is_b else 1.0),
    "rmsprop": lambda state, gradients, is_b: state["square_avg"].sqrt() + 1e-8,
    "adagrad": lambda state, gradients, is_b: state["sum"].sqrt() + 1e-10,
    "adafactor": lambda state, gradients, is_b: _averaged(gradients).sqrt() + 1e-8,
    "adam packed in part": lambda state, gradients, is_b: _averaged(gradients).sqrt() + 1e-8,
}


def _averaged(gradients: list[Tensor]) -> Tensor:
    average, beta = torch.zeros_like(gradients[0]), 0.999
    for gradient in gradients:
        average = beta * average + (1 - beta) * gradient.square()
    return average / (1 - beta ** len(gradients))


def _lora_plus(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": parameters[0::2]}, {"params": parameters[1::2], "lr": 4e-3}]
    return torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize("name", METRICS)
def test_the_corrected_step_is_the_nearest_in_the_optimizers_metric(name: str) -> None:
    """Two runs, the second corrected at its third step: the difference is the formula, worked out here."""
    make_optimizer = OPTIMIZERS.get(name, _lora_plus)
    results, gradients = [], []
    for strength in (0.0, 1.0):
        task = make_task()
        projection = OnlineProjection(
            task.net, "default", task.probes, probe_every=3, probe_batch_size=PROBES, restore=0.05, strength=strength
        )
        started_at(projection, 1).attach()
        parameters = task.parameters()
        optimizer = make_optimizer(parameters)
        gradients = []
        for _ in range(3):
            before, (drift, s) = copies(parameters), drift_and_gradient(task, parameters)
            take_steps(task, optimizer)
            gradients.append([p.grad.clone() for p in parameters])
        results.append((before, copies(parameters)))
    (before, plain), (before_too, corrected) = results
    states = [optimizer.state[p] for p in parameters]
    metric = [METRICS[name](state, [g[i] for g in gradients], i % 2 == 1) for i, state in enumerate(states)]

    step = [p - b for p, b in zip(plain, before, strict=True)]
    whitened = [x / m for x, m in zip(s, metric, strict=True)]
    coefficient = max(0.0, dot(s, step) + 0.05 * drift) / dot(s, whitened)
    assert all(torch.equal(b, c) for b, c in zip(before, before_too, strict=True)), (
        "uncorrected steps are the plain ones"
    )
    assert coefficient > 0
    for p, w, c in zip(plain, whitened, corrected, strict=True):
        assert torch.allclose(c, p - coefficient * w, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["sgd nesterov", "sgd of others", "adamw", "adamw fused", "nadam", "rmsprop centered momentum"]
)
def test_the_first_moment_does_not_push_the_drift_up(name: str) -> None:
    pushes = []
    for strength in (0.0, 1.0):
        task = make_task()
        attach_online_projection(
            task.net, "default", task.probes, probe_every=1, probe_batch_size=PROBES, strength=strength
        )
        parameters = task.parameters()
        optimizer = OPTIMIZERS[name](parameters)
        _, s = drift_and_gradient(task, parameters)
        take_steps(task, optimizer)
        states = [optimizer.state[p] for p in parameters]
        moments = [state.get("exp_avg", state.get("momentum_buffer")) for state in states]
        metric = [_adam(state) if "exp_avg_sq" in state else torch.ones(()) for state in states]
        along = [m / d for m, d in zip(moments, metric, strict=True)]
        pushes.append(-dot(s, along) / (dot(s, s) * dot(along, along)) ** 0.5)

    assert pushes[0] > 1e-2
    assert pushes[1] < 1e-5


@pytest.mark.parametrize(
    ("key", "companion", "of_steps"),
    [
        ("exp_avg", {}, False),
        ("exp_avg", {"exp_avg_res_row": torch.ones(2)}, True),
        ("momentum_buffer", {}, False),
        ("momentum_buffer", {"square_avg": torch.ones(2)}, True),
    ],
)
def test_a_first_moment_is_projected_as_what_it_averages(
    key: str, companion: dict[str, Tensor], of_steps: bool
) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    # With the metric it pushes the drift up, without it down, or the other way round.
    moment, s, metric = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 10.0])
    for m in (moment, -moment):
        optimizer.state[parameter] = {key: m.clone(), **companion}
        assert project_moments(optimizer, {"w": parameter}, {"w": s}, {"w": metric}) == []
        pushes = [-(s * (x if of_steps else x / metric)).sum() for x in (m, optimizer.state[parameter][key])]
        assert float(pushes[1]) == pytest.approx(min(0.0, float(pushes[0])), abs=1e-6)


def test_strength_scales_the_correction() -> None:
    ends = {}
    for strength in (0.0, 0.5, 1.0):
        task = make_task()
        attach_online_projection(task.net, "default", task.probes, probe_every=1, strength=strength)
        take_steps(task, torch.optim.SGD(task.parameters(), lr=0.05))
        ends[strength] = copies(task.parameters())

    for none, half, full in zip(*ends.values(), strict=True):
        assert torch.allclose(half, (none + full) / 2, atol=1e-7)
        assert not torch.allclose(none, full, atol=1e-4)


@pytest.mark.parametrize(("history", "most"), [(1, 5), (3, 7.5)])
def test_a_correction_takes_few_copies_of_the_adapter(history: int, most: float) -> None:
    """Tensors that live at a time beyond those of stock LoRA, in copies of all its parameters.

    Where the adapter is large beside the activations that is the peak memory. It was 4.7 and 7.1 copies (13 of either
    before vectors were made when they are asked for): the drift's gradient, the metric, the step, the corrected one.
    """

    def peak(**options: Any) -> tuple[int, int]:
        with TrackTensors() as tracker:
            base = nn.Sequential(*[nn.Linear(256, 256) for _ in range(48)])
            stock = {"r": 64, "target_modules": [str(i) for i in range(48)]}
            if options:
                probes = collect_concept_probes(base, [({"input": torch.randn(2, 256)}, None)], store_targets=False)
                config: Any = GradProjConfig(**stock, concept_probes=probes, probe_every=1, **options)
            else:
                config = LoraConfig(**stock)
            model = get_peft_model(base, config)
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=1e-3)
            for _ in range(history + 1):
                optimizer.zero_grad()
                model(torch.randn(2, 256)).square().mean().backward()
                optimizer.step()
        return tracker.peak, sum(p.numel() * p.element_size() for p in parameters)

    (ours, copy_), (stock, _) = peak(probe_history=history), peak()
    assert (ours - stock) / copy_ < most


@pytest.mark.parametrize("still", [0, 1])
@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, False), (torch.float32, True), (torch.float64, False)])
def test_older_half_spaces_are_swept_before_the_newest(
    dtype: torch.dtype, large: bool, still: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kaczmarz, worked out here: the older one asks for what its linear model says is left.

    It is kept in bfloat16, but of parameters in float64, which are there for their precision. Parameters that the
    optimizer does not move, the first `still` ones, are not moved by the sweep either.
    """
    if large:
        # As for an adapter of millions of parameters: several vectors, which are made when they are asked for.
        monkeypatch.setattr(module_of_blocks, "_CPU_LIMIT", 64)
        monkeypatch.setattr(module_of_blocks, "_SMALL", 0)
    task, plain = (in_dtype(make_task(), dtype) for _ in range(2))
    attach_online_projection(
        task.net, "default", task.probes, probe_every=1, probe_batch_size=PROBES, probe_history=2, restore=0.1
    )
    parameters, plain_parameters = task.parameters(), plain.parameters()
    optimizer, plain_optimizer = (
        torch.optim.SGD([{"params": p[still:]}, *[{"params": q, "lr": 0.0} for q in p[:still]]], lr=0.1)
        for p in (parameters, plain_parameters)
    )
    first, (first_drift, first_s) = copies(parameters), drift_and_gradient(task, parameters)
    take_steps(task, optimizer)
    before, (drift, s) = copies(parameters), drift_and_gradient(task, parameters)
    for p, b in zip(plain_parameters, before, strict=True):
        p.data.copy_(b)
    take_steps(plain, plain_optimizer)
    take_steps(task, optimizer)

    step = [p.detach() - b for p, b in zip(plain_parameters, before, strict=True)][still:]
    kept = [x.to(torch.bfloat16) for x in first_s] if dtype == torch.float32 else first_s
    left = max(0.0, first_drift + dot(kept, before) - dot(kept, first))
    swept = project_half_space(step, kept[still:], left, restore=0.1)
    assert any(not torch.equal(a, b) for a, b in zip(swept, step, strict=True)), "the older half-space must matter"
    swept = project_half_space(swept, s[still:], drift, restore=0.1)
    assert all(torch.equal(p, b) for p, b in zip(parameters[:still], first[:still], strict=True))
    for p, b, d in zip(parameters[still:], before[still:], swept, strict=True):
        assert torch.allclose(p.detach(), b + d, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_a_parameter_with_a_learning_rate_of_zero_stands_still_under_adam() -> None:
    """The optimizer has a second moment of it, along which a correction could be spread."""
    task = make_task()
    attach_online_projection(task.net, "default", task.probes, probe_every=1, probe_history=3)
    first, *others = task.parameters()
    before = copies([first, *others])
    take_steps(task, torch.optim.AdamW([{"params": others}, {"params": [first], "lr": 0.0}], lr=1e-2), 4)
    assert torch.equal(first, before[0])
    assert all(not torch.equal(p, b) and torch.isfinite(p).all() for p, b in zip(others, before[1:], strict=True))


def test_a_half_space_that_was_rounded_asks_at_its_own_point_for_what_was_measured_there() -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=1, probe_history=2)
    before = copies(task.parameters())
    take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-3))
    assert projection.last is not None
    ((half_space,),) = projection._history.values()
    assert float(half_space.excess_at([torch.cat([p.flatten() for p in before])])) == pytest.approx(
        projection.last.excess, abs=1e-12
    )


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_an_older_half_space_leaves_room_only_where_the_drift_is_guided(
    guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def spied(step: Any, s: Any, excess: Any, **options: Any) -> list[Tensor]:
        asked.append(float(excess))
        return project_half_space(step, s, excess, **options)

    monkeypatch.setattr(online, "project_half_space", spied)
    task = make_task()
    projection = attach_online_projection(
        task.net,
        "default",
        with_loss_targets(task.probes, task.unwanted),
        probe_every=1,
        probe_history=2,
        negative_guidance=guidance,
    )
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    take_steps(task, optimizer)
    (half_spaces,) = projection._history.values()
    half_spaces[0].offset -= 5.0
    asked.clear()
    take_steps(task, optimizer)

    older, newest = asked
    assert newest > 0
    assert older == 0 if guidance == 0 else older < -1


def test_two_optimizers_of_one_adapter_sweep_the_half_spaces_of_their_own_parameters(tmp_path: Path) -> None:
    """Muon on matrices beside AdamW on convolutions, say: neither moves what the other's half-spaces are about."""

    def build(state: dict[str, Any] | None) -> tuple[Task, OnlineProjection, list[torch.optim.Optimizer]]:
        task = make_task()
        projection = attach_online_projection(
            task.net, "default", task.probes, probe_every=1, probe_batch_size=PROBES, probe_history=2
        )
        first, *others = task.parameters()
        optimizers = [torch.optim.SGD([first], lr=0.1), torch.optim.AdamW(others, lr=1e-2)]
        if state is not None:
            task.net.load_state_dict(state["net"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            projection.load_state_dict(state["projection"])
        return task, projection, optimizers

    def train(task: Task, optimizers: list[torch.optim.Optimizer]) -> None:
        for _ in range(3):
            task.net.zero_grad()
            task.loss().backward()
            for optimizer in optimizers:
                optimizer.step()

    task, projection, optimizers = build(None)
    train(task, optimizers)
    kept = projection.state_dict()["history"]
    assert sorted(len(half_space["gradient"]) for half_space in kept) == [1, len(task.parameters()) - 1]

    state = {"net": task.net.state_dict(), "projection": projection.state_dict()}
    torch.save({**state, "optimizers": [o.state_dict() for o in optimizers]}, tmp_path / "state.pt")
    resumed, _, optimizers_too = build(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in ((task, optimizers), (resumed, optimizers_too)):
        train(*each)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), resumed.parameters(), strict=True))


# Protection


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=5e-3)


def _trained(steps: int = 150, make_optimizer: Optimizers = _adamw, **options: Any) -> tuple[float, float]:
    """Drift and wanted loss after training on both objectives; plain without options."""
    task = make_task(started=False)
    if options:
        task.probes.loss_targets = task.unwanted.clone()
        attach_online_projection(task.net, "default", task.probes, probe_batch_size=PROBES, **options)
    take_steps(task, make_optimizer(task.parameters()), steps)
    with torch.no_grad():
        return float(task.drift()), float(task.wanted_loss())


def test_under_pressure_the_drift_stays_small_and_the_rest_is_learned() -> None:
    start = float(make_task(started=False).wanted_loss().detach())
    plain_drift, plain_loss = _trained()
    literal_drift, _ = _trained(rule="orthogonal", probe_every=2)
    drift, loss = _trained(probe_every=2)

    assert plain_drift > 0.5
    assert drift < 0.02 * plain_drift
    assert literal_drift > 5 * drift, "the paper's rule leaks"
    assert plain_loss < 0.4 * start
    assert loss < 0.6 * start


def test_adafactor_with_a_learning_rate_of_its_own_is_protected() -> None:
    plain_drift, _ = _trained(300, Adafactor)
    drift, loss = _trained(300, Adafactor, probe_every=2)

    assert plain_drift > 0.05
    assert drift < 0.02 * plain_drift
    assert loss < float(make_task(started=False).wanted_loss().detach())


def test_moments_that_can_be_unpacked_are_projected_and_others_are_pointed_out_where_they_push() -> None:
    def packed(kind: Any) -> Optimizers:
        return lambda p: PackedAdam(p, packed_from=0, lr=5e-3, kind=kind)

    drift, loss = _trained(300, lambda p: torch.optim.Adam(p, lr=5e-3), probe_every=4)
    unpacked = _trained(300, packed(UnpackableTensor), probe_every=4)
    assert unpacked == (pytest.approx(drift, rel=0.2), pytest.approx(loss, rel=0.2))
    with pytest.warns(UserWarning, match="PackedAdam, keeps moments that cannot be read"):
        pushed, _ = _trained(300, packed(PackedTensor), probe_every=4)
    assert pushed > 5 * drift
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corrected, _ = _trained(300, packed(PackedTensor), probe_every=1)
    assert corrected < drift


@pytest.mark.parametrize("length", [3, 8])
def test_the_draws_go_on_where_an_optimizer_follows_another(length: int) -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=4, probe_batch_size=2)
    drawn: list[int] = []
    batch = task.probes.batch
    task.probes.batch = lambda indices, *placed: (drawn.extend(indices.tolist()), batch(indices, *placed))[1]  # type: ignore
    for _ in range(6):
        take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-3), length)
    assert sorted(drawn[:PROBES]) == list(range(PROBES)), "each once before any twice"
    # The first step of each is corrected.
    assert projection.step == (5 * 4 + 3 if length == 3 else 6 * 8)


def test_a_new_optimizer_begins_where_a_state_that_was_loaded_says() -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=4)
    take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-3), 9)
    started_at(projection, 3)
    assert projection.step == 3
    take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-3))
    assert projection.step == 4


def test_each_of_many_optimizers_keeps_its_half_spaces() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[str(i) for i in range(6)]), net, "default")
    x = torch.randn(8, 4)
    probes = ConceptProbes({"input": x}, torch.zeros(8, 4))
    projection = attach_online_projection(net, "default", probes, probe_every=1, probe_history=3)
    layers = [[p for p in layer.parameters() if p.requires_grad] for layer in net]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in layers]
    for _ in range(4):
        for optimizer in optimizers:
            net(x).square().mean().backward()
            optimizer.step()
    kept = Counter(frozenset(half_space["gradient"]) for half_space in projection.state_dict()["history"])
    assert [*kept.values()] == [2] * 6
    # A resumed run has them all before its optimizers have taken a step.
    resumed = attach_online_projection(net, "default", probes, probe_every=1, probe_history=3)
    resumed.load_state_dict(projection.state_dict())
    assert len(resumed.state_dict()["history"]) == 12


def test_half_spaces_of_layers_that_are_trained_in_turn_are_bounded() -> None:
    task = make_task()
    projection = attach_online_projection(
        task.net, "default", task.probes, probe_every=1, probe_batch_size=PROBES, probe_history=3
    )
    parameters = task.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for number in [*range(1, 16), *range(1, 16)]:
        for place, parameter in enumerate(parameters):
            parameter.requires_grad_(bool(number >> place & 1))
        take_steps(task, optimizer)
    kept = [set(half_space["gradient"]) for half_space in projection.state_dict()["history"]]
    assert len(kept) == online._PARAMETER_SETS
    # Those of the last.
    assert len(kept[-1]) == len(parameters)


def test_a_unet_with_a_diffusers_adapter_is_protected() -> None:
    from diffusers import UNet2DConditionModel

    from peft_gradproj.probes import collect_concept_probes

    drifts, losses = [], []
    for protect in (False, True):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        inputs = {
            "sample": torch.randn(4, 4, 8, 8),
            "timestep": torch.randint(0, 1000, (4,)),
            "encoder_hidden_states": torch.randn(4, 3, 8),
        }
        where = torch.zeros(4, 1, 8, 8)
        where[..., 2:6, 2:6] = 1.0
        probes = collect_concept_probes(unet, [(inputs, where)])
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]))
        if protect:
            projection = attach_online_projection(unet, "default", probes, probe_every=2)
        trainable = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=5e-3)
        target = probes.targets + where + 0.5 * (1 - where)
        for _ in range(16):
            optimizer.zero_grad()
            error = (unet(**inputs).sample - target).square()
            error.mean().backward()
            optimizer.step()
        with torch.no_grad():
            output = unet(**inputs).sample
        drifts.append(float(((output - probes.targets).square() * where).mean()))
        losses.append(float(((output - target).square() * (1 - where)).mean()))

    assert drifts[1] < 0.5 * drifts[0]
    assert losses[1] < 0.8 * 0.75 * 0.25, "the surroundings start at this without the 0.8, and are learned"
    assert losses[1] < 1.1 * losses[0]
    assert set(projection.last.layers) == {n for n, m in unet.named_modules() if hasattr(m, "lora_A")}


# What bounds the correction


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    drift=st.floats(0, 1e6),
    scale=st.floats(1e-8, 1e3),
    limit=st.floats(0, 4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50)
def test_a_limited_correction_is_short_and_does_not_increase_the_drift(
    sizes: list[int], drift: float, scale: float, limit: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    step, s, metric = ([torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes] for _ in range(3))
    s, metric = [scale * x for x in s], [x.abs() + 1e-3 for x in metric]
    length = limit * metric_norm(step, metric)

    free = project_half_space(step, s, drift, restore=0.7, metric=metric)
    limited = project_half_space(step, s, drift, restore=0.7, metric=metric, restore_limit=length)

    cancelled = project_half_space(step, s, 0.0, restore=0.0, metric=metric)
    beyond = metric_norm([a - b for a, b in zip(limited, cancelled, strict=True)], metric)
    rounding = 1e-9 * scale * float(metric_norm(step)) * (1 + limit)
    assert beyond <= length * (1 + 1e-6) + 1e-9
    assert dot(s, limited) <= rounding + 1e-12
    whole = metric_norm([a - b for a, b in zip(free, cancelled, strict=True)], metric)
    if whole < length:
        assert all(torch.allclose(a, b) for a, b in zip(free, limited, strict=True))


def _saturated() -> Task:
    """Outputs far from the base's, that hardly react to the parameters: a large drift with a vanishing gradient."""
    task = make_task()
    task.probes = ConceptProbes(
        {"input": task.concept},
        task.probes.targets.new_full((PROBES, 4), -1.0),
        run_model=lambda model, inputs: torch.sigmoid(1e-3 * model(**inputs) + 14.0),
    )
    return task


def test_a_vanishing_gradient_does_not_blow_up_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for limit in (online.RESTORE_LIMIT, 1e30):
        monkeypatch.setattr(online, "RESTORE_LIMIT", limit)
        monkeypatch.setattr(OnlineProjection, "_floor_term", lambda *args: torch.zeros(()))
        task = _saturated()
        projection = attach_online_projection(task.net, "default", task.probes, probe_every=3)
        take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-3))
        shares.append(projection.last.removed_share)

    assert 0 < shares[0] <= 1 + 3
    assert shares[1] > 1e3


def test_a_drift_that_the_base_model_has_too_is_a_floor() -> None:
    task = make_task(started=False)
    task.probes = ConceptProbes({"input": task.concept}, task.probes.targets + 0.5, task.probes.weights)
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=1, strength=0.0)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    take_steps(task, optimizer)

    assert projection.last.floor == pytest.approx(0.25, rel=1e-4)
    assert projection.last.drift == pytest.approx(0.0, abs=1e-6)


# With either sign, since one of the two steps lowers the drift.
@pytest.mark.parametrize("offset", [0.5, -0.5])
def test_a_drift_that_is_not_above_the_floor_corrects_nothing(offset: float) -> None:
    ends = []
    for protected in (False, True):
        task = make_task(started=False)
        # Other targets than the base model's answers, so that their gradient is not zero.
        task.probes = ConceptProbes({"input": task.concept}, task.probes.targets + offset, task.probes.weights)
        if protected:
            projection = attach_online_projection(task.net, "default", task.probes, probe_every=1)
        take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-2))
        ends.append([p.detach().clone() for p in task.parameters()])
    assert all(torch.equal(free, corrected) for free, corrected in zip(*ends, strict=True))
    assert projection.last.removed_share == 0


def test_the_floor_costs_a_few_forwards_and_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "FLOOR_PROBES", 10)
    task, run = make_task(), []
    offsets = torch.arange(1.0, PROBES + 1)[:, None] / 10
    weights = torch.arange(1.0, PROBES + 1)

    def run_model(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        run.append(torch.is_grad_enabled())
        return model(**inputs)

    task.probes = ConceptProbes({"input": task.concept}, task.probes.targets + offsets, weights, run_model=run_model)
    reports: list[online.OnlineReport] = []
    projection = attach_online_projection(
        task.net, "default", task.probes, probe_every=1, probe_batch_size=5, on_report=reports.append
    )
    take_steps(task, torch.optim.SGD(task.parameters(), lr=1e-3), 4)

    assert run.count(True) == 4
    assert run.count(False) == 2
    drawn = [projection._draw(i) for i in range(2)]
    numerators = [(weights[i] * offsets[i, 0].square()).sum() for i in drawn]
    denominators = [weights[i].sum() for i in drawn]
    exact = [float(n / d) for n, d in zip(numerators, denominators, strict=True)]
    mean = float(sum(numerators) / sum(denominators))
    assert [report.floor for report in reports] == pytest.approx([*exact, mean, mean], rel=1e-4)


def test_under_autocast_the_rounding_of_the_base_is_no_drift() -> None:
    task, modes = make_task(started=False), []

    def run_model(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        modes.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return model(**inputs)

    task.probes.run_model = run_model
    reports: list[online.OnlineReport] = []
    attach_online_projection(
        task.net, "default", task.probes, probe_every=1, probe_batch_size=PROBES, on_report=reports.append
    )
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    for enabled in (True, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.zero_grad()
            loss = task.loss()
        loss.backward()
        optimizer.step()

    assert [mode[0] for mode in modes] == [True, True, True, True, False, False]
    assert modes[0][1] == torch.bfloat16
    assert reports[0].floor > 1e-8, "bfloat16 rounds"
    assert reports[0].drift < 1e-12
    assert reports[2].floor < 1e-12, "measured anew without autocast"


def test_a_model_in_bfloat16_takes_the_probes_in_its_dtype() -> None:
    task = make_task(started=False)
    task.net.to(torch.bfloat16)
    task.x, task.concept = task.x.bfloat16(), task.concept.bfloat16()
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=1, probe_batch_size=PROBES)
    take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-2), 60)
    plain = make_task(started=False)
    plain.net.to(torch.bfloat16)
    plain.x, plain.concept = plain.x.bfloat16(), plain.concept.bfloat16()
    take_steps(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 60)

    assert projection.last.floor > 1e-7
    assert float(task.drift().detach()) < 0.2 * float(plain.drift().detach())


def test_where_training_has_no_gradient_the_correction_moves_nothing() -> None:
    """Else a coordinate that Adam never moved, whose metric is epsilon, would take the whole correction."""
    task = make_task()
    probes = ConceptProbes({"input": task.concept}, task.probes.targets)
    attach_online_projection(task.net, "default", probes, probe_every=1)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-3)
    a = task.net[0].lora_A["default"].weight
    before = a.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        task.wanted_loss().backward()
        optimizer.step()

    assert torch.equal(a[:, 8:], before[:, 8:]), "the wanted inputs have these features off"
    assert not torch.equal(a[:, :8], before[:, :8])


# Nothing else is touched


def test_gradients_other_adapters_and_the_base_are_untouched() -> None:
    ends = []
    for strength in (0.0, 1.0):
        task = make_task(adapters=("other", "default"))
        for layer in (task.net[0], task.net[3]):
            layer.set_adapter(["other", "default"])
        others = task.parameters("other")
        attach_online_projection(task.net, "default", task.probes, probe_every=1, strength=strength)
        optimizer = torch.optim.AdamW([*others, *task.parameters()], lr=1e-3)
        optimizer.zero_grad()
        task.loss().backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in task.net.parameters()]
        optimizer.step()
        for p, g in zip(task.net.parameters(), gradients, strict=True):
            assert (p.grad is None and g is None) or torch.equal(p.grad, g)
        ends.append((copies(others), copies(task.parameters())))

    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_randomness_and_training_flags_are_untouched() -> None:
    losses = []
    for protect in (False, True):
        task = make_task(dropout=0.3)
        task.net[2].eval()

        def run_model(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            assert not any(module.training for module in model.modules())
            return model(**inputs) + 0.0 * torch.randn(1)

        task.probes.run_model = run_model
        if protect:
            attach_online_projection(task.net, "default", task.probes, probe_every=1, strength=0.0)
        flags = [module.training for module in task.net.modules()]
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(task.parameters(), lr=0.01)
        losses.append([])
        for _ in range(3):
            take_steps(task, optimizer)
            losses[-1].append(float(task.loss().detach()) + float(torch.randn(1)))
        assert [module.training for module in task.net.modules()] == flags

    assert losses[0] == losses[1]


def _steps_until(reports: list[online.OnlineReport], task: Task, optimizer: torch.optim.Optimizer, n: int) -> list[int]:
    reports.clear()
    take_steps(task, optimizer, n)
    return [report.step for report in reports]


def test_only_steps_of_the_adapters_optimizer_count() -> None:
    task, reports = make_task(), []
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=3, on_report=reports.append)
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3)
    stranger = nn.Parameter(torch.ones(1))
    stranger.grad = torch.ones(1)
    other = torch.optim.SGD([stranger], lr=0.1)
    for _ in range(7):
        other.step()
        for _ in range(4):
            (task.loss() / 4).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    assert projection.step == 7
    assert [report.step for report in reports] == [0, 3, 6]


def test_two_optimizers_of_one_adapter_are_both_corrected() -> None:
    task, reports = make_task(), []
    attach_online_projection(task.net, "default", task.probes, probe_every=2, on_report=reports.append)
    first, second = (torch.optim.SGD(p, lr=1e-3) for p in (task.parameters()[:2], task.parameters()[2:]))
    for _ in range(3):
        task.loss().backward()
        first.step()
        second.step()

    assert [(r.step, *r.layers) for r in reports] == [(0, "0"), (0, "3"), (2, "0"), (2, "3")]


def test_two_models_under_one_optimizer_count_its_steps_once() -> None:
    def build(state: dict[str, Any] | None = None) -> tuple[list[Task], list[Any], list[Any], torch.optim.Optimizer]:
        tasks, reports = [make_task(), make_task()], []
        projections = [
            attach_online_projection(task.net, "default", task.probes, probe_every=3, on_report=reports.append)
            for task in tasks
        ]
        optimizer = torch.optim.AdamW([p for task in tasks for p in task.parameters()], lr=1e-3)
        if state is not None:
            optimizer.load_state_dict(state)
        return tasks, projections, reports, optimizer

    def train_both(tasks: list[Task], optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            sum(task.loss() for task in tasks).backward()
            optimizer.step()

    tasks, projections, reports, optimizer = build()
    train_both(tasks, optimizer, 5)
    assert [report.step for report in reports] == [0, 0, 3, 3]
    assert [projection.step for projection in projections] == [5, 5]

    tasks, projections, reports, optimizer = build(optimizer.state_dict())
    train_both(tasks, optimizer, 3)
    assert [report.step for report in reports] == [6, 6]
    assert [projection.step for projection in projections] == [8, 8]

    detach_online_projection(tasks[0].net, "default")
    train_both(tasks, optimizer, 2)
    assert [report.step for report in reports] == [6, 6, 9], "the other one goes on"
    assert projections[1].step == 10


def test_an_adapter_that_is_inactive_or_frozen_is_left_alone() -> None:
    task = make_task(adapters=("default", "other"))
    parameters = task.parameters()
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=1)
    optimizer = torch.optim.SGD([*parameters, *task.parameters("other")], lr=0.1, weight_decay=0.1)
    for layer in (task.net[0], task.net[3]):
        layer.set_adapter("other")
    for p in parameters:
        p.requires_grad_(True)
    take_steps(task, optimizer)
    assert projection.step == 0

    for layer in (task.net[0], task.net[3]):
        layer.set_adapter("default")
    take_steps(task, optimizer)
    assert projection.step == 1

    for p in parameters:
        p.requires_grad_(False)
    optimizer.step()
    assert projection.step == 1


def test_an_adapter_that_was_deleted_costs_nothing_any_more() -> None:
    task = make_task(adapters=())
    config = {"r": 4, "target_modules": ["0", "3"], "concept_probes": task.probes}
    model = get_peft_model(task.net, GradProjConfig(**config))
    gone = weakref.ref(online_projections(model)["default"])
    model.add_adapter("other", GradProjConfig(**config))
    model.set_adapter("other")
    model.delete_adapter("default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(task, torch.optim.AdamW(task.parameters("other"), lr=1e-3))
    gc.collect()
    assert gone() is None
    assert list(online_projections(model)) == ["other"]
    assert len(task.net._forward_pre_hooks) == 1


def test_the_model_is_not_walked_through_at_the_steps_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(adapters=("default", "other"))
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=1)
    walks = []
    find = projection._find_layers
    monkeypatch.setattr(projection, "_find_layers", lambda model: (walks.append(1), find(model)))
    for layer in (task.net[0], task.net[3]):
        layer.set_adapter("other")
    optimizer = torch.optim.AdamW(task.parameters("other"), lr=1e-3)
    take_steps(task, optimizer, 10)
    assert len(walks) == 1
    assert projection.step == 0

    # Until layers are others.
    for place in (0, 3):
        task.net[place] = copy.deepcopy(task.net[place])
        task.net[place].set_adapter("default")
    gc.collect()
    optimizer.add_param_group({"params": task.parameters()})
    take_steps(task, optimizer)
    assert projection.step == 1


def test_parameters_are_found_after_they_were_replaced() -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=2)
    for layer in (task.net[0], task.net[3]):
        for part in (layer.lora_A, layer.lora_B):
            part["default"].weight = nn.Parameter(part["default"].weight.detach().clone())
    take_steps(task, torch.optim.SGD(task.parameters(), lr=0.1))

    assert projection.last.removed_share > 0


def test_a_scaler_that_skips_a_step_skips_the_correction() -> None:
    for fused in (False, True):
        task = make_task()
        projection = attach_online_projection(task.net, "default", task.probes, probe_every=1)
        optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor, moves in ((1.0, True), (float("inf"), False), (1.0, True)):
            before = copies(task.parameters())
            optimizer.zero_grad()
            scaler.scale(task.loss() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            changed = [not torch.equal(p, b) for p, b in zip(task.parameters(), before, strict=True)]
            assert all(changed) if moves else not any(changed)
        assert all(bool(p.isfinite().all()) for p in task.parameters())
        assert projection.step == (3 if fused else 2), "a fused optimizer finds the overflow within its step"


def test_a_step_of_length_zero_stays_so() -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=1)
    before = copies(task.parameters())
    take_steps(task, torch.optim.AdamW(task.parameters(), lr=0.0))

    assert all(torch.equal(p, b) for p, b in zip(task.parameters(), before, strict=True))
    assert projection.last.removed_share == 0.0


def test_its_defaults_are_those_of_the_config() -> None:
    own = {name: p.default for name, p in inspect.signature(OnlineProjection).parameters.items()}
    of_config = {f.name: f.default for f in dataclasses.fields(GradProjConfig)}
    shared = own.keys() & of_config.keys()

    names = {"rule", "strength", "probe_every", "probe_batch_size", "restore", "probe_history", "negative_guidance"}
    assert shared == names
    assert {name: own[name] for name in shared} == {name: of_config[name] for name in shared}
    assert own["seed"] == of_config["probe_seed"]


# Reproducibility


def _run(seed: int, steps: int = 6, **options: Any) -> list[Tensor]:
    task = make_task()
    attach_online_projection(task.net, "default", task.probes, probe_every=2, probe_batch_size=4, seed=seed, **options)
    take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-2), steps)
    return copies(task.parameters())


def test_the_seed_decides_the_run() -> None:
    first, again, other = _run(0), _run(0), _run(1)

    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@given(count=st.integers(1, 9), size=st.integers(1, 12), number=st.integers(0, 12), seed=st.integers(0, 3))
def test_probes_are_drawn_evenly(count: int, size: int, number: int, seed: int) -> None:
    task = make_task()
    weights = torch.zeros(PROBES, 1)
    weights[:count] = 1.0
    probes = ConceptProbes(task.probes.inputs, task.probes.targets, weights)
    projection = OnlineProjection(task.net, "default", probes, probe_batch_size=size, seed=seed)

    drawn = [projection._draw(i).tolist() for i in range(number + 1)]

    assert {len(batch) for batch in drawn} == {min(size, count)}
    times = Counter(index for batch in drawn for index in batch)
    assert set(times) <= set(range(count)), "without weight there is nothing to see"
    assert max(times.values()) - min(times.get(i, 0) for i in range(count)) <= 1
    assert projection._draw(number).tolist() == drawn[-1], "it does not depend on what came before"


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_resumed_run_continues_exactly(name: str, wide: bool, tmp_path: Path) -> None:
    """Also if half-spaces are in float32, as the first versions saved them, and their parts in another order."""

    def build(state: dict[str, Any] | None) -> tuple[Task, OnlineProjection, torch.optim.Optimizer]:
        task = make_task()
        projection = attach_online_projection(
            task.net, "default", task.probes, probe_every=2, probe_batch_size=4, probe_history=4
        )
        optimizer = OPTIMIZERS[name](task.parameters())
        if state is not None:
            task.net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            projection.load_state_dict(state["projection"])
        return task, projection, optimizer

    task, projection, optimizer = build(None)
    take_steps(task, optimizer, 5)
    parts = {"net": task.net, "optimizer": optimizer, "projection": projection}
    torch.save({key: part.state_dict() for key, part in parts.items()}, tmp_path / "state.pt")
    take_steps(task, optimizer, 4)

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for half_space in state["projection"]["history"] if wide else ():
        half_space["gradient"] = {key: s.float() for key, s in reversed(half_space["gradient"].items())}
    resumed, projection_too, optimizer = build(state)
    take_steps(resumed, optimizer, 4)

    assert projection_too.step == projection.step == 9
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), resumed.parameters(), strict=True))
    ((kept, *others),) = projection_too._history.values()
    assert others
    assert all(half_space.blocks is kept.blocks for half_space in others), "loaded ones are laid out anew but once"


def test_recomputed_targets_give_the_same_run() -> None:
    ends = []
    for stored in (True, False):
        task = make_task()
        probes = task.probes if stored else ConceptProbes(task.probes.inputs, None, task.probes.weights)
        attach_online_projection(task.net, "default", probes, probe_every=1)
        take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-3), 3)
        ends.append(copies(task.parameters()))

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("stored", [True, False])
def test_a_run_model_may_take_its_arguments_out_of_the_inputs(stored: bool) -> None:
    ends = []
    for take in (dict.pop, dict.get):
        task = make_task()

        def run_model(model: nn.Module, inputs: dict[str, Any], take: Any = take) -> Tensor:
            return model(take(take(inputs, "nested"), "input"))

        targets = task.probes.targets if stored else None
        probes = ConceptProbes({"nested.input": task.concept}, targets, task.probes.weights, run_model=run_model)
        attach_online_projection(task.net, "default", probes, probe_every=1)
        take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-3), 3)
        ends.append(copies(task.parameters()))

    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def _trained_beside_a_style(*, stored: bool) -> tuple[float, float]:
    """The drift that is measured at last, and the share of a frozen adapter's effect that is undone.

    The training asks for the model as it starts, with the frozen adapter, and some noise: nothing is to be learned.
    """
    task = make_task(started=False, adapters=("style", "default"))
    for layer in (task.net[0], task.net[3]):
        layer.set_adapter(["style", "default"])
    for parameter in task.parameters("style"):
        parameter.requires_grad_(False)
        parameter.add_(0.3 * torch.randn(parameter.shape))
    x, base = torch.randn(24, 12), task.probes.targets
    with torch.no_grad():
        styled, wanted = task.net(task.concept), task.net(x) + 0.05 * torch.randn(24, 4)
    probes = task.probes if stored else ConceptProbes(task.probes.inputs, None, task.probes.weights)
    projection = attach_online_projection(task.net, "default", probes, probe_every=1)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (task.net(x) - wanted).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        left = (task.net(task.concept) - base).norm() / (styled - base).norm()
    return projection.last.drift, 1.0 - float(left)


def test_a_frozen_adapter_beside_is_no_drift_where_targets_are_recomputed() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="beside adapter")
        drift, undone = _trained_beside_a_style(stored=False)
    assert 0.0 < drift < 5e-3
    assert abs(undone) < 0.05


def test_stored_targets_beside_a_frozen_adapter_are_pointed_out_once() -> None:
    with pytest.warns(UserWarning, match="'style'.*store_targets=False") as caught:
        _, undone = _trained_beside_a_style(stored=True)
    assert len([warning for warning in caught if "'style'" in str(warning.message)]) == 1
    assert undone > 0.2, "else there would be nothing to warn of"


# The literal rule


def test_the_literal_rule_makes_the_gradient_orthogonal() -> None:
    task = make_task()
    task.probes.loss_targets = task.unwanted.clone()
    projection = attach_online_projection(
        task.net, "default", task.probes, rule="orthogonal", probe_every=2, probe_batch_size=PROBES
    )
    parameters = task.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for turn in range(3):
        error = (task.net(task.concept) - task.unwanted).square()
        weights = task.probes.weights.expand_as(error)
        s = list(torch.autograd.grad((weights * error).sum() / weights.sum(), parameters))
        optimizer.zero_grad()
        task.loss().backward()
        raw = [p.grad.clone() for p in parameters]
        optimizer.step()
        gradient = [p.grad for p in parameters]
        scale = (dot(s, s) * dot(raw, raw)) ** 0.5
        if turn % 2 == 0:
            assert abs(dot(gradient, s)) < 1e-5 * scale < abs(dot(raw, s))
            assert projection.last.step == turn
        else:
            assert all(torch.equal(g, r) for g, r in zip(gradient, raw, strict=True))


def test_the_literal_rule_cannot_reach_into_a_closure() -> None:
    task = make_task()
    task.probes.loss_targets = task.unwanted.clone()
    attach_online_projection(task.net, "default", task.probes, rule="orthogonal")
    with pytest.raises(OnlineProjectionError, match="closures"):
        torch.optim.SGD(task.parameters(), lr=0.1).step(task.loss)


# Life


def test_the_projection_dies_with_the_model() -> None:
    task = make_task()
    projection = weakref.ref(attach_online_projection(task.net, "default", task.probes))
    gc.collect()
    assert projection() is online_projections(task.net)["default"]

    net = weakref.ref(task.net)
    del task
    gc.collect()
    assert net() is None
    assert projection() is None


def test_copies_and_pickles_of_the_model_are_not_corrected() -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes)
    for net in (copy.deepcopy(task.net), pickle.loads(pickle.dumps(task.net))):
        assert online_projections(net) == {}
        parameters = [p for p in net.parameters() if p.requires_grad]
        net(task.x).square().mean().backward()
        torch.optim.SGD(parameters, lr=0.1).step()
    assert projection.step == 0


def test_another_adapter_of_the_same_name_is_not_corrected() -> None:
    ends = []
    for protected in (False, True):
        task = make_task()
        if protected:
            attach_online_projection(task.net, "default", task.probes, probe_every=1)
        take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-2))
        delete_adapter(task.net, "default", prefix="lora_")
        torch.manual_seed(3)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "3"]), task.net, "default")
        assert online_projections(task.net) == {}
        optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
        with pytest.warns(UserWarning, match="another adapter") if protected else nullcontext():
            take_steps(task, optimizer, 3)
        ends.append(copies(task.parameters()))
        assert not task.net._forward_pre_hooks
        assert list(optimizer.param_groups[0]) == list(torch.optim.AdamW(task.parameters()).param_groups[0])

    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_attaching_twice_counts_once_and_detaching_ends_it() -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=1).attach()
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3)
    take_steps(task, optimizer)
    assert projection.step == 1

    replacement = attach_online_projection(task.net, "default", task.probes)
    take_steps(task, optimizer)
    assert (projection.step, replacement.step) == (1, 1)
    assert online_projections(nn.Sequential(task.net)) == {"default": replacement}

    detach_online_projection(task.net, "default")
    detach_online_projection(task.net, "default")
    take_steps(task, optimizer)
    assert replacement.step == 1
    assert online_projections(task.net) == {}
    assert not task.net._forward_pre_hooks


def test_the_report_can_be_logged() -> None:
    task, reports = make_task(), []
    projection = attach_online_projection(
        task.net, "default", task.probes, on_report=reports.append, probe_batch_size=PROBES
    )
    assert projection.log() == {}
    drift = float(task.drift().detach())
    take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-3))

    log = projection.log()
    assert set(log) == {f"gradproj/{name}" for name in ("drift", "excess", "floor", "removed_share", "seconds")}
    assert log["gradproj/drift"] == log["gradproj/excess"] == pytest.approx(drift, rel=1e-5)
    assert reports == [projection.last]
    assert set(projection.last.layers) == {"0", "3"}
    assert all(share > 0 for share in projection.last.layers.values())
    assert set(projection.log("concept/logo")) == {key.replace("gradproj", "concept/logo") for key in log}
    assert "probe_every=8" in repr(projection)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "paper"}, "rule is 'paper'"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"restore": -0.1}, "restore is -0.1"),
        ({"probe_every": 0}, "probe_every is 0"),
        ({"probe_batch_size": 2.5}, "probe_batch_size is 2.5"),
        ({"probe_history": 0}, "probe_history is 0"),
        ({"negative_guidance": -0.1}, "negative_guidance is -0.1"),
        ({"negative_guidance": float("nan")}, "negative_guidance is nan"),
        ({"negative_guidance": float("inf")}, "negative_guidance is inf"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    task = make_task()
    with pytest.raises(GradProjConfigError, match=message):
        attach_online_projection(task.net, "default", task.probes, **options)


def test_a_model_without_the_adapter_is_refused() -> None:
    task = make_task()
    with pytest.raises(GradProjConfigError, match="no LoRA layer with an adapter 'style'"):
        attach_online_projection(task.net, "style", task.probes)


def test_the_literal_rule_needs_loss_targets() -> None:
    task = make_task()
    with pytest.raises(ConceptDataError, match="loss_targets"):
        attach_online_projection(task.net, "default", task.probes, rule="orthogonal")


def test_targets_of_another_model_are_refused() -> None:
    task = make_task()
    probes = ConceptProbes({"input": task.concept}, torch.ones(PROBES, 3))
    attach_online_projection(task.net, "default", probes, probe_batch_size=8)
    with pytest.raises(ConceptDataError, match=r"shape \(8, 4\), their targets have \(8, 3\)"):
        take_steps(task, torch.optim.SGD(task.parameters(), lr=0.1))


def test_loss_targets_of_another_shape_are_refused() -> None:
    task = make_task()
    probes = ConceptProbes({"input": task.concept}, None, None, torch.ones(PROBES, 3))
    attach_online_projection(task.net, "default", probes, negative_guidance=0.1)
    with pytest.raises(ConceptDataError, match="loss_targets have"):
        take_steps(task, torch.optim.AdamW(task.parameters()))


def test_a_run_model_without_gradient_is_refused() -> None:
    task = make_task()
    task.probes.run_model = torch.no_grad()(lambda model, inputs: model(**inputs))
    attach_online_projection(task.net, "default", task.probes)
    with pytest.raises(OnlineProjectionError, match="no_grad"):
        take_steps(task, torch.optim.SGD(task.parameters(), lr=0.1))


def test_a_drift_that_is_not_finite_stops_the_training() -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes, probe_every=2)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    take_steps(task, optimizer, 2)
    task.net[3].lora_B["default"].weight.data.fill_(1e30)
    with pytest.raises(OnlineProjectionError, match="not finite at step 2"):
        take_steps(task, optimizer)
    assert not projection.probing
    assert task.net.training


def test_a_state_of_something_else_is_refused() -> None:
    task = make_task()
    with pytest.raises(OnlineProjectionError, match="lacks"):
        OnlineProjection(task.net, "default", task.probes).load_state_dict({"step": 3})


def test_an_optimizer_that_never_holds_the_adapter_is_pointed_out() -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes)
    stranger = nn.Parameter(torch.ones(1))
    stranger.grad = torch.ones(1)
    optimizer = torch.optim.SGD([stranger], lr=0.1)
    for _ in range(19):
        optimizer.step()
    with pytest.warns(UserWarning, match="corrected nothing"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            optimizer.step()
    assert projection.step == 0


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_sharded_parameters_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    task = make_task()
    attach_online_projection(task.net, "default", task.probes)
    mesh, part = init_device_mesh("cpu", (1,)), task.net[0].lora_A["default"]
    part.weight = nn.Parameter(distribute_tensor(part.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(OnlineProjectionError, match=r"0\.lora_A is a DTensor"):
        torch.optim.SGD(task.parameters(), lr=0.1).step()


@pytest.mark.usefixtures("process_group")
def test_an_optimizer_that_is_spread_over_processes_is_refused_and_steps_others() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    task = make_task()
    optimizer = ZeroRedundancyOptimizer(task.parameters(), torch.optim.AdamW, lr=1e-3)
    take_steps(task, optimizer)
    attach_online_projection(task.net, "default", task.probes)
    with pytest.raises(OnlineProjectionError, match="ZeroRedundancyOptimizer, of which each process holds a part"):
        take_steps(task, optimizer)


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682), with the state of the package `schedulefree`."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-2, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        group["weight_sum"] += 1.0
        share = 1.0 / group["weight_sum"]
        for p in group["params"]:
            z = self.state[p].setdefault("z", p.clone())
            p.lerp_(z, share).sub_(p.grad, alpha=group["lr"] * (1 - 0.9 * (1 - share)))
            z.sub_(p.grad, alpha=group["lr"])


def test_a_schedule_free_optimizer_is_refused_before_it_moves_anything_and_steps_others() -> None:
    task = make_task()
    optimizer = ScheduleFreeSGD(task.parameters())
    take_steps(task, optimizer)
    before = copies(task.parameters())
    attach_online_projection(task.net, "default", task.probes)
    with pytest.raises(OnlineProjectionError, match="ScheduleFreeSGD, is schedule-free"):
        take_steps(task, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(task.parameters(), before, strict=True))


class DistanceAdam(torch.optim.Adam):
    """Adam with what Prodigy has in its groups, and keeps its epsilon in proportion to."""

    def __init__(self, parameters: list[nn.Parameter], *, d: float) -> None:
        super().__init__(parameters, lr=1e-3, eps=1e-2)
        for group in self.param_groups:
            group |= {"d": d, "d0": 1e-6, "growth_rate": float("inf")}


def test_an_optimizer_that_measures_its_distance_is_pointed_out_once() -> None:
    task = make_task()
    attach_online_projection(task.net, "default", task.probes, probe_every=1)
    optimizer = DistanceAdam(task.parameters(), d=1.0)
    with pytest.warns(UserWarning, match="DistanceAdam, finds its learning rate") as told:
        take_steps(task, optimizer, 2)
    assert len(told) == 1

    other = make_task()
    attach_online_projection(other.net, "default", with_loss_targets(other.probes, other.unwanted), rule="orthogonal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(other, DistanceAdam(other.parameters(), d=1.0))


def test_the_metric_of_an_optimizer_that_measures_its_distance_has_its_epsilon() -> None:
    task = make_task()
    optimizer = DistanceAdam(task.parameters(), d=1e-3)
    take_steps(task, optimizer)
    named = {name: p for name, p in task.net.named_parameters() if p.requires_grad}
    metric = optimizer_metric(optimizer, named, RunningSecondMoment())

    for name, parameter in named.items():
        second = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999)
        assert torch.allclose(metric[name], second.sqrt() + 1e-3 * 1e-2, atol=1e-7)


def test_lbfgs_is_refused_before_it_moves_anything() -> None:
    task = make_task()
    before = copies(task.parameters())
    attach_online_projection(task.net, "default", task.probes)
    with pytest.raises(OnlineProjectionError, match="the optimizer is LBFGS"):
        torch.optim.LBFGS(task.parameters()).step(task.loss)
    assert all(torch.equal(p, b) for p, b in zip(task.parameters(), before, strict=True))


# Several processes


def _train_with(rank: int, world: int, folder: str) -> None:
    """Some steps on this process's share of the data; parameters are written to `folder`."""
    torch.set_num_threads(1)
    task = make_task()
    model: nn.Module = task.net
    if world > 1:
        store = torch.distributed.FileStore(f"{folder}/store", world)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
        model = nn.parallel.DistributedDataParallel(task.net)
    run = []

    def run_model(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        run.append(len(inputs["input"]))
        return model(**inputs)

    probes = with_loss_targets(task.probes, task.unwanted)
    probes.run_model = run_model
    projection = attach_online_projection(
        task.net, "default", probes, probe_every=2, probe_batch_size=5, negative_guidance=0.1
    )
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    inputs, targets = torch.cat([task.x, task.concept]), torch.cat([task.wanted, task.unwanted])
    for _ in range(5):
        optimizer.zero_grad()
        (model(inputs[rank::world]) - targets[rank::world]).square().mean().backward()
        optimizer.step()
    torch.save((copies(task.parameters()), projection.last.drift, max(run)), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        # The model holds the group, and a rank that leaves first would let the other wait for it while it is freed.
        del model
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_two_processes_are_corrected_as_one(tmp_path: Path) -> None:
    _train_with(0, 1, str(tmp_path))
    # Not forked: by now this process may have threads of other tests.
    torch.multiprocessing.start_processes(_train_with, (2, str(tmp_path)), nprocs=2, start_method="spawn")

    (one, drift, most), *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert [most, two[0][2], two[1][2]] == [5, 3, 2], "each runs its share of the batch"
    for parameters, drift_too, _ in two:
        assert drift_too == pytest.approx(drift, rel=1e-4)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(two[0][0], two[1][0], strict=True))


# The running estimate


def test_the_running_estimate_skips_gradients_that_overflowed() -> None:
    estimate, parameter = RunningSecondMoment(), nn.Parameter(torch.zeros(3))
    assert not estimate
    for gradient in ([1.0, 2.0, 0.0], [torch.inf, 0.0, 0.0], [1.0, 2.0, 0.0]):
        parameter.grad = torch.tensor(gradient)
        estimate.update({"p": parameter})

    assert estimate.metric("p").tolist() == pytest.approx([1.0, 2.0, torch.inf])
    assert estimate.metric("q") is None


@pytest.mark.parametrize("name", ["adamw", "adam packed in part", "adam packed"])
def test_only_parameters_that_need_an_estimate_have_one_after_the_first_step(name: str) -> None:
    task = make_task()
    projection = attach_online_projection(task.net, "default", task.probes)
    optimizer = OPTIMIZERS[name](task.parameters())
    packed_from = getattr(optimizer, "packed_from", torch.inf)
    for _ in range(2):
        take_steps(task, optimizer)
        sizes = {values.numel() for values in projection.state_dict()["estimate"]["values"].values()}
        assert sizes == {p.numel() for p in task.parameters() if p.numel() >= packed_from}


def test_the_base_output_is_the_target() -> None:
    """The premise of all above: the task's targets are what the network answers without its adapter."""
    task = make_task()
    with torch.no_grad(), adapters_disabled(task.net):
        assert torch.allclose(task.net(task.concept), task.probes.targets, atol=1e-6)
