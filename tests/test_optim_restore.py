"""An exception at any moment of a step leaves everything as before it.

Parameters by their bits, the random generator, the step count; p.grad is None, or zero in the same
tensor where one existed; the next step is as if nothing had happened. Version counters move whenever
parameters do, so that autograd notices stale graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import plain_state
from flat_options import tsam
from torch import Tensor

from tsam_ext import TSAM, _ops

RUNS: list[dict[str, Any]] = [
    {"sampler": "noise"},
    {"sampler": "ascent"},
    {"sampler": "ascent", "radius": 0.0},
    {"sampler": "ascent", "batch": "split", "adaptive": True},
    {"sampler": "noise", "every": 2},
    {"sampler": "hmc", "delta": 20.0, "burn_in": 1},
    {"sampler": "hmc", "delta": 20.0, "prior": "ball", "num_leapfrog_steps": 2, "adaptive": True},
    {"sampler": "hmc", "delta": 20.0, "num_leapfrog_steps": 2, "recycle": True},
]


class InterruptedStepError(Exception):
    """Raised by the closures below."""


def failing(
    task: Any, optimizer: TSAM, at: int, error: type[BaseException], after_backward: bool
) -> Callable[[], Tensor]:
    """The usual closure with dropout, raising in its run number ``at``."""
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        x, y = optimizer.part(task.x, task.y)
        loss = task.loss(x, y)
        if calls == at + 1 and not after_backward:
            raise error
        loss.backward()
        if calls == at + 1:
            raise error
        return loss

    return closure


def cases() -> list[Any]:
    listed = []
    for options in RUNS:
        count = {"noise": 3, "ascent": 6, "hmc": 1 + 3 * options.get("num_leapfrog_steps", 1)}[options["sampler"]]
        for at in range(count):
            listed += [(options, 0, at), (options, 2, at)]
        if "every" in options:
            listed.append((options, 1, 0))  # a plain step has one run
    return listed


@pytest.mark.parametrize(("options", "steps", "at"), cases())
@pytest.mark.parametrize("error", [InterruptedStepError, KeyboardInterrupt])
def test_a_raising_closure_leaves_no_trace(problem, options, steps: int, at: int, error) -> None:
    ours, theirs = problem(dropout=0.5), problem(dropout=0.5)
    settings = {"lr": 0.1, "momentum": 0.9, "rho": 0.3, "seed": 3, **options}
    optimizer = tsam(ours.parameters, **settings)
    twin = tsam(theirs.parameters, **settings)
    torch.manual_seed(1)
    ours.train(optimizer, steps)
    torch.manual_seed(1)
    theirs.train(twin, steps)
    for after_backward in (False, True):
        optimizer.zero_grad()
        copies, generator = ours.copies(), torch.random.get_rng_state()
        saved, losses = plain_state(optimizer), optimizer.diagnostics.losses
        with pytest.raises(error):
            optimizer.step(failing(ours, optimizer, at, error, after_backward))
        assert ours.holds(copies)
        assert torch.equal(torch.random.get_rng_state(), generator)
        assert plain_state(optimizer) == saved
        assert torch.equal(optimizer.diagnostics.losses, losses)  # of the last completed step
        assert all(p.grad is None for p in ours.parameters)
        assert ours.rows.equal(optimizer.part(ours.rows))  # outside a step again
        with pytest.raises(RuntimeError):
            optimizer.apply()
    for _ in range(2):
        losses = ours.train(optimizer, 1)
        torch.random.set_rng_state(generator)
        assert losses == theirs.train(twin, 1)
        generator = torch.random.get_rng_state()
        assert ours.holds(theirs.copies())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", ["noise", "ascent", "hmc"])
@pytest.mark.parametrize("error", [InterruptedStepError, KeyboardInterrupt])
def test_every_kind_of_parameter_comes_back(problem, dtype, sampler: str, error) -> None:
    """Low precision, autocast, a frozen parameter and one that no loss depends on; at each run of the closure."""
    task = problem(dtype=dtype)
    unused = torch.nn.Parameter(torch.randn(5).to(dtype))
    frozen = torch.nn.Parameter(torch.randn(3).to(dtype), requires_grad=False)
    optimizer = tsam([*task.parameters, unused, frozen], lr=0.1, rho=0.3, sampler=sampler, seed=3)
    every = [*task.parameters, unused, frozen]
    before = [p.detach().clone() for p in every]
    moved: list[list[bool]] = []
    runs = {"noise": 3, "ascent": 6, "hmc": 4}[sampler]

    def closure_failing(at: int) -> Callable[[], Tensor]:
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                loss = task.loss()
            loss.backward()
            moved.append([not torch.equal(p, b) for p, b in zip(every, before, strict=True)])
            if calls == at + 1:
                raise error
            return loss

        return closure

    for at in range(runs):
        with pytest.raises(error):
            optimizer.step(closure_failing(at))
        assert all(torch.equal(p, b) for p, b in zip(every, before, strict=True))
        assert all(p.grad is None for p in every)
    assert all(all(flags[:-1]) and not flags[-1] for flags in moved)  # all but the frozen one had moved
    optimizer.step(closure_failing(runs))
    assert unused.grad is None
    assert torch.equal(unused, before[-2])


@pytest.mark.parametrize("at", [0, 1, 5])
def test_gradient_buffers_survive_as_zeros(problem, at: int) -> None:
    """Views into one bucket, as a reducer owns: same tensors, zeroed, filled by the next step."""
    task, twin = problem(), problem()
    optimizer = tsam(task.parameters, lr=0.1, rho=0.3, seed=3)
    bucket = torch.full((task.flat().numel(),), 7.0, dtype=torch.float64)
    begin = 0
    for p in task.parameters:
        p.grad = bucket[begin : begin + p.numel()].view_as(p)
        begin += p.numel()
    buffers = [p.grad for p in task.parameters]
    with pytest.raises(InterruptedStepError):
        optimizer.step(failing(task, optimizer, at, InterruptedStepError, True))
    assert all(p.grad is b for p, b in zip(task.parameters, buffers, strict=True))
    assert not bucket.any()
    optimizer.estimate_gradient(task.closure(optimizer))
    assert all(p.grad is b for p, b in zip(task.parameters, buffers, strict=True))
    other = tsam(twin.parameters, lr=0.1, rho=0.3, seed=3)
    other.estimate_gradient(twin.closure(other))
    assert torch.equal(bucket, twin.gradient())


@pytest.mark.parametrize("at", [0, 1, 4])
def test_exceptions_in_the_loop_restore(problem, at: int) -> None:
    ours, theirs = problem(), problem()
    optimizer, twin = (tsam(t.parameters, lr=0.1, rho=0.3, seed=3) for t in (ours, theirs))
    copies = ours.copies()

    def loop(raise_inside: bool) -> None:
        for k, sample in enumerate(optimizer.samples()):
            with sample:
                loss = ours.loss()
                loss.backward()
                sample.record(loss)
                if k == at and raise_inside:
                    raise InterruptedStepError
            if k == at:
                raise InterruptedStepError

    for inside in (True, False):
        with pytest.raises(InterruptedStepError):
            loop(inside)
        gc.collect()
        assert ours.holds(copies)
        assert all(p.grad is None for p in ours.parameters)
    assert ours.train(optimizer, 2) == theirs.train(twin, 2)
    assert ours.holds(theirs.copies())


OPS = {
    "noise": ("perturb_", "tilt_update_", "accumulate_", "accumulate_perturb_", "restore_"),
    "ascent": ("perturb_", "norm_ascend_", "tilt_update_", "accumulate_", "restore_"),
    "hmc": ("hmc_place_", "hmc_begin_", "hmc_leapfrog_", "hmc_end_", "hmc_carry_", "hmc_adapt_", "restore_"),
    "recycle": ("hmc_leapfrog_", "hmc_end_", "hmc_recycle_", "accumulate_", "hmc_carry_"),
    "sam": ("norm_ascend_", "tilt_update_", "accumulate_", "restore_"),
}


@pytest.mark.parametrize(("run", "op"), [(run, op) for run, ops in OPS.items() for op in ops])
@pytest.mark.parametrize("ran", [False, True])
def test_an_interrupt_just_before_or_after_any_op(problem, monkeypatch, run, op: str, ran: bool) -> None:
    """Ctrl-C arrives where it likes: also when a copy was announced and not made, or made and not yet noted."""
    others: dict[str, Any] = {"sam": {"radius": 0.0}, "ascent": {"radius": 0.3}}
    others["recycle"] = {"sampler": "hmc", "recycle": True, "num_leapfrog_steps": 2}
    options = others.get(run, {"sampler": run})
    counted, stop_at = [0], [0]
    original = getattr(_ops, op)

    def interrupted(*args: Any) -> None:
        counted[0] += 1
        if counted[0] == stop_at[0] and not ran:
            raise KeyboardInterrupt
        original(*args)
        if counted[0] == stop_at[0] and ran:
            raise KeyboardInterrupt

    ours, theirs = problem(), problem()
    optimizer, twin = (tsam(t.parameters, lr=0.1, rho=0.3, seed=3, **options) for t in (ours, theirs))
    ours.train(optimizer, 1)
    theirs.train(twin, 1)
    monkeypatch.setattr(_ops, op, interrupted)
    ours.train(optimizer, 1)  # counts the calls of an undisturbed step
    calls, copies = counted[0], ours.copies()
    assert calls > 0
    theirs.train(twin, 1)
    for at in range(1, calls + 1):
        # A new object each time, whose scratch holds no copy of this step yet.
        fresh = tsam(ours.parameters, lr=0.1, rho=0.3, seed=3, **options)
        for user in (fresh, optimizer):
            counted[0], stop_at[0] = 0, at
            with pytest.raises(KeyboardInterrupt):
                ours.train(user, 1)
            stop_at[0] = 0
            assert ours.holds(copies)
    assert ours.train(optimizer, 1) == theirs.train(twin, 1)
    assert ours.holds(theirs.copies())


@pytest.mark.parametrize("sampler", ["noise", "ascent", "hmc"])
def test_a_restore_that_fails_is_tried_again(problem, monkeypatch, sampler: str) -> None:
    """Ctrl-C may come once more, while things are put back."""
    task = problem(dropout=0.5)
    optimizer = tsam(task.parameters, lr=0.1, rho=0.3, seed=3, sampler=sampler)
    task.train(optimizer, 1)
    optimizer.zero_grad()
    copies, generator, saved = task.copies(), torch.random.get_rng_state(), plain_state(optimizer)
    original, calls = _ops.restore_, [0]

    def interrupted(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(_ops, "restore_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing(task, optimizer, 0, InterruptedStepError, False))
    assert task.holds(copies) and torch.equal(torch.random.get_rng_state(), generator)
    assert plain_state(optimizer) == saved and all(p.grad is None for p in task.parameters)
    calls[0] = 0
    with pytest.raises(KeyboardInterrupt), optimizer.perturbed():
        assert not task.holds(copies)
    assert task.holds(copies) and plain_state(optimizer) == saved


def test_an_abandoned_loop_ends_with_the_next_step(problem) -> None:
    """The iterator is kept alive, so nothing closed it; a new step starts from the true parameters."""
    ours, theirs = problem(), problem()
    optimizer, twin = (tsam(t.parameters, lr=0.1, rho=0.3, seed=3) for t in (ours, theirs))
    copies = ours.copies()
    iterator = iter(optimizer.samples())
    with next(iterator) as sample:
        loss = ours.loss()
        loss.backward()
        sample.record(loss)
    next(iterator)
    assert not ours.holds(copies)
    assert ours.train(optimizer, 1) == theirs.train(twin, 1)
    assert ours.holds(theirs.copies())
    del iterator
    gc.collect()
    assert ours.holds(theirs.copies())


def test_a_failed_half_of_sam_can_be_abandoned(problem) -> None:
    ours, theirs = problem(), problem()
    settings = {"lr": 0.1, "rho": 0.3, "num_samples": 1, "radius": 0.0}
    optimizer, twin = (tsam(t.parameters, **settings) for t in (ours, theirs))
    copies = ours.copies()
    ours.loss().backward()
    optimizer.first_step(zero_grad=True)
    assert not ours.holds(copies)
    # No second_step: the user's code raised. The next step begins from the true parameters.
    assert ours.train(optimizer, 1) == theirs.train(twin, 1)
    assert ours.holds(theirs.copies())


def test_extreme_values_come_back_bit_for_bit(problem) -> None:
    """Where subtracting the perturbation again would not do: tiny, huge, negative zero, infinite, NaN."""
    task = problem(dtype=torch.float32)
    values = torch.tensor([1e-38, 3e38, -0.0, float("inf"), float("nan"), 1e-45, 1.0])
    with torch.no_grad():
        task.parameters[1].copy_(values)
    bits = task.parameters[1].detach().view(torch.int32).clone()
    optimizer = tsam(task.parameters, lr=0.1, rho=1e3)
    optimizer.estimate_gradient(task.closure(optimizer))
    assert torch.equal(task.parameters[1].detach().view(torch.int32), bits)


@pytest.mark.parametrize("options", [{"sampler": "noise"}, {"sampler": "ascent", "radius": 0.0}, {"sampler": "hmc"}])
def test_version_counters_see_every_move(problem, options: dict[str, Any]) -> None:
    task, seen = problem(), []
    optimizer = tsam(task.parameters, lr=0.1, rho=0.3, **options)
    start = [p._version for p in task.parameters]

    def closure() -> Tensor:
        seen.append([p._version for p in task.parameters])
        loss = task.loss()
        loss.backward()
        return loss

    optimizer.estimate_gradient(closure)
    seen.append([p._version for p in task.parameters])
    if options["sampler"] != "ascent":
        assert all(a < b for a, b in zip(start, seen[0], strict=True))
    for before, after in pairwise(seen):
        assert all(a < b for a, b in zip(before, after, strict=True))


def test_autograd_refuses_a_graph_from_before_a_move(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, sampler="noise")
    stale = task.loss()
    with optimizer.perturbed(), pytest.raises(RuntimeError, match="modified by an inplace"):
        stale.backward()
    with optimizer.perturbed():
        inside = task.loss()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        inside.backward()
    kept = []

    def closure() -> Tensor:
        kept.append(task.loss())
        kept[0].backward(retain_graph=True)
        return kept[-1]

    with pytest.raises(RuntimeError, match="modified by an inplace"):
        optimizer.step(closure)


def test_parameters_keep_their_memory(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)
    pointers = [p.data_ptr() for p in task.parameters]
    pointers_inside = []

    def closure() -> Tensor:
        pointers_inside.append([p.data_ptr() for p in task.parameters])
        return task.closure(optimizer)()

    optimizer.step(closure)
    assert all(inside == pointers for inside in pointers_inside)
    assert [p.data_ptr() for p in task.parameters] == pointers
