"""The overhead benchmark, reduced: every cell can be measured, a run goes on where it was, the page has the figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overhead, overhead_page

HERE = ["steps/*", "operators/llama1b/*", "parts/sd15/*", "fit/llama1b", "osf/llama1b"]
"""Cells of one process; the others start processes of their own."""


def reduced() -> dict[str, Any]:
    return overhead.cells(quick=True, blocks=1, minutes=0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("overhead") / "results.json"
    overhead.measure(HERE, path, reduced(), again=False)
    return path


@pytest.fixture
def page(file: Path) -> str:
    return overhead_page.page(json.loads(file.read_text()))


@pytest.fixture
def found(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["cells"]


def test_every_arm_takes_every_step_in_every_round(found):
    for name, arms in (("steps/sd15/r4/k2", set(overhead.ALL_ARMS)), ("osf/llama1b", {"stock", "osf"})):
        cell = found[name]
        for key in ("seconds", "processor_seconds"):
            assert set(cell[key]) == arms
            assert {len(times) for times in cell[key].values()} == {cell["probe_every"]}
            assert all(time > 0 for times in cell[key].values() for time in times)


def test_projections_dispatch_operators_of_their_own(found):
    count = found["operators/llama1b/r4/k2"]["per_step"]
    assert count["stock"] < count["subspace"] < count["both"]
    assert count["stock"] < count["online"] < count["both"]


def test_each_part_of_the_projections_takes_time(found):
    parts = found["parts/sd15/r4/k2"]["processor_seconds"]
    assert len(parts) == 5
    assert all(seconds > 0 for seconds in parts.values())


def test_each_cell_says_of_which_commit_it_is(found):
    assert all(cell["revision"] is None or len(cell["revision"]) >= 7 for cell in found.values())


def test_what_was_measured_is_not_measured_again(file):
    before = file.read_text()
    overhead.measure(HERE, file, reduced(), again=False)
    assert file.read_text() == before


def test_an_interrupted_run_keeps_its_cells_and_goes_on(tmp_path):
    path, calls = tmp_path / "results.json", []

    def cell(name: str) -> dict[str, Any]:
        calls.append(name)
        if calls == ["a", "b"]:
            raise KeyboardInterrupt
        return {"of": name}

    known = {name: lambda name=name: cell(name) for name in "abc"}
    with pytest.raises(KeyboardInterrupt):
        overhead.measure(["*"], path, known, again=False)
    overhead.measure(["*"], path, known, again=False)
    assert calls == ["a", "b", "b", "c"]
    assert [x["of"] for x in json.loads(path.read_text())["cells"].values()] == ["a", "b", "c"]


def test_the_grid_is_that_of_the_issue():
    known = overhead.cells(quick=False, blocks=1, minutes=0)
    for model in ("sd15", "llama1b"):
        assert {f"steps/{model}/r{r}/k{k}" for r in (4, 16, 64) for k in (0, 8, 16, 64)} <= set(known)
        assert {f"{kind}/{model}" for kind in ("fit", "osf")} <= set(known)
    assert {"import", "verify"} <= set(known)


def test_memory_is_that_of_the_tensors_that_live_at_a_time():
    with overhead.TrackTensors() as tracker:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500) + 1
        kept.view(10, 100).add_(1)
    assert tracker.peak == 4 * (1000 + 500 + 500)
    assert tracker.bytes == kept.nbytes


def test_a_corrected_step_counts_at_its_share_of_a_training_by_default():
    steps = {
        "stock": [1.0, 2.0, 1.0, 4.0] * 2,
        "online": [1.0, 2.0, 1.0, 6.0] * 2,
        "subspace": [1.1, 2.4, 1.3, 6.0] * 2,
    }
    figures = overhead_page.ratios({"probe_every": 4, "seconds": steps})
    assert figures["stock"]["ratio"] == 1
    assert figures["online"]["ratio"] == pytest.approx(1 + 0.5 / 8)
    assert figures["online"]["corrected"] == [1.5, 1.5, 1.5]
    assert figures["subspace"]["ratio"] == pytest.approx(1.25), (
        "the median of all rounds: none of its steps is corrected"
    )


def test_the_page_has_the_figures_and_says_what_is_missing(found, page):
    ratio = overhead_page.ratios(found["steps/sd15/r4/k2"])["subspace"]["ratio"]
    assert f"| 4 | 2 | subspace projection | {ratio:.3f} |" in page
    for title in ("Step time", "Where the time goes", "Operators", "Fit, verify, import", "Conditions"):
        assert f"## {title}" in page
    assert "## Peak memory" not in page
    assert "`memory/sd15/r4/k2`" in page.partition("## Not measured yet")[2]


def test_the_committed_page_is_that_of_the_committed_figures():
    figures = json.loads(overhead_page.RESULTS.read_text())
    assert overhead_page.PAGE.read_text() == overhead_page.page(figures)


def test_the_command_measures_memory_in_processes_of_their_own(tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    cells = ["memory/llama1b/*", "import"]
    monkeypatch.setattr(sys, "argv", ["overhead", "--quick", "--output", str(output), "--cells", *cells])
    overhead.main()
    figures = json.loads(output.read_text())
    found = figures["cells"]
    peaks = found["memory/llama1b/r4/k2"]["peak_bytes"]
    assert 0 < peaks["tensors"]["stock"] < peaks["tensors"]["both"] < min(peaks["process"].values())
    assert found["import"]["seconds"][0] > 0
    assert "## Peak memory" in overhead_page.page(figures)
