"""Independent jobs side by side, each in a process of its own.

Operations on small networks are too short to be shared among threads: on two cores two trainings with one thread each
are done well before the same two one after the other with two threads.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from .progress import Stages

__all__ = ["Job", "quieten_libraries", "run_jobs"]

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """What one process does.

    Args:
        name: For its progress bar.
        total: Steps that it reports.
        run: Called with a function that takes the number of steps done. It and what it returns are pickled.
    """

    name: str
    total: int
    run: Callable[[Callable[[int], None]], Any]


def run_jobs(jobs: Sequence[Job], stages: Stages, title: str) -> list[Any]:
    """Run all jobs, as many at once as there are threads, and return their results in order.

    The longest should come first. An exception of a job is raised here, once those that run have ended.
    """
    threads = torch.get_num_threads()
    workers = min(len(jobs), threads)
    context = multiprocessing.get_context("spawn")
    done = context.Array("i", len(jobs), lock=False)
    with (
        stages.stages(title, {job.name: job.total for job in jobs}) as progress,
        ProcessPoolExecutor(workers, context, _start_worker, (done, threads // workers)) as pool,
    ):
        # By value: torch would share each tensor through a file descriptor of its own, of which there are few.
        futures = [pool.submit(_run, number, pickle.dumps(job.run)) for number, job in enumerate(jobs)]
        while True:
            finished, running = wait(futures, POLL_SECONDS)
            for job, count in zip(jobs, done, strict=True):
                progress(job.name, count)
            if not running or any(future.exception() for future in finished):
                break
        for future in running:
            future.cancel()
    return [pickle.loads(future.result()) for future in futures]


_done: Any = None


def _start_worker(done: Any, threads: int) -> None:
    global _done
    _done = done
    torch.set_num_threads(threads)
    quieten_libraries()


def _run(number: int, job: bytes) -> bytes:
    def progress(count: int) -> None:
        _done[number] = count

    return pickle.dumps(pickle.loads(job)(progress))


def quieten_libraries() -> None:
    """Silence what loading a pipeline says, which would hide the progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Only now: importing diffusers already warns of what this pipeline does not need.
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
