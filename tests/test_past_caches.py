"""Lists above 16 MiB, whose copies go past the caches: the same bits as tensor by tensor, where none do.

Law: how a list is cut never changes an elementwise result; here with tensors that begin and end inside a cache line.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tsam_ext import _C
from tsam_ext.engine.state import CHAIN_SLOTS, ChainSlot, new_state

SIZES = (3_000_001, 70_003, 0, 1_999_999)  # of float32 20 MB
OFFSETS = (0, 5, 0, 3)
Lists = list[list[Tensor]]


def lists(count: int, dtype: torch.dtype, scale: int) -> Lists:
    """The same numbers at each call."""
    torch.manual_seed(6)
    return [
        [torch.randn(scale * n + off).to(dtype)[off:] for n, off in zip(SIZES, OFFSETS, strict=True)]
        for _ in range(count)
    ]


def state_after(losses: int) -> Tensor:
    state = new_state(losses)
    _C.grad_norm_([torch.ones(4)], [torch.ones(4)], state, [False], 0)
    _C.tilt_begin_(state, torch.tensor(2.0))
    for row in range(losses):
        _C.tilt_update_(state, torch.tensor(0.3 + 0.4 * row), 0.0, row, False, False)
    return state


def saving_ascent(x: Lists) -> None:
    n = len(x[0])
    _C.ascend_(x[0], x[1], x[2], state_after(1), [0.3] * n, [True] * n, True)


def assignment(x: Lists) -> None:
    _C.accumulate_(x[3], x[0], state_after(1))


def restoring(x: Lists) -> None:
    _C.restore_(x[0], x[1])


def chain_start(x: Lists) -> None:
    n = len(x[0])
    chain = torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
    _C.hmc_place_(x[0], x[1], *x[3:], chain, state_after(1), [0.3] * n, [False] * n, [0] * n, 1, 0, 1000, 0, False)


def carrying(counted: int) -> Callable[[Lists], None]:
    def run(x: Lists) -> None:
        chain = torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
        chain[ChainSlot.TAKEN] = 1.0
        _C.hmc_carry_(x[3], x[0], x[1], chain, state_after(counted), True)
        assert all(map(torch.equal, x[0], x[1])), "the chain goes on with the proposal's gradient"

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [saving_ascent, assignment, restoring, chain_start, carrying(1), carrying(2)])
def test_a_large_list_has_the_bits_of_its_tensors_alone(op: Callable[[Lists], None], dtype: torch.dtype) -> None:
    scale = 4 // dtype.itemsize

    def made() -> Lists:
        wide = [[x + 1 for x in tensors] for tensors in lists(3, torch.float32, scale)]
        return lists(3, dtype, scale) + wide

    together, alone = made(), made()
    assert sum(x.nbytes for x in together[0]) > 16 << 20
    op(together)
    for i in range(len(SIZES)):
        if alone[0][i].numel():
            single = [[tensors[i]] for tensors in alone]
            # A third of the largest, so that not even that goes past the caches.
            for part in range(3):
                op([[x[0].chunk(3)[part]] for x in single])
    for role, (got, want) in enumerate(zip(together, alone, strict=True)):
        assert all(map(torch.equal, got, want)), role
    assert not all(map(torch.equal, (t for x in together for t in x), (t for x in made() for t in x)))
