"""hmc_carry_ where a gradient's memory becomes the mean's, and where TSAM lets it.

Law: the adopting form leaves the bits of the other one, whatever was decided of the trajectory and of its weight; only
the first counted sample can be adopted, and a buffer that p.grad was is filled, not replaced.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext import _C
from tsam_ext.engine.state import CHAIN_SLOTS, ChainSlot, new_state

SIZES = (3, 0, 70_001, 128)


def lists(dtype: torch.dtype) -> list[list[Tensor]]:
    """Carried gradients and those of a proposal."""
    torch.manual_seed(4)
    return [[torch.randn(n, dtype=dtype) for n in SIZES] for _ in range(2)]


def chain_after(taken: bool) -> Tensor:
    chain = torch.zeros(CHAIN_SLOTS, dtype=torch.float64)
    chain[ChainSlot.TAKEN] = taken
    return chain


def state_after(*losses: float, skip: bool = False) -> Tensor:
    state = new_state(len(losses))
    _C.tilt_begin_(state, torch.tensor(2.0))
    for row, loss in enumerate(losses):
        _C.tilt_update_(state, torch.tensor(loss), 0.0, row, skip, False)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("loss", [0.3, math.nan])
def test_adopting_leaves_the_bits_of_the_other_form(dtype: torch.dtype, taken: bool, loss: float) -> None:
    carried, fresh = lists(dtype)
    carried_2, fresh_2 = lists(dtype)
    mean = [torch.full_like(g, 7.0) for g in fresh]
    _C.hmc_carry_(mean, carried, fresh, chain_after(taken), state_after(loss), True)
    _C.hmc_carry_(fresh_2, carried_2, [], chain_after(taken), state_after(loss), True)
    for got, want in zip((*fresh_2, *carried_2), (*mean, *carried), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert carried[2].equal(lists(dtype)[taken][2]), "the chain goes on with the proposal's gradient if it was taken"


def test_a_skipped_sample_leaves_the_mean_to_the_next() -> None:
    carried, fresh = lists(torch.float32)
    state = state_after(math.inf, skip=True)
    _C.hmc_carry_(fresh, carried, [], chain_after(True), state, True)
    assert all(map(torch.equal, carried, fresh))
    _C.tilt_update_(state, torch.tensor(0.5), 0.0, 0, True, True)
    _C.hmc_carry_(fresh, carried, [torch.ones(n) for n in SIZES], chain_after(False), state, True)
    assert all(map(torch.equal, carried, fresh))


@pytest.mark.host_only("a device cannot refuse it: test_emulated.py has what it does")
def test_only_the_first_sample_can_be_adopted() -> None:
    carried, fresh = lists(torch.float32)
    before = [x.clone() for x in (*carried, *fresh)]
    with pytest.raises(ValueError, match=r"^tsam\.hmc_carry_: grads: got none, expected gradients: only the first"):
        _C.hmc_carry_(fresh, carried, [], chain_after(True), state_after(0.3, 0.4), True)
    assert all(map(torch.equal, (*carried, *fresh), before))


def test_what_is_adopted_has_the_chain_s_dtype() -> None:
    carried, fresh = lists(torch.float32)
    before = [x.clone() for x in (*carried, *fresh)]
    half = [g.to(torch.bfloat16) for g in carried]
    with pytest.raises(ValueError, match=r"^tsam\.hmc_carry_: accumulator\[0\]: got .*float32"):
        _C.hmc_carry_(fresh, half, [], chain_after(True), state_after(0.3), True)
    assert all(map(torch.equal, (*carried, *fresh), before))


def options(**changes: Any) -> dict[str, Any]:
    return {"lr": 0.1, "rho": 0.3, "seed": 3, "sampler": "hmc", "delta": 5.0, "num_samples": 3} | changes


def gradients_of_a_step(parameter: torch.nn.Parameter, **changes: Any) -> list[int]:
    """Where each pass's gradient lay."""
    optimizer, seen = tsam([parameter], **options(**changes)), []

    def closure() -> Tensor:
        loss = (parameter**2).sum()
        loss.backward()
        assert parameter.grad is not None
        seen.append(parameter.grad.data_ptr())
        return loss

    optimizer.estimate_gradient(closure)
    return seen


@pytest.mark.parametrize("burn_in", [0, 2])
def test_the_first_counted_gradient_s_memory_becomes_the_mean(burn_in: int) -> None:
    parameter = torch.nn.Parameter(torch.randn(1000))
    passes = gradients_of_a_step(parameter, burn_in=burn_in, chain="fresh" if burn_in else "persistent")
    assert parameter.grad is not None
    assert parameter.grad.data_ptr() == passes[1 + burn_in]
    assert passes[1 + burn_in] not in passes[2 + burn_in :]


@pytest.mark.parametrize("without", [2, 3])
def test_a_gradient_that_comes_after_the_first_sample_is_not_adopted(without: int) -> None:
    """The first ``without`` of four passes leave none: the samples that these end count as zero in the mean."""
    parameter = torch.nn.Parameter(torch.randn(1000))
    optimizer, calls = tsam([parameter], **options(delta=0.0, tilt=0.0)), [None] * 4

    def closure() -> Tensor:
        loss = (parameter**2).sum()
        if len(calls) >= without:
            loss.backward()
        calls.append(None if parameter.grad is None else parameter.grad.clone())
        return loss

    optimizer.step(closure)  # whose passes all have gradients
    calls.clear()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="no gradient, which counts as zeros"):
        optimizer.estimate_gradient(closure)
    assert parameter.grad is not None
    total = sum(g for g in calls[1:] if g is not None)
    torch.testing.assert_close(parameter.grad, total / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("why", ["buffer", "half", "view"])
def test_memory_that_is_another_s_or_narrower_is_not_adopted(why: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(1000, dtype=torch.bfloat16 if why == "half" else torch.float32)
    parameter, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    buffer = torch.ones_like(start) if why == "buffer" else None
    parameter.grad = buffer
    bucket = torch.zeros(5, 1001, dtype=start.dtype)
    optimizer, calls = tsam([parameter], **options()), []

    def closure() -> Tensor:
        loss = (parameter**2).sum()
        (gradient,) = torch.autograd.grad(loss, [parameter])
        calls.append(gradient)
        if why == "view":
            gradient = bucket[len(calls) - 1, 1:].copy_(gradient)
        parameter.grad = gradient
        return loss

    optimizer.estimate_gradient(closure)
    assert parameter.grad is not None
    assert all(parameter.grad.data_ptr() != g.data_ptr() for g in calls)
    if why == "buffer":
        assert parameter.grad is buffer
    if why == "view":
        assert parameter.grad.untyped_storage().data_ptr() != bucket.untyped_storage().data_ptr()
    gradients_of_a_step(plain)
    assert plain.grad is not None
    assert parameter.grad.equal(plain.grad), "the same mean"
