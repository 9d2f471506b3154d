"""torch.no_grad() for methods that run many times a step: torch's own decorator takes several microseconds a call.

Invariant: the mode is as before when the function has ended, by an exception too. Not for generators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
_is_on, _set = torch.is_grad_enabled, torch._C._set_grad_enabled


def without_grad(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: ``function`` runs as under ``torch.no_grad()``."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _is_on():
            return function(*args, **kwargs)
        _set(False)
        try:
            return function(*args, **kwargs)
        finally:
            _set(True)

    return run
