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

from .projection import orthonormal_basis

__all__ = ["MAX_EXACT_WIDTH", "SecondMoment", "common_subspace", "excess_share"]

MAX_EXACT_WIDTH = 1024


class SecondMoment:
    r"""Streaming second moments of vectors of one width.

    Args:
        width: The width :math:`d` of the vectors.
        sketch_rows: Directions that a sketch keeps, :math:`l`.
        max_exact_width: Widths beyond are sketched.
    """

    def __init__(self, width: int, *, sketch_rows: int = 128, max_exact_width: int = MAX_EXACT_WIDTH) -> None:
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

    def update(self, vectors: Tensor) -> None:
        """Add `vectors`, shape `(n, d)`, of any floating dtype."""
        vectors = vectors.detach().float()
        self.count += vectors.shape[0]
        self.total += float(vectors.double().square().sum())
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
        # By the small Gram matrix, in float64: an SVD of the wide matrix costs several times as much.
        rows = rows.double()
        squares, left = torch.linalg.eigh(rows @ rows.mT)
        squares, left = squares.flip(0).clamp_min(0.0), left.flip(1)
        kept = (squares - squares[self._rows]).clamp_min(0.0)[: self._rows]
        scale = (kept / squares[: self._rows].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        return (scale[:, None] * (left[:, : self._rows].mT @ rows)).float()

    @property
    def trace(self) -> float:
        """Mean squared length of the vectors, 0 without any."""
        return self.total / self.count if self.count else 0.0

    def factor(self) -> Tensor:
        """Columns that span what the sketch holds, shape `(d, <= l)`."""
        return torch.zeros(self.width, 0) if self._sums is None else self._sums.cpu().mT

    def within(self, subspace: Tensor | None = None) -> Tensor:
        r"""The second moments, or their part :math:`Q^T C Q` in a subspace.

        Args:
            subspace: Orthonormal columns :math:`Q`, shape `(d, q)`; `None` for the whole matrix of exact moments.

        Returns:
            Shape `(q, q)`, or `(d, d)`, float64, on the CPU.
        """
        if self._sums is None or not self.count:
            size = self.width if subspace is None else subspace.shape[1]
            return torch.zeros(size, size, dtype=torch.float64)
        # On the CPU: not every accelerator has float64, and the matrices are solved once.
        sums = self._sums.cpu().double()
        if not self.sketched:
            return (sums if subspace is None else subspace.double().mT @ sums @ subspace.double()) / self.count
        if subspace is None:
            subspace = torch.eye(self.width, dtype=torch.float64)
        inside = sums @ subspace.double()
        lost = max(0.0, self.total - float(sums.square().sum())) / self.width
        return (inside.mT @ inside + lost * torch.eye(inside.shape[1], dtype=inside.dtype)) / self.count

    def share_in(self, basis: Tensor) -> float:
        r"""Share of the energy that lies in a basis, :math:`tr(U^T C U) / tr(C)`; 0 without energy."""
        return float(self.within(basis).trace()) / self.trace if self.trace > 0 else 0.0

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> SecondMoment:
        """Exact second moments that are known already, shape `(d, d)`."""
        moment = cls(matrix.shape[0], max_exact_width=matrix.shape[0])
        moment.count, moment.total, moment._sums = 1, float(matrix.trace()), matrix
        return moment


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


def excess_share(concept: Tensor, reference: Tensor, basis: Tensor, *, epsilon: float = 1e-3) -> float:
    r"""Share of what the concept has beyond the reference that a basis holds.

    With :math:`L L^T = C_r + \epsilon \bar c_r I` and :math:`W = L^{-1} C_c L^{-T}`, the energy of the concept where
    the reference has energy 1, the excess is :math:`P`, the part of :math:`W - I` with positive eigenvalues, and its
    share is :math:`tr(Q^T P Q) / tr(P)`, where :math:`Q` orthonormalises :math:`L^T U`.

    Args:
        concept: Second moments of the concept set, shape `(d, d)`.
        reference: Second moments of the reference set, shape `(d, d)`.
        basis: Orthonormal columns :math:`U`, shape `(d, k)`.
        epsilon: Ridge relative to the mean diagonal of `reference`, as in `contrast_basis`.

    Returns:
        A number in [0, 1]; 0 where there is no excess.
    """
    concept, reference, basis = concept.double(), reference.double(), basis.double()
    scale = reference.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    factor = torch.linalg.cholesky(reference + epsilon * scale * torch.eye(len(reference), dtype=reference.dtype))
    whitened = torch.linalg.solve_triangular(factor, concept, upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.mT, upper=False)
    eigenvalues, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    excess = (eigenvalues - 1).clamp_min(0.0)
    if excess.sum() <= 0:
        return 0.0
    inside = orthonormal_basis(factor.mT @ basis).mT @ vectors
    return float((inside.square() * excess).sum() / excess.sum())
