"""The in-place list ops against plain float64 torch, over dtypes, layouts, sizes; and what they refuse.

Invariant: a refused call writes nothing and says the op, the argument, the index, what came and what was wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsam_ext import _C
from tsam_ext.engine.state import HEADER, ROW, Slot, new_state

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One rounding of the result (half a unit in the last place, relative to values up to about 4), and for float32 the
# roundings inside one multiply-add.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(sizes: list[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


sizes_of = st.lists(st.sampled_from([0, 1, 3, 4, 63, 64, 65, 127, 1000, 65_537]), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes_of, dtype=st.sampled_from(DTYPES), adaptive=st.booleans(), save=st.booleans())
def test_norm_and_ascend_are_the_formula(sizes: list[int], dtype: torch.dtype, adaptive: bool, save: bool) -> None:
    n = len(sizes)
    x, g, origin = (tensors(sizes, dtype, seed) for seed in (0, 1, 2))
    if save:
        origin = [p.clone() for p in x]
    saved = [torch.full_like(p, 7.0) for p in x] if save else [p.clone() for p in origin]
    d = [p.double().abs() if adaptive else torch.ones_like(p.double()) for p in origin]
    scaled = [a * b.double() for a, b in zip(d, g, strict=True)]
    norm = torch.cat(scaled).norm()
    rho = [0.3 + 0.1 * i for i in range(n)]
    expected = [
        p.double() + (r / norm if norm > 0 else 0.0) * a * b for p, r, a, b in zip(x, rho, d, scaled, strict=True)
    ]
    state = new_state(1, CPU)
    _C.grad_norm_(g, origin, state, [adaptive] * n, 0)
    assert torch.allclose(state[Slot.GRAD_NORM], norm, rtol=1e-6 if dtype != torch.float64 else 1e-13)
    assert state[HEADER + 2] == state[Slot.GRAD_NORM]
    _C.ascend_(x, saved, g, state, rho, [adaptive] * n, save)
    for got, want, kept, start in zip(x, expected, saved, origin, strict=True):
        assert torch.allclose(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert torch.equal(kept, start)


@settings(max_examples=30, deadline=None)
@given(sizes=sizes_of, dtype=st.sampled_from(DTYPES), adaptive=st.booleans())
def test_perturb_saves_then_starts_from_the_copy(sizes: list[int], dtype: torch.dtype, adaptive: bool) -> None:
    n, x = len(sizes), tensors(sizes, dtype, 3)
    start = [p.clone() for p in x]
    saved = [torch.full_like(p, 7.0) for p in x]
    base, element = [], 0
    for size in sizes:
        base.append(element)
        element += (size + 3) // 4 * 4
    radius = [0.5 + i for i in range(n)]
    args = (radius, [adaptive] * n, base, 11, 2, 4, 0, 100, False)
    z = [torch.zeros(size) for size in sizes]
    _C.perturb_(z, [torch.empty_like(p) for p in z], new_state(0, CPU),
                [1.0] * n, [False] * n, base, 11, 2, 4, 0, 1, False, True)  # fmt: skip
    _C.perturb_(x, saved, new_state(0, CPU), *args, True)
    for got, origin, noise, kept, r in zip(x, start, z, saved, radius, strict=True):
        scale = origin.double().abs() if adaptive else 1.0
        want = origin.double() + r / 10 * scale * noise.double()
        assert torch.allclose(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert torch.equal(kept, origin)
    first = [p.clone() for p in x]
    for p in x:
        p.fill_(float("nan"))  # later draws read the copy alone
    _C.perturb_(x, saved, new_state(0, CPU), *args, False)
    assert all(torch.equal(a, b) for a, b in zip(x, first, strict=True))
    _C.restore_(x, saved)
    assert all(torch.equal(a, b) for a, b in zip(x, start, strict=True))


def test_zero_gradient_gives_no_ascent_and_infinite_gradients_show() -> None:
    x, saved, state = [torch.ones(5)], [torch.empty(5)], new_state(1, CPU)
    g = [torch.zeros(5)]
    _C.grad_norm_(g, x, state, [False], 0)
    _C.ascend_(x, saved, g, state, [0.1], [False], True)
    assert torch.equal(x[0], torch.ones(5))
    g[0][2] = float("inf")
    _C.grad_norm_(g, x, state, [False], 0)
    _C.ascend_(x, saved, g, state, [0.1], [False], False)
    assert x[0].isnan().any()


def test_the_norm_neither_overflows_nor_underflows() -> None:
    for scale in (1e-30, 1e30):
        state = new_state(1, CPU)
        g = [torch.full((1000,), scale)]
        _C.grad_norm_(g, g, state, [False], 0)
        assert abs(state[Slot.GRAD_NORM].item() / (scale * 1000**0.5) - 1) < 1e-6


@pytest.mark.parametrize("tilt", [float("-inf"), -20.0, 0.0, 1e-8, 1.0, 20.0, 1e4, float("inf")])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_streaming_is_the_batch_softmax(tilt: float, scale: float, dtype: torch.dtype) -> None:
    s, sizes = 6, [70_000, 3, 1]
    generator = torch.Generator().manual_seed(1)
    losses = scale * torch.randn(s, generator=generator, dtype=torch.float64)
    losses[4] = losses[1]
    spread = 1e8 if dtype in (torch.float32, torch.float64) else 1e2
    norms = spread ** torch.rand(s, generator=generator, dtype=torch.float64)
    grads = [[(g * r.item()).to(dtype) for g in tensors(sizes, torch.float64, j)] for j, r in enumerate(norms)]
    total = [torch.full((n,), float("nan"), dtype=wide(dtype)) for n in sizes]
    state = new_state(s, CPU)
    _C.tilt_begin_(state, torch.tensor(tilt, dtype=torch.float64))
    for j in range(s):
        _C.tilt_update_(state, losses[j], 0.0, j, False, j == s - 1)
        _C.accumulate_(total, grads[j], state)
    if tilt in (float("inf"), float("-inf")):
        best = losses.max() if tilt > 0 else losses.min()
        weights = (losses == best).double()
        weights /= weights.sum()
    else:
        weights = (tilt * (losses - losses[0])).softmax(0)
    for i, got in enumerate(total):
        parts = torch.stack([w * g[i].double() for w, g in zip(weights, grads, strict=True)])
        error = (got.double() - parts.sum(0)).abs() / parts.abs().sum(0)
        # relative to sum w |g| per element; six roundings of float32, or of float64.
        assert error.max() < (1e-6 if dtype != torch.float64 else 1e-12)
    summary = _C.tilt_summary(state, s)
    assert torch.allclose(summary[:s], weights, rtol=1e-9, atol=1e-300)
    assert torch.allclose(summary[s], 1 / (weights**2).sum(), rtol=1e-9)


def weighted_mean(losses: Tensor, grads: list[Tensor], tilt: float) -> Tensor:
    total, state = torch.full_like(grads[0], float("nan")), new_state(len(losses), CPU)
    _C.tilt_begin_(state, torch.tensor(tilt, dtype=torch.float64))
    for j, (loss, grad) in enumerate(zip(losses, grads, strict=True)):
        _C.tilt_update_(state, loss, 0.0, j, False, j == len(losses) - 1)
        _C.accumulate_([total], [grad], state)
    return total


def test_a_constant_in_the_losses_costs_nothing() -> None:
    """The weights depend on differences alone: where those are exact, no bit moves, however large the constant."""
    grads = tensors([100] * 5, torch.float64, 1)
    losses = torch.tensor([3, -7, 12, 12, 5], dtype=torch.float64) / 8
    for tilt in (-1.3, 0.7, 5.1):
        mean = weighted_mean(losses, grads, tilt)
        assert torch.equal(weighted_mean(losses + 2.0**40, grads, tilt), mean)


@pytest.mark.parametrize("tilt", [float("inf"), float("-inf")])
def test_ties_at_an_infinite_tilt_average(tilt: float) -> None:
    """Whichever order they come in, and whatever comes before, between and after them."""
    grads = tensors([100] * 4, torch.float64, 1)
    for order in ((0, 1, 2, 3), (1, 0, 3, 2), (0, 2, 1, 3)):
        losses = torch.tensor([[1.0, 3.0][k in (1, 2)] for k in order], dtype=torch.float64)
        mean = weighted_mean(losses, [grads[k] for k in order], tilt)
        extreme = (1, 2) if tilt > 0 else (0, 3)
        assert torch.equal(mean, 0.5 * grads[extreme[0]] + 0.5 * grads[extreme[1]])


def test_sums_do_not_depend_on_threads() -> None:
    """Norms to their last float64 bit, which the float32 parameters that they scale would not show."""
    threads = torch.get_num_threads()
    sizes = [300_001, 5, 70_000]
    position = [torch.zeros(n) for n in sizes]
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            state, slots = new_state(8, CPU), []
            for j in range(8):
                grads = tensors(sizes, torch.float32, j)
                _C.grad_norm_(grads, grads, state, [j % 2 == 1] * 3, j)
                _C.perturb_(position, [p.clone() for p in position], state, [1.0] * 3, [False] * 3,
                            [0, 300_004, 300_012], 1, 0, j, 1, 1, False, True)  # fmt: skip
                slots += [state[Slot.GRAD_NORM].item(), state[Slot.NOISE_SCALE].item()]
            results.append(slots)
    finally:
        torch.set_num_threads(threads)
    assert all(other == results[0] for other in results)


def test_layouts_move_in_storage_order() -> None:
    plain = torch.zeros(2, 3, 4, 5)
    last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    turned = torch.zeros(5, 4, 3, 2).permute(3, 2, 1, 0)
    for x in (plain, last, turned):
        saved = torch.empty_like(x)
        assert saved.stride() == x.stride()
        _C.perturb_([x], [saved], new_state(0, CPU), [1.0], [False], [0], 1, 0, 0, 0, 1, False, True)
    flat = [x.as_strided((120,), (1,)) for x in (plain, last, turned)]
    assert torch.equal(flat[0], flat[1])
    assert torch.equal(flat[0], flat[2])


Edit = Callable[[dict[str, Any]], None]


def set_item(key: str, index: int, value: Any) -> Edit:
    def edit(arguments: dict[str, Any]) -> None:
        arguments[key][index] = value

    return edit


def set_key(key: str, value: Any) -> Edit:
    def edit(arguments: dict[str, Any]) -> None:
        arguments[key] = value

    return edit


def alias(arguments: dict[str, Any]) -> None:
    arguments["position"][1] = arguments["position"][0][1:]


def alias_copy(arguments: dict[str, Any]) -> None:
    arguments["saved"][0] = arguments["position"][0]


BAD = [
    (set_item("position", 1, torch.zeros(3, dtype=torch.int64)), r"position\[1\]: got dtype Long, expected float32"),
    (set_item("position", 0, torch.zeros(4, device="meta")), r"position\[1\]: got a tensor on cpu, expected one on"),
    (set_item("position", 1, torch.zeros(6)[::2]), r"position\[1\]: got shape \(3\) with strides \(2\).*dense"),
    (set_item("position", 1, torch.zeros(1).expand(3)), r"position\[1\]: got .*expected a dense tensor"),
    (set_item("saved", 0, torch.zeros(5)), r"saved\[0\]: got shape \(5\).*expected shape \(4\).*position"),
    (set_item("saved", 1, torch.zeros(3, dtype=torch.float64)), r"saved\[1\]: got dtype float64, expected float32"),
    (set_key("saved", [torch.zeros(4)]), r"saved: got 1 entries, expected 2"),
    (set_key("radius", [0.1]), r"radius: got 1 entries, expected 2"),
    (set_key("radius", [0.1, -1.0]), r"radius\[1\]: got -1.0+, expected a finite number"),
    (set_key("radius", [float("nan"), 1.0]), r"radius\[0\]: got -?nan, expected a finite number"),
    (set_key("adaptive", []), r"adaptive: got 0 entries"),
    (set_key("base", [0, 4, 8]), r"base: got 3 entries"),
    (set_key("state", torch.zeros(3, dtype=torch.float64)), r"state: got shape \(3\).*at least 16"),
    (set_key("state", torch.zeros(16)), r"state: got .*float32, expected a contiguous float64"),
    (set_key("step", -2), r"step: got -2, expected an integer from -1"),
    (set_key("sample", 2**28), r"sample: got 268435456, expected an integer from 0"),
    (set_key("noise", 4), r"noise: got 4, expected an integer from 0 to 3"),
    (alias, r"position\[1\]: got memory shared with position\[0\], expected tensors that do not overlap"),
    (alias_copy, r".*\[0\]: got memory shared with .*\[0\]"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), BAD)
def test_perturb_refuses_and_writes_nothing(edit: Edit, message: str) -> None:
    arguments: dict[str, Any] = {
        "position": [torch.ones(4), torch.ones(3)],
        "saved": [torch.full((4,), 2.0), torch.full((3,), 2.0)],
        "state": new_state(0, CPU),
        "radius": [0.1, 0.1],
        "adaptive": [False, False],
        "base": [0, 4],
        "seed": 0,
        "step": 0,
        "sample": 0,
        "noise": 0,
        "dimension": 7,
        "negate": False,
        "save": True,
    }
    edit(arguments)
    watched = [t for t in (*arguments["position"], *arguments["saved"]) if t.device == CPU]
    before = [t.clone() for t in watched]
    with pytest.raises(ValueError, match=r"^tsam\.perturb_: " + message):
        _C.perturb_(*arguments.values())
    assert all(torch.equal(a, b) for a, b in zip(watched, before, strict=True))


def test_other_ops_refuse_too() -> None:
    x, state = [torch.zeros(4)], new_state(1, CPU)
    with pytest.raises(ValueError, match=r"ascend_: grads\[0\]: got dtype float64, expected float32"):
        _C.ascend_(x, [torch.zeros(4)], [torch.zeros(4, dtype=torch.float64)], state, [0.1], [False], True)
    with pytest.raises(ValueError, match=r"ascend_: rho\[0\]: got -inf, expected a finite number"):
        _C.ascend_(x, [torch.zeros(4)], [torch.zeros(4)], state, [-math.inf], [False], True)
    half = torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"accumulate_: accumulator\[0\]: got dtype bfloat16, expected float32"):
        _C.accumulate_([half], [half.clone()], state)
    with pytest.raises(ValueError, match=r"tilt_update_: loss: got shape \(2\).*one element"):
        _C.tilt_update_(state, torch.zeros(2), 0.0, 0, False, True)
    with pytest.raises(ValueError, match=r"tilt_update_: state: got .* at least 24 elements"):
        _C.tilt_update_(state, torch.zeros(()), 0.0, 1, False, True)
    with pytest.raises(ValueError, match=r"tilt_update_: log_size: got inf"):
        _C.tilt_update_(state, torch.zeros(()), float("inf"), 0, False, True)
    with pytest.raises(ValueError, match=r"restore_: saved\[0\]: got shape \(3\)"):
        _C.restore_(x, [torch.zeros(3)])


@pytest.mark.host_only("a device does not know the action before its kernels run: NaN (test_emulated.py)")
def test_adopting_a_second_sample_is_refused() -> None:
    x, state = [torch.zeros(4)], new_state(1, CPU)
    _C.tilt_begin_(state, torch.tensor(0.0))
    _C.tilt_update_(state, torch.tensor(1.0), 0.0, 0, False, False)
    _C.tilt_update_(state, torch.tensor(1.0), 0.0, 0, False, False)
    with pytest.raises(ValueError, match="only the first sample can be adopted"):
        _C.accumulate_(x, [], state)


@pytest.mark.parametrize("length", [1500, 700])  # of the norm's two lists 700 leave a few for a small table
def test_a_list_longer_than_a_launch(length: int) -> None:
    """CUDA's table of pointers takes some hundred tensors: more launches have to see their own, and add to one sum."""
    sizes = [1 + i % 6 for i in range(length)]
    x, g = tensors(sizes, torch.float32, 0), tensors(sizes, torch.float32, 1)
    start, saved, state = torch.cat(x), [torch.empty_like(p) for p in x], new_state(1, CPU)
    n, rho = len(x), [0.5 + i / 1000 for i in range(len(x))]
    _C.grad_norm_(g, x, state, [False] * n, 0)
    assert state[Slot.GRAD_NORM].item() == pytest.approx(torch.cat(g).double().norm().item(), rel=1e-12)
    _C.ascend_(x, saved, g, state, rho, [False] * n, True)
    factor = torch.repeat_interleave(torch.tensor(rho, dtype=torch.float64), torch.tensor(sizes))
    expected = start.double() + factor / state[Slot.GRAD_NORM] * torch.cat(g).double()
    torch.testing.assert_close(torch.cat(x).double(), expected, rtol=1e-6, atol=1e-6)
    _C.restore_(x, saved)
    assert torch.equal(torch.cat(x), start)


def test_a_copy_of_another_layout_is_refused() -> None:
    """Same shape, other strides: element i of one list would meet another element of the other."""
    x, turned = torch.ones(2, 3), torch.full((3, 2), 2.0).t()
    calls: list[Callable[[], None]] = [
        lambda: _C.restore_([x], [turned]),
        lambda: _C.perturb_([x], [turned], new_state(0, CPU), [1.0], [False], [0], 1, 0, 0, 0, 1, False, True),
        lambda: _C.ascend_([x], [x.clone()], [turned], new_state(0, CPU), [1.0], [False], True),
        lambda: _C.accumulate_([x], [turned], new_state(0, CPU)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\[0\]: got shape \(2, 3\) with strides \(1, 2\), expected .*\(3, 1\)"):
            call()
        assert torch.equal(x, torch.ones(2, 3))


def test_the_slots_are_those_of_the_header() -> None:
    import re
    from pathlib import Path

    text = (Path(__file__).parents[1] / "csrc" / "core" / "tilt.h").read_text()
    slots = {name: int(value) for name, value in re.findall(r"\bk(\w+) = (\d+)", text)}
    for name, value in vars(Slot).items():
        if not name.startswith("_"):
            assert slots["".join(part.capitalize() for part in name.split("_"))] == value
    assert (slots["Header"], slots["Row"]) == (HEADER, ROW)
