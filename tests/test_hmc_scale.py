"""The sampler hmc over dimensions: acceptance must not die with d, energies must not drown in rounding.

Laws: acceptance exactly 1 at delta = 0; above 0.8 at delta rho |g| = sqrt(d), whatever d; dH in float32 lanes within
1e-3 of float64 at four million elements, both priors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tsam_ext import TSAM

PRIORS = ["gaussian", "ball"]


def linear(d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Parameter, Callable[[], Tensor]]:
    """A parameter and a closure whose loss is linear, with a gradient of norm 1."""
    parameter = torch.nn.Parameter(torch.zeros(d, dtype=dtype))
    slope = torch.randn(d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope /= slope.norm()
    gradient = slope.to(dtype)

    def closure() -> Tensor:
        parameter.grad = gradient.clone()
        return torch.dot(parameter.detach().double(), slope)

    return parameter, closure


@pytest.mark.parametrize("d", [1, 7, 1000, 1_000_000])
def test_acceptance_is_exactly_one_without_a_lean(d: int) -> None:
    parameter, closure = linear(d)
    optimizer = TSAM([parameter], lr=0.0, sampler="hmc", delta=0.0, num_leapfrog_steps=3, seed=1)
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.diagnostics.energy_errors.tolist() == [0.0] * 3
        assert optimizer.diagnostics.acceptance_rate == 1.0


@pytest.mark.parametrize(("d", "steps"), [(100, 300), (10_000, 300), (1_000_000, 40)])
def test_acceptance_does_not_fall_with_the_dimension(d: int, steps: int) -> None:
    """δρ‖g‖ = √d, h = 1.5, N = 1: 0.86 to 0.89; 120 to 900 trajectories of one seed."""
    parameter, closure = linear(d)
    options = {"rho": 0.1, "delta": d**0.5 / 0.1, "tilt": 0.0, "step_size": 1.5, "adapt_step_size": False}
    optimizer = TSAM([parameter], lr=0.0, sampler="hmc", seed=1, **options)
    rates = []
    for _ in range(steps):
        optimizer.step(closure)
        rates.append(float(optimizer.diagnostics.acceptance_rate))
    assert 0.8 < sum(rates) / steps < 0.95


@pytest.mark.parametrize("prior", PRIORS)
def test_energy_of_four_million_elements_is_that_of_float64(prior: str) -> None:
    """Differences of kinetic energies in float32 lanes would be wrong in the first digit here."""
    energies = []
    for dtype in (torch.float32, torch.float64):
        parameter, closure = linear(4_000_000, dtype)
        options = {"num_samples": 2, "num_leapfrog_steps": 2, "step_size": 0.7, "prior": prior, "rho": 0.1}
        delta = 2e4
        optimizer = TSAM([parameter], lr=0.0, sampler="hmc", seed=1, delta=delta, tilt=0.0, **options)
        optimizer.step(closure)
        energies.append(optimizer.diagnostics.energy_errors)
    assert (energies[0] - energies[1]).abs().max() < 1e-3
    assert energies[1].abs().max() > 1e-2
