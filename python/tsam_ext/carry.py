"""The direction that a full step leaves for the steps after it: what the tilted gradient has beside the plain one.

full step     G: the mean of the samples' first gradients; A: the tilted gradient;  v = (A - (A.G / G.G) G) / |G|
later steps   g <- g + |g| v
Layout: v per parameter, float32 or float64, in the parameter's strides; in a full step its memory holds G.
Words moved per float32 element: a full step of ``ascent`` 5 + 3 (s - 1) more, where the first gradient's memory can be
G's (else 2 more); a later step 4.
Invariant: v knows no scale of the loss, so none has to last; a parameter without one adds nothing; norms are global.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from . import _ops
from .engine.spread import Spread
from .engine.state import DIRECTION_SLOTS, DIRECTION_SUMS, new_state
from .mean import Mean
from .sampler_state import SamplerState, Saved, check_tensors, wide_dtype
from .shards import as_parameter, rows_of
from .table import Table, kernel_form, taken
from .together import Alone

CARRY = "carry"


class Carry(SamplerState):
    """What lasts between full steps: v of each parameter.

    A full step lets go of it when it begins. If it fails it is taken again, so that a checkpoint from inside it lacks
    nothing.
    """

    tensors: ClassVar[tuple[str, ...]] = (CARRY,)

    def __init__(self) -> None:
        self.directions: dict[Tensor, Tensor] = {}

    def save(self, parameters: Sequence[Tensor]) -> Saved:
        """v of each parameter that is not frozen."""
        return Saved(tensors={CARRY: [self.kept(parameter).get(CARRY) for parameter in parameters]})

    def kept(self, parameter: Tensor) -> dict[str, Tensor]:
        """Its v; zeros where it has none, as who loads a checkpoint in place needs room for one."""
        if not parameter.requires_grad:
            return {}
        return {CARRY: as_parameter(parameter, self.direction(parameter))}

    def direction(self, parameter: Tensor) -> Tensor:
        """Its v in the form that the parameter has now; zeros where it has none."""
        tensor, found = kernel_form(parameter), self.directions.get(parameter)
        form = (tensor.shape, tensor.stride(), wide_dtype(tensor), tensor.device)
        if found is not None and (found.shape, found.stride(), found.dtype, found.device) == form:
            return found
        room = torch.zeros_like(tensor, dtype=wide_dtype(tensor), requires_grad=False)
        return room if found is None or found.shape != tensor.shape else room.copy_(found)

    def check(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """ValueError unless ``saved`` has a finite tensor per parameter, or none."""
        check_tensors(saved, CARRY, parameters)

    @torch.no_grad()
    def load(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """Takes what :meth:`save` gave; where that was nothing, gradients are plain ones up to the next full step."""
        self.directions = {}
        for parameter, found in zip(parameters, saved.tensors.get(CARRY, ()), strict=False):
            if found is not None:
                self.directions[parameter] = self.direction(parameter).copy_(rows_of(parameter, found))


class Uncarried:
    """A step that neither leaves a direction nor adds one; what a step does for one that does."""

    scalars: Tensor | None = None  # of the direction that it leaves (csrc/core/direction.h)

    def begin(self) -> None:
        """The passes begin."""

    def complete(self, tilted: dict[int, Tensor], together: Alone) -> None:
        """``tilted``: the gradient of the step, over all ranks, by index."""

    def forget(self) -> None:
        """Lets go of everything of the size of the parameters but v."""


UNCARRIED = Uncarried()


class FullStep(Uncarried):
    """A step that makes v. ``carry``: where it is to last."""

    def __init__(self, carry: Carry, table: Table, spread: Spread, num_samples: int) -> None:
        self._carry, self._table, self._spread = carry, table, spread
        self._state = new_state(num_samples, spread.home)  # of a tilt of 0: the mean by rows
        self._mean = Mean(table, spread, self._state)
        self._reduced = True
        self.scalars = self._scalars = new_scalars(spread)

    def begin(self) -> None:
        """See :class:`Uncarried`; what the steps before have carried is over."""
        self._carry.directions = {}
        self._spread.follow(self._state)
        self._mean.found = [None] * len(self._table.parameters)
        self._spread.run(_ops.tilt_begin_, (), self._state, torch.zeros_like(self._state[0]))

    def add(
        self,
        sample: int,
        gradients: dict[int, Tensor],
        loss: Tensor,
        *,
        log_size: float = 0.0,
        skip: bool = False,
        adopt: bool = False,
        reduced: bool = True,
    ) -> None:
        """A sample's first gradient, which counts by its rows; not at all where ``skip`` and ``loss`` is not finite.

        ``adopt``: its memory may become the mean's. ``reduced``: ranks have the same.
        """
        first, own = not self._mean.sums, self._table.own
        if own < len(self._table.parameters):  # else the same dict, as one more would count as another holder
            gradients = {i: gradient for i, gradient in gradients.items() if i < own}
        self._reduced &= reduced
        self._spread.run(_ops.tilt_update_, (), self._state, loss, log_size, sample, skip, False)
        self._mean.add(gradients, adopt=adopt and first, zero=not first)

    def complete(self, tilted: dict[int, Tensor], together: Alone) -> None:
        """See :class:`Uncarried`: A is there, and v takes the place of G."""
        table, plain = self._table, together.average(self._mean.sums, self._state, reduced=self._reduced)
        indices = sorted(i for i in tilted.keys() | plain.keys() if i < table.own)
        becoming = [plain[i] if i in plain else torch.zeros_like(tilted[i]) for i in indices]
        gradients = [tilted[i] if i in tilted else torch.zeros_like(plain[i]) for i in indices]
        self._spread.run(_ops.take_direction_, indices, becoming, gradients, self._scalars)
        self._carry.directions = dict(zip(taken(table.parameters, indices), becoming, strict=True))

    def forget(self) -> None:
        """See :class:`Uncarried`."""
        self._mean.forget()


class LaterStep(Uncarried):
    """A step that adds what the last full one has left, to a plain gradient."""

    def __init__(self, carry: Carry, table: Table, spread: Spread, num_samples: int) -> None:
        self._carry, self._table, self._spread = carry, table, spread
        self._scalars = new_scalars(spread)

    def complete(self, tilted: dict[int, Tensor], together: Alone) -> None:
        """See :class:`Uncarried`: the plain gradient gets its part of v."""
        if self._carry.directions:
            own = sorted(i for i in tilted if i < self._table.own)
            parameters = taken(self._table.parameters, own)
            carried = list(map(self._carry.direction, parameters))
            self._carry.directions.update(zip(parameters, carried, strict=True))
            self._spread.run(_ops.add_direction_, own, taken(tilted, own), carried, self._scalars)


def new_scalars(spread: Spread) -> Tensor:
    """The float64 scalars of a direction (csrc/core/direction.h), on every device."""
    scalars = torch.zeros(DIRECTION_SLOTS, dtype=torch.float64, device=spread.home)
    spread.follow(scalars, slice(0, DIRECTION_SUMS))
    return scalars
