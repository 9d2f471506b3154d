"""The parameters of a step in one list, and where each lies in the noise.

Layout: element index = offset in the concatenation of all parameters in storage order, each base rounded up to a
multiple of 4, frozen ones keeping theirs (csrc/core/philox.h).
Invariant: made afresh each step from the groups, so a changed rho, group or requires_grad is never missed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

Value = TypeVar("Value")


def taken(values: Sequence[Value] | Mapping[int, Value], indices: Iterable[int]) -> list[Value]:
    """The values at the indices, in their order; a step does this to lists of all parameters again and again."""
    return list(map(values.__getitem__, indices))


@dataclass
class Table:
    """The trainable parameters of a step in order, and what each group says about them.

    ``moves``: indices of the perturbed ones; ``base``: element index of the first element; ``dimension``: how many
    elements are perturbed.
    """

    parameters: list[Tensor] = field(default_factory=list)
    entries: list[tuple[int, int]] = field(default_factory=list)  # group, and place in it
    rho: list[float] = field(default_factory=list)
    radius: list[float] = field(default_factory=list)
    adaptive: list[bool] = field(default_factory=list)
    base: list[int] = field(default_factory=list)
    moves: list[int] = field(default_factory=list)
    dimension: int = 0

    @classmethod
    def of(cls, groups: list[dict[str, Any]], names: Mapping[str, str]) -> Table:
        """The table of the optimizer's parameter groups as they are now; ``names``: what our keys are called there."""
        table, element = cls(), 0
        for g, group in enumerate(groups):
            rho, radius = float(group[names["rho"]]), group[names["radius"]]
            every = group["params"]
            sizes = [parameter.numel() for parameter in every]
            *base, element = itertools.accumulate([(size + 3) // 4 * 4 for size in sizes], initial=element)
            chosen = [i for i, parameter in enumerate(every) if parameter.requires_grad]
            count, first = len(chosen), len(table.parameters)
            if rho != 0.0:
                table.moves += range(first, first + count)
                table.dimension += sum(taken(sizes, chosen))
            table.parameters += taken(every, chosen)
            table.entries += [(g, i) for i in chosen]
            table.base += taken(base, chosen)
            table.rho += [rho] * count
            table.radius += [rho if radius is None else float(radius)] * count
            table.adaptive += [group[names["adaptive"]]] * count
        return table

    def name(self, index: int) -> str:
        """Where a parameter stands in the groups."""
        return "param_groups[{}]['params'][{}]".format(*self.entries[index])

    @property
    def dimension_over_rho(self) -> float:
        """d/ρ if all perturbed parameters share one rho, else NaN."""
        rho = {self.rho[i] for i in self.moves}
        return self.dimension / rho.pop() if len(rho) == 1 else float("nan")

    @property
    def draws(self) -> bool:
        """Whether any perturbed parameter has a radius, so that there is noise at all."""
        return any(self.radius[i] != 0.0 for i in self.moves)
