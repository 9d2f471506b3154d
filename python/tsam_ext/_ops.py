"""torch.ops.tsam, and what PyTorch has to know about each op beside its kernels: fakes and autograd formulas.

Schemas and what the arguments mean: csrc/ops/schema.cpp. This is the only file that names torch.ops. The list ops
are checked by the kernels themselves (csrc/ops/checks.h); tsam_ext.functional is the checked way to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _C  # noqa: F401  (its import registers the ops)

_library = torch.ops.tsam

perturb_: Callable[..., None] = _library.perturb_.default
grad_norm_: Callable[..., None] = _library.grad_norm_.default
ascend_: Callable[..., None] = _library.ascend_.default
tilt_begin_: Callable[..., None] = _library.tilt_begin_.default
tilt_update_: Callable[..., None] = _library.tilt_update_.default
accumulate_: Callable[..., None] = _library.accumulate_.default
restore_: Callable[..., None] = _library.restore_.default
tilted_loss: Callable[[Tensor, float], Tensor] = _library.tilted_loss.default
tilted_weights: Callable[[Tensor, float], Tensor] = _library.tilted_weights.default
tilted_reduce: Callable[[Tensor, Tensor, float], Tensor] = _library.tilted_reduce.default
tilt_summary: Callable[[Tensor, int], Tensor] = _library.tilt_summary.default

LIST_OPS = (
    "perturb_",
    "grad_norm_",
    "ascend_",
    "tilt_begin_",
    "tilt_update_",
    "accumulate_",
    "restore_",
)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        yield from ((arg,) if isinstance(arg, Tensor) else arg if isinstance(arg, (list, tuple)) else ())


def _fake_in_place(name: str) -> Callable[..., None]:
    def fake(*args: Any) -> None:
        # A list with a meta tensor in it comes here instead of to a kernel: doing nothing would be silent and wrong.
        devices = sorted({str(t.device) for t in _tensors(args) if isinstance(t, Tensor)})
        if len(devices) > 1:
            got = f"tensors on {' and '.join(devices)}"
            raise ValueError(f"tsam.{name}: got {got}, expected all arguments on one device")

    return fake


def _fake_loss(losses: Tensor, tilt: float) -> Tensor:
    return losses.new_empty(())


def _fake_weights(losses: Tensor, tilt: float) -> Tensor:
    return losses.new_empty(losses.shape)


def _fake_reduce(losses: Tensor, values: Tensor, tilt: float) -> Tensor:
    return values.new_empty(values.shape[1:])


def _fake_summary(state: Tensor, num_samples: int) -> Tensor:
    return state.new_empty((num_samples + 2,))


def weights_backward(weights: Tensor, grad: Tensor, tilt: float) -> Tensor:
    """d/dL of Σ grad · softmax(tL): t w ⊙ (grad − Σ w grad); zero where the weights are constant (t = 0, ±inf)."""
    if tilt == 0.0 or tilt in (float("inf"), float("-inf")):
        return torch.zeros_like(weights)
    return tilt * weights * (grad - (weights * grad).sum())


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tilt = inputs
    ctx.save_for_backward(*tensors)


def _loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (losses,) = ctx.saved_tensors
    return grad * tilted_weights(losses, ctx.tilt), None


def _weights_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (losses,) = ctx.saved_tensors
    return weights_backward(tilted_weights(losses, ctx.tilt), grad, ctx.tilt), None


def reduce_backward(weights: Tensor, values: Tensor, grad: Tensor, tilt: float) -> tuple[Tensor, Tensor]:
    """Gradients of Σ w_j values_j to the losses and to the values."""
    rows = values.reshape(values.shape[0], -1)
    products = (rows @ grad.reshape(-1, 1)).squeeze(1).to(weights.dtype)
    shape = (-1,) + (1,) * grad.dim()
    return weights_backward(weights, products, tilt), weights.to(values.dtype).reshape(shape) * grad


def _reduce_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    losses, values = ctx.saved_tensors
    return *reduce_backward(tilted_weights(losses, ctx.tilt), values, grad, ctx.tilt), None


for _name in LIST_OPS:
    torch.library.register_fake(f"tsam::{_name}", _fake_in_place(_name))
torch.library.register_fake("tsam::tilted_loss", _fake_loss)
torch.library.register_fake("tsam::tilted_weights", _fake_weights)
torch.library.register_fake("tsam::tilted_reduce", _fake_reduce)
torch.library.register_fake("tsam::tilt_summary", _fake_summary)
torch.library.register_autograd("tsam::tilted_loss", _loss_backward, setup_context=_keep_inputs)
torch.library.register_autograd("tsam::tilted_weights", _weights_backward, setup_context=_keep_inputs)
torch.library.register_autograd("tsam::tilted_reduce", _reduce_backward, setup_context=_keep_inputs)
