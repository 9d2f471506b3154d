"""The plain-torch Hamiltonian chain against laws from outside: known densities, exact limits, orders of error.

Nothing compiled is used here. The densities and the false-alarm rate of 1e-6 are in chain_laws.py.
Invariant: reversible, δ = 0 is always accepted, the error of the energy is of order h² where nothing reflects.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from chain_laws import DoubleWell, Quadratic
from torch import Tensor

from tsam_ext.reference import (
    ChainState,
    HamiltonianChain,
    PhiloxDraws,
    TorchDraws,
    integrate,
    leapfrog_coefficients,
    normal,
    scaled_loss,
    uniform,
)
from tsam_ext.reference.noise import ACCEPT, BALL_RADIUS, MOMENTUM, PERTURBATION


def split(law: Any) -> tuple[Any, list[Tensor]]:
    """The law's loss of a list of two tensors, and the list's shapes."""
    like = [torch.zeros(1, dtype=torch.float64), torch.zeros(law.dimension - 1, dtype=torch.float64)]
    unit = law.dimension**-0.5 if law.prior == "gaussian" else 1.0
    return scaled_loss(lambda eps: law.loss(torch.cat(eps)), [law.rho * unit] * 2), like


def torch_draws(like: list[Tensor], seed: int = 0) -> TorchDraws:
    return TorchDraws(like, {torch.device("cpu"): torch.Generator().manual_seed(seed)})


def draws(law: Any, count: int, **options: Any) -> tuple[Tensor, HamiltonianChain]:
    """The perturbations of one long step after 200 short ones that find the step size."""
    evaluate, like = split(law)
    source, chain = torch_draws(like), HamiltonianChain(delta=law.delta, prior=law.prior, **options)
    for _ in range(200):
        list(chain.sample(chain.start(evaluate, source), evaluate, source, 2))
    states = chain.sample(chain.start(evaluate, source), evaluate, source, count)
    found = torch.stack([torch.cat(state.position) for state, _ in states])
    return law.rho * chain.unit(law.dimension) * found, chain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "delta", "num_leapfrog_steps"),
    [(Quadratic, -1.0, 1), (Quadratic, 1.0, 2), (DoubleWell, -1.0, 2), (DoubleWell, 2.0, 1)],
)
def test_the_chain_has_the_law(kind: Any, delta: float, num_leapfrog_steps: int) -> None:
    law = kind(delta)
    found, chain = draws(law, 15_000, num_leapfrog_steps=num_leapfrog_steps)
    assert 0.7 < chain.acceptance < 0.995  # else the accept test was not tried
    assert law.worst(found) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Quadratic, DoubleWell])
def test_without_metropolis_it_has_not(kind: Any) -> None:
    law = kind(-1.0)
    found, chain = draws(law, 15_000, metropolis=False)
    assert all(t.accepted for t in chain.trajectories)
    assert law.worst(found) > 1.5


@pytest.mark.parametrize("prior", ["gaussian", "ball"])
def test_without_a_tilt_every_trajectory_is_accepted(prior: str) -> None:
    law = DoubleWell(0.0, draws=10)
    evaluate, like = split(law)
    chain, source = HamiltonianChain(prior=prior, num_leapfrog_steps=3, step_size=2.0), torch_draws(like)
    list(chain.sample(chain.start(evaluate, source), evaluate, source, 300))
    assert chain.acceptance == 1.0
    assert all(t.energy == 0.0 and t.accepted for t in chain.trajectories)


@pytest.mark.parametrize("kind", [Quadratic, DoubleWell])
def test_trajectories_are_reversible(kind: Any) -> None:
    law = kind(1.0)
    evaluate, like = split(law)
    source = torch_draws(like)
    how = {"coefficients": leapfrog_coefficients(5), "prior": law.prior, "delta": law.delta, "h": 0.3}
    for _ in range(50):
        start = evaluate([0.3 * x.clamp(-2, 2) for x in source.normal(PERTURBATION, 0)])
        momentum = source.normal(MOMENTUM, 0)
        end, p, energy = integrate(evaluate, start, momentum, **how)
        back, p, minus = integrate(evaluate, end, [-v for v in p], **how)
        torch.testing.assert_close(back.position, start.position, rtol=0, atol=1e-9)
        torch.testing.assert_close([-v for v in p], momentum, rtol=0, atol=1e-8)
        assert energy + minus == pytest.approx(0.0, abs=1e-8)


def hamiltonian(law: Quadratic, state: ChainState, momentum: list[Tensor]) -> float:
    """-δL + ½‖x‖² + ½‖p‖², as an absolute number."""
    squares = sum(float(v.square().sum()) for v in (*state.position, *momentum))
    return 0.5 * squares - law.delta * state.loss


def test_the_energy_is_the_hamiltonian_s_and_its_error_of_second_order() -> None:
    law = Quadratic(1.2)
    evaluate, like = split(law)
    source = torch_draws(like)
    starts = [(evaluate(source.normal(PERTURBATION, 0)), source.normal(MOMENTUM, 0)) for _ in range(20)]
    errors = []
    for steps in (10, 20, 40, 80):
        errors.append([])
        for start, momentum in starts:
            how = {"coefficients": leapfrog_coefficients(steps), "delta": law.delta, "h": 1.5 / steps}
            end, p, energy = integrate(evaluate, start, momentum, prior="gaussian", **how)
            difference = hamiltonian(law, end, p) - hamiltonian(law, start, momentum)
            assert energy == pytest.approx(difference, abs=1e-12)
            errors[-1].append(abs(energy))
    sizes = torch.tensor(errors, dtype=torch.float64).mean(1)
    torch.testing.assert_close(sizes[:-1] / sizes[1:], torch.full((3,), 4.0, dtype=torch.float64), rtol=0.03, atol=0)


def test_one_trajectory_by_hand() -> None:
    """N = 1 in one dimension, each number written out, with the documented noise."""
    like, seed, step, delta = [torch.zeros(1, dtype=torch.float64)], 5, 7, 4.0
    evaluate = scaled_loss(lambda eps: 0.5 * (eps[0] - 0.3).square().sum(), [0.8])
    chain = HamiltonianChain(delta=delta, burn_in=1, step_size=0.9)
    source = PhiloxDraws(like, [4], seed, step)
    states = [state for state, _ in chain.sample(chain.start(evaluate, source), evaluate, source, 11)]
    x = float(normal(1, 4, seed, step, 0, PERTURBATION))
    h, expected, probabilities = 0.9, [], []
    for m in range(12):
        p = float(normal(1, 4, seed, step, m, MOMENTUM))
        loss, q = 0.5 * (0.8 * x - 0.3) ** 2, 0.8 * (0.8 * x - 0.3)
        half = p + 0.5 * delta * h * q
        y, turned = x * math.cos(h) + half * math.sin(h), half * math.cos(h) - x * math.sin(h)
        new_loss, new_q = 0.5 * (0.8 * y - 0.3) ** 2, 0.8 * (0.8 * y - 0.3)
        end = turned + 0.5 * delta * h * new_q
        energy = 0.5 * (y * y + end * end - x * x - p * p) - delta * (new_loss - loss)
        probabilities.append(min(1.0, math.exp(-energy)))
        accepted = math.log(uniform(seed, step, m, ACCEPT)) < -energy
        assert chain.trajectories[m].energy == pytest.approx(energy, abs=1e-12)
        assert chain.trajectories[m].accepted is accepted
        x = y if accepted else x
        expected.append(x)
    assert {t.accepted for t in chain.trajectories} == {True, False}
    assert [float(state.position[0]) for state in states] == pytest.approx(expected[1:], abs=1e-12)
    assert chain.position is not None
    assert float(chain.position[0]) == pytest.approx(x, abs=1e-12)
    step_size = math.log(0.9) + 0.05 * (sum(probabilities) / 12 - 0.8)
    assert chain.log_step == pytest.approx(step_size, abs=1e-12)


def test_start_delta_and_step_size() -> None:
    like = [torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    evaluate = scaled_loss(lambda eps: 3.0 * eps[0].sum() + 0.0 * eps[1].sum(), [2.0, 1.0])
    source = PhiloxDraws(like, [0, 4], 1, 2)
    chain = HamiltonianChain(prior="ball", delta="auto", delta_scale=3.0, chain="fresh", num_leapfrog_steps=2)
    state = chain.start(evaluate, source)
    radius = math.sqrt(sum(float(x.square().sum()) for x in state.position))
    assert radius == pytest.approx(uniform(1, 2, 0, BALL_RADIUS) ** (1 / 5), rel=1e-12)
    assert chain.delta == pytest.approx(3.0 * math.sqrt(5) / (6 * math.sqrt(3)), rel=1e-12)
    # With the gaussian prior a scale is T/√d and the rule still asks for |T g|. The norm is a mean over 20 steps.
    scaled, mean = HamiltonianChain(delta="auto"), 0.0
    for k in range(25):
        slope = scaled_loss(lambda eps, k=k: (1.0 + k) * eps[0].sum() + 0.0 * eps[1].sum(), [2.0 / math.sqrt(5), 1.0])
        scaled.start(slope, source)
        mean += (2 * (1.0 + k) * math.sqrt(3) - mean) / min(k + 1, 20)
        assert scaled.delta == pytest.approx(math.sqrt(5) / mean, rel=1e-12)
    follower = HamiltonianChain()
    follower.start(evaluate, source, tilt=4.0)
    assert follower.delta == 4.0
    for first, highest in ((None, math.pi / 4), (3.0, 3.0), (0.2, math.pi / 4)):
        chain = HamiltonianChain(delta=0.0, step_size=first, num_leapfrog_steps=2)
        for _ in range(150):
            list(chain.sample(chain.start(evaluate, source), evaluate, source, 1))
        assert math.exp(chain.log_step) == pytest.approx(highest, rel=1e-12)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("metropolis", [True, False])
@pytest.mark.parametrize("delta", [0.0, 2.0, -2.0])
def test_what_is_not_finite_is_rejected(bad: float, metropolis: bool, delta: float) -> None:
    like = [torch.zeros(2, dtype=torch.float64)]
    good, source = scaled_loss(lambda eps: eps[0].square().sum(), [1.0]), torch_draws(like)

    def evaluate(position: list[Tensor]) -> ChainState:
        state = good(position)
        return ChainState(position, bad, state.gradient)

    chain = HamiltonianChain(delta=delta, metropolis=metropolis)
    start = chain.start(good, source)
    assert all(state is start for state, _ in chain.sample(start, evaluate, source, 5))
    assert chain.acceptance == 0.0
