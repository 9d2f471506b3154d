"""The float64 scalars that kernels read and write and the host need not: of one step, and of a Markov chain.

Layout: a step's ``state`` (csrc/core/tilt.h): 16 slots, then 4 values per sample (loss, log size, gradient norm, energy
error); a chain's scalars (csrc/core/metropolis.h): 30 slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_int, refuse, shown

HEADER = 16
ROW = 4


class Slot:
    """Indices into the state tensor, as csrc/core/tilt.h has them (a test compares the two)."""

    TILT = 0
    FIRST_LOSS = 1
    MAX = 2
    SUM = 3
    SUM_SQUARES = 4
    ACTION = 5
    KEEP = 6
    ADD = 7
    NONFINITE = 8
    NOISE_SCALE = 9
    GRAD_NORM = 10
    SAVES = 11
    NEWEST = 12
    HELD = 13
    STEP = 14
    TOTAL = 15


class ChainSlot:
    """Indices into a chain's scalars, as csrc/core/metropolis.h has them (a test compares the two)."""

    DELTA = 0
    LOG_STEP = 1
    CURRENT = 2
    LOSS = 3
    ENERGY = 4
    ACCEPTANCE = 5
    TRAJECTORIES = 6
    ACCEPTED = 7
    DIVERGENT = 8
    START = 9
    MOVED = 11
    REFLECTIONS = 12
    GRAD_SCALE = 13
    GRAD_SCALES = 14
    ROUNDING = 15
    TAKEN = 16
    ALPHA = 21
    REJECTED = 22
    CHAIN_STEP = 24
    TOTALS = 25


CHAIN_SLOTS = 30
DIRECTION_SLOTS, DIRECTION_SUMS, RATIO = 9, 3, 8  # of a carried direction, as csrc/core/direction.h has them
STEP_HELD = -1  # an op's step: the one in the slot STEP, which a replayed CUDA graph finds counted on


def new_state(num_samples: int, device: torch.device | str = "cpu") -> Tensor:
    """A state tensor with room for ``num_samples`` samples: float64, shape ``[16 + 4 num_samples]``."""
    op = "new_state"
    num_samples = check_int(op, "num_samples", num_samples, 0, 1 << 28)
    if not isinstance(device, (str, torch.device)):
        raise refuse(op, "device", shown(device), "a torch.device or its name", TypeError)
    try:
        place = torch.device(device)
    except RuntimeError:
        raise refuse(op, "device", shown(device), "the name of a device, as cpu") from None
    state = torch.full((HEADER + ROW * num_samples,), float("nan"), dtype=torch.float64, device=place)
    state[Slot.SAVES].zero_()  # not an assignment, which would copy a number from the host
    return state
