"""How the hooks of torch's Optimizer run on one that wraps another: each once, with the object it was registered on.

Step: the wrapper's own around its whole step; torch's global ones, and the base's own, where the base steps.
State: the wrapper's around the whole state dict; the base's around the base's part of it, without entries of ours.
Invariant: order, arguments and replacements are torch's (torch/optim/optimizer.py); nothing of torch's is suspended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.autograd.profiler import record_function
from torch.optim import Optimizer

StateDict = dict[str, Any]


def run_own_step_hooks(kind: type[Optimizer]) -> None:
    """Has ``kind.step`` run the object's own hooks, in place of the wrapper that torch puts around a class's step.

    torch's would run the global hooks too, and a second time around the base's step inside. They run there alone, for
    there a step is what they know: ``p.grad`` holds its gradient before, the parameters are new after. torch takes a
    step that says it is hooked for one of its own.
    """
    inner: Callable[..., Any] = kind.step
    if getattr(inner, "hooked", False):
        return

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer = args[0]
        if _runs_further_out(kind, type(optimizer)):
            return inner(*args, **kwargs)
        with record_function(f"Optimizer.step#{type(optimizer).__name__}.step"):
            for before in optimizer._optimizer_step_pre_hooks.values():
                result = before(optimizer, args, kwargs)
                if result is not None:
                    if not isinstance(result, tuple) or len(result) != 2:
                        raise RuntimeError(
                            f"TSAM: a step pre-hook must return None or (new args, new kwargs), got {result}"
                        )
                    args, kwargs = result
            out = inner(*args, **kwargs)
            for after in optimizer._optimizer_step_post_hooks.values():
                after(optimizer, args, kwargs)
            return out

    step.hooked = True  # type: ignore[attr-defined]
    kind.step = step  # type: ignore[method-assign]


def _runs_further_out(kind: type, of: type) -> bool:
    """Whether a subclass's step, which has called this one by super(), has run the hooks already."""
    below = of.__mro__[: of.__mro__.index(kind)]
    return any(getattr(vars(each).get("step"), "hooked", False) for each in below)


def saved(optimizer: Optimizer, save: Callable[[], StateDict]) -> StateDict:
    """What ``save`` gives, between the optimizer's hooks; one after it may return another dict."""
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    state = save()
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        result = after(optimizer, state)
        state = state if result is None else result
    return state


def load(optimizer: Optimizer, state: Any, take: Callable[[Any], None]) -> None:
    """``take`` gets the state dict, between the optimizer's hooks; those before it may change a shallow copy of it."""
    state = state.copy() if isinstance(state, dict) else state
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = before(optimizer, state)
        state = state if result is None else result
    take(state)
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)
