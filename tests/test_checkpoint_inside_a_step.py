"""Checkpoints taken inside a step: from the closure, from a signal handler between any two lines.

Law: opt.state_dict() and opt.original_state_dict(model) are then what they were before the step, take nothing from it,
and a run that goes on from them has the bits of one that was never disturbed.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import pytest
import torch
from flat_options import tsam
from torch import Tensor, nn

from tsam_ext import TSAM

SAMPLERS: dict[str, dict[str, Any]] = {
    "ascent": {"sampler": "ascent", "rho": 0.3, "radius": 0.2},
    "sam": {"sampler": "ascent", "rho": 0.3, "radius": 0.0, "num_samples": 1},
    "carried": {"sampler": "ascent", "rho": 0.3, "radius": 0.2, "every": 3, "num_samples": 2},
    "noise": {"sampler": "noise", "radius": 0.5, "every": 2},
    "hmc": {"sampler": "hmc", "delta": "auto", "rho": 0.5, "num_leapfrog_steps": 2},
    "ball": {"sampler": "hmc", "delta": 30.0, "prior": "ball", "rho": 0.5, "recycle": True, "num_leapfrog_steps": 2},
    "fresh": {"sampler": "hmc", "delta": "auto", "rho": 0.5, "chain": "fresh"},
}
Both = tuple[dict[str, Any], dict[str, Any]]


class Task:
    """A net with BatchNorm, tied weights, a parameter that is not the optimizer's and one that gets no gradient."""

    def __init__(self, sampler: str) -> None:
        state = torch.random.get_rng_state()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.net = nn.Sequential(self.first, nn.BatchNorm1d(4), nn.Tanh(), self.last).double()
        self.net.register_parameter("foreign", nn.Parameter(torch.ones(3).double()))
        self.net.register_parameter("unused", nn.Parameter(torch.ones(3).double()))
        self.x, self.y = torch.randn(8, 4).double(), torch.randint(0, 4, (8,))
        torch.random.set_rng_state(state)
        own = [p for name, p in self.net.named_parameters() if name != "foreign"]
        self.optimizer = tsam(own, torch.optim.Adam, lr=0.01, seed=7, model=self.net, **SAMPLERS[sampler])

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.x), self.y)

    def saved(self, model: nn.Module | None = None) -> Both:
        return copy.deepcopy((self.optimizer.original_state_dict(model or self.net), self.optimizer.state_dict()))

    def step(self, look: Callable[[], None] = lambda: None) -> None:
        def closure() -> Tensor:
            look()
            loss = self.loss()
            look()
            loss.backward()
            look()
            return loss

        self.optimizer.step(closure)

    def resumed(self, sampler: str, both: Both) -> Task:
        other = Task(sampler)
        other.optimizer._progress.seed = 0
        other.net.load_state_dict(both[0])
        other.optimizer.load_state_dict(both[1])
        return other


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("done", [0, 3, 4])
def test_every_pass_saves_what_was_before_the_step(sampler: str, done: int) -> None:
    """Before and after each forward and backward pass; the step has the bits of one that nobody has looked at."""
    task, twin = Task(sampler), Task(sampler)
    for _ in range(done):
        task.step()
        twin.step()
    before = copy.deepcopy((task.net.state_dict(), task.optimizer.state_dict()))
    # The step has drawn over where the chain was, or lets go of what steps before it have carried: no step asks for it.
    fresh = (sampler, done) in {("fresh", 3), ("fresh", 4), ("carried", 3)}
    seen: list[Both] = []
    task.step(lambda: seen.append(task.saved()))
    twin.step()
    assert same(task.net.state_dict(), twin.net.state_dict())
    assert same(task.optimizer.state_dict(), twin.optimizer.state_dict())
    for weights, state in seen:
        assert same(weights, before[0])
        assert fresh or same(state, before[1])
    assert len(seen) >= 3
    for both in (seen[0], seen[-1]):
        other = task.resumed(sampler, copy.deepcopy(both))
        other.step()
        assert same(other.net.state_dict(), twin.net.state_dict())
        assert same(other.optimizer.state_dict(), twin.optimizer.state_dict())


@contextmanager
def signals_at_every_line(task: Task, seen: list[Both]) -> Iterator[None]:
    """Before each line that the package runs, its first three times, a signal whose handler saves.

    None comes while the base writes the parameters: there is no step to be before or after then.
    """
    package = os.path.dirname(sys.modules["tsam_ext"].__file__ or "")
    visits: Counter[tuple[str, int]] = Counter()
    quiet = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal quiet
        line = frame.f_code.co_filename, frame.f_lineno
        if not line[0].startswith(package):
            return None
        if event == "line" and not quiet and visits[line] < 3:
            visits[line] += 1
            quiet += 1
            try:
                signal.raise_signal(signal.SIGUSR1)
            finally:
                quiet -= 1
        return trace

    def base_steps(change: int) -> None:
        nonlocal quiet
        quiet += change

    base = task.optimizer.base_optimizer
    hooks = (
        base.register_step_pre_hook(lambda *_: base_steps(1)),
        base.register_step_post_hook(lambda *_: base_steps(-1)),
    )
    former = signal.signal(signal.SIGUSR1, lambda *_: seen.append(task.saved()))
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGUSR1, former)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_signal_handler_may_save_anywhere(sampler: str) -> None:
    """Each checkpoint is that of before the step, or that of after; the step has the bits of an undisturbed one."""
    task, twin = Task(sampler), Task(sampler)
    for run in (task, twin):
        run.step()
    start = copy.deepcopy((task.net.state_dict(), task.optimizer.state_dict()))
    seen: list[Both] = []
    with signals_at_every_line(task, seen):
        task.step()
    twin.step()
    ends = task.net.state_dict(), task.optimizer.state_dict()
    assert same(ends, (twin.net.state_dict(), twin.optimizer.state_dict()))
    assert len(seen) > 200
    before = [both for both in seen if both[1]["param_groups"][0]["tsam_step"] == 1]
    after = [both for both in seen if both[1]["param_groups"][0]["tsam_step"] == 2]
    assert len(before) + len(after) == len(seen)
    assert after
    for weights, state in before:
        assert same(weights, start[0])
        assert sampler == "fresh" or same(state, start[1])  # a fresh chain has been drawn over
    assert all(same(both, ends) for both in after)
    for both in (before[0], before[len(before) // 2], before[-1]):
        other = task.resumed(sampler, copy.deepcopy(both))
        other.step()
        assert same((other.net.state_dict(), other.optimizer.state_dict()), ends)


@pytest.mark.parametrize("how", ["error", "break", "perturbed", "abandoned"])
@pytest.mark.parametrize("sampler", ["ascent", "hmc"])
def test_a_signal_handler_may_save_while_a_step_is_undone(sampler: str, how: str) -> None:
    """However a step ends that is none, and in perturbed(): all that is saved is what was before it."""
    task = Task(sampler)
    task.step()
    before = copy.deepcopy((task.net.state_dict(), task.optimizer.state_dict()))
    seen: list[Both] = []
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError

    def broken() -> None:
        if how == "error":
            task.step(fails)
        elif how == "perturbed":
            with task.optimizer.perturbed():
                fails()
        else:
            for sample in task.optimizer.samples():
                with sample:
                    sample.record(backward(task.loss()))
                if sample.index == 1:
                    break
            if how == "abandoned":
                first, second = (cast("Generator[Any]", task.optimizer.samples()) for _ in range(2))
                next(first)
                next(second)  # which undoes the first
                first.close()
                assert same(task.saved(), before)
                second.close()

    with signals_at_every_line(task, seen), suppress(ZeroDivisionError):
        broken()
    assert len(seen) > 50
    assert all(same(both, before) for both in seen)
    assert same((task.net.state_dict(), task.optimizer.state_dict()), before)


@pytest.mark.parametrize("sampler", ["ascent", "hmc"])
def test_outside_a_step_it_is_the_module_s_own(sampler: str) -> None:
    task = Task(sampler)
    for look in ("fresh", "after a step", "estimated"):
        if look == "after a step":
            task.step()
        elif look == "estimated":  # the passes are over: the buffers have moved, and the next call may skip the step
            task.optimizer.estimate_gradient(lambda: backward(task.loss()))
        shown, own = task.optimizer.original_state_dict(task.net), task.net.state_dict()
        assert list(shown) == list(own)
        assert all(shown[name].data_ptr() == own[name].data_ptr() for name in own)
        assert shown._metadata == own._metadata  # type: ignore[attr-defined]


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inside_perturbed_it_is_what_was_outside(sampler: str) -> None:
    task = Task(sampler)
    task.step()
    before = copy.deepcopy((task.net.state_dict(), task.optimizer.state_dict()))
    with task.optimizer.perturbed():
        both = task.saved()
        moved = copy.deepcopy(task.net.state_dict())
    assert same(both[0], before[0])
    assert sampler == "fresh" or same(both[1], before[1])
    if sampler != "sam":  # which moves along a gradient alone
        assert not same(moved, before[0])
    assert same(task.saved()[0], before[0])


def test_between_first_and_second_step() -> None:
    task = Task("sam")
    task.step()
    before = copy.deepcopy((task.net.state_dict(), task.optimizer.state_dict()))
    task.net.eval()
    task.loss().backward()
    task.optimizer.first_step(zero_grad=True)
    assert not same(task.net.state_dict(), before[0])
    assert same(task.saved(), before)
    task.loss().backward()
    assert same(task.saved(), before)
    task.optimizer.second_step()
    assert same(task.saved()[0], task.net.state_dict())
    assert not same(task.net.state_dict(), before[0])


@pytest.mark.parametrize("sampler", ["ascent", "hmc"])
def test_after_an_exception_it_is_the_module_s_own(sampler: str) -> None:
    """What the optimizer still holds of the broken step says nothing: the parameters may change meanwhile."""
    task = Task(sampler)
    task.step()

    def closure() -> Tensor:
        backward(task.loss())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        task.optimizer.step(closure)
    for p in task.net.parameters():
        p.data.zero_()
    task.net[1].running_mean.zero_()
    weights, _ = task.saved()
    assert same(weights, task.net.state_dict())


def test_wrapped_modules_views_and_foreign_entries() -> None:
    """Prefixes, an outer module, a hook that hands out a part, tied weights stay tied, an entry of another kind."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.head = nn.DataParallel(inner), nn.Linear(2, 2)

        def get_extra_state(self) -> Any:
            return {"version": 3}

    task = Task("ascent")
    outer = Outer(task.net)

    def part(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}part"] = state[f"{prefix}0.weight"][1:3, 2:]
        state[f"{prefix}computed"] = state[f"{prefix}0.weight"] * 1.0

    task.net._register_state_dict_hook(part)
    before = copy.deepcopy(outer.state_dict())
    seen: list[dict[str, Any]] = []
    task.step(lambda: seen.append(task.optimizer.original_state_dict(outer)))
    for shown in seen:
        computed = shown.pop("inner.module.computed")
        assert computed.shape == (4, 4)  # as it is, which the docstring says
        assert same(shown, {name: value for name, value in before.items() if not name.endswith("computed")})
    last = seen[-1]
    tied = [last[f"inner.module.{i}.weight"] for i in (0, 3)]
    assert tied[0] is tied[1]
    assert tied[0].data_ptr() != task.first.weight.data_ptr()
    assert last["inner.module.foreign"].data_ptr() == task.net.foreign.data_ptr()


def test_it_asks_for_a_module() -> None:
    task = Task("ascent")
    with pytest.raises(TypeError, match=r"TSAM: model: got dict, expected a torch.nn.Module"):
        task.optimizer.original_state_dict({})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_and_layout(problem, dtype: torch.dtype) -> None:
    task = problem(dtype=torch.float32)
    extra = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).to(dtype))
    task.net.register_parameter("extra", extra)
    optimizer = TSAM(task.net.parameters(), lr=0.1, rho=0.3, seed=1, num_samples=3)
    before = copy.deepcopy(task.net.state_dict())
    seen: list[dict[str, Any]] = []

    def closure() -> Tensor:
        loss = task.loss() + extra.float().square().sum()
        loss.backward()
        seen.append(optimizer.original_state_dict(task.net))
        return loss

    optimizer.step(closure)
    assert all(same(shown, before) for shown in seen)
    assert seen[0]["extra"].stride() == extra.stride()
