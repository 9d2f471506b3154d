"""How a torch.autograd.Function of this package is called, and its vmap.

A Function with a jvp of its own serves eager mode and torch.func; Dynamo refuses one where an input requires grad, so
while compiling a twin without the jvp is applied. Each pair is a reverse-mode class and a subclass that adds the jvp.
"""

from __future__ import annotations

from typing import Any

import torch


def apply(function: Any, reverse_only: Any, *args: Any) -> Any:
    """Applies ``function``, or while compiling its twin ``reverse_only``."""
    return (reverse_only if torch.compiler.is_compiling() else function).apply(*args)


def rows_of_vmap(info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments of each row of a vmap."""
    columns = [
        [arg] * info.batch_size if dim is None else list(arg.unbind(dim))
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    return list(zip(*columns, strict=True))
