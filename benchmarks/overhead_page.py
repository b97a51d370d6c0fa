"""The page of the figures that `overhead.py` measures.

python benchmarks/overhead_page.py    # benchmarks/results/overhead.json -> docs/overhead.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_gradproj import GradProjConfig

RESULTS = Path(__file__).parent / "results" / "overhead.json"
QUICK_RESULTS = Path(__file__).parent / "scratch-quick" / "overhead.json"
PAGE = Path(__file__).parent.parent / "docs" / "overhead.md"
ARMS = {
    "stock": "stock LoRA",
    "subspace": "subspace projection",
    "online": "online projection",
    "both": "both",
    "dora": "DoRA",
    "osf": "OSF on the attention, half of each spectrum (its default)",
}
CORRECTED_ARMS = ("online", "both")
"""Those of whose steps the online projection corrects some."""
MODELS = {
    "sd15": "UNet of Stable Diffusion 1.5, 860 M parameters",
    "sd15-512px": "UNet of Stable Diffusion 1.5, on pictures of 512x512",
    "llama1b": "Llama, 1.2 B parameters",
}
DEFAULT_PROBES, DEFAULT_EVERY = GradProjConfig.probe_batch_size, GradProjConfig.probe_every
TRAINING_BATCHES = (4, 8, 16, 32)

Cell = dict[str, Any]
Results = dict[str, Cell]


# Figures


def ratios(cell: Cell, key: str = "seconds") -> dict[str, dict[str, Any]]:
    """For each arm: its steps over stock's in the same round, corrected steps at the share that they have by default.

    Args:
        cell: Of step times; the last of its own `probe_every` steps is a corrected one.
        key: `seconds` by the clock, or `processor_seconds`.

    Returns:
        By arm `ratio`, and quartiles of the `plain` and the `corrected` rounds.
    """
    every, found = cell["probe_every"], {}
    for arm, times in cell[key].items():
        quotients = [t / s for t, s in zip(times, cell[key]["stock"], strict=True)]
        corrected = quotients[every - 1 :: every]
        plain = [q for i, q in enumerate(quotients) if (i + 1) % every]
        if arm in CORRECTED_ARMS:
            ratio = (statistics.median(plain) * (DEFAULT_EVERY - 1) + statistics.median(corrected)) / DEFAULT_EVERY
        else:
            ratio = statistics.median(quotients)
        found[arm] = {"ratio": ratio, "plain": quartiles(plain), "corrected": quartiles(corrected)}
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


def of_kind(results: Results, kind: str) -> list[tuple[list[str], Cell]]:
    """The cells of a kind with the rest of their names, by model, then rank, then rank of the basis."""
    cells = [(key.split("/")[1:], cell) for key, cell in results.items() if key.split("/")[0] == kind]
    return sorted(cells, key=lambda item: [(len(part), part) for part in item[0]])


# The page


def page(file: dict[str, Any]) -> str:
    """All sections of which there are cells, as Markdown.

    Args:
        file: What `overhead.py` writes: `cells`, and the names of those that are `planned`.
    """
    results: Results = file["cells"]
    sections = [
        section
        for make in (asked, step_times, batches, memory, parts, operators, others, conditions)
        if (section := make(results)) is not None
    ]
    missing = [f"`{key}`" for key in file["planned"] if key not in results]
    if missing:
        note = f"{len(missing)} of {len(file['planned'])} cells, which the same command adds: {', '.join(missing)}."
        sections.append(f"## Not measured yet\n\n{note}")
    return "\n\n".join([INTRODUCTION.strip(), *sections]) + "\n"


INTRODUCTION = """
# Overhead

What projection costs in training, against stock LoRA, DoRA and OSF of PEFT. This page is made by `make bench-overhead`
from `benchmarks/results/overhead.json`; do not edit it. `benchmarks/overhead.py` says how each figure is taken.

The models have random weights, in bfloat16 under autocast or, where the processor has no AVX-512, in float32: see the
conditions below. The adapters are float32, trained by AdamW. In every round each arm takes the same step on the same
batch; a ratio is the median over rounds of an arm's time over stock LoRA's in the same round. The batches are small, so
that two cores take seconds a step. That is unfavourable to the subspace projection, whose cost does not depend on the
batch; the online projection's is that of its probe batch, so it is stated against the training batch.
"""


def asked(results: Results) -> str | None:
    """What was asked for at the size of Stable Diffusion 1.5, and what is found below."""
    of_unet = {
        kind: [(key, cell) for key, cell in of_kind(results, kind) if key[0].startswith("sd15")]
        for kind in ("parts", "steps", "memory")
    }
    if not all(of_unet.values()):
        return None
    rows = []
    for arm, most in (("subspace", 1.01), ("online", 1.15)):
        steps = [cell for _, cell in of_unet["steps"] if arm in cell["seconds"]]
        whole = [ratios(cell, "processor_seconds")[arm]["ratio"] for cell in steps]
        by_parts = ", ".join(
            f"{1 + added_by_parts(cell)[arm]:.3f} on {cell['workload']}" for _, cell in of_unet["parts"]
        )
        found = f"by its parts {by_parts}; in whole steps, which differ by more from round to round, {span(whole)}"
        rows.append([f"a step with the {ARMS[arm]} takes at most {most} times as long", found])
    peaks = []
    for (_, r, k), cell in of_unet["memory"]:
        tensors, process = (
            cell["peak_bytes"][kind]["both"] / cell["peak_bytes"][kind]["stock"] for kind in ("tensors", "process")
        )
        peaks.append(f"{tensors:.3f} in tensors and {process:.3f} of the process at r {r[1:]} and k {k[1:]}")
    rows.append(["memory peaks at most 1.02 times as high", f"with both, {'; '.join(peaks)}"])
    return "\n".join(
        [
            "## What we ask for",
            "",
            "On the UNet of Stable Diffusion 1.5, in processor time, which others disturb less than the clock's:",
            "",
            *table(("asked", "found"), rows),
        ]
    )


def added_by_parts(cell: Cell) -> dict[str, float]:
    """What each projection adds to a step on average, as a share of a stock step, in processor time."""
    spent = cell["processor_seconds"]
    at_corrected = sum(seconds for part, seconds in spent.items() if part.endswith("at corrected steps"))
    at_every = spent["projecting"] + spent["retraction"]
    return {"subspace": at_every / spent["stock step"], "online": at_corrected / DEFAULT_EVERY / spent["stock step"]}


def span(values: Sequence[float]) -> str:
    """The least and the most."""
    least, most = (f"{bound(values):.3f}" for bound in (min, max))
    return least if least == most else f"{least} to {most}"


def step_times(results: Results) -> str | None:
    """Ratios of step time, a table for each model."""
    cells = [*of_kind(results, "steps"), *of_kind(results, "osf")]
    if not cells:
        return None
    lines = ["## Step time"]
    for model in dict.fromkeys(names[0] for names, _ in cells):
        mine = [(names[1:], cell) for names, cell in cells if names[0] == model]
        cell = mine[0][1]
        measured = " or ".join(map(str, sorted({cell["probe_every"] for _, cell in mine})))
        lines += [
            "",
            f"### {MODELS[model]}",
            "",
            f"Training on {cell['workload']}, in {cell['versions']['precision']}; probes in a correction: "
            f"{cell['probe_batch']}, every {DEFAULT_EVERY} steps, as the default of {DEFAULT_PROBES} is at a batch of "
            f"{DEFAULT_PROBES * cell['batch'] // cell['probe_batch']}: of the rounds one in {measured} was "
            f"corrected, and counts at one in {DEFAULT_EVERY}. In brackets the quartiles of the steps that are not "
            "corrected, and of those that are.",
            "",
        ]
        rows = [row for names, cell in mine for row in step_rows(names, cell)]
        titles = ("r", "k", "arm", "step time", "not corrected", "corrected", "processor time", "rounds")
        lines += table(titles, rows)
    return "\n".join(lines)


def step_rows(names: list[str], cell: Cell) -> Iterable[list[str]]:
    """A row for each arm but stock."""
    r, k = (name[1:] for name in names) if names else ("", "")
    processor = ratios(cell, "processor_seconds")
    for arm, figures in ratios(cell).items():
        if arm != "stock":
            yield [
                r,
                k if arm in ("subspace", "both") else "",
                ARMS[arm],
                f"{figures['ratio']:.3f}",
                spread(figures["plain"]),
                spread(figures["corrected"]) if arm in CORRECTED_ARMS else "",
                f"{processor[arm]['ratio']:.3f}",
                str(len(cell["seconds"][arm])),
            ]


def batches(results: Results) -> str | None:
    """The online projection's cost at other training batches, computed from what a corrected step costs."""
    rows = []
    for names, cell in of_kind(results, "steps"):
        if names[1:] == ["r16", "k16"]:
            online = ratios(cell)["online"]
            # In units of a training step on as many examples as there are probes.
            pass_cost = (online["corrected"][1] - online["plain"][1]) * cell["batch"] / cell["probe_batch"]
            # Steps that are not corrected cost nothing more: what they differ from stock's by is noise.
            share = [1 + pass_cost * DEFAULT_PROBES / b / DEFAULT_EVERY for b in TRAINING_BATCHES]
            rows.append([MODELS[names[0]], f"{pass_cost:.2f}", *(f"{ratio:.2f}" for ratio in share)])
    if not rows:
        return None
    titles = ("model", "correction, in training steps of its batch", *(f"batch {b}" for b in TRAINING_BATCHES))
    return "\n".join(
        [
            "## The online projection by training batch",
            "",
            f"Computed from the table above, for the default of {DEFAULT_PROBES} probes every {DEFAULT_EVERY} steps: "
            "by how much longer corrected steps take than others. A correction costs what a training step on its "
            "probes would, and a little; where probes hold no targets, as the Llama's, also a forward of the base "
            "model.",
            "",
            *table(titles, rows),
        ]
    )


def memory(results: Results) -> str | None:
    """Peak memory of each arm."""
    rows = []
    for (model, r, k), cell in of_kind(results, "memory"):
        tensors, process = cell["peak_bytes"]["tensors"], cell["peak_bytes"]["process"]
        for arm in tensors:
            ratios_ = [f"{peaks[arm] / peaks['stock']:.3f}" for peaks in (tensors, process)]
            rows.append([MODELS[model], r[1:], k[1:], ARMS[arm], f"{tensors[arm] / 1e6:.0f}", *ratios_])
    if not rows:
        return None
    titles = ("model", "r", "k", "arm", "tensors, MB", "of stock's", "process, of stock's")
    return "\n".join(
        [
            "## Peak memory",
            "",
            "Of a process that trains one arm, with every step corrected. *Tensors* are those that live at once, "
            "which a GPU would have to hold; the resident memory of the process also depends on how the allocator "
            "fills its gaps.",
            "",
            *table(titles, rows),
        ]
    )


def parts(results: Results) -> str | None:
    """Where the time goes."""
    rows, costs = [], []
    for (model, *_), cell in of_kind(results, "parts"):
        spent, added = dict(cell["processor_seconds"]), added_by_parts(cell)
        for arm, share in added.items():
            spent[f"{ARMS[arm]}, by step"] = share * spent["stock step"]
        for part, seconds in spent.items():
            share = 100 * seconds / spent["stock step"]
            rows.append([MODELS[model], cell["workload"], part, f"{1000 * seconds:.0f}", f"{share:.1f} %"])
        # There are half as many probes as examples in a batch.
        cost = 2 * DEFAULT_EVERY * added["online"]
        of_four = 100 * cost * DEFAULT_PROBES / DEFAULT_EVERY / 4
        costs.append(f"{cost:.1f} ({MODELS[model]}; at a batch of 4 and the defaults {of_four:.0f} %)")
    if not rows:
        return None
    return "\n".join(
        [
            "## Where the time goes",
            "",
            "Each part by itself, in milliseconds of processor time, and as a share of a stock step's, at r = k = 16. "
            f"*By step* is what a projection adds on average, with one step in {DEFAULT_EVERY} corrected on half as "
            "many probes as there are training examples. The Llama's probes hold no targets, as is advised for "
            "language models, so that a probe pass has a further forward, of the base model.",
            "",
            *table(("model", "training on", "part", "ms", "of a stock step"), rows),
            "",
            "So the online projection adds, of a step, about `probe_batch_size` / (`probe_every` x batch size) times "
            f"{', '.join(costs)}. The defaults are {DEFAULT_PROBES} probes every {DEFAULT_EVERY} steps.",
        ]
    )


def operators(results: Results) -> str | None:
    """Operators per step."""
    rows = []
    for (model, r, k), cell in of_kind(results, "operators"):
        stock = cell["per_step"]["stock"]
        for arm, count in cell["per_step"].items():
            rows.append([MODELS[model], r[1:], k[1:], ARMS[arm], f"{count:.0f}", f"{count / stock:.2f}"])
    if not rows:
        return None
    return "\n".join(
        [
            "## Operators",
            "",
            "How many operators a step dispatches, views left out, on average over corrected and other steps. Those of "
            "the projections are products of A and B and small; on a GPU each is a launch of some microseconds, which "
            "shows where the base model's own are short.",
            "",
            *table(("layers of", "r", "k", "arm", "operators", "of stock's"), rows),
        ]
    )


def others(results: Results) -> str | None:
    """Fit, verify, import."""
    lines = []
    for (model,), cell in of_kind(results, "fit"):
        # Stock steps were timed before and after, and others were computing.
        steps = sorted({f"{cell['seconds'] / bound(cell['stock_step_seconds']):.0f}" for bound in (max, min)}, key=int)
        lines.append(
            f"- `fit_concept_basis` on {cell['workload']}, {MODELS[model]}: as long as {' to '.join(steps)} stock "
            "steps."
        )
    if "verify" in results:
        cell = results["verify"]
        seconds = statistics.median(run["verify"] for run in cell["runs"])
        peak = max(run["peak"] for run in cell["runs"])
        lines.append(
            f"- `verify_adapter` on {cell['layers']} layers of rank {cell['rank']}, {cell['directions']} directions in "
            f"two spaces, {cell['bytes'] / 1e6:.0f} MB: {seconds:.2f} s; the process peaks at {peak / 1e6:.0f} MB."
        )
    if "import" in results:
        seconds = statistics.median(results["import"]["seconds"])
        lines.append(f"- `import peft_gradproj` after `import peft`: {seconds:.2f} s.")
    if not lines:
        return None
    lines.append(
        "- Not measured here: collecting probes, and the networks of `gradproj mask`; `make demo` tells theirs."
    )
    return "\n".join(["## Fit, verify, import", "", *lines])


def conditions(results: Results) -> str:
    """Versions, and under which load each cell was taken."""
    rows = [
        [
            f"`{key}`",
            cell["measured"],
            f"{cell['took_seconds']:.0f}",
            load(cell),
            str(cell["versions"]["threads"]),
            # What trains no model is in no precision.
            cell["versions"]["precision"] if "/" in key else "",
            cell.get("revision") or "",
        ]
        for key, cell in results.items()
    ]
    machines = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in cell["versions"].items() if name not in ("threads", "precision"))
        for cell in results.values()
    )
    return "\n".join(
        [
            "## Conditions",
            "",
            *(f"- {machine}" for machine in machines),
            "",
            "The load average is that of the last minute, before the cell and after it. Where it is above the number "
            "of cores, others were computing: look at the processor time then. The first cells do not "
            "say their commit.",
            "",
            *table(("cell", "measured", "seconds", "load", "threads", "precision", "commit"), rows),
        ]
    )


def load(cell: Cell) -> str:
    """Load averages before and after."""
    return " to ".join(f"{cell['load_average'][when][0]:.1f}" for when in ("before", "after"))


def spread(values: Sequence[float]) -> str:
    """Median and, in brackets, the quartiles; of one value itself."""
    low, middle, high = values
    return f"{middle:.3f}" if low == high else f"{middle:.3f} ({low:.3f}, {high:.3f})"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    args.page.write_text(page(json.loads(args.results.read_text())))


if __name__ == "__main__":
    main()
