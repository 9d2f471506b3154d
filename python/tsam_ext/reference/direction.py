"""The direction that is carried between full steps, in float64 over flat gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def take_direction(plain: Tensor, tilted: Tensor) -> Tensor:
    """v = (A - (A.G / G.G) G) / |G|, G the mean first gradient and A the tilted one; 0 where nothing is carried."""
    g, a = plain.double(), tilted.double()
    norm, c = g.norm(), (a @ g) / (g @ g)
    v = a - c * g
    carries = bool(norm > 0 and v.norm() > 1e-6 * a.norm() and a.isfinite().all() and g.isfinite().all())
    return v / norm if carries else torch.zeros_like(g)


def add_direction(grad: Tensor, direction: Tensor) -> Tensor:
    """g + |g| v."""
    g, v = grad.double(), direction.double()
    return torch.add(g, g.norm() * v)
