"""The fused list ops as functions: one pass over a whole list of tensors, in place, without derivatives.

A step of TSAM by hand: ``tilt_begin_``; for each sample ``perturb_``, a gradient, ``grad_norm_``, ``ascend_``, a
gradient, ``tilt_update_``, ``accumulate_``; then ``restore_``.
Layout: lists of dense tensors (any strides without gaps), all on one device; ``state`` is :func:`new_state`'s tensor.
Invariant: all checks come before the first write, and what is written has its version counter moved, so that autograd
notices. Under torch.compile the kernels' own checks are the only ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tsam_ext import _ops

from .checks import (
    check_int,
    check_list,
    check_noise,
    check_numbers,
    check_seed,
    check_tensor,
    check_tilt,
    check_writable,
    refuse,
)
from .state import Slot

__all__ = ["accumulate_", "ascend_", "grad_norm_", "perturb_", "restore_", "tilt_begin_", "tilt_update_"]

T = TypeVar("T", float, bool)


def perturb_(
    position: Sequence[Tensor],
    saved: Sequence[Tensor],
    state: Tensor,
    radius: float | Sequence[float],
    *,
    seed: int,
    step: int = 0,
    sample: int = 0,
    kind: str = "gaussian",
    adaptive: bool | Sequence[bool] = False,
    base: Sequence[int] | None = None,
    dimension: int | None = None,
    negate: bool = False,
    save: bool = True,
) -> None:
    """position = origin + radius D ν: one draw of noise over all tensors together.

    Args:
        position: tensors of float32, float64, bfloat16 or float16; written.
        saved: like ``position``. With ``save`` it gets a copy of ``position`` first; without, it is the origin.
        state: gets the scale of the noise.
        radius: length of the perturbation, not below 0; one for all, or one a tensor.
        seed, step, sample: which noise; 64, 32 and 28 bits. step and sample default to 0.
        kind: ``"gaussian"`` (z/√d; default), ``"sphere"`` (z/‖z‖) or ``"ball"`` (uniform in the unit ball).
        adaptive: D = |origin| elementwise instead of 1; one for all, or one a tensor. Default False.
        base: element index of each tensor's first element; ``None``: one tensor after the other, each rounded up to a
            multiple of 4.
        dimension: d; ``None``: the number of elements in ``position``.
        negate: take −ν. Default False.
        save: whether this is the first draw, which also makes the copy. Default True.

    Raises:
        TypeError, ValueError: before anything is written, naming the argument, the list index, what came and what
            was wanted. A leaf that requires grad is refused outside ``torch.no_grad()``.
    """
    op = "perturb_"
    n = len(position)
    if base is None:
        base, element = [], 0
        for tensor in position:
            base.append(element)
            element += (tensor.numel() + 3) // 4 * 4
    if dimension is None:
        dimension = sum(tensor.numel() for tensor in position)
    radii, flags = _each(radius, n), _each(adaptive, n)
    if not torch.compiler.is_compiling():
        lists = {"position": position, "saved": saved}
        _check(op, lists, state, written=("position", "saved", "state") if save else ("position", "state"))
        radii = check_numbers(op, "radius", radii, n, "position", float)
        check_numbers(op, "adaptive", flags, n, "position", bool)
        check_numbers(op, "base", base, n, "position", int)
        check_int(op, "step", step, 0, (1 << 32) - 1)
        check_int(op, "sample", sample, 0, (1 << 28) - 1)
    key, noise = check_seed(op, seed), check_noise(op, "kind", kind)
    if position:
        _ops.perturb_(
            list(position), list(saved), state, radii, flags, list(base), key, step, sample, noise, dimension, negate,
            save,
        )  # fmt: skip
        _changed(position, saved if save else (), [state])


def grad_norm_(
    grads: Sequence[Tensor],
    origin: Sequence[Tensor],
    state: Tensor,
    *,
    adaptive: bool | Sequence[bool] = False,
    row: int = 0,
) -> None:
    """Puts ‖D g‖ over all tensors together into ``state`` and into the row of sample ``row``.

    Args:
        grads: the gradient g; read.
        origin: like ``grads``; read where ``adaptive`` (D = |origin|), else only its layout is looked at.
        state: gets the norm, float64; see :func:`ascend_`.
        adaptive: D = |origin| elementwise instead of 1; one for all, or one a tensor. Default False.
        row: the sample that the norm belongs to. Default 0.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.
    """
    op = "grad_norm_"
    flags = _each(adaptive, len(grads))
    if not torch.compiler.is_compiling():
        _check(op, {"grads": grads, "origin": origin}, state, written=("state",))
        check_numbers(op, "adaptive", flags, len(grads), "grads", bool)
        check_int(op, "row", row, 0, (1 << 28) - 1)
    if grads:
        _ops.grad_norm_(list(grads), list(origin), state, flags, row)
        _changed((state,))
    else:
        state[Slot.GRAD_NORM] = 0.0


def ascend_(
    position: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Tensor,
    rho: float | Sequence[float],
    *,
    adaptive: bool | Sequence[bool] = False,
    save: bool = False,
) -> None:
    """position += rho D (D g) / ‖D g‖, with the norm that :func:`grad_norm_` left in ``state``; none if it is 0.

    Args:
        position: written.
        saved: like ``position``: θ₀, for D. With ``save`` it gets a copy of ``position`` first.
        grads: like ``position``: g; read.
        state: holds the norm.
        rho: length of the step, not below 0; one for all, or one a tensor.
        adaptive: D = |θ₀| elementwise instead of 1; one for all, or one a tensor. Default False.
        save: whether ``position`` is θ₀ still and is to be copied. Default False.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.

    Source: Foret et al., ICLR 2021 (SAM); Kwon et al., ICML 2021 (ASAM: the adaptive form with η = 0).
    """
    op = "ascend_"
    n = len(position)
    lengths, flags = _each(rho, n), _each(adaptive, n)
    if not torch.compiler.is_compiling():
        lists = {"position": position, "saved": saved, "grads": grads}
        _check(op, lists, state, written=("position", "saved", "state") if save else ("position",))
        lengths = check_numbers(op, "rho", lengths, n, "position", float)
        check_numbers(op, "adaptive", flags, n, "position", bool)
    if position:
        _ops.ascend_(list(position), list(saved), list(grads), state, lengths, flags, save)
        _changed(position, (*saved, state) if save else ())


def tilt_begin_(state: Tensor, tilt: Tensor | float) -> None:
    """Starts a streaming tilted mean: empties ``state`` and sets t, a number (±inf too) or a tensor of one element.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.
    """
    op = "tilt_begin_"
    tilt = _scalar(op, "tilt", tilt if isinstance(tilt, Tensor) else check_tilt(op, tilt), state)
    if not torch.compiler.is_compiling():
        _check(op, {}, state, written=("state",))
    _ops.tilt_begin_(state, tilt.detach())
    _changed((state,))


def tilt_update_(
    state: Tensor,
    loss: Tensor | float,
    row: int,
    *,
    log_size: float = 0.0,
    skip_nonfinite: bool = False,
    last: bool = False,
) -> None:
    """Counts sample ``row`` with weight n e^(t loss); the :func:`accumulate_` calls after it take its gradients.

    Args:
        state: written.
        loss: the sample's loss, one element.
        row: which sample; the state must have room for it.
        log_size: log n. Default 0.
        skip_nonfinite: leave a sample with a non-finite loss out instead of making the result NaN. Default False.
        last: whether no sample follows; if all were skipped the result is NaN. Default False.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.
    """
    op = "tilt_update_"
    loss = _scalar(op, "loss", loss, state)
    if not torch.compiler.is_compiling():
        _check(op, {}, state, written=("state",))
        check_int(op, "row", row, 0, (1 << 28) - 1)
        check_numbers(op, "log_size", [log_size], 1, "loss", float)
    _ops.tilt_update_(state, loss.detach(), log_size, row, skip_nonfinite, last)
    _changed((state,))


def accumulate_(accumulator: Sequence[Tensor], grads: Sequence[Tensor] | None, state: Tensor) -> None:
    """Brings the weighted mean of gradients up to the sample that :func:`tilt_update_` has just counted.

    Args:
        accumulator: written; float64 for float64 gradients, else float32. What it holds before the first sample does
            not matter.
        grads: like ``accumulator`` in layout; ``None``: the accumulator holds the first sample's gradient already.
        state: says with which two coefficients.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.
    """
    op = "accumulate_"
    gradients = [] if grads is None else list(grads)
    if not torch.compiler.is_compiling():
        lists = {"accumulator": accumulator} if grads is None else {"accumulator": accumulator, "grads": grads}
        _check(op, lists, state, written=("accumulator",))
        if grads is not None and len(gradients) != len(accumulator):
            expected = f"{len(accumulator)} (as many as accumulator)"
            raise refuse(op, "grads", f"{len(gradients)} entries", expected)
    if accumulator:
        _ops.accumulate_(list(accumulator), gradients, state)
        _changed(accumulator)


def restore_(position: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """position = saved, bit for bit.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.
    """
    op = "restore_"
    if not torch.compiler.is_compiling():
        _check(op, {"position": position, "saved": saved}, None, written=("position",))
    if position:
        _ops.restore_(list(position), list(saved))
        _changed(position)


def _each(value: T | Sequence[T], n: int) -> list[T]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * n  # type: ignore[list-item]


def _scalar(op: str, argument: str, value: object, state: Tensor) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, (Tensor, int, float)):
        raise refuse(op, argument, repr(value), "a number or a tensor of one element", TypeError)
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=torch.float64, device=check_tensor(op, "state", state).device)
    return check_tensor(op, argument, value)


def _check(op: str, lists: dict[str, Sequence[Tensor]], state: Tensor | None, written: tuple[str, ...]) -> None:
    """What the kernels cannot see: kinds of tensors, autograd, devices of empty and mixed lists."""
    checked = {name: check_list(op, name, tensors) for name, tensors in lists.items()}
    if state is not None:
        checked["state"] = [check_tensor(op, "state", state)]
    first: Tensor | None = None
    first_name = ""
    for name, tensors in checked.items():
        for i, tensor in enumerate(tensors):
            place = "state" if name == "state" else f"{name}[{i}]"
            if first is None:
                first, first_name = tensor, place
            elif tensor.device != first.device:
                raise refuse(op, place, f"a tensor on {tensor.device}", f"one on {first.device}, as {first_name} is")
    names = list(lists)
    for name in names[1:]:
        if len(checked[name]) != len(checked[names[0]]):
            expected = f"{len(checked[names[0]])} (as many as {names[0]})"
            raise refuse(op, name, f"{len(checked[name])} entries", expected)
    for name in written:
        check_writable(op, name, checked[name])


def _changed(*lists: Sequence[Tensor]) -> None:
    if not torch.compiler.is_compiling():
        increment_version([tensor for tensors in lists for tensor in tensors if not tensor.is_inference()])
