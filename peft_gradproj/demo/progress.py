"""The stages of the demo: a progress bar for each, and what each took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Stages"]


@dataclass
class Stages:
    """Shows the stages and remembers their wall and CPU seconds."""

    console: Console = field(default_factory=lambda: Console(stderr=True))
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Callable[[int], None]]:
        """Run a stage; call what is yielded with the number of steps done."""
        with self.stages(name, {name: total}) as progress:
            yield lambda done: progress(name, done)

    @contextmanager
    def stages(self, title: str, totals: Mapping[str, int]) -> Iterator[Callable[[str, int], None]]:
        """Run parts of a stage side by side; call what is yielded with a part's name and its number of steps done."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        columns = (
            TextColumn("{task.description:<44}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            tasks = {name: progress.add_task(name, total=total) for name, total in totals.items()}
            yield lambda name, done: progress.update(tasks[name], completed=done)
        self.seconds[title] = (time.perf_counter() - wall, _cpu_seconds() - cpu)
        self.console.print(f"{title:<44} {self.seconds[title][0]:6.1f} s ({self.seconds[title][1]:.0f} s of CPU)")


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])
