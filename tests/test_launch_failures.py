"""A launch that fails, whichever one of a step: everything is as before the step, and the next step as if nothing were.

Parameters by their bits (of two storage types, so that each pass is two launches), the random generator, the state dict
with the chain. Launches and loads are refused by the emulation (simt/simt.h): on a GPU they fail where they please.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import plain_state
from flat_options import tsam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tsam_ext import _C, TSAM
from tsam_ext.engine.state import CHAIN_SLOTS
from tsam_ext.functional import Slot, new_state

pytestmark = pytest.mark.emulated

RUNS: list[dict[str, Any]] = [
    {"sampler": "noise", "noise": "ball", "adaptive": True},
    {"sampler": "ascent"},
    {"sampler": "ascent", "radius": 0.0},
    {"sampler": "hmc", "delta": 20.0, "burn_in": 1},
    {"sampler": "hmc", "delta": "auto", "prior": "ball", "num_leapfrog_steps": 2},
    {"sampler": "hmc", "delta": 20.0, "num_leapfrog_steps": 2, "recycle": True},
]


def refuse(nth: int, count: int = 1) -> None:
    """Lets the nth launch from now on fail (1: the next), and those after it up to ``count``."""
    ctypes.CDLL(_C.__file__).simt_refuse(ctypes.c_uint64(nth), ctypes.c_uint64(count))


def launches(call: Callable[[], object]) -> int:
    count = ctypes.CDLL(_C.__file__).simt_launches
    count.restype = ctypes.c_uint64
    before = count()
    call()
    return int(count() - before)


class Mixed(nn.Module):
    """A net of float64 and float32 parameters, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7).double(), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(self.first(x).tanh(), 0.2).float())


def start(options: dict[str, Any], steps: int) -> tuple[tsam, Callable[[], Tensor]]:
    """An optimizer after some steps, and its closure; equal arguments give equal bits."""
    torch.manual_seed(0)
    net, x, y = Mixed(), torch.randn(12, 5).double(), torch.randint(0, 3, (12,))
    optimizer = tsam(net.parameters(), lr=0.1, momentum=0.9, rho=0.3, num_samples=2, seed=3, **options)

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer, closure


def everything(optimizer: TSAM) -> Any:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = [(p.tolist(), None if p.grad is None else p.grad.abs().sum().item()) for p in parameters]
    return values, torch.get_rng_state().tolist(), plain_state(optimizer)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_step_whose_nth_launch_fails_leaves_everything_as_it_was(options: dict[str, Any], steps: int) -> None:
    optimizer, closure = start(options, steps)
    count = launches(lambda: optimizer.step(closure))
    expected = everything(optimizer)
    assert count > 10
    for n in range(1, count + 1):
        optimizer, closure = start(options, steps)
        optimizer.zero_grad()
        before = everything(optimizer)
        refuse(n)
        with pytest.raises(RuntimeError, match="a kernel could not be launched"):
            optimizer.step(closure)
        assert everything(optimizer) == before, n
        optimizer.step(closure)
        assert everything(optimizer) == expected, n


def saving_ops(x: list[Tensor], state: Tensor) -> dict[str, Callable[[], None]]:
    """The ops that save, on lists like ``x``."""
    saved, grads = [torch.zeros_like(p) for p in x], [torch.ones_like(p) for p in x]
    buffers = [[torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in x] for _ in range(3)]
    ones, flags, base = [1.0] * len(x), [False] * len(x), [8 * i for i in range(len(x))]
    chain = torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
    state[Slot.GRAD_NORM] = 1.0
    return {
        "perturb_": lambda: _C.perturb_(x, saved, state, ones, flags, base, 3, 1, 0, 1, 32, False, True),
        "ascend_": lambda: _C.ascend_(x, saved, grads, state, ones, flags, True),
        "norm_ascend_": lambda: _C.norm_ascend_(x, saved, grads, state, ones, flags, True, 0),
        "hmc_place_": lambda: _C.hmc_place_(
            x, saved, *buffers, chain, state, ones, flags, base, 3, 1, 32, 1, True
        ),
    }  # fmt: skip


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", ["perturb_", "ascend_", "norm_ascend_", "hmc_place_"])
def test_an_op_that_saves_moves_all_or_nothing(name: str) -> None:
    torch.manual_seed(0)
    x, state = [torch.randn(5).to(dtype) for dtype in DTYPES], new_state(1)
    start = [p.clone() for p in x]
    op = saving_ops(x, state)[name]
    count = launches(op)
    moved = [p.clone() for p in x]
    assert state[Slot.SAVES] == 1
    for n in range(1, count + 1):
        for p, value in zip(x, start, strict=True):
            p.copy_(value)
        state[Slot.SAVES] = 0.0
        refuse(n)
        with pytest.raises(RuntimeError, match="a kernel could not be launched"):
            op()
        assert all(map(torch.equal, x, start)) and state[Slot.SAVES] == 0, n
        op()
        assert all(map(torch.equal, x, moved)) and state[Slot.SAVES] == 1, n


@pytest.mark.parametrize("name", ["perturb_", "ascend_", "norm_ascend_", "hmc_place_"])
def test_a_second_failure_is_said(name: str) -> None:
    x, state = [torch.ones(5, dtype=dtype) for dtype in DTYPES], new_state(1)
    op = saving_ops(x, state)[name]
    refuse(launches(op), 2)  # the one that counts, and the first that puts back
    with pytest.raises(RuntimeError, match=r"launched: .*; and position could not be put back: .*launched"):
        op()


NOT_LOADED = """
import ctypes, torch
from tsam_ext import _C
from tsam_ext.functional import new_state

library = ctypes.CDLL(_C.__file__)
x, saved, state = [torch.ones(5)], [torch.zeros(5)], new_state(0)
library.simt_refuse_load(ctypes.c_uint64(20))
for attempt in range(2):
    try:
        _C.perturb_(x, saved, state, [1.0], [False], [0], 3, 1, 0, 0, 5, False, True)
    except RuntimeError as error:
        print(error, library.simt_launches(), x[0].eq(1).all().item())
print(saved[0].eq(1).all().item())
"""


def test_every_kernel_is_loaded_before_the_first_launch() -> None:
    """That none is launched unloaded the emulation sees to; the op after one that could not be loaded tries again."""
    done = subprocess.run([sys.executable, "-c", NOT_LOADED], capture_output=True, text=True, check=True)
    first, last = done.stdout.splitlines()
    assert first.startswith("tsam: a kernel could not be loaded") and first.endswith("0 True")
    assert last == "True"
