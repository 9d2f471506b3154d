"""SAM and ASAM as exact limits: one sample, radius 0, bit for bit against a step written here.

ε = (ρ/‖Dg‖) D (D g), D = 1 or |θ|; each element is one fma of the compute type, taken from the C library, and the norm
is the one of our own norm op, which is held against torch's apart.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext.functional import Slot, grad_norm_, new_state

LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
LIBM.fma.restype, LIBM.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
LIBM.fmaf.restype, LIBM.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c with one rounding."""
    fma = LIBM.fma if c.dtype == torch.float64 else LIBM.fmaf
    rows = zip(a.flatten().tolist(), b.flatten().tolist(), c.flatten().tolist(), strict=True)
    return torch.tensor([fma(*row) for row in rows], dtype=c.dtype).view_as(c)


def sam_gradient(task: Any, rho: float, adaptive: bool) -> float:
    """SAM's gradient into p.grad; returns the loss at the start."""
    origin = task.copies()
    loss = task.loss()
    grads = list(torch.autograd.grad(loss, task.parameters))
    state = new_state(1)
    grad_norm_(grads, origin, state, adaptive=adaptive)
    scaled = [o.abs() * g if adaptive else g for o, g in zip(origin, grads, strict=True)]
    norm = torch.cat([g.double().flatten() for g in scaled]).norm()
    assert abs(state[Slot.GRAD_NORM] / norm - 1) < (1e-12 if grads[0].dtype == torch.float64 else 1e-6)
    scale = torch.tensor(rho / float(state[Slot.GRAD_NORM]), dtype=grads[0].dtype)
    with torch.no_grad():
        for p, o, g, dg in zip(task.parameters, origin, grads, scaled, strict=True):
            p.copy_(multiply_add(scale * o.abs(), dg, o) if adaptive else multiply_add(scale.expand_as(g), g, o))
    grads = list(torch.autograd.grad(task.loss(), task.parameters))
    with torch.no_grad():
        for p, o, g in zip(task.parameters, origin, grads, strict=True):
            p.copy_(o)
            p.grad = g
    return float(loss.detach())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_sample_without_noise_is_sam_bit_for_bit(problem, base: str, adaptive: bool, dtype: torch.dtype) -> None:
    kind, options = BASES[base]
    rho = 2.0 if adaptive else 0.3
    ours, theirs = problem("digits", dtype=dtype), problem("digits", dtype=dtype)
    optimizer = tsam(ours.parameters, kind, tilt=7.0, rho=rho, adaptive=adaptive, num_samples=1, radius=0, **options)
    plain = kind(theirs.parameters, **options)
    losses = []
    for _ in range(20):
        losses.append(sam_gradient(theirs, rho, adaptive))
        plain.step()
        assert ours.train(optimizer, 1) == losses[-1:]
        assert ours.holds(theirs.copies())
    assert losses[-1] < 0.7 * losses[0]
