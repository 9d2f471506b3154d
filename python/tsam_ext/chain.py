"""A Markov chain that lasts from step to step: where it stands in scaled coordinates, and its step size.

Layout: three position buffers per parameter; `scalars` (csrc/core/metropolis.h) says which holds the chain's state.
A checkpoint holds, per parameter, the position alone, and in every group the prior, the log step size, the running
gradient scale, which parameters rest, whose position says nothing, and which rank's chain it is where ranks have their
own.
Invariant: the host never learns which buffer is current; no scratch is saved; inside a step a checkpoint holds the
chain as the step found it, for no trajectory writes the buffer of that position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .engine.checks import TSAM, check_choice, refuse, shown
from .engine.state import CHAIN_SLOTS, ChainSlot
from .phase_space import PRIORS
from .sampler_state import SamplerState, Saved, check_tensors, wide_dtype
from .shards import as_parameter, rows_of
from .table import Table, kernel_form

# What one step leaves for the next beside positions, by its name in a checkpoint.
KEPT = {
    "log_step_size": ChainSlot.LOG_STEP,
    "gradient_scale": ChainSlot.GRAD_SCALE,
    "gradient_scales": ChainSlot.GRAD_SCALES,
}
POSITION, PRIOR, RESTING, RANK = "position", "prior", "resting", "rank"


class Chain(SamplerState):
    """The chain on one ``prior``. With ``adapts`` the step size moves, up to ``highest_step_size``."""

    numbers: ClassVar[tuple[str, ...]] = (PRIOR, *KEPT, RESTING, RANK)
    tensors: ClassVar[tuple[str, ...]] = (POSITION,)

    def __init__(
        self, device: torch.device, *, prior: str, step_size: float, highest_step_size: float, adapts: bool
    ) -> None:
        self.prior, self.adapts = prior, adapts
        self.highest_log_step = math.log(highest_step_size)
        self._first_log_step = math.log(step_size)
        self.scalars = torch.zeros(CHAIN_SLOTS, dtype=torch.float64, device=device)
        self.scalars[ChainSlot.LOG_STEP].fill_(self._first_log_step)
        self.positions: dict[Tensor, list[Tensor]] = {}
        self.momenta: dict[Tensor, Tensor] = {}  # scratch: kept, as new memory costs more than a pass over it
        self.started = False
        self._rank = ""
        self._found: tuple[Tensor, bool] | None = None  # at a step's start: the scalars, and whether it can go on

    @property
    def prior_number(self) -> int:
        """The prior as the ops take it."""
        return PRIORS.index(self.prior)

    def buffers(self, parameter: Tensor) -> list[Tensor]:
        """The three buffers of a parameter; makes them, and thereby restarts the chain, where there are none."""
        held = self._held(parameter)
        if held is None:
            self.started = False
            tensor = kernel_form(parameter)
            held = [torch.zeros_like(tensor, dtype=wide_dtype(tensor), requires_grad=False) for _ in range(3)]
            self.positions[parameter] = held
            self.momenta.pop(parameter, None)
        return held

    def _held(self, parameter: Tensor) -> list[Tensor] | None:
        """The buffers of a parameter, or None where it has none in its present form."""
        held = self.positions.get(parameter)
        if held is None:
            return None
        first, tensor = held[0], kernel_form(parameter)
        alike = first.shape == tensor.shape and first.stride() == tensor.stride()
        return held if alike and first.dtype == wide_dtype(tensor) and first.device == tensor.device else None

    def momentum(self, parameter: Tensor) -> Tensor:
        """Memory for a parameter's momentum, like a position; holds whatever the last trajectory left."""
        if parameter not in self.momenta:
            self.momenta[parameter] = torch.empty_like(self.positions[parameter][0])
        return self.momenta[parameter]

    def __getstate__(self) -> dict[str, Any]:
        scalars, started = self._as_saved
        return {**self.__dict__, "momenta": {}, "scalars": scalars, "started": started, "_found": None}

    def position(self, parameter: Tensor) -> Tensor:
        """The chain's position at one parameter, chosen on the device."""
        return self._position(parameter, self.scalars)

    def _position(self, parameter: Tensor, scalars: Tensor) -> Tensor:
        first, second, third = self.positions[parameter]
        current = scalars[ChainSlot.CURRENT].to(first.device)
        return torch.where(current == 0, first, torch.where(current == 1, second, third))

    @property
    def _as_saved(self) -> tuple[Tensor, bool]:
        """The scalars, and whether the chain can go on: inside a step those that it found."""
        return (self.scalars, self.started) if self._found is None else self._found

    def step_begins(self, *, draw: bool) -> None:
        """Remembers where the chain is; a draw overwrites that, so that after an exception it stands nowhere."""
        self._found = (self.scalars.clone(), not draw)

    def go_back(self, *, launches: bool = True) -> None:
        """To where the step has found it; without ``launches`` nothing on the device has moved."""
        if self._found is not None:
            scalars, self.started = self._found
            if launches:
                self.scalars.copy_(scalars)
            self._found = None

    def settle(self) -> None:
        """The chain as it is now is the one to save."""
        self._found = None

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

    def save(self, parameters: Sequence[Tensor]) -> Saved:
        """The prior, the scalars that last, and one position per parameter that is not frozen."""
        scalars, _ = self._as_saved
        numbers: dict[str, float | str] = {name: float(scalars[slot]) for name, slot in KEPT.items()}
        numbers[RANK] = self._rank
        numbers[RESTING] = " ".join(str(i) for i, parameter in enumerate(parameters) if not self._goes_on(parameter))
        return Saved({PRIOR: self.prior, **numbers}, {POSITION: [self.kept(p).get(POSITION) for p in parameters]})

    def _goes_on(self, parameter: Tensor) -> bool:
        return self._as_saved[1] and self._held(parameter) is not None

    def kept(self, parameter: Tensor) -> dict[str, Tensor]:
        """Its position; zeros where it rests, as who loads a checkpoint in place needs room for one."""
        if self._goes_on(parameter):
            return {POSITION: as_parameter(parameter, self._position(parameter, self._as_saved[0]))}
        if not parameter.requires_grad:
            return {}
        tensor = kernel_form(parameter)
        return {
            POSITION: as_parameter(parameter, torch.zeros_like(tensor, dtype=wide_dtype(tensor), requires_grad=False))
        }

    def check(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """ValueError unless ``saved`` is a chain's, or nothing's."""
        numbers, where = saved.numbers, "load_state_dict"
        if PRIOR in numbers:
            check_choice(TSAM, f"{where}: {PRIOR}", numbers[PRIOR], PRIORS)
            for name in KEPT:
                value = numbers.get(name)
                if not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise refuse(TSAM, f"{where}: {name}", shown(value), "a finite number")
            resting = numbers.get(RESTING)
            if not isinstance(resting, str) or not all(i.isdecimal() for i in resting.split()):
                raise refuse(TSAM, f"{where}: {RESTING}", shown(resting), "the numbers of parameters in a string")
            if not isinstance(numbers.get(RANK), str):
                raise refuse(TSAM, f"{where}: {RANK}", shown(numbers.get(RANK)), "a string")
        check_tensors(saved, POSITION, parameters)

    @torch.no_grad()
    def load(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """Takes what :meth:`save` gave; the chain starts anew if that was nothing, or a chain on another prior.

        The step size is the saved one only where this chain adapts it, and within its own bound.
        """
        held, self.positions, self.started, self._found = self.positions, {}, False, None
        self.scalars.zero_()
        self.scalars[ChainSlot.LOG_STEP] = self._first_log_step
        if saved.numbers.get(PRIOR) != self.prior:
            return
        for name, slot in KEPT.items():
            if slot != ChainSlot.LOG_STEP or self.adapts:
                self.scalars[slot] = float(saved.numbers[name])
        if self.adapts:
            self.scalars[ChainSlot.LOG_STEP].clamp_(max=self.highest_log_step)
        self._rank = str(saved.numbers[RANK])
        resting = {int(i) for i in str(saved.numbers[RESTING]).split()}
        for i, (parameter, position) in enumerate(zip(parameters, saved.tensors.get(POSITION, ()), strict=False)):
            if position is not None and i not in resting:
                if parameter in held:  # the same memory, which a captured step may know
                    self.positions[parameter] = held[parameter]
                self.buffers(parameter)[0].copy_(rows_of(parameter, position))
        self.started = bool(self.positions)

    def belong(self, rank: str) -> bool:
        """See :class:`SamplerState`: a chain of another rank's goes on as a new one, with its step size."""
        lost = self.started and rank != self._rank
        if rank != self._rank:
            self._rank, self.started = rank, False
            if self._found is not None:
                self._found = self._found[0], False
        return not lost

    def perturbations(self, table: Table) -> list[Tensor]:
        """ε = T x of each perturbed parameter, with T = rho D/√d (gaussian) or rho D (ball).

        RuntimeError where the chain has not been, as a parameter moves that did not in the last step.
        """
        if not self.started:
            raise RuntimeError("TSAM: chain_position() needs a step before it.")
        unit = math.sqrt(max(table.dimension, 1)) if self.prior == "gaussian" else 1.0
        found = []
        for i in table.moves:
            if table.parameters[i] not in self.positions:
                raise RuntimeError(f"TSAM: chain_position(): {table.name(i)} was not perturbed in the last step.")
            tensor = table.tensors[i].detach()
            moved = table.rho[i] / unit * self.position(table.parameters[i])
            moved = (moved * tensor.abs() if table.adaptive[i] else moved).to(tensor.dtype)
            moved = torch.view_as_complex(moved) if table.dtypes[i].is_complex else moved
            found.append(as_parameter(table.parameters[i], moved))
        return found
