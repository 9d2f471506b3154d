"""The optimizer that TSAM wraps: built or taken, and refused where it cannot be wrapped.

Invariant: what base_of returns steps once from p.grad, has no option named like one of ours, and holds parameters
that the kernels can move in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from .settings import GROUP_KEYS, check_group, check_parameters, reject


def base_of(params: Iterable[Any] | None, base: object, kwargs: dict[str, Any]) -> Optimizer:
    """The base optimizer from its class or instance; refuses those that TSAM cannot wrap."""
    expected = "a torch.optim.Optimizer class or instance"
    if isinstance(base, type):
        if not issubclass(base, Optimizer):
            raise reject("base_optimizer", base, expected, TypeError)
        _refuse_kind(base)
        if params is None:
            raise reject("params", None, "parameters, as base_optimizer is a class", TypeError)
        instance = cast(Callable[..., Optimizer], base)(params, **kwargs)
    elif isinstance(base, Optimizer):
        _refuse_kind(type(base))
        if kwargs:
            raise reject(
                next(iter(kwargs)),
                kwargs[next(iter(kwargs))],
                "no base options beside an instance",
                TypeError,
            )
        instance = base
        if params is not None:
            given = [p for item in list(params) for p in _flat(item)]
            held = [p for group in base.param_groups for p in group["params"]]
            if len(given) != len(held) or any(a is not b for a, b in zip(given, held, strict=True)):
                raise reject(
                    "params",
                    "other tensors or another order",
                    "None, or the tensors of base_optimizer",
                )
    else:
        raise reject("base_optimizer", base, expected, TypeError)
    for key in GROUP_KEYS:
        if key in instance.defaults:
            raise reject(
                "base_optimizer",
                type(instance).__name__,
                f"an optimizer without an option '{key}' (TSAM may hold it already)",
            )
    return instance


def _flat(item: Any) -> list[Any]:
    if isinstance(item, dict):
        params = item["params"]
        return [params] if isinstance(params, Tensor) else list(params)
    return [item]


def _refuse_kind(kind: type[Optimizer]) -> None:
    if issubclass(kind, (torch.optim.LBFGS, torch.optim.SparseAdam)) or hasattr(kind, "estimate_gradient"):
        raise reject(
            "base_optimizer",
            kind.__name__,
            "an optimizer that steps once from p.grad (not LBFGS, SparseAdam)",
        )


def check_groups(groups: list[dict[str, Any]]) -> None:
    """Checks our keys in each group and that the kernels can take every parameter."""
    for g, group in enumerate(groups):
        check_group(group, f"param_groups[{g}].")
    check_parameters(
        (f"param_groups[{g}]['params'][{i}]", p)
        for g, group in enumerate(groups)
        for i, p in enumerate(group["params"])
    )
