"""What a step may cost beside the gradients: no host sync, and memory that does not grow with the samples.

Counted, not timed: every op of a step passes a dispatch mode; live bytes are those of storages made and still alive.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch.utils._python_dispatch import TorchDispatchMode

from tsam_ext import TSAM

SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique", "masked_select", "_to_copy")


class NoSync(TorchDispatchMode):
    """Fails on every op that reads a tensor's value on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in SYNCS:
            raise AssertionError(f"{name} inside a step")
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes alive at once in storages that ops inside have returned."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("sampler", ["noise", "ascent", "hmc"])
@pytest.mark.parametrize("batch", ["whole", "split"])
@pytest.mark.parametrize("tilt", [1.0, "tensor", "schedule"])
def test_an_estimate_never_syncs(problem, sampler: str, batch: str, tilt: Any) -> None:
    task = problem()
    options: dict[str, Any] = {"batch": batch}
    if sampler == "hmc":  # it takes whole batches alone; the other case is the rule for delta
        options, batch = {"delta": "auto" if batch == "split" else None}, "whole"
    tilts = {"tensor": torch.tensor(2.0, dtype=torch.float64), "schedule": float}
    optimizer = tsam(task.parameters, lr=0.1, sampler=sampler, tilt=tilts.get(tilt, tilt), **options)
    with NoSync():
        for _ in range(2):
            optimizer.estimate_gradient(task.closure(optimizer) if batch == "whole" else split_closure(task, optimizer))
            optimizer.apply()


def split_closure(task: Any, optimizer: TSAM) -> Any:
    def closure() -> torch.Tensor:
        x, y = optimizer.part(task.x, task.y)
        loss = task.loss(x, y)
        loss.backward()
        return loss

    return closure


def test_the_sync_check_sees_a_planted_item(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)

    def closure() -> torch.Tensor:
        loss = task.loss()
        loss.backward()
        loss.detach().item()
        return loss

    with pytest.raises(AssertionError, match="_local_scalar_dense inside a step"), NoSync():
        optimizer.estimate_gradient(closure)


def extra_parameters_held(sampler: str, num_samples: int, dtype: torch.dtype) -> float:
    """Peak bytes of one step beyond those of the gradient alone, in units of the parameters' bytes."""
    parameter = torch.nn.Parameter(torch.randn(100_000, dtype=dtype))
    optimizer = tsam([parameter], lr=0.1, sampler=sampler, num_samples=num_samples)

    def closure() -> torch.Tensor:
        parameter.grad = torch.ones_like(parameter)  # the only memory that a gradient costs here
        return torch.zeros((), dtype=dtype)

    gc.collect()
    with LiveBytes() as live:
        optimizer.estimate_gradient(closure)
    return live.peak / (parameter.numel() * parameter.element_size()) - 1


@pytest.mark.parametrize("sampler", ["noise", "ascent"])
def test_extra_memory_is_two_parameters_whatever_the_samples(sampler: str) -> None:
    few, many = (extra_parameters_held(sampler, s, torch.float32) for s in (2, 8))
    # The saved copy and the accumulator; a few hundred bytes of state beside them.
    assert few == pytest.approx(2.0, abs=0.01)
    assert many == pytest.approx(few, abs=0.01)
    assert extra_parameters_held(sampler, 1, torch.float32) == pytest.approx(1.0, abs=0.01)


def test_extra_memory_of_hmc() -> None:
    """The saved copy, three positions, momentum, the carried gradient, the accumulator; whatever s and N are."""
    for s in (2, 8):
        assert extra_parameters_held("hmc", s, torch.float32) == pytest.approx(7.0, abs=0.01)


def test_between_steps_only_the_copy_stays() -> None:
    parameter = torch.nn.Parameter(torch.randn(1000))
    optimizer = tsam([parameter], lr=0.1)

    def closure() -> torch.Tensor:
        parameter.grad = torch.ones_like(parameter)
        return torch.zeros(())

    optimizer.step(closure)
    assert parameter.grad is not None
    gradient = weakref.ref(parameter.grad.untyped_storage())
    optimizer.zero_grad()
    assert gradient() is None
