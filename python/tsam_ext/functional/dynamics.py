"""The moves of a sampler as differentiable functions: leapfrog, kick, and a reproducible random perturbation.

Formulas: leapfrog p' = p + (h/2) g, x' = x + h m⁻¹ p'; kick p' = p + a g; perturb x' = x + r ν.
Layout: results have the layout of their first argument; one pass over memory an op, one rounding a result (leapfrog's
x' comes from the unrounded p'). A number may be a tensor: then it has a derivative, and nothing looks at its value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsam_ext import _ops
from tsam_ext._compile import kept_whole
from tsam_ext.engine.checks import (
    check_alike,
    check_int,
    check_noise,
    check_number,
    check_seed,
    check_tensor,
    is_dense,
    order_of,
    refuse,
    shown,
)

from .transforms import apply, below_autograd, loop_of_vmap

__all__ = ["kick", "leapfrog", "perturb"]


def leapfrog(
    position: Tensor,
    momentum: Tensor,
    grad_log_density: Tensor,
    step_size: Tensor | float,
    inverse_mass: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Half a kick, then a drift: p' = momentum + (step_size/2) grad, x' = position + step_size inverse_mass p'.

    A trajectory of N steps of size h is ``leapfrog`` N times with one gradient at each new position and
    ``kick(momentum, grad, h/2)`` after each; between two steps the two half kicks may be one ``kick(..., h)``.

    Args:
        position: any shape, float32, float64, bfloat16 or float16.
        momentum: like ``position``.
        grad_log_density: like ``position``: the gradient of the log density at ``position``.
        step_size: h, a finite number, or a tensor that broadcasts to the shape of ``position`` (a step per chain, say).
        inverse_mass: the diagonal of M⁻¹, a positive number or a tensor that broadcasts. Default 1.

    Returns:
        ``(position, momentum)``: the new position and the momentum half a step on, like the arguments.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source: R. Neal, "MCMC using Hamiltonian dynamics", 2011, section 2.3 (arXiv 1206.1901).

    Example:
        >>> import torch
        >>> x, p = torch.tensor([1.0]), torch.tensor([0.0])
        >>> x, p = leapfrog(x, p, -x, 0.5)
        >>> x, kick(p, -x, 0.25)
        (tensor([0.8750]), tensor([-0.4688]))
    """
    checked = checked_leapfrog("leapfrog", position, momentum, grad_log_density, step_size, inverse_mass)
    result: tuple[Tensor, Tensor] = apply(_Leapfrog, _LeapfrogReverse, *aligned(*checked))
    return result


def kick(momentum: Tensor, grad_log_density: Tensor, a: Tensor | float) -> Tensor:
    """``momentum + a * grad_log_density``: with a = h/2 the second half of the step that :func:`leapfrog` begins.

    Args:
        momentum: any shape, float32, float64, bfloat16 or float16.
        grad_log_density: like ``momentum``.
        a: a finite number, or a tensor that broadcasts to the shape of ``momentum``.

    Returns:
        The new momentum, like ``momentum``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source: R. Neal, "MCMC using Hamiltonian dynamics", 2011, section 2.3 (arXiv 1206.1901).

    Example:
        >>> import torch
        >>> kick(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 4.0]), 0.25)
        tensor([2., 3.])
    """
    op = "kick"
    momentum = check_tensor(op, "momentum", momentum)
    grad_log_density = check_alike(op, "grad_log_density", grad_log_density, momentum, "momentum")
    factor = factor_of(op, "a", a, momentum, "momentum")
    result: Tensor = apply(_Kick, _KickReverse, *aligned(momentum, grad_log_density, factor))
    return result


def perturb(
    x: Tensor,
    radius: Tensor | float,
    seed: int,
    draw: int,
    base: int = 0,
    kind: str = "gaussian",
) -> Tensor:
    """``x + radius * ν`` with ν a pure function of (seed, draw, base, kind): the noise that :class:`TSAM` draws.

    Differentiable in ``x`` and ``radius``. Under ``vmap`` each row gets what it would get alone, so all rows share ν;
    give rows of their own noise by different draws.

    Args:
        x: any shape, float32, float64, bfloat16 or float16; d elements.
        radius: not below 0; length of the perturbation (its root mean square for gaussian). A number or 0-dim tensor.
        seed: 64-bit key of the noise.
        draw: which draw, from 0 to 2⁶⁰ − 1. ``step << 28 | sample`` is the draw of a TSAM step.
        base: element index of the first element, so that a slice of a tensor may draw its slice of the noise.
            Elements count in storage order. Default 0.
        kind: ``"gaussian"`` (ν = z/√d; default), ``"sphere"`` (z/‖z‖), ``"ball"`` (uniform in the unit ball) or
            ``"rademacher"`` (±1/√d, of norm 1: the cheapest. Element e takes bit e mod 128 of its Philox block e/128,
            that is bit e mod 32 of word (e mod 128)/32, in a counter of its own purpose; a set bit is −1/√d).

    Returns:
        Like ``x``. Equal arguments give the same bits on every machine, thread count and instruction set (for
        sphere and ball as far as their norm does: over threads and instruction sets).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10), and Box-Muller.

    Example:
        >>> import torch
        >>> x = torch.zeros(3, 4)
        >>> torch.equal(perturb(x, 0.1, seed=7, draw=0), perturb(x, 0.1, seed=7, draw=0))
        True
        >>> perturb(x, 0.1, seed=7, draw=0, kind="sphere").norm()
        tensor(0.1000)
    """
    op = "perturb"
    x = check_tensor(op, "x", x)
    if isinstance(radius, Tensor):
        radius = check_alike(op, "radius", radius, x, "x", shape=False)
        if radius.numel() != 1:
            raise refuse(op, "radius", f"shape {tuple(radius.shape)}", "a number or a tensor of one element")
        radius = radius.reshape(())
    else:
        radius = _number(check_number(op, "radius", radius, "a finite number not below 0", 0.0), x)
    key = check_seed(op, seed)
    draw = check_int(op, "draw", draw, 0, (1 << 60) - 1)
    base = check_int(op, "base", base, 0, (1 << 62) - 1)
    noise = check_noise(op, "kind", kind)
    x = x if x.is_contiguous() or is_dense(x) else x.contiguous()
    result: Tensor = apply(_Perturb, _PerturbReverse, x, radius, key, draw, base, noise)
    return result


def checked_leapfrog(
    op: str, position: object, momentum: object, grad_log_density: object, step_size: object, inverse_mass: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments of leapfrog as tensors that go together; TypeError or ValueError naming one that does not."""
    like = check_tensor(op, "position", position)
    return (
        like,
        check_alike(op, "momentum", momentum, like, "position"),
        check_alike(op, "grad_log_density", grad_log_density, like, "position"),
        factor_of(op, "step_size", step_size, like, "position"),
        factor_of(op, "inverse_mass", inverse_mass, like, "position", positive=True),
    )


def _number(value: float, like: Tensor) -> Tensor:
    return torch.scalar_tensor(value, dtype=torch.float64, device=like.device)


def factor_of(op: str, argument: str, value: object, like: Tensor, reference: str, positive: bool = False) -> Tensor:
    """A factor as the ops take it: 0-dim of any dtype, or one value per element."""
    if not isinstance(value, Tensor):
        number = check_number(op, argument, value, "a finite positive number" if positive else "a finite number")
        if positive and number <= 0.0:
            raise refuse(op, argument, shown(value), "a finite positive number")
        return _number(number, like)
    factor = check_alike(op, argument, value, like, reference, shape=False)
    missing = like.dim() - factor.dim()
    pairs = zip(factor.shape, like.shape[max(missing, 0) :], strict=False)
    if missing < 0 or any(have not in (1, want) for have, want in pairs):
        expected = f"one that broadcasts to {tuple(like.shape)}, the shape of {reference}"
        raise refuse(op, argument, f"shape {tuple(factor.shape)}", expected)
    if factor.numel() == 1:
        return factor.reshape(())
    return factor.to(like.dtype).expand(like.shape)


def aligned(first: Tensor, *rest: Tensor) -> list[Tensor]:
    """The tensors in the layout of the first, or contiguous where that one has gaps; 0-dim factors stay."""
    if first.is_contiguous():
        return [first, *[tensor.contiguous() for tensor in rest]]
    if not is_dense(first):
        return [tensor.contiguous() for tensor in (first, *rest)]
    order = order_of(first)
    back = [order.index(dim) for dim in range(len(order))]
    # contiguous() makes no copy of what is in that layout already.
    return [first, *(t.permute(order).contiguous().permute(back) if t.dim() else t for t in rest)]


def _in_front(info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...], full: int) -> list[Tensor]:
    """The arguments of a vmapped elementwise op as one call's: the mapped axis in front, all of one layout.

    The first ``full`` have one value per element; the others are factors, and numbers for all rows stay numbers.
    """
    first, dim = tensors[0], in_dims[0]
    shape = (info.batch_size, *(first.movedim(dim, 0).shape[1:] if dim is not None else first.shape))
    rows: list[Tensor] = []
    for tensor, dim in zip(tensors, in_dims, strict=True):
        if dim is None and tensor.dim() == 0 and len(rows) >= full:
            rows.append(tensor)
            continue
        row = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
        row = row.reshape(row.shape[0], *(1,) * (len(shape) - row.dim()), *row.shape[1:])
        rows.append(row.to(first.dtype).expand(shape).contiguous())
    return rows


def _rounds(in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...], full: int) -> bool:
    """Whether one call for all rows would round a row's number, as factors that differ have the dtype of the rest."""
    narrow = tensors[0].dtype in (torch.bfloat16, torch.float16)
    factors = zip(tensors[full:], in_dims[full:], strict=True)
    return narrow and any(f.dim() == 1 and d is not None and f.dtype != tensors[0].dtype for f, d in factors)


def _vmap(function: Any, reverse: Any, info: Any, in_dims: tuple[int | None, ...], args: Any, full: int) -> Any:
    if _rounds(in_dims, args, full):
        return loop_of_vmap(function, reverse, info, in_dims, args)
    results = apply(function, reverse, *_in_front(info, in_dims, args, full))
    return results, (0,) * len(results) if isinstance(results, tuple) else 0


@kept_whole
class _LeapfrogReverse(torch.autograd.Function):
    op = _ops.leapfrog

    @staticmethod
    def forward(
        position: Tensor, momentum: Tensor, grad: Tensor, step: Tensor, inverse_mass: Tensor
    ) -> tuple[Tensor, Tensor]:
        return below_autograd(_ops.leapfrog, position, momentum, grad, step, inverse_mass)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        _ops.keep_leapfrog(ctx, inputs, output)
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad_position: Tensor, grad_momentum: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.leapfrog_backward(ctx, grad_position, grad_momentum)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> Any:
        return _vmap(_Leapfrog, _LeapfrogReverse, info, in_dims, args, 3)


class _Leapfrog(_LeapfrogReverse):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        position, momentum, grad, step, inverse_mass, half = ctx.saved_tensors
        position_dot, momentum_dot, grad_dot, step_dot, inverse_dot = tangents
        half_dot = torch.zeros_like(momentum) if momentum_dot is None else momentum_dot
        if grad_dot is not None:
            half_dot = half_dot + 0.5 * step * grad_dot
        if step_dot is not None:
            half_dot = half_dot + 0.5 * step_dot * grad
        moved = step * inverse_mass * half_dot
        if step_dot is not None:
            moved = moved + step_dot * inverse_mass * half
        if inverse_dot is not None:
            moved = moved + step * inverse_dot * half
        if position_dot is not None:
            moved = position_dot + moved
        return moved.to(position.dtype), half_dot.to(momentum.dtype)


@kept_whole
class _KickReverse(torch.autograd.Function):
    op = _ops.kick

    @staticmethod
    def forward(momentum: Tensor, grad: Tensor, a: Tensor) -> Tensor:
        return below_autograd(_ops.kick, momentum, grad, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _ops.keep_kick(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_momentum: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.kick_backward(ctx, grad_momentum)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> Any:
        return _vmap(_Kick, _KickReverse, info, in_dims, args, 2)


class _Kick(_KickReverse):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        grad, a = ctx.saved_tensors
        momentum_dot, grad_dot, a_dot = tangents
        moved = torch.zeros_like(grad) if momentum_dot is None else momentum_dot
        if grad_dot is not None:
            moved = moved + a * grad_dot
        if a_dot is not None:
            moved = moved + a_dot * grad
        return moved.to(grad.dtype)


@kept_whole
class _PerturbReverse(torch.autograd.Function):
    op = _ops.perturb

    @staticmethod
    def forward(x: Tensor, radius: Tensor, seed: int, draw: int, base: int, kind: int) -> Tensor:
        return below_autograd(_ops.perturb, x, radius, seed, draw, base, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _ops.keep_perturb(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.perturb_backward(ctx, grad)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return loop_of_vmap(_Perturb, _PerturbReverse, info, in_dims, args)


class _Perturb(_PerturbReverse):
    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor | None, radius_dot: Tensor | None, *rest: None) -> Tensor:
        moved = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device) if x_dot is None else x_dot
        if radius_dot is not None:
            moved = moved + radius_dot * _ops.unit_noise(ctx)
        return moved.to(ctx.dtype)
