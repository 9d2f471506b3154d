"""Loss scaling: TSAM(scaler=...) under torch.amp.GradScaler's own protocol, and estimates that a step may not use.

The laws: a scale that is a power of two changes no bit; an overflow costs its step, and neither parameters nor chain;
a step without a closure uses an estimate once, and never one that the scaler has skipped.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_options import tsam
from test_optim_cost import NoSync
from torch import Tensor, nn

from tsam_ext import TSAM

GradScaler = torch.amp.GradScaler
HMC: dict[str, Any] = {"sampler": "hmc", "delta": 20.0, "rho": 0.5, "num_leapfrog_steps": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "hmc": HMC,
    "ball": HMC | {"prior": "ball", "delta": "auto", "num_leapfrog_steps": 1},
    "recycle": HMC | {"recycle": True, "burn_in": 1},
    "ascent": {},
    "noise": {"sampler": "noise", "rho": 0.5},
}


def made(problem: Any, scaler: Any, **options: Any) -> tuple[Any, TSAM]:
    task = problem(dtype=torch.float32)
    return task, tsam(task.parameters, lr=0.1, momentum=0.9, seed=1, tilt=2.0, scaler=scaler, **options)


def closure_of(task: Any, scale: Callable[[Tensor], Tensor], overflow: int = -1) -> Callable[[], Tensor]:
    """Differentiates the scaled loss; in pass number ``overflow`` one element of a gradient is infinite."""
    passes = [0]

    def closure() -> Tensor:
        assert all(parameter.isfinite().all() for parameter in task.parameters)  # in lost steps too
        loss: Tensor = task.loss()
        scale(loss).backward()
        if passes[0] == overflow:
            task.parameters[0].grad[0, 0] = math.inf
        passes[0] += 1
        return loss

    return closure


def protocol(task: Any, optimizer: TSAM, scaler: Any, overflow: int = -1, clip: float = math.inf) -> None:
    optimizer.estimate_gradient(closure_of(task, scaler.scale, overflow))
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(task.parameters, clip)
    scaler.step(optimizer)
    scaler.update()


def position(optimizer: TSAM) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in optimizer.chain_position()])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("clip", [math.inf, 1e-2])
def test_a_power_of_two_changes_no_bit(problem: Any, name: str, clip: float) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**12)
    ours, optimizer = made(problem, scaler, **OPTIONS[name])
    theirs, twin = made(problem, None, **OPTIONS[name])
    for _ in range(4):
        protocol(ours, optimizer, scaler, clip=clip)
        twin.estimate_gradient(closure_of(theirs, lambda loss: loss))
        torch.nn.utils.clip_grad_norm_(theirs.parameters, clip)
        twin.apply()
        assert ours.holds(theirs.copies())
        mine, expected = optimizer.diagnostics.to_dict(), twin.diagnostics.to_dict()
        norms = {"gradient_norms", "implied_delta"}  # of the scaled gradients
        assert all(torch.equal(mine[key], expected[key]) for key in mine.keys() - norms)
    assert optimizer.diagnostics.losses.unique().numel() > 1


@pytest.mark.parametrize("buffers", [False, True])
def test_the_scale_may_be_a_tensor(problem: Any, buffers: bool) -> None:
    """p.grad is scaled, in memory that was there as well, and who gave the scale divides by it."""
    scale = torch.tensor([1024.0], dtype=torch.float64)
    ours, optimizer = made(problem, scale, **HMC)
    for parameter in ours.parameters if buffers else []:
        parameter.grad = torch.ones_like(parameter)
    theirs, twin = made(problem, None, **HMC)
    optimizer.estimate_gradient(closure_of(ours, lambda loss: loss * 1024.0))
    twin.estimate_gradient(closure_of(theirs, lambda loss: loss))
    assert torch.equal(ours.gradient(), 1024.0 * theirs.gradient())


def test_a_scale_that_is_no_power_of_two_agrees_to_rounding(problem: Any) -> None:
    scaler = GradScaler("cpu", init_scale=1000.0)
    ours, optimizer = made(problem, scaler, **HMC)
    theirs, twin = made(problem, None, **HMC)
    protocol(ours, optimizer, scaler)
    twin.step(closure_of(theirs, lambda loss: loss))
    torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["hmc", "ascent"])
def test_a_scaler_that_is_off_does_nothing(problem: Any, name: str) -> None:
    scaler = GradScaler("cpu", enabled=False)
    ours, optimizer = made(problem, scaler, **OPTIONS[name])
    theirs, twin = made(problem, None, **OPTIONS[name])
    protocol(ours, optimizer, scaler)
    twin.step(closure_of(theirs, lambda loss: loss))
    assert ours.holds(theirs.copies())
    optimizer.step(closure_of(ours, lambda loss: loss))


@pytest.mark.parametrize("recycle", [False, True])
@pytest.mark.parametrize("overflow", range(7))  # the start, and two passes of each of three trajectories
def test_an_overflow_costs_a_step_and_not_the_chain(problem: Any, overflow: int, recycle: bool) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**12)
    task, optimizer = made(problem, scaler, **HMC, recycle=recycle)
    protocol(task, optimizer, scaler)
    before, where = task.copies(), position(optimizer)
    protocol(task, optimizer, scaler, overflow)
    assert task.holds(before)
    assert scaler.get_scale() == 2.0**11
    errors = optimizer.diagnostics.energy_errors
    lost = [] if overflow == 0 else [(overflow - 1) // 2]  # a trajectory is rejected, the others are not
    assert errors.isnan().nonzero().flatten().tolist() == lost
    assert float(optimizer.diagnostics.num_divergent) == len(lost)
    assert float(optimizer.diagnostics.num_nonfinite) == 0.0
    assert position(optimizer).isfinite().all()
    assert not torch.equal(position(optimizer), where)
    protocol(task, optimizer, scaler)
    assert not task.holds(before)
    assert task.flat().isfinite().all()
    assert float(optimizer.diagnostics.acceptance_rate) > 0.3


@pytest.mark.parametrize("name", ["hmc", "ball", "recycle"])
def test_a_scale_that_is_far_too_large_comes_down(problem: Any, name: str) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-8)
    task, optimizer = made(problem, scaler, **OPTIONS[name] | {"delta": 0.02})
    smaller, start, skipped = task.loss, task.copies(), 0
    task.loss = lambda: 1e3 * smaller()
    for _ in range(8):
        protocol(task, optimizer, scaler, clip=1.0)
        skipped += task.holds(start)
    assert 1 <= skipped <= 4
    assert task.flat().isfinite().all()
    assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 8 - skipped


def test_memory_that_others_hold_is_not_written(problem: Any) -> None:
    """As with a reducer's buckets: gradients that are views of one storage."""
    parameter = nn.Parameter(torch.ones(4))
    bucket, seen = torch.zeros(8), []
    optimizer = tsam([parameter], lr=0.1, seed=1, scaler=torch.tensor(4.0), **HMC)

    def closure() -> Tensor:
        seen.append(bucket.clone())
        bucket.fill_(1.0)
        parameter.grad = bucket[:4]
        return parameter.detach().sum()

    optimizer.estimate_gradient(closure)
    assert all(torch.equal(entry, torch.ones(8)) for entry in seen[1:])


@pytest.mark.parametrize("name", OPTIONS)
def test_an_estimate_under_a_scaler_waits_for_nothing(problem: Any, name: str) -> None:
    scaler = GradScaler("cpu")
    task, optimizer = made(problem, scaler, **OPTIONS[name])

    def plain() -> Tensor:
        loss: Tensor = task.loss()
        scaler.scale(loss).backward()
        return loss

    for _ in range(2):
        with NoSync():
            optimizer.estimate_gradient(plain)


def test_bad_scalers_are_refused(problem: Any) -> None:
    with pytest.raises(TypeError, match=r"TSAM: scaler: got 1024.0, expected a torch.amp.GradScaler"):
        made(problem, 1024.0)
    with pytest.raises(ValueError, match=r"TSAM: scaler: got a torch.float32 tensor of shape \(2,\)"):
        made(problem, torch.ones(2))
    task = problem()
    with pytest.raises(ValueError, match=r"param_groups\[0\].scaler.*one value for all groups"):
        tsam([{"params": task.parameters, "scaler": GradScaler("cpu")}])
    half = problem(dtype=torch.float16)
    optimizer = tsam(half.parameters, scaler=GradScaler("cpu"), **HMC)
    with pytest.raises(ValueError, match=r"scaler: .*float16 parameters"):
        optimizer.estimate_gradient(half.loss)


def test_a_whole_step_under_a_scaler_is_refused(problem: Any) -> None:
    """It would use scaled gradients; GradScaler.step takes no closure either."""
    scaler = GradScaler("cpu")
    for given in (scaler, torch.tensor(2.0)):
        task, optimizer = made(problem, given)
        before = task.copies()
        with pytest.raises(RuntimeError, match=r"step\(closure\) with scaler="):
            optimizer.step(closure_of(task, scaler.scale))
        assert task.holds(before)


def test_a_copy_has_a_scaler(problem: Any) -> None:
    scaler = GradScaler("cpu", init_scale=8.0)
    _, optimizer = made(problem, scaler)
    assert copy.deepcopy(optimizer).scaler.get_scale() == 8.0


def refused(optimizer: TSAM, task: Any, words: str) -> None:
    """A plain step raises and changes nothing, and so does one more."""
    before = task.copies()
    for expected in (words, "needs an estimate"):
        with pytest.raises(RuntimeError, match=f"step\\(\\) without a closure {expected}.* Nothing was updated"):
            optimizer.step()
    assert task.holds(before)
    assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_takes_the_estimate_away(problem: Any, set_to_none: bool) -> None:
    task, optimizer = made(problem, None)
    optimizer.estimate_gradient(task.closure(optimizer))
    optimizer.zero_grad(set_to_none=set_to_none)
    refused(optimizer, task, "needs an estimate")


def test_the_model_s_zero_grad_takes_the_estimate_away(problem: Any) -> None:
    task, optimizer = made(problem, None)
    optimizer.estimate_gradient(task.closure(optimizer))
    task.net.zero_grad()
    refused(optimizer, task, "finds no gradient")


def test_an_estimate_without_gradients_is_still_one(problem: Any) -> None:
    """An expert that no row was sent to: nothing to step with, and nothing was cleared."""
    task, optimizer = made(problem, None)
    task.train(optimizer, 1)
    optimizer.zero_grad()
    stranger = torch.zeros((), requires_grad=True)
    with pytest.warns(UserWarning, match="counts as zeros"):
        optimizer.estimate_gradient(lambda: stranger * 1.0)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 2


@pytest.mark.parametrize("name", ["hmc", "ascent"])
def test_an_estimate_that_the_scaler_skipped_is_not_used(problem: Any, name: str) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**12)
    task, optimizer = made(problem, scaler, **OPTIONS[name])
    protocol(task, optimizer, scaler, overflow=1)
    assert scaler.get_scale() == 2.0**11
    refused(optimizer, task, "comes after the scaler")
    protocol(task, optimizer, scaler)
    assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 1


SCALED = "looks like scaler.scale"


def heard(problem: Any, *, init: float, scaled: bool, factor: float = 1.0, steps: int = 8, **options: Any) -> list[str]:
    """The warnings of a few steps whose closure returns a product: the scaled loss, or the loss times a factor."""
    scaler = GradScaler("cpu", init_scale=init)
    task, optimizer = made(problem, scaler, **options)

    def closure() -> Tensor:
        x, y = optimizer.part(task.x, task.y)
        loss = factor * task.loss(x, y)
        product = scaler.scale(loss)
        product.backward()
        return product if scaled else loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.estimate_gradient(closure)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    return [str(warning.message) for warning in caught]


KINDS = [{}, {"batch": "split"}, {"num_samples": 1, "radius": 0.0}, {"sampler": "noise"}, {"sampler": "hmc"}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_scaled_loss_is_heard_of_once(problem: Any, options: dict[str, Any]) -> None:
    assert [SCALED in text for text in heard(problem, init=2.0**16, scaled=True, **options)].count(True) == 1


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("init", [2.0**16, 2.0**10, 1.0])
def test_a_loss_that_is_a_product_is_no_scaled_one(problem: Any, options: dict[str, Any], init: float) -> None:
    assert not any(SCALED in text for text in heard(problem, init=init, scaled=False, factor=5.0, **options))


def test_a_large_loss_is_no_scaled_one_where_an_ascent_tells(problem: Any) -> None:
    assert not any(SCALED in text for text in heard(problem, init=2.0**10, scaled=False, factor=1e4, rho=1e-4))


def test_a_loss_that_is_no_product_is_never_looked_at(problem: Any) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**12)
    task, optimizer = made(problem, scaler)
    protocol(task, optimizer, scaler)
    report = optimizer._progress.estimate.report
    assert not report.product
    assert report.scale is not None
    assert float(report.scale) == 2.0**12
