"""leapfrog and kick in the memory of their arguments, for samplers that own it: no new memory, no derivatives.

Same bits as leapfrog and kick. Invariant: as for the list ops all checks come before the first write, and what is
written has its version counter moved; under torch.compile the kernels' own checks are the only ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from tsam_ext import _ops
from tsam_ext.engine.checks import check_alike, check_tensor, refuse

from .dynamics import aligned, checked_leapfrog, factor_of

__all__ = ["kick_", "leapfrog_"]


def leapfrog_(
    position: Tensor,
    momentum: Tensor,
    grad_log_density: Tensor,
    step_size: Tensor | float,
    inverse_mass: Tensor | float = 1.0,
) -> None:
    """:func:`leapfrog` in place: position and momentum become what it returns, bit for bit. Not differentiable.

    Args:
        position: any shape without gaps, float32, float64, bfloat16 or float16; written.
        momentum: like ``position``, layout included; written.
        grad_log_density: like ``position``: the gradient of the log density at ``position``.
        step_size: h, a finite number, or a tensor that broadcasts to the shape of ``position``.
        inverse_mass: the diagonal of M⁻¹, a positive number or a tensor that broadcasts. Default 1.

    Raises:
        TypeError, ValueError: before anything is written, naming the argument, what came and what was wanted. Tensors
            that require grad are refused outside ``torch.no_grad()``, and those of torch.func's transforms.

    Example:
        >>> import torch
        >>> x, p = torch.tensor([1.0]), torch.tensor([0.0])
        >>> leapfrog_(x, p, -x, 0.5)
        >>> x, p
        (tensor([0.8750]), tensor([-0.2500]))
    """
    op = "leapfrog_"
    position, momentum, *others = checked_leapfrog(op, position, momentum, grad_log_density, step_size, inverse_mass)
    read = dict(zip(("grad_log_density", "step_size", "inverse_mass"), others, strict=True))
    _check(op, {"position": position, "momentum": momentum}, read)
    _, *rest = aligned(position, *read.values())
    _ops.leapfrog_(position, momentum, *rest)
    _changed(position, momentum)


def kick_(momentum: Tensor, grad_log_density: Tensor, a: Tensor | float) -> None:
    """:func:`kick` in place: momentum becomes ``momentum + a * grad_log_density``, bit for bit. Not differentiable.

    Args:
        momentum: any shape without gaps, float32, float64, bfloat16 or float16; written.
        grad_log_density: like ``momentum``.
        a: a finite number, or a tensor that broadcasts to the shape of ``momentum``.

    Raises:
        TypeError, ValueError: as :func:`leapfrog_`.

    Example:
        >>> import torch
        >>> p = torch.tensor([1.0, 2.0])
        >>> kick_(p, torch.tensor([4.0, 4.0]), 0.25)
        >>> p
        tensor([2., 3.])
    """
    op = "kick_"
    momentum = check_tensor(op, "momentum", momentum)
    grad_log_density = check_alike(op, "grad_log_density", grad_log_density, momentum, "momentum")
    read = {"grad_log_density": grad_log_density, "a": factor_of(op, "a", a, momentum, "momentum")}
    _check(op, {"momentum": momentum}, read)
    _, *rest = aligned(momentum, *read.values())
    _ops.kick_(momentum, *rest)
    _changed(momentum)


def _check(op: str, written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """What the kernels cannot see: derivatives that would be lost, and tensors that may not be written."""
    if torch.compiler.is_compiling():
        return
    recording = torch.is_grad_enabled()
    for name, tensor in (*written.items(), *read.items()):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or _has_tangent(tensor):
            raise refuse(op, name, "a tensor of a transform or with a tangent", "a plain one: the op has no derivative")
        if recording and tensor.requires_grad:
            got = f"a {'leaf ' if tensor.is_leaf else ''}tensor that requires grad"
            raise refuse(op, name, got, "torch.no_grad() around the call: the op has no gradient")
    for name, tensor in written.items():
        if tensor.is_neg() or tensor._is_zerotensor():
            got = f"a lazily {'negated' if tensor.is_neg() else 'zero'} tensor"
            raise refuse(op, name, got, "one whose values lie in its memory (clone() makes one)")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise refuse(op, name, "an inference tensor", "one that may change outside inference mode")


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _changed(*tensors: Tensor) -> None:
    if not torch.compiler.is_compiling():
        increment_version([tensor for tensor in tensors if not tensor.is_inference()])
