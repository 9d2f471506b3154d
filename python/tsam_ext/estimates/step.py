"""What an estimate is given, and what a completed one leaves for diagnostics and health.

Invariant: plain values; nothing here decides or computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsam_ext.carry import Carry
from tsam_ext.history import History
from tsam_ext.loss_scale import Scaler
from tsam_ext.origin import Scratch
from tsam_ext.table import Table
from tsam_ext.together import ALONE, Alone


@dataclass(frozen=True)
class Step:
    """What an estimate is given.

    ``seed``: signed 64-bit. ``count``: steps before this one; a tensor where steps are counted on the device.
    ``scratch``: memory for copies that lasts between steps. ``modules``: of the model, whose buffers are looked after;
    ``sharded``: those of them that fully_shard has made. ``together``: how the step works over several ranks.
    ``carry``: what the step leaves for later ones, or adds to its gradient.
    """

    table: Table
    scratch: Scratch
    seed: int
    count: int | Tensor
    num_samples: int = 1
    tilt: float | Tensor = 0.0
    split: bool = False
    skip_nonfinite_loss: bool = False
    same_masks: bool = True
    modules: Sequence[nn.Module] = ()
    generators: Sequence[torch.Generator] = ()
    scaler: Scaler = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    history: History = field(default_factory=History)
    sharded: Sequence[Any] = ()
    together: Alone = ALONE
    carry: Carry | None = None


@dataclass(frozen=True)
class Report:
    """What a completed step leaves for diagnostics and health; ``names`` are the diagnostics that say something of it.

    ``state``: its scalars (engine/state.py); ``chain``: a copy of the chain's. ``tilt_weighs``: whether a tilt makes
    the weights differ if it acts. ``dimension_over_rho``: d/ρ, NaN where groups differ in rho. ``first_loss``: of the
    first pass. ``moved``: whether noise or a chain has moved the parameters. ``split``: whether samples saw parts.
    ``loss_dtype``: of the losses as they were recorded. ``scale``: of the closure's gradients, if any; then ``rho``:
    the largest, and ``product``: whether a recorded loss looks like a scaled one.
    ``realised``: of half-precision parameters, where any are perturbed: float64 [3], how far they were from θ₀ at the
    last counted sample. ‖(θ-θ₀)/D‖; the same over the largest rho or radius of theirs; and of the ascent along the
    gradient the share that is left, (θ-θ₀)·g ‖Dg‖ / Σ rho (Dg)², NaN where there is no ascent.
    ``direction``: the scalars of the direction that the step leaves for later ones (csrc/core/direction.h).
    """

    state: Tensor
    num_samples: int
    names: tuple[str, ...]
    states_per_sample: int = 1
    tilt_weighs: bool = False
    chain: Tensor | None = None
    dimension_over_rho: float = float("nan")
    first_loss: Tensor | None = None
    loss_dtype: torch.dtype = torch.float32
    moved: bool = False
    split: bool = False
    scale: Tensor | None = None
    rho: float = 0.0
    product: bool = False
    realised: Tensor | None = None
    direction: Tensor | None = None
