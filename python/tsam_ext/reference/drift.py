"""The drifts of Hamiltonian Monte Carlo: the exact flow of prior and kinetic energy, without the loss.

Gaussian prior: every (x, p) turns by the angle h. Ball: the point moves on a straight line and is
reflected, v <- v - 2 (v·n) n, wherever ‖u‖ = 1; here one hit after another. Position and momentum
are lists of tensors, one vector each; norms and dot products are over the whole list, in float64.
Invariant: reversible, volume preserving; ‖x‖² + ‖p‖², or ‖v‖ and ‖u‖ ≤ 1, are conserved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

# Sine of the angle to the wall below which hits are no longer counted: the point slides along it.
GRAZING = 1e-14


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The dot product over two lists."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def _combine(a: float, left: Sequence[Tensor], b: float, right: Sequence[Tensor]) -> list[Tensor]:
    """a left + b right, tensor by tensor, in float64."""
    return [a * x.double() + b * y.double() for x, y in zip(left, right, strict=True)]


def _restore(values: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [value.to(old.dtype) for value, old in zip(values, like, strict=True)]


def rotation_drift(
    position: Sequence[Tensor], momentum: Sequence[Tensor], h: float
) -> tuple[list[Tensor], list[Tensor]]:
    """x cos h + p sin h and p cos h - x sin h, in the dtypes of ``position`` and ``momentum``."""
    cosine, sine = math.cos(h), math.sin(h)
    x = _combine(cosine, position, sine, momentum)
    p = _combine(cosine, momentum, -sine, position)
    return _restore(x, position), _restore(p, momentum)


def ball_drift(position: Sequence[Tensor], momentum: Sequence[Tensor], h: float) -> tuple[list[Tensor], list[Tensor]]:
    """The straight line from ``position`` for the time h, reflected at ‖u‖ = 1, hit by hit.

    Args:
        position: u with ‖u‖ ≤ 1; beyond it by rounding counts as on the wall.
        momentum: v.
        h: the time, not negative.

    Returns:
        The new position and momentum, in the dtypes of the old.
    """
    u, v = list(position), list(momentum)
    square = dot(v, v)
    while square > 0.0:
        uv, gap = dot(u, v), min(dot(u, u) - 1.0, 0.0)
        normal_speed = math.sqrt(uv * uv - square * gap)
        until_hit = -gap / (uv + normal_speed) if uv > 0.0 else (normal_speed - uv) / square
        if until_hit >= h:
            break
        h -= until_hit
        u = _combine(1.0, u, until_hit, v)
        if normal_speed < GRAZING * math.sqrt(square):
            speed = math.sqrt(square)
            u, v = (
                _combine(math.cos(h * speed), u, math.sin(h * speed) / speed, v),
                _combine(math.cos(h * speed), v, -math.sin(h * speed) * speed, u),
            )
            h = 0.0
            break
        v = _combine(1.0, v, -2.0 * dot(u, v) / dot(u, u), u)
    return _restore(_combine(1.0, u, h, v), position), _restore(_combine(1.0, v, 0.0, v), momentum)
