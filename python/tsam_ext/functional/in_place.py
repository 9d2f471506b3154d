"""The fused list ops as functions: one pass over a whole list of tensors, in place, without derivatives.

A step of TSAM by hand: ``tilt_begin_``; for each sample ``perturb_``, a gradient, ``grad_norm_``, ``ascend_``, a
gradient, ``tilt_update_``, ``accumulate_``; then ``restore_``.
Layout: lists of dense tensors (any strides without gaps), on one device or several, entry i of each list on the same;
``state`` is :func:`new_state`'s tensor, on any of them.
Invariant: all checks come before the first write, and what is written has its version counter moved, so that autograd
notices. Under torch.compile the kernels' own checks are the only ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tsam_ext import _ops
from tsam_ext.engine.checks import (
    ROUNDINGS,
    TO_NEAREST,
    check_alike,
    check_any_number,
    check_choice,
    check_each,
    check_flag,
    check_int,
    check_length,
    check_list,
    check_material,
    check_noise,
    check_number,
    check_seed,
    check_tensor,
    check_tilt,
    check_writable,
    refuse,
)
from tsam_ext.engine.spread import Spread
from tsam_ext.engine.state import HEADER, ROW, STEP_HELD, Slot

__all__ = ["accumulate_", "ascend_", "grad_norm_", "perturb_", "restore_", "tilt_begin_", "tilt_update_"]

NO_STATE = object()
MATERIAL = {"position", "saved", "accumulator"}  # lists that some op writes
ROWS = 1 << 28  # samples of a step that the noise can tell apart


def perturb_(
    position: Sequence[Tensor],
    saved: Sequence[Tensor],
    state: Tensor,
    radius: float | Sequence[float],
    *,
    seed: int,
    step: int | None = 0,
    sample: int = 0,
    kind: str = "gaussian",
    adaptive: bool | Sequence[bool] = False,
    base: Sequence[int] | None = None,
    dimension: int | None = None,
    negate: bool = False,
    save: bool = True,
    rounding: str = "nearest",
) -> None:
    """position = origin + radius D ν: one draw of noise over all tensors together.

    Args:
        position: tensors of float32, float64, bfloat16 or float16; written.
        saved: like ``position``. With ``save`` it gets a copy of ``position`` first; without, it is the origin.
        state: gets the scale of the noise.
        radius: length of the perturbation, not below 0; one for all, or one per tensor.
        seed, step, sample: which noise; 64, 32 and 28 bits. step and sample default to 0. With ``step=None`` the step
            is the whole number in ``state[Slot.STEP]``, which each replay of a CUDA graph may find counted on.
        kind: what ν is, as :func:`perturb` has it. Default ``"gaussian"``.
        adaptive: D = |origin| elementwise instead of 1; one for all, or one per tensor. Default False.
        base: element index of each tensor's first element; ``None``: one tensor after the other, each rounded up to a
            multiple of 4.
        dimension: d; ``None``: the number of elements in ``position``.
        negate: take −ν. Default False.
        save: whether this is the first draw, which also makes the copy. Default True.
        rounding: how bfloat16 and float16 positions are rounded, ``"nearest"`` (default) or ``"stochastic"``: up or
            down at random, right in the mean, by bits of (seed, step, sample, element) that no noise has; with
            ``negate`` those of the sample after. Wider types do not look.

    Raises:
        TypeError, ValueError: before anything is written, naming the argument, the list index, what came and what
            was wanted. A leaf that requires grad is refused outside ``torch.no_grad()``.
    """
    op = "perturb_"
    save = check_flag(op, "save", save)
    lists = {"position": position, "saved": saved}
    _check(op, lists, state, written=("position", "saved", "state") if save else ("position", "state"))
    n = len(position)
    radii = check_each(op, "radius", radius, n, "position", check_length)
    flags = check_each(op, "adaptive", adaptive, n, "position", check_flag)
    places = _places(op, base, position)
    if dimension is None:
        dimension = sum(tensor.numel() for tensor in position)
    dimension = check_int(op, "dimension", dimension, 0, (1 << 62) - 1)
    key, noise = check_seed(op, seed), check_noise(op, "kind", kind)
    step = STEP_HELD if step is None else check_int(op, "step", step, 0, (1 << 32) - 1)
    sample = check_int(op, "sample", sample, 0, ROWS - 1)
    negate = check_flag(op, "negate", negate)
    word = _check_rounding(op, rounding, 2 * (sample + negate))
    if position:
        rest = (radii, flags, places, key, step, sample, noise, dimension, negate, save, word)
        _run(_ops.perturb_, state, list(position), list(saved), state, *rest)
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
        adaptive: D = |origin| elementwise instead of 1; one for all, or one per tensor. Default False.
        row: the sample that the norm belongs to. Default 0.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.
    """
    op = "grad_norm_"
    row = check_int(op, "row", row, 0, ROWS - 1)
    _check(op, {"grads": grads, "origin": origin}, state, written=("state",), rows=row + 1)
    flags = check_each(op, "adaptive", adaptive, len(grads), "grads", check_flag)
    if grads:
        _run(_ops.grad_norm_, state, list(grads), list(origin), state, flags, row)
        _changed((state,))
    else:
        state[Slot.GRAD_NORM].zero_()


def ascend_(
    position: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Tensor,
    rho: float | Sequence[float],
    *,
    adaptive: bool | Sequence[bool] = False,
    save: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    step: int | None = 0,
    sample: int = 0,
    base: Sequence[int] | None = None,
) -> None:
    """position += rho D (D g) / ‖D g‖, with the norm that :func:`grad_norm_` left in ``state``; none if it is 0.

    Args:
        position: written.
        saved: like ``position``: θ₀, for D. With ``save`` it gets a copy of ``position`` first.
        grads: like ``position``: g; read.
        state: holds the norm.
        rho: length of the step, below 0 for a descent; one for all, or one per tensor.
        adaptive: D = |θ₀| elementwise instead of 1; one for all, or one per tensor. Default False.
        save: whether ``position`` is θ₀ still and is to be copied. Default False.
        rounding, seed, step, sample, base: how bfloat16 and float16 positions are rounded, as :func:`perturb_` has it;
            the bits are others than those of the same sample's noise.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.

    Source: Foret et al., ICLR 2021 (SAM); Kwon et al., ICML 2021 (ASAM: the adaptive form with η = 0).
    """
    op = "ascend_"
    save = check_flag(op, "save", save)
    lists = {"position": position, "saved": saved, "grads": grads}
    _check(op, lists, state, written=("position", "saved", "state") if save else ("position",))
    lengths = check_each(op, "rho", rho, len(position), "position", _check_finite)
    flags = check_each(op, "adaptive", adaptive, len(position), "position", check_flag)
    places, key = _places(op, base, position), check_seed(op, seed)
    step = STEP_HELD if step is None else check_int(op, "step", step, 0, (1 << 32) - 1)
    word = _check_rounding(op, rounding, 2 * check_int(op, "sample", sample, 0, ROWS - 1) + 1)
    if position:
        rest = (lengths, flags, save, places, key, step, word)
        _run(_ops.ascend_, state, list(position), list(saved), list(grads), state, *rest)
        _changed(position, (*saved, state) if save else ())


def tilt_begin_(state: Tensor, tilt: Tensor | float) -> None:
    """Starts a streaming tilted mean: empties ``state`` and sets t, a number (±inf too) or a tensor of one element.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.
    """
    op = "tilt_begin_"
    _check(op, {}, state, written=("state",))
    tilt = _scalar(op, "tilt", tilt if isinstance(tilt, Tensor) else check_tilt(op, tilt), state)
    _ops.tilt_begin_(state, tilt)
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
    row = check_int(op, "row", row, 0, ROWS - 1)
    _check(op, {}, state, written=("state",), rows=row + 1)
    loss = _scalar(op, "loss", loss if isinstance(loss, Tensor) else check_any_number(op, "loss", loss), state)
    log_size = check_number(op, "log_size", log_size, "a finite number", or_tensor=False)
    skip_nonfinite = check_flag(op, "skip_nonfinite", skip_nonfinite)
    last = check_flag(op, "last", last)
    _ops.tilt_update_(state, loss, log_size, row, skip_nonfinite, last)
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
    lists = {"accumulator": accumulator} if grads is None else {"accumulator": accumulator, "grads": grads}
    _check(op, lists, state, written=("accumulator",))
    if accumulator:
        _run(_ops.accumulate_, state, list(accumulator), [] if grads is None else list(grads), state)
        _changed(accumulator)


def restore_(position: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """position = saved, bit for bit.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.
    """
    op = "restore_"
    _check(op, {"position": position, "saved": saved}, NO_STATE, written=("position",))
    if position:
        _run(_ops.restore_, None, list(position), list(saved))
        _changed(position)


def _run(op: Callable[..., None], state: Tensor | None, first: list[Tensor], *rest: Any) -> None:
    """The op, once for each device that the first list and ``state`` lie on."""
    if torch.compiler.is_compiling():
        op(first, *rest)
        return
    spread = Spread(first if state is None else [state, *first])
    start = 0 if state is None else 1
    if state is not None:
        spread.follow(state)
    spread.run(op, range(start, start + len(first)), first, *rest)


def _places(op: str, base: Sequence[int] | None, position: Sequence[Tensor]) -> list[int]:
    """The element index of each tensor's first element."""
    if base is None:
        places, element = [], 0
        for tensor in position:
            places.append(element)
            element += (tensor.numel() + 3) // 4 * 4
        return places
    if not isinstance(base, (list, tuple)):
        raise refuse(op, "base", type(base).__name__, "a list of integers or None", TypeError)
    return check_each(op, "base", base, len(position), "position", _check_element)


def _check_rounding(op: str, rounding: object, number: int) -> int:
    """An op's ``rounding``: to nearest, or this sample of the counter."""
    check_choice(op, "rounding", rounding, ROUNDINGS)
    if rounding == "nearest":
        return TO_NEAREST
    if number >= ROWS:
        raise refuse(op, "sample", number // 2, f"an integer below {ROWS // 2}, as rounding is 'stochastic'")
    return number


def _check_element(op: str, argument: str, value: object) -> int:
    return check_int(op, argument, value, 0, (1 << 62) - 1)


def _scalar(op: str, argument: str, value: Tensor | float, state: Tensor) -> Tensor:
    """A number beside a checked state, as the ops take it; the value of a tensor is not looked at."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float64, device=state.device)
    tensor = check_alike(op, argument, value, state, "state", shape=False)
    if tensor.numel() != 1:
        raise refuse(op, argument, f"shape {tuple(tensor.shape)}", "a number or a tensor of one element")
    return tensor.detach()


def _check(op: str, lists: dict[str, Sequence[Tensor]], state: object, written: tuple[str, ...], rows: int = 0) -> None:
    """What the kernels cannot see: kinds of tensors, autograd, devices, and what comes with an empty list."""
    if torch.compiler.is_compiling():
        return
    checked = {name: check_list(op, name, tensors) for name, tensors in lists.items()}
    if state is not NO_STATE:
        checked["state"] = [_check_state(op, state, rows)]
    names = list(lists)
    where = [(f"{name}[{i}]", tensor) for name in names[:1] for i, tensor in enumerate(checked[name])]
    where += [("state", tensor) for tensor in checked.get("state", [])]
    for place, tensor in where:
        # Several devices are as good as one, but a meta tensor among others would silently be left as it is.
        if tensor.device != where[0][1].device and (tensor.is_meta or where[0][1].is_meta):
            expected = f"one on {where[0][1].device}, as {where[0][0]} is"
            raise refuse(op, place, f"a tensor on {tensor.device}", expected)
    for name in names[1:]:
        if len(checked[name]) != len(checked[names[0]]):
            expected = f"{len(checked[names[0]])} (as many as {names[0]})"
            raise refuse(op, name, f"{len(checked[name])} entries", expected)
        for i, (tensor, first) in enumerate(zip(checked[name], checked[names[0]], strict=True)):
            if tensor.device != first.device:
                expected = f"one on {first.device}, as {names[0]}[{i}] is"
                raise refuse(op, f"{name}[{i}]", f"a tensor on {tensor.device}", expected)
    for name in MATERIAL & lists.keys():
        check_material(op, name, checked[name])
    for name in written:
        check_writable(op, name, checked[name])


def _check_state(op: str, state: object, rows: int) -> Tensor:
    tensor = check_tensor(op, "state", state)
    size = HEADER + ROW * rows
    if tensor.dtype != torch.float64 or tensor.numel() < size or not tensor.is_contiguous():
        got = f"shape {tuple(tensor.shape)} with strides {tensor.stride()} and dtype {tensor.dtype}"
        raise refuse(op, "state", got, f"a contiguous float64 tensor of at least {size} elements")
    return tensor


def _changed(*lists: Sequence[Tensor]) -> None:
    if not torch.compiler.is_compiling():
        increment_version([tensor for tensors in lists for tensor in tensors if not tensor.is_inference()])


def _check_finite(op: str, argument: str, value: object) -> float:
    return check_number(op, argument, value, "a finite number", or_tensor=False)
