"""The tilted mean, its weights, and the tilted sum of values: differentiable in every mode and order.

Formulas: value (1/t) log mean exp(t L), weights softmax(t L), sum Σ softmax(t L)_j values_j.
Invariant: float64 inside, one rounding of the result; at t = 0 and ±inf the formulas are their limits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsam_ext import _ops
from tsam_ext._compile import kept_whole
from tsam_ext.engine.checks import check_alike, check_tensor, check_tilt, refuse

from .transforms import apply, below_autograd, loop_of_vmap

__all__ = ["tilted_loss", "tilted_reduce", "tilted_weights"]


def _checked(op: str, losses: object, tilt: object) -> tuple[Tensor, float]:
    if type(tilt) is not float or tilt != tilt:
        tilt = check_tilt(op, tilt)
    losses = check_tensor(op, "losses", losses)
    if losses.dim() != 1 or losses.shape[0] == 0:
        raise refuse(op, "losses", f"shape {tuple(losses.shape)}", "a vector of at least one loss")
    return losses.contiguous(), tilt


def tilted_loss(losses: Tensor, tilt: float) -> Tensor:
    """Tilted mean (1/t) log mean exp(t L): the mean at t=0, the maximum at t=inf, the minimum at t=-inf.

    Args:
        losses: shape ``[s]``, float32, float64, bfloat16 or float16.
        tilt: t, any number or infinity.

    Returns:
        0-dim tensor of the dtype of ``losses``; float64 inside, all digits kept as t → 0 (log1p/expm1 form).
        Its gradient is ``tilted_weights(losses, tilt)``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source: T. Li et al., "On tilted losses in machine learning: theory and applications", JMLR 24 (2023).

    Example:
        >>> import torch
        >>> tilted_loss(torch.tensor([0.0, 1.0, 2.0]), float("inf"))
        tensor(2.)
    """
    losses, tilt = _checked("tilted_loss", losses, tilt)
    result: Tensor = apply(_TiltedLoss, _TiltedLossReverse, losses, tilt)
    return result


def tilted_weights(losses: Tensor, tilt: float) -> Tensor:
    """softmax(t L): uniform at t=0, the extreme with ties shared at t=±inf.

    Args:
        losses: shape ``[s]``, float32, float64, bfloat16 or float16.
        tilt: t, any number or infinity.

    Returns:
        Shape ``[s]``, dtype of ``losses``, summing to 1. At t = 0 and ±inf its gradient is zero.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> tilted_weights(torch.tensor([1.0, 3.0, 3.0]), float("inf"))
        tensor([0.0000, 0.5000, 0.5000])
    """
    losses, tilt = _checked("tilted_weights", losses, tilt)
    result: Tensor = apply(_TiltedWeights, _TiltedWeightsReverse, losses, tilt)
    return result


def tilted_reduce(losses: Tensor, values: Tensor, tilt: float) -> Tensor:
    """Σ_j softmax(t L)_j values_j: the tilted gradient of a step, if ``values`` are the samples' gradients.

    Args:
        losses: shape ``[s]``.
        values: shape ``[s, ...]``, any strides: the sum runs over the first axis in float64 and reads each value where
            it lies, without a copy.
        tilt: t, any number or infinity.

    Returns:
        Shape ``values.shape[1:]``, dtype and layout of ``values[0]``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> tilted_reduce(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [3.0, 4.0]]), 0.0)
        tensor([2., 2.])
    """
    op = "tilted_reduce"
    losses, tilt = _checked(op, losses, tilt)
    values = check_alike(op, "values", values, losses, "losses", shape=False)
    if values.dim() < 1 or values.shape[0] != losses.shape[0]:
        expected = f"{losses.shape[0]} entries in front, one for each loss"
        raise refuse(op, "values", f"shape {tuple(values.shape)}", expected)
    result: Tensor = apply(_TiltedReduce, _TiltedReduceReverse, losses, values, tilt)
    return result


def _weights(losses: Tensor, tilt: float) -> Tensor:
    """tilted_weights of what has been checked."""
    result: Tensor = apply(_TiltedWeights, _TiltedWeightsReverse, losses, tilt)
    return result


class _Tilted(torch.autograd.Function):
    """What the three share: inputs kept for both modes."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.tilt = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


@kept_whole
class _TiltedLossReverse(_Tilted):
    op = _ops.tilted_loss

    @staticmethod
    def forward(losses: Tensor, tilt: float) -> Tensor:
        return below_autograd(_ops.tilted_loss, losses, tilt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (losses,) = ctx.saved_tensors
        return _ops.loss_backward(_weights(losses, ctx.tilt), grad), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return loop_of_vmap(_TiltedLoss, _TiltedLossReverse, info, in_dims, args)


class _TiltedLoss(_TiltedLossReverse):
    @staticmethod
    def jvp(ctx: Any, losses_dot: Tensor, _: None) -> Tensor:
        (losses,) = ctx.saved_tensors
        return (tilted_weights(losses, ctx.tilt) * losses_dot).sum()


@kept_whole
class _TiltedWeightsReverse(_Tilted):
    op = _ops.tilted_weights

    @staticmethod
    def forward(losses: Tensor, tilt: float) -> Tensor:
        return below_autograd(_ops.tilted_weights, losses, tilt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (losses,) = ctx.saved_tensors
        return _ops.weights_backward(_weights(losses, ctx.tilt), grad, ctx.tilt), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return loop_of_vmap(_TiltedWeights, _TiltedWeightsReverse, info, in_dims, args)


class _TiltedWeights(_TiltedWeightsReverse):
    @staticmethod
    def jvp(ctx: Any, losses_dot: Tensor, _: None) -> Tensor:
        (losses,) = ctx.saved_tensors
        # The Jacobian of a softmax is symmetric, so forward mode is the reverse formula.
        return _ops.weights_backward(tilted_weights(losses, ctx.tilt), losses_dot, ctx.tilt)


@kept_whole
class _TiltedReduceReverse(_Tilted):
    op = _ops.tilted_reduce

    @staticmethod
    def forward(losses: Tensor, values: Tensor, tilt: float) -> Tensor:
        return below_autograd(_ops.tilted_reduce, losses, values, tilt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        losses, values = ctx.saved_tensors
        weights = _weights(losses, ctx.tilt)
        return *_ops.reduce_backward(weights, values, grad, ctx.tilt), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return loop_of_vmap(_TiltedReduce, _TiltedReduceReverse, info, in_dims, args)


class _TiltedReduce(_TiltedReduceReverse):
    @staticmethod
    def jvp(ctx: Any, losses_dot: Tensor | None, values_dot: Tensor | None, _: None) -> Tensor:
        losses, values = ctx.saved_tensors
        weights = tilted_weights(losses, ctx.tilt)
        shape = (weights.shape[0],) + (1,) * (values.dim() - 1)
        change = torch.zeros_like(values[0])
        if values_dot is not None:
            change = change + (weights.to(values.dtype).reshape(shape) * values_dot).sum(0)
        if losses_dot is not None:
            weights_dot = _ops.weights_backward(weights, losses_dot, ctx.tilt).to(values.dtype)
            change = change + (weights_dot.reshape(shape) * values).sum(0)
        return change
