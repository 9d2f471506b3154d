"""The sampler hmc over dimensions: acceptance must not die with d, energies must not drown in rounding.

Laws: acceptance exactly 1 at delta = 0; above 0.8 at delta rho |g| = sqrt(d), whatever d; dH in float32 lanes that of
float64 at four million elements, both priors; a hit of the wall costs what the formula for a linear loss says.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext import _C
from tsam_ext.engine.state import CHAIN_SLOTS, ChainSlot
from tsam_ext.functional import new_state

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
    optimizer = tsam([parameter], lr=0.0, sampler="hmc", delta=0.0, num_leapfrog_steps=3, seed=1)
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.diagnostics.energy_errors.tolist() == [0.0] * 3
        assert optimizer.diagnostics.acceptance_rate == 1.0


LONG = pytest.param(1_000_000, 40, marks=pytest.mark.host_only("16 s, and the energies below say the same of a pass"))


@pytest.mark.parametrize(("d", "steps"), [(100, 300), (10_000, 300), LONG])
def test_acceptance_does_not_fall_with_the_dimension(d: int, steps: int) -> None:
    """δρ‖g‖ = √d, h = 1.5, N = 1: 0.86 to 0.89; 120 to 900 trajectories of one seed."""
    parameter, closure = linear(d)
    options = {"rho": 0.1, "delta": d**0.5 / 0.1, "tilt": 0.0, "step_size": 1.5, "adapt_step_size": False}
    optimizer = tsam([parameter], lr=0.0, sampler="hmc", seed=1, **options)
    rates = []
    for _ in range(steps):
        optimizer.step(closure)
        rates.append(float(optimizer.diagnostics.acceptance_rate))
    assert 0.8 < sum(rates) / steps < 0.95


@pytest.mark.parametrize(("prior", "tolerance"), [("gaussian", 1e-5), ("ball", 3e-3)])
def test_energy_of_four_million_elements_is_that_of_float64(prior: str, tolerance: float) -> None:
    """Differences of kinetic energies in float32 lanes would be wrong in the first digit here.

    Seen over three seeds: gaussian 2e-7; ball 1.4e-3, where a rounded position meets a wall 1e-7 away and each of some
    hundred reflections hands that on (a drift applied in float64 and rounded once: 0.9e-3).
    """
    energies = []
    for dtype in (torch.float32, torch.float64):
        parameter, closure = linear(4_000_000, dtype)
        options = {"num_samples": 2, "num_leapfrog_steps": 2, "step_size": 0.7, "prior": prior, "rho": 0.1}
        delta = 2e4
        optimizer = tsam([parameter], lr=0.0, sampler="hmc", seed=1, delta=delta, tilt=0.0, **options)
        optimizer.step(closure)
        energies.append(optimizer.diagnostics.energy_errors)
    assert (energies[0] - energies[1]).abs().max() < tolerance
    assert energies[1].abs().max() > 1e-2


def test_energy_error_of_one_hit_is_the_formula_s() -> None:
    """A linear loss in the ball: 2δ (h/2 − τ)(v·n)(q·n) for a trajectory of one reflection, 0 for one of none."""
    d, delta, step = 5, 3.0, 0.9
    h = step / d**0.5
    slope = torch.tensor([0.5, -1.0, 0.3, 0.8, -0.2], dtype=torch.float64)
    start = torch.tensor([0.3, 0.5, -0.4, 0.2, 0.45], dtype=torch.float64)
    seen = set()

    def trajectory(seed: int, length: float, kick: float) -> tuple[Tensor, Tensor, Tensor]:
        """Momentum and position after the drift, and the chain's scalars."""
        chain, state = torch.zeros(CHAIN_SLOTS, dtype=torch.float64), new_state(1)
        chain[ChainSlot.LOG_STEP], chain[ChainSlot.DELTA] = torch.tensor(length, dtype=torch.float64).log(), delta
        position, saved, momentum, proposal, spare = (torch.zeros(d, dtype=torch.float64) for _ in range(5))
        lists = [[position], [saved], [momentum], [start.clone()], [proposal], [spare], [slope]]
        _C.hmc_leapfrog_(*lists, chain, [1.0], [False], [0], seed, 0, 0, d, 1, kick, 1.0, True, True)
        loss = torch.dot(slope, proposal - start)
        _C.hmc_end_([saved], [momentum], [slope], chain, state, loss, [1.0], [False], seed, 0, 0, d, 1, kick, 0, True,
                    False, True)  # fmt: skip
        return momentum, proposal, chain

    for seed in range(60):
        drawn, _, _ = trajectory(seed, 0.0, 0.0)
        v = drawn + 0.5 * delta * h * slope
        _, _, chain = trajectory(seed, step, 0.5)
        hits = int(chain[ChainSlot.REFLECTIONS])
        seen.add(hits)
        if hits > 1:
            continue
        a, b, c = v.dot(v), start.dot(v), start.dot(start) - 1
        tau = float((-b + (b * b - a * c).sqrt()) / a)
        assert (tau < h) is (hits == 1)
        n = start + tau * v
        want = 2 * delta * (h / 2 - tau) * float(v.dot(n) * slope.dot(n)) if hits else 0.0
        assert float(chain[ChainSlot.ENERGY]) == pytest.approx(want, rel=1e-11, abs=1e-13)
    assert {0, 1} <= seen
