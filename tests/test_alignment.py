"""Lists of tensors that begin anywhere in memory: the bits of aligned ones, and nothing written beside them.

Views of a flat parameter and of a bucket of gradients begin at any element. Where all lists begin equally far from a
word, the first elements are peeled off; where they do not, lanes lie side by side (csrc/cuda/apply.cuh).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsam_ext import _C
from tsam_ext.engine.state import CHAIN_SLOTS, ChainSlot
from tsam_ext.functional import Slot, new_state

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One element, less than a word, a word and some, more than a turn of a block, more than its chunk.
SIZES = [1, 3, 13, 1120, 4099, 9000]
GUARD = 16
# How far the lists begin behind a word: alike, and each on its own.
OFFSETS = [(0, 0, 0), *((off, off, off) for off in range(1, 8)), (1, 0, 3), (0, 5, 0), (4, 0, 4)]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Lists:
    """Lists of the same numbers, each at an offset of its own, between guards that nobody may write."""

    def __init__(self, dtype: torch.dtype, offsets: tuple[int, int, int]) -> None:
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.x, self.saved, self.grads = (
            [self.put(n, dtype, off, seed + i) for i, n in enumerate(SIZES)]
            for seed, off in enumerate(offsets, start=10)
        )
        self.total = [self.put(n, wide(dtype), offsets[0], 90 + i) for i, n in enumerate(SIZES)]

    def put(self, n: int, dtype: torch.dtype, off: int, seed: int) -> Tensor:
        whole = torch.full((2 * GUARD + off + n,), 7.0, dtype=dtype)
        assert whole.data_ptr() % 16 == 0
        tensor = whole[GUARD + off : GUARD + off + n]
        self.memory.append((whole, tensor))
        return tensor.copy_(torch.randn(n, generator=torch.Generator().manual_seed(seed)))

    def guarded(self) -> bool:
        inside = ((tensor.storage_offset(), tensor.numel(), whole) for whole, tensor in self.memory)
        return all(bool((torch.cat([w[:begin], w[begin + n :]]) == 7.0).all()) for begin, n, w in inside)


def run(lists: Lists, base: list[int], rounding: int) -> dict[str, list[Tensor]]:
    """All passes that move elements; what depends on a sum is taken from a given norm."""
    out, n, state = {}, len(SIZES), new_state(2, CPU)
    flags = [i % 2 == 0 for i in range(n)]
    draw = ([0.3] * n, flags, base, 5, 2)

    def note(name: str, *moved: list[Tensor]) -> None:
        out[name] = [t.clone() for tensors in moved for t in tensors]
        assert lists.guarded(), name  # now: a later pass may put a guard back

    _C.tilt_begin_(state, torch.tensor(1.0))
    _C.perturb_(lists.x, lists.saved, state, *draw, 0, 0, sum(SIZES), False, True, rounding)
    note("perturbed", lists.x, lists.saved)
    _C.grad_norm_(lists.grads, lists.saved, state, flags, 0)
    norm = state[Slot.GRAD_NORM].clone()
    state[Slot.GRAD_NORM] = 4.0
    _C.ascend_(lists.x, lists.saved, lists.grads, state, [0.1] * n, flags, False, base, 5, 2, rounding)
    note("ascended", lists.x)
    for row in range(2):
        _C.tilt_update_(state, torch.tensor(0.5), 0.0, row, False, row == 1)
        _C.accumulate_(lists.total, lists.grads, state)
    note("mean", lists.total)
    sums = torch.zeros(3, dtype=torch.float64)
    _C.displacement_(lists.x, lists.saved, lists.grads, sums, [1.0] * n, flags)
    _C.restore_(lists.x, lists.saved)
    note("restored", lists.x)
    out["sums"] = [norm, sums]
    return out


@pytest.mark.parametrize("rounding", [-1, 2], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_list_has_the_bits_of_an_aligned_one(
    dtype: torch.dtype, offsets: tuple[int, int, int], rounding: int
) -> None:
    for shift in (0, offsets[0]):  # the noise begins with a quad, and where the memory does
        base = [10_000 * i + shift for i in range(len(SIZES))]
        lists = Lists(dtype, offsets)
        got, want = run(lists, base, rounding), run(Lists(dtype, (0, 0, 0)), base, rounding)
        for name, tensors in want.items():
            tolerance = 1e-12 if name == "sums" else 0.0
            for mine, theirs in zip(got[name], tensors, strict=True):
                torch.testing.assert_close(
                    mine, theirs, rtol=tolerance, atol=0.0, msg=lambda m, name=name: f"{name}: {m}"
                )


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trajectory_too(dtype: torch.dtype, offsets: tuple[int, int, int]) -> None:
    def trajectory(offsets: tuple[int, int, int]) -> tuple[list[Tensor], Tensor, bool]:
        lists, n, state = Lists(dtype, offsets), len(SIZES), new_state(1, CPU)
        wides = [[lists.put(m, wide(dtype), offsets[0], 50 + j) for m in SIZES] for j in range(4)]
        chain = torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
        chain[ChainSlot.LOG_STEP], chain[ChainSlot.DELTA] = -0.5, 3.0
        scale = ([0.5] * n, [False] * n, [10_000 * i for i in range(n)], 5, 2)
        _C.tilt_begin_(state, torch.tensor(3.0))
        _C.hmc_place_(lists.x, lists.saved, *wides[:3], chain, state, *scale, sum(SIZES), 0, True)
        moved = []
        for first in (True, False):
            where = (lists.x, lists.saved, wides[3], *wides[:3], lists.grads, chain)
            _C.hmc_leapfrog_(*where, *scale, 0, sum(SIZES), 0, 0.5, 1.0, first, True)
            moved += [t.clone() for t in (*lists.x, *wides[3], *wides[1])]
        end = ([0.5] * n, [False] * n, 5, 2, 0, sum(SIZES), 0, 0.5, 0, True, False, True)
        _C.hmc_end_(lists.saved, wides[3], lists.grads, chain, state, torch.tensor(0.1), *end)
        _C.hmc_carry_(lists.total, lists.saved, lists.grads, chain, state, True)
        moved += [t.clone() for t in (*lists.total, *lists.saved)]
        return moved, chain, lists.guarded()

    (got, chain, guarded), (want, aligned, _) = trajectory(offsets), trajectory((0, 0, 0))
    assert guarded
    torch.testing.assert_close(chain, aligned, rtol=1e-11, atol=1e-12, equal_nan=True)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1.0, 1e25])
def test_a_norm_of_gradients_that_float32_cannot_square(size: float) -> None:
    """In all warps of a block and in several blocks; where most are zero too."""
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)).mul(size) for n in SIZES]
    grads[-1][:8000] = 0.0
    state = new_state(1, CPU)
    _C.grad_norm_(grads, grads, state, [False] * len(grads), 0)
    assert state[Slot.GRAD_NORM].item() == pytest.approx(torch.cat(grads).double().norm().item(), rel=1e-12)
