"""One place where optimizer steps are observed, so that what follows a step happens in a fixed order.

PyTorch's global optimizer hooks fire for every optimizer of the process, also inside accelerate, Trainer and
GradScaler, which is why no training loop has to be changed. The order within a step is: the optimizer, the half-space
correction (`ORDER_CORRECTION`), the retraction (`ORDER_RETRACTION`), so that the invariants hold last.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

__all__ = ["ORDER_CORRECTION", "ORDER_RETRACTION", "OrderedWeakSet", "StepObserver", "observe_steps"]

ORDER_CORRECTION = 0
ORDER_RETRACTION = 1


class StepObserver(Protocol):
    """What is told of each optimizer step in the process."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before the optimizer changes its parameters."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after the optimizer has changed its parameters."""


T = TypeVar("T")


class OrderedWeakSet(Generic[T]):
    """Objects, by identity, in the order in which they were added, for as long as somebody else refers to them.

    Processes that communicate while they go through it must go in the same order, which a `WeakSet` does not promise.
    """

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, item: T) -> None:
        """Add an object at the end; one that is there keeps its place."""
        key = id(item)
        if key not in self._references:
            self._references[key] = weakref.ref(item, lambda _: self._references.pop(key, None))

    def __iter__(self) -> Iterator[T]:
        items = [reference() for reference in list(self._references.values())]
        return (item for item in items if item is not None)


_observers: dict[int, OrderedWeakSet[StepObserver]] = {
    ORDER_CORRECTION: OrderedWeakSet(),
    ORDER_RETRACTION: OrderedWeakSet(),
}
_registered = False


def observe_steps(observer: StepObserver, order: int) -> None:
    """Tell `observer` of every optimizer step from now on, for as long as somebody else refers to it."""
    global _registered
    if not _registered:
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
        _registered = True
    _observers[order].add(observer)


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for order in sorted(_observers):
        for observer in _observers[order]:
            observer.before_step(optimizer)


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for order in sorted(_observers):
        for observer in _observers[order]:
            observer.after_step(optimizer)
