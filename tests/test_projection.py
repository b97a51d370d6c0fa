"""The mathematics, as properties over shapes and dtypes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_gradproj.errors import ConceptBasisError
from peft_gradproj.projection import (
    contrast_basis,
    coordinates,
    drift,
    drift_terms,
    guided_drift_terms,
    half_space_coefficient,
    inner,
    leakage,
    metric_norm,
    orthonormal_basis,
    orthonormality_error,
    principal_cosines,
    project_half_space,
    project_momentum,
    project_orthogonal,
    remove_component,
    truncation_rank,
)

few = settings(deadline=None, max_examples=25)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""What a few operations of each dtype leave, relative to the size of their result."""

dtypes = st.sampled_from(DTYPES)
sides = st.sampled_from(["left", "right"])
seeds = st.integers(0, 999)
widths = st.integers(1, 20)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_basis(d: int, k: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(random(d, min(k, d), seed=seed))[0].to(dtype)


def case(m: int, n: int, k: int, side: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight and a basis, in float32 unless the weight is float64, as it is in use."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return random(m, n, seed=seed, dtype=dtype), random_basis(n if side == "right" else m, k, seed + 1, wide)


def along(weight: Tensor, basis: Tensor, side: str) -> float:
    """Norm of the component of a weight along a basis, relative to the weight."""
    inside = coordinates(weight.double(), basis.double(), side=side)
    return float(inside.norm() / weight.double().norm().clamp_min(1e-300))


# Subspace projection


@few
@given(m=widths, n=widths, k=st.integers(1, 6), side=sides, dtype=dtypes, seed=seeds)
def test_projection_removes_the_component_and_nothing_else(m, n, k, side, dtype, seed):
    weight, basis = case(m, n, k, side, seed, dtype)
    projected = remove_component(weight, basis, side=side)
    assert projected.dtype == dtype
    assert projected.shape == weight.shape
    scale = float(weight.double().norm())
    assert float(coordinates(projected.double(), basis.double(), side=side).norm()) <= ROUNDING[dtype] * scale
    # What was taken away lies in the basis, and is orthogonal to what is left.
    removed = weight.double() - projected.double()
    inside = coordinates(removed, basis.double(), side=side)
    back = inside @ basis.double().mT if side == "right" else basis.double() @ inside
    assert float((removed - back).norm()) <= ROUNDING[dtype] * scale
    assert abs(float((removed * projected.double()).sum())) <= ROUNDING[dtype] * scale**2


@few
@given(m=widths, n=widths, k=st.integers(1, 6), side=sides, dtype=dtypes, seed=seeds)
def test_projection_is_idempotent_and_never_lengthens(m, n, k, side, dtype, seed):
    weight, basis = case(m, n, k, side, seed, dtype)
    once = remove_component(weight, basis, side=side)
    twice = remove_component(once, basis, side=side)
    scale = float(weight.double().norm())
    assert float((once.double() - twice.double()).norm()) <= ROUNDING[dtype] * scale
    assert float(once.double().norm()) <= scale * (1 + ROUNDING[dtype])


@few
@given(m=widths, n=widths, k=st.integers(1, 6), side=sides, strength=st.floats(0, 1), seed=seeds)
def test_strength_is_the_share_that_is_removed(m, n, k, side, strength, seed):
    weight, basis = case(m, n, k, side, seed, torch.float64)
    soft = remove_component(weight, basis, side=side, strength=strength)
    hard = remove_component(weight, basis, side=side)
    assert torch.allclose(soft, (1 - strength) * weight + strength * hard, atol=1e-12)


@few
@given(m=widths, n=widths, k=st.integers(1, 6), side=sides, dtype=dtypes, seed=seeds)
def test_with_a_target_the_coordinates_become_the_target(m, n, k, side, dtype, seed):
    weight, basis = case(m, n, k, side, seed, dtype)
    target = coordinates(random(m, n, seed=seed + 2, dtype=dtype), basis, side=side)
    moved = remove_component(weight, basis, side=side, target=target)
    reached = coordinates(moved.double(), basis.double(), side=side)
    size = float(weight.double().norm() + target.double().norm())
    assert float((reached - target.double()).norm()) <= ROUNDING[dtype] * size
    assert torch.allclose(
        remove_component(moved.double(), basis.double(), side=side),
        remove_component(weight.double(), basis.double(), side=side),
        atol=ROUNDING[dtype] * size,
    )


@few
@given(r=st.integers(1, 5), d_in=widths, d_out=widths, k=st.integers(1, 6), count=st.integers(2, 4), seed=seeds)
def test_sums_and_merges_of_adapters_with_one_basis_stay_on_the_constraint(r, d_in, d_out, k, count, seed):
    u, o = random_basis(d_in, k, seed), random_basis(d_out, k, seed + 1)
    update = torch.zeros(d_out, d_in, dtype=torch.float64)
    for i in range(count):
        a = remove_component(random(r, d_in, seed=seed + 10 * i), u, side="right")
        b = remove_component(random(d_out, r, seed=seed + 10 * i + 1), o, side="left")
        update += (i - 1.5) * b @ a
    assert torch.allclose(update @ u, torch.zeros(1, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(o.mT @ update, torch.zeros(1, dtype=torch.float64), atol=1e-10)


@few
@given(m=st.integers(2, 12), n=st.integers(2, 12), k=st.integers(1, 4), side=sides, dtype=dtypes, seed=seeds)
def test_layout_in_memory_does_not_matter(m, n, k, side, dtype, seed):
    weight, basis = case(m, n, k, side, seed, dtype)
    expected = remove_component(weight, basis, side=side)
    scattered = torch.empty(2 * m, 3 * n, dtype=dtype)[::2, ::3]
    scattered.copy_(weight)
    assert not scattered.is_contiguous()
    for other in (scattered, weight.mT.contiguous().mT):
        assert torch.allclose(
            remove_component(other, basis.mT.contiguous().mT, side=side),
            expected,
            atol=ROUNDING[dtype],
            rtol=ROUNDING[dtype],
        )


def test_a_channels_last_convolution_is_projected_like_any_other():
    weight, basis = random(4, 3, 3, 3, seed=0, dtype=torch.float32), random_basis(27, 5, 1, torch.float32)
    expected = remove_component(weight.flatten(1), basis, side="right")
    strided = weight.to(memory_format=torch.channels_last)
    assert strided.stride() != weight.stride()
    assert torch.allclose(remove_component(strided.flatten(1), basis, side="right"), expected, atol=1e-6)


def test_projection_passes_projected_gradients():
    weight, basis = random(3, 6, seed=0).requires_grad_(), random_basis(6, 2, 1)
    probe = random(3, 6, seed=2)
    (remove_component(weight, basis, side="right") * probe).sum().backward()
    assert torch.allclose(weight.grad, remove_component(probe, basis, side="right"))


# Leakage


def direct_leakage(a: Tensor, b: Tensor, basis: Tensor, space: str) -> float:
    a, b, basis = a.double(), b.double(), basis.double()
    products = {
        "input": lambda: b @ a @ basis,
        "output": lambda: basis.mT @ b @ a,
        "rank": lambda: b @ basis @ basis.mT @ a,
    }
    return float(products[space]().norm() / (b @ a).norm())


@few
@given(
    r=st.integers(1, 6),
    d_in=widths,
    d_out=widths,
    k=st.integers(1, 6),
    space=st.sampled_from(["input", "output", "rank"]),
    dtype=dtypes,
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=seeds,
)
def test_leakage_through_small_cores_is_the_direct_one(r, d_in, d_out, k, space, dtype, scale, seed):
    a, b = random(r, d_in, seed=seed).mul(scale).to(dtype), random(d_out, r, seed=seed + 1).to(dtype)
    # By chance, those of a width of one or two may cancel.
    assume(
        float((b.double() @ a.double()).norm()) > 0.01 * float((b.double().norm(dim=0) * a.double().norm(dim=1)).sum())
    )
    basis = random_basis({"input": d_in, "output": d_out, "rank": r}[space], k, seed + 2, torch.float32)
    assert leakage(a, b, basis, space=space) == pytest.approx(direct_leakage(a, b, basis, space), rel=1e-6, abs=1e-7)


@few
@given(r=st.integers(1, 4), d=st.integers(8, 24), k=st.integers(1, 4), dtype=dtypes, seed=seeds)
def test_leakage_of_a_projected_adapter_is_rounding(r, d, k, dtype, seed):
    basis = random_basis(d, k, seed, torch.float64 if dtype == torch.float64 else torch.float32)
    a, b = random(r, d, seed=seed + 1, dtype=dtype), random(d, r, seed=seed + 2, dtype=dtype)
    assert leakage(remove_component(a, basis, side="right"), b, basis, space="input") <= ROUNDING[dtype]
    assert leakage(a, remove_component(b, basis, side="left"), basis, space="output") <= ROUNDING[dtype]
    # Small leaks are seen as well as large ones.
    leaking = remove_component(a.double(), basis.double(), side="right") + 1e-5 * basis.double().sum(dim=1)
    assert leakage(leaking, b, basis, space="input") == pytest.approx(
        direct_leakage(leaking, b, basis, "input"), rel=1e-3
    )


def exact_leakage(a: Tensor, b: Tensor, basis: Tensor, space: str) -> float:
    """Without rounding until the last division, whatever cancels."""

    def times(left: list[list[Fraction]], right: list[list[Fraction]]) -> list[list[Fraction]]:
        return [[sum(map(Fraction.__mul__, row, column)) for column in zip(*right, strict=True)] for row in left]

    a, b, basis = ([[Fraction(x) for x in row] for row in matrix.tolist()] for matrix in (a, b, basis))
    update = times(b, a)
    part = times(update, basis) if space == "input" else times([list(row) for row in zip(*basis, strict=True)], update)
    squares = [sum(x * x for row in matrix for x in row) for matrix in (part, update)]
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0


@settings(deadline=None, max_examples=100)
@given(
    rest=st.one_of(st.just(0.0), st.integers(-60, 0).map(lambda n: 2.0**n)),
    along=st.integers(-60, 0).map(lambda n: 2.0**n),
    r=st.integers(2, 4),
    space=st.sampled_from(["input", "output"]),
    dtype=st.sampled_from([torch.float64, *DTYPES[1:]]),
    seed=seeds,
)
def test_a_leak_is_seen_or_not_measurable_however_far_the_factors_cancel(rest, along, r, space, dtype, seed):
    # Rows that cancel but for `along` of them in the concept and `rest` of them elsewhere, in coordinates of their own,
    # so that any dtype holds both; and B inflated by as much.
    a = torch.zeros(r, 6, dtype=torch.float64)
    a[:, 0] = 1.0
    a[:, 1:3] = along * random(r, 2, seed=seed)
    a[:, 3:] = rest * random(r, 3, seed=seed + 1)
    b = random(5, r, seed=seed + 2)
    # Exactly: integers, of which the last column is what the others leave.
    b = (16 * b).round()
    b[:, -1] = -b[:, :-1].sum(dim=1)
    b = b / along
    basis = torch.zeros(6, 2)
    basis[1:3] = random_basis(2, 2, seed + 3, torch.float32)
    a, b = (a.to(dtype), b.to(dtype)) if space == "input" else (b.mT.to(dtype), a.mT.to(dtype))
    assume(bool(torch.isfinite(a).all() and torch.isfinite(b).all()))
    found = leakage(a, b, basis, space=space)
    exact = exact_leakage(a, b, basis, space)
    assert math.isnan(found) or found == pytest.approx(exact, rel=1e-6, abs=1e-9)
    if rest == along == 1.0:
        assert not math.isnan(found)


@few
@given(r=st.integers(2, 64), near=st.integers(0, 40), dtype=dtypes, scale=st.sampled_from([1e-4, 1, 1e4]), seed=seeds)
def test_leakage_of_nearly_dependent_rows_is_measured_if_they_do_not_cancel(r, near, dtype, scale, seed):
    # As of a trained adapter whose rows have become nearly alike: of a B of its own, nothing cancels.
    basis = random_basis(20, 3, seed, torch.float64 if dtype == torch.float64 else torch.float32)
    a = random(1, 20, seed=seed + 1) + 2.0**-near * random(r, 20, seed=seed + 2)
    a = remove_component(a.to(dtype), basis, side="right")
    b = (scale * random(16, r, seed=seed + 3)).to(dtype)
    assert leakage(a, b, basis, space="input") <= 2 * math.sqrt(r) * ROUNDING[dtype]


def test_factors_that_cancel_to_nothing_cannot_be_measured():
    a, b = random(1, 6, seed=0), random(5, 1, seed=1)
    cancelling = torch.cat([a, a]), torch.cat([b, -b], dim=1)
    assert math.isnan(leakage(*cancelling, torch.eye(6)[:, :1], space="input"))
    a[0, 0] = torch.nan
    assert math.isnan(leakage(a, b, torch.eye(6)[:, :1], space="input"))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_leakage_does_not_depend_on_the_adapters_size(scale):
    a, b, basis = random(2, 6, seed=0), random(5, 2, seed=1), random_basis(6, 2, 2)
    expected = leakage(a, b, basis, space="input")
    assert leakage((a * scale).float(), (b * scale).float(), basis, space="input") == pytest.approx(expected, rel=1e-5)


def test_leakage_of_a_zero_adapter_is_zero_and_of_one_inside_is_one():
    basis = torch.eye(4)[:, :2]
    assert leakage(torch.zeros(2, 4), torch.ones(3, 2), basis, space="input") == 0
    assert leakage(torch.ones(2, 4), torch.zeros(3, 2), basis, space="input") == 0
    assert leakage(torch.eye(2, 4), torch.ones(3, 2), basis, space="input") == pytest.approx(1)


@pytest.mark.parametrize("space", ["input", "output", "rank"])
def test_leakage_of_parameters_in_training_keeps_nothing_for_a_backward(space):
    a, b = (random(4, 4, seed=seed).requires_grad_() for seed in (0, 1))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        leakage(a, b, random_basis(4, 2, 2).requires_grad_(), space=space)
    assert not saved


# Bases


@few
@given(d=widths, n=st.integers(0, 12), rank=st.integers(0, 6), dtype=dtypes, seed=seeds)
def test_an_orthonormal_basis_spans_what_it_is_given_and_no_more(d, n, rank, dtype, seed):
    vectors = (random(d, rank, seed=seed) @ random(rank, n, seed=seed + 1)).to(dtype)
    basis = orthonormal_basis(vectors)
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert orthonormality_error(basis) < 1e-5
    assert basis.shape[0] == d
    if dtype in (torch.float64, torch.float32):
        assert basis.shape[1] == min(rank, d, n)
    rest = vectors.to(basis.dtype) - basis @ (basis.mT @ vectors.to(basis.dtype))
    assert float(rest.norm()) <= 1e-4 * max(1.0, float(vectors.float().norm()))


def test_directions_below_the_tolerance_are_dropped():
    vectors = torch.diag(torch.tensor([1.0, 1e-2, 1e-4]))
    assert [orthonormal_basis(vectors, rtol=rtol).shape[1] for rtol in (1e-5, 1e-3, 0.1)] == [3, 2, 1]


@few
@given(d=widths, k=st.integers(1, 5), error=st.sampled_from([0.0, 1e-3, 0.5]), seed=seeds)
def test_orthonormality_error_is_the_largest_deviation(d, k, error, seed):
    basis = random_basis(d, k, seed)
    basis[:, 0] *= math.sqrt(1 + error)
    assert orthonormality_error(basis) == pytest.approx(error, abs=1e-12)


@few
@given(d=st.integers(4, 20), k=st.integers(1, 4), angle=st.floats(0.05, 1.5), seed=seeds)
def test_principal_cosines_are_those_of_the_angle_between(d, k, angle, seed):
    k = min(k, d // 2)
    both = random_basis(d, 2 * k, seed)
    u, normal = both[:, :k], both[:, k:]
    v = math.cos(angle) * u + math.sin(angle) * normal
    rotation = random_basis(k, k, seed + 1)
    cosines = principal_cosines(u @ rotation, v)
    assert torch.allclose(cosines, torch.full_like(cosines, math.cos(angle)), atol=1e-9)
    assert torch.allclose(principal_cosines(u, u @ rotation), torch.ones_like(cosines), atol=1e-9)
    assert torch.allclose(principal_cosines(u, normal), torch.zeros_like(cosines), atol=1e-9)
    assert principal_cosines(u, both).shape == (k,)
    assert principal_cosines(u, u[:, :0]).shape == (0,)


@few
@given(d=st.integers(2, 16), k=st.integers(1, 4), seed=seeds, dtype=st.sampled_from(DTYPES[:2]))
def test_contrast_basis_solves_the_generalised_eigenproblem(d, k, seed, dtype):
    mixing = random(d, d, seed=seed) + 3 * torch.eye(d, dtype=torch.float64)
    reference = mixing @ mixing.mT
    # By construction, the solutions are the columns of the mixing's inverse transpose, the eigenvalues these.
    expected = torch.linspace(10, 0.1, d, dtype=torch.float64)
    concept = mixing @ torch.diag(expected) @ mixing.mT
    eigenvalues, basis = contrast_basis(concept.to(dtype), reference.to(dtype), epsilon=1e-9)
    assume(float(torch.linalg.cond(reference)) < 1e4)
    assert torch.allclose(eigenvalues, expected, rtol=1e-2, atol=1e-2)
    assert orthonormality_error(basis) < 1e-9
    k = min(k, d - 1)
    solutions = orthonormal_basis(torch.linalg.inv(mixing).mT[:, :k])
    assert principal_cosines(basis[:, :k], solutions).min() > 1 - (1e-3 if dtype == torch.float32 else 1e-6)


def test_contrast_basis_ignores_what_both_share():
    shared, concept = torch.eye(5)[:, :1], torch.eye(5)[:, 1:2]
    reference = torch.eye(5) + 1e4 * shared @ shared.mT
    eigenvalues, basis = contrast_basis(reference + 5 * concept @ concept.mT, reference)
    assert abs(float(basis[1, 0])) > 0.999
    assert (eigenvalues[1:] < 1.01).all()
    assert float(eigenvalues[0]) > 1.4


def test_contrast_basis_without_a_reference_energy_is_finite():
    for reference in (torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 0.0, 0.0]))):
        eigenvalues, basis = contrast_basis(torch.eye(3), reference)
        assert torch.isfinite(eigenvalues).all()
        assert orthonormality_error(basis) < 1e-9


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, 3),
        ({"rank": 2}, 2),
        ({"rank": 9}, 3),
        ({"energy": 0.5}, 1),
        ({"energy": 0.6}, 2),
        ({"energy": 0.75}, 2),
        ({"energy": 1.0}, 3),
        ({"energy": 1.0, "rank": 1}, 1),
    ],
)
def test_truncation_keeps_the_fewest_that_suffice(kwargs, expected):
    assert truncation_rank(torch.tensor([2.0, 1.0, 1.0, 0.0]), **kwargs) == expected
    assert truncation_rank(torch.zeros(3), **kwargs) == 0


# Online projection: the half-space

shapes = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3)
restores = st.sampled_from([0.0, 0.5, 1.0])


def tensors(shapes, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


def positive(shapes, seed: int) -> list[Tensor]:
    return [x.abs() + 0.1 for x in tensors(shapes, seed)]


def distance(u: list[Tensor], v: list[Tensor], metric: list[Tensor] | None) -> float:
    return float(metric_norm([x - y for x, y in zip(u, v, strict=True)], metric))


@few
@given(shapes=shapes, restore=restores, value=st.floats(0, 5), with_metric=st.booleans(), seed=seeds)
def test_a_corrected_step_is_in_the_half_space_and_the_nearest_that_is(shapes, restore, value, with_metric, seed):
    step, s = tensors(shapes, seed), tensors(shapes, seed + 100)
    metric = positive(shapes, seed + 200) if with_metric else None
    corrected = project_half_space(step, s, value, restore=restore, metric=metric)
    bound = -restore * value
    size = 1 + float(inner(s, s)) * (1 + value) + float(inner(step, step))
    assert float(inner(s, corrected)) <= bound + 1e-10 * size
    # KKT: M (step - corrected) = c s with c >= 0, and c > 0 only on the boundary.
    c = float(half_space_coefficient(step, s, value, restore=restore, metric=metric))
    assert c >= 0
    for i in range(len(step)):
        pull = step[i] - corrected[i] if metric is None else metric[i] * (step[i] - corrected[i])
        assert torch.allclose(pull, c * s[i], atol=1e-9 * size)
    if c > 0:
        assert float(inner(s, corrected)) == pytest.approx(bound, abs=1e-9 * size)
    # No other point of the half-space is nearer: random ones, pushed onto it along s itself.
    here = distance(corrected, step, metric)
    for i in range(5):
        other = [x + 0.5 * y for x, y in zip(corrected, tensors(shapes, seed + 300 + 10 * i), strict=True)]
        beyond = max(0.0, float(inner(s, other)) - bound) / float(inner(s, s))
        other = [x - beyond * y for x, y in zip(other, s, strict=True)]
        assert float(inner(s, other)) <= bound + 1e-9 * size
        assert distance(other, step, metric) >= here - 1e-9 * size


@few
@given(shapes=shapes, restore=restores, with_metric=st.booleans(), dtype=dtypes, seed=seeds)
def test_a_step_that_already_recovers_enough_is_untouched(shapes, restore, with_metric, dtype, seed):
    s = tensors(shapes, seed, dtype)
    step = [-x for x in s]
    value = 0.5 * float(inner(s, s)) / max(restore, 0.5)
    metric = positive(shapes, seed + 200) if with_metric else None
    corrected = project_half_space(step, s, value, restore=restore, metric=metric)
    assert all(torch.equal(x, y) and x.dtype == dtype for x, y in zip(corrected, step, strict=True))


@few
@given(shapes=shapes, dtype=dtypes, seed=seeds)
def test_a_zero_gradient_leaves_everything(shapes, dtype, seed):
    x, zero = tensors(shapes, seed, dtype), [torch.zeros(*shape) for shape in shapes]
    for left in (
        project_half_space(x, zero, 1.0, restore=1.0),
        project_momentum(x, zero),
        project_orthogonal(x, zero),
    ):
        assert all(torch.equal(a, b) for a, b in zip(left, x, strict=True))


@pytest.mark.parametrize("size", [1e-25, 1e15])
def test_very_small_and_large_gradients_give_the_same_correction(size):
    step, s = tensors([(3,), (2, 2)], 0), tensors([(3,), (2, 2)], 5)
    expected = project_half_space(step, s, 0.0, restore=0.0)
    corrected = project_half_space([x.float() for x in step], [(x * size).float() for x in s], 0.0, restore=0.0)
    assert all(torch.allclose(x.double(), y, atol=1e-5) for x, y in zip(corrected, expected, strict=True))


@few
@given(shapes=shapes, dtype=dtypes, with_metric=st.booleans(), seed=seeds)
def test_low_precision_steps_satisfy_the_constraint_to_their_rounding(shapes, dtype, with_metric, seed):
    step, s = tensors(shapes, seed, dtype), tensors(shapes, seed + 100, torch.float32)
    metric = positive(shapes, seed + 200) if with_metric else None
    corrected = project_half_space(step, s, 0.1, restore=1.0, metric=metric)
    assert all(x.dtype == dtype for x in corrected)
    size = sum(float(x.abs().double().mul(y.abs()).sum()) for x, y in zip(corrected, s, strict=True)) + 0.1
    assert float(inner(s, corrected)) <= -0.1 + ROUNDING[dtype] * size


@few
@given(shapes=shapes, seed=seeds)
def test_without_restoring_and_metric_it_is_a_gem(shapes, seed):
    # A-GEM projects the gradient g on <g, g_ref> >= 0; a step is -g.
    g, g_ref = tensors(shapes, seed), tensors(shapes, seed + 100)
    product, norm = float(inner(g, g_ref)), float(inner(g_ref, g_ref))
    expected = g if product >= 0 else [x - product / norm * y for x, y in zip(g, g_ref, strict=True)]
    steps = project_half_space([-x for x in g], g_ref, 7.0, restore=0.0)
    assert all(torch.allclose(-x, y, atol=1e-10) for x, y in zip(steps, expected, strict=True))


@few
@given(shapes=shapes, restore=st.sampled_from([0.5, 1.0]), limit=st.floats(0, 2), with_metric=st.booleans(), seed=seeds)
def test_a_limit_bounds_what_is_restored_but_never_lets_the_drift_grow(shapes, restore, limit, with_metric, seed):
    step, s = tensors(shapes, seed), tensors(shapes, seed + 100)
    metric = positive(shapes, seed + 200) if with_metric else None
    kwargs = {"metric": metric, "restore": restore}
    limited = project_half_space(step, s, 3.0, restore_limit=limit, **kwargs)
    free = project_half_space(step, s, 3.0, **kwargs)
    merely = project_half_space(step, s, 0.0, restore=0.0, metric=metric)
    assert float(inner(s, limited)) <= 1e-9
    assert distance(limited, merely, metric) <= limit + 1e-9
    if distance(free, merely, metric) < limit - 1e-9:
        assert distance(limited, free, metric) < 1e-9


@few
@given(shapes=shapes, with_metric=st.booleans(), dtype=dtypes, seed=seeds)
def test_a_corrected_moment_no_longer_pushes_the_drift_up(shapes, with_metric, dtype, seed):
    m, s = tensors(shapes, seed, dtype), tensors(shapes, seed + 100, torch.float32)
    metric = positive(shapes, seed + 200) if with_metric else None
    corrected = project_momentum(m, s, metric=metric)
    assert all(x.dtype == dtype for x in corrected)
    # The optimizer goes along -M^-1 m.
    terms = zip(s, m, metric or [torch.ones(()) for _ in s], strict=True)
    size = sum(float((x.double() * y.double() / z).abs().sum()) for x, y, z in terms)
    assert float(inner(s, corrected, metric)) >= -ROUNDING[dtype] * size
    if float(inner(s, m, metric)) >= 0:
        assert all(torch.equal(x, y) for x, y in zip(corrected, m, strict=True))
    else:
        # Only along s, and just so far that it no longer matters.
        assert float(inner(s, corrected, metric)) <= ROUNDING[dtype] * size
        ratio = float(inner(s, [x.double() - y.double() for x, y in zip(corrected, m, strict=True)]) / inner(s, s))
        for x, y, z in zip(corrected, m, s, strict=True):
            assert torch.allclose(x.double(), y.double() + ratio * z.double(), atol=10 * ROUNDING[dtype] * (1 + ratio))


@few
@given(shapes=shapes, strength=st.floats(0, 1), seed=seeds)
def test_the_orthogonal_rule_removes_the_concepts_direction(shapes, strength, seed):
    g, s = tensors(shapes, seed), tensors(shapes, seed + 100)
    projected = project_orthogonal(g, s, strength=strength)
    assert float(inner(projected, s)) == pytest.approx((1 - strength) * float(inner(g, s)), abs=1e-9)
    assert float(inner(projected, projected)) <= float(inner(g, g)) + 1e-9
    # On either side: unlike the half-space, it also gives up progress away from the concept.
    assert float(inner(project_orthogonal(s, s), s)) == pytest.approx(0, abs=1e-9)


# Inner products and drift


@few
@given(shapes=shapes, seed=seeds)
def test_inner_is_the_flattened_product_in_the_metric(shapes, seed):
    u, v, m = tensors(shapes, seed), tensors(shapes, seed + 50), positive(shapes, seed + 90)
    flat = [torch.cat([x.flatten() for x in xs]) for xs in (u, v, m)]
    assert float(inner(u, v)) == pytest.approx(float(flat[0] @ flat[1]), rel=1e-9, abs=1e-9)
    assert float(inner(u, v, m)) == pytest.approx(float(flat[0] @ (flat[1] / flat[2])), rel=1e-9, abs=1e-9)
    assert float(metric_norm(u, m)) == pytest.approx(float((flat[0].square() * flat[2]).sum().sqrt()), rel=1e-9)
    assert float(metric_norm(u)) == pytest.approx(float(flat[0].norm()), rel=1e-9)


def test_a_coordinate_that_cannot_move_does_not():
    frozen = [torch.tensor([1.0, math.inf])]
    corrected = project_half_space(
        [torch.tensor([1.0, 1.0])], [torch.tensor([1.0, 1.0])], 0.0, restore=0.0, metric=frozen
    )
    assert torch.equal(corrected[0], torch.tensor([-1.0, 1.0]))
    assert float(metric_norm([torch.tensor([3.0, 9.0])], frozen)) == pytest.approx(3)


@few
@given(batch=st.integers(1, 4), size=st.integers(1, 5), dtype=dtypes, seed=seeds)
def test_drift_is_the_weighted_mean_square_distance(batch, size, dtype, seed):
    output, base = random(batch, 3, size, seed=seed, dtype=dtype), random(batch, 3, size, seed=seed + 1, dtype=dtype)
    weight = random(batch, 1, size, seed=seed + 2).abs()
    square = (output.double() - base.double()).square()
    expected = float((weight * square).sum() / weight.expand_as(square).sum())
    assert float(drift(output, base, weight)) == pytest.approx(expected, rel=1e-5)
    assert float(drift(output, base)) == pytest.approx(float(square.mean()), rel=1e-5)
    assert float(drift(output, output, weight)) == 0
    # Numerators and denominators of shards add up to the whole.
    shards = [drift_terms(output[i : i + 1], base[i : i + 1], weight[i : i + 1]) for i in range(batch)]
    total = sum(float(n) for n, _ in shards) / sum(float(d) for _, d in shards)
    assert total == pytest.approx(expected, rel=1e-5)


@few
@given(batch=st.integers(1, 4), size=st.integers(1, 5), guidance=st.floats(0, 3), dtype=dtypes, seed=seeds)
def test_guided_drift_is_the_drift_and_what_the_loss_fell(batch, size, guidance, dtype, seed):
    output, base, target = (random(batch, 3, size, seed=seed + i, dtype=dtype).requires_grad_() for i in range(3))
    weight = random(batch, 1, size, seed=seed + 3).abs()
    numerator, denominator = guided_drift_terms(output, base, target, weight, negative_guidance=guidance)
    f, e, y = (x.detach().double() for x in (output, base, target))

    def mean(values):
        return float((weight * values).sum() / weight.expand_as(values).sum())

    loss_drop = mean((y - e).square()) - mean((y - f).square())
    expected = (1 + guidance) * mean((f - e).square()) + guidance * loss_drop
    assert (numerator / denominator).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(guided_drift_terms(base, base, target, weight, negative_guidance=guidance)[0]) == 0
    parts = [
        guided_drift_terms(*(x[i : i + 1] for x in (output, base, target, weight)), negative_guidance=guidance)
        for i in range(batch)
    ]
    assert sum(float(n) for n, _ in parts) == pytest.approx(float(numerator), rel=1e-4, abs=1e-4)
    # Towards outputs past the base model's, away from the target.
    (gradient,) = torch.autograd.grad(numerator, output)
    towards = 2 * weight * (f - (e - guidance * (y - e)))
    assert torch.allclose(
        gradient.double(), towards.expand_as(f), rtol=1e-2 if dtype != torch.float64 else 1e-6, atol=1e-2
    )


@given(room=st.floats(-3, -1e-3), restore=st.floats(0, 1), seed=seeds)
def test_a_negative_guided_drift_is_room_for_the_step(room, restore, seed):
    step, s = [random(3, 2, seed=seed)], [random(3, 2, seed=seed + 1)]
    corrected = project_half_space(step, s, room, restore=restore)
    along = float(inner(s, step))
    assert float(inner(s, corrected)) == pytest.approx(min(along, -room), rel=1e-6)
    if along <= -room:
        assert torch.equal(corrected[0], step[0])


def test_without_guidance_the_guided_drift_is_the_drift():
    output, base, target, weight = (random(3, 4, seed=i).float() for i in range(4))
    for weights in (None, weight.abs()):
        plain = drift_terms(output, base, weights)
        assert guided_drift_terms(output, base, target, weights, negative_guidance=0.0) == plain


def test_drift_is_differentiable_and_zero_where_the_weight_is():
    output = random(2, 4, seed=0).requires_grad_()
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    drift(output, torch.zeros(2, 4), weight).backward()
    assert torch.allclose(output.grad, 2 * output.detach() * weight / 6)
    assert float(drift(torch.ones(2), torch.zeros(2), torch.zeros(2))) == 0


# Precision and errors


def test_autocast_does_not_lower_the_precision():
    a, b, u = random(4, 40, seed=0).float(), random(30, 4, seed=1).float(), random_basis(40, 5, 2).float()
    v = random_basis(40, 5, 3).float()
    moments = random(40, 40, seed=4).float()
    moments = moments @ moments.mT
    steps, s = [a, b], [random(4, 40, seed=5).float(), random(30, 4, seed=6).float()]

    def everything() -> list[Tensor]:
        return [
            remove_component(a, u, side="right"),
            coordinates(a, u, side="right"),
            torch.tensor(leakage(a, b, u, space="input")),
            orthonormal_basis(a.mT),
            torch.tensor(orthonormality_error(u)),
            principal_cosines(u, v),
            *contrast_basis(moments, moments + torch.diag(torch.arange(40.0))),
            *project_half_space(steps, s, 1.0, restore=1.0),
            *project_momentum(steps, s),
            *project_orthogonal(steps, s),
            inner(steps, s),
            drift(a, torch.zeros_like(a)),
        ]

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ u).dtype == torch.bfloat16
        found = everything()
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.allclose(x, y, atol=1e-6)


NAN = torch.full((2, 2), float("nan"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: remove_component(torch.ones(2, 3, 3), torch.eye(3), side="right"),
            r"weight has shape \(2, 3, 3\).*Flatten",
        ),
        (lambda: remove_component(torch.ones(2, 3), torch.ones(3), side="right"), "basis has shape"),
        (
            lambda: remove_component(torch.ones(2, 3), torch.eye(4), side="right"),
            "width 4 does not fit the right side, of width 3",
        ),
        (
            lambda: remove_component(torch.ones(2, 3), torch.eye(3), side="left"),
            "width 3 does not fit the left side, of width 2",
        ),
        (lambda: leakage(torch.ones(2, 3), torch.ones(4, 2), torch.eye(4), space="input"), "expected width 3"),
        (lambda: leakage(torch.ones(2, 3), torch.ones(4, 2), torch.eye(3), space="output"), "expected width 4"),
        (lambda: leakage(torch.ones(2, 3), torch.ones(4, 2), torch.eye(3), space="rank"), "expected width 2"),
        (lambda: leakage(torch.ones(2, 3), torch.ones(4, 3), torch.eye(3), space="input"), "do not fit"),
        (lambda: leakage(torch.ones(2, 3, 1), torch.ones(4, 2), torch.eye(3), space="input"), "a has shape"),
        (lambda: principal_cosines(torch.eye(3), torch.eye(4)), "3 and 4 cannot be compared"),
        (lambda: orthonormal_basis(torch.ones(3)), "vectors has shape"),
        (lambda: orthonormal_basis(NAN), "not finite"),
        (lambda: orthonormality_error(torch.ones(3)), "basis has shape"),
        (lambda: contrast_basis(torch.eye(2), torch.eye(3)), "expected two square"),
        (lambda: contrast_basis(torch.ones(2, 3), torch.ones(2, 3)), "expected two square"),
        (lambda: contrast_basis(NAN, torch.eye(2)), "not finite"),
        (lambda: contrast_basis(torch.eye(2), NAN), "not finite"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ConceptBasisError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: remove_component(torch.ones(2, 3), torch.eye(3), side="top"), "'left' or 'right'"),
        (
            lambda: leakage(torch.ones(2, 3), torch.ones(4, 2), torch.eye(3), space="gradient"),
            "'input', 'output' or 'rank'",
        ),
        (lambda: inner([], []), "no tensors"),
        (lambda: inner([torch.ones(1)], []), "shorter"),
        (lambda: project_half_space([torch.ones(1)] * 2, [torch.ones(1)], 0.0, restore=0.0), "shorter|longer"),
    ],
)
def test_wrong_calls_are_value_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
