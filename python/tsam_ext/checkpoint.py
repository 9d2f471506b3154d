"""What a checkpoint holds beside the base optimizer's state, and when it may be loaded.

Invariant: everything is checked before anything is changed; plain values only, so ``weights_only=True`` loads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .chain import KEPT, SLOTS
from .settings import PRIORS, Settings, checked_int, reject

KEY = "tsam"
STATE_VERSION = 1
NOISE_SCHEME = "philox4x32-10/box-muller/1"


def _identity(base: Optimizer) -> dict[str, Any]:
    """What has to be equal here and there for a state to mean the same."""
    return {
        "version": STATE_VERSION,
        "noise_scheme": NOISE_SCHEME,
        "base_optimizer": type(base).__name__,
        "shapes": [[list(p.shape) for p in group["params"]] for group in base.param_groups],
    }


def pack(base: Optimizer, settings: Settings, *, step: int, seed: int, chain: dict[str, Any] | None) -> dict[str, Any]:
    """The base's state dict with one more key."""
    own = {**_identity(base), "step": step, "seed": seed, "settings": settings.describe()}
    if chain is not None:
        own["chain"] = chain
    return {**base.state_dict(), KEY: own}


def unpack(base: Optimizer, state: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int, Any] | None]:
    """The base's own part of ``state``, and (step, seed, chain) if TSAM saved it; ValueError if it does not fit."""
    own = state.get(KEY)
    rest = {key: value for key, value in state.items() if key != KEY}
    if own is None:
        return rest, None
    if not isinstance(own, dict):
        raise reject(f"load_state_dict: {KEY}", own, "a dict, as state_dict() writes it")
    for key, value in _identity(base).items():
        if own.get(key) != value:
            raise reject(f"load_state_dict: {key}", own.get(key), f"{value!r} as here")
    step = checked_int("load_state_dict: step", own.get("step"), 0, (1 << 63) - 1)
    seed = checked_int("load_state_dict: seed", own.get("seed"), 0, (1 << 64) - 1)
    chain = own.get("chain")
    if chain is not None:
        _check_chain(base, chain)
    return rest, (step, seed, chain)


def _check_chain(base: Optimizer, chain: Any) -> None:
    where = "load_state_dict: chain"
    parameters = [p for group in base.param_groups for p in group["params"]]
    if not isinstance(chain, dict) or chain.keys() != {"prior", "scalars", "positions"}:
        raise reject(where, chain, "a dict of prior, scalars and positions")
    if chain["prior"] not in PRIORS:
        raise reject(f"{where}: prior", chain["prior"], " or ".join(map(repr, PRIORS)))
    scalars, positions = chain["scalars"], chain["positions"]
    if not isinstance(scalars, Tensor) or scalars.shape != (SLOTS,) or scalars.dtype != torch.float64:
        raise reject(f"{where}: scalars", scalars, f"a float64 tensor of shape ({SLOTS},)")
    rest = [slot for slot in range(SLOTS) if slot not in KEPT]
    if not bool(scalars.isfinite().all()) or bool(scalars[rest].any()):
        raise reject(f"{where}: scalars", scalars.tolist(), f"finite numbers, 0 but at {', '.join(map(str, KEPT))}")
    if not isinstance(positions, list) or len(positions) != len(parameters):
        got = f"{len(positions)} positions" if isinstance(positions, list) else positions
        raise reject(where, got, f"a list of {len(parameters)}, one a parameter")
    for i, (position, parameter) in enumerate(zip(positions, parameters, strict=True)):
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if position is None:
            continue
        got = position
        if isinstance(position, Tensor):
            shape, place = tuple(position.shape), position.device.type
            got = f"a {position.layout} {position.dtype} tensor of shape {shape} on {place}"
            dense = position.layout is torch.strided and position.device.type != "meta"
            if dense and position.dtype == wide and position.shape == parameter.shape:
                got = None
        if got is not None:
            raise reject(f"{where}: positions[{i}]", got, f"None or a {wide} tensor of shape {tuple(parameter.shape)}")
        if not bool(position.isfinite().all()):
            raise reject(f"{where}: positions[{i}]", "a position that is not finite", "finite numbers")
