"""The parameters of a step in one list, and where each lies in the noise.

Layout: element index = offset in the concatenation of all parameters in storage order, each base rounded up to a
multiple of 4, frozen ones keeping theirs (csrc/core/philox.h); a complex parameter is two real ones per element. Of a
sharded one the local rows lie where they do in the whole. Parameters that another optimizer holds come last: they are
not perturbed and take no element index.
Invariant: made afresh each step from the groups, so a changed rho, group or requires_grad is never missed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .engine.checks import TSAM, check_length, refuse
from .shards import PLAIN, Sharding, as_local, is_sharded

Value = TypeVar("Value")
COMPLEX = {torch.complex64, torch.complex128}
PLAIN_TYPES = frozenset(PLAIN)


def taken(values: Sequence[Value] | Mapping[int, Value], indices: Iterable[int]) -> list[Value]:
    """The values at the indices, in their order; a step does this to lists of all parameters again and again."""
    return list(map(values.__getitem__, indices))


def kernel_form(tensor: Tensor) -> Tensor:
    """A tensor as kernels take it, in the same memory: of a sharded one this rank's rows, complex as ``[..., 2]``."""
    if type(tensor) not in PLAIN:
        tensor = as_local(tensor)
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def length_at(value: Any, step: int | Tensor, where: str) -> float:
    """rho or radius of one step: the number itself, or what a function of the step says."""
    if not callable(value):
        return float(value)
    if isinstance(step, Tensor):
        raise refuse(TSAM, where, "a function of the step", "a number, as capturable is True")
    return check_length(TSAM, f"{where}({step})", value(step))


@dataclass
class Table:
    """The trainable parameters of a step in order, and what each group says about them.

    ``parameters``: as the user has them; ``tensors``: as kernels take them, see :func:`kernel_form`. ``moves``: indices
    of the perturbed ones; ``own``: how many belong to the optimizer, the others being another's; ``base``: element
    index of the first element; ``dimension``: how many real elements are perturbed, over all ranks.
    """

    parameters: list[Tensor] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)  # of the parameters
    entries: list[tuple[int, int]] = field(default_factory=list)  # group, and place in it
    rho: list[float] = field(default_factory=list)
    radius: list[float] = field(default_factory=list)
    adaptive: list[bool] = field(default_factory=list)
    base: list[int] = field(default_factory=list)
    moves: list[int] = field(default_factory=list)
    dimension: int = 0
    own: int = 0
    maximize: bool = False

    @classmethod
    def of(
        cls, groups: list[dict[str, Any]], names: Mapping[str, str], step: int | Tensor, others: Iterable[Tensor] = ()
    ) -> Table:
        """The table of the optimizer's parameter groups as they are now; ``names``: what our keys are called there.

        ``others``: parameters that another optimizer holds.
        """
        table, element = cls(maximize=maximizes(groups)), 0
        for g, group in enumerate(groups):
            rho, radius = group[names["rho"]], group[names["radius"]]
            if callable(rho):
                rho = length_at(rho, step, f"param_groups[{g}].{names['rho']}")
            if callable(radius):
                radius = length_at(radius, step, f"param_groups[{g}].{names['radius']}")
            every = group["params"]
            sizes, dtypes = [parameter.numel() for parameter in every], [parameter.dtype for parameter in every]
            if not COMPLEX.isdisjoint(dtypes):
                sizes = [size * (1 + dtype.is_complex) for size, dtype in zip(sizes, dtypes, strict=True)]
            *base, element = itertools.accumulate([(size + 3) // 4 * 4 for size in sizes], initial=element)
            chosen = [i for i, parameter in enumerate(every) if parameter.requires_grad]
            count, first = len(chosen), len(table.parameters)
            if rho != 0.0:
                table.moves += range(first, first + count)
                table.dimension += sum(taken(sizes, chosen))
            table.parameters += taken(every, chosen)
            table.dtypes += taken(dtypes, chosen)
            table.entries += [(g, i) for i in chosen]
            table.base += taken(base, chosen)
            table.rho += [float(rho)] * count
            table.radius += [float(rho) if radius is None else float(radius)] * count
            table.adaptive += [group[names["adaptive"]]] * count
        table.own = len(table.parameters)
        table.parameters += others
        table.dtypes += [parameter.dtype for parameter in table.parameters[table.own :]]
        table.tensors = table.parameters
        sharded = not PLAIN_TYPES.issuperset(map(type, table.parameters)) and any(map(is_sharded, table.parameters))
        if sharded or not COMPLEX.isdisjoint(table.dtypes):
            table.tensors = list(map(kernel_form, table.parameters))
        if sharded:
            for i, parameter in enumerate(table.parameters[: table.own]):
                if is_sharded(parameter):  # where its local rows begin
                    first = Sharding.of(parameter, table.name(i)).first_element(parameter)
                    table.base[i] += first * (1 + parameter.is_complex())
        return table

    def name(self, index: int) -> str:
        """Where a parameter stands in the groups."""
        if index >= self.own:
            return f"parameter {index - self.own} of those that another optimizer holds"
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


def maximizes(groups: list[dict[str, Any]]) -> bool:
    """Whether the base optimizer ascends (``maximize``); ValueError unless all groups say the same."""
    found = {bool(group.get("maximize", False)) for group in groups if group["params"]}
    if len(found) > 1:
        expected = "the same in all groups, as the tilt and the ascent are over all of them together"
        raise refuse(TSAM, "param_groups: maximize", "True in some groups alone", expected)
    return found == {True}


def others_of(modules: Sequence[nn.Module], groups: list[dict[str, Any]]) -> list[Tensor]:
    """The parameters of these modules that another optimizer holds."""
    if not modules:
        return []
    seen = {id(parameter) for group in groups for parameter in group["params"]}
    others: list[Tensor] = []
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                others.append(parameter)
    return others


def first_device(groups: list[dict[str, Any]]) -> torch.device:
    """Where the first parameter lies; the CPU if there is none, or if it lies nowhere yet."""
    device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
