"""States that pass between a TSAM and its base optimizer by another way than TSAM's own load_state_dict.

Our keys stay in the groups, each group's own; the base never holds a value of ours; what means nothing for a sampler is
refused.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch

from tsam_ext import TSAM


@pytest.mark.parametrize("source", ["plain", "ours"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_base_loaded_by_itself_keeps_our_keys(problem, source: str, copied: bool) -> None:
    """Each group's own; and what our state holds besides is not the base's, also where the optimizer is a copy."""
    task, twin = problem(), problem()
    w1, b1, *rest = task.parameters
    groups = [{"params": [w1, b1], "rho": 0.3}, {"params": rest, "radius": None, "adaptive": True}]
    optimizer = TSAM(groups, torch.optim.Adam, lr=0.1, sampler="hmc", seed=4, num_samples=3)
    w1, b1, *rest = twin.parameters
    if source == "plain":
        other: torch.optim.Optimizer = torch.optim.Adam([{"params": [w1, b1]}, {"params": rest}], lr=0.7)
    else:
        other = TSAM(
            [{"params": [w1, b1]}, {"params": rest}],
            torch.optim.Adam,
            lr=0.7,
            sampler="hmc",
            seed=5,
            rho=0.3,
            num_samples=3,
        )
        twin.train(other, 2)
    if copied:
        task, optimizer = copy.deepcopy((task, optimizer))
    task.train(optimizer, 1)
    optimizer.base_optimizer.load_state_dict(other.state_dict())
    expected = [(0.7, 0.3, False), (0.7, 0.05, True) if source == "plain" else (0.7, 0.3, False)]
    assert [(g["lr"], g["rho"], g["adaptive"]) for g in optimizer.param_groups] == expected
    own = optimizer.state_dict()["param_groups"][0]
    assert (own["tsam_step"], own["tsam_seed"]) == (1, 4)
    assert not any(key.startswith("tsam_") for key in optimizer.base_optimizer.state_dict()["param_groups"][0])
    assert not any("tsam_position" in entry for entry in optimizer.base_optimizer.state.values())
    task.train(optimizer, 1)


def test_a_base_loaded_with_other_groups_is_torch_s_to_refuse(problem) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, num_samples=3)
    plain = torch.optim.SGD([{"params": [p]} for p in problem().parameters], lr=0.7)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.base_optimizer.load_state_dict(plain.state_dict())
    task.train(optimizer, 1)


def test_a_radius_is_not_loaded_where_it_means_nothing(problem) -> None:
    """As it is refused when an optimizer is built; a None loads."""
    source, task = problem(), problem()
    saved = TSAM(source.parameters, lr=0.1, radius=0.2, rho=0.3)
    optimizer = TSAM(task.parameters, lr=0.5, sampler="hmc")
    message = "TSAM: load_state_dict: param_groups[0].radius: got 0.2, expected None (the scale is rho)"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(saved.state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["rho"]) == (0.5, 0.05)
    state = saved.state_dict()
    state["param_groups"][0]["radius"] = None
    optimizer.load_state_dict(state)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["rho"]) == (0.1, 0.3)
    noise = TSAM(task.parameters, lr=0.5, sampler="noise")  # where rho says no more than whether it is 0
    noise.load_state_dict(saved.state_dict())
    assert noise.param_groups[0]["radius"] == 0.2
