"""norm_ascend_: the norm of the gradients and the ascent along them in one call, bit for bit what two calls do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsam_ext import _C
from tsam_ext.engine.state import Slot, new_state

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
sizes_of = st.lists(st.sampled_from([0, 1, 3, 64, 65, 1000, 65_537]), min_size=1, max_size=5)


def tensors(sizes: list[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in sizes]


@settings(max_examples=30, deadline=None)
@given(sizes=sizes_of, dtype=st.sampled_from(DTYPES), adaptive=st.booleans(), save=st.booleans())
def test_norm_and_ascend_at_once_are_both(sizes: list[int], dtype: torch.dtype, adaptive: bool, save: bool) -> None:
    """Bit for bit; one number stands for the same of each tensor, and copies that nobody needs may be missing."""
    n, g, start = len(sizes), tensors(sizes, dtype, 1), tensors(sizes, dtype, 0)
    kept, base = tensors(sizes, dtype, 2), [100_000 * i for i in range(n)]
    results = []
    ways = [(False, n, True), (True, n, True), (True, 1, True), *[(True, 1, False)] * (not save and not adaptive)]
    for once, entries, with_saved in ways:
        x, saved, state = [p.clone() for p in start], [p.clone() for p in kept], new_state(2, CPU)
        state[torch.isnan(state)] = 0.0
        rest = (base, 5, 6, 3)
        if once:
            given = ([0.3] * entries, [adaptive] * entries, save, 1)
            _C.norm_ascend_(x, saved if with_saved else [], g, state, *given, *rest)
        else:
            _C.grad_norm_(g, x if save else saved, state, [adaptive] * n, 1)
            _C.ascend_(x, saved, g, state, [0.3] * n, [adaptive] * n, save, *rest)
        results.append([*x, *saved, state])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_norm_and_ascend_at_once_refuse() -> None:
    def call(**changed: object) -> None:
        given = {"saved": pair(), "rho": [0.1], "adaptive": [False], "save": True, "row": 0} | changed
        _C.norm_ascend_(x, grads=grads, state=state, **given)

    def pair() -> list[Tensor]:
        return [torch.ones(4), torch.ones(5)]

    x, grads, state = pair(), pair(), new_state(1, CPU)
    for changed, message in (
        ({"saved": []}, r"saved: got 0 entries, expected 2 \(as many as position\)"),
        ({"saved": [], "save": False, "adaptive": [False, True]}, "saved: got 0 entries"),
        ({"saved": pair()[:1]}, "saved: got 1 entries"),
        ({"saved": x}, r"saved\[[01]\]: got memory shared with position\[[01]\]"),
        ({"rho": [0.1] * 3}, "rho: got 3 entries, expected 2"),
        ({"rho": [float("inf")]}, r"rho\[0\]: got inf, expected a finite number"),
        ({"adaptive": []}, "adaptive: got 0 entries, expected 2"),
        ({"row": -1}, "row: got -1"),
        ({"row": 1}, "state: got .* at least 24 elements"),
        ({"stage": 2}, "stage: got 2"),
        ({"base": [0]}, "base: got 1 entries"),
    ):
        with pytest.raises(ValueError, match=f"norm_ascend_: {message}"):
            call(**changed)
    assert all(p.eq(1.0).all() for p in x) and state[Slot.SAVES] == 0 and state[Slot.GRAD_NORM].isnan()
    call()
    assert state[Slot.SAVES] == 1 and state[Slot.GRAD_NORM] == 3.0
