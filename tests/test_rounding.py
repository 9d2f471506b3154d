"""Stochastic rounding of bfloat16 and float16 positions.

Laws: each op writes round(x) by the word of its element, with the bits of the reference, where x is what it writes into
float32 tensors; right in the mean; infinite where nearest is, and there alone; the same bits however a list is cut and
for every thread count; nothing else changes, and to nearest nothing at all.
False alarms: a mean is compared at 5.5 standard errors, 4e-8 for each of at most twenty: below 1e-6 a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tsam_ext import _C
from tsam_ext.engine.state import CHAIN_SLOTS, ChainSlot, Slot, new_state
from tsam_ext.functional import ascend_, perturb_
from tsam_ext.reference import round_stochastically, rounding_words

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("dtype", HALVES)
SEED, STEP, NUMBER = 2**63 - 7, 9, 4
NEAREST = -1
ERRORS = 5.5


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype in HALVES else torch.int32)


def rounded(x: Tensor, base: int, dtype: torch.dtype, number: int = NUMBER) -> Tensor:
    """What the reference makes of float32 values in storage order."""
    return round_stochastically(x, rounding_words(x.numel(), base, SEED, STEP, number, "cpu"), dtype)


class Lists:
    """Tensors of a storage type, and of float32 the same values."""

    SIZES, BASE = (70_001, 5, 0, 1, 66_000), (0, 70_007, 70_012, 70_013, 2**40 + 2)

    def __init__(self, dtype: torch.dtype, size: float) -> None:
        generator = torch.Generator().manual_seed(3)
        self.dtype, self.n = dtype, len(self.SIZES)
        self.values = [[(size * torch.randn(n, generator=generator)).to(dtype) for n in self.SIZES] for _ in range(2)]
        self.x = [[torch.randn(n, generator=generator) for n in self.SIZES] for _ in range(4)]

    def made(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Positions, room for copies, gradients."""
        position, grads = ([t.to(dtype, copy=True) for t in tensors] for tensors in self.values)
        return position, [torch.zeros_like(p) for p in position], grads


Op = Callable[[Lists, torch.dtype, float, int], list[Tensor]]


def by_perturb(noise: int, save: bool) -> Op:
    def run(lists: Lists, dtype: torch.dtype, size: float, rounding: int) -> list[Tensor]:
        position, saved, _ = lists.made(dtype)
        if not save:
            position, saved = saved, position
        flags, d = [True, False] * 2 + [False], sum(lists.SIZES)
        scale, state = [40.0 if adaptive else 40.0 * size for adaptive in flags], new_state(1)
        where = (list(lists.BASE), SEED, STEP, 3, noise, d, True)
        _C.perturb_(position, saved, state, scale, flags, *where, save, rounding)
        return position

    return run


def by_merged(lists: Lists, dtype: torch.dtype, size: float, rounding: int) -> list[Tensor]:
    saved, position, grads = lists.made(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    means, state = [torch.zeros_like(g, dtype=wide) for g in grads], new_state(2)
    _C.tilt_begin_(state, torch.tensor(1.0))
    for row in range(2):  # the second blends
        _C.tilt_update_(state, torch.tensor(0.5), 0.0, row, False, row == 1)
        if row == 0:
            _C.accumulate_(means, grads, state)
    where = ([40.0 * size] * lists.n, [False] * lists.n, list(lists.BASE), SEED, STEP, 3, 0, sum(lists.SIZES), False)
    _C.accumulate_perturb_(means, grads, position, saved, state, *where, rounding)
    return position


def by_ascend(adaptive: bool, save: bool) -> Op:
    def run(lists: Lists, dtype: torch.dtype, size: float, rounding: int) -> list[Tensor]:
        position, saved, grads = lists.made(dtype)
        for s, p in zip(saved, position, strict=True):
            s.copy_(p)
        state = new_state(1)
        state[Slot.GRAD_NORM] = 1000.0
        rho = [10.0 / size**2 if adaptive else 100.0] * lists.n
        where = (list(lists.BASE), SEED, STEP, rounding)
        _C.ascend_(position, saved, grads, state, rho, [adaptive] * lists.n, save, *where)
        return position

    return run


def by_place(draw: bool) -> Op:
    def run(lists: Lists, dtype: torch.dtype, size: float, rounding: int) -> list[Tensor]:
        position, saved, _ = lists.made(dtype)
        x = [[t.clone() for t in part] for part in lists.x[:3]]
        chain, state = torch.zeros(CHAIN_SLOTS, dtype=torch.float64), new_state(1)
        where = ([size] * lists.n, [False, True] * 2 + [False], list(lists.BASE), SEED, STEP, 100, 0, draw)
        _C.hmc_place_(position, saved, *x, chain, state, *where, rounding)
        return position

    return run


def by_leapfrog(prior: int, first: bool) -> Op:
    def run(lists: Lists, dtype: torch.dtype, size: float, rounding: int) -> list[Tensor]:
        saved, position, grads = lists.made(dtype)
        x = [[t.clone() for t in part] for part in lists.x[:3]]
        momentum = [t.clone() for t in lists.x[3]]
        chain = torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
        chain[ChainSlot.DELTA], chain[ChainSlot.LOG_STEP] = 0.0, math.log(0.7)
        where = ([size] * lists.n, [False, True] * 2 + [False], list(lists.BASE), SEED, STEP, 2, 100, prior)
        _C.hmc_leapfrog_(position, saved, momentum, *x, grads, chain, *where, 0.5, 1.0, first, True, rounding)
        return position

    return run


OPS: dict[str, Op] = {
    "perturb": by_perturb(0, True),
    "perturb again": by_perturb(0, False),
    "signs": by_perturb(3, True),
    "merged": by_merged,
    "ascend": by_ascend(False, False),
    "ascend adaptive": by_ascend(True, False),
    "ascend first": by_ascend(False, True),
    "place": by_place(False),
    "place drawn": by_place(True),
    "leapfrog": by_leapfrog(0, False),
    "leapfrog first": by_leapfrog(0, True),
    "leapfrog ball": by_leapfrog(1, False),
}
ops = pytest.mark.parametrize("op", OPS)


@pytest.mark.parametrize("size", [1.0, 3e-5, 2e-7], ids=["normal", "subnormal", "tiny"])
@halves
@ops
def test_each_op_rounds_by_the_words_of_its_elements(op: str, dtype: torch.dtype, size: float) -> None:
    """The sizes reach float16's subnormals, and what is below them."""
    lists = Lists(dtype, size)
    exact = OPS[op](lists, torch.float32, size, NEAREST)
    found = OPS[op](lists, dtype, size, NUMBER)
    nearest = OPS[op](lists, dtype, size, NEAREST)
    for x, mine, other, base in zip(exact, found, nearest, lists.BASE, strict=True):
        assert torch.equal(bits(mine), bits(rounded(x, base, dtype)))
        assert torch.equal(bits(other), bits(x.to(dtype)))
    assert not all(map(torch.equal, found, nearest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@ops
def test_wide_types_are_what_they_were(op: str, dtype: torch.dtype) -> None:
    def run(rounding: int) -> list[Tensor]:
        lists = Lists(dtype, 1.0)
        lists.x = [[t.to(dtype) for t in part] for part in lists.x]
        return OPS[op](lists, dtype, 1.0, rounding)

    for a, b in zip(run(NUMBER), run(NEAREST), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def ascended(start: Tensor, step: float, *, base: int = 0, number: int = NUMBER) -> Tensor:
    """Positions at ``start`` moved by ``step`` each, a float32."""
    position, state = start.clone(), new_state(1)
    state[Slot.GRAD_NORM] = 1.0
    where = ([step], [False], False, [base], SEED, STEP, number)
    _C.ascend_([position], [start.clone()], [torch.ones_like(start)], state, *where)
    return position


# Positions and what is added, parts of a unit in the last place: of normal numbers and of subnormals.
CASES = [
    (torch.bfloat16, 1.0, 2.0**-10), (torch.bfloat16, -0.02, 3e-5), (torch.bfloat16, 1e-39, 3e-41),
    (torch.float16, 1.0, 2.0**-13), (torch.float16, -0.02, 3e-6), (torch.float16, 2.0**-15, 2.0**-26),
    (torch.float16, 0.0, 2.0**-30),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value", "step"), CASES)
def test_right_in_the_mean(dtype: torch.dtype, value: float, step: float) -> None:
    """Of n roundings of one number about n f go up: the mean is the number."""
    n = 1 << 18
    start = torch.full((n,), value, dtype=dtype)
    exact = float((start[:1].double() + torch.tensor([step]).double()).float())
    found = ascended(start, step).double()
    low, high = float(found.min()), float(found.max())
    assert low < exact < high
    assert set(found.tolist()) == {low, high}
    assert float(torch.nextafter(torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype))) == high
    f = (exact - low) / (high - low)
    assert abs(float(found.mean()) - exact) < ERRORS * (high - low) * math.sqrt(f * (1.0 - f) / n)


@halves
def test_infinite_where_nearest_is_and_nowhere_else(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    unit = info.max - float(torch.nextafter(torch.tensor(info.max, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    for sign in (1.0, -1.0):
        for part, infinite in ((0.0, False), (0.25, False), (0.4375, False), (0.5, True), (1.0, True), (2.0, True)):
            start = torch.full((4096,), sign * info.max, dtype=dtype)
            grads = torch.full((4096,), sign * part * unit, dtype=dtype)
            state = new_state(1)
            state[Slot.GRAD_NORM] = 1.0
            _C.ascend_([start], [start.clone()], [grads], state, [1.0], [False], False, [0], SEED, STEP, NUMBER)
            assert bool((start == sign * (math.inf if infinite else info.max)).all()), (part, start.unique())


@halves
def test_infinities_and_nan_pass(dtype: torch.dtype) -> None:
    start = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0] * 9, dtype=dtype)
    grads, state = torch.zeros_like(start), new_state(1)
    state[Slot.GRAD_NORM] = 1.0
    found = start.clone()
    _C.ascend_([found], [start.clone()], [grads], state, [1.0], [False], False, [3], SEED, STEP, NUMBER)
    kept = ~start.isnan()
    assert torch.equal(found[kept], start[kept])
    assert bool(found[~kept].isnan().all())


def test_what_the_storage_type_holds_is_not_moved() -> None:
    """All 65,536 numbers of each type, by several words."""
    for dtype in HALVES:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        every = every[~every.isnan()]
        for number in range(4):
            assert torch.equal(ascended(every, 0.0, number=number), every)


@halves
def test_the_bits_do_not_depend_on_how_a_list_is_cut(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(200_003, generator=generator).to(dtype)
    grads = torch.randn(200_003, generator=generator).to(dtype)
    state = new_state(1)
    state[Slot.GRAD_NORM] = 100.0

    def run(parts: Sequence[int], shared: int = 0) -> Tensor:
        at, position, base = 0, [], []
        for n in parts:
            position.append(whole[at : at + n].clone())
            base.append(shared + at)
            at += n
        pieces = list(grads.split(list(parts)))
        rest = ([1.0] * len(parts), [False] * len(parts), False, base, SEED, STEP, NUMBER)
        _C.ascend_(position, [p.clone() for p in position], pieces, state, *rest)
        return torch.cat(position)

    expected = run([200_003])
    for parts in ([65_536, 134_467], [1, 2, 200_000], [100_001, 100_002], [3] * 10 + [199_973]):
        assert torch.equal(run(parts), expected)
    assert not torch.equal(run([200_003], shared=4), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(run([200_003]), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_noise_of_a_sample_and_its_ascent_have_words_of_their_own() -> None:
    words = [rounding_words(4096, 0, SEED, STEP, number, "cpu").double() / 2.0**32 for number in range(4)]
    for i, a in enumerate(words):
        for b in words[:i]:
            assert abs(float(((a - 0.5) * (b - 0.5)).mean())) < ERRORS / 12.0 / 64.0


def test_the_functions_take_those_words() -> None:
    start = torch.randn(1001, generator=torch.Generator().manual_seed(0)).bfloat16()
    state, wide_state = new_state(1), new_state(1)
    x, saved, wide, wide_saved = start.clone(), start.clone(), start.float(), start.float()
    arguments: dict[str, Any] = {"seed": SEED, "step": STEP, "sample": 6, "negate": True}
    perturb_([x], [saved], state, 30.0, **arguments, rounding="stochastic")
    perturb_([wide], [wide_saved], wide_state, 30.0, **arguments)
    assert torch.equal(x, rounded(wide, 0, torch.bfloat16, 14))
    state[Slot.GRAD_NORM] = wide_state[Slot.GRAD_NORM] = 30.0
    ascended, grads = x.float(), torch.ones(1001)
    ascend_([x], [saved], [grads.bfloat16()], state, 1.0, rounding="stochastic", seed=SEED, step=STEP, sample=6)
    ascend_([ascended], [wide_saved], [grads], wide_state, 1.0)
    assert torch.equal(x, rounded(ascended, 0, torch.bfloat16, 13))


def test_a_step_that_the_state_holds_is_as_one_that_is_given() -> None:
    def run(step: int | None) -> list[Tensor]:
        x, state = [torch.ones(999, dtype=torch.bfloat16)], new_state(1)
        saved, grads = [x[0].clone()], [torch.ones(999, dtype=torch.bfloat16)]
        state[Slot.STEP], state[Slot.GRAD_NORM] = STEP, 300.0
        found = []
        for call in (
            lambda: perturb_(x, saved, state, 3.0, seed=3, step=step, rounding="stochastic"),
            lambda: ascend_(x, saved, grads, state, 1.0, seed=3, step=step, rounding="stochastic"),
        ):
            call()
            found.append(x[0].clone())
        return found

    for held, given, other in zip(run(None), run(STEP), run(STEP + 1), strict=True):
        assert torch.equal(held, given)
        assert not torch.equal(given, other)


@halves
def test_a_chain_rounds_alike_at_all_its_positions(dtype: torch.dtype) -> None:
    """θ at x' is the same however the chain has come there: by a drift, of any trajectory, or placed there."""
    start = torch.randn(5001, generator=torch.Generator().manual_seed(0)).to(dtype)
    chain, state = torch.zeros(CHAIN_SLOTS, dtype=torch.float64), new_state(1)
    chain[ChainSlot.LOG_STEP] = math.log(0.7)
    x = [[torch.randn(5001, generator=torch.Generator().manual_seed(k))] for k in range(3)]
    momentum, grads = [torch.randn(5001)], [torch.zeros_like(start)]
    where = ([1e-2], [False], [3], SEED, STEP)
    seen = []
    for trajectory in (0, 5):
        moved = [start.clone()]
        _C.hmc_leapfrog_(moved, [start], momentum, *x, grads, chain, *where, trajectory, 5001, 2, 0.5, 0.0, True, True,
                         0)  # fmt: skip
        seen.append(moved[0])  # x itself, as nothing drifts
    placed, saved = [start.clone()], [torch.empty_like(start)]
    _C.hmc_place_(placed, saved, *x, chain, state, *where, 5001, 2, False, 0)
    assert torch.equal(placed[0], seen[0])
    assert torch.equal(placed[0], seen[1])
    assert not torch.equal(placed[0], (start.float() + 1e-2 * x[0][0]).to(dtype))


REFUSED = [
    (lambda x: perturb_(x, x, new_state(1), 0.1, seed=0, rounding="up"), ValueError, "perturb_: rounding: got 'up'"),
    (lambda x: perturb_(x, x, new_state(1), 0.1, seed=0, rounding=1), TypeError, "perturb_: rounding: got 1"),
    (lambda x: perturb_(x, x, new_state(1), 0.1, seed=0, sample=2**27, rounding="stochastic"), ValueError,
     "perturb_: sample: got 134217728, expected an integer below 134217728, as rounding is 'stochastic'"),
    (lambda x: ascend_(x, x, x, new_state(1), 0.1, rounding="no"), ValueError, "ascend_: rounding: got 'no'"),
    (lambda x: ascend_(x, x, x, new_state(1), 0.1, base=[1, 2]), ValueError, "ascend_: base: got 2 entries"),
    (lambda x: _C.ascend_(x, x, x, new_state(1), [0.1], [False], False, [], 0, 0, 3), ValueError,
     "ascend_: base: got 0 entries, expected 1"),
    (lambda x: _C.ascend_(x, x, x, new_state(1), [0.1], [False], False, [0], 0, 0, -2), ValueError,
     "ascend_: rounding: got -2, expected an integer from -1 to 268435455"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refusals(call: Callable[[list[Tensor]], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call([torch.ones(3, dtype=torch.bfloat16)])
