"""How a torch.autograd.Function of this package is called, and its vmap.

A Function with a jvp of its own serves eager mode and torch.func; Dynamo refuses one where an input requires grad, so
while compiling a twin without the jvp is applied, as where nothing asks for one. Each pair is a reverse-mode class and
a subclass that adds the jvp; ``op`` is what their forward calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.compiler import is_compiling

T = TypeVar("T")


def apply(function: Any, reverse_only: Any, *args: Any) -> Any:
    """Applies ``function``; its twin where nothing asks for the jvp; the op alone where nobody records."""
    if is_compiling():
        if torch.autograd.forward_ad._current_level >= 0:
            # The twin would hand out tangents of zero without a word.
            raise NotImplementedError("tsam_ext has no forward mode inside torch.compile: compile without the jvp")
        return reverse_only.apply(*args)
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return function.apply(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        # Function.apply itself, but for inspect.signature, which takes longer than all the rest (20 us).
        return super(torch.autograd.Function, reverse_only).apply(*unwrap_dead_wrappers(args))
    with torch._C._AutoDispatchBelowAutograd():
        return reverse_only.op(*args)


def below_autograd(op: Callable[..., T], *args: Any) -> T:
    """Calls ``op`` past the autograd kernel that torch.library gives it in Python (6 us): the Function is its graph."""
    if is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def loop_of_vmap(function: Any, reverse_only: Any, info: Any, in_dims: tuple[int | None, ...], args: Any) -> Any:
    """A vmap as one call per row, stacked; with it the dimensions of the results."""
    columns = [
        # Of no rows the sum is a row of zeros: it gives an empty result its shape.
        [arg] * max(info.batch_size, 1) if dim is None else list(arg.unbind(dim)) or [arg.sum(dim)]
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    rows = [apply(function, reverse_only, *row) for row in zip(*columns, strict=True)]
    if isinstance(rows[0], tuple):
        return tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*rows, strict=True)), (0,) * len(rows[0])
    return torch.stack(rows)[: info.batch_size], 0
