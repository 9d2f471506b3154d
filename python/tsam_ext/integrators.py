"""Splitting integrators of Hamiltonian dynamics, as lists of coefficients.

A list (kick, drift, kick, ..., kick) is one step: momentum += kick h ∇ log density, position += drift h M⁻¹ momentum.
Invariant: kicks add up to 1 and so do drifts, and a list reads the same backwards; so a step is reversible, which the
accept test relies on, and of even order. A list of 2k + 1 coefficients costs k gradients per step.
"""

from __future__ import annotations

from collections.abc import Sequence

LEAPFROG: tuple[float, ...] = (0.5, 1.0, 0.5)
"""Leapfrog, also velocity Verlet: order 2, one gradient per step. R. Neal, 2011 (arXiv 1206.1901), section 2.3."""

_LAMBDA = 0.1931833275037836
MCLACHLAN: tuple[float, ...] = (_LAMBDA, 0.5, 1.0 - 2.0 * _LAMBDA, 0.5, _LAMBDA)
"""The two-stage minimum-norm integrator: order 2 with the smallest error term, two gradients per step.

R. McLachlan, "On the numerical integration of ordinary differential equations by symmetric composition methods", SIAM
J. Sci. Comput. 16, 1995; T. Takaishi, P. de Forcrand, 2006 (arXiv hep-lat/0505020).
"""


def substeps(integrator: Sequence[float], steps: int) -> tuple[list[tuple[float, float]], float]:
    """The (kick, drift) pairs of a trajectory, one per gradient, and the kick that ends it.

    Where two steps meet, the last kick of one and the first of the next are by the same gradient and become one.

    Example:
        >>> substeps(LEAPFROG, 3)
        ([(0.5, 1.0), (1.0, 1.0), (1.0, 1.0)], 0.5)
    """
    kicks, drifts = integrator[0::2], integrator[1::2]
    one = list(zip(kicks, drifts, strict=False))
    again = [(kicks[-1] + kicks[0], drifts[0]), *one[1:]]
    return [*one, *again * (steps - 1)], kicks[-1]
