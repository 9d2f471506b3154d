"""TSAM with the sampler hmc and its defaults draws from prior(ε) e^(δ L(θ+ε)): the closure's loss is the density.

θ stays (lr=0), so the chain goes on from step to step on one density; its states are read after each step.
chain_laws.py holds the densities, their exact laws and the statistics; a right sampler fails once in a million.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chain_laws import DoubleWell, Quadratic, steps_on
from torch import Tensor

DENSITIES: dict[str, type[Quadratic] | type[DoubleWell]] = {"quadratic": Quadratic, "double well": DoubleWell}
STEPS = 20_000


def run(density: Quadratic | DoubleWell, steps: int, **options: Any) -> Tensor:
    """The chain's state after each step, float64, shape [steps, d]."""
    return torch.stack([optimizer.chain_position()[0] for optimizer, _ in steps_on(density, steps, **options)])


@pytest.mark.parametrize(
    ("name", "delta", "steps"),
    [("quadratic", -2.0, STEPS), ("quadratic", 0.5, STEPS), ("quadratic", 1.2, STEPS),
     ("double well", 0.5, STEPS), ("double well", 2.0, STEPS), ("double well", 6.0, 2 * STEPS)],
)  # fmt: skip
def test_draws_are_from_the_density(name: str, delta: float, steps: int) -> None:
    density = DENSITIES[name](delta)
    assert density.worst(run(density, steps, seed=11)) < 1.0


@pytest.mark.parametrize(("name", "delta"), [("quadratic", 1.2), ("double well", 6.0)])
def test_without_the_accept_test_they_are_not(name: str, delta: float) -> None:
    density = DENSITIES[name](delta)
    assert density.worst(run(density, STEPS, seed=11, metropolis=False, adapt_step_size=False)) > 1.5


def test_a_fresh_chain_of_three_is_biased_towards_the_prior() -> None:
    """The mean loss of the samples goes 29% of the way from the prior's to the density's (seen: 0.294)."""
    density = DoubleWell(6.0)
    at_prior = float(DoubleWell(0.0).loss(DoubleWell(0.0).exact).mean())
    exact = float(density.loss(density.exact).mean())
    steps = steps_on(density, 4000, num_samples=3, chain="fresh", seed=5)
    losses = [float(optimizer.diagnostics.losses.mean()) for optimizer, _ in steps]
    share = (sum(losses) / len(losses) - at_prior) / (exact - at_prior)
    assert 0.2 < share < 0.4, share
