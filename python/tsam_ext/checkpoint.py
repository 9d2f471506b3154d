"""What a checkpoint holds beside the base optimizer's state, and when it may be loaded.

Layout: the base's state dict; in every entry of param_groups the numbers, with names that begin with tsam_ (version,
noise scheme, base class, shapes, step, seed, a sampler's own); in state, beside each parameter's, a sampler's tensors.
Invariant: everything is checked before anything is changed; plain values only, so ``weights_only=True`` loads it; the
base optimizer never sees an entry of ours.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .engine.checks import TSAM, check_int, refuse, shown
from .memory import Memory, Saved

PREFIX = "tsam_"
STATE_VERSION = 2
NOISE_SCHEME = "philox4x32-10/box-muller/1"
WHERE = "load_state_dict"


def _identity(base: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal here and there for a state to mean the same."""
    return {
        "version": STATE_VERSION,
        "noise_scheme": NOISE_SCHEME,
        "base_optimizer": type(base).__name__,
        "shapes": " ".join(str(tuple(p.shape)) for p in group["params"]),
    }


def _place(g: int, key: str) -> str:
    return f"{WHERE}: param_groups[{g}]['{PREFIX}{key}']"


def _parameters(base: Optimizer) -> list[Tensor]:
    return [p for group in base.param_groups for p in group["params"]]


def pack(base: Optimizer, memory: Memory, *, step: int, seed: int) -> dict[str, Any]:
    """The base's state dict with our entries beside its own."""
    kept, packed = memory.save(_parameters(base)), base.state_dict()
    numbers = {"step": step, "seed": seed, **kept.numbers}
    groups = []
    for group, here in zip(packed["param_groups"], base.param_groups, strict=True):
        ours = {**_identity(base, here), **numbers}
        groups.append({**group, **{f"{PREFIX}{name}": value for name, value in ours.items()}})
    state = dict(packed["state"])
    indices = [index for group in packed["param_groups"] for index in group["params"]]
    for name, tensors in kept.tensors.items():
        for index, tensor in zip(indices, tensors, strict=True):
            if tensor is not None:
                state[index] = {**state.get(index, {}), f"{PREFIX}{name}": tensor}
    return {**packed, "state": state, "param_groups": groups}


def unpack(
    base: Optimizer, memory: Memory, group_names: dict[str, str], saved: dict[str, Any]
) -> tuple[dict[str, Any], tuple[int, int, Saved] | None]:
    """The base's own part, and (step, seed, a sampler's part) if TSAM saved it; ValueError if it does not fit."""
    if "tsam" in saved:
        got = "a checkpoint of version 1, which an older tsam_ext has written"
        raise refuse(TSAM, WHERE, got, f"one of version {STATE_VERSION}: it cannot be converted")
    theirs = set(group_names.values())  # of these, tsam_rho and its like are group keys
    groups, found = [], []
    for g, group in enumerate(saved["param_groups"]):
        ours = {k.removeprefix(PREFIX): v for k, v in group.items() if k.startswith(PREFIX) and k not in theirs}
        for key, value in ours.items():
            if not isinstance(value, (int, float, str)):
                raise refuse(TSAM, _place(g, key), shown(value), "a number or a string", TypeError)
        groups.append({k: v for k, v in group.items() if not k.startswith(PREFIX) or k in theirs})
        found.append(ours)
    state, tensors = {}, dict[str, dict[Any, Tensor]]()
    for index, entry in saved["state"].items():
        rest = {name: value for name, value in entry.items() if not name.startswith(PREFIX)}
        for name, value in entry.items():
            if name.startswith(PREFIX):
                tensors.setdefault(name.removeprefix(PREFIX), {})[index] = value
        if rest or not entry:
            state[index] = rest
    own = {**saved, "state": state, "param_groups": groups}
    if not any(found):
        return own, None
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    if len(found) != len(base.param_groups):
        raise refuse(TSAM, WHERE, f"{len(found)} parameter groups", f"{len(base.param_groups)} as here")
    for g, (ours, group) in enumerate(zip(found, base.param_groups, strict=True)):
        for key, value in _identity(base, group).items():
            if ours.get(key) != value:
                raise refuse(TSAM, _place(g, key), repr(ours.get(key)), f"{value!r} as here")
    numbers = found[0]
    for g, ours in enumerate(found):
        for key in numbers.keys() - {"shapes"}:
            if repr(ours.get(key)) != repr(numbers[key]):  # NaN is as NaN
                raise refuse(TSAM, _place(g, key), shown(ours.get(key)), f"{numbers[key]!r} as in param_groups[0]")
    step = check_int(TSAM, f"{WHERE}: step", numbers.get("step"), 0, (1 << 63) - 1)
    seed = check_int(TSAM, f"{WHERE}: seed", numbers.get("seed"), 0, (1 << 64) - 1)
    kept = Saved(numbers, {name: [by_index.get(i) for i in indices] for name, by_index in tensors.items()})
    memory.check(kept, _parameters(base))
    return own, (step, seed, kept)
