"""Where the parameters were before they moved: copies of those that have, and the two ways back.

Invariant: `copies` holds the bits of every parameter that has moved. A copy counts as made once the op that makes it
has counted itself in the state: an interrupt between two Python lines cannot restore from memory never filled.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _ops
from .engine.spread import Spread
from .table import Table, taken


class Scratch(dict[Tensor, tuple[Any, Tensor]]):
    """Of each parameter its form, and memory for a copy; lasts between steps.

    ``last``: the copies of all that a table moves. The same table again means parameters of the same form.
    """

    last: tuple[Table, dict[int, Tensor]] | None = None


class Origin:
    """θ₀ of one step. Ops that save are announced by :meth:`save`; :meth:`restore` and :meth:`undo` bring θ₀ back."""

    def __init__(self, table: Table, spread: Spread, state: Tensor, scratch: Scratch, capturing: bool) -> None:
        self.copies: dict[int, Tensor] = {}
        self._table, self._spread, self._state = table, spread, state
        self._scratch, self._capturing = scratch, capturing
        self._whole = False  # whether all that moves has been saved at once, and so lies in that order
        self._announced: list[list[int]] = []  # which parameters each saving op was to save

    def save(self, indices: list[int]) -> None:
        """Announces that the next op saves these parameters, and finds memory for their copies."""
        self._announced.append(indices)
        last, whole = self._scratch.last, indices is self._table.moves and not self.copies
        self._whole = whole
        if whole and last is not None and last[0] is self._table:
            self.copies = last[1].copy()
            return
        for i in indices:
            parameter, tensor = self._table.parameters[i], self._table.tensors[i]
            form = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            found = self._scratch.get(parameter)
            if found is None or found[0] != form:
                found = self._scratch[parameter] = form, torch.empty_like(tensor, requires_grad=False)
            self.copies[i] = found[1]
        if whole:
            self._scratch.last = self._table, self.copies.copy()

    @property
    def is_whole(self) -> bool:
        """Whether there is a copy of each parameter that moves, in their order."""
        return self._whole and len(self.copies) == len(self._table.moves)

    def restore(self) -> None:
        """theta = theta_0, bit for bit, for every parameter that has moved; after ops that have all finished."""
        if self.copies:
            tensors = self._table.moved.tensors if self.is_whole else taken(self._table.tensors, self.copies)
            self._spread.run(_ops.restore_, self.copies, tensors, list(self.copies.values()))
            increment_version(tensors)

    def undo(self) -> None:
        """As :meth:`restore`, after an exception: trusts only the copies that an op has finished (syncs once)."""
        try:
            self._restore_finished()
        except BaseException:
            self._restore_finished()  # a refused launch or Ctrl-C may come here too, and a copy can be copied again
            raise

    def _restore_finished(self) -> None:
        self.copies = self.finished()
        self.restore()

    def finished(self) -> dict[int, Tensor]:
        """The copies that an op has finished, whose parameters alone may have moved; syncs."""
        copies = dict(self.copies)
        # Captured ops finish in their order; there is no number to read yet.
        if copies and not self._capturing:
            for device, finished in enumerate(self._spread.saves(self._state)):
                for i in itertools.chain(*self._announced[finished:]):
                    if self._spread.at(device, i):
                        copies.pop(i, None)
        return copies

    def forget(self) -> None:
        """Lets go of the copies; their memory stays in the scratch."""
        self.copies = {}
