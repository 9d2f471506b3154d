"""The weights of samples that several ranks have drawn for one step: an exact log-sum-exp over ranks.

Layout: one state per rank (engine/state.py), with a row for each sample of the step; sample j is rank j modulo ranks'.
Invariant: a NaN of any rank stays one; a rank without samples, or whose samples were all skipped, has no weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .engine.state import HEADER, ROW, Slot


def join_states(states: Tensor, states_per_sample: int) -> tuple[Tensor, Tensor]:
    """The state of all samples from those of ranks, ``[ranks, n]``, and the share of the weights that each rank has.

    Sample j is rank j modulo ranks'. With M_r = max_r + t_r (first_r − first) and m their largest:
    S = Σ S_r e^(M_r − m); where t is infinite the best losses are compared themselves.
    """
    tilts, sums = states[:, Slot.TILT], states[:, Slot.SUM]
    counted = sums != 0.0  # NaN is
    # Gathered, as an index that lies on a device would be waited for.
    first = states[:, Slot.FIRST_LOSS].gather(0, counted.to(torch.int8).argmax().reshape(1)).squeeze(0)
    lifts = torch.where(tilts == 0.0, 0.0, tilts * (states[:, Slot.FIRST_LOSS] - first))
    infinite = tilts.isinf()
    tops = torch.where(infinite, states[:, Slot.MAX], states[:, Slot.MAX] + lifts)
    tops = torch.where(counted & ~sums.isnan(), tops, -torch.inf)
    top = tops.max()
    scales = torch.where(infinite, (tops == top).double(), (tops - top).exp())
    scaled = torch.where(counted, sums * scales, 0.0)
    total = scaled.sum()
    total = torch.where((total == 0.0) | sums.isnan().any(), torch.nan, total)
    joined = states[0].clone()
    joined[Slot.FIRST_LOSS], joined[Slot.MAX], joined[Slot.SUM] = first, top, total
    joined[Slot.SUM_SQUARES] = torch.where(counted, states[:, Slot.SUM_SQUARES] * scales.square(), 0.0).sum()
    joined[Slot.NONFINITE] = states[:, Slot.NONFINITE].sum()
    rows = states[:, HEADER:].reshape(len(states), -1, ROW)
    places = torch.arange(rows.shape[1], device=states.device)
    owners = places // states_per_sample % len(states)
    joined[HEADER:] = rows[owners, places].reshape(-1)
    return joined, scaled / total
