"""Properties of the batches that small networks learn from, and of their answers."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import nn

from peft_gradproj.errors import BehaviourError, ConceptDataError
from peft_gradproj.small_networks import batch_indices, network_answers


@pytest.mark.parametrize(("length", "batch_size"), [(2, 64), (5, 2), (65, 64)])
def test_batches_are_endless_and_of_at_least_two(length, batch_size):
    batches = list(islice(batch_indices(length, batch_size, torch.Generator().manual_seed(0)), 50))
    assert {len(batch) for batch in batches} <= set(range(2, batch_size + 1))
    assert set(torch.cat(batches).tolist()) == set(range(length))


@pytest.mark.parametrize(("length", "batch_size"), [(0, 64), (1, 64), (5, 1)])
def test_no_batches_of_two_are_an_error_and_not_an_endless_loop(length, batch_size):
    with pytest.raises(ConceptDataError, match=f"{length} examples to learn from, in batches of {batch_size}"):
        next(batch_indices(length, batch_size, torch.Generator()))


@pytest.mark.parametrize("wrong", ["pictures", "network"])
def test_answers_that_are_not_finite_are_an_error(wrong):
    network, pictures = nn.Conv2d(3, 1, 3), torch.rand(130, 3, 4, 4)
    assert network_answers(network, pictures).shape == (130, 1, 2, 2)
    if wrong == "pictures":
        pictures[129, 0, 0, 0] = float("nan")
    else:
        nn.init.constant_(network.bias, float("nan"))
    count = 1 if wrong == "pictures" else 130
    with pytest.raises(BehaviourError, match=f"{count} of 130 pictures cannot be judged"):
        network_answers(network, pictures)
