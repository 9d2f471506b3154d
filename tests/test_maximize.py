"""A base optimizer that maximizes: its loss is a reward.

The law: it trains as one that minimizes the negative, bit for bit: the ascent goes to the worse side, and the tilt and
hmc's delta favour it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext import TSAM


@pytest.mark.parametrize("sampler", ["ascent", "noise", "hmc"])
def test_a_base_that_maximizes_is_one_that_minimizes_the_negative(problem, sampler: str) -> None:
    """The ascent goes to the worse side, and the tilt favours it."""
    cases: list[dict[str, Any]] = [{"tilt": 3.0}, {"tilt": float("inf")}, {"tilt": torch.tensor(3.0)}]
    if sampler == "hmc":
        cases = [{"tilt": 3.0, "delta": 5.0}, {"tilt": 3.0, "delta": "auto"}, {"tilt": torch.tensor(3.0)}]
    for options in cases:
        ours, theirs = problem(), problem()
        optimizer, twin = (
            tsam(t.parameters, lr=0.1, rho=0.5, seed=1, sampler=sampler, maximize=m, **options)
            for t, m in ((ours, True), (theirs, False))
        )
        for _ in range(3):

            def closure(ours: Any = ours) -> Tensor:
                reward = -ours.loss()
                reward.backward()
                return reward

            reward, loss = optimizer.step(closure), twin.step(theirs.closure(twin))
            assert torch.equal(reward, -loss)
            assert ours.holds(theirs.copies())
        torch.testing.assert_close(optimizer.diagnostics.tilted_loss, -twin.diagnostics.tilted_loss)


def test_groups_that_disagree_on_the_sign_are_refused(problem) -> None:
    task = problem()
    first, second = task.parameters[:2], task.parameters[2:]
    match = r"param_groups: maximize: got True in some groups alone"
    with pytest.raises(ValueError, match=match):
        TSAM([{"params": first, "maximize": True}, {"params": second}], lr=0.1)
    optimizer = TSAM([{"params": first}, {"params": second}], lr=0.1)
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "maximize": True})
    optimizer.param_groups[0]["maximize"] = True
    copies = task.copies()
    with pytest.raises(ValueError, match=match):
        task.train(optimizer, 1)
    assert task.holds(copies)
