"""tsam_ext.functional's list ops: defaults, autograd's rules, empty lists, and what they refuse before any write.

The kernels' own laws are in test_list_ops.py; this is about what a wrapper adds to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext import _C, _ops
from tsam_ext import functional as fused
from tsam_ext.engine.state import CHAIN_SLOTS, DIRECTION_SLOTS, ChainSlot
from tsam_ext.functional import Slot, new_state


def lists(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(n, generator=generator) for n in sizes]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_step_by_hand_is_the_optimizer_s() -> None:
    """TSAM's ascent, two samples, from the functions alone."""

    def loss_at(x: list[Tensor]) -> Tensor:
        return sum(((t * torch.arange(1.0, t.numel() + 1)).sin() ** 2).sum() for t in x)

    parameters = [t.requires_grad_() for t in lists(5, 7)]
    position = [t.detach().clone() for t in parameters]
    start = copies(position)
    opt = tsam(parameters, lr=0.1, rho=0.1, radius=0.2, tilt=3.0, num_samples=2, seed=5)

    def closure() -> Tensor:
        loss = loss_at(parameters)
        loss.backward()
        return loss

    opt.estimate_gradient(closure)

    def gradients() -> tuple[Tensor, list[Tensor]]:
        leaves = [t.detach().clone().requires_grad_() for t in position]
        loss = loss_at(leaves)
        return loss.detach(), list(torch.autograd.grad(loss, leaves))

    saved, total, state = copies(position), [torch.empty_like(t) for t in position], new_state(2)
    fused.tilt_begin_(state, 3.0)
    for j in range(2):
        fused.perturb_(position, saved, state, 0.2, seed=5, step=0, sample=j, save=j == 0)
        _, grads = gradients()
        fused.grad_norm_(grads, saved, state, row=j)
        fused.ascend_(position, saved, grads, state, 0.1)
        loss, grads = gradients()
        fused.tilt_update_(state, loss, j, last=j == 1)
        fused.accumulate_(total, grads, state)
    fused.restore_(position, saved)
    assert equal(position, start)
    assert equal(total, [p.grad for p in parameters if p.grad is not None])


def test_defaults_are_those_of_the_plain_op() -> None:
    sizes = (5, 3, 8)
    x, y = lists(*sizes), lists(*sizes)
    a, b = copies(x), copies(x)
    fused.perturb_(x, a, new_state(0), 0.5, seed=2**64 - 1)
    _C.perturb_(y, b, new_state(0), [0.5] * 3, [False] * 3, [0, 8, 12], -1, 0, 0, 0, 16, False, True)
    assert equal(x, y)
    assert equal(a, b)


def test_versions_move_with_what_is_written() -> None:
    x, saved, grads, state = lists(4, 2), lists(4, 2), lists(4, 2), new_state(1)

    def moved(call: Callable[[], None], *written: list[Tensor]) -> None:
        every = [*x, *saved, *grads, state]
        before = [t._version for t in every]
        call()
        targets = {id(t) for tensors in written for t in tensors}
        for tensor, version in zip(every, before, strict=True):
            assert (tensor._version > version) is (id(tensor) in targets)

    moved(lambda: fused.perturb_(x, saved, state, 0.1, seed=0), x, saved, [state])
    moved(lambda: fused.perturb_(x, saved, state, 0.1, seed=0, save=False), x, [state])
    moved(lambda: fused.grad_norm_(grads, saved, state), [state])
    moved(lambda: fused.ascend_(x, saved, grads, state, 0.1), x)
    moved(lambda: fused.ascend_(x, saved, grads, state, 0.1, save=True), x, saved, [state])
    moved(lambda: fused.tilt_begin_(state, 1.0), [state])
    moved(lambda: fused.tilt_update_(state, 0.5, 0), [state])
    moved(lambda: fused.accumulate_(x, grads, state), x)
    moved(lambda: fused.restore_(x, saved), x)


def test_autograd_notices_a_change_of_what_it_has_saved() -> None:
    w, x = torch.ones(3, requires_grad=True), [torch.ones(3)]
    loss = (w * x[0]).sum()
    fused.restore_(x, [torch.zeros(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_lists_are_steps_of_nothing() -> None:
    state = new_state(1)
    fused.tilt_begin_(state, 1.0)
    fused.perturb_([], [], state, 0.1, seed=0)
    state[Slot.GRAD_NORM] = 5.0
    fused.grad_norm_([], [], state)
    assert state[Slot.GRAD_NORM] == 0.0
    fused.ascend_([], [], [], state, 0.1)
    fused.tilt_update_(state, 1.0, 0)
    fused.accumulate_([], [], state)
    fused.accumulate_([], None, state)
    fused.restore_([], [])


def test_shapes_without_elements_or_dimensions_work() -> None:
    x = [torch.zeros(()), torch.zeros(0), torch.zeros(2, 0, 3), torch.zeros(1, 1)]
    saved, state = copies(x), new_state(1)
    fused.perturb_(x, saved, state, 1.0, seed=1)
    assert x[0] != 0.0
    assert x[3] != 0.0
    fused.grad_norm_(x, saved, state)
    assert torch.allclose(state[Slot.GRAD_NORM].float(), torch.stack([x[0], x[3][0, 0]]).norm())
    fused.restore_(x, saved)
    assert equal(x, saved)


def test_dtypes_may_be_mixed_in_one_list() -> None:
    x = [t.to(d) for t, d in zip(lists(70_000, 5, 9), (torch.float32, torch.float64, torch.bfloat16), strict=True)]
    saved, state = copies(x), new_state(1)
    fused.grad_norm_(x, saved, state)
    assert torch.allclose(state[Slot.GRAD_NORM], torch.cat([t.double() for t in x]).norm())
    fused.perturb_(x, saved, state, 0.0, seed=1)
    assert equal(x, saved)


def test_leaves_that_require_grad_are_refused_unless_nobody_records() -> None:
    leaf, state = [torch.ones(3, requires_grad=True)], new_state(1)
    calls: list[tuple[str, Callable[[], None]]] = [
        (r"perturb_: position\[0\]", lambda: fused.perturb_(leaf, [torch.ones(3)], state, 0.1, seed=0)),
        (r"perturb_: saved\[0\]", lambda: fused.perturb_([torch.ones(3)], leaf, state, 0.1, seed=0)),
        (r"ascend_: position\[0\]", lambda: fused.ascend_(leaf, [torch.ones(3)], [torch.ones(3)], state, 0.1)),
        (r"accumulate_: accumulator\[0\]", lambda: fused.accumulate_(leaf, [torch.ones(3)], state)),
        (r"restore_: position\[0\]", lambda: fused.restore_(leaf, [torch.zeros(3)])),
    ]
    fused.tilt_begin_(state, 0.0)
    fused.tilt_update_(state, 0.0, 0)
    for place, call in calls:
        with pytest.raises(
            ValueError, match=rf"tsam\.{place}: got a leaf tensor that requires grad, expected torch.no_gr"
        ):
            call()
        assert torch.equal(leaf[0], torch.ones(3))
        with torch.no_grad():
            call()
            leaf[0].fill_(1.0)


def test_inference_tensors_are_refused_outside_inference_mode() -> None:
    with torch.inference_mode():
        x = [torch.ones(3)]
        fused.restore_(x, [torch.zeros(3)])
    assert torch.equal(x[0], torch.zeros(3))
    with pytest.raises(ValueError, match=r"restore_: position\[0\]: got an inference tensor"):
        fused.restore_(x, [torch.ones(3)])
    assert torch.equal(x[0], torch.zeros(3))


Y = torch.ones(3)
S = new_state(1)
REFUSALS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fused.restore_(Y, [Y]), TypeError, r"restore_: position: got Tensor, expected a list of tensors"),
    (lambda: fused.restore_([Y, 1.0], [Y, Y]), TypeError, r"restore_: position\[1\]: got float, expected a tensor"),
    (lambda: fused.restore_([Y], [None]), TypeError, r"restore_: saved\[0\]: got NoneType, expected a tensor"),
    (lambda: fused.restore_([Y, Y.to_sparse()], [Y, Y]), ValueError, r"position\[1\]: got a torch.sparse_coo tensor"),
    (
        lambda: fused.restore_([Y.cfloat()], [Y]),
        ValueError,
        r"position\[0\]: got a .*complex64, expected a dense tensor",
    ),
    (
        lambda: fused.restore_([Y, Y.to("meta")], [Y, Y]),
        ValueError,
        r"position\[1\]: got a tensor on meta, expected one on",
    ),
    (
        lambda: fused.restore_([Y], [Y.to("meta")]),
        ValueError,
        r"saved\[0\]: got a tensor on meta, .* as position\[0\] is",
    ),
    (
        lambda: fused.restore_([Y], []),
        ValueError,
        r"restore_: saved: got 0 entries, expected 1 \(as many as position\)",
    ),
    (lambda: fused.restore_([], [Y]), ValueError, r"restore_: saved: got 1 entries, expected 0"),
    (
        lambda: fused.restore_([Y, Y], [Y.clone(), Y.clone()]),
        ValueError,
        r"position\[1\]: got memory shared with position\[",
    ),
    (lambda: fused.perturb_([Y], [Y.clone()], S.to("meta"), 0.1, seed=0), ValueError, r"state: got a tensor on meta"),
    (lambda: fused.perturb_([Y], [Y.clone()], S, -0.1, seed=0), ValueError, r"radius: got -0.1"),
    (lambda: fused.perturb_([Y], [Y.clone()], S, float("nan"), seed=0), ValueError, r"radius: got nan"),
    (
        lambda: fused.perturb_([Y], [Y.clone()], S, "far", seed=0),
        TypeError,
        r"radius: got 'far', expected a finite number not below 0",
    ),
    (lambda: fused.perturb_([Y], [Y.clone()], S, [0.1, 0.1], seed=0), ValueError, r"radius: got 2 entries, expected 1"),
    (
        lambda: fused.perturb_([Y], [Y.clone()], S, 0.1, seed=0, adaptive=1),
        TypeError,
        r"adaptive: got 1, expected True or False",
    ),
    (lambda: fused.perturb_([Y], [Y.clone()], S, 0.1, seed=2**64), ValueError, r"seed: got 18446744073709551616"),
    (
        lambda: fused.perturb_([Y], [Y.clone()], S, 0.1, seed=0, step=2**32),
        ValueError,
        r"step: got 4294967296, expected an",
    ),
    (
        lambda: fused.perturb_([Y], [Y.clone()], S, 0.1, seed=0, kind="box"),
        ValueError,
        r"kind: got 'box', expected 'gauss",
    ),
    (
        lambda: fused.perturb_([Y], [Y.clone()], S, 0.1, seed=0, base=[0.5]),
        TypeError,
        r"base\[0\]: got 0.5, expected an integer from 0",
    ),
    (lambda: fused.grad_norm_([Y], [Y], new_state(0)), ValueError, r"grad_norm_: state: got .*at least 20"),
    (lambda: fused.grad_norm_([Y], [Y], S, row=-1), ValueError, r"grad_norm_: row: got -1"),
    (lambda: fused.ascend_([Y], [Y.clone()], [Y.clone()], S, float("inf")), ValueError, r"ascend_: rho: got inf"),
    (lambda: fused.tilt_begin_(S, "high"), TypeError, r"tilt_begin_: tilt: got 'high'"),
    (lambda: fused.tilt_begin_(S, float("nan")), ValueError, r"tilt_begin_: tilt: got nan"),
    (lambda: fused.tilt_begin_([1.0], 1.0), TypeError, r"tilt_begin_: state: got list, expected a tensor"),
    (lambda: fused.tilt_update_(S, torch.ones(2), 0), ValueError, r"tilt_update_: loss: got shape \(2,\)"),
    (lambda: fused.tilt_update_(S, 1.0, 0, log_size=float("inf")), ValueError, r"log_size: got inf"),
    (lambda: fused.accumulate_([Y], [], S), ValueError, r"accumulate_: grads: got 0 entries, expected 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS)
def test_refusals_write_nothing(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(Y, torch.ones(3))
    assert S[: Slot.SAVES].isnan().all()


ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "perturb_": lambda: (lists(4, 9), lists(4, 9), new_state(1), [0.1] * 2, [False, True], [0, 4], 0, 0, 0, 0, 13,
                         False, True),
    "grad_norm_": lambda: (lists(4, 9), lists(4, 9), new_state(1), [False, True], 0),
    "ascend_": lambda: (lists(4, 9), lists(4, 9), lists(4, 9), begun(), [0.1] * 2, [False, True], True),
    "norm_ascend_": lambda: (lists(4, 9), lists(4, 9), lists(4, 9), begun(), [0.1] * 2, [False, True], True, 0),
    "displacement_": lambda: (lists(4, 9), lists(4, 9), lists(4, 9), torch.zeros(3, dtype=torch.float64), [0.1] * 2,
                              [False, True]),
    "tilt_begin_": lambda: (new_state(1), torch.tensor(1.0)),
    "tilt_update_": lambda: (begun(), torch.tensor(1.0), 0.0, 0, False, True),
    "accumulate_": lambda: (lists(4, 9), lists(4, 9), begun()),
    "accumulate_perturb_": lambda: (*(lists(4, 9) for _ in range(4)), begun(), [0.1] * 2, [False, True], [0, 4], 3, 1,
                                    0, 0, 13, False),
    "take_direction_": lambda: (lists(4, 9), lists(4, 9), torch.zeros(DIRECTION_SLOTS, dtype=torch.float64)),
    "add_direction_": lambda: (lists(4, 9), lists(4, 9), torch.zeros(DIRECTION_SLOTS, dtype=torch.float64)),
    "restore_": lambda: (lists(4, 9), lists(4, 9)),
    "leapfrog_": lambda: (*lists(4, 4, 4), torch.tensor(0.5), torch.tensor(1.5)),
    "kick_": lambda: (*lists(4, 4), torch.tensor(0.5)),
    "tilt_summary": lambda: (begun(), 1),
    "hmc_place_": lambda: (*(lists(4, 9) for _ in range(5)), chain(), begun(), [0.1] * 2, [False, True], [0, 4], 0, 0,
                           13, 0, True),
    "hmc_begin_": lambda: (lists(4, 9), lists(4, 9), chain(), begun(), torch.tensor(0.5), torch.tensor(2.0),
                           torch.tensor(1.0), True, [0.1] * 2, [False, True], 13, 0),
    "hmc_leapfrog_": lambda: (*(lists(4, 9) for _ in range(7)), chain(), [0.1] * 2, [False, True], [0, 4], 0, 0, 0,
                              13, 1, 0.5, 1.0, True, True),
    "hmc_end_": lambda: (*(lists(4, 9) for _ in range(3)), chain(), begun(), torch.tensor(0.5), [0.1] * 2,
                         [False, True], 0, 0, 0, 13, 0, 0.5, 0, True, False, True),
    "hmc_carry_": lambda: (*(lists(4, 9) for _ in range(3)), chain(), begun(), True),
    "hmc_recycle_": lambda: (chain(), begun(), torch.tensor(0.5), 0.5, 0, 0, True, False, True),
    "hmc_adapt_": lambda: (chain(), 0.5),
}  # fmt: skip


def begun() -> Tensor:
    """A state in the middle of a step."""
    state = new_state(1)
    fused.tilt_begin_(state, 1.0)
    fused.grad_norm_([torch.ones(2)], [torch.ones(2)], state)
    fused.tilt_update_(state, 0.5, 0)
    state[torch.isnan(state)] = 0.0  # opcheck compares copies, and NaN differs from itself
    return state


def chain() -> Tensor:
    """The scalars of a chain in the middle of a step."""
    scalars = torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
    scalars[ChainSlot.DELTA], scalars[ChainSlot.TRAJECTORIES], scalars[ChainSlot.TAKEN] = 1.0, 2.0, 1.0
    return scalars


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.tsam, name).default, ARGUMENTS[name]())


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("hmc_leapfrog_", -4, float("nan"), r"tsam\.hmc_leapfrog_: kick: got -?nan, expected a finite number$"),
        (
            "hmc_leapfrog_",
            -3,
            float("inf"),
            r"tsam\.hmc_leapfrog_: drift: got inf, expected a finite number not below 0",
        ),
        ("hmc_leapfrog_", -3, -0.5, r"tsam\.hmc_leapfrog_: drift: got -0.5\d*, expected a finite number not below 0"),
        ("hmc_recycle_", 3, float("nan"), r"tsam\.hmc_recycle_: share: got -?nan, expected a finite number$"),
        ("hmc_recycle_", 4, 1, r"tsam\.hmc_recycle_: state: got .*at least 24"),
        ("hmc_recycle_", 5, 3, r"tsam\.hmc_recycle_: part: got 3, expected"),
        ("hmc_end_", -5, float("inf"), r"tsam\.hmc_end_: kick: got inf, expected a finite number$"),
    ],
)
def test_coefficients_of_an_integrator_are_checked(name: str, place: int, value: float, message: str) -> None:
    """The prior of hmc_leapfrog_ here is the ball, whose drift runs forward only."""
    arguments = list(ARGUMENTS[name]())
    arguments[place] = value
    before = copies([t for a in arguments if isinstance(a, list) for t in a if isinstance(t, Tensor)])
    with pytest.raises(ValueError, match=message):
        getattr(_C, name)(*arguments)
    after = [t for a in arguments if isinstance(a, list) for t in a if isinstance(t, Tensor)]
    assert equal(before, after)


def test_every_op_has_an_opcheck() -> None:
    assert ARGUMENTS.keys() | set(_ops.DIFFERENTIABLE) == set(_ops.NAMES)


def test_the_list_ops_compile() -> None:
    def run(x: list[Tensor], saved: list[Tensor], grads: list[Tensor], state: Tensor) -> None:
        fused.perturb_(x, saved, state, 0.1, seed=3)
        fused.grad_norm_(grads, saved, state)
        fused.ascend_(x, saved, grads, state, 0.2)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)):
        x, saved, grads, state = lists(5, 70), [torch.zeros(5), torch.zeros(70)], lists(70, 5)[::-1], new_state(1)
        function(x, saved, grads, state)
        results.append([*x, *saved, state.nan_to_num()])
    assert equal(*results)
    assert not equal(results[0][:2], lists(5, 70))
