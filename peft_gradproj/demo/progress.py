"""The stages of the demo: a progress bar for each, and what each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
        wall, cpu = time.perf_counter(), time.process_time()
        columns = (
            TextColumn("{task.description:<44}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.update(task, completed=done)
        self.seconds[name] = (time.perf_counter() - wall, time.process_time() - cpu)
        self.console.print(f"{name:<44} {self.seconds[name][0]:6.1f} s ({self.seconds[name][1]:.0f} s of CPU)")
