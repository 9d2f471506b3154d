"""torch.ops.tsam, and what PyTorch has to know about each op beside its kernels: fakes and autograd formulas.

Schemas and what the arguments mean: csrc/ops/schema.cpp. This is the only file that names torch.ops. The list ops
are checked by the kernels themselves (csrc/ops/checks.h); tsam_ext.functional is the checked way to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C  # noqa: F401  (its import registers the ops)

_library = torch.ops.tsam

# With the signatures of _C.pyi, so that a type checker sees two arguments that have been exchanged.
if TYPE_CHECKING:
    from ._C import (
        accumulate_ as accumulate_,
    )
    from ._C import (
        accumulate_perturb_ as accumulate_perturb_,
    )
    from ._C import (
        add_direction_ as add_direction_,
    )
    from ._C import (
        ascend_ as ascend_,
    )
    from ._C import (
        displacement_ as displacement_,
    )
    from ._C import (
        grad_norm_ as grad_norm_,
    )
    from ._C import (
        hmc_adapt_ as hmc_adapt_,
    )
    from ._C import (
        hmc_begin_ as hmc_begin_,
    )
    from ._C import (
        hmc_carry_ as hmc_carry_,
    )
    from ._C import (
        hmc_end_ as hmc_end_,
    )
    from ._C import (
        hmc_leapfrog_ as hmc_leapfrog_,
    )
    from ._C import (
        hmc_place_ as hmc_place_,
    )
    from ._C import (
        hmc_recycle_ as hmc_recycle_,
    )
    from ._C import (
        kick as kick,
    )
    from ._C import (
        kick_ as kick_,
    )
    from ._C import (
        leapfrog as leapfrog,
    )
    from ._C import (
        leapfrog_ as leapfrog_,
    )
    from ._C import (
        norm_ascend_ as norm_ascend_,
    )
    from ._C import (
        perturb as perturb,
    )
    from ._C import (
        perturb_ as perturb_,
    )
    from ._C import (
        restore_ as restore_,
    )
    from ._C import (
        take_direction_ as take_direction_,
    )
    from ._C import (
        tilt_begin_ as tilt_begin_,
    )
    from ._C import (
        tilt_summary as tilt_summary,
    )
    from ._C import (
        tilt_update_ as tilt_update_,
    )
    from ._C import (
        tilted_loss as tilted_loss,
    )
    from ._C import (
        tilted_reduce as tilted_reduce,
    )
    from ._C import (
        tilted_weights as tilted_weights,
    )
else:
    perturb_ = _library.perturb_.default
    grad_norm_ = _library.grad_norm_.default
    ascend_ = _library.ascend_.default
    norm_ascend_ = _library.norm_ascend_.default
    displacement_ = _library.displacement_.default
    tilt_begin_ = _library.tilt_begin_.default
    tilt_update_ = _library.tilt_update_.default
    accumulate_ = _library.accumulate_.default
    accumulate_perturb_ = _library.accumulate_perturb_.default
    take_direction_ = _library.take_direction_.default
    add_direction_ = _library.add_direction_.default
    restore_ = _library.restore_.default
    hmc_place_ = _library.hmc_place_.default
    hmc_begin_ = _library.hmc_begin_.default
    hmc_leapfrog_ = _library.hmc_leapfrog_.default
    hmc_end_ = _library.hmc_end_.default
    hmc_recycle_ = _library.hmc_recycle_.default
    hmc_carry_ = _library.hmc_carry_.default
    hmc_adapt_ = _library.hmc_adapt_.default
    tilted_loss = _library.tilted_loss.default
    tilted_weights = _library.tilted_weights.default
    tilted_reduce = _library.tilted_reduce.default
    leapfrog = _library.leapfrog.default
    kick = _library.kick.default
    leapfrog_ = _library.leapfrog_.default
    kick_ = _library.kick_.default
    perturb = _library.perturb.default
    tilt_summary = _library.tilt_summary.default

LIST_OPS = (
    "perturb_",
    "grad_norm_",
    "ascend_",
    "norm_ascend_",
    "displacement_",
    "tilt_begin_",
    "tilt_update_",
    "accumulate_",
    "accumulate_perturb_",
    "take_direction_",
    "add_direction_",
    "restore_",
    "hmc_place_",
    "hmc_begin_",
    "hmc_leapfrog_",
    "hmc_end_",
    "hmc_recycle_",
    "hmc_carry_",
    "hmc_adapt_",
)

IN_PLACE = ("leapfrog_", "kick_")  # of one tensor; not differentiable
DIFFERENTIABLE = ("tilted_loss", "tilted_weights", "tilted_reduce", "leapfrog", "kick", "perturb")
NAMES = (*LIST_OPS, *IN_PLACE, *DIFFERENTIABLE, "tilt_summary")


def _check_devices(name: str, args: tuple[Any, ...]) -> None:
    """Refuses tensors of two devices: a meta one among others brings an op to its fake instead of to a kernel.

    Doing nothing, or handing out a tensor without values, would be silent and wrong.
    """
    first: tuple[str, torch.device] | None = None
    for argument, value in zip(getattr(_library, name).default._schema.arguments, args, strict=False):
        tensors = value if isinstance(value, (list, tuple)) else [value]
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor):
                place = f"{argument.name}[{i}]" if tensors is value else argument.name
                first = first or (place, tensor.device)
                if tensor.device != first[1]:
                    expected = f"one on {first[1]}, as {first[0]} is"
                    raise ValueError(f"tsam.{name}: {place}: got a tensor on {tensor.device}, expected {expected}")


def _register_fake(name: str, result: Callable[..., Any]) -> None:
    def fake(*args: Any) -> Any:
        _check_devices(name, args)
        return result(*args)

    torch.library.register_fake(f"tsam::{name}", fake)


def _fake_in_place(*args: Any) -> None:
    return None


def _fake_loss(losses: Tensor, tilt: float) -> Tensor:
    return losses.new_empty(())


def _fake_weights(losses: Tensor, tilt: float) -> Tensor:
    return losses.new_empty(losses.shape)


def _fake_reduce(losses: Tensor, values: Tensor, tilt: float) -> Tensor:
    return torch.empty_like(values[0])


def _fake_leapfrog(position: Tensor, momentum: Tensor, grad: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(position), torch.empty_like(position)


def _fake_first(first: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(first)


def _fake_summary(state: Tensor, num_samples: int) -> Tensor:
    return state.new_empty((num_samples + 2,))


def loss_backward(weights: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the tilted mean. Not 0-dim times vector: of no rows torch's vmap refuses such a product."""
    return grad.reshape(1) * weights


def weights_backward(weights: Tensor, grad: Tensor, tilt: float) -> Tensor:
    """d/dL of Σ grad · softmax(tL): t w ⊙ (grad − Σ w grad); zero where the weights are constant (t = 0, ±inf)."""
    if tilt == 0.0 or tilt in (float("inf"), float("-inf")):
        return torch.zeros_like(weights)
    return torch._softmax_backward_data(grad, weights, 0, weights.dtype) * tilt


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tilt = inputs
    ctx.save_for_backward(*tensors)


def _loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (losses,) = ctx.saved_tensors
    return loss_backward(tilted_weights(losses, ctx.tilt), grad), None


def _weights_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (losses,) = ctx.saved_tensors
    return weights_backward(tilted_weights(losses, ctx.tilt), grad, ctx.tilt), None


def reduce_backward(weights: Tensor, values: Tensor, grad: Tensor, tilt: float) -> tuple[Tensor, Tensor]:
    """Gradients of Σ w_j values_j to the losses and to the values."""
    rows = values.reshape(values.shape[0], grad.numel())
    column = grad.reshape(grad.numel(), 1)
    if torch.is_autocast_enabled(values.device.type):  # it would round both factors to half precision
        with torch.autocast(values.device.type, enabled=False):
            products = rows @ column
    else:
        products = rows @ column
    products = products.squeeze(1).to(weights.dtype)
    shape = (weights.shape[0],) + (1,) * grad.dim()
    return weights_backward(weights, products, tilt), weights.to(values.dtype).reshape(shape) * grad


def _reduce_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    losses, values = ctx.saved_tensors
    return *reduce_backward(tilted_weights(losses, ctx.tilt), values, grad, ctx.tilt), None


def _to_factor(change: Tensor, factor: Tensor) -> Tensor:
    """The gradient of a factor from that of each element: summed where the factor is one number."""
    return (change.sum() if factor.dim() == 0 else change).to(factor.dtype)


def keep_leapfrog(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what leapfrog_backward needs: of the outputs the momentum, of the inputs all but position and momentum."""
    _, _, grad, step, inverse_mass = inputs
    ctx.save_for_backward(grad, step, inverse_mass, output[1])


def leapfrog_backward(ctx: Any, grad_position: Tensor, grad_momentum: Tensor) -> tuple[Tensor | None, ...]:
    """With A = G_p + h m⁻¹ G_x: x: G_x, p: A, g: h/2 A, h: m⁻¹ p' G_x + g A / 2, m⁻¹: h p' G_x."""
    grad, step, inverse_mass, half = ctx.saved_tensors
    _, _, grad_needed, step_needed, mass_needed = ctx.needs_input_grad
    through = (grad_momentum + step * inverse_mass * grad_position).to(grad.dtype)
    of_grad = (0.5 * step * through).to(grad.dtype) if grad_needed else None
    of_step = of_mass = None
    if step_needed:
        of_step = _to_factor(inverse_mass * half * grad_position + 0.5 * grad * through, step)
    if mass_needed:
        of_mass = _to_factor(step * half * grad_position, inverse_mass)
    return grad_position, through, of_grad, of_step, of_mass


def keep_kick(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Keeps what kick_backward needs."""
    ctx.save_for_backward(*inputs[1:])


def kick_backward(ctx: Any, grad_momentum: Tensor) -> tuple[Tensor | None, ...]:
    """p: G, g: a G, a: g G."""
    grad, a = ctx.saved_tensors
    _, grad_needed, a_needed = ctx.needs_input_grad
    of_grad = (a * grad_momentum).to(grad.dtype) if grad_needed else None
    return grad_momentum, of_grad, _to_factor(grad * grad_momentum, a) if a_needed else None


def keep_perturb(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what names the noise, and the form of x, but no tensor."""
    x, radius, *ctx.noise = inputs
    ctx.shape, ctx.stride, ctx.dtype, ctx.device = x.shape, x.stride(), x.dtype, x.device
    ctx.radius_dtype = radius.dtype


def unit_noise(ctx: Any) -> Tensor:
    """The noise of a perturb at radius 1, in the type that it is computed in."""
    wide = torch.float64 if ctx.dtype == torch.float64 else torch.float32
    zero = torch.empty_strided(ctx.shape, ctx.stride, dtype=wide, device=ctx.device).zero_()
    return perturb(zero, torch.ones((), dtype=wide, device=ctx.device), *ctx.noise)


def perturb_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """x: G, radius: Σ ν G."""
    of_radius = (unit_noise(ctx) * grad).sum().to(ctx.radius_dtype) if ctx.needs_input_grad[1] else None
    return grad, of_radius, None, None, None, None


for _name in (*LIST_OPS, *IN_PLACE):
    _register_fake(_name, _fake_in_place)
_register_fake("tilted_loss", _fake_loss)
_register_fake("tilted_weights", _fake_weights)
_register_fake("tilted_reduce", _fake_reduce)
_register_fake("leapfrog", _fake_leapfrog)
_register_fake("kick", _fake_first)
_register_fake("perturb", _fake_first)
_register_fake("tilt_summary", _fake_summary)
torch.library.register_autograd("tsam::tilted_loss", _loss_backward, setup_context=_keep_inputs)
torch.library.register_autograd("tsam::tilted_weights", _weights_backward, setup_context=_keep_inputs)
torch.library.register_autograd("tsam::tilted_reduce", _reduce_backward, setup_context=_keep_inputs)
torch.library.register_autograd("tsam::leapfrog", leapfrog_backward, setup_context=keep_leapfrog)
torch.library.register_autograd("tsam::kick", kick_backward, setup_context=keep_kick)
torch.library.register_autograd("tsam::perturb", perturb_backward, setup_context=keep_perturb)
