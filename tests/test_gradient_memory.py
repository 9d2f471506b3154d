"""Whose memory a gradient lies in: what a closure or a hook holds of p.grad is never written by us.

The laws: a closure that points p.grad at buffers of its own trains as one that does not; a hook that keeps p.grad sees
it unchanged after the step.
"""

from __future__ import annotations

from typing import Any

import torch
from flat_options import WAYS, tsam
from torch import Tensor


def test_a_closure_with_buffers_of_its_own_for_gradients(problem) -> None:
    """A graph's replay writes the same memory in every pass: nothing of it may become the mean."""
    for name, options in WAYS.items():
        ours, theirs = problem(), problem()
        optimizer, twin = (tsam(t.parameters, lr=0.1, seed=3, **options) for t in (ours, theirs))
        sizes = [p.numel() for p in ours.parameters]
        flat = torch.zeros(sum(sizes), dtype=torch.float64)
        views = [part.view_as(p) for part, p in zip(flat.split(sizes), ours.parameters, strict=True)]
        for buffers in ([torch.zeros_like(p) for p in ours.parameters], views):

            def closure(buffers: list[Tensor] = buffers, ours: Any = ours) -> Tensor:
                loss = ours.loss()
                gradients = torch.autograd.grad(loss, ours.parameters)
                for p, buffer, gradient in zip(ours.parameters, buffers, gradients, strict=True):
                    p.grad = buffer.copy_(gradient)
                return loss

            optimizer.zero_grad()
            optimizer.step(closure)
            theirs.train(twin, 1)
            assert ours.holds(theirs.copies()), name


def test_a_hook_that_keeps_gradients_sees_them_unchanged(problem) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)
    kept: list[tuple[Tensor | None, Tensor]] = []
    parameter = task.parameters[0]
    parameter.register_post_accumulate_grad_hook(lambda p: kept.append((p.grad, p.grad.clone())))
    task.train(optimizer, 1)
    assert len(kept) == 6
    assert all(torch.equal(live, copy) for live, copy in kept)
