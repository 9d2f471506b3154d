"""tsam(sampler="hmc") against the plain-torch chain, decision by decision.

The oracle draws the kernels' own normals, float32 numbers, so that what is left to differ is rounding; one test takes
the oracle's own. Before each step the oracle is set to the state that TSAM is in: reflections amplify differences.
A decision closer to its threshold than 1e-4 could fall either way: every test asserts that there is none.
Invariant: losses, weights, gradients, the chain, its step size and δ agree.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext import _C
from tsam_ext.engine.state import CHAIN_SLOTS, ChainSlot
from tsam_ext.functional import new_state
from tsam_ext.reference import PhiloxDraws, ReferenceTSAM
from tsam_ext.reference.noise import MOMENTUM, PERTURBATION

INF = math.inf
STEPS = 3
# float64: the largest difference seen over these tests is 5e-16 (gaussian) and 1e-12 (ball, whose reflections amplify
# a rounding by up to 1e4 a step); float32: 2e-7 and 1e-4. The oracle's noise is off by 2^-25.
TOLERANCE = {
    ("gaussian", torch.float64): 1e-13,
    ("ball", torch.float64): 1e-10,
    ("gaussian", torch.float32): 2e-6,
    ("ball", torch.float32): 5e-4,
}
# (tilt, delta): the same; a weight of its own; against each other; the worst sample; the heuristic.
TILTS: list[tuple[float, float | str | None]] = [(20.0, None), (60.0, 20.0), (-8.0, 40.0), (INF, 30.0), (0.0, "auto")]
CHAINS: list[dict[str, Any]] = [
    {"chain": "persistent", "burn_in": 0},
    {"chain": "persistent", "burn_in": 2},
    {"chain": "fresh", "burn_in": 1},
]


def grouped(task: Any) -> list[dict[str, Any]]:
    """Groups with settings of their own: a frozen parameter first, one unperturbed, one of another rho."""
    frozen = torch.nn.Parameter(torch.ones(3, dtype=task.x.dtype), requires_grad=False)
    w1, b1, w2, b2 = task.parameters
    return [
        {"params": [frozen, w1]},
        {"params": [b1], "rho": 0.0},
        {"params": [w2], "rho": 0.7},
        {"params": [b2], "adaptive": True},
    ]


class KernelDraws(PhiloxDraws):
    """The documented scheme with the normals as the kernels compute them."""

    def normal(self, purpose: int, sample: int) -> list[Tensor]:
        lists = [[torch.zeros_like(t, dtype=torch.float64) for t in self.like] for _ in range(7)]
        n, seed = len(self.like), self.seed - (1 << 64) if self.seed >= 1 << 63 else self.seed
        flags, base, state = [False] * n, list(self.offsets), new_state(0, torch.device("cpu"))
        if purpose == PERTURBATION:  # at position 0, radius 1 and dimension 1 θ is z itself
            where = (seed, self.step, sample, 0, 1, False, True)
            _C.perturb_(lists[0], lists[1], state, [1.0] * n, flags, base, *where)
            return lists[0]
        assert purpose == MOMENTUM
        chain = torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
        chain[ChainSlot.LOG_STEP] = -INF  # no time to drift in, no gradient to kick by
        _C.hmc_leapfrog_(*lists, chain, [1.0] * n, flags, base, seed, self.step, sample, 1, 0, True, 0.5, 1.0, False)
        return lists[2]


class Pair:
    """A TSAM and a reference on twin problems; ``step`` moves both and compares all that can be read."""

    def __init__(
        self,
        problem: Any,
        groups: bool = False,
        dtype: torch.dtype = torch.float64,
        own_noise: bool = False,
        **options: Any,
    ) -> None:
        self.tasks = [problem(dtype=dtype), problem(dtype=dtype)]
        settings = {"lr": 0.1, "momentum": 0.9, "sampler": "hmc", "rho": 0.5, "num_samples": 3, **options}
        params = [grouped(task) if groups else task.parameters for task in self.tasks]
        self.ours, self.oracle = tsam(params[0], **settings), ReferenceTSAM(params[1], **settings)
        philox = self.oracle._draws
        if not own_noise:
            self.oracle._draws = lambda moved: KernelDraws(**vars(philox(moved)))
        self.tolerance = TOLERANCE[options.get("prior", "gaussian"), torch.float32 if own_noise else dtype]
        self.accepted: list[bool] = []

    def close(self, actual: Any, expected: Any, amplified: float = 1.0) -> None:
        tolerance = self.tolerance * amplified
        expected = torch.as_tensor(expected, dtype=actual.dtype)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    def step(self) -> None:
        ours, theirs = self.tasks
        losses = ours.train(self.ours, 1), theirs.train(self.oracle, 1)
        chain, seen = self.oracle.chain, self.ours.diagnostics
        for trajectory in chain.trajectories:
            assert abs(trajectory.log_uniform + trajectory.energy) > 1e-4  # else: another seed
            self.accepted.append(trajectory.accepted)
        assert ours.calls == theirs.calls
        delta = 1.0 + abs(chain.delta)
        self.close(torch.tensor(losses[0]), losses[1])
        self.close(seen.delta, chain.delta, delta)
        self.close(seen.losses, self.oracle.losses)
        # A loss that is wrong by ε moves ΔH by δ ε and the exponent of a weight by (t - δ) ε.
        energies = [t.energy for t in chain.trajectories[chain.burn_in :]]
        self.close(seen.energy_errors, energies, delta)
        tilt = self.oracle.tilt
        tilt = 0.0 if callable(tilt) or math.isinf(tilt) else tilt
        self.close(seen.weights, self.oracle.weights, delta + abs(tilt))
        self.close(seen.ess, self.oracle.ess, delta + abs(tilt))
        self.close(seen.acceptance_rate, chain.acceptance, delta)
        self.close(seen.step_size, math.exp(chain.log_step), 0.05 * delta)
        self.close(ours.gradient(), theirs.gradient(), delta + abs(tilt))
        self.close(ours.flat(), theirs.flat(), delta + abs(tilt))
        for mine, expected in zip(self.ours.chain_position(), self.oracle.chain_position(), strict=True):
            self.close(mine, expected.to(mine.dtype))
        self.synchronise()

    def synchronise(self) -> None:
        """The next step begins at the same state for both, so that no difference grows from step to step."""
        with torch.no_grad():
            for mine, twin in zip(self.tasks[0].parameters, self.tasks[1].parameters, strict=True):
                twin.copy_(mine)
                if twin in self.oracle._positions:
                    self.oracle._positions[twin] = self.ours._progress.sampler_state.position(mine).double()


@pytest.mark.parametrize("num_leapfrog_steps", [1, 3])
@pytest.mark.parametrize("prior", ["gaussian", "ball"])
@pytest.mark.parametrize(("tilt", "delta"), TILTS)
def test_tsam_is_the_reference(problem, tilt: float, delta: Any, prior: str, num_leapfrog_steps: int) -> None:
    accepted: list[bool] = []
    for k, (adaptive, groups, chain) in enumerate(itertools.product((False, True), (False, True), CHAINS)):
        options = {"tilt": tilt, "delta": delta, "prior": prior, "num_leapfrog_steps": num_leapfrog_steps}
        pair = Pair(problem, groups, adaptive=adaptive, seed=(k << 32) + 12, num_samples=2, **options, **chain)
        for _ in range(STEPS):
            pair.step()
        accepted += pair.accepted
    assert {True, False} <= set(accepted)


@pytest.mark.parametrize("prior", ["gaussian", "ball"])
def test_settings_of_the_chain(problem, prior: str) -> None:
    """What the product above leaves at its default: step size, adaptation, every, Metropolis, samples, delta_scale."""
    for options in (
        {"metropolis": False, "delta": 60.0, "num_leapfrog_steps": 2, "burn_in": 1},
        {"metropolis": False, "delta": -60.0, "chain": "fresh", "adaptive": True},
        {"step_size": 0.4, "adapt_step_size": False, "delta": 60.0, "num_samples": 5},
        {"step_size": 2.5, "delta": 15.0, "num_leapfrog_steps": 2},
        {"every": 2, "delta": "auto", "delta_scale": 2.5},
        {"num_samples": 1, "tilt": lambda step: 10.0 * step},
        {"delta": 0.0, "tilt": INF},
        {"recycle": True, "num_leapfrog_steps": 3, "delta": 60.0, "tilt": 70.0, "burn_in": 1},
        {"recycle": True, "num_leapfrog_steps": 2, "delta": 30.0, "tilt": INF, "num_samples": 3},
        {"recycle": True, "num_leapfrog_steps": 1, "delta": 90.0, "tilt": 60.0, "num_samples": 4},
        {"recycle": True, "metropolis": False, "num_leapfrog_steps": 2, "delta": 60.0, "adaptive": True},
    ):
        pair = Pair(problem, seed=5, prior=prior, **{"tilt": 3.0, **options})
        for step in range(2 * STEPS):
            if step % options.get("every", 1):
                for task, optimizer in zip(pair.tasks, (pair.ours, pair.oracle), strict=True):
                    task.train(optimizer, 1)
            else:
                pair.step()
        if options.get("metropolis") is False:
            assert all(pair.accepted)


@pytest.mark.parametrize("prior", ["gaussian", "ball"])
@pytest.mark.parametrize("own_noise", [False, True])
@pytest.mark.parametrize("num_leapfrog_steps", [1, 3])
def test_float32_parameters_and_noise_of_the_oracle_s_own(
    problem, prior: str, own_noise: bool, num_leapfrog_steps: int
) -> None:
    dtype = torch.float64 if own_noise else torch.float32
    for seed in (4, 9):
        options = {"delta": 5.0, "tilt": 8.0, "prior": prior, "num_leapfrog_steps": num_leapfrog_steps}
        pair = Pair(problem, True, dtype, own_noise, seed=seed, **options)
        for _ in range(STEPS):
            pair.step()


def test_a_parameter_without_a_gradient_drifts(problem) -> None:
    """Its q is zero, its prior is not: it moves, is restored and keeps p.grad None."""
    task_a, task_b = problem(), problem()
    positions: list[list[Tensor]] = []
    for task, kind in ((task_a, tsam), (task_b, ReferenceTSAM)):
        unused = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        optimizer = kind([*task.parameters, unused], lr=0.1, sampler="hmc", rho=0.5, tilt=9.0, seed=8, num_samples=3)
        seen: list[Tensor] = []

        def closure(task: Any = task, unused: Tensor = unused, seen: list[Tensor] = seen) -> Tensor:
            seen.append(unused.detach().clone())
            loss = task.loss()
            loss.backward()
            return loss

        for _ in range(STEPS):
            optimizer.step(closure)
        assert unused.grad is None
        assert torch.equal(unused, torch.ones_like(unused))
        assert len({tuple(u.tolist()) for u in seen}) > STEPS
        positions.append([*seen, *optimizer.chain_position()])
    torch.testing.assert_close(positions[0], positions[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prior", ["gaussian", "ball"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_energies_of_gradients_that_float32_cannot_square(prior: str, size: float) -> None:
    """δ makes up for their size: energies in float32 lanes are those in float64, and none of them is zero."""
    slope = torch.randn(3000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * size
    energies = []
    for dtype in (torch.float32, torch.float64):
        parameter = torch.nn.Parameter(torch.zeros(3000, dtype=dtype))
        options = {"delta": 5.0 / size, "num_samples": 2, "num_leapfrog_steps": 2, "step_size": 0.5, "tilt": 0.0}
        optimizer = tsam([parameter], lr=0.0, rho=1.0, seed=1, sampler="hmc", prior=prior, **options)

        def closure(parameter: Tensor = parameter) -> Tensor:
            parameter.grad = slope.to(parameter.dtype)
            return torch.dot(parameter.detach().double(), slope)

        optimizer.step(closure)
        energies.append(optimizer.diagnostics.energy_errors)
    torch.testing.assert_close(energies[0], energies[1], rtol=1e-4, atol=1e-3)
    assert (energies[1].abs() > 1e-2).all()
