"""The benchmark's other ways to correct a step do what their rows in the tables say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_online import PROBES, Task, copies, dot, make_task, take_steps

from benchmarks.protection.corrections import LayersApart, RestoreAdapts
from peft_gradproj.online import OnlineProjection, OnlineReport


def raised_by(
    task: Task, kind: type[OnlineProjection], restore: float = 0.0, steps: int = 8
) -> Iterator[tuple[list[float], list[float]]]:
    """Of each corrected step, by how much every layer's part of it raises the drift, to first order; and its share.

    That is of the drift, in proportion to the squares of its gradient.
    """
    parameters = task.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    options = {"probe_every": 1, "probe_batch_size": PROBES, "restore": restore}
    projection = kind(task.net, "default", task.probes, **options).attach()
    for _ in range(steps):
        drift = task.drift()
        gradient, before = torch.autograd.grad(drift, parameters), copies(parameters)
        take_steps(task, optimizer)
        moved = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        # A and B of one layer after those of another.
        layers = [slice(i, i + 2) for i in range(0, len(parameters), 2)]
        squares = [dot([*gradient[layer]], [*gradient[layer]]) for layer in layers]
        raised = [dot([*gradient[layer]], moved[layer]) for layer in layers]
        yield raised, [drift.item() * square / sum(squares) for square in squares]
    projection.detach()


def test_no_layers_part_raises_the_drift_where_layers_are_apart_and_some_do_where_they_are_not():
    apart, together = ([r for r, _ in raised_by(make_task(), kind)] for kind in (LayersApart, OnlineProjection))
    assert all(raised < 1e-6 for step in apart for raised in step)
    assert max(raised for step in together for raised in step) > 1e-5
    assert all(sum(step) < 1e-6 for step in together)


def test_each_layer_takes_back_its_share_of_the_drift():
    restore = 0.02
    steps = [
        [(-raised, restore * share) for raised, share in zip(*layers, strict=True)]
        for layers in raised_by(make_task(), LayersApart, restore)
    ]
    # More only where the optimizer's own step goes that way.
    assert all(taken >= 0.999 * asked - 1e-6 for step in steps for taken, asked in step)
    assert any(all(taken == pytest.approx(asked, rel=1e-3) for taken, asked in step) for step in steps)


def test_a_single_layer_is_corrected_as_by_the_product():
    ends = []
    for kind in (LayersApart, OnlineProjection):
        task = make_task()
        task.net[3].requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-2)
        projection = kind(task.net, "default", task.probes, probe_every=1, restore=0.5).attach()
        take_steps(task, optimizer, 6)
        projection.detach()
        ends.append(copies(task.parameters()))
    for ours, product in zip(*ends, strict=True):
        torch.testing.assert_close(ours, product, rtol=1e-5, atol=1e-6)


def test_restore_follows_the_drift_beside_its_running_mean():
    task, seen = make_task(), []

    def note(report: OnlineReport) -> None:
        seen.append((report.drift, projection.restore))

    projection = RestoreAdapts(
        task.net, "default", task.probes, probe_every=1, probe_batch_size=2, restore=0.5, on_report=note
    )
    projection.attach()
    take_steps(task, torch.optim.AdamW(task.parameters(), lr=1e-2), 30)
    usual = seen[0][0]
    assert seen[0][1] == pytest.approx(0.5)
    for drift, restore in seen[1:]:
        usual = 0.9 * usual + 0.1 * drift
        assert restore == pytest.approx(min(1.0, 0.5 * drift / usual))
    restores = [restore for _, restore in seen]
    assert min(restores) < 0.45
    assert max(restores) > 0.55
