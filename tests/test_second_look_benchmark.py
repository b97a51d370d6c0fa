"""The benchmark of the second look, shortened until its figures mean nothing: what is missed, and what is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_pipelines import logo, picture

from benchmarks import second_look
from peft_gradproj.concepts import Overlay


@pytest.mark.parametrize("kind", second_look.KINDS)
def test_what_is_missed_is_what_the_kind_says(kind):
    ranges, missed = second_look.KINDS[kind]
    overlay = Overlay(logo(), angle=(0, 0), **ranges)
    pictures = [picture(seed) for seed in range(120)]
    shown, masks, given = second_look.stamped(overlay, pictures, missed, seed=0)
    stamped = [number for number, mask in enumerate(masks) if mask.getbbox()]
    left = [number for number in stamped if not given[number].getbbox()]
    assert len(stamped) == pytest.approx(90, abs=12)
    assert len(left) == pytest.approx(len(stamped) * (0.5 if "half" in kind else 0.2), abs=1)
    for number, (one, mask) in enumerate(zip(shown, masks, strict=True)):
        differs = (np.asarray(one) != np.asarray(pictures[number].convert("RGB"))).any(-1)
        assert not differs[np.asarray(mask) == 0].any()
        if number not in left:
            assert given[number] is mask
    sizes = {number: np.asarray(masks[number]).astype(bool).sum() for number in stamped}
    if "smallest" in kind:
        assert max(sizes[n] for n in left) <= 1.1 * min(sizes[n] for n in stamped if n not in left)
    if "corner" not in kind:
        assert min(masks[n].getbbox()[0] for n in stamped) < 5


def test_runs_are_added_as_they_are_done_and_none_is_run_twice(tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "second_look.json"
    monkeypatch.setattr(second_look, "LOGOS", ("youtube",))
    monkeypatch.setattr(second_look, "KINDS", dict(list(second_look.KINDS.items())[:2]))
    started, whole = [], second_look.run

    def run(logo_name, kind, seed, *rest):
        started.append((kind, seed))
        if len(started) == 2:
            raise KeyboardInterrupt
        return whole(logo_name, kind, seed, *rest)

    def benchmark(*options):
        arguments = ["benchmark", "--output", output, "--seeds", 0, "--pictures", 40, "--num-pairs", 16, *options]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        second_look.main()

    monkeypatch.setattr(second_look, "run", run)
    with pytest.raises(KeyboardInterrupt):
        benchmark("--steps", 2)
    assert len(json.loads(output.read_text())["runs"]) == 1
    benchmark("--steps", 2)
    first, second = second_look.KINDS
    assert started == [(first, 0), (second, 0), (second, 0)]
    for found in json.loads(output.read_text())["runs"]:
        assert found["missed"] + found["others"] < 40
        for share in ("found", "area", "mistaken", "recall"):
            assert 0 <= found[share] <= 1
    assert f"| youtube | {second} | 0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        benchmark("--steps", 3)


def test_the_page_has_the_table_of_the_committed_runs():
    root = Path(__file__).parent.parent
    runs = json.loads((root / "benchmarks" / "results" / "second_look.json").read_text())["runs"]
    assert {(one["logo"], one["kind"], one["seed"]) for one in runs} == {
        (name, kind, seed) for name in second_look.LOGOS for kind in second_look.KINDS for seed in (0, 1, 2)
    }
    assert second_look.table(runs) in (root / "docs" / "how-to.md").read_text()
