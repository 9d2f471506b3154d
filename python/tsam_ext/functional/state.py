"""The float64 scalars of one step, in one tensor that kernels read and write and the host need not.

Layout (csrc/core/tilt.h): 16 slots, then 4 values a sample (loss, log size, gradient norm, energy error).
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def new_state(num_samples: int, device: torch.device | str = "cpu") -> Tensor:
    """A state tensor with room for ``num_samples`` samples: float64, shape ``[16 + 4 num_samples]``."""
    state = torch.full((HEADER + ROW * num_samples,), float("nan"), dtype=torch.float64, device=device)
    state[Slot.SAVES] = 0.0
    return state
