"""Parameters of which each rank holds some rows: DTensors, as fully_shard and tensor parallelism make them.

Layout: of n rows the rank at place r of w has those from r ceil(n/w) on, ceil(n/w) at most, as torch shares them; rows
of dimension 0 are one run of elements, so that a shard's noise is a slice of the whole parameter's.
Invariant: kernels see the local rows alone; what torch and the user see stays a DTensor. Other shardings are refused by
name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .engine.checks import TSAM, refuse

PLAIN = (Tensor, nn.Parameter)
ROWS = "a tensor sharded on dimension 0 over one dimension of its mesh, and replicated over the others"


def _dtensor() -> Any:
    """The class DTensor, None where nobody has imported it: then there are none."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process may hold a part alone."""
    if type(tensor) in PLAIN:
        return False
    kind = _dtensor()
    return kind is not None and isinstance(tensor, kind)


def as_local(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, in its own memory; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return local


def whole_of(tensor: Tensor) -> Tensor:
    """All of a DTensor, on each rank: a collective of its mesh."""
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


def as_parameter(parameter: Tensor, local: Tensor) -> Tensor:
    """A tensor of this rank's rows (of a complex parameter pairs of reals too) as a DTensor, where that is one."""
    if not is_sharded(parameter):
        return local
    whole: Any = parameter
    pairs = tuple(local.shape[whole.ndim :])  # of a complex one
    shape, stride = (*whole.shape, *pairs), tuple(whole.stride())
    if pairs:
        stride = (*(2 * step for step in stride), 1)
    made: Tensor = _dtensor().from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made


def rows_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's rows of a tensor that holds all rows of a parameter; a DTensor's own."""
    if is_sharded(whole) or not is_sharded(parameter):
        return as_local(whole)
    sharding = Sharding.of(parameter, "params")
    return whole if sharding.shard is None else whole[sharding.first_row : sharding.first_row + sharding.rows]


@dataclass(frozen=True)
class Sharding:
    """Where a DTensor lies: the ranks that share its rows (None: each holds all), and all ranks of its mesh."""

    shard: tuple[int, ...] | None
    everyone: tuple[int, ...]
    first_row: int
    rows: int

    @classmethod
    def of(cls, parameter: Any, name: str) -> Sharding:
        """ValueError, naming the parameter, where its rows are not shared as above."""
        found = _sharding(parameter.device_mesh, parameter.placements, tuple(parameter.shape))
        if found is None:
            raise refuse(TSAM, name, f"a DTensor with placements {tuple(parameter.placements)}", ROWS)
        local = as_local(parameter)
        if found.shard is not None and (local.shape[0] != found.rows or local.stride() != parameter.stride()):
            got = f"a shard of {local.shape[0]} rows with strides {local.stride()}"
            raise refuse(TSAM, name, got, f"{found.rows} rows with strides {parameter.stride()}")
        return found

    def first_element(self, parameter: Tensor) -> int:
        """How many elements of the parameter lie before this rank's."""
        return self.first_row * (parameter.numel() // parameter.shape[0]) if self.first_row else 0


@cache  # each step asks it of each parameter
def _sharding(mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...]) -> Sharding | None:
    """Where a DTensor of that form lies; None where its rows are not shared, and no whole is held."""
    everyone = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(mesh_dim=i) > 1]
    if not split:
        return Sharding(None, everyone, 0, shape[0] if shape else 1)
    if len(split) > 1 or type(placements[split[0]]).__name__ != "Shard" or placements[split[0]].dim != 0:
        return None
    ranks = torch.distributed.get_process_group_ranks(mesh.get_group(mesh_dim=split[0]))
    share = -(-shape[0] // len(ranks))
    first = min(mesh.get_local_rank(mesh_dim=split[0]) * share, shape[0])
    return Sharding(tuple(ranks), everyone, first, min(share, shape[0] - first))


def sharding_of_all(named: Iterable[tuple[str, Tensor]]) -> Sharding | None:
    """That of a list of parameters, None where none is a DTensor; ValueError where they differ.

    A replicated parameter beside sharded ones would be counted once per rank in every norm.
    """
    found: tuple[str, Sharding] | None = None
    plain: str | None = None
    for name, parameter in named:
        if not is_sharded(parameter):
            plain = name if plain is None else plain
            continue
        sharding = Sharding.of(parameter, name)
        if found is None:
            found = name, sharding
        elif (found[1].shard, found[1].everyone) != (sharding.shard, sharding.everyone):
            got = f"{_shown(sharding)} beside {found[0]}, {_shown(found[1])}"
            raise refuse(TSAM, name, got, "parameters that are all sharded over the same ranks")
    if found is None:
        return None
    if plain is not None and found[1].shard is not None:
        got = f"a tensor that every rank holds, beside {found[0]}, {_shown(found[1])}"
        raise refuse(TSAM, plain, got, "parameters that are all sharded over the same ranks")
    return found[1]


def _shown(sharding: Sharding) -> str:
    if sharding.shard is None:
        return "a DTensor that every rank holds"
    return f"a DTensor sharded over ranks {list(sharding.shard)}"


def sharded_modules(modules: Sequence[nn.Module]) -> list[Any]:
    """Those that fully_shard has made, which may keep gathered copies of their parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in modules if isinstance(module, kind)]


def drop_gathered(modules: Sequence[Any]) -> None:
    """Frees gathered copies: the parameters that they were made from have moved, or are about to. No collective."""
    for module in modules:
        module.reshard()


def begin_anew(modules: Sequence[Any]) -> None:
    """After an exception in the middle of a pass: the next forward begins as a first one."""
    for module in modules:
        if hasattr(module, "reset_iter_state"):  # not in torch before 2.13
            with suppress(RuntimeError):  # of any but the root
                module.reset_iter_state()
