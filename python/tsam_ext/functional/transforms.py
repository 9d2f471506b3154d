"""How a torch.autograd.Function of this package is called, and its vmap.

A Function with a jvp of its own serves eager mode and torch.func; Dynamo refuses one where an input requires grad, so
while compiling a twin without the jvp is applied. Each pair is a reverse-mode class and a subclass that adds the jvp.
"""

from __future__ import annotations

from typing import Any

import torch


def apply(function: Any, reverse_only: Any, *args: Any) -> Any:
    """Applies ``function``, or while compiling its twin ``reverse_only``."""
    if not torch.compiler.is_compiling():
        return function.apply(*args)
    if torch.autograd.forward_ad._current_level >= 0:
        # The twin would hand out tangents of zero without a word.
        raise NotImplementedError("tsam_ext has no forward mode inside torch.compile: compile without the jvp")
    return reverse_only.apply(*args)


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
