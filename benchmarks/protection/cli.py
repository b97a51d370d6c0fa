"""Leak against learning: all methods, concepts, caption regimes and seeds, run by run, resumable.

    python -m benchmarks.protection                          # the whole matrix, some hours on two cores
    python -m benchmarks.protection --tasks 'style/*'        # a part of it
    python -m benchmarks.protection --attacks                # attack the adapters of runs that are there
    python -m benchmarks.protection --step-times             # how long a step takes, some twenty minutes
    python -m benchmarks.protection --report                 # only the tables and plots of what is there

Each run is one JSON file among the results; what is there is not run again.
Run it from the root of the repository.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from peft_gradproj.demo.settings import DemoSettings

from .attack_runs import attack
from .matrix import ATTACKED, MATRIX, Entry
from .results import STEP_TIMES, write_results
from .runs import THREADS_PER_RUN, Folders, run
from .step_times import ROUNDS, measure_step_times
from .tasks import TaskKey

HERE = Path(__file__).resolve().parents[1]
FOLDERS = {"scratch": HERE / "scratch", "results": HERE / "results", "docs": HERE.parent / "docs"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protection", description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, help="folder of adapters and judges")
    parser.add_argument("--results", type=Path, help="folder of the runs and of their summary; a new one runs all anew")
    parser.add_argument("--docs", type=Path, help="folder of the pages")
    parser.add_argument("--tasks", default="*", help="pattern of tasks, such as 'logo-*/named-75/*'")
    parser.add_argument("--methods", nargs="+", default=["*"], metavar="PATTERN", help="patterns of methods")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny runs of the same code, whose figures mean nothing; they have folders of their own",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--attacks", action="store_true", help="attack adapters instead of training them")
    instead.add_argument("--step-times", action="store_true", help="measure how long steps take, in one process")
    instead.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    for name, folder in FOLDERS.items():
        # What tiny runs and judges find must never be taken for what whole ones do.
        default = HERE / "scratch-quick" / name if args.quick else folder
        setattr(args, name, getattr(args, name) or default)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then write the tables."""
    args = parse_args(argv)
    settings = DemoSettings().quick() if args.quick else DemoSettings()
    entries = ATTACKED if args.attacks else MATRIX
    folders = Folders(args.results / "protection", args.scratch)
    path = folders.attacks if args.attacks else folders.result
    of_tasks = [e for e in entries if fnmatch(str(e.task), args.tasks)]
    wanted = [e for e in of_tasks if any(fnmatch(e.method, pattern) for pattern in args.methods)]
    missing = [e for e in wanted if not path(e.task, e.method).exists()]
    timed = args.results / STEP_TIMES
    if args.step_times and not timed.exists():
        _start_worker()
        measure_step_times(timed, settings, args.scratch, 2 if args.quick else ROUNDS)
    elif not (args.report or args.step_times):
        run_all(missing, attack if args.attacks else run, settings, folders, args.workers)
    write_results(args.results, args.docs, settings)


def run_all(
    entries: list[Entry],
    do: Callable[[TaskKey, str, DemoSettings, Folders], None],
    settings: DemoSettings,
    folders: Folders,
    workers: int,
) -> None:
    """Run entries in worker processes; a failed one is told of at the end, when all others are done."""
    failed = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        futures = {pool.submit(partial(do, e.task, e.method, settings, folders)): e for e in entries}
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs", smoothing=0):
            if (error := future.exception()) is not None:
                failed.append(f"{futures[future].task} {futures[future].method}: {error!r}")
                tqdm.write(failed[-1])
    if failed:
        raise SystemExit(f"{len(failed)} of {len(entries)} runs failed:\n" + "\n".join(failed))


def _start_worker() -> None:
    torch.set_num_threads(THREADS_PER_RUN)
