"""What a checkpoint holds of the direction that is carried between full steps: saved anywhere, a run goes on with the
same bits.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tsam_ext import TSAM


def carried(optimizer: TSAM) -> Tensor:
    """v as a checkpoint has it, in one vector."""
    state = optimizer.state_dict()["state"]
    return torch.cat([state[i]["tsam_carry"].flatten() for i in sorted(state)])


def test_a_checkpoint_goes_on_with_the_same_bits(problem) -> None:
    """Saved after every step, and inside a full one; loaded into a new optimizer and into one that has its own."""
    whole, steps = problem(), 7
    options: dict[str, Any] = {"lr": 0.1, "seed": 1, "every": 3, "momentum": 0.9, "num_samples": 3}
    expected = whole.train(TSAM(whole.parameters, torch.optim.SGD, **options), steps)
    for stop in range(1, steps):
        first, second = problem(), problem()
        optimizer = TSAM(first.parameters, torch.optim.SGD, **options)
        losses = first.train(optimizer, stop)
        saved = []

        def closure(task: Any = first, optimizer: TSAM = optimizer, saved: list[Any] = saved) -> Tensor:
            saved.append((optimizer.state_dict(), optimizer.original_state_dict(task.net)))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        state, net = copy.deepcopy(saved[0])
        other = TSAM(second.parameters, torch.optim.SGD, **options)
        second.train(other, stop % 3)  # it may have carried something of its own
        other.load_state_dict(state)
        second.net.load_state_dict(net)
        assert losses + second.train(other, steps - stop) == expected
        assert second.holds(whole.copies())
        # So does the one that was interrupted.
        assert first.train(optimizer, steps - stop) == expected[stop:]


def test_a_copy_carries_on_its_own(problem) -> None:
    ours, theirs = problem(), problem()
    optimizer = TSAM(ours.parameters, lr=0.1, seed=1, every=3, num_samples=3)
    ours.train(optimizer, 2)
    twin_net, twin = copy.deepcopy((ours.net, optimizer))
    theirs.net = twin_net
    assert ours.train(optimizer, 4) == theirs.train(twin, 4)
    assert ours.holds(theirs.copies())


def test_a_checkpoint_without_a_direction_takes_plain_gradients_up_to_the_next_full_step(problem) -> None:
    ours, theirs, plain = problem(), problem(), problem()
    options: dict[str, Any] = {"lr": 0.1, "seed": 1, "rho": 0.3, "num_samples": 3}
    optimizer = TSAM(ours.parameters, every=3, **options)
    twin = TSAM(theirs.parameters, every=3, between="plain", **options)
    ours.train(optimizer, 1)
    theirs.train(twin, 1)
    optimizer.load_state_dict(twin.state_dict())
    assert ours.train(optimizer, 2) == theirs.train(twin, 2)
    assert ours.holds(theirs.copies())
    assert carried(optimizer).count_nonzero() == 0
    # And the other way round: what is saved beside a parameter is nobody's in an optimizer that does not carry.
    loaded = TSAM(plain.parameters, every=3, between="plain", **options)
    loaded.load_state_dict(optimizer.state_dict())
    plain.train(loaded, 1)


def test_wrong_directions_are_refused_by_name(problem) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, seed=1, every=3, num_samples=3)
    task.train(optimizer, 2)
    for wrong, got in (
        (torch.zeros(3, dtype=torch.float64), r"a torch\.strided torch\.float64 tensor of shape \(3,\)"),
        (torch.full((7, 5), float("nan"), dtype=torch.float64), "a carry that is not finite"),
        ("v", "'v'"),
    ):
        state = optimizer.state_dict()
        state["state"][0] = {**state["state"][0], "tsam_carry": wrong}
        before = carried(optimizer)
        with pytest.raises(ValueError, match=rf"load_state_dict: carry of parameter 0: got {got}"):
            optimizer.load_state_dict(state)
        assert torch.equal(carried(optimizer), before)
