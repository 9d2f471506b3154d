"""What the sampler hmc keeps from step to step: where its Markov chain stands, and its step size.

Layout: three position buffers a parameter, in scaled coordinates; `scalars` (csrc/core/metropolis.h) says which holds
the chain's state. Invariant: the host never learns which; a checkpoint holds the position alone, and no scratch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .settings import HmcSettings
from .table import Table

SLOTS = 30


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


KEPT = (ChainSlot.LOG_STEP, ChainSlot.GRAD_SCALE, ChainSlot.GRAD_SCALES)  # of one step for the next, beside positions


class Chain:
    """What lasts from step to step: the chain's position in scaled coordinates, and its step size."""

    def __init__(self, settings: HmcSettings, device: torch.device) -> None:
        self.settings = settings
        self.scalars = torch.zeros(SLOTS, dtype=torch.float64, device=device)
        self.scalars[ChainSlot.LOG_STEP].fill_(math.log(settings.first_step_size))
        self.positions: dict[Tensor, list[Tensor]] = {}
        self.momenta: dict[Tensor, Tensor] = {}  # scratch: kept, as new memory costs more than a pass over it
        self.started = False

    def buffers(self, parameter: Tensor) -> list[Tensor]:
        """The three buffers of a parameter; makes them, and thereby restarts the chain, where there are none."""
        held = self._held(parameter)
        if held is None:
            self.started = False
            wide = torch.promote_types(parameter.dtype, torch.float32)
            held = [torch.zeros_like(parameter, dtype=wide, requires_grad=False) for _ in range(3)]
            self.positions[parameter] = held
            self.momenta.pop(parameter, None)
        return held

    def _held(self, parameter: Tensor) -> list[Tensor] | None:
        """The buffers of a parameter, None where there are none that fit it."""
        held = self.positions.get(parameter)
        if held is None:
            return None
        first, wide = held[0], torch.promote_types(parameter.dtype, torch.float32)
        alike = first.shape == parameter.shape and first.stride() == parameter.stride()
        return held if alike and first.dtype == wide and first.device == parameter.device else None

    def momentum(self, parameter: Tensor) -> Tensor:
        """Memory for a parameter's momentum, like a position; holds whatever the last trajectory left."""
        if parameter not in self.momenta:
            self.momenta[parameter] = torch.empty_like(self.positions[parameter][0])
        return self.momenta[parameter]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "momenta": {}}

    def position(self, parameter: Tensor) -> Tensor:
        """The chain's position at one parameter, chosen on the device."""
        first, second, third = self.positions[parameter]
        current = self.scalars[ChainSlot.CURRENT].to(first.device)
        return torch.where(current == 0, first, torch.where(current == 1, second, third))

    def step_ends(self, moved: list[Tensor]) -> None:
        """The chain goes on from here, over these parameters alone.

        One that rests for a step and moves again starts anew, and the whole chain with it: meanwhile the others may
        have taken its room in the ball.
        """
        self.started = True
        if len(moved) != len(self.positions):
            self.positions = {parameter: self.positions[parameter] for parameter in moved}
        if len(moved) != len(self.momenta):
            self.momenta = {parameter: self.momenta[parameter] for parameter in moved}

    def pack(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        """The chain for a checkpoint: the scalars that last, and one position a parameter, None where there is none."""
        scalars = torch.zeros_like(self.scalars)
        for slot in KEPT:
            scalars[slot] = self.scalars[slot]
        parameters = [p for group in groups for p in group["params"]]
        positions = [self.position(p) if self.started and self._held(p) else None for p in parameters]
        return {"prior": self.settings.prior, "scalars": scalars, "positions": positions}

    @torch.no_grad()
    def unpack(self, groups: list[dict[str, Any]], saved: dict[str, Any] | None) -> None:
        """Takes what :meth:`pack` gave; the chain starts anew if that was nothing, or a chain on another prior.

        The step size is the saved one only where this chain adapts it, and within its own bound.
        """
        held, self.positions, self.started = self.positions, {}, False
        first = math.log(self.settings.first_step_size)
        if saved is None or saved["prior"] != self.settings.prior:
            self.scalars.zero_()
            self.scalars[ChainSlot.LOG_STEP] = first
            return
        self.scalars.copy_(saved["scalars"])
        if self.settings.adapt_step_size:
            self.scalars[ChainSlot.LOG_STEP].clamp_(max=self.settings.highest_log_step)
        else:
            self.scalars[ChainSlot.LOG_STEP] = first
        parameters = [p for group in groups for p in group["params"]]
        for parameter, position in zip(parameters, saved["positions"], strict=True):
            if position is not None:
                if parameter in held:  # the same memory, which a captured step may know
                    self.positions[parameter] = held[parameter]
                self.buffers(parameter)[0].copy_(position)
        self.started = bool(self.positions)

    def perturbations(self, table: Table) -> list[Tensor]:
        """ε = T x of each perturbed parameter, with T = rho D/√d (gaussian) or rho D (ball).

        RuntimeError where the chain has not been, as a parameter moves that did not in the last step.
        """
        unit = math.sqrt(max(table.dimension, 1)) if self.settings.prior == "gaussian" else 1.0
        found = []
        for i in table.moves:
            if table.parameters[i] not in self.positions:
                raise RuntimeError(f"TSAM: chain_position(): {table.name(i)} was not perturbed in the last step.")
            parameter = table.parameters[i].detach()
            moved = table.rho[i] / unit * self.position(table.parameters[i])
            found.append((moved * parameter.abs() if table.adaptive[i] else moved).to(parameter.dtype))
        return found
