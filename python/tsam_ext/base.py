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


def make_capturable(base: Optimizer, *, own: bool) -> None:
    """Has a base on a GPU that was made here (``own``) count its steps there too; refuses another that does not."""
    for g, group in enumerate(base.param_groups):
        if group.get("capturable") is False and any(p.device.type == "cuda" for p in group["params"]):
            if not own:
                raise reject(f"param_groups[{g}].capturable", False, "True, as TSAM's capturable is True")
            group["capturable"] = base.defaults["capturable"] = True


def with_capturable(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A base's state dict with the ``capturable`` that ``groups`` have: it says where steps are counted here."""
    saved = [
        {**old, "capturable": group["capturable"]} if "capturable" in group else old
        for old, group in zip(state["param_groups"], groups, strict=False)
    ]
    return {**state, "param_groups": saved + state["param_groups"][len(saved) :]}


class WrappingOptimizer(Optimizer):
    """An optimizer whose groups, state and defaults are those of the one in ``_base``, with some keys of its own."""

    _base: Optimizer | None
    _own_defaults: dict[str, Any]

    # The groups, the state and the defaults are the base optimizer's own. Properties, since both objects rebind them
    # in load_state_dict; the setters do nothing while Optimizer.__init__ runs.

    @property
    def base_optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        assert self._base is not None
        return self._base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self._base.param_groups if self._base is not None else []

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._base is not None:
            self._base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self._base.state if self._base is not None else {}

    @state.setter
    def state(self, state: Any) -> None:
        if self._base is not None:
            self._base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, with rho, radius and adaptive among them."""
        return self._base.defaults if self._base is not None else {}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if self._base is not None:
            self._base.defaults = defaults

    def _set_own_keys(self) -> None:
        for key, value in self._own_defaults.items():
            self.base_optimizer.defaults[key] = value
            for group in self.base_optimizer.param_groups:
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as the base optimizer does; the group may set rho, radius and adaptive."""
        if self._base is None:
            return
        index = len(self._base.param_groups)
        check_group(param_group, f"param_groups[{index}].")
        self._base.add_param_group(param_group)
        try:
            check_groups(self._base.param_groups)
        except (TypeError, ValueError):
            del self._base.param_groups[index]
            raise
