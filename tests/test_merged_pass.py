"""accumulate_perturb_: one sample's mean and the next one's draw in one pass, with the bits of the two ops in a row.

And where TSAM calls it: between two samples whose gradients cover exactly what moves, never around the first sample,
whose gradients become the mean, nor after the last.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from flat_options import tsam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tsam_ext import _C
from tsam_ext.engine.state import new_state
from tsam_ext.estimates import PerturbationEstimate

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = st.lists(st.sampled_from([0, 1, 3, 127, 128, 129, 1000, 70_001]), min_size=0, max_size=4)


def lists(sizes: list[int], dtype: torch.dtype, begun: bool = True) -> list[list[Tensor]]:
    """Mean, gradients, position and copy: the same numbers at each call, the mean of the compute type.

    A mean that has not begun may hold anything: here NaN.
    """
    torch.manual_seed(2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = [[torch.randn(n, dtype=torch.float64).to(wide if role == 0 else dtype) for n in sizes] for role in range(4)]
    return made if begun else [[torch.full_like(x, float("nan")) for x in made[0]], *made[1:]]


def state_after(losses: list[float]) -> Tensor:
    state = new_state(len(losses))
    _C.tilt_begin_(state, torch.tensor(2.0))
    for row, loss in enumerate(losses):
        _C.tilt_update_(state, torch.tensor(loss), 0.0, row, row > 0, False)
    return state


@settings(max_examples=80, deadline=None)
@given(
    sizes=SIZES,
    dtype=st.sampled_from(DTYPES),
    noise=st.integers(0, len(_C.__noises__) - 1),
    adaptive=st.booleans(),
    negate=st.booleans(),
    # The mean blends; begins; stays as it is; is NaN.
    losses=st.sampled_from([[0.3, 0.9], [0.3], [0.3, float("nan")], [float("nan"), 0.3]]),
    shift=st.integers(0, 3),
)
def test_one_pass_has_the_bits_of_two(
    sizes: list[int], dtype: torch.dtype, noise: int, adaptive: bool, negate: bool, losses: list[float], shift: int
) -> None:
    n = len(sizes)
    base = [shift + sum(-(-size // 4) * 4 for size in sizes[:i]) for i in range(n)]
    draw = ([0.1 + 0.2 * i for i in range(n)], [adaptive] * n, base, 11, 2, 4, noise, sum(sizes), negate)
    mean, grads, position, saved = lists(sizes, dtype, len(losses) > 1)
    state = state_after(losses)
    _C.accumulate_perturb_(mean, grads, position, saved, state, *draw)
    mean_2, grads_2, position_2, saved_2 = lists(sizes, dtype, len(losses) > 1)
    state_2 = state_after(losses)
    if n:
        _C.accumulate_(mean_2, grads_2, state_2)
    _C.perturb_(position_2, saved_2, state_2, *draw, False)
    for got, want in zip(
        (*mean, *grads, *position, *saved, state), (*mean_2, *grads_2, *position_2, *saved_2, state_2), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_it_refuses_what_the_two_refuse_and_tensors_that_overlap() -> None:
    def refused(message: str, **edits: Any) -> None:
        mean, grads, position, saved = lists([4, 3], torch.float32)
        arguments = {
            "accumulator": mean,
            "grads": grads,
            "position": position,
            "saved": saved,
            "state": state_after([0.1]),
        }
        arguments |= {"radius": [0.1] * 2, "adaptive": [False] * 2, "base": [0, 4], "seed": 1, "step": 0, "sample": 0}
        arguments |= {"noise": 0, "dimension": 7, "negate": False} | edits
        before = [tensor.clone() for tensor in (*mean, *position)]
        with pytest.raises(ValueError, match=r"^tsam\.accumulate_perturb_: " + message):
            _C.accumulate_perturb_(*arguments.values())
        assert all(map(torch.equal, (*mean, *position), before))

    whole = torch.zeros(8)
    refused(r"grads\[1\]: got shape \(2\).*expected shape \(3\)", grads=[torch.zeros(4), torch.zeros(2)])
    refused("grads: got 0 entries, expected 2", grads=[], accumulator=[])
    other = [torch.zeros(4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    refused(r"grads\[0\]: got dtype float64, expected float32", grads=other, accumulator=[t.clone() for t in other])
    refused(r"radius\[1\]: got -1", radius=[0.1, -1.0])
    refused(
        r"accumulator\[0\]: got memory shared with position\[0\]",
        accumulator=[whole[:4], torch.zeros(3)],
        position=[whole[2:6], torch.zeros(3)],
    )


class Calls(TorchDispatchMode):
    """How often each of our ops is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.counts[str(op)] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "noise", "noise": "ball", "antithetic": True},
        {"sampler": "ascent", "adaptive": True, "noise": "rademacher"},
        {"sampler": "noise", "noise": "sphere", "batch": "split", "tilt": 5.0},
    ],
    ids=["noise", "ascent", "split"],
)
def test_a_step_with_merged_passes_is_the_step_without(problem: Any, options: dict[str, Any], monkeypatch: Any) -> None:
    merged, apart = problem(), problem()
    settings = {"lr": 0.1, "rho": 0.3, "seed": 3, "num_samples": 5, **options}
    one, other = tsam(merged.parameters, **settings), tsam(apart.parameters, **settings)
    with Calls() as calls:
        merged.train(one, 2)
    with monkeypatch.context() as patch, Calls() as more:
        patch.setattr(PerturbationEstimate, "_merges", lambda self, gradients: False)
        apart.train(other, 2)
    assert all(map(torch.equal, merged.copies(), apart.copies()))
    name, two = "tsam.accumulate_perturb_.default", ("tsam.accumulate_.default", "tsam.perturb_.default")
    # Of five samples the first is adopted and the last has no next.
    assert (calls.counts[name], *(calls.counts[op] for op in two)) == (2 * 3, 2 * 2, 2 * 2)
    assert (more.counts[name], *(more.counts[op] for op in two)) == (0, 2 * 5, 2 * 5)


@pytest.mark.parametrize("odd", ["unused", "unperturbed", "radius"])
def test_passes_over_other_tensors_stay_apart(problem: Any, odd: str) -> None:
    """A parameter without a gradient, one with a gradient that does not move, and no noise at all."""
    task = problem()
    extra = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    first, *rest = task.parameters
    groups = [{"params": [first], "rho": 0.0 if odd == "unperturbed" else 0.3}, {"params": rest}]
    groups += [{"params": [extra]}] if odd == "unused" else []
    optimizer = tsam(groups, lr=0.1, seed=3, num_samples=5, radius=0.0 if odd == "radius" else None)
    with Calls() as calls:
        task.train(optimizer, 1)
    assert calls.counts["tsam.accumulate_perturb_.default"] == 0
    assert calls.counts["tsam.accumulate_.default"] == 5
