"""The weighted mean of the passes' gradients, whose memory it lives in, and what p.grad was before the step.

Three answers, here alone: *adopted*, the first gradient's own memory; *found*, what p.grad was before the step; *new*.
Words moved per float32 element and sample: 3; the first assigns (2), adopted it is not touched.
Invariant: a p.grad that existed is filled, not replaced; only memory that nobody else holds is adopted; to a parameter
of another optimizer the mean is added, as a backward pass would, and after an exception its p.grad is what it was.
"""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import _ops
from .engine.checks import TSAM, refuse
from .engine.ranks import Ranks
from .engine.spread import Spread
from .flat import Flat
from .shards import as_parameter
from .table import WIDE, Table, kernel_form, taken

GRAD = attrgetter("grad")
_storage_users = torch._C._storage_Use_Count


_storage, _identity = Tensor.untyped_storage, attrgetter("_cdata")


def _holders(gradients: dict[int, Tensor]) -> list[int]:
    """How many references to each of the gradients there are, in Python and in p.grad."""
    return list(map(sys.getrefcount, gradients.values()))


def _alone() -> tuple[int, int]:
    """What a gradient that nobody else holds counts: references, and tensors that share its memory."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    gradients = dict(enumerate(map(GRAD, [parameter])))
    return _holders(gradients)[0], _storage_users(gradients[0].untyped_storage()._cdata)


HOLDERS, USERS = _alone()


def owned(gradients: dict[int, Tensor]) -> set[int]:
    """Which of the gradients are nobody's but p.grad's and this dict's, memory included.

    A view, a gradient in a reducer's bucket, or one that a closure or a hook keeps would be overwritten, by the next
    backward pass or by us.
    """
    found = [i for i, holders in zip(gradients, _holders(gradients), strict=True) if holders <= HOLDERS]
    users = map(_storage_users, map(_identity, map(_storage, map(gradients.__getitem__, found))))
    return {i for i, number in zip(found, users, strict=True) if number <= USERS}


class Mean:
    """The mean of one step: ``sums`` has an entry for each parameter that has had a gradient, real where it is complex.

    ``found``: p.grad of each parameter before the step. ``flat``: where the mean is to lie in one run of memory, as
    ranks add theirs up.
    """

    def __init__(self, table: Table, spread: Spread, state: Tensor) -> None:
        self.sums: dict[int, Tensor] = {}
        self.flat: Flat | None = None
        self.found: list[Tensor | None] = []
        self.finds = False  # whether any p.grad was there
        self._table, self._spread, self._state = table, spread, state
        self._sparse: set[int] = set()  # whose gradients came sparse, and so go back

    def begin(self) -> None:
        """Remembers what p.grad is before the step."""
        self.found = list(map(GRAD, self._table.parameters))
        self.finds = set(map(type, self.found)) != {type(None)}

    def goes_back_sparse(self, index: int) -> None:
        """Notes that this parameter's optimizer expects a sparse gradient."""
        self._sparse.add(index)

    def add(self, gradients: dict[int, Tensor], *, adopt: bool, zero: bool) -> None:
        """Brings the mean up to the sample that has just been counted.

        ``adopt``: memory of these gradients may become the mean's. ``zero``: a mean that begins here begins at 0, as
        earlier samples had no gradient.
        """
        whole = len(gradients) == len(self._table.parameters)
        if len(gradients) == len(self.sums) and (whole or gradients.keys() == self.sums.keys()):
            # All samples but the first, as a rule.
            if gradients:
                sums = taken(self.sums, gradients)
                self._spread.run(_ops.accumulate_, gradients, sums, list(gradients.values()), self._state)
            return
        adoptable = self._adoptable(gradients) if adopt else set()
        if not self.sums and len(adoptable) == len(gradients):
            self.sums = gradients.copy()
            self._spread.run(_ops.accumulate_, gradients, list(gradients.values()), [], self._state)
            return
        adopted = {i: gradient for i, gradient in gradients.items() if i in adoptable and i not in self.sums}
        late = {i: gradient for i, gradient in gradients.items() if i not in adopted}
        self.cover(late, zero=zero)
        blended = sorted(self.sums)
        added = [late[i] if i in late else torch.zeros_like(self._table.tensors[i]) for i in blended]
        self.sums |= adopted
        if adopted:
            self._spread.run(_ops.accumulate_, adopted, list(adopted.values()), [], self._state)
        if blended:
            self._spread.run(_ops.accumulate_, blended, taken(self.sums, blended), added, self._state)

    def cover(self, gradients: dict[int, Tensor], *, zero: bool) -> None:
        """Finds or makes memory for the mean of those of the gradients that have none."""
        for i, gradient in gradients.items():
            if i not in self.sums:
                wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
                room = self._room(i, gradient, wide) if self.flat is None else self._flat_room(i, wide)
                self.sums[i] = room.zero_() if zero else room

    def _flat_room(self, index: int, wide: torch.dtype) -> Tensor:
        """The parameter's part of the run that ranks add up, whose dtype is the same on all."""
        assert self.flat is not None
        room = self.flat.views[index]
        if room.dtype != wide:
            got = f"a gradient that takes a {wide} mean"
            raise refuse(TSAM, f"{self._table.name(index)}.grad", got, f"one that takes a {room.dtype} mean")
        return room

    def _room(self, index: int, gradient: Tensor, wide: torch.dtype) -> Tensor:
        """The memory that p.grad had before the step, if the mean may be written there; else new memory."""
        found = self.found[index]
        room = None if found is None or index >= self._table.own else kernel_form(found)
        apart = room is not None and room.data_ptr() != gradient.data_ptr()
        if room is None or not apart or room.dtype != wide or room.stride() != gradient.stride():
            return torch.empty_like(gradient, dtype=wide)
        return room

    def start_sum(self, ranks: Ranks) -> list[Any]:
        """The sum over ranks of their means, which are complete so far, under way; nothing is written meanwhile."""
        assert self.flat is not None
        self.flat.close(set(self.sums))
        return self.flat.start(ranks)

    def finish_sum(self, ranks: Ranks, works: list[Any], factor: float) -> None:
        """The sums have arrived: ``factor`` times each is the mean from here on."""
        flat = self.flat
        assert flat is not None
        for work in works:
            ranks.finish(work)
        flat.scale_(factor)
        missing = set(range(len(flat.views))) - self.sums.keys()
        missing -= flat.absent(missing) if missing else set()
        self.sums |= {i: flat.views[i] for i in missing}

    def begins_in(self, gradients: dict[int, Tensor], indices: list[int], *, keep: bool) -> bool:
        """Whether a mean that has not begun can begin in the memory of these gradients, at all of the indices.

        ``keep``: it does; otherwise their memory only stands for it in an op that counts nothing.
        """
        begins = not self.sums and self.flat is None and self._adoptable(gradients).issuperset(indices)
        if begins and keep:
            self.sums = {i: gradients[i] for i in indices}
        return begins

    def _adoptable(self, gradients: dict[int, Tensor]) -> set[int]:
        """Whose memory may become the mean's: that of a gradient in full precision, where there was no p.grad."""
        if self.flat is not None:
            return set()
        found, own, free = self.found, self._table.own, owned(gradients)
        if self.finds:
            free = {i for i in free if found[i] is None or i >= own}
        return {i for i in free if gradients[i].dtype in WIDE}

    def hand_over(self, *, mixed: bool) -> list[Tensor]:
        """The mean becomes p.grad: in the memory that p.grad had before, where there was any. Returns what is there.

        ``mixed``: whether gradients are in other dtypes than their parameters.
        """
        table, left = self._table, []
        if not (self.finds or mixed or self._sparse) and table.is_wide and table.own == len(table.parameters):
            for i, mean in self.sums.items():
                table.parameters[i].grad = mean
            for i in () if len(self.sums) == table.own else set(range(table.own)) - self.sums.keys():
                table.parameters[i].grad = None
            return list(self.sums.values())
        for i, (parameter, dtype, found) in enumerate(zip(table.parameters, table.dtypes, self.found, strict=True)):
            total = self.sums.get(i)
            if i >= table.own:
                parameter.grad = found
                if total is not None:
                    self._add_to_other(i, parameter, total)
                continue
            if found is not None:
                room = kernel_form(found)
                if total is None:
                    found.zero_()
                elif total.data_ptr() != room.data_ptr():
                    room.copy_(total)
                total = found
            elif total is not None and (mixed or dtype not in WIDE):
                total = self._as_gradient(i, parameter, total)
            parameter.grad = total
            if total is not None:
                left.append(total)
        return left

    def _as_gradient(self, index: int, parameter: Tensor, total: Tensor) -> Tensor:
        """The mean in the form that torch wants p.grad to have."""
        if self._table.dtypes[index].is_complex:
            total = torch.view_as_complex(total)
        wanted = parameter.grad_dtype if hasattr(parameter, "grad_dtype") else parameter.dtype
        return as_parameter(parameter, total if wanted is None or total.dtype == wanted else total.to(wanted))

    def _add_to_other(self, index: int, parameter: Tensor, total: Tensor) -> None:
        gradient = self._as_gradient(index, parameter, total)
        if index in self._sparse:
            gradient = gradient.to_sparse(1)
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient

    def give_back(self, *, zero: bool) -> None:
        """After a failed step p.grad is what it was, and 0 where there was any but in parameters of another optimizer.

        ``zero``: false where nothing has run, or nothing has been written.
        """
        for i, (parameter, found) in enumerate(zip(self._table.parameters, self.found, strict=True)):
            parameter.grad = found if found is None or not zero or i >= self._table.own else found.zero_()

    def forget(self) -> None:
        """Lets go of everything of the size of the parameters."""
        self.sums, self.found, self.finds, self.flat = {}, [], False, None
