"""The mean of a step in one run of memory per device and dtype, so that one collective takes all of it.

Layout: each parameter's part begins at a multiple of 4 elements, in the parameter's strides; behind the parts one
element per parameter says on how many ranks it has had a gradient. Parameters are those of a step's table, in its
order, so the layout is the same on all ranks.
Invariant: memory that somebody outside holds from an earlier step is not written again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .engine.ranks import Ranks
from .table import Table

_storage_users = torch._C._storage_Use_Count
HELD = sys.getrefcount(object())  # of a value that a list alone holds, as map asks for it: one more than this
_PROBE = torch.empty(1)
ASKING = _storage_users(_PROBE.untyped_storage()._cdata) - 1  # who asks how many users a storage has is one of them


def _forms(table: Table) -> list[tuple[object, ...]]:
    return [(t.shape, t.stride(), t.dtype, t.device) for t in table.tensors]


class Flat:
    """Room for the means of all parameters of a table, float32 or float64; ``views``: each one's, as kernels see it."""

    def __init__(self, table: Table) -> None:
        self.forms = _forms(table)
        self.views: list[Tensor] = []
        self.runs: list[Tensor] = []
        self._counts: list[tuple[Tensor, int]] = []  # of each parameter: its run, and the place of its count there
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        members: dict[tuple[torch.device, torch.dtype], list[tuple[int, int]]] = {}
        for i, tensor in enumerate(table.tensors):
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            place = (tensor.device, wide)
            begin = sizes.get(place, 0)
            members.setdefault(place, []).append((i, begin))
            sizes[place] = begin + (tensor.numel() + 3) // 4 * 4
        found: dict[int, tuple[Tensor, tuple[Tensor, int]]] = {}
        for place, size in sizes.items():
            device, wide = place
            run = torch.zeros(size + len(members[place]), dtype=wide, device=device)
            self.runs.append(run)
            for k, (i, begin) in enumerate(members[place]):
                tensor = table.tensors[i]
                view = run.as_strided(tensor.shape, tensor.stride(), begin)
                found[i] = view, (run, size + k)
        for i in range(len(table.tensors)):
            self.views.append(found[i][0])
            self._counts.append(found[i][1])

    def fits(self, table: Table, found: list[Tensor | None]) -> bool:
        """Whether a step over this table may write here; ``found``: p.grad before the step, which may be a part."""
        if self.forms != _forms(table):
            return False
        ours = [grad is view for grad, view in zip(found, self.views, strict=True)]
        holders = map(sys.getrefcount, self.views)
        if any(held - own > HELD + 1 for held, own in zip(holders, ours, strict=True)):
            return False
        users = sum(_storage_users(run.untyped_storage()._cdata) - ASKING for run in self.runs)
        return users == len(self.views) + len(self.runs)

    def close(self, written: set[int]) -> None:
        """No part is written any more: those without a gradient count as zeros, on this rank."""
        for run in self.runs:
            run[-self._parts(run) :].fill_(1.0)
        for i, view in enumerate(self.views):
            if i not in written:
                view.zero_()
                run, place = self._counts[i]
                run[place].zero_()

    def _parts(self, run: Tensor) -> int:
        return sum(own is run for own, _ in self._counts)

    def absent(self, unwritten: set[int]) -> set[int]:
        """Of parameters without a gradient here those that have had none on any rank. Waits for the device."""
        return {i for i in unwritten if not float(self._counts[i][0][self._counts[i][1]]) > 0.0}

    def zero_(self) -> None:
        """Nothing anywhere."""
        for run in self.runs:
            run.zero_()

    def start(self, ranks: Ranks) -> list[Any]:
        """The sum over ranks, under way."""
        return [ranks.start_sum(run) for run in self.runs]

    def scale_(self, factor: float | Tensor) -> None:
        """Multiplies every part."""
        for run in self.runs:
            run.mul_(factor if isinstance(factor, float) else factor.to(run.device, run.dtype))

    def means(self, gradients: Mapping[int, Tensor], ranks: Ranks) -> dict[int, Tensor]:
        """The means over ranks of these, by index, and of what other ranks have; in this memory."""
        for i, gradient in gradients.items():
            self.views[i].copy_(gradient)
        self.close(set(gradients))
        for work in self.start(ranks):
            ranks.finish(work)
        self.scale_(1.0 / ranks.size)
        missing = set(range(len(self.views))) - gradients.keys()
        missing -= self.absent(missing) if missing else set()
        return {i: self.views[i] for i in sorted(gradients.keys() | missing)}
