"""The parameters of a step in one list, and where each lies in the noise.

Layout: element index = offset in the concatenation of all parameters in storage order, each base rounded up to a
multiple of 4, frozen ones keeping theirs (csrc/core/philox.h); a complex parameter is two real ones per element. Of a
sharded one the local rows lie where they do in the whole. Parameters that another optimizer holds come last: they are
not perturbed and take no element index.
Invariant: each step asks the groups and their parameters for all that a table is made from, and makes it afresh where
any of it has changed: a changed rho, group, requires_grad, dtype, device or form is never missed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .engine.checks import TSAM, check_length, refuse
from .engine.spread import Places
from .shards import PLAIN, Sharding, as_local, is_sharded

Value = TypeVar("Value")
COMPLEX = {torch.complex64, torch.complex128}
PLAIN_TYPES = frozenset(PLAIN)
TRAINABLE, DTYPE, DEVICE, SHAPE = map(attrgetter, ("requires_grad", "dtype", "device", "shape"))
NUMEL, STRIDE = Tensor.numel, Tensor.stride
WIDE = {torch.float32, torch.float64}
HALF = {torch.bfloat16, torch.float16}


def taken(values: Sequence[Value] | Mapping[int, Value], indices: Iterable[int]) -> list[Value]:
    """The values at the indices, in their order; a step does this to lists of all parameters again and again."""
    return list(map(values.__getitem__, indices))


def one_if_alike(values: list[Value]) -> list[Value]:
    """One of the values where all are the same, as an op takes a list for all its tensors."""
    return values[:1] if values and values.count(values[0]) == len(values) else values


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


@dataclass(frozen=True)
class Moved:
    """The perturbed tensors of a table, and their numbers, one list each."""

    tensors: list[Tensor]
    base: list[int]
    adaptive: list[bool]
    radius: list[float]
    scales: list[bool]  # adaptive, as norm_ascend_ takes it: one entry where all are alike
    ascent: list[float]  # rho; below 0 where the base optimizer maximizes, as worse is downhill; as scales


@dataclass
class _Asked:
    """All that a table is made from, as the groups and their parameters say it now; the step only by what it changes.

    ``lengths``: rho, radius and adaptive of each group. ``shapes``: of trainable parameters that have a dimension of
    one element, as strides do not tell where it lies; of the others strides and sizes tell the shape.
    """

    parameters: list[Tensor]
    counts: list[int]
    lengths: list[tuple[float, float, bool]]
    maximize: bool
    plain: bool
    sizes: list[int]
    trainable: list[bool]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    strides: list[tuple[int, ...]] = field(default_factory=list)  # of trainable ones
    thin: list[int] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        groups: list[dict[str, Any]],
        names: Mapping[str, str],
        step: int | Tensor,
        others: Sequence[Tensor],
        default_radius: float | None,
    ) -> _Asked:
        """Asks everything but ``thin`` and ``shapes``."""
        lengths, parameters, counts = [], [], []
        for g, group in enumerate(groups):
            rho, radius = group[names["rho"]], group[names["radius"]]
            if callable(rho):
                rho = length_at(rho, step, f"param_groups[{g}].{names['rho']}")
            if callable(radius):
                radius = length_at(radius, step, f"param_groups[{g}].{names['radius']}")
            elif radius is None:
                radius = rho if default_radius is None else default_radius
            lengths.append((float(rho), float(radius), group[names["adaptive"]]))
            parameters += group["params"]
            counts.append(len(group["params"]))
        maximize = maximizes(groups)
        own = len(parameters)
        parameters += others
        trainable = list(map(TRAINABLE, parameters))
        trainable[own:] = [True] * len(others)
        plain = PLAIN_TYPES.issuperset(map(type, parameters))
        return cls(
            parameters, counts, lengths, maximize, plain, list(map(NUMEL, parameters)), trainable,
            list(map(DTYPE, parameters)), list(map(DEVICE, parameters)),
            list(map(STRIDE, itertools.compress(parameters, trainable))) if plain else [],
        )  # fmt: skip

    def look_at_shapes(self) -> None:
        """Asks the rest."""
        shapes = list(map(SHAPE, self.parameters))
        self.thin = [i for i, shape in enumerate(shapes) if self.trainable[i] and 1 in shape]
        self.shapes = taken(shapes, self.thin)

    def is_still(self, earlier: _Asked) -> bool:
        """Whether nothing has changed since an earlier one, which has looked at shapes."""
        return (
            self.plain
            and len(self.parameters) == len(earlier.parameters)
            and all(map(is_, self.parameters, earlier.parameters))
            and self.counts == earlier.counts
            and self.lengths == earlier.lengths
            and self.maximize is earlier.maximize
            and self.sizes == earlier.sizes
            and self.trainable == earlier.trainable
            and self.dtypes == earlier.dtypes
            and self.devices == earlier.devices
            and self.strides == earlier.strides
            and list(map(SHAPE, taken(self.parameters, earlier.thin))) == earlier.shapes
        )


@dataclass
class Table:
    """The trainable parameters of a step in order, and what each group says about them.

    ``parameters``: as the user has them; ``tensors``: as kernels take them, see :func:`kernel_form`. ``moves``: indices
    of the perturbed ones; ``own``: how many belong to the optimizer, the others being another's; ``base``: element
    index of the first element; ``dimension``: how many real elements are perturbed, over all ranks.
    Nothing of a table is changed once it is made: the next step may have the same one.
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
    asked: _Asked | None = None  # where an equal answer means an equal table

    @classmethod
    def of(
        cls,
        groups: list[dict[str, Any]],
        names: Mapping[str, str],
        step: int | Tensor,
        others: Sequence[Tensor] = (),
        known: Table | None = None,
        default_radius: float | None = None,
    ) -> Table:
        """The table of the optimizer's parameter groups as they are now; ``names``: what our keys are called there.

        ``others``: parameters that another optimizer holds. ``known``: an earlier table, which comes back where all
        that it was made from is as it was. ``default_radius``: of groups that set none; ``None``: their rho.
        """
        asked = _Asked.of(groups, names, step, others, default_radius)
        if known is not None and known.asked is not None and asked.is_still(known.asked):
            return known
        table, element, begin = cls(maximize=asked.maximize), 0, 0
        for g, (count, (rho, radius, adaptive)) in enumerate(zip(asked.counts, asked.lengths, strict=True)):
            every = slice(begin, begin + count)
            begin += count
            sizes, dtypes = asked.sizes[every], asked.dtypes[every]
            if not COMPLEX.isdisjoint(dtypes):
                sizes = [size * (1 + dtype.is_complex) for size, dtype in zip(sizes, dtypes, strict=True)]
            *base, element = itertools.accumulate([(size + 3) // 4 * 4 for size in sizes], initial=element)
            chosen = [i for i, trains in enumerate(asked.trainable[every]) if trains]
            count, first = len(chosen), len(table.parameters)
            if rho != 0.0:
                table.moves += range(first, first + count)
                table.dimension += sum(taken(sizes, chosen))
            table.parameters += taken(asked.parameters[every], chosen)
            table.dtypes += taken(dtypes, chosen)
            table.entries += [(g, i) for i in chosen]
            table.base += taken(base, chosen)
            table.rho += [rho] * count
            table.radius += [radius] * count
            table.adaptive += [adaptive] * count
        table.own = len(table.parameters)
        table.parameters += others
        table.dtypes += asked.dtypes[begin:]
        table.tensors = table.parameters
        sharded = not asked.plain and any(map(is_sharded, table.parameters))
        if sharded or not COMPLEX.isdisjoint(table.dtypes):
            table.tensors = list(map(kernel_form, table.parameters))
        elif asked.plain:
            asked.look_at_shapes()
            table.asked = asked
        if sharded:
            for i, parameter in enumerate(table.parameters[: table.own]):
                if is_sharded(parameter):  # where its local rows begin
                    first = Sharding.of(parameter, table.name(i)).first_element(parameter)
                    table.base[i] += first * (1 + parameter.is_complex())
        return table

    @cached_property
    def strides(self) -> list[tuple[int, ...]]:
        """Of the parameters."""
        return list(map(STRIDE, self.parameters))

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether all are; their gradients are then asked for that alone, which takes half as long as strides."""
        return all(map(Tensor.is_contiguous, self.parameters))

    @cached_property
    def places(self) -> Places:
        """Where the tensors lie."""
        return Places.of(self.tensors)

    @cached_property
    def is_wide(self) -> bool:
        """Whether all are real, in full precision."""
        return WIDE.issuperset(self.dtypes)

    @cached_property
    def half(self) -> list[int]:
        """Indices of the perturbed ones in half precision."""
        return [i for i in self.moves if self.dtypes[i] in HALF]

    @cached_property
    def moved(self) -> Moved:
        """The perturbed ones as ops take them."""
        rho = taken(self.rho, self.moves)
        return Moved(
            taken(self.tensors, self.moves),
            taken(self.base, self.moves),
            taken(self.adaptive, self.moves),
            taken(self.radius, self.moves),
            one_if_alike(taken(self.adaptive, self.moves)),
            one_if_alike([-length for length in rho] if self.maximize else rho),
        )

    def name(self, index: int) -> str:
        """Where a parameter stands in the groups."""
        if index >= self.own:
            return f"parameter {index - self.own} of those that another optimizer holds"
        return "param_groups[{}]['params'][{}]".format(*self.entries[index])

    @cached_property
    def dimension_over_rho(self) -> float:
        """d/ρ if all perturbed parameters share one rho, else NaN."""
        rho = {self.rho[i] for i in self.moves}
        return self.dimension / rho.pop() if len(rho) == 1 else float("nan")

    @cached_property
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
