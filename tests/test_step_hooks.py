"""Every optimizer step of the process is seen, in order, for as long as somebody holds the observer."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from peft_gradproj.step_hooks import ORDER_CORRECTION, ORDER_RETRACTION, observe_steps


class Recorder:
    """Writes down what it is told, with the parameter's value at that time."""

    def __init__(self, name: str, events: list[tuple[str, str, float]]) -> None:
        self.name = name
        self.events = events

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.events.append((self.name, "before", _value(optimizer)))

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.events.append((self.name, "after", _value(optimizer)))


def _value(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["params"][0].detach())


def _parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor(1.0))
    parameter.grad = torch.tensor(1.0)
    return parameter


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adafactor", "Adagrad"])
def test_an_observer_sees_the_parameters_before_and_after_the_step(name: str) -> None:
    events: list[tuple[str, str, float]] = []
    recorder = Recorder("a", events)
    observe_steps(recorder, ORDER_CORRECTION)
    parameter = _parameter()

    getattr(torch.optim, name)([parameter], lr=0.1).step()

    assert [event[:2] for event in events] == [("a", "before"), ("a", "after")]
    assert events[0][2] == 1.0
    assert events[1][2] == float(parameter.detach()) != 1.0


def test_the_correction_comes_before_the_retraction_whoever_registered_first() -> None:
    events: list[tuple[str, str, float]] = []
    retraction, correction = Recorder("retraction", events), Recorder("correction", events)
    observe_steps(retraction, ORDER_RETRACTION)
    observe_steps(correction, ORDER_CORRECTION)

    torch.optim.SGD([_parameter()], lr=0.1).step()

    assert [event[0] for event in events if event[1] == "after"] == ["correction", "retraction"]


def test_observing_twice_is_the_same_as_once() -> None:
    events: list[tuple[str, str, float]] = []
    recorder = Recorder("a", events)
    observe_steps(recorder, ORDER_CORRECTION)
    observe_steps(recorder, ORDER_CORRECTION)

    torch.optim.SGD([_parameter()], lr=0.1).step()

    assert len(events) == 2


def test_an_observer_that_nobody_holds_is_forgotten() -> None:
    events: list[tuple[str, str, float]] = []
    recorder = Recorder("a", events)
    observe_steps(recorder, ORDER_CORRECTION)
    del recorder
    gc.collect()

    torch.optim.SGD([_parameter()], lr=0.1).step()

    assert events == []


def test_steps_within_schedulers_and_scalers_are_seen_and_skipped_ones_are_not() -> None:
    events: list[tuple[str, str, float]] = []
    recorder = Recorder("a", events)
    observe_steps(recorder, ORDER_CORRECTION)
    parameter = _parameter()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    for loss, seen in ((parameter * 3.0, 2), (parameter * float("inf"), 0)):
        events.clear()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert len(events) == seen


def test_observers_are_told_in_the_order_in_which_they_came() -> None:
    # Processes of one training communicate in these calls, so all must make them in one order.
    events: list[tuple[str, str, float]] = []
    recorders = [Recorder(str(i), events) for i in range(20)]
    for recorder in recorders:
        observe_steps(recorder, ORDER_CORRECTION)

    torch.optim.SGD([_parameter()], lr=0.1).step()

    assert [event[0] for event in events if event[1] == "before"] == [r.name for r in recorders]
