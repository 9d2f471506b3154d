"""The ops of a carried direction in ``python -m bench ops``: lists of the network's sizes, in place.

Of A in the list's dtype and G, g and v in float32, as a step has them. Invariant: as in op_cases.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsam_ext import _ops
from tsam_ext.engine.state import DIRECTION_SLOTS

from .op_check import Case


def _dots(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)]).sum()


def cases(tilted: list[Tensor]) -> list[Case]:
    """take_direction_ and add_direction_; ``tilted``: A."""
    generator = torch.Generator().manual_seed(5)
    start, carried = ([torch.randn(a.shape, generator=generator).to(a.device) for a in tilted] for _ in range(2))
    into = [x.clone() for x in start]
    direction = torch.zeros(DIRECTION_SLOTS, dtype=torch.float64, device=tilted[0].device)

    def coefficients() -> tuple[Tensor, Tensor]:
        wide = [a.float() for a in tilted]
        squares = _dots(into, into)
        return -_dots(wide, into) / squares / squares.sqrt(), 1.0 / squares.sqrt()

    def plain_take() -> None:
        keep, add = map(float, coefficients())
        for g, a in zip(into, tilted, strict=True):
            g.mul_(keep).add_(a, alpha=add)

    def compiled_take() -> None:
        keep, add = coefficients()
        for g, a in zip(into, tilted, strict=True):
            g.copy_(keep * g + add * a)

    def plain_add() -> None:
        norm = float(_dots(into, into).sqrt())
        for g, v in zip(into, carried, strict=True):
            g.add_(v, alpha=norm)

    def foreach_add() -> None:
        norm = float(torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(into)))))
        torch._foreach_add_(into, carried, alpha=norm)

    def compiled_add() -> None:
        norm = _dots(into, into).sqrt()
        for g, v in zip(into, carried, strict=True):
            g.copy_(g + norm * v)

    def reset() -> None:
        torch._foreach_copy_(into, start)

    def take() -> None:
        _ops.take_direction_(into, tilted, direction)

    def add() -> None:
        _ops.add_direction_(into, carried, direction)

    return [
        Case("take_direction_", 5, 0, take, plain_take, None, compiled_take, reset, lambda _: into, wide=3),
        Case("add_direction_", 4, 0, add, plain_add, foreach_add, compiled_add, reset, lambda _: into, wide=4),
    ]
