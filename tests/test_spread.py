"""Lists over several devices: the same step as on one, and no device ever gets a tensor of another.

No machine here has two GPUs. Which device a tensor lies on is what ``place_of`` says, so that parameters on the CPU can
be told apart as if they lay on several: that shows the sums, the stages and the copies of the scalars. That nothing is
left on a wrong device is shown with fake tensors on two real ones, whose ops refuse a mixture. Where there is a GPU,
tests/test_cuda.py trains on it and the CPU together, and on two of them.
Laws: the same parameters and diagnostics as on one device, to the rounding of sums taken in another order; after an
exception at any call every bit of the parameters, and the next step as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tsam_ext import TSAM, _ops, base, functional
from tsam_ext.engine import spread
from tsam_ext.engine.checks import NOISES
from tsam_ext.engine.spread import STAGES, Spread
from tsam_ext.engine.state import CHAIN_SLOTS, DIRECTION_SLOTS
from tsam_ext.functional import new_state

SAMPLERS: dict[str, dict[str, Any]] = {
    "noise": {"sampler": "noise", "antithetic": True, "num_samples": 4},
    "noise sphere": {"sampler": "noise", "noise": "sphere", "tilt": float("inf")},
    "noise ball split": {"sampler": "noise", "noise": "ball", "batch": "split"},
    "ascent": {"noise": "sphere", "adaptive": True},
    "sam": {"radius": 0.0, "num_samples": 1},
    "hmc": {"sampler": "hmc", "num_leapfrog_steps": 2, "delta": 40.0, "burn_in": 1},
    "hmc auto": {"sampler": "hmc", "delta": "auto", "adaptive": True, "chain": "fresh"},
    # A long step meets the wall so often that rounding grows a thousandfold each trajectory.
    "hmc ball": {"sampler": "hmc", "prior": "ball", "num_leapfrog_steps": 3, "delta": 40.0, "step_size": 0.5},
    "hmc fresh ball": {"sampler": "hmc", "prior": "ball", "chain": "fresh", "recycle": True, "num_leapfrog_steps": 2},
    "hmc recycle": {"sampler": "hmc", "recycle": True, "num_leapfrog_steps": 3, "delta": 40.0},
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS)
DIAGNOSTICS = ("losses", "weights", "ess", "tilted_loss", "gradient_norms", "energy_errors", "distance", "step_size")


def pretend(monkeypatch: pytest.MonkeyPatch, places: dict[Tensor, int]) -> None:
    """From here on tensors lie on the devices that ``places`` numbers; others on device 0."""
    monkeypatch.setattr(spread, "place_of", lambda tensor: places.get(tensor, 0))


def three_places(parameters: list[Tensor]) -> dict[Tensor, int]:
    """Every parameter on another device than the one before; the last has nothing that moves."""
    return {parameter: i % 2 if i < len(parameters) - 1 else 2 for i, parameter in enumerate(parameters)}


def optimizer_of(task: Any, sampler: str) -> TSAM:
    *moving, last = task.parameters
    groups = [{"params": moving[:2], "rho": 0.3}, {"params": moving[2:]}, {"params": [last], "rho": 0.0}]
    return tsam(groups, **{"lr": 0.1, "momentum": 0.9, "rho": 0.5, "seed": 7, **SAMPLERS[sampler]})


@samplers
def test_several_devices_take_the_same_steps_as_one(problem: Any, sampler: str, monkeypatch: Any) -> None:
    here, there = problem(), problem()
    alone, several = optimizer_of(here, sampler), optimizer_of(there, sampler)
    places = three_places(there.parameters)
    for _ in range(4):
        here.train(alone, 1)
        with monkeypatch.context() as patch:
            pretend(patch, places)
            there.train(several, 1)
        torch.testing.assert_close(there.flat(), here.flat(), rtol=1e-11, atol=1e-11)
        for name in DIAGNOSTICS:
            mine, theirs = getattr(several.diagnostics, name), getattr(alone.diagnostics, name)
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11, equal_nan=True)
    if SAMPLERS[sampler].get("sampler") == "hmc":
        for mine, theirs in zip(several.chain_position(), alone.chain_position(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


class Calls(TorchDispatchMode):
    """Counts the calls of our ops; ``look`` sees each, before it runs."""

    def __init__(self, look: Callable[[Any, tuple[Any, ...]], None] = lambda op, args: None) -> None:
        super().__init__()
        self.look, self.number = look, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if op.namespace == "tsam":
            self.look(op, args)
            self.number += 1
        return op(*args, **(kwargs or {}))


class Interrupt(Calls):
    """A Ctrl-C once, before or after (``late``) call number ``stop``."""

    def __init__(self, stop: int, late: bool) -> None:
        super().__init__()
        self.stop, self.late = stop, late

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        due = op.namespace == "tsam" and self.number == self.stop
        if due:
            self.stop = -1
        if due and not self.late:
            raise KeyboardInterrupt
        result = super().__torch_dispatch__(op, types, args, kwargs)
        if due:
            raise KeyboardInterrupt
        return result


@samplers
def test_a_device_gets_its_own_tensors_and_its_own_scalars(problem: Any, sampler: str, monkeypatch: Any) -> None:
    task = problem()
    optimizer, places = optimizer_of(task, sampler), three_places(task.parameters)
    pretend(monkeypatch, places)
    place_at = {parameter.data_ptr(): place for parameter, place in places.items()}
    scalars: dict[int, set[int]] = {}  # memory of a state or chain -> the devices whose tensors came with it

    def look(op: Any, args: tuple[Any, ...]) -> None:
        lists = [value for value in args if isinstance(value, list)]
        found = {place_at[t.data_ptr()] for value in lists for t in value if getattr(t, "data_ptr", int)() in place_at}
        assert len(found) < 2, op
        for value in args:
            if isinstance(value, Tensor) and value.numel() >= min(CHAIN_SLOTS, 16):
                scalars.setdefault(value.data_ptr(), set()).update(found)

    with Calls(look):
        optimizer.step(task.closure(optimizer))
    assert all(len(devices) < 2 for devices in scalars.values())
    assert set.union(*scalars.values()) >= {0, 1}


class Twin(nn.Module):
    """A net on two devices, whose weights nobody has drawn."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(5, 5, device=device)) for device in devices)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x.to(weight.device) @ weight)
        return x.square().mean()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without memory, on devices that the process need not have."""
    monkeypatch.setattr(base, "check_parameters", lambda named: None)  # it looks at addresses
    with FakeTensorMode():
        yield


@samplers
@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu", "meta")])
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.usefixtures("fake")
def test_no_op_gets_tensors_of_two_devices(sampler: str, devices: tuple[str, ...]) -> None:
    net = Twin(*devices)
    optimizer = tsam(net.parameters(), lr=0.1, seed=1, **SAMPLERS[sampler])
    x = torch.empty(6, 5)

    def closure() -> Tensor:
        loss = net(optimizer.part(x))
        loss.backward()
        return loss

    for _ in range(2):
        assert optimizer.step(closure).device == torch.device(devices[-1])
    assert [p.grad.device for p in net.weights if p.grad is not None] == [torch.device(name) for name in devices]
    assert optimizer.diagnostics.weights.device == torch.device(devices[0])


@pytest.mark.usefixtures("fake")
def test_one_call_with_tensors_of_two_devices_is_refused() -> None:
    """What the test above relies on."""
    one, other = torch.empty(3), torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"tsam.restore_: position\[1\]: got a tensor on meta, expected one on cpu"):
        _ops.restore_([one, other], [one, other])


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("sampler", ["ascent", "noise ball split", "hmc ball"])
def test_an_interrupt_at_any_call_changes_nothing(problem: Any, sampler: str, late: bool, monkeypatch: Any) -> None:
    """A Ctrl-C before or after each call of an op in turn, between the calls of two devices too."""
    task, undisturbed = problem(), problem()
    optimizer, expected = optimizer_of(task, sampler), optimizer_of(undisturbed, sampler)
    places = three_places(task.parameters) | three_places(undisturbed.parameters)
    pretend(monkeypatch, places)
    task.train(optimizer, 1)
    undisturbed.train(expected, 1)
    before = task.copies()
    with Calls() as calls:
        undisturbed.train(expected, 1)
    assert calls.number > 20
    for stop in range(calls.number):
        with pytest.raises(KeyboardInterrupt), Interrupt(stop, late):
            task.train(optimizer, 1)
        assert task.holds(before), stop
    task.train(optimizer, 1)
    assert all(map(torch.equal, task.copies(), undisturbed.copies()))


def test_a_loss_may_lie_on_any_of_the_devices_and_on_no_other(problem: Any, monkeypatch: Any) -> None:
    task = problem()
    optimizer = optimizer_of(task, "ascent")
    pretend(monkeypatch, three_places(task.parameters))
    items = optimizer.samples()
    item = next(items)
    with (
        pytest.raises(ValueError, match=r"loss: got a tensor on meta, expected one on cpu and cpu and cpu, as"),
        item,
    ):
        item.record(torch.zeros((), device="meta"))


def test_a_captured_step_needs_one_device(problem: Any, monkeypatch: Any) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, capturable=True, same_masks=False)
    pretend(monkeypatch, three_places(task.parameters))
    with pytest.raises(
        ValueError, match="capturable: got True with parameters on cpu and cpu and cpu, expected False, or"
    ):
        task.train(optimizer, 1)


@pytest.mark.parametrize("noise", NOISES)
def test_the_list_ops_take_lists_over_several_devices(noise: str, monkeypatch: Any) -> None:
    """A step by hand, the state on a device of its own."""
    torch.manual_seed(3)
    start = [torch.randn(n, dtype=torch.float64) for n in (7, 0, 130, 1, 64)]
    gradients = [torch.randn_like(x) for x in start]

    def step(places: list[int]) -> list[Tensor]:
        position = [x.clone() for x in start]
        saved, mean = ([torch.empty_like(x) for x in start] for _ in range(2))
        state, found = new_state(2), []
        lists = (position, saved, gradients, mean)
        with monkeypatch.context() as patch:
            pretend(
                patch, {t: place for tensors in lists for t, place in zip(tensors, places, strict=True)} | {state: 9}
            )
            functional.tilt_begin_(state, 2.0)
            for sample in range(2):
                functional.perturb_(position, saved, state, 0.3, seed=5, sample=sample, kind=noise, save=sample == 0)
                functional.grad_norm_(gradients, saved, state, adaptive=True, row=sample)
                functional.ascend_(position, saved, gradients, state, 0.5, adaptive=True)
                found += [x.clone() for x in position]
                functional.tilt_update_(state, 0.5 * sample, sample)
                functional.accumulate_(mean, gradients, state)
            functional.restore_(position, saved)
        assert all(map(torch.equal, position, start))
        return [*found, *mean, state[: new_state(2).numel()].nan_to_num(7.0)]

    for mine, theirs in zip(step([0, 1, 2, 0, 1]), step([9] * 5), strict=True):
        torch.testing.assert_close(mine[:15], theirs[:15], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(mine[16:], theirs[16:], rtol=1e-13, atol=1e-13)  # 15: between stages


def test_every_op_with_a_stage_is_called_in_stages() -> None:
    """The table of stages against the schemas, so that no op's sum can be one device's alone."""
    ops = [getattr(torch.ops.tsam, name).default for name in _ops.LIST_OPS]
    staged = {op for op in ops if any(argument.name == "stage" for argument in op._schema.arguments)}
    assert staged == STAGES.keys()
    for op, stages in STAGES.items():
        number, scalars = torch.zeros((), dtype=torch.float64), torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
        values: dict[str, Any] = {"loss": number, "tilt": number, "delta": number, "state": scalars, "chain": scalars}
        values["direction"] = torch.zeros(DIRECTION_SLOTS, dtype=torch.float64)
        values |= {"float": 0.0, "int": 0, "bool": False}
        schema = op._schema.arguments[:-1]
        arguments = [values.get(argument.name, values.get(str(argument.type), [])) for argument in schema]
        op(*arguments, stages - 1)
        with pytest.raises(ValueError, match=rf"stage: got {stages}, expected an integer from -1 to {stages - 1}"):
            op(*arguments, stages)


def test_a_spread_of_nothing_is_the_cpu() -> None:
    assert Spread([]).devices == [torch.device("cpu")]
    assert Spread([]).alone
    assert str(Spread([torch.empty(1, device="meta"), torch.empty(1)])) == "meta and cpu"
