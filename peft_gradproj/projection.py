r"""The mathematics of gradient projection, as pure functions on tensors.

A LoRA layer computes :math:`y = W x + s B A x` with :math:`A` of shape `(r, d_in)` and :math:`B` of shape
`(d_out, r)`. A *concept basis* is a matrix with orthonormal columns, of shape `(d, k)`, in one of the layer's
spaces:

- `input`, :math:`U` with :math:`d = d_{in}`: the invariant :math:`A U = 0` makes the adapter blind to the concept's
  features, :math:`\Delta W U = 0`;
- `output`, :math:`O` with :math:`d = d_{out}`: :math:`O^T B = 0`, so that :math:`O^T \Delta W = 0`;
- `rank`, :math:`R` with :math:`d = r`: what :math:`A` and :math:`B` are along :math:`R` keeps its start;
- `gradient`, :math:`Q`, over the flattened gradients of :math:`A` and :math:`B`.

The *half-space projection* corrects a whole step :math:`\Delta`, a list of tensors, in the metric :math:`M` of the
optimizer, such that the concept's drift :math:`D` with gradient :math:`s` does not grow.

All functions compute in float32, or float64 if the input is float64, and return the dtype of their first argument.
They know neither PEFT nor files. Convolution weights are passed flattened to two dimensions.

Reference: arXiv 2512.11194, "Gradient Projection Enables Selective Learning in Diffusion Models".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import nan

import torch
from torch import Tensor

from .errors import ConceptBasisError

__all__ = [
    "LEAST_REMAINDER",
    "contrast_basis",
    "coordinates",
    "drift",
    "drift_terms",
    "dtype_name",
    "full_precision",
    "guided_drift_terms",
    "half_space_coefficient",
    "inner",
    "leakage",
    "metric_norm",
    "metric_squares",
    "orthonormal_basis",
    "orthonormality_error",
    "principal_cosines",
    "project_half_space",
    "project_momentum",
    "project_orthogonal",
    "remove_component",
    "truncation_rank",
]


def dtype_name(dtype: torch.dtype) -> str:
    """What a dtype is called in files and messages, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise ConceptBasisError(
            f"{name} has shape {tuple(tensor.shape)}; expected a matrix. Flatten convolution weights to two dimensions."
        )


# Bases


def orthonormal_basis(vectors: Tensor, *, rtol: float | None = None) -> Tensor:
    r"""Orthonormal columns that span the columns of `vectors`.

    Args:
        vectors: Shape `(d, n)`, any floating dtype; columns need not be independent.
        rtol: Singular values at most `rtol` times the largest count as zero. The default is
            `max(d, n)` times the rounding error of the dtype that is computed in.

    Returns:
        Shape `(d, k)` with `k <= min(d, n)`, float32 (float64 if `vectors` is); `k` is 0 for zero vectors.

    Raises:
        ConceptBasisError: If `vectors` is not a matrix or has values that are not finite.
    """
    _check_matrix("vectors", vectors)
    dtype = _compute_dtype(vectors)
    vectors = vectors.to(dtype)
    if not torch.isfinite(vectors).all():
        raise ConceptBasisError("vectors have values that are not finite; a basis needs finite vectors.")
    if vectors.numel() == 0:
        return vectors[:, :0]
    left, singular, _ = torch.linalg.svd(vectors, full_matrices=False)
    if rtol is None:
        rtol = max(vectors.shape) * torch.finfo(dtype).eps
    return left[:, singular > rtol * singular[0].clamp_min(torch.finfo(dtype).tiny)].contiguous()


def orthonormality_error(basis: Tensor) -> float:
    r"""Largest entry of :math:`|U^T U - I|`, for `basis` of shape `(d, k)`; 0 for orthonormal columns."""
    _check_matrix("basis", basis)
    if basis.shape[1] == 0:
        return 0.0
    basis = basis.to(_compute_dtype(basis))
    with torch.autocast(basis.device.type, enabled=False):
        gram = basis.mT @ basis
    return float((gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).abs().max())


def principal_cosines(u: Tensor, v: Tensor) -> Tensor:
    r"""Cosines of the principal angles between the spans of `u` and `v`, largest first.

    Args:
        u: Shape `(d, k)`, orthonormal columns.
        v: Shape `(d, l)`, orthonormal columns.

    Returns:
        Shape `(min(k, l),)`, in [0, 1]: the singular values of :math:`U^T V` (Björck and Golub, 1973).

    Raises:
        ConceptBasisError: If the widths `d` differ.
    """
    _check_matrix("u", u)
    _check_matrix("v", v)
    if u.shape[0] != v.shape[0]:
        raise ConceptBasisError(
            f"bases of width {u.shape[0]} and {v.shape[0]} cannot be compared; expected equal widths."
        )
    dtype = _compute_dtype(u, v)
    if min(u.shape[1], v.shape[1]) == 0:
        return torch.zeros(0, dtype=dtype, device=u.device)
    with torch.autocast(u.device.type, enabled=False):
        return torch.linalg.svdvals(u.to(dtype).mT @ v.to(dtype)).clamp(0.0, 1.0)


def contrast_basis(concept: Tensor, reference: Tensor, *, epsilon: float = 1e-3) -> tuple[Tensor, Tensor]:
    r"""Directions in which the concept has more energy than the reference.

    Solves :math:`C_c u = \lambda (C_r + \epsilon\,\bar c_r I) u`, where :math:`\bar c_r` is the mean diagonal of
    :math:`C_r`, and orthonormalises the eigenvectors in order of falling :math:`\lambda`.

    Args:
        concept: Second moments of the concept set, shape `(d, d)`, symmetric.
        reference: Second moments of the reference set, shape `(d, d)`, symmetric.
        epsilon: Ridge relative to the mean diagonal of `reference`.

    Returns:
        `(eigenvalues, basis)`: shapes `(d,)`, falling, and `(d, d)`, orthonormal columns, such that the first `k`
        columns span the first `k` generalised eigenvectors.

    Raises:
        ConceptBasisError: If the shapes differ, or a value is not finite.
    """
    _check_matrix("concept", concept)
    if concept.shape != reference.shape or concept.shape[0] != concept.shape[1]:
        raise ConceptBasisError(
            f"second moments have shapes {tuple(concept.shape)} and {tuple(reference.shape)}; expected two square "
            "matrices of one size."
        )
    if not (torch.isfinite(concept).all() and torch.isfinite(reference).all()):
        raise ConceptBasisError("second moments have values that are not finite; check the activations for overflow.")
    # float64 throughout: the whitening below squares the condition number.
    concept, reference = concept.double(), reference.double()
    size = reference.shape[0]
    scale = reference.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    ridge = reference + epsilon * scale * torch.eye(size, dtype=reference.dtype, device=reference.device)
    factor = torch.linalg.cholesky(ridge)
    half = torch.linalg.solve_triangular(factor, concept, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    eigenvalues, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    vectors = torch.linalg.solve_triangular(factor.mT, vectors.flip(-1), upper=True)
    # QR keeps the order: its first k columns span the first k eigenvectors.
    basis, _ = torch.linalg.qr(vectors / vectors.norm(dim=0, keepdim=True))
    return eigenvalues.flip(-1).clamp_min(0.0), basis


def truncation_rank(energies: Tensor, *, rank: int | None = None, energy: float | None = None) -> int:
    """How many leading directions to keep.

    Args:
        energies: Shape `(n,)`, non-negative, falling.
        rank: Keep at most so many.
        energy: Keep the fewest that hold this share, in (0, 1], of the sum.

    Returns:
        The smaller of what `rank` and `energy` allow; directions without energy are never kept.
    """
    positive = int((energies > 0).sum())
    kept = positive if rank is None else min(rank, positive)
    if energy is not None and positive:
        share = energies.double().cumsum(0) / energies.double().sum()
        kept = min(kept, int((share < energy - 1e-12).sum()) + 1)
    return kept


# Subspace projection


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Without autocast, which would silently run products in bfloat16, whose rounding is the leak that we exclude."""
    # Entering torch.autocast takes as long as a small product.
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def remove_component(
    weight: Tensor, basis: Tensor, *, side: str, strength: float = 1.0, target: Tensor | None = None
) -> Tensor:
    r"""Move the component of `weight` along `basis` towards `target`, zero by default.

    For `side="right"`: :math:`W - \alpha (W U - T) U^T`; for `side="left"`: :math:`W - \alpha U (U^T W - T)`.
    At :math:`\alpha = 1` and :math:`T = 0` it is the orthogonal projection on the complement of the span.

    Args:
        weight: Shape `(m, n)`: A, B, or a gradient of one.
        basis: Shape `(n, k)` for `right`, `(m, k)` for `left`, orthonormal columns.
        side: `right` acts on rows (`input` on A, `rank` on B), `left` on columns (`output` on B, `rank` on A).
        strength: Share :math:`\alpha` in [0, 1] of the component that is removed.
        target: The coordinates to keep, shape `(m, k)` for `right`, `(k, n)` for `left`.

    Returns:
        Shape and dtype of `weight`.

    Raises:
        ConceptBasisError: If the widths do not fit.
    """
    _check_matrix("weight", weight)
    _check_matrix("basis", basis)
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}; expected 'left' or 'right'.")
    width = weight.shape[1 if side == "right" else 0]
    if basis.shape[0] != width:
        raise ConceptBasisError(
            f"a basis of width {basis.shape[0]} does not fit the {side} side, of width {width}, of a weight of shape "
            f"{tuple(weight.shape)}."
        )
    dtype = _compute_dtype(weight)
    # Few calls, since this is done for every adapted layer in every forward, where calls cost more than products.
    with full_precision(weight.device.type):
        wide, basis = _as(dtype, weight), _as(dtype, basis)
        excess = wide @ basis if side == "right" else basis.mT @ wide
        if target is not None:
            excess = excess - _as(dtype, target)
        factors = (excess, basis.mT) if side == "right" else (basis, excess)
        return _as(weight.dtype, torch.addmm(wide, *factors, alpha=-strength))


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # What `to` finds out about a tensor that it leaves as it is takes half as long as a small product.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def coordinates(weight: Tensor, basis: Tensor, *, side: str) -> Tensor:
    r"""Coordinates of `weight` along `basis`: :math:`W U` for `right`, :math:`U^T W` for `left`.

    Args:
        weight: Shape `(m, n)`.
        basis: Shape `(n, k)` for `right`, `(m, k)` for `left`.
        side: See :func:`remove_component`.

    Returns:
        Shape `(m, k)` for `right`, `(k, n)` for `left`, float32 (float64 if an argument is).
    """
    dtype = _compute_dtype(weight, basis)
    with full_precision(weight.device.type):
        wide, basis = weight.to(dtype), basis.to(dtype)
        return wide @ basis if side == "right" else basis.mT @ wide


LEAST_REMAINDER = 1e-3
r"""The least share of :math:`\sigma = \sum_i \|b_i\| \|a_i\|`, over columns of B and rows of A, that B A has to keep.

What is less is what cancelling factors leave, and a leak could hide in how that is rounded. QR and products err in each
row and column relative to its own size, so both norms of a leakage are known to :math:`c u \sigma`, with u = 1e-16 the
rounding of float64 and c a small multiple of the widths at worst. The leakage is then known to c u / LEAST_REMAINDER,
or c 1e-13: far below the tightest tolerance of `verify`, 1e-6. Honest adapters are far from the limit. The share is
:math:`1 / \sqrt r` for r independent pairs, and float32 factors that cancelled to a thousandth would leak some 5e-6 by
their rounding alone.
"""


def leakage(a: Tensor, b: Tensor, basis: Tensor, *, space: str) -> float:
    r"""Share of the adapter's update that lies in a concept basis.

    `input`: :math:`\|B A U\|_F / \|B A\|_F`; `output`: :math:`\|O^T B A\|_F / \|B A\|_F`;
    `rank`: :math:`\|B R R^T A\|_F / \|B A\|_F`. The norms come from `r x r` cores, :math:`\|B X\|_F = \|T X\|_F`
    with the triangle :math:`T` of :math:`B = Q T`, so that :math:`\Delta W` is never built.

    Args:
        a: Shape `(r, d_in)`.
        b: Shape `(d_out, r)`.
        basis: Shape `(d, k)`, orthonormal columns, `d` being `d_in`, `d_out` or `r`.
        space: `input`, `output` or `rank`.

    Returns:
        A number in [0, 1]; 0 for an adapter that is zero. Rounding of `a` and `b` sets its floor. NaN where it cannot
        be measured: the factors cancel until less than :data:`LEAST_REMAINDER` of them is left, or are not finite.

    Raises:
        ConceptBasisError: If the shapes do not fit.
    """
    _check_matrix("a", a)
    _check_matrix("b", b)
    _check_matrix("basis", basis)
    if space not in ("input", "output", "rank"):
        raise ValueError(f"space is {space!r}; expected 'input', 'output' or 'rank'.")
    width = {"input": a.shape[1], "output": b.shape[0], "rank": a.shape[0]}[space]
    if b.shape[1] != a.shape[0] or basis.shape[0] != width:
        raise ConceptBasisError(
            f"A {tuple(a.shape)}, B {tuple(b.shape)} and a basis of width {basis.shape[0]} do not fit in the {space} "
            f"space; expected width {width}."
        )
    # Scaling by the largest entry changes no ratio and keeps the squares of very small or large adapters representable.
    a, b, basis = _unit_scale(a.detach().double()), _unit_scale(b.detach().double()), basis.detach().double()
    triangle_a, triangle_b = _triangle(a.mT), _triangle(b)
    total = (triangle_b @ triangle_a.mT).norm()
    uncancelled = (b.norm(dim=0) * a.norm(dim=1)).sum()
    # Written so that NaN is not taken for a number.
    if not total > LEAST_REMAINDER * uncancelled:
        return 0.0 if uncancelled == 0 else nan
    if space == "input":
        part = triangle_b @ (a @ basis)
    elif space == "output":
        part = (basis.mT @ b) @ triangle_a.mT
    else:
        part = (triangle_b @ basis) @ (triangle_a @ basis).mT
    return float(part.norm() / total)


def _triangle(tall: Tensor) -> Tensor:
    r""":math:`T` of :math:`X = Q T` with orthonormal :math:`Q`, so that :math:`\|X Y\|_F = \|T Y\|_F`.

    Not by :math:`X^T X`: its rounding is relative to squares, and would hide a leak of 1e-8 where nothing cancels.
    """
    return torch.linalg.qr(tall, mode="r").R


def _unit_scale(tensor: Tensor) -> Tensor:
    largest = tensor.abs().max() if tensor.numel() else tensor.new_tensor(0.0)
    return tensor / largest if largest > 0 else tensor


# Online projection


def drift(output: Tensor, base_output: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Weighted mean square distance of the adapted model's outputs from the base model's.

    :math:`D = \sum w (f_\theta(x) - f_0(x))^2 / \sum w`.

    Args:
        output: The adapted model's outputs, shape `(batch, *)`.
        base_output: The base model's outputs, same shape.
        weight: Where the concept is: non-negative, broadcastable to `output`; `None` weighs all alike.

    Returns:
        A scalar, differentiable in `output`.
    """
    numerator, denominator = drift_terms(output, base_output, weight)
    return numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny)


def drift_terms(output: Tensor, base_output: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Numerator and denominator of :func:`drift`, which processes sum separately; same arguments."""
    dtype = _compute_dtype(output, base_output)
    return _weighted_terms((output.to(dtype) - base_output.to(dtype)).square(), weight)


def guided_drift_terms(
    output: Tensor,
    base_output: Tensor,
    loss_target: Tensor,
    weight: Tensor | None = None,
    *,
    negative_guidance: float,
) -> tuple[Tensor, Tensor]:
    r"""Numerator and denominator of the drift from outputs that are guided away from the concept.

    With the base model's error :math:`e = y - f_0(x)` against the training target :math:`y`, the change
    :math:`d = f_\theta(x) - f_0(x)` is compared with :math:`-\eta e`, as Erased Stable Diffusion (Gandikota et al.,
    arXiv 2303.07345) does with a model's own answer in place of :math:`y`:

    .. math:: D_\eta = \sum w \left(|d + \eta e|^2 - |\eta e|^2\right) / \sum w = (1 + \eta) D + \eta L ,

    where :math:`L = \sum w (|e|^2 - |e - d|^2) / \sum w` is by how much the adapter lowers the concept's loss. It is 0
    for the base model, and where it is not positive, that loss is at least :math:`(1 + 1 / \eta) D` above the base
    model's. At :math:`\eta = 0` it is the drift.

    Args:
        output: The adapted model's outputs, shape `(batch, *)`.
        base_output: The base model's outputs, same shape.
        loss_target: What the outputs are trained to be (noise or velocity), same shape.
        weight: Where the concept is: non-negative, broadcastable to `output`; `None` weighs all alike.
        negative_guidance: :math:`\eta \ge 0`.

    Returns:
        Two scalars, the first of which may be negative.
    """
    dtype = _compute_dtype(output, base_output)
    base = base_output.to(dtype)
    change = output.to(dtype) - base
    # Not as the difference of two squares, which would cancel where the drift is small beside the error.
    excess = change * (change + 2 * negative_guidance * (loss_target.to(dtype) - base))
    return _weighted_terms(excess, weight)


def _weighted_terms(values: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if weight is None:
        return values.sum(), values.new_tensor(float(values.numel()))
    weight = weight.to(values.dtype).expand_as(values)
    return (weight * values).sum(), weight.sum()


def inner(u: Sequence[Tensor], v: Iterable[Tensor], metric: Sequence[Tensor] | None = None) -> Tensor:
    r""":math:`\langle u, M^{-1} v \rangle`, summed over lists of tensors.

    Args:
        u: Tensors of any shapes.
        v: Tensors of the same shapes.
        metric: The diagonal of :math:`M`, positive, same shapes; `None` for the identity.

    Returns:
        A float64 scalar.
    """
    products = []
    for i, (x, y) in enumerate(zip(u, v, strict=True)):
        left = x.double()
        right = left if y is x else y.double()
        if metric is not None:
            right = right / metric[i].double()
        products.append(torch.dot(left.reshape(-1), right.reshape(-1)))
    return _total(products)


def _total(products: Sequence[Tensor]) -> Tensor:
    if not products:
        raise ValueError("an inner product of no tensors; expected at least one.")
    # A model may be spread over devices.
    return torch.stack([product.to(products[0].device) for product in products]).sum()


def metric_norm(x: Sequence[Tensor], metric: Sequence[Tensor] | None = None) -> Tensor:
    r""":math:`\|x\|_M = \langle x, M x\rangle^{1/2}`, over lists of tensors.

    Args:
        x: Tensors of any shapes.
        metric: The diagonal of :math:`M`, same shapes; `None` for the identity. Where it is infinite, a coordinate
            that cannot move, `x` counts as 0.

    Returns:
        A float64 scalar.
    """
    if metric is None:
        return inner(x, x).sqrt()
    return inner(x, (y.double() * _where_it_moves(m) for y, m in zip(x, metric, strict=True))).sqrt()


def metric_squares(x: Iterable[Tensor], metric: Iterable[Tensor]) -> Iterator[Tensor]:
    r"""The summands of :math:`\|x\|_M^2`, element by element, in float64; arguments as in :func:`metric_norm`.

    One tensor after the other, since all of them would take as much memory as several copies of `x`.
    """
    return (y.double().square() * _where_it_moves(m) for y, m in zip(x, metric, strict=True))


def _where_it_moves(diagonal: Tensor) -> Tensor:
    return diagonal.nan_to_num(nan=torch.nan, posinf=0.0)


def half_space_coefficient(
    step: Sequence[Tensor],
    gradient: Sequence[Tensor],
    drift_value: float | Tensor,
    *,
    restore: float,
    metric: Sequence[Tensor] | None = None,
    restore_limit: float | Tensor | None = None,
) -> Tensor:
    r"""How far a step lies outside the half-space :math:`\{\delta : \langle s, \delta\rangle \le -\kappa D\}`.

    Where :math:`D < 0`, the half-space is :math:`\langle s, \delta\rangle \le -D`: what there is room for.

    Returns:
        :math:`c = \max(0, \langle s, \Delta\rangle + \kappa D) / \langle s, M^{-1} s\rangle`, a float64 scalar;
        0 where :math:`s` is 0. See :func:`project_half_space` for the arguments.
    """
    norms, alongs = [], []
    for i, (s, d) in enumerate(zip(gradient, step, strict=True)):
        wide = s.double()
        # As the step is moved along it, in its precision.
        moved = wide if metric is None else _scaled(d, s, metric[i]).double()
        norms.append(torch.dot(wide.flatten(), moved.flatten()))
        alongs.append(torch.dot(wide.flatten(), d.double().flatten()))
    norm, along = _total(norms), _total(alongs)
    drift_value = torch.as_tensor(drift_value, dtype=along.dtype, device=along.device)
    excess = (along + restore * drift_value.clamp_min(0.0) + drift_value.clamp_max(0.0)).clamp_min(0.0)
    if restore_limit is not None:
        # ||c M^-1 s||_M = c sqrt(<s, M^-1 s>), so the bound on the norm is one on the excess.
        excess = torch.minimum(excess, along.clamp_min(0.0) + restore_limit * norm.sqrt())
    return _quotient(excess, norm)


def project_half_space(
    step: Sequence[Tensor],
    gradient: Sequence[Tensor],
    drift_value: float | Tensor,
    *,
    restore: float,
    metric: Sequence[Tensor] | None = None,
    restore_limit: float | Tensor | None = None,
) -> list[Tensor]:
    r"""Nearest step that does not increase the drift and takes back a share of it.

    :math:`\Delta' = \Delta - M^{-1} s \max(0, \langle s, \Delta\rangle + \kappa D) / \langle s, M^{-1} s\rangle`,
    the projection of :math:`\Delta` on :math:`\{\delta : \langle s, \delta\rangle \le -\kappa D\}` in the norm
    :math:`\|x\|_M^2 = \langle x, M x\rangle`. With :math:`\kappa = 0` and :math:`M = I` it is the rule of A-GEM
    (Chaudhry et al., arXiv 1812.00420).

    Args:
        step: What the optimizer added to the parameters, :math:`\Delta`, a tensor per parameter.
        gradient: The gradient :math:`s` of the drift before the step, same shapes.
        drift_value: The drift :math:`D` before the step. Only a guided drift may be negative: the step may use that up.
        restore: The share :math:`\kappa >= 0` of the drift that the step takes back.
        metric: The diagonal of the optimizer's metric :math:`M`, positive, same shapes; `None` for the identity.
        restore_limit: Bounds the norm :math:`\|\cdot\|_M` of what the correction does beyond cancelling
            :math:`\langle s, \Delta\rangle`. As :math:`s \to 0` a drift that no longer falls would ask for steps of
            any length. Where the bound is active the step still does not increase the drift, to first order.

    Returns:
        The corrected step, a tensor per parameter, in the dtypes of `step`.
    """
    coefficient = half_space_coefficient(
        step, gradient, drift_value, restore=restore, metric=metric, restore_limit=restore_limit
    )
    return [
        _add_scaled(d, s, -coefficient, None if metric is None else metric[i])
        for i, (d, s) in enumerate(zip(step, gradient, strict=True))
    ]


def project_momentum(
    moment: Sequence[Tensor], gradient: Sequence[Tensor], *, metric: Sequence[Tensor] | None = None
) -> list[Tensor]:
    r"""First moment whose steps do not push the drift up.

    :math:`m' = m + s \max(0, -\langle s, M^{-1} m\rangle) / \langle s, M^{-1} s\rangle`: an optimizer goes along
    :math:`-M^{-1} m`, which raises the drift where the inner product is negative.

    Args:
        moment: The first moment :math:`m`, a tensor per parameter.
        gradient: The gradient :math:`s` of the drift, same shapes.
        metric: As in :func:`project_half_space`.

    Returns:
        The corrected moment, a tensor per parameter, in the dtypes of `moment`.
    """
    norm = inner(gradient, gradient, metric)
    coefficient = _quotient((-inner(gradient, moment, metric)).clamp_min(0.0), norm)
    return [_add_scaled(m, s, coefficient, None) for m, s in zip(moment, gradient, strict=True)]


def project_orthogonal(
    gradient: Sequence[Tensor], concept_gradient: Sequence[Tensor], *, strength: float = 1.0
) -> list[Tensor]:
    r"""The paper's rule: remove the concept gradient's direction from a gradient.

    :math:`g' = g - \alpha \langle g, s\rangle / \|s\|^2\, s` (arXiv 2512.11194).

    Args:
        gradient: The training gradient :math:`g`, a tensor per parameter.
        concept_gradient: The concept loss's gradient :math:`s`, same shapes.
        strength: Share :math:`\alpha` in [0, 1] that is removed.

    Returns:
        The projected gradient, a tensor per parameter, in the dtypes of `gradient`.
    """
    norm = inner(concept_gradient, concept_gradient)
    share = _quotient(inner(gradient, concept_gradient), norm)
    return [_add_scaled(g, s, -strength * share, None) for g, s in zip(gradient, concept_gradient, strict=True)]


def _scaled(x: Tensor, direction: Tensor, metric: Tensor) -> Tensor:
    r""":math:`M^{-1} s`, in the precision in which it is added to `x`."""
    dtype = _compute_dtype(x, direction)
    return direction.to(dtype) / metric.to(dtype)


def _quotient(numerator: Tensor, norm: Tensor) -> Tensor:
    """`numerator / norm`, and 0 where the direction that `norm` belongs to is 0; float64 scalars."""
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(norm > tiny, numerator / norm.clamp_min(tiny), torch.zeros_like(norm))


def _add_scaled(x: Tensor, direction: Tensor, scale: Tensor, metric: Tensor | None) -> Tensor:
    dtype = _compute_dtype(x, direction)
    direction = direction.to(dtype) if metric is None else _scaled(x, direction, metric)
    # The coefficient stays float64 until here: it is a quotient that may lie outside float32's range.
    return (x.to(dtype) + (scale.to(x.device) * direction.double()).to(dtype)).to(x.dtype)
