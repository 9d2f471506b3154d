"""A list over several devices, or ranks: one call of an op per device; where all lie on one, the call itself.

An op whose sums go over the whole list is called in stages (csrc/ops/list_arguments.h): stage n on each device, their
sums added on the first device, then over the ranks that hold the other rows, and copied to all, stage n + 1.
Layout: the step's scalars (``state``, a chain's) once per device, the first device's being the one that others read.
Invariant: no device gets a tensor of another; all do the same scalar work on the same totals, so that the copies of the
scalars stay alike, but for what a device counts of its own (saves).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

from tsam_ext import _C, _ops

from .ranks import Ranks
from .state import Slot

P = ParamSpec("P")
STAGES: dict[Callable[..., None], int] = {
    _ops.perturb_: 2,
    _ops.accumulate_perturb_: 2,
    _ops.grad_norm_: 2,
    _ops.take_direction_: 2,
    _ops.add_direction_: 2,
    _ops.norm_ascend_: 2,
    _ops.hmc_place_: 2,
    _ops.hmc_begin_: 2,
    _ops.hmc_leapfrog_: 3,
    _ops.hmc_end_: 2,
}
TOTAL = slice(Slot.TOTAL, Slot.TOTAL + 1)  # where a state has the sums of a stage

NORMED = tuple(normed for _, normed in _C.__noises__)  # whether a kind of noise needs the norm of the whole draw
BALL = 1  # a prior, as csrc/core/hmc.h numbers them
# Which stages of an op, but for the last, have sums that it needs, from its arguments by position, as
# csrc/ops/schema.cpp has them. For the others no rank waits for another.
SUMS: dict[Callable[..., None], Callable[..., tuple[bool, ...]]] = {
    _ops.perturb_: lambda *a: (NORMED[a[9]],),
    _ops.accumulate_perturb_: lambda *a: (NORMED[a[11]],),
    _ops.grad_norm_: lambda *a: (True,),
    _ops.take_direction_: lambda *a: (True,),
    _ops.add_direction_: lambda *a: (True,),
    _ops.norm_ascend_: lambda *a: (True,),
    _ops.hmc_place_: lambda *a: (a[14] and a[13] == BALL,),
    _ops.hmc_begin_: lambda *a: (a[7],),
    _ops.hmc_leapfrog_: lambda *a: (True, a[15] == BALL and a[19]),
    _ops.hmc_end_: lambda *a: (True,),
}


def place_of(tensor: Tensor) -> Hashable:
    """What tells the devices of a list apart."""
    return tensor.device


@dataclass(frozen=True)
class Places:
    """Where the tensors of a list lie: the place of each, the different ones in order, and the device of those."""

    of_each: list[Hashable]
    different: list[Hashable]
    devices: list[torch.device]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Places:
        """Of a list that is empty the CPU."""
        each = list(map(place_of, tensors))
        found = dict(zip(each, tensors, strict=True))
        return cls(each, list(found), [tensor.device for tensor in found.values()] or [torch.device("cpu")])


class Spread:
    """The devices of a step's tensors, in the order in which the list names them; ``alone``: whether there is one.

    ``run(op, indices, *args)`` calls ``op(*args)`` for those tensors of the list: each list among the arguments has one
    entry per index, one for all, or none. Arguments by position: a dispatcher's keywords cost a third of a short call.
    ``shards``: the ranks that hold the other rows of the tensors; None where this process holds all. ``places``: those
    of the tensors, where they have been asked for.
    """

    def __init__(self, tensors: Sequence[Tensor], shards: Ranks | None = None, places: Places | None = None) -> None:
        self._shards = shards
        places = Places.of(tensors) if places is None else places
        self._of, self._places, self.devices = places.of_each, places.different, places.devices
        self.home, self.alone = self.devices[0], len(self.devices) == 1
        self._copies: list[
            tuple[slice, list[Tensor]]
        ] = []  # of each tensor of scalars: where totals are, one per device

    def __str__(self) -> str:
        return " and ".join(map(str, self.devices))

    @property
    def has_meta(self) -> bool:
        """Whether any of the tensors has no memory."""
        return any(device.type == "meta" for device in self.devices)

    def follow(self, scalars: Tensor, totals: slice = TOTAL) -> None:
        """Copies a tensor of scalars from the first device to the others; an op that gets it gets its device's."""
        if not self.alone or self._shards is not None:
            others = [torch.empty_like(scalars, device=device).copy_(scalars) for device in self.devices[1:]]
            self._copies = [known for known in self._copies if known[1][0] is not scalars]
            self._copies.append((totals, [scalars, *others]))

    def saves(self, state: Tensor) -> list[int]:
        """How many saving ops each device has finished. Waits for them."""
        if self.alone:
            return [int(state[Slot.SAVES])]
        return [int(own[Slot.SAVES]) for own in self._followed(state)[1]]

    def total(self, scalars: Tensor) -> Tensor:
        """What all devices have left in their copies of a tensor of sums, added up, on the first."""
        if not self.alone:
            scalars = torch.stack([own.to(self.home) for own in self._followed(scalars)[1]]).sum(0)
        return scalars if self._shards is None else self._shards.sum_(scalars)

    def at(self, device: int, index: int) -> bool:
        """Whether the list's tensor ``index`` lies on the device of that number."""
        return self._of[index] == self._places[device]

    def run(self, op: Callable[P, None], indices: Iterable[int], *args: P.args, **none: P.kwargs) -> None:
        """See the class."""
        if self.alone:
            sums = () if self._shards is None or op not in SUMS else SUMS[op](*args)
            if not any(sums):
                op(*args, **none)
                return
            for stage, summed in enumerate((*sums, False)):
                cast(Callable[..., None], op)(*args, stage)
                if summed:
                    self._add_up(next(value for value in args if isinstance(value, Tensor)))
            return
        self._run_apart(op, indices, args)

    def _run_apart(self, op: Callable[..., None], indices: Iterable[int], args: tuple[Any, ...]) -> None:
        parts: list[list[int]] = [[] for _ in self.devices]
        for entry, index in enumerate(indices):
            parts[self._places.index(self._of[index])].append(entry)
        takes_scalars = any(isinstance(value, Tensor) for value in args)
        stages = STAGES.get(op)
        for stage in range(stages or 1):
            for device, part in enumerate(parts):
                # With scalars on a device without tensors too: its copy is to stay like the others.
                if part or takes_scalars:
                    own = [self._own(value, device, part, sum(map(len, parts))) for value in args]
                    op(*own) if stages is None else op(*own, stage)
            if stages is not None and stage < stages - 1:
                self._add_up(next(value for value in args if isinstance(value, Tensor)))

    def _followed(self, scalars: Tensor) -> tuple[slice, list[Tensor]]:
        return next(known for known in self._copies if known[1][0] is scalars)

    def _own(self, value: Any, device: int, part: list[int], length: int) -> Any:
        """What a device gets of an argument; ``length``: of the whole list."""
        if isinstance(value, list):
            return [value[entry] for entry in part] if len(value) == length else value
        if not isinstance(value, Tensor):
            return value
        for _, copies in self._copies:
            if copies[0] is value:
                return copies[device]
        return value.to(self.devices[device])

    def _add_up(self, scalars: Tensor) -> None:
        """The sums that a stage has left with the first of an op's scalars: of all devices and ranks, to each."""
        totals, copies = self._followed(scalars)
        sums = copies[0][totals]
        if not self.alone:
            sums = torch.stack([own[totals].to(self.home) for own in copies]).sum(0)
        if self._shards is not None:
            self._shards.sum_(sums)
        if not self.alone:
            for own in copies:
                own[totals].copy_(sums)
