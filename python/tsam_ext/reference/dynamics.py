"""The moves of a sampler in plain torch: leapfrog, kick, perturb.

leapfrog p' = p + (h/2) g, x' = x + h m⁻¹ p'; kick p' = p + a g; perturb x' = x + r ν.
Differentiable by ordinary autograd; numbers may be tensors that broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import unit_noise


def leapfrog(
    position: Tensor,
    momentum: Tensor,
    grad_log_density: Tensor,
    step_size: Tensor | float,
    inverse_mass: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Half a kick, then a drift; the new position and the momentum half a step on."""
    momentum = momentum + 0.5 * step_size * grad_log_density
    return position + step_size * inverse_mass * momentum, momentum


def kick(momentum: Tensor, grad_log_density: Tensor, a: Tensor | float) -> Tensor:
    """momentum + a * grad_log_density."""
    return momentum + a * grad_log_density


def perturb(x: Tensor, radius: Tensor | float, seed: int, draw: int, base: int = 0, kind: str = "gaussian") -> Tensor:
    """x + radius ν, the noise of step ``draw >> 28`` and sample ``draw & (2²⁸ - 1)``."""
    step, sample = draw >> 28, draw & ((1 << 28) - 1)
    (noise,) = unit_noise([x.detach()], [base], seed=seed, step=step, sample=sample, noise=kind)
    radius = radius.double() if isinstance(radius, torch.Tensor) else radius
    return (x.double() + radius * noise).to(x.dtype)
