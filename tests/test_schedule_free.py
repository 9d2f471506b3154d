"""TSAM around optimizers with two sets of weights, which a training loop switches by train() and eval().

Law: in float64 the steps, and the weights that eval() shows, are those of the same optimizer with SAM's gradient worked
out by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tsam_ext import TSAM

po = pytest.importorskip("pytorch_optimizer")
RHO = 0.3
BASES: dict[str, dict[str, Any]] = {
    "ScheduleFreeSGD": {"lr": 0.5, "warmup_steps": 2},
    "ScheduleFreeAdamW": {"lr": 0.05, "weight_decay": 0.01},
    "ScheduleFreeRAdam": {"lr": 0.05},
}


def hand_made_step(task: Any, base: torch.optim.Optimizer) -> None:
    """SAM: the gradient at θ + ρ g/|g|, taken to the base's step at θ."""
    origin = task.copies()
    for p in task.parameters:
        p.grad = None
    task.loss().backward()
    norm = task.gradient().norm()
    with torch.no_grad():
        for p in task.parameters:
            p.add_(p.grad, alpha=RHO / float(norm))
            p.grad = None
    task.loss().backward()
    with torch.no_grad():
        for p, bits in zip(task.parameters, origin, strict=True):
            p.copy_(bits)
    base.step()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("wrapped", ["class", "instance"])
def test_schedule_free_steps_are_hand_made_ones(problem, name: str, wrapped: str) -> None:
    ours, theirs = problem(), problem()
    kind, options = getattr(po, name), BASES[name]
    oracle = kind(theirs.parameters, **options)
    sam: dict[str, Any] = {"rho": RHO, "radius": 0.0, "num_samples": 1, "seed": 1}
    if wrapped == "class":
        optimizer = TSAM(ours.parameters, kind, **sam, **options)
    else:
        optimizer = TSAM(kind(ours.parameters, **options), **sam)
    for _ in range(4):
        optimizer.train()
        oracle.train()
        ours.train(optimizer, 2)
        for _ in range(2):
            hand_made_step(theirs, oracle)
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-12, atol=1e-14)
        training = ours.flat()
        optimizer.eval()
        oracle.eval()
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ours.flat(), training, rtol=1e-6)


def test_bases_without_modes_have_none(problem) -> None:
    """Trainers call them where they exist: on most bases they do nothing."""
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, num_samples=3)
    bits = task.copies()
    optimizer.train()
    optimizer.eval()
    assert task.holds(bits)


@pytest.mark.parametrize("where", ["closure", "perturbed", "two steps"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_switch_inside_a_step(problem, where: str, mode: str) -> None:
    """The base would move parameters that have been moved, and they would go back to where they were before both."""
    task = problem()
    optimizer = TSAM(task.parameters, po.ScheduleFreeSGD, lr=0.5, rho=RHO, radius=0.0, num_samples=1)
    task.train(optimizer, 2)
    bits = task.copies()

    def switch() -> None:
        if where == "closure":
            optimizer.step(lambda: getattr(optimizer, mode)())
        elif where == "perturbed":
            with optimizer.perturbed():
                getattr(optimizer, mode)()
        else:
            task.loss().backward()
            optimizer.first_step()
            getattr(optimizer, mode)()

    with pytest.raises(RuntimeError, match=rf"TSAM: {mode}\(\) inside a step"):
        switch()
    if where == "two steps":
        optimizer.second_step()
    else:
        assert task.holds(bits)
    getattr(optimizer, mode)()


def test_zero_grad_is_the_base_s(problem) -> None:
    """A base may hold more gradients than p.grad."""
    task = problem()
    asked: list[dict[str, Any]] = []

    class Clearing(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            asked.append({"set_to_none": set_to_none})
            super().zero_grad(set_to_none)

    optimizer = TSAM(task.parameters, Clearing, lr=0.1)
    task.loss().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in task.parameters)
    optimizer.zero_grad()
    assert all(p.grad is None for p in task.parameters)
    assert asked == [{"set_to_none": False}, {"set_to_none": True}]
