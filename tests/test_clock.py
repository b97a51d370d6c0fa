"""How long the parts of a long call took."""

from __future__ import annotations

import time

import pytest

from peft_gradproj.clock import Clock


def test_a_part_that_comes_twice_takes_both_times_and_what_fails_is_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    for part, seconds in (("load", 2.0), ("marks", 1.0), ("load", 0.5)):
        with clock(part):
            now[0] += seconds

    def fails():
        with clock("load"):
            now[0] += 4.0
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fails()
    assert clock.seconds == {"load": 2.5, "marks": 1.0}
