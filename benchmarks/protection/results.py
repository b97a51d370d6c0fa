"""From runs to a JSON of figures, and from that JSON to a page with tables and plots."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from peft_gradproj.demo.settings import DemoSettings
from peft_gradproj.evaluation.attacks import steps_until
from peft_gradproj.evaluation.figures import Share

from . import attack_runs
from .matrix import ASKED, ATTACKED, MATRIX, TUNED_LOGO, Entry
from .methods import (
    ALL_METHODS,
    BY_DEFAULT,
    GUARDED_ONLINE,
    GUIDANCE_SWEEPS,
    GUIDED,
    GUIDED_FURTHER,
    MAIN,
    OTHERWISE,
    SECOND_LOOK,
    VARIED,
)
from .runs import BASE, THREADS_PER_RUN, conditions, write_json
from .tasks import COLLECTED, TaskKey

COMMAND = "python -m benchmarks.protection"
STEP_TIMES = "step_times.json"
FIGURES = (
    "leak",
    "leak_other",
    "kept",
    "kept_new",
    "learned",
    "beyond_oracle",
    "top1",
    "top5",
    "in_style",
    "drift",
)
OTHER_PROMPTS = {True: "unprompted", False: "prompted"}
"""By whether captions name the concept, and with them the prompts of *leak*: how those of the other leak are called."""
CURVES = {
    "revival_on_concept": "revival with the concept",
    "revival_without_concept": "revival without it",
    "revival_with_probes": "revival with the probes",
    "revival_with_probes_within_basis": "the same within the basis",
}
ATTACK_FIGURES = {"leak": "leak", "top1": "top 1", "loss": "loss"}
"""Of samples and pictures under attack, and what they are called."""
MEMBERSHIP = {"loss": "loss", "calibrated": "calibrated loss", "pia": "PIA"}
BACK = (0.25, 0.5)
"""A concept is back where it leaks so much: more than what detectors find by mistake makes of a few dozen samples."""
ADVERSARY_STEPS = f"revival with the concept, steps until a leak of {BACK[0]}"
ADVERSARY = (
    "before, leak",
    "before, top 1",
    "before, loss",
    "textual inversion, leak",
    "textual inversion, top 1",
    "prompt search, leak",
    "revival without it, leak",
    "revival without it, top 1",
    ADVERSARY_STEPS,
    f"revival with the concept, steps until a leak of {BACK[1]}",
    "revival with the concept, leak",
    "revival with the concept, top 1",
    "revival with the concept, loss",
    "revival with the probes, leak",
    "revival with the probes, top 1",
    "the same within the basis, leak",
    "the same within the basis, top 1",
    *(f"membership by {title}" for title in MEMBERSHIP.values()),
)
"""Figures of attacks that the page of claims has."""
COVERING = {"ours": "found", "masked, found by any": "found by any", SECOND_LOOK.name: "missing 20 %, second look"}
"""Methods whose rows say what networks' masks cover, and what these are called."""
TRADING = (
    "oracle",
    "masked, missing 20 %, guarded",
    GUARDED_ONLINE.name,
    f"{GUARDED_ONLINE.name}, probes anywhere",
    *(method.name for method in OTHERWISE),
    f"{GUARDED_ONLINE.name}, history 4, restore 1",
    *(method.name for method in GUIDED),
    *GUIDANCE_SWEEPS,
    SECOND_LOOK.name,
    *(method.name for method in GUIDED_FURTHER),
    "masked, found",
    BY_DEFAULT.name,
    "ours, by default, probe every 4",
    "ours, probe every 8",
    "ours",
    "ours, probe every 2",
    "ours, restore 1.0",
    "ours, probe history 4",
)
"""What trades how little is learned where the concept is for what is kept."""
IN_SHORT = ("plain", "oracle", "masked, found", "ours", "ours, by default")
"""Methods of the table that the page begins with."""
CONCEPTS_IN_WORDS = {
    "logo-youtube": "the YouTube logo",
    "logo-spotify": "the Spotify logo",
    "identity": "one mascot of six",
    "style": "one style of two",
}
NOT_RUN = "(not run)"
Regime = tuple[str, bool, int]
"""A task without its seed: the concept, whether captions name it, and in how many percent of the pictures it is."""


def write_results(results: Path, docs: Path, settings: DemoSettings) -> None:
    """Write `protection.json`, and from it `benchmark.md`, its plots, and `claims.md`."""
    files = sorted((results / "protection").rglob("*.json"))
    read = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    found = [run for run in read if run["method"] in (BASE, *ALL_METHODS)]
    if strange := sorted({run["method"] for run in read if run not in found}):
        print(f"left out, since there are no such methods: {'; '.join(strange)}.", file=sys.stderr)
    runs = [run for run in found if "leaks" in run]
    attacks = [run for run in found if "membership" in run]
    timed = results / STEP_TIMES
    content = {
        "command": COMMAND,
        "versions": conditions()["versions"],
        "threads_per_run": THREADS_PER_RUN,
        "settings": asdict(settings),
        "rows": rows_of(runs),
        "attacks": attack_rows_of(attacks),
        "attacks_made": len(attacks),
        "detectors": detectors_of(runs),
        "conditions": conditions_of(runs),
        "costs": costs_of(runs),
        "step_times": json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else None,
    }
    write_json(results / "protection.json", content, indent=1)
    write_pages(content, docs)


def figures_of(run: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The figures of a run; those relative to base, plain or oracle need theirs on the same task, and are NaN without.

    Args:
        run: What `runs.run` wrote.
        others: The runs of all methods on the same task, by method.
    """

    def share_of_drop(kind: str, yardstick: str, start: str = BASE) -> float:
        if run["method"] == BASE or start not in others or yardstick not in others:
            return math.nan
        first, last = others[start]["losses"][kind], others[yardstick]["losses"][kind]
        return (first - run["losses"][kind]) / (first - last)

    return {
        "leak": run["leaks"] / run["samples"],
        # Runs from before both were asked for have the one that is called the leak.
        "leak_other": run.get(f"leaks_{OTHER_PROMPTS[TaskKey.parse(run['task']).named]}", math.nan) / run["samples"],
        "kept": share_of_drop("seen", "oracle"),
        "kept_new": share_of_drop("new", "oracle"),
        "learned": share_of_drop("logo", "plain"),
        "beyond_oracle": share_of_drop("logo", "plain", start="oracle"),
        "top1": run["top1"] / run["samples"],
        "top5": run["top5"] / run["samples"],
        "in_style": run["in_style"] / run["samples"],
        "drift": run["drift"],
    }


def rows_of(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each concept, regime and method: mean and standard deviation over seeds, and each seed's figures."""
    by_task: dict[str, dict[str, Any]] = {}
    for run in runs:
        by_task.setdefault(run["task"], {})[run["method"]] = run
    cells: dict[tuple[str, bool, int, str], dict[int, dict[str, float]]] = {}
    masks: dict[tuple[str, bool, int, str], list[dict[str, float | None]]] = {}
    for text, methods in by_task.items():
        key = TaskKey.parse(text)
        for name, run in methods.items():
            cell = (key.concept, key.named, key.percent, name)
            cells.setdefault(cell, {})[key.seed] = figures_of(run, methods)
            if "masks" in run:
                masks.setdefault(cell, []).append(run["masks"])
    rows = []
    for cell, by_seed in cells.items():
        concept, named, percent, name = cell
        rows.append(
            {
                "concept": concept,
                "named": named,
                "percent": percent,
                "method": name,
                "seeds": sorted(by_seed),
                "mean": {f: _rounded(mean(s[f] for s in by_seed.values())) for f in FIGURES},
                "deviation": {f: _rounded(_deviation([s[f] for s in by_seed.values()])) for f in FIGURES},
                "by_seed": {str(s): {f: _rounded(v) for f, v in by_seed[s].items()} for s in sorted(by_seed)},
                "masks": [{k: _rounded(v) for k, v in m.items()} for m in masks.get(cell, [])],
            }
        )
    order = [BASE, *ALL_METHODS]
    return sorted(rows, key=lambda r: (*_regime_of(r), order.index(r["method"])))


def attack_rows_of(attacks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method: what each attack reached, mean over tasks and seeds, and the curves of each seed.

    Of tasks and seeds on which as many methods were attacked as on any: rows are means over the same ones.
    Steps are counted until so many samples show the concept, on the mean over seeds of the curves; `None` is never.
    """
    by_task: dict[str, dict[str, Mapping[str, Any]]] = {}
    for found in attacks:
        by_task.setdefault(found["task"], {})[found["method"]] = found
    most = max(map(len, by_task.values()), default=0)
    whole = [methods for methods in by_task.values() if len(methods) == most]
    shared = set.intersection(*map(set, whole)) if whole else set()
    rows = []
    for name in [n for n in (BASE, *ALL_METHODS) if n in shared]:
        group = [methods[name] for methods in whole]
        curves = {title: [f[curve] for f in group] for curve, title in CURVES.items()}
        before = [points[0][1] for points in curves["revival with the concept"]]
        figures = {
            **{f"before, {figure}": [seen[key] for seen in before] for key, figure in ATTACK_FIGURES.items()},
            "textual inversion, leak": [f["textual_inversion"]["leak"] for f in group],
            "textual inversion, top 1": [f["textual_inversion"]["top1"] for f in group],
            "prompt search, leak": [f["prompt_search"]["again"] for f in group],
            **{
                f"{title}, {figure}": [points[-1][1][key] for points in seeds]
                for title, seeds in curves.items()
                for key, figure in ATTACK_FIGURES.items()
            },
            **{
                f"membership by {title}": [f["membership"][attack]["auc"] for f in group]
                for attack, title in MEMBERSHIP.items()
                if all(attack in f["membership"] for f in group)
            },
        }
        steps = {
            f"{title}, steps until a leak of {share}": steps_until(_mean_curve(seeds), share)
            for title, seeds in curves.items()
            for share in BACK
        }
        rows.append(
            {
                "method": name,
                "tasks": [f["task"] for f in group],
                "mean": {figure: _rounded(mean(values)) for figure, values in figures.items()} | steps,
                "least": {figure: _rounded(min(values)) for figure, values in figures.items()},
                "most": {figure: _rounded(max(values)) for figure, values in figures.items()},
                "curves": {f["task"]: {curve: f[curve] for curve in CURVES} for f in group},
            }
        )
    return rows


def _mean_curve(curves: Iterable[list[Any]], figure: str = "leak") -> list[tuple[int, float]]:
    """Leaks by step, or another figure, of curves that were measured at the same steps."""
    return [(points[0][0], mean(figures[figure] for _, figures in points)) for points in zip(*curves, strict=True)]


def detectors_of(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Error rates of each concept's detector on real pictures."""
    return {TaskKey.parse(run["task"]).concept: run["detector"] for run in runs}


def conditions_of(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Of each concept: in which precisions its runs were made, and by which judges; rows of several do not compare.

    Runs from before judges were told apart do not say by which.
    """
    found: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        seen = found.setdefault(TaskKey.parse(run["task"]).concept, {"autocast": set(), "judges": set()})
        seen["autocast"].add(run["autocast"])
        if "judges" in run:
            seen["judges"].add(run["judges"])
    return {concept: {name: sorted(values) for name, values in kinds.items()} for concept, kinds in found.items()}


def costs_of(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By precision: how many runs trained, and the mean of their training times in seconds of a processor."""
    seconds: dict[str, list[float]] = {}
    for run in runs:
        if "train_cpu_seconds" in run:
            seconds.setdefault(precision_of(run), []).append(run["train_cpu_seconds"])
    return {
        precision: {"runs": len(values), "train_cpu_seconds": round(mean(values), 1)}
        for precision, values in sorted(seconds.items())
    }


def precision_of(run: Mapping[str, Any]) -> str:
    """What its networks ran in, such as `float32`."""
    return "float32" if run["autocast"] == "None" else run["autocast"].removeprefix("torch.")


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def _rounded(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None


# The pages


def write_pages(content: Mapping[str, Any], docs: Path) -> None:
    """Write `benchmark.md` with its plots, and `claims.md`, into the documentation."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    (docs / "images").mkdir(parents=True, exist_ok=True)
    rows = content["rows"]
    tables: dict[Regime, list[Any]] = {}
    for row in rows:
        tables.setdefault(_regime_of(row), []).append(row)
    made = {Entry(TaskKey(*_regime_of(row), seed), row["method"]) for row in rows for seed in row["seeds"]}
    ordered = sorted(tables.items(), key=lambda item: (-len(item[1]), item[0]))
    plot_leak_against_kept(rows, docs / "images" / "leak-against-kept.png")
    plot_sweeps(rows, docs / "images" / "one-setting-changed.png")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    environment.filters["attack_figure"] = attack_figure
    environment.filters["share"] = lambda d: f"{Share(**d).value:.3f} of {d['total']}"
    names = {
        "content": content,
        "tables": [(title(key), table) for key, table in ordered],
        "varied": VARIED,
        "other_prompts": OTHER_PROMPTS,
        "in_short": list(in_short(rows)),
        "columns": IN_SHORT,
        "total": len(MATRIX),
        "trained": sum(entry.method != BASE for entry in MATRIX),
        "asked": sum(entry.method != BASE for entry in ASKED),
        "missing": len(set(MATRIX) - made),
        "precision_of": precision_of,
        "untouched": [title(key) for key in sorted({_regime(e.task) for e in MATRIX} - tables.keys())],
        "masks": list(_covered(rows)),
        "covering": COVERING,
        "trading": TRADING,
        "otherwise": [method.name for method in OTHERWISE],
        "guided": GUIDED[0].name,
        "second_look": SECOND_LOOK.name,
        "further": GUIDED_FURTHER[0].name,
        "ours_further": GUIDED_FURTHER[1].name,
        "attacked": len(ATTACKED),
        "attack_runs": attack_runs,
        "collected": COLLECTED,
        "adversary": ADVERSARY,
        "adversary_steps": ADVERSARY_STEPS,
        "back": BACK[0],
        "mixed": [
            CONCEPTS_IN_WORDS[c] for c, kinds in content["conditions"].items() if max(map(len, kinds.values())) > 1
        ],
        **lookups(content),
    }
    for page in ("benchmark.md", "claims.md"):
        text = environment.get_template(f"{page}.jinja").render(names)
        (docs / page).write_text(text, encoding="utf-8")


def attack_figure(means: Mapping[str, Any], name: str) -> str:
    """A figure of an attack as the page has it."""
    if name not in means:
        return ""
    if "steps until" in name:
        return f"> {attack_runs.REVIVAL_STEPS}" if means[name] is None else str(means[name])
    return f"{means[name]:.2f}"


def lookups(content: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """How prose asks for single figures, of tasks that show the concept in 75 % of the pictures unless it says so."""
    rows = {(*_regime_of(row), row["method"]): row for row in content["rows"]}
    attacks = {row["method"]: row for row in content["attacks"]}

    def has(method: str, concept: str = TUNED_LOGO, *, named: bool = False, percent: int = 75) -> bool:
        return (concept, named, percent, method) in rows

    def value(
        method: str,
        name: str,
        concept: str = TUNED_LOGO,
        *,
        named: bool = False,
        percent: int = 75,
        seed: int | None = None,
    ) -> str:
        row = rows.get((concept, named, percent, method))
        if row is None or (seed is not None and str(seed) not in row["by_seed"]):
            return NOT_RUN
        if seed is not None:
            row = {"mean": row["by_seed"][str(seed)], "deviation": dict.fromkeys(FIGURES)}
        return figure(row, name) or NOT_RUN

    def seeds(method: str, concept: str = TUNED_LOGO, *, named: bool = False) -> str:
        return ", ".join(map(str, rows[concept, named, 75, method]["seeds"]))

    def by_seed(method: str, name: str, concept: str = TUNED_LOGO) -> str:
        row = rows.get((concept, False, 75, method))
        if row is None:
            return NOT_RUN
        values = [figures[name] for figures in row["by_seed"].values()]
        return ", ".join(NOT_RUN if value is None else f"{value:.2f}" for value in values)

    def attack(method: str, name: str) -> str:
        return attack_figure(attacks[method]["mean"], name) if method in attacks else NOT_RUN

    def attack_by_seed(method: str, name: str) -> str:
        if method not in attacks:
            return NOT_RUN
        return f"{attack(method, name)} ({attacks[method]['least'][name]:.2f} to {attacks[method]['most'][name]:.2f})"

    def revival(method: str) -> list[list[Any]]:
        return [curves["revival_on_concept"] for curves in attacks[method]["curves"].values()]

    def losses(method: str) -> list[tuple[int, float]]:
        """By step, in further training on pictures with the concept, the loss where it is."""
        return _mean_curve(revival(method), "loss") if method in attacks else []

    def losses_above(method: str, other: str) -> str:
        """At how many of the steps after the start, and seeds, the loss of one is above that of another."""
        pairs = [
            seen["loss"] > seen_too["loss"]
            for curve, curve_too in zip(revival(method), revival(other), strict=True)
            for (_, seen), (_, seen_too) in zip(curve[1:], curve_too[1:], strict=True)
        ]
        return f"{sum(pairs)} of {len(pairs)}"

    ahead = partial(_ahead, content["rows"])
    found: tuple[Callable[..., Any], ...]
    found = (has, value, seeds, by_seed, attack, attack_by_seed, losses, losses_above)
    return {"ahead": ahead, **{lookup.__name__: lookup for lookup in found}}


def _ahead(rows: Iterable[Mapping[str, Any]], first: str, second: str, name: str) -> str:
    """On how many of the tasks and seeds on which both were run the first is above the second, and by how much."""
    found: dict[str, dict[tuple[Regime, str], float]] = {first: {}, second: {}}
    for row in rows:
        if row["method"] in found:
            known = {seed: figures[name] for seed, figures in row["by_seed"].items() if figures[name] is not None}
            found[row["method"]] |= {(_regime_of(row), seed): value for seed, value in known.items()}
    both = [found[first][task] - found[second][task] for task in found[first].keys() & found[second].keys()]
    above = [difference for difference in both if difference > 0]
    return f"{len(above)} of {len(both)}" + (f", by {min(above):.2f} to {max(above):.2f}" if above else "")


def in_short(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Of each regime its title and, for the methods of `IN_SHORT`, leak / kept (number of seeds)."""
    by_key = {(*_regime_of(row), row["method"]): row for row in rows}
    regimes = {key[:3] for key in by_key}
    for concept, named, percent in sorted(regimes, key=lambda r: ([*CONCEPTS_IN_WORDS].index(r[0]), r[2], r[1])):
        name = f"{CONCEPTS_IN_WORDS[concept]}, {percent} %, {'named' if named else 'not named'}"
        yield name, [_leak_and_kept(by_key.get((concept, named, percent, method))) for method in IN_SHORT]


def _leak_and_kept(row: Mapping[str, Any] | None) -> str:
    if row is None or row["mean"]["kept"] is None:
        return ""
    return f"{row['mean']['leak']:.2f} / {row['mean']['kept']:.2f} ({len(row['seeds'])})"


def _covered(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any], dict[str, str]]]:
    """What the masks of networks cover, of each kind and task: its title, the row, and ranges over the seeds."""
    for row in rows:
        if row["masks"] and row["method"] in COVERING:
            ranges = {kind: _range([mask[kind] for mask in row["masks"]]) for kind in ("stamped", "elsewhere")}
            yield title(_regime_of(row)), row, ranges


def _range(shares: Iterable[float | None]) -> str:
    """The least and the greatest; empty where the concept left nothing to ask about."""
    known = [share for share in shares if share is not None]
    return " to ".join(sorted({f"{end:.3f}" for end in (min(known), max(known))})) if known else ""


def _regime(task: TaskKey) -> Regime:
    return task.concept, task.named, task.percent


def _regime_of(row: Mapping[str, Any]) -> Regime:
    return row["concept"], row["named"], row["percent"]


def title(key: Regime) -> str:
    """A regime in words."""
    concept, named, percent = key
    return f"{concept}, {'named' if named else 'not named'} in the captions, in {percent} % of the pictures"


def figure(row: Mapping[str, Any], name: str) -> str:
    """Mean over seeds, and the standard deviation where there are several."""
    value, spread = row["mean"][name], row["deviation"][name]
    if value is None:
        return ""
    text = f"{value:.2f}" if name != "drift" else f"{value:.3f}"
    return text if spread is None else f"{text} ± {spread:.2f}" if name != "drift" else f"{text} ± {spread:.3f}"


def plot_leak_against_kept(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """One panel for each task: leak across, kept up; the best corner is the upper left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["mean"]["kept"] is not None and row["method"] not in VARIED]
    keys = sorted({_regime_of(row) for row in shown})
    columns = min(3, max(1, len(keys)))
    lines = math.ceil(max(1, len(keys)) / columns)
    size = (5 * columns, 4 * lines + 1.5)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    # A method looks the same in all panels, and no two alike.
    colours, others = pyplot.get_cmap("tab10").colors, [name for name in ALL_METHODS if name not in MAIN]
    looks = {name: ("o", colours[place]) for place, name in enumerate(MAIN)}
    looks |= {name: ("xs^vDP*"[place // 10], colours[place % 10]) for place, name in enumerate(others)}
    handles = {}
    for axis, key in zip(axes.flat, keys, strict=False):
        for row in shown:
            if _regime_of(row) != key:
                continue
            marker, colour = looks[row["method"]]
            handles[row["method"]] = axis.errorbar(
                row["mean"]["leak"],
                row["mean"]["kept"],
                xerr=row["deviation"]["leak"],
                yerr=row["deviation"]["kept"],
                marker=marker,
                color=colour,
                linestyle="",
            )
        axis.set_title(title(key), fontsize=9)
        axis.set_xlabel("leak")
        axis.set_ylabel("kept")
        axis.set_xlim(-0.05, 1.05)
        axis.grid(alpha=0.3)
        # Axes that are shared have their ticks named in the last line only, which need not be full.
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    methods = [name for name in ALL_METHODS if name in handles]
    figure.legend([handles[name] for name in methods], methods, loc="lower center", ncols=2 * columns, fontsize=6)
    figure.tight_layout(rect=(0, 1.5 / size[1], 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_sweeps(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """What one setting changes, on seed 0: kept against leak, between oracle and plain, and against what is learned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    of_task: dict[Regime, dict[str, Any]] = {}
    for row in rows:
        if "0" in row["by_seed"]:
            of_task.setdefault(_regime_of(row), {})[row["method"]] = row["by_seed"]["0"]
    of_task = {key: found for key, found in sorted(of_task.items()) if not VARIED.keys().isdisjoint(found)}
    figure, axes = pyplot.subplots(max(1, len(of_task)), 2, figsize=(13, 4 * max(1, len(of_task)) + 1.5), squeeze=False)
    colours, handles = pyplot.get_cmap("tab10").colors, {}
    guided = (GUIDED[0].name, GUIDED_FURTHER[0].name)
    shown = ("plain", "oracle", "masked, found", "ours", BY_DEFAULT.name, *guided, *VARIED)
    for (of_leak, of_learned), (key, found) in zip(axes, of_task.items(), strict=False):
        for place, name in enumerate(shown):
            figures = found.get(name)
            if figures is None or figures["kept"] is None:
                continue
            look = {"marker": "o*^sD"[place // 10 + (name in VARIED)], "color": colours[place % 10], "linestyle": ""}
            (handles[name],) = of_leak.plot(figures["leak"], figures["kept"], **look)
            # Plain LoRA is 1 by definition, and would press all others into a corner.
            if name != "plain":
                of_learned.plot(figures["learned"], figures["kept"], **look)
        of_leak.set_xlim(-0.05, 1.05)
        of_leak.set_xlabel("leak")
        of_learned.set_xlabel("learned where the concept is, of plain LoRA's")
        for axis in (of_leak, of_learned):
            axis.set_title(f"{title(key)}, seed 0", fontsize=9)
            axis.set_ylabel("kept")
            axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 1.5 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
