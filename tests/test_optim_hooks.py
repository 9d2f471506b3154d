"""Hooks of torch's Optimizer on a TSAM: each runs once, with the object that it was registered on, in torch's order.

The oracle is torch's own optimizer: the same hooks on a plain SGD are called in the same order with the same kinds of
arguments. Global hooks run where the base steps.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tsam_ext import TSAM

Calls = list[tuple[str, Any]]


@contextmanager
def global_hooks(calls: Calls) -> Iterator[None]:
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: calls.append(("global pre", optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: calls.append(("global post", optimizer))),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooked(optimizer: torch.optim.Optimizer, calls: Calls, name: str = "") -> None:
    """All six kinds of hooks, each noting that it has run and with which object."""
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append((f"{name}pre", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append((f"{name}post", o)))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append((f"{name}save pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: calls.append((f"{name}save post", o)))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append((f"{name}load pre", o)))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append((f"{name}load post", o)))


def step(task: Any, optimizer: TSAM, form: str) -> None:
    closure = task.closure(optimizer)
    if form == "closure":
        optimizer.step(closure)
    elif form == "keyword":
        optimizer.step(closure=closure)
    elif form == "apply":
        optimizer.estimate_gradient(closure)
        optimizer.apply()
    elif form == "two steps":
        task.loss().backward()
        optimizer.first_step(zero_grad=True)
        task.loss().backward()
        optimizer.second_step(zero_grad=True)
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(optimizer.estimate_gradient(closure))
        scaler.step(optimizer)


class Mine(TSAM):
    """A subclass with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Mixed:
    """A step that comes before TSAM's by way of a second base class."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)  # type: ignore[misc]


class Both(Mixed, TSAM):
    """TSAM and a mixin."""


class Bare(TSAM):
    """A subclass with TSAM's step."""


@pytest.mark.parametrize("kind", [TSAM, Mine, Both, Bare])
@pytest.mark.parametrize("form", ["closure", "keyword", "apply", "two steps", "scaler", "scheduled", "base scheduled"])
def test_each_step_hook_runs_once(problem, kind: type[TSAM], form: str) -> None:
    task, calls = problem(), []
    TSAM(problem().parameters, lr=0.1)  # from the first of a class on its step runs hooks, also where super() calls it
    optimizer = kind(task.parameters, lr=0.1, radius=0.0, num_samples=1)
    hooked(optimizer, calls)
    hooked(optimizer.base_optimizer, calls, "base ")
    if form.endswith("scheduled"):
        lr_scheduler.StepLR(optimizer if form == "scheduled" else optimizer.base_optimizer, 1)
    with global_hooks(calls):
        step(task, optimizer, "closure" if form.endswith("scheduled") else form)
    base = optimizer.base_optimizer
    assert calls == [
        ("pre", optimizer),
        ("global pre", base),
        ("base pre", base),
        ("base post", base),
        ("global post", base),
        ("post", optimizer),
    ]


def test_step_hooks_may_change_arguments_and_bad_ones_are_refused(problem) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, num_samples=3)
    runs: list[int] = []

    def counting(o: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1]

        def counted() -> Tensor:
            runs.append(1)
            return closure()

        return (o, counted), kwargs

    handle = optimizer.register_step_pre_hook(counting)
    optimizer.step(task.closure(optimizer))
    assert len(runs) == 6
    handle.remove()
    optimizer.register_step_pre_hook(lambda o, args, kwargs: 3)
    bits = task.copies()
    with pytest.raises(RuntimeError, match="must return None or"):
        optimizer.step(task.closure(optimizer))
    assert task.holds(bits)


def test_global_hooks_see_the_gradient_and_then_the_whole_step(problem) -> None:
    """Before: p.grad is the tilted gradient, θ where it was. After: a checkpoint taken there is that of the step."""
    task, twin = problem(), problem()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "seed": 1, "sampler": "hmc", "num_samples": 3}
    optimizer, other = TSAM(task.parameters, **options), TSAM(twin.parameters, **options)
    seen: list[Any] = []
    origin = task.copies()

    def before(o: Any, args: Any, kwargs: Any) -> None:
        seen.append((task.copies(), task.gradient()))

    def after(o: Any, args: Any, kwargs: Any) -> None:
        seen.append((task.copies(), copy.deepcopy(optimizer.state_dict())))

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        task.train(optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    (theta, gradient), (updated, state) = seen
    assert all(torch.equal(a, b) for a, b in zip(theta, origin, strict=True))
    other.estimate_gradient(twin.closure(other))
    assert torch.equal(gradient, twin.gradient())
    other.apply()
    assert twin.holds(updated)
    late = TSAM(twin.parameters, **{**options, "seed": 2})
    late.load_state_dict(state)
    task.train(optimizer, 2)
    twin.train(late, 2)
    assert task.holds(twin.copies())


def test_a_step_that_the_base_refuses_is_not_counted(problem) -> None:
    task, twin = problem(), problem()
    optimizer, other = (TSAM(t.parameters, lr=0.1, seed=1, num_samples=3) for t in (task, twin))

    def fails(o: Any, args: Any, kwargs: Any) -> None:
        raise ZeroDivisionError

    handle = optimizer.base_optimizer.register_step_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        task.train(optimizer, 1)
    handle.remove()
    assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 0
    optimizer.apply()  # the estimate is still there
    twin.train(other, 1)
    assert task.holds(twin.copies())
    assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 1


def test_state_hooks_run_once_as_torch_s(problem) -> None:
    task, calls = problem(), []
    optimizer = TSAM(task.parameters, lr=0.1)
    base = optimizer.base_optimizer
    hooked(optimizer, calls)
    hooked(base, calls, "base ")
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [
        ("save pre", optimizer),
        ("base save pre", base),
        ("base save post", base),
        ("save post", optimizer),
        ("load pre", optimizer),
        ("base load pre", base),
        ("base load post", base),
        ("load post", optimizer),
    ]


@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_state_hooks_may_replace_and_come_first(problem, kind: str) -> None:
    """Order, replacement and what a hook's changes reach, on TSAM as on torch's SGD."""
    task, order = problem(), []
    optimizer: Any = (TSAM if kind == "ours" else torch.optim.SGD)(task.parameters, lr=0.1)
    optimizer.register_state_dict_pre_hook(lambda o: order.append("second"))
    optimizer.register_state_dict_pre_hook(lambda o: order.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    optimizer.register_state_dict_post_hook(lambda o, state: state.update(seen="extra" in state))
    optimizer.register_state_dict_post_hook(lambda o, state: state.update(early="extra" in state), prepend=True)
    state = optimizer.state_dict()
    assert order == ["first", "second"]
    assert (state["extra"], state["seen"], state["early"]) == (1, True, False)

    def other_rate(o: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 0.7} for group in loaded["param_groups"]]
        loaded["param_groups"] = []  # of a shallow copy
        return {**loaded, "param_groups": groups}

    rates: list[float] = []
    optimizer.register_load_state_dict_pre_hook(other_rate)
    optimizer.register_load_state_dict_post_hook(lambda o: rates.append(o.param_groups[0]["lr"]))
    optimizer.register_load_state_dict_post_hook(lambda o: rates.append(0.0), prepend=True)
    optimizer.load_state_dict(state)
    assert rates == [0.0, 0.7]
    assert len(state["param_groups"]) == 1


def test_a_hook_after_saving_sees_all_and_the_base_s_its_part(problem) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, momentum=0.9, sampler="hmc", num_samples=3)
    seen: list[dict[str, Any]] = []
    for each in (optimizer, optimizer.base_optimizer):
        each.register_state_dict_post_hook(lambda o, state: seen.append(copy.deepcopy(state)))
        each.register_load_state_dict_pre_hook(lambda o, state: seen.append(copy.deepcopy(state)))
    task.train(optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    of_base, saved, loaded, into_base = seen
    for state, values in ((saved, True), (loaded, True), (of_base, False), (into_base, False)):
        assert (state["param_groups"][0].get("tsam_step") == 1) is values
        assert ("tsam_position" in state["state"][0]) is values


def not_copied(*_: Any) -> None:
    raise AssertionError("a hook of the original")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_no_hooks_of_the_user_s_and_step_once(problem, how: str) -> None:
    task, calls = problem(), []
    optimizer = TSAM(task.parameters, lr=0.1, num_samples=3)
    optimizer.register_step_pre_hook(not_copied)
    optimizer.register_state_dict_pre_hook(not_copied)
    pair = (task, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    hooked(other, calls)
    with global_hooks(calls):
        twin.train(other, 1)
    other.state_dict()
    base = other.base_optimizer
    assert calls == [
        ("pre", other),
        ("global pre", base),
        ("global post", base),
        ("post", other),
        ("save pre", other),
        ("save post", other),
    ]
    assert not any(key.startswith("tsam_") for key in base.state_dict()["param_groups"][0])
