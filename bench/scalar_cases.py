"""The ops on a few numbers in ``python -m bench ops``: the scalar state machine of a step, and of a list of losses.

They move no words that count: a call is timed. Invariant: as in op_cases.py, all ways of a case compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import tsam_ext
from tsam_ext import _ops
from tsam_ext.engine.state import HEADER, Slot

from .op_check import Case, Way, returned

SMALL = 200  # calls in one timing


def _tilt_begin(state: Tensor, number: float) -> Case:
    tilt = torch.tensor(number, device=state.device)

    def ours() -> None:
        _ops.tilt_begin_(state, tilt)

    def plain() -> None:
        state.fill_(math.nan)
        state[:HEADER].zero_()
        state[Slot.TILT].copy_(tilt)
        state[Slot.MAX].fill_(-math.inf)

    def reset() -> None:
        state.fill_(5.0)
        state[Slot.STEP] = 0.0  # not the op's

    return Case("tilt_begin_", 0, 0, ours, plain, None, plain, reset, lambda _: [state], calls=SMALL)


def _tilt_update(state: Tensor, first: Callable[[], None]) -> Case:
    """The second and later samples of a step, all losses finite: ours also looks for those that are not."""
    loss = torch.tensor(0.5, device=state.device)
    slots = [Slot.FIRST_LOSS, Slot.MAX, Slot.SUM, Slot.SUM_SQUARES, Slot.KEEP, Slot.ADD]

    def ours() -> None:
        _ops.tilt_update_(state, loss, 0.0, 1, False, False)

    def plain() -> None:
        start, best, total, squares, keep, add = (state[i] for i in slots)
        e = state[Slot.TILT] * (loss - start)
        top = torch.maximum(best, e)
        shrink, b = torch.exp(best - top), torch.exp(e - top)
        a = total * shrink
        best.copy_(top)
        torch.add(a, b, out=total)
        squares.mul_(shrink * shrink).add_(b * b)
        torch.div(a, total, out=keep)
        torch.div(b, total, out=add)

    def result(_: object) -> list[Tensor]:
        return [state[slots]]

    return Case("tilt_update_", 0, 0, ours, plain, None, plain, first, result, calls=SMALL)


def _of_losses(tilt: float, device: torch.device) -> list[Case]:
    losses = torch.tensor([0.5, 1.0, 0.75, 2.0, 1.5, 0.25, 1.25, 1.75], device=device)

    def loss() -> Tensor:
        return (torch.logsumexp(tilt * losses, 0) - math.log(len(losses))) / tilt

    def weights() -> Tensor:
        return torch.softmax(tilt * losses, 0)

    ours: dict[str, Way] = {
        "tilted_loss": lambda: tsam_ext.tilted_loss(losses, tilt),
        "tilted_weights": lambda: tsam_ext.tilted_weights(losses, tilt),
    }
    return [
        Case(f"{name}, s=8", 0, 0, ours[name], way, None, way, lambda: None, returned, calls=SMALL)
        for name, way in (("tilted_loss", loss), ("tilted_weights", weights))
    ]


def cases(state: Tensor, tilt: float, first: Callable[[], None]) -> list[Case]:
    """Every op on a few numbers; ``first`` brings the state to after the first sample."""
    return [_tilt_begin(state, tilt), _tilt_update(state, first), *_of_losses(tilt, state.device)]
