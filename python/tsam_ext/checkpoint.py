"""What a checkpoint holds beside the base optimizer's state, and when it may be loaded.

Layout: the base's state dict; in every entry of param_groups numbers and strings, with names that begin with tsam_
(version, noise scheme, base class, shapes, step, seed, a sampler's own); in state, beside each parameter's, a sampler's
tensors.
Invariant: everything is checked before anything is changed; plain values only, so ``weights_only=True`` loads it; the
base optimizer never sees a value of ours.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .engine.checks import TSAM, check_int, refuse, shown
from .sampler_state import SamplerState, Saved
from .samplers import Sampler
from .settings import check_group_values
from .shards import as_local
from .table import length_at

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


def names(kept: type[SamplerState]) -> tuple[str, ...]:
    """What a checkpoint has in each group, by the names there."""
    own = ("version", "noise_scheme", "base_optimizer", "shapes", "step", "seed", *kept.numbers)
    return tuple(f"{PREFIX}{name}" for name in own)


def _place(g: int, key: str) -> str:
    return f"{WHERE}: param_groups[{g}]['{PREFIX}{key}']"


def _parameters(base: Optimizer) -> list[Tensor]:
    return [p for group in base.param_groups for p in group["params"]]


def _split(entries: dict[str, Any], keep: Container[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is the base's, and what is ours without its prefix; ``keep``: names with our prefix that are the base's."""
    ours = {k for k in entries if isinstance(k, str) and k.startswith(PREFIX) and k not in keep}
    theirs = {k: v for k, v in entries.items() if k not in ours}
    return theirs, {k.removeprefix(PREFIX): v for k, v in entries.items() if k in ours}


def of_base(state: Mapping[str, Any], group_names: Mapping[str, str]) -> dict[str, Any]:
    """The base's part of a state dict; ``group_names``: what our keys are called in a group, where they stay."""
    return {
        **state,
        "state": {k: _split(entry)[0] if isinstance(entry, dict) else entry for k, entry in state["state"].items()},
        "param_groups": [_split(group, group_names.values())[0] for group in state["param_groups"]],
    }


def is_priming(base: Optimizer) -> bool:
    """Whether a step without an estimate is that by which torch.distributed.checkpoint makes a base's state.

    It comes before any state is there, with every lr and every gradient 0, and changes no parameter. Reads gradients.
    """
    rates = [group.get("lr") for group in base.param_groups]
    gradients = [p.grad for p in _parameters(base) if p.grad is not None]
    bare = not base.state and all(rate is not None and float(rate) == 0.0 for rate in rates)
    return bare and not any(bool(as_local(gradient).any()) for gradient in gradients)


def pack(
    base: Optimizer, sampler_state: SamplerState, group_names: dict[str, str], *, step: int, seed: int
) -> dict[str, Any]:
    """The base's state dict with our entries beside its own."""
    kept, packed = sampler_state.save(_parameters(base)), of_base(base.state_dict(), group_names)
    numbers = {"step": step, "seed": seed, **kept.numbers}
    groups = []
    for group, here in zip(packed["param_groups"], base.param_groups, strict=True):
        ours = {**_identity(base, here), **numbers}
        for name in group_names.values():  # of a function of the step what it says now: a function cannot be loaded
            if callable(group[name]):
                group[name] = length_at(group[name], step, name)
        groups.append({**group, **{f"{PREFIX}{name}": value for name, value in ours.items()}})
    state = packed["state"]
    indices = [index for group in packed["param_groups"] for index in group["params"]]
    for name, tensors in kept.tensors.items():
        for index, tensor in zip(indices, tensors, strict=True):
            if tensor is not None:
                state[index] = {**state.get(index, {}), f"{PREFIX}{name}": tensor}
    return {**packed, "state": state, "param_groups": groups}


def unpack(
    base: Optimizer, sampler: Sampler, sampler_state: SamplerState, group_names: dict[str, str], saved: Any
) -> tuple[dict[str, Any], tuple[int, int, Saved] | None]:
    """The base's own part, and (step, seed, a sampler's part) if TSAM saved it; ValueError if it does not fit."""
    if isinstance(saved, dict) and "tsam" in saved:
        got = "a checkpoint of version 1, which an older tsam_ext has written"
        raise refuse(TSAM, WHERE, got, f"one of version {STATE_VERSION}: it cannot be converted")
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        raise refuse(TSAM, WHERE, shown(saved), "a dict with state and param_groups, as state_dict() gives it")
    groups: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for g, group in enumerate(saved["param_groups"]):
        theirs, ours = _split(group, group_names.values())
        if all(value is None for value in ours.values()):  # the names alone, as a live group has them
            ours = {}
        for key, value in ours.items():
            if not isinstance(value, (int, float, str)):
                raise refuse(TSAM, _place(g, key), shown(value), "a number or a string", TypeError)
        if g < len(base.param_groups):  # a base's own state does not know our keys: they stay as they are
            here = base.param_groups[g]
            own = {name: here[name] for name in group_names.values()}
            theirs = {**own, **theirs, **{name: value for name, value in own.items() if callable(value)}}
        where = f"{WHERE}: param_groups[{g}]."
        check_group_values(theirs, where, group_names)
        sampler.check_lengths(where, {"radius": theirs.get(group_names["radius"])}, {})
        groups.append(theirs)
        found.append(ours)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    known = set(indices)
    state: dict[Any, Any] = {}
    tensors: dict[str, dict[Any, Tensor]] = {}
    for index, entry in saved["state"].items():
        theirs, ours = _split(entry) if isinstance(entry, dict) else (entry, {})
        for name, value in ours.items():
            if index not in known:
                raise refuse(TSAM, WHERE, f"{PREFIX}{name} of parameter {index!r}", "a parameter of some group")
            tensors.setdefault(name, {})[index] = value
        if theirs or not ours:
            state[index] = theirs
    own = {**saved, "state": state, "param_groups": groups}
    if not any(found):
        return own, None
    _check_identity(base, found)
    numbers = found[0]
    step = check_int(TSAM, f"{WHERE}: step", numbers.get("step"), 0, (1 << 63) - 1)
    seed = check_int(TSAM, f"{WHERE}: seed", numbers.get("seed"), 0, (1 << 64) - 1)
    kept = Saved(numbers, {name: [by_index.get(i) for i in indices] for name, by_index in tensors.items()})
    sampler_state.check(kept, _parameters(base))
    return own, (step, seed, kept)


def _check_identity(base: Optimizer, found: list[dict[str, Any]]) -> None:
    """Refuses another version, noise scheme, class or shapes, and groups that do not say the same."""
    if len(found) != len(base.param_groups):
        raise refuse(TSAM, WHERE, f"{len(found)} parameter groups", f"{len(base.param_groups)} as here")
    for g, (ours, group) in enumerate(zip(found, base.param_groups, strict=True)):
        for key, value in _identity(base, group).items():
            if ours.get(key) != value:
                got, expected = str(ours.get(key)), str(value)
                if key == "shapes":  # of hundreds the first that differs
                    pairs = itertools.zip_longest(*(re.findall(r"\(.*?\)", text) for text in (got, expected)))
                    differs = ((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
                    i, (got, expected) = next(differs, (0, (got, expected)))
                    raise refuse(TSAM, _place(g, key), f"{got} for parameter {i}", f"{expected} as here")
                raise refuse(TSAM, _place(g, key), repr(ours.get(key)), f"{value!r} as here")
        for key in found[0].keys() - {"shapes"}:
            if repr(ours.get(key)) != repr(found[0][key]):  # NaN is as NaN
                expected = f"{found[0][key]!r} as in param_groups[0]"
                raise refuse(TSAM, _place(g, key), shown(ours.get(key)), expected)
