"""TSAM beside the rest of torch's training tools: clipping, GradScaler, learning-rate schedulers.

What stands between an estimate and its use sees ordinary gradients in p.grad, and what belongs to the base optimizer
works on either object. Twins that start from the same bits are compared.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor
from torch.optim import lr_scheduler


def pair(problem: Any) -> tuple[Any, ...]:
    """Two twins, each with its optimizer."""
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.3, "seed": 1}
    first, second = problem(), problem()
    return first, tsam(first.parameters, **options), second, tsam(second.parameters, **options)


def test_zero_grad_and_clipping_between_estimate_and_apply(problem) -> None:
    ours, optimizer, theirs, twin = pair(problem)
    for _ in range(3):
        optimizer.estimate_gradient(ours.closure(optimizer))
        norm = torch.nn.utils.clip_grad_norm_(ours.parameters, 0.05)
        assert float(norm) > 0.05
        assert float(ours.gradient().norm()) == pytest.approx(0.05, rel=1e-4)
        optimizer.apply()
        twin.estimate_gradient(theirs.closure(twin))
        scale = 0.05 / (float(theirs.gradient().norm()) + 1e-6)
        for p in theirs.parameters:
            p.grad.mul_(scale)
        twin.step()
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-12, atol=1e-14)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in ours.parameters)
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours.parameters)


def test_grad_scaler(problem) -> None:
    """Scaled by a power of two, unscaled between estimate and apply: the unscaled run's parameters."""
    ours, optimizer, theirs, twin = pair(problem)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        overflow = step == 1

        def closure(overflow: bool = overflow) -> Tensor:
            loss = ours.loss()
            scaler.scale(loss).backward()
            if overflow:
                ours.parameters[0].grad[0, 0] = math.inf
            return loss

        copies = ours.copies()
        optimizer.estimate_gradient(closure)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert ours.holds(copies) == overflow
        if not overflow:
            theirs.train(twin, 1)
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-9, atol=1e-12)
    assert scaler.get_scale() == 512.0


SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 1), lr_scheduler.ExponentialLR(o, 0.7)], [1]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", ["step", "apply"])
def test_schedulers_on_either_object(problem, name: str, form: str) -> None:
    """On TSAM and on its base: no warning, the same learning rates, the same bits."""
    ours, optimizer, theirs, twin = pair(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = SCHEDULES[name](optimizer), SCHEDULES[name](twin.base_optimizer)
        rates = []
        for _ in range(4):
            for task, own, schedule in zip((ours, theirs), (optimizer, twin), schedules, strict=True):
                if form == "step":
                    task.train(own, 1)
                else:
                    own.estimate_gradient(task.closure(own))
                    own.apply()
                schedule.step(*([1.0] if name == "plateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
            assert rates[-1] == twin.param_groups[0]["lr"] == twin.base_optimizer.param_groups[0]["lr"]
            assert ours.holds(theirs.copies())
        assert len(set(rates)) > 2
