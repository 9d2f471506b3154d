"""The Hessian H of an objective by products with vectors alone: its outermost eigenvalues, and its trace.

Eigenvalues: block Lanczos with full reorthogonalisation; k vectors in a block find equal eigenvalues, all of them. With
Q the basis, S = QᵀHQ in full and S y = θ y, the residual ‖HQy − θQy‖ is the part of the last block's products outside
Q. Trace: the mean of vᵀHv over signs v (Hutchinson).
Layout: Q in blocks ``[≤ k, n]``, float64, 8 n bytes for each product. Invariant: a seed gives the same result.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tsam_ext.engine.checks import check_choice, check_flag, check_int, check_positive, check_seed, refuse
from tsam_ext.engine.notices import warn

from .evaluation import Progress, as_tensors, as_vector, check_objective, evaluating
from .objective import Objective
from .sharpness import MAX_SAMPLES, SampleMean

Which = Literal["largest", "smallest", "magnitude"]
KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": torch.neg,
    "smallest": torch.clone,
    "magnitude": lambda x: -x.abs(),
}
LOST = 1e-10  # what is left of a product outside the basis, over the Hessian's norm: below it is rounding


@dataclass(frozen=True)
class Spectrum:
    """What :func:`hessian_eigenvalues` found.

    Attributes:
        eigenvalues: ``[k]``, float64, on the CPU, in the order asked for.
        residuals: ``[k]``: ‖Hv − θv‖ for the unit vector v of each: an eigenvalue of H lies that close to θ.
        products: how many products with the Hessian were made, each one pass over the rows.
        converged: whether all residuals are within the tolerance.
        eigenvectors: for each eigenvalue a list of tensors like the parameters, of length 1 together; None where not
            asked for. They may be the ``directions`` of :func:`surface`, with ``filter_normalised=False``.
    """

    eigenvalues: Tensor
    residuals: Tensor
    products: int
    converged: bool
    eigenvectors: list[list[Tensor]] | None


def hessian_eigenvalues(
    objective: Objective,
    k: int = 5,
    *,
    which: Which = "largest",
    eigenvectors: bool = False,
    tolerance: float = 1e-3,
    max_products: int = 300,
    block_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Spectrum:
    """The k outermost eigenvalues of the Hessian, and their eigenvectors on request.

    Memory: 8 bytes × elements × products made, for the basis (1.9 GB for 40 products of 6 million elements), and a few
    blocks beside it. ``max_products`` bounds it.

    Args:
        objective: of n elements, twice differentiable.
        k: how many, from 1 to n. Default 5.
        which: ``"largest"`` (default; descending), ``"smallest"`` (ascending) or ``"magnitude"`` (|θ| descending).
        eigenvectors: whether to return them. Default False.
        tolerance: of the residuals, relative to the largest |θ|. Default 1e-3. An eigenvalue's error is at most its
            residual, and about the residual's square over the distance to the next eigenvalue.
        max_products: at least k, in whole blocks. Default 300.
        block_size: how many products are made between two looks at the residuals, and how often equal eigenvalues can
            be found: from 1 to k. ``None`` (default): k. With 1 there are about half as many products at k = 5, and at
            k = 20 one eigenvalue of twenty has been seen to be missed.
        seed: of the start vectors, 64 bits. Default 0.
        progress: called with (products made, max_products) after each product.

    Returns:
        A :class:`Spectrum`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted; also where the Hessian is not finite.

    Warns:
        UserWarning: where ``max_products`` ended it before the tolerance was met.

    Source: G. Golub and R. Underwood, "The block Lanczos method for computing eigenvalues", 1977; of networks:
    B. Ghorbani, S. Krishnan, Y. Xiao, ICML 2019 (arXiv 1901.10159). H v: B. Pearlmutter, Neural Computation 6, 1994.

    Example:
        >>> import torch
        >>> x = torch.zeros(3, requires_grad=True)
        >>> f = Objective.of_function(lambda: (torch.tensor([1.0, 4.0, 9.0]) * x.square()).sum(), [x])
        >>> hessian_eigenvalues(f, k=2).eigenvalues
        tensor([18.0000,  8.0000], dtype=torch.float64)
    """
    op = "metrics.hessian_eigenvalues"
    size = check_objective(op, objective).num_elements
    k = check_int(op, "k", k, 1, size)
    check_choice(op, "which", which, tuple(KEYS))
    check_flag(op, "eigenvectors", eigenvectors)
    tolerance = check_positive(op, "tolerance", tolerance)
    most = k if block_size is None else check_int(op, "block_size", block_size, 1, k)
    max_products = check_int(op, "max_products", max_products, min(-(-k // most) * most, size), 1 << 31)
    check_seed(op, seed)
    settings = {"k": k, "which": which, "tolerance": tolerance, "max_products": max_products, "block_size": most}
    with evaluating(objective, op, {**settings, "seed": seed}, progress, max_products) as at:
        space = _Krylov(size, at.home)
        draws = (as_vector(at.draw("gaussian", seed, sample), at.home) for sample in itertools.count())
        while True:
            space.grow(min(most, size - space.done), draws, at.hessian_product)
            if not math.isfinite(float(space.projected.abs().sum())):
                raise refuse(op, "objective", "a Hessian that is not finite", "a finite one")
            values, vectors = torch.linalg.eigh(space.projected)
            chosen = KEYS[which](values).argsort(stable=True)[:k]
            residuals = space.residuals(vectors[:, chosen])
            bound = tolerance * float(values.abs().max())
            converged = space.done >= k and bool((residuals <= bound).all())
            if converged or space.done == size or space.done + min(most, size - space.done) > max_products:
                break
        rows = space.combined(vectors[:, chosen]) if eigenvectors else ()
        found = [as_tensors(row, at.parameters) for row in rows] if eigenvectors else None
    if not converged:
        warn(
            f"{op}: after {space.done} products with the Hessian {int((residuals > bound).sum())} of {k} residuals are "
            f"above {tolerance:g} of the largest eigenvalue; raise max_products or tolerance."
        )
    return Spectrum(values[chosen], residuals, space.done, converged, found)


class _Krylov:
    """An orthonormal basis Q of random vectors and their products with H, and S = QᵀHQ, on the CPU.

    ``outside``: the last block's products without their parts in the span of Q, which the next block is made of.
    """

    def __init__(self, size: int, home: torch.device) -> None:
        self.done = 0
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.outside = torch.zeros(0, size, dtype=torch.float64, device=home)
        self._basis: list[Tensor] = []

    def grow(self, width: int, draws: Iterator[Tensor], product: Callable[[Tensor], Tensor]) -> None:
        """So many further vectors: of what is outside, and where that has come to its end of the draws."""
        largest = float(self.projected.abs().max()) if self.done else 0.0
        block = self.outside[:0]
        waiting = [(vector, LOST * largest) for vector in self.outside]
        while len(block) < width:
            vector, least = waiting.pop(0) if waiting else (next(draws), 0.0)
            for _ in range(2):  # the second time removes what rounding has left
                vector = _outside([*self._basis, block], vector[None])[0]
                length = float(vector.norm())
                if length <= least:
                    break
                vector, least = vector / length, 0.5
            else:
                block = torch.cat([block, vector[None]])
        self._basis.append(block)
        products = torch.stack([product(vector) for vector in block])
        columns = torch.cat([known @ products.T for known in self._basis]).cpu()
        above, own = columns[: self.done], columns[self.done :]
        self.projected = torch.cat([torch.cat([self.projected, above], 1), torch.cat([above.T, (own + own.T) / 2], 1)])
        self.outside = _outside(self._basis, products)
        self.done += width

    def residuals(self, vectors: Tensor) -> Tensor:
        """‖HQy − θQy‖ for eigenvectors y of S, in columns."""
        last = vectors[self.done - len(self.outside) :]
        found: Tensor = torch.linalg.vector_norm(last.T.to(self.outside.device) @ self.outside, dim=1)
        return found.cpu()

    def combined(self, vectors: Tensor) -> Tensor:
        """Q y in rows."""
        parts = torch.split(vectors.to(self.outside.device), [len(block) for block in self._basis])
        return functools.reduce(torch.add, (part.T @ block for part, block in zip(parts, self._basis, strict=True)))


def _outside(basis: Sequence[Tensor], vectors: Tensor) -> Tensor:
    """Vectors, in rows, without their parts in the span of an orthonormal basis."""
    for block in basis:
        vectors = vectors - (vectors @ block.T) @ block
    return vectors


def hessian_trace(
    objective: Objective,
    num_samples: int = 100,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> SampleMean:
    """The trace of the Hessian: the mean of vᵀHv over random signs v. One product with the Hessian for each sample.

    Args:
        objective: twice differentiable.
        num_samples: at least 1; the standard error needs 2. Default 100.
        seed: of the signs, 64 bits. Default 0.
        progress: called with (samples taken, num_samples) after each.

    Returns:
        A :class:`SampleMean`; its standard error is √(2 Σ_{i≠j} H_ij² / num_samples) in the mean.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source: M. Hutchinson, Communications in Statistics - Simulation and Computation 18, 1989.

    Example:
        >>> import torch
        >>> x = torch.zeros(3, requires_grad=True)
        >>> f = Objective.of_function(lambda: (torch.tensor([1.0, 4.0, 9.0]) * x.square()).sum(), [x])
        >>> hessian_trace(f, num_samples=3).mean
        28.0
    """
    op = "metrics.hessian_trace"
    num_samples = check_int(op, "num_samples", num_samples, 1, MAX_SAMPLES)
    check_seed(op, seed)
    with evaluating(objective, op, {"num_samples": num_samples, "seed": seed}, progress, num_samples) as at:
        found = []
        for sample in range(num_samples):
            signs = as_vector(at.draw("rademacher", seed, sample), at.home).sign()
            found.append(signs @ at.hessian_product(signs))
        return SampleMean.of(torch.stack(found))
