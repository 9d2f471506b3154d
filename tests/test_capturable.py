"""Steps counted on the device: what a replayed CUDA graph would do is what the next step does.

Nothing can be captured without a GPU. What a replay needs can be seen without: two steps launch the same ops with the
same arguments, numbers and memory, so that all that differs between them lies in memory that the ops themselves read.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tsam_ext import TSAM, _cuda
from tsam_ext.base import make_capturable, with_capturable
from tsam_ext.chain import Chain
from tsam_ext.engine.state import Slot
from tsam_ext.functional import new_state, perturb_, tilt_begin_

SAMPLERS: dict[str, dict[str, Any]] = {
    "noise": {"sampler": "noise", "noise": "ball", "antithetic": True},
    "ascent": {"sampler": "ascent", "noise": "sphere"},
    "split": {"sampler": "noise", "batch": "split", "num_samples": 2},
    "hmc": {"sampler": "hmc", "num_leapfrog_steps": 2, "delta": 3.0},
    "hmc fresh ball": {"sampler": "hmc", "chain": "fresh", "prior": "ball", "recycle": True, "num_leapfrog_steps": 2},
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS)


def optimizer_of(task: Any, sampler: str, capturable: bool, **options: Any) -> TSAM:
    settings = {"lr": 0.1, "momentum": 0.9, "seed": 7, **SAMPLERS[sampler], **options}
    if capturable or settings["sampler"] != "hmc":
        settings |= {"same_masks": False}
    return tsam(task.parameters, capturable=capturable, **settings)


@samplers
def test_steps_counted_on_the_device_are_the_same_steps(problem: Any, sampler: str) -> None:
    here, there, third = problem(), problem(), problem()
    host, device = optimizer_of(here, sampler, False), optimizer_of(there, sampler, True)
    here.train(host, 3)
    there.train(device, 3)
    assert all(map(torch.equal, here.copies(), there.copies()))
    assert device.state_dict()["param_groups"][0]["tsam_step"] == 3
    # A checkpoint goes from one way of counting to the other.
    resumed = optimizer_of(third, sampler, True)
    with torch.no_grad():
        for parameter, value in zip(third.parameters, here.copies(), strict=True):
            parameter.copy_(value)
    resumed.load_state_dict(copy.deepcopy(host.state_dict()))
    here.train(host, 2)
    third.train(resumed, 2)
    assert all(map(torch.equal, here.copies(), third.copies()))


class Calls(TorchDispatchMode):
    """What each op is called with: numbers as they are, a tensor by its place if it outlives the step."""

    def __init__(self, lasting: list[Tensor]) -> None:
        super().__init__()
        self.lasting = {tensor.data_ptr() for tensor in lasting}
        self.calls: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not str(op).startswith("profiler"):
            self.calls.append(f"{op} {self.shown((args, kwargs or {}))}")
        return op(*args, **(kwargs or {}))

    def shown(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = value.data_ptr() if value.data_ptr() in self.lasting else None
            return (place, tuple(value.shape), value.dtype)
        if isinstance(value, dict):
            return {name: self.shown(item) for name, item in value.items()}
        return [self.shown(item) for item in value] if isinstance(value, (list, tuple)) else value


def lasting(optimizer: TSAM) -> list[Tensor]:
    chain = optimizer._progress.sampler_state
    counter = [optimizer._progress.step] if isinstance(optimizer._progress.step, Tensor) else []
    kept: list[Tensor] = []
    if isinstance(chain, Chain):
        kept = [*chain.momenta.values(), *itertools.chain(*chain.positions.values()), chain.scalars]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    base = [x for held in optimizer.base_optimizer.state.values() for x in held.values() if isinstance(x, Tensor)]
    scratch = [copy for _, copy in optimizer._progress.scratch.values()]
    return [*parameters, *scratch, *base, *kept, *counter]


def calls_of_two_steps(task: Any, optimizer: TSAM) -> list[list[str]]:
    task.train(optimizer, 1)
    found = []
    for _ in range(2):
        with Calls(lasting(optimizer)) as recorded:
            task.train(optimizer, 1)
        found.append(recorded.calls)
    return found


@samplers
def test_two_steps_make_the_same_calls(problem: Any, sampler: str) -> None:
    task = problem()
    first, second = calls_of_two_steps(task, optimizer_of(task, sampler, True))
    assert sum("tsam" in call for call in first) > 3
    assert first == second
    # A number from the host is a copy that a capture refuses, and a step on a GPU waits for.
    assert not [call for call in first if call.startswith("aten.lift_fresh")]
    # Counted on the host, the step is an argument of whatever draws.
    task = problem()
    first, second = calls_of_two_steps(task, optimizer_of(task, sampler, False))
    assert first != second


def test_an_op_finds_the_step_in_the_state() -> None:
    x = [torch.zeros(37)]
    saved, state = [torch.empty(37)], new_state(0)

    def drawn(step: int | None, held: float) -> Tensor:
        x[0].zero_()
        state[Slot.STEP] = held
        perturb_(x, saved, state, 1.0, seed=3, step=step, kind="ball")
        return x[0].clone()

    for held, step in ((0.0, 0), (5.0, 5), (2.0**32 - 1, 2**32 - 1), (2.0**32 + 9, 9), (float("nan"), 0), (-1.0, 0)):
        assert torch.equal(drawn(None, held), drawn(step, 12.0))
    assert not torch.equal(drawn(None, 5.0), drawn(None, 6.0))


def test_a_step_begins_without_losing_count() -> None:
    state = new_state(1)
    state[Slot.STEP] = 41.0
    tilt_begin_(state, 1.0)
    assert state[Slot.STEP] == 41.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "same_masks: got True, expected False, as capturable is True"),
        ({"same_masks": False, "every": 2}, "every: got 2, expected 1, as capturable is True"),
        ({"same_masks": False, "tilt": lambda step: 1.0}, "tilt: got a function, .*as capturable is True"),
    ],
)
def test_what_a_replay_cannot_do_is_refused(problem: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tsam(problem().parameters, lr=0.1, capturable=True, **options)


def base_with(group: dict[str, Any]) -> Any:
    return SimpleNamespace(param_groups=[group], defaults={})


def test_a_base_counts_on_the_device_too() -> None:
    class OnGpu:
        device = torch.device("cuda:0")

    for capturable, own in ((True, False), (None, False), (False, True)):
        group = {"params": [OnGpu()]} | ({} if capturable is None else {"capturable": capturable})
        make_capturable(base_with(group), own=own)
        assert group.get("capturable") is (None if capturable is None else True)
    with pytest.raises(ValueError, match=r"param_groups\[0\].capturable: got False, expected True"):
        make_capturable(base_with({"params": [OnGpu()], "capturable": False}), own=False)
    on_cpu = {"params": [torch.ones(())], "capturable": False}
    make_capturable(base_with(on_cpu), own=True)
    assert on_cpu["capturable"] is False  # torch's optimizers refuse it there


def test_a_capture_needs_a_counter_and_a_chain(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem()
    host, device = optimizer_of(task, "noise", False), optimizer_of(task, "hmc", True)
    monkeypatch.setattr(_cuda, "capturing", lambda device: True)
    before = task.copies()
    with pytest.raises(RuntimeError, match="needs capturable=True"):
        task.train(host, 1)
    with pytest.raises(RuntimeError, match="needs a step before the capture"):
        task.train(device, 1)
    assert all(map(torch.equal, before, task.copies()))


@pytest.mark.parametrize("sampler", ["ascent", "hmc"])
def test_an_exception_under_capture_launches_nothing(
    problem: Any, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was captured has not run, and a capture that is ending takes no more: only the host's side is put back."""
    task = problem()
    optimizer = optimizer_of(task, sampler, True)
    task.train(optimizer, 2)
    monkeypatch.setattr(_cuda, "capturing", lambda device: True)
    buffers = [parameter.grad for parameter in task.parameters]
    calls = Calls([])

    def closure() -> Tensor:
        calls.calls.clear()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), calls:
        optimizer.step(closure)
    assert not calls.calls
    assert all(parameter.grad is buffer for parameter, buffer in zip(task.parameters, buffers, strict=True))


def test_a_checkpoint_does_not_say_where_a_base_counts() -> None:
    groups = [{"capturable": True, "lr": 1.0}, {"lr": 1.0}]
    state = {"state": {}, "param_groups": [{"capturable": False, "lr": 2.0}, {"lr": 3.0}]}
    loaded = with_capturable(state, groups)
    assert loaded["param_groups"] == [{"capturable": True, "lr": 2.0}, {"lr": 3.0}]
    assert state["param_groups"][0]["capturable"] is False


def test_what_ends_well_under_capture_goes_back(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """perturbed() and SAM's two steps end by a restore that is part of the graph."""
    for sampler in ("ascent", "hmc"):
        task = problem()
        optimizer = optimizer_of(task, sampler, True, lr=0.0)
        task.train(optimizer, 1)
        before, chain = task.copies(), optimizer._progress.sampler_state
        scalars = chain.scalars.clone() if isinstance(chain, Chain) else None
        with monkeypatch.context() as patch:
            patch.setattr(_cuda, "capturing", lambda device: True)
            with optimizer.perturbed():
                assert not all(map(torch.equal, before, task.copies()))
            assert all(map(torch.equal, before, task.copies()))
            assert scalars is None or torch.equal(chain.scalars, scalars)
    task = problem()
    sam = tsam(task.parameters, num_samples=1, radius=0.0, lr=0.0, capturable=True, same_masks=False)
    task.train(sam, 1)
    before = task.copies()
    monkeypatch.setattr(_cuda, "capturing", lambda device: True)
    sam.first_step()
    assert not all(map(torch.equal, before, task.copies()))
    sam.second_step()
    assert all(map(torch.equal, before, task.copies()))


@samplers
def test_loading_keeps_the_memory_that_a_graph_knows(problem: Any, sampler: str) -> None:
    task = problem()
    optimizer = optimizer_of(task, sampler, True, momentum=0.0)
    task.train(optimizer, 1)
    known = [tensor.data_ptr() for tensor in lasting(optimizer)]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert known == [tensor.data_ptr() for tensor in lasting(optimizer)]
