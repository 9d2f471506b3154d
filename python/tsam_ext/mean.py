"""The weighted mean of the samples' gradients, and whose memory it lives in.

Three answers, here alone: *adopted*, the first gradient's own memory; *found*, what p.grad was before the step; *new*.
Words moved per float32 element and sample: 3; the first assigns (2), adopted it is not touched.
Invariant: a p.grad that existed is filled, not replaced; only memory that nobody else can write is adopted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _ops
from .engine.checks import is_dense
from .engine.spread import Spread
from .table import Table, taken


def is_own(gradient: Tensor) -> bool:
    """Whether a gradient's memory is its alone.

    A view, or a gradient inside a larger storage (a reducer's bucket), is overwritten by the next backward pass.
    """
    whole = gradient.untyped_storage().nbytes() == gradient.nbytes
    return whole and not gradient._is_view() and (gradient.is_contiguous() or is_dense(gradient))


class Mean:
    """The mean of one step: ``sums`` has an entry for each parameter that has had a gradient."""

    def __init__(self, table: Table, spread: Spread, state: Tensor) -> None:
        self.sums: dict[int, Tensor] = {}
        self._table, self._spread, self._state = table, spread, state
        self._found: list[Tensor | None] = []  # p.grad of each parameter before the step

    def begin(self) -> None:
        """Remembers what p.grad is before the step."""
        self._found = [parameter.grad for parameter in self._table.parameters]

    def add(self, gradients: dict[int, Tensor], *, adopt: bool, zero: bool) -> None:
        """Brings the mean up to the sample that has just been counted.

        ``adopt``: memory of these gradients may become the mean's. ``zero``: a mean that begins here begins at 0, as
        earlier samples had no gradient.
        """
        if gradients.keys() == self.sums.keys():  # all samples but the first, as a rule
            if gradients:
                sums = taken(self.sums, gradients)
                self._spread.run(_ops.accumulate_, gradients, sums, list(gradients.values()), self._state)
            return
        adopted = {i: g for i, g in gradients.items() if adopt and i not in self.sums and self._adoptable(i, g)}
        late = {i: gradient for i, gradient in gradients.items() if i not in adopted}
        self.cover(late, zero=zero)
        blended = sorted(self.sums)
        added = [late[i] if i in late else torch.zeros_like(self._table.parameters[i]) for i in blended]
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
                found = self._found[i]
                apart = found is not None and found.data_ptr() != gradient.data_ptr()
                if found is None or not apart or found.dtype != wide or found.stride() != gradient.stride():
                    found = torch.empty_like(gradient, dtype=wide)
                self.sums[i] = found.zero_() if zero else found

    def begins_in(self, gradients: dict[int, Tensor], indices: list[int], *, keep: bool) -> bool:
        """Whether a mean that has not begun can begin in the memory of these gradients, at all of the indices.

        ``keep``: it does; otherwise their memory only stands for it in an op that counts nothing.
        """
        begins = not self.sums and all(i in gradients and self._adoptable(i, gradients[i]) for i in indices)
        if begins and keep:
            self.sums = {i: gradients[i] for i in indices}
        return begins

    def _adoptable(self, index: int, gradient: Tensor) -> bool:
        wide = gradient.dtype in (torch.float32, torch.float64)
        return self._found[index] is None and wide and is_own(gradient)

    def hand_over(self) -> None:
        """The mean becomes p.grad: in the memory that p.grad had before, where there was any."""
        for i, parameter in enumerate(self._table.parameters):
            total, found = self.sums.get(i), self._found[i]
            if found is not None:
                if total is None:
                    found.zero_()
                elif total is not found:
                    found.copy_(total)
                parameter.grad = found
            elif total is not None:
                parameter.grad = total if total.dtype == parameter.dtype else total.to(parameter.dtype)
            else:
                parameter.grad = None

    def give_back(self, *, zero: bool) -> None:
        """After a failed step p.grad is what it was, and 0 where there was any."""
        for parameter, found in zip(self._table.parameters, self._found, strict=True):
            parameter.grad = found if found is None or not zero else found.zero_()

    def forget(self) -> None:
        """Lets go of everything of the size of the parameters."""
        self.sums, self._found = {}, []
