"""The laws of HMC's accept test, its energy and its step size, on csrc/core itself.

Layout: a chain is the float64 array of csrc/core/metropolis.h, its slots named below. Invariant: acceptance moves the
current buffer, and nothing else does.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from core_library import Array, Core

from tsam_ext import reference
from tsam_ext.reference.noise import ACCEPT

DELTA, LOG_STEP, CURRENT, LOSS, ENERGY, ACCEPTANCE, TRAJECTORIES, ACCEPTED, DIVERGENT, START = range(10)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Core:
    return Core(tmp_path_factory.mktemp("metropolis") / "metropolis.so", ["-O3"])


def test_energy_from_kicks_is_the_difference_of_energies(core: Core) -> None:
    """Gaussian prior, L = -x·Kx/2, five drifts; against H = (p·p + x·x)/2 - δL in extended precision, to 1e-13 of H."""
    rng = np.random.default_rng(11)
    x, p = rng.standard_normal((2, 12))
    root = rng.standard_normal((12, 12))
    stiffness, delta, h, drifts = root @ root.T / 12, 1.7, 0.3, 5

    def loss(x: Array) -> float:
        return float(-0.5 * x @ stiffness @ x)

    def energy(x: Array, p: Array) -> float:
        x, p = x.astype(np.longdouble), p.astype(np.longdouble)
        return 0.5 * (p @ p + x @ x) + 0.5 * delta * (x @ stiffness.astype(np.longdouble) @ x)

    before, s = energy(x, p), core.chain(delta=delta, loss=loss(x))
    core.library.launch(s)
    for n in range(drifts + 1):
        a, q = delta * h * (0.5 if n in (0, drifts) else 1.0), -stiffness @ x
        core.library.kick(s, a, p @ q, q @ q)
        p = p + a * q
        if n < drifts:
            x, p = core.rotate(x, p, h)
    core.library.land(s, loss(x), 1, 1, 1)
    expected = float(energy(x, p) - before)
    assert abs(expected) > 1e-3
    assert abs(s[ENERGY] - expected) < 1e-13 * float(before)


def test_accept_frequency(core: Core) -> None:
    """40,000 trajectories each. Hoeffding: off by 0.015 once in 3e7, whatever the seed; in seven below 1e-6."""
    n = 40_000
    for i, energy in enumerate((-3.0, 0.0, 0.1, 0.5, 1.0, 2.0, 5.0)):
        s = core.chain(delta=1.0)
        for trajectory in range(n):
            current = int(s[CURRENT])
            # Half from the kicks, half from the loss: a greater loss is the more probable.
            accepted = core.propose(s, energy / 2, s[LOSS] - energy / 2, trajectory, seed=99, step=i)
            assert bool(s[CURRENT] != current) is accepted
            assert s[START] == 0
        assert abs(s[ACCEPTED] / n - min(1.0, math.exp(-energy))) < 0.015, energy
        assert s[ACCEPTANCE] / n == pytest.approx(min(1.0, math.exp(-energy)), rel=1e-9)
        assert s[TRAJECTORIES] == n
        assert s[DIVERGENT] == 0


def test_each_decision_is_that_of_its_uniform(core: Core) -> None:
    s = core.chain()
    for trajectory in range(200):
        u = reference.uniform(7, 3, trajectory, ACCEPT)
        assert core.library.accept_uniform(7, 3, trajectory) == u
        for energy in (0.2, -math.log(u) - 1e-9, -math.log(u) + 1e-9):
            assert core.propose(s, energy, 0.0, trajectory, seed=7, step=3) == (math.log(u) < -energy)


def test_what_is_not_finite_is_rejected_and_divergent(core: Core) -> None:
    inf, nan = math.inf, math.nan
    for kicks, loss in ((nan, 0.0), (inf, 0.0), (-inf, 0.0), (0.0, nan), (0.0, inf), (0.0, -inf), (-inf, inf)):
        for delta in (0.0, 2.0, -2.0):
            s = core.chain(delta=delta)
            assert not core.propose(s, kicks, loss)
            assert (s[CURRENT], s[LOSS], s[ACCEPTED]) == (0, 0, 0)
            assert (s[ACCEPTANCE], s[DIVERGENT], s[TRAJECTORIES]) == (0, 1, 1)
            assert core.propose(s, -1.0, 0.0), "the next trajectory starts from nothing but the kept state"
    for kicks, divergent in ((999.0, 0), (1001.0, 1), (-999.0, 0), (-1001.0, 1)):
        s = core.chain()
        assert core.propose(s, kicks, 0.0) == (kicks < 0)
        assert s[DIVERGENT] == divergent


def test_acceptance_moves_to_a_buffer_that_is_free_and_a_new_step_keeps_it(core: Core) -> None:
    s = core.chain(log_step=-1.5, delta=1.0, loss=10.0)
    assert not core.propose(s, 500.0, 11.0)
    assert (s[CURRENT], s[LOSS]) == (0, 10)
    assert core.propose(s, 0.0, 12.0)
    assert (s[CURRENT], s[LOSS]) == (1, 12)
    # From 12, not from 10. The step's first buffer, 0, is not free.
    assert core.propose(s, -500.0, 11.0)
    assert (s[CURRENT], s[ENERGY]) == (2, -499)
    assert core.propose(s, -1.0, 11.0)
    assert (s[CURRENT], s[START]) == (1, 0)
    core.library.begin(s, 3.0, 7.0)
    assert (s[CURRENT], s[START], s[LOSS], s[DELTA], s[LOG_STEP]) == (1, 1, 7, 3, -1.5)
    assert not s[ENERGY : DIVERGENT + 1].any()
    used = set()
    for _ in range(6):
        assert core.propose(s, -1.0, 7.0)
        assert s[CURRENT] != s[START]
        used.add(s[CURRENT])
    assert used == {0.0, 2.0}


@pytest.mark.parametrize(("energies", "change"), [([-1.0], 0.01), ([900.0], -0.04), ([], 0.0), ([-1.0, 900.0], -0.015)])
def test_adaptation_moves_the_step_towards_its_target(core: Core, energies: list[float], change: float) -> None:
    s = core.chain(log_step=0.25)
    for energy in energies:
        core.propose(s, energy, 0.0)
    core.library.adapt(s)
    assert s[LOG_STEP] == pytest.approx(0.25 + change, abs=1e-15)
