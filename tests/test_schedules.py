"""rho as a function of the step: each step asks it once, and a checkpoint holds what it says."""

from __future__ import annotations

from typing import Any

import pytest

from tsam_ext import TSAM, Ascent


@pytest.mark.parametrize("sampler", [Ascent(), "noise", "hmc"])
def test_rho_as_a_function_of_the_step(problem, sampler: Any) -> None:
    ours, theirs = problem(), problem()
    values = [0.5, 0.0, 0.2]
    optimizer = TSAM(ours.parameters, lr=0.1, rho=values.__getitem__, seed=1, sampler=sampler, num_samples=3)
    twin = TSAM(theirs.parameters, lr=0.1, seed=1, sampler=sampler, num_samples=3)
    for rho in values:
        twin.param_groups[0]["rho"] = rho
        assert ours.train(optimizer, 1) == theirs.train(twin, 1)
    assert ours.holds(theirs.copies())
    with pytest.raises(IndexError):
        ours.train(optimizer, 1)
    optimizer.param_groups[0]["rho"] = lambda step: -1.0
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\.rho\(3\): got -1\.0, expected a finite number not below 0"
    ):
        ours.train(optimizer, 1)


def test_rho_as_a_function_survives_a_checkpoint(problem) -> None:
    """The state dict holds its value, as plain numbers do; who loads it goes on with the function that is there."""
    ours, theirs = problem(), problem()
    optimizer, twin = (
        TSAM(t.parameters, lr=0.1, rho=lambda step: 0.1 * (step + 1), seed=1, num_samples=3) for t in (ours, theirs)
    )
    ours.train(optimizer, 2)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["rho"] == pytest.approx(0.3)
    twin.load_state_dict(saved)
    theirs.net.load_state_dict(ours.net.state_dict())
    ours.train(optimizer, 2)
    theirs.train(twin, 2)
    assert ours.holds(theirs.copies())
