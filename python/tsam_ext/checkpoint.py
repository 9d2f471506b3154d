"""What a checkpoint holds beside the base optimizer's state, and when it may be loaded.

Invariant: everything is checked before anything is changed; plain values only, so ``weights_only=True`` loads it.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from .chain import SLOTS
from .settings import Settings, checked_int, reject

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
    shapes = [p.shape for group in base.param_groups for p in group["params"]]
    if not isinstance(chain, dict) or chain.keys() != {"scalars", "positions"} or chain["scalars"].shape != (SLOTS,):
        raise reject(where, chain, f"{SLOTS} scalars, and positions")
    if len(chain["positions"]) != len(shapes):
        raise reject(where, f"{len(chain['positions'])} positions", f"{len(shapes)}, one a parameter")
    for i, (position, shape) in enumerate(zip(chain["positions"], shapes, strict=True)):
        if position is not None and position.shape != shape:
            raise reject(f"{where}: positions[{i}]", f"shape {tuple(position.shape)}", f"{tuple(shape)}")
