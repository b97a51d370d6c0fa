"""Streaming second moments equal those of all vectors at once; a sketch keeps its bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_gradproj.projection import contrast_basis, orthonormal_basis, principal_cosines
from peft_gradproj.second_moments import SecondMoment, common_subspace, contrast_patterns, excess_share

few = settings(deadline=None, max_examples=20)


def vectors(n: int, d: int, seed: int = 0) -> Tensor:
    """Correlated, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mixing + 3


def direction(d: int, k: int = 1, seed: int = 0) -> Tensor:
    return orthonormal_basis(torch.randn(d, k, generator=torch.Generator().manual_seed(seed)).double())


@few
@given(n=st.integers(1, 60), d=st.integers(1, 12), parts=st.integers(1, 7), seed=st.integers(0, 99))
def test_streaming_equals_batch(n, d, parts, seed):
    x = vectors(n, d, seed)
    moment = SecondMoment(d)
    for chunk in x.chunk(parts):
        moment.update(chunk)
    expected = x.double().mT @ x.double() / n
    assert moment.count == n
    assert torch.allclose(moment.within(), expected, rtol=1e-5, atol=1e-5)
    assert moment.trace == pytest.approx(float(expected.trace()), rel=1e-5)
    u = direction(d, min(3, d), seed)
    assert torch.allclose(moment.within(u), u.mT @ expected @ u, rtol=1e-4, atol=1e-4)
    assert moment.share_in(u) == pytest.approx(float((u.mT @ expected @ u).trace() / expected.trace()), abs=1e-5)


@few
@given(
    n=st.integers(1, 80), d=st.integers(9, 24), rows=st.integers(2, 8), parts=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_a_sketch_keeps_the_trace_and_the_bound_of_frequent_directions(n, d, rows, parts, seed):
    x = vectors(n, d, seed)
    moment = SecondMoment(d, sketch_rows=rows, max_exact_width=8)
    for chunk in x.chunk(parts):
        moment.update(chunk)
    assert moment.sketched
    factor = moment.factor().double()
    assert factor.shape[1] <= rows
    loss = torch.linalg.eigvalsh(x.double().mT @ x.double() - factor @ factor.mT)
    total = float(x.double().square().sum())
    assert float(loss.min()) > -1e-5 * total
    assert float(loss.max()) < total / rows * (1 + 1e-5)
    assert float(moment.within().trace()) == pytest.approx(moment.trace, rel=1e-5)
    assert moment.trace == pytest.approx(total / n, rel=1e-5)


def test_a_sketch_notices_a_direction_that_grows_large_in_small_steps():
    # Where the least direction is merely dropped, each step is, and all of them in the end.
    moment = SecondMoment(9, sketch_rows=2, max_exact_width=2)
    moment.update(3 * torch.eye(9)[:2])
    for _ in range(100):
        moment.update(torch.eye(9)[2:3])
    assert moment.factor()[2].norm() ** 2 > 100 - (9 + 9 + 100) / 2


def test_a_sketch_of_few_directions_is_exact():
    x = torch.randn(200, 3) @ torch.randn(3, 40)
    sketch, exact = SecondMoment(40, sketch_rows=8, max_exact_width=8), SecondMoment(40)
    for chunk in x.split(17):
        sketch.update(chunk)
        exact.update(chunk)
    assert torch.allclose(sketch.within(), exact.within(), rtol=1e-3, atol=1e-3)
    u = direction(40, 4)
    assert sketch.share_in(u) == pytest.approx(exact.share_in(u), abs=1e-4)
    subspace = common_subspace([sketch], u)
    assert subspace.shape[1] <= 8 + 4
    assert torch.allclose(subspace @ (subspace.mT @ u), u, atol=1e-6)
    assert common_subspace([exact]) is None


def test_half_precision_and_autocast_do_not_lower_the_precision():
    x = torch.randn(50, 6).bfloat16()
    moment = SecondMoment(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moment.update(x)
    expected = x.double().mT @ x.double() / 50
    assert torch.allclose(moment.within(), expected, rtol=1e-5, atol=1e-5)


def test_without_vectors_or_energy_all_is_zero():
    for moment in (SecondMoment(4), SecondMoment(4, max_exact_width=2)):
        assert moment.trace == 0
        assert moment.share_in(torch.eye(4)[:, :1]) == 0
        assert not moment.within().any()


@few
@given(d=st.integers(2, 16), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_what_the_concept_adds_is_all_in_the_patterns(d, k, seed):
    k = min(k, d // 2)
    planted = direction(d, k, seed)
    x = vectors(4 * d, d, seed).double()
    reference = x.mT @ x
    concept = reference + reference.trace() * planted @ planted.mT
    eigenvalues, patterns = contrast_patterns(concept, reference, epsilon=1e-6)
    assert torch.allclose(principal_cosines(patterns[:, :k], planted), torch.ones(k, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(patterns.mT @ patterns, torch.eye(d, dtype=torch.float64), atol=1e-9)
    assert (eigenvalues[:k] > 1.01).all()
    assert (eigenvalues[k:] < 1.01).all()
    assert excess_share(concept, reference, patterns[:, :k], epsilon=1e-6) == pytest.approx(1, abs=1e-3)
    # Kantorovich: what the rest cannot hold is least where the reference is most uneven.
    condition = float(torch.linalg.cond(reference))
    rest = excess_share(concept, reference, patterns[:, k:], epsilon=1e-6)
    assert rest < 1 - 0.5 * 4 * condition / (1 + condition) ** 2
    assert excess_share(0.5 * reference, reference, patterns[:, :k]) == 0


def test_a_filter_is_no_pattern_where_the_reference_is_uneven():
    reference = torch.eye(2, dtype=torch.float64) + 100 * torch.ones(2, 2, dtype=torch.float64)
    planted = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    concept = reference + 50 * planted @ planted.mT
    _, filters = contrast_basis(concept, reference)
    _, patterns = contrast_patterns(concept, reference)
    assert principal_cosines(patterns[:, :1], planted) > 0.99
    assert principal_cosines(filters[:, :1], planted) < 0.8
