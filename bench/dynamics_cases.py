"""The differentiable moves in ``python -m bench ops``: leapfrog, kick, perturb, each on one tensor of all elements.

Out of place, as a sampler calls them: results are new memory in every way, so each call pays for its pages.
Invariant: as in op_cases.py, all ways of a case compute the same; perturb's noise has the same moments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsam_ext.functional import kick, leapfrog, perturb

from .op_check import Case, returned

STEP, INVERSE_MASS = 0.25, 1.5


def _pair(value: object) -> list[Tensor]:
    assert isinstance(value, tuple)
    return list(value)


def cases(elements: int, dtype: torch.dtype) -> list[Case]:
    """leapfrog, kick and perturb."""
    generator = torch.Generator().manual_seed(4)
    x, p, g = (torch.randn(elements, generator=generator).to(dtype) for _ in range(3))
    turns = iter(range(1 << 31))
    radius = math.sqrt(elements)  # one deviation of the noise is 1
    drawn: list[Tensor] = []

    def plain_leapfrog() -> tuple[Tensor, Tensor]:
        half = torch.add(p, g, alpha=0.5 * STEP)
        return torch.add(x, half, alpha=STEP * INVERSE_MASS), half

    def ours_perturb() -> Tensor:
        drawn[:] = [perturb(x, radius, 7, next(turns))]
        return drawn[0]

    def plain_perturb() -> Tensor:
        drawn[:] = [torch.randn_like(x).add_(x)]
        return drawn[0]

    def compiled_perturb() -> Tensor:
        drawn[:] = [torch.randn_like(x) + x]
        return drawn[0]

    def noise(_: object) -> list[Tensor]:
        """What the check of noise looks at: the result, and the start it came from."""
        return [drawn[0] if drawn else x, x]

    return [
        Case(
            "leapfrog",
            5,
            0,
            lambda: leapfrog(x, p, g, STEP, INVERSE_MASS),
            plain_leapfrog,
            None,
            plain_leapfrog,
            lambda: None,
            _pair,
        ),
        Case(
            "kick",
            3,
            0,
            lambda: kick(p, g, STEP),
            lambda: torch.add(p, g, alpha=STEP),
            None,
            lambda: torch.add(p, g, alpha=STEP),
            lambda: None,
            returned,
        ),
        Case("perturb", 2, 1, ours_perturb, plain_perturb, None, compiled_perturb, drawn.clear, noise, scale=1.0),
    ]
