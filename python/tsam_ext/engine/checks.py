"""What the optimizer and the functions demand of their arguments, beyond what the kernels check themselves.

Messages read ``tsam.<op>: <argument>[<index>]: got <what came>, expected <what was wanted>``, as in csrc/ops/checks.h;
those of the optimizer begin with ``TSAM:``.
Invariant: nothing here reads a tensor's values, so nothing syncs, and a function calls its op only after all checks.
"""

from __future__ import annotations

import builtins
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tsam_ext import _C

T = TypeVar("T")
TSAM = "TSAM"  # in place of an op's name: the optimizer
NOT_OPS = (TSAM, "Ascent", "Noise", "HMC")  # whose messages begin with their own name
LARGEST = sys.float_info.max
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NOISES = tuple(name for name, _ in _C.__noises__)  # a kind's number is its place (csrc/core/perturb.h)
ROUNDINGS = ("nearest", "stochastic")
TO_NEAREST = -1  # in place of a sample of the rounding's counter (csrc/core/round.h)


def refuse(op: str, argument: str, got: object, expected: str, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise for a bad argument (so that ``raise refuse(...)`` reads as one sentence)."""
    where = op if op in NOT_OPS else f"tsam.{op}"
    return error(f"{where}: {argument}: got {got}, expected {expected}")


def shown(value: object) -> str:
    """A bad value in the words of a message: a number or a string itself if it is short, else what it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print very long ones
    if value is None or isinstance(value, (str, numbers.Number)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}..."
    kind = value if isinstance(value, type) else type(value)
    known = getattr(builtins, kind.__name__, kind)
    return kind.__name__ if known is kind else f"{kind.__module__}.{kind.__name__}"  # NumPy's bool is called bool too


def order_of(tensor: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    order: list[int] = []
    for dim, stride in enumerate(tensor.stride()):
        place = len(order)
        # By hand, since Dynamo cannot sort symbolic strides; it can compare them.
        while place > 0 and tensor.stride(order[place - 1]) < stride:
            place -= 1
        order.insert(place, dim)
    return order


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements are one stretch of memory without overlap, in any order of the dimensions."""
    step = 1
    for dim in reversed(order_of(tensor)):
        size = tensor.shape[dim]
        if size != 1:
            if tensor.stride(dim) != step:
                return tensor.numel() < 2
            step *= size
    return True


def check_tensor(op: str, argument: str, tensor: object) -> Tensor:
    """``tensor`` if it is a strided tensor of one of the four dtypes; TypeError or ValueError otherwise."""
    if not isinstance(tensor, Tensor):
        raise refuse(op, argument, type(tensor).__name__, "a tensor", TypeError)
    # Dynamo cannot compare layouts; its own tensors are strided.
    strided = torch.compiler.is_compiling() or tensor.layout is torch.strided
    if tensor.dtype not in DTYPES or not strided:
        expected = "a dense tensor of float32, float64, bfloat16 or float16"
        raise refuse(op, argument, f"a {tensor.layout} tensor of {tensor.dtype}", expected)
    return tensor


def check_alike(op: str, argument: str, tensor: object, like: Tensor, reference: str, *, shape: bool = True) -> Tensor:
    """A checked tensor with the device, and unless told otherwise the shape and the dtype, of ``like``."""
    tensor = check_tensor(op, argument, tensor)
    if tensor.device != like.device:
        raise refuse(op, argument, f"a tensor on {tensor.device}", f"one on {like.device}, as {reference} is")
    if shape and tensor.shape != like.shape:
        raise refuse(op, argument, f"shape {tuple(tensor.shape)}", f"{tuple(like.shape)}, the shape of {reference}")
    if shape and tensor.dtype != like.dtype:
        raise refuse(op, argument, f"dtype {tensor.dtype}", f"{like.dtype}, as {reference} has it")
    return tensor


def _real(op: str, argument: str, value: object, expected: str, also: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise refuse(op, argument, shown(value), expected + also, TypeError)
    try:
        return float(value)
    except OverflowError:
        raise refuse(op, argument, shown(value), f"{expected} that float64 can hold") from None


def check_number(
    op: str, argument: str, value: object, expected: str, low: float = -math.inf, *, or_tensor: bool = True
) -> float:
    """``value`` as a finite float not below ``low``; TypeError or ValueError otherwise."""
    number = _real(op, argument, value, expected, " or a tensor" if or_tensor else "")
    # Comparisons, since math's functions break the graph where Dynamo makes a number symbolic.
    if not max(low, -LARGEST) <= number <= LARGEST:
        raise refuse(op, argument, shown(value), expected)
    return number


def check_any_number(op: str, argument: str, value: object) -> float:
    """``value`` as a float; NaN and the infinities pass."""
    return _real(op, argument, value, "a number or a tensor of one element")


def check_tilt(
    op: str, tilt: object, *, argument: str = "tilt", expected: str = "a number (inf and -inf too)"
) -> float:
    """``tilt`` as a float; infinities pass, NaN does not."""
    number = _real(op, argument, tilt, expected)
    if number != number:
        raise refuse(op, argument, "nan", expected)
    return number


def check_int(op: str, argument: str, value: object, low: int, high: int) -> int:
    """``value`` as an int from ``low`` to ``high``; TypeError or ValueError otherwise."""
    expected = f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise refuse(op, argument, shown(value), expected, TypeError)
    if not low <= int(value) <= high:
        raise refuse(op, argument, shown(value), expected)
    return int(value)


def check_flag(op: str, argument: str, value: object) -> bool:
    """``value`` if it is True or False; TypeError otherwise."""
    if not isinstance(value, bool):
        raise refuse(op, argument, shown(value), "True or False", TypeError)
    return value


def check_positive(op: str, argument: str, value: object, expected: str = "a finite number above 0") -> float:
    """``value`` as a finite float above 0."""
    number = check_number(op, argument, value, expected, 0.0, or_tensor=False)
    if number == 0.0:
        raise refuse(op, argument, shown(value), expected)
    return number


def check_length(op: str, argument: str, value: object, expected: str = "a finite number not below 0") -> float:
    """``value`` as a finite float not below 0."""
    return check_number(op, argument, value, expected, 0.0, or_tensor=False)


def check_choice(op: str, argument: str, value: object, choices: Sequence[str]) -> str:
    """``value`` if it is one of ``choices``; TypeError or ValueError otherwise."""
    expected = " or ".join(map(repr, choices))
    if not isinstance(value, str):
        raise refuse(op, argument, shown(value), expected, TypeError)
    if value not in choices:
        raise refuse(op, argument, shown(value), expected)
    return value


def check_noise(op: str, argument: str, kind: object) -> int:
    """The number that the kernels give to a kind of noise (csrc/core/perturb.h)."""
    return NOISES.index(check_choice(op, argument, kind, NOISES))


def check_scalar_tensor(op: str, argument: str, tensor: Tensor) -> Tensor:
    """``tensor`` if it is a floating-point tensor of one element, whose value is not looked at."""
    if tensor.numel() != 1 or not tensor.dtype.is_floating_point:
        got = f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
        raise refuse(op, argument, got, "a floating-point tensor of one element")
    return tensor


def check_seed(op: str, seed: object) -> int:
    """A 64-bit seed as the signed integer that an op takes."""
    value = check_int(op, "seed", seed, 0, (1 << 64) - 1)
    return value - (1 << 64) if value >= 1 << 63 else value


def check_list(op: str, argument: str, tensors: object) -> list[Tensor]:
    """A list of dense tensors that may be written in place."""
    if not isinstance(tensors, (list, tuple)):
        raise refuse(op, argument, type(tensors).__name__, "a list of tensors", TypeError)
    return [check_tensor(op, f"{argument}[{i}]", tensor) for i, tensor in enumerate(tensors)]


def check_material(op: str, argument: str, tensors: Sequence[Tensor]) -> None:
    """Refuses tensors whose values do not lie in their memory: torch brings none of these to an op that may write."""
    for i, tensor in enumerate(tensors):
        if tensor.is_neg() or tensor._is_zerotensor():
            got = f"a lazily {'negated' if tensor.is_neg() else 'zero'} tensor"
            raise refuse(op, f"{argument}[{i}]", got, "one whose values lie in its memory (clone() makes one)")


def check_writable(op: str, argument: str, tensors: Sequence[Tensor]) -> None:
    """Refuses what autograd or inference mode forbids to change in place."""
    grad_mode = torch.is_grad_enabled()
    for i, tensor in enumerate(tensors):
        place = f"{argument}[{i}]" if len(tensors) != 1 or argument != "state" else argument
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise refuse(op, place, "an inference tensor", "one that may change outside inference mode")
        if grad_mode and tensor.requires_grad:
            got = f"a {'leaf ' if tensor.is_leaf else ''}tensor that requires grad"
            raise refuse(op, place, got, "torch.no_grad() around the call: the op has no gradient")


def check_each(
    op: str, argument: str, value: object, length: int, reference: str, check: Callable[[str, str, object], T]
) -> list[T]:
    """One checked value per entry of another list: from a list of as many, or from one value for all."""
    if not isinstance(value, (list, tuple)):
        return [check(op, argument, value)] * length
    checked = [check(op, f"{argument}[{i}]", entry) for i, entry in enumerate(value)]
    if len(checked) != length:
        raise refuse(op, argument, f"{len(checked)} entries", f"{length} (as many as {reference})")
    return checked
