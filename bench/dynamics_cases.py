"""The moves of a sampler in ``python -m bench ops``: leapfrog, kick, perturb, each on one tensor of all elements.

Out of place results are new memory in every way, so each call pays for its pages; leapfrog_ and kick_ own theirs.
Invariant: as in op_cases.py, all ways of a case compute the same; perturb's noise has the same moments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsam_ext.functional import kick, kick_, leapfrog, leapfrog_, perturb

from .op_check import Case, Way, returned

STEP, INVERSE_MASS = 0.25, 1.5


def _pair(value: object) -> list[Tensor]:
    assert isinstance(value, tuple)
    return list(value)


def cases(elements: int, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """leapfrog, kick and perturb, and the two in place."""
    generator = torch.Generator().manual_seed(4)
    x, p, g = (torch.randn(elements, generator=generator).to(device, dtype) for _ in range(3))
    turns = iter(range(1 << 31))
    radius = math.sqrt(elements)  # one deviation of the noise is 1
    drawn: list[Tensor] = []

    def plain_leapfrog() -> tuple[Tensor, Tensor]:
        half = torch.add(p, g, alpha=0.5 * STEP)
        return torch.add(x, half, alpha=STEP * INVERSE_MASS), half

    moved, half = x.clone(), p.clone()

    def plain_leapfrog_() -> None:
        half.add_(g, alpha=0.5 * STEP)
        moved.add_(half, alpha=STEP * INVERSE_MASS)

    def reset() -> None:
        moved.copy_(x)
        half.copy_(p)

    def in_place(name: str, words: int, ours: Way, plain: Way) -> Case:
        return Case(name, words, 0, ours, plain, None, plain, reset, lambda _: [moved, half])

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
        in_place("leapfrog_", 5, lambda: leapfrog_(moved, half, g, STEP, INVERSE_MASS), plain_leapfrog_),
        in_place("kick_", 3, lambda: kick_(half, g, STEP), lambda: half.add_(g, alpha=STEP)),
        Case("perturb", 2, 1, ours_perturb, plain_perturb, None, compiled_perturb, drawn.clear, noise, scale=1.0),
    ]
