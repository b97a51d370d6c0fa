r"""Second moments :math:`C = \frac{1}{n} \sum_i x_i x_i^T` of vectors that stream by, exact or sketched.

Up to a width of `MAX_EXACT_WIDTH` the matrix itself is accumulated. Beyond, it would not fit in memory for hundreds
of layers (a convolution of 1,280 channels has patches of width 11,520), and a sketch of some hundred rows is kept:
frequent directions (Ghashami, Liberty, Phillips and Woodruff, arXiv 1501.01711), which holds the large directions and
loses, evenly, a little of each. What is lost in all is known, and is given back as a multiple of the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .projection import contrast_basis, orthonormal_basis

__all__ = ["MAX_EXACT_WIDTH", "SecondMoment", "common_subspace", "contrast_patterns", "excess_share"]

MAX_EXACT_WIDTH = 1024


class SecondMoment:
    r"""Streaming second moments of vectors of one width.

    Args:
        width: The width :math:`d` of the vectors.
        sketch_rows: Directions that a sketch keeps, :math:`l`.
        max_exact_width: Widths beyond are sketched.
    """

    def __init__(self, width: int, *, sketch_rows: int = 64, max_exact_width: int = MAX_EXACT_WIDTH) -> None:
        self.width = width
        """The width :math:`d`."""

        self.count = 0
        """Number of vectors so far."""

        self.total = 0.0
        """Sum of their squared lengths."""

        self.sketched = width > max_exact_width
        """Whether a sketch stands for the matrix."""

        self._rows = min(sketch_rows, width)
        self._sums: Tensor | None = None
        """The sum of outer products, shape `(d, d)`, or the sketch, with shape `(<= l, d)`."""

        self._sum = torch.zeros(width, dtype=torch.float64)
        """The sum of the vectors, shape `(d,)`."""

    def update(self, vectors: Tensor) -> None:
        """Add `vectors`, shape `(n, d)`, of any floating dtype."""
        vectors = vectors.detach().float()
        self.count += vectors.shape[0]
        # In float64 from here on the CPU, since not every accelerator has it.
        self.total += float(vectors.square().sum(dim=0).cpu().double().sum())
        self._sum += vectors.sum(dim=0).cpu().double()
        with torch.autocast(vectors.device.type, enabled=False):
            if self.sketched:
                for chunk in vectors.split(self._rows):
                    self._sums = self._shrunk(chunk if self._sums is None else torch.cat([self._sums, chunk]))
            else:
                products = vectors.mT @ vectors
                self._sums = products if self._sums is None else self._sums.add_(products)

    def _shrunk(self, rows: Tensor) -> Tensor:
        """At most `l` rows whose second moments are those of `rows`, less the same amount in each direction."""
        if rows.shape[0] <= self._rows:
            return rows
        # By the small Gram matrix: an SVD of the wide matrix costs several times as much.
        squares, left = torch.linalg.eigh((rows @ rows.mT).cpu().double())
        squares, left = squares.flip(0).clamp_min(0.0), left.flip(1)
        kept = (squares - squares[self._rows]).clamp_min(0.0)[: self._rows]
        scale = (kept / squares[: self._rows].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        return (scale[:, None] * left[:, : self._rows].mT).to(rows) @ rows

    @property
    def trace(self) -> float:
        """Mean squared length of the vectors, 0 without any."""
        return self.total / self.count if self.count else 0.0

    @property
    def mean(self) -> Tensor:
        """Mean vector, shape `(d,)`, float64, on the CPU."""
        return self._sum / max(self.count, 1)

    def factor(self) -> Tensor:
        """Columns that span what the sketch holds, shape `(d, <= l)`."""
        return torch.zeros(self.width, 0) if self._sums is None else self._sums.cpu().mT

    def within(self, subspace: Tensor | None = None, *, about: Tensor | None = None) -> Tensor:
        r"""The second moments, or their part :math:`Q^T C Q` in a subspace.

        Args:
            subspace: Orthonormal columns :math:`Q`, shape `(d, q)`; `None` for the whole matrix.
            about: The point :math:`p` from which vectors are counted, shape `(d,)`; `None` for 0.
                :math:`E[(x - p)(x - p)^T]` is then :math:`C - \mu p^T - p \mu^T + p p^T`, with the mean :math:`\mu`.

        Returns:
            Shape `(q, q)`, or `(d, d)`, float64, on the CPU.
        """
        size = self.width if subspace is None else subspace.shape[1]
        if self._sums is None or not self.count:
            return torch.zeros(size, size, dtype=torch.float64)
        sums = self._sums.cpu().double()
        subspace = None if subspace is None else subspace.double()
        if self.sketched:
            inside = sums if subspace is None else sums @ subspace
            lost = max(0.0, self.total - float(sums.square().sum())) / self.width
            moments = inside.mT @ inside + lost * torch.eye(size, dtype=inside.dtype)
        else:
            moments = sums if subspace is None else subspace.mT @ sums @ subspace
        moments = moments / self.count
        return moments if about is None else _moved(moments, self.mean, about.double(), subspace)

    def trace_about(self, point: Tensor) -> float:
        """Mean squared distance of the vectors from `point`, shape `(d,)`."""
        return self.trace + float(point @ point - 2 * self.mean @ point)

    def share_in(self, basis: Tensor) -> float:
        r"""Share of the energy that lies in a basis, :math:`tr(U^T C U) / tr(C)`; 0 without energy."""
        return float(self.within(basis).trace()) / self.trace if self.trace > 0 else 0.0

    @classmethod
    def from_matrix(cls, matrix: Tensor, *, count: int = 1) -> SecondMoment:
        """The second moments of `count` vectors that are known already, shape `(d, d)`, and about their mean."""
        moment = cls(matrix.shape[0], max_exact_width=matrix.shape[0])
        moment.count, moment.total, moment._sums = count, float(matrix.trace()) * count, matrix * count
        return moment


def _moved(moments: Tensor, mean: Tensor, point: Tensor, subspace: Tensor | None) -> Tensor:
    """Second moments about another point, without the negative energy that rounding or a sketch may leave."""
    if subspace is not None:
        mean, point = subspace.mT @ mean, subspace.mT @ point
    cross = torch.outer(mean, point)
    moments = moments - cross - cross.mT + torch.outer(point, point)
    eigenvalues, vectors = torch.linalg.eigh((moments + moments.mT) / 2)
    return (vectors * eigenvalues.clamp_min(0.0)) @ vectors.mT


def common_subspace(moments: Sequence[SecondMoment], *extra: Tensor) -> Tensor | None:
    """Orthonormal columns that hold what several sketches of one width hold, and `extra` columns.

    Returns:
        Shape `(d, q)`, float64, or `None` if the moments are exact: the problem is then solved as it is.
    """
    if not all(moment.sketched for moment in moments):
        return None
    columns = [*(moment.factor() for moment in moments), *extra]
    # Rows of a sketch that carry next to nothing are rounding; in the subspace they would count as directions.
    return orthonormal_basis(torch.cat([column.double() for column in columns], dim=1), rtol=1e-7)


def contrast_patterns(concept: Tensor, reference: Tensor, *, epsilon: float = 1e-3) -> tuple[Tensor, Tensor]:
    r"""Directions in which the concept adds energy to the reference.

    The generalised eigenvectors of :math:`C_c u = \lambda R u`, with :math:`R = C_r + \epsilon \bar c_r I`, are
    *filters*: the directions that tell best whether the concept is there, which avoid what the reference is full of.
    What the concept adds, :math:`C_c - R = \sum_i (\lambda_i - 1)\, R u_i u_i^T R` for :math:`u_i^T R u_j =
    \delta_{ij}`, lies along the *patterns* :math:`R u_i` instead (Haufe et al., NeuroImage 2014). Only a basis that
    holds the patterns makes :math:`A U = 0` blind to the concept. With a reference that is alike in all directions,
    both are the same.

    Args:
        concept: Second moments of the concept set, shape `(d, d)`.
        reference: Second moments of the reference set, shape `(d, d)`.
        epsilon: Ridge relative to the mean diagonal of `reference`.

    Returns:
        `(eigenvalues, basis)`: shapes `(d,)`, falling, and `(d, d)`, orthonormal columns, such that the first `k`
        columns span the patterns of the first `k` eigenvalues.

    Raises:
        ConceptBasisError: As :func:`contrast_basis`.
    """
    eigenvalues, filters = contrast_basis(concept, reference, epsilon=epsilon)
    basis, _ = torch.linalg.qr(_ridged(reference, epsilon) @ filters)
    return eigenvalues, basis


def excess_share(concept: Tensor, reference: Tensor, basis: Tensor, *, epsilon: float = 1e-3) -> float:
    r"""Share of what the concept adds to the reference that a basis holds.

    With :math:`L L^T = R` as in :func:`contrast_patterns` and :math:`W = L^{-1} C_c L^{-T}`, the energy of the
    concept where the reference has energy 1, what is added is :math:`P`, the part of :math:`W - I` with positive
    eigenvalues, and the share is :math:`tr(Q^T P Q) / tr(P)`, where :math:`Q` orthonormalises :math:`L^{-1} U`.

    Args:
        concept: Second moments of the concept set, shape `(d, d)`.
        reference: Second moments of the reference set, shape `(d, d)`.
        basis: Orthonormal columns :math:`U`, shape `(d, k)`.
        epsilon: Ridge relative to the mean diagonal of `reference`.

    Returns:
        A number in [0, 1]; 0 where nothing is added.
    """
    factor = torch.linalg.cholesky(_ridged(reference, epsilon))
    whitened = torch.linalg.solve_triangular(factor, concept.double(), upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.mT, upper=False)
    eigenvalues, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    added = (eigenvalues - 1).clamp_min(0.0)
    if added.sum() <= 0:
        return 0.0
    inside = orthonormal_basis(torch.linalg.solve_triangular(factor, basis.double(), upper=False)).mT @ vectors
    return float((inside.square() * added).sum() / added.sum())


def _ridged(reference: Tensor, epsilon: float) -> Tensor:
    """:math:`R`, float64, as in `contrast_basis`."""
    reference = reference.double()
    scale = reference.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return reference + epsilon * scale * torch.eye(len(reference), dtype=reference.dtype)
