"""What a framework hands to step() where its user has given no closure.

Lightning's optimizer passes a function that does nothing, inside a partial that runs the hooks around a step.
Invariant: no framework is imported, and no other closure is called here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def closure_of_user(closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
    """The closure, or None where it is Lightning's stand-in for none, whose hooks are run."""
    if closure is None or not stands_for_none(closure):
        return closure
    closure()
    return None


def stands_for_none(closure: Callable[[], Any]) -> bool:
    """Whether it is Lightning's ``do_nothing_closure``, which ``opt.step()`` and ``opt.apply()`` give to the TSAM."""
    if isinstance(closure, functools.partial) and closure.args:
        closure = closure.args[-1]
    module = getattr(closure, "__module__", None) or ""
    return getattr(closure, "__name__", "") == "do_nothing_closure" and module.endswith(".core.optimizer")
