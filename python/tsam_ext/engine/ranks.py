"""Several processes that work on one model: a group of their own, and the few collectives that a step asks of it.

Every collective is torch.distributed's, over a group that nobody but this package uses, so that it never pairs with a
user's. Each group has threads and sockets of its own, so one set of ranks has one, whatever the number of optimizers.
Invariant: nothing here reads a value of a tensor; what a collective leaves has the same bits on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor


class CollectiveError(RuntimeError):
    """A collective that did not come to its end: a rank has died, or stayed away for longer than the timeout."""


def world_size() -> int:
    """How many processes torch.distributed has; 1 where it has not been initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def members_of(group: Any) -> tuple[int, ...]:
    """The ranks of a process group, as the world numbers them."""
    return tuple(dist.get_process_group_ranks(group))


def timeout_of(group: Any) -> timedelta | None:
    """How long a collective of the group may take; None where its back end does not say."""
    for name in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(name)).options._timeout
            return timeout
        except (RuntimeError, AttributeError):
            continue
    return None


class Ranks:
    """The ranks ``members`` of the world, ``like`` a group of the user's: its back end and its timeout.

    The first of these members is a collective of theirs. ``index``: the place of this process among them.
    """

    _groups: ClassVar[dict[Any, Any]] = {}  # by the world, which holds as long as it is here, and what they are like

    def __init__(self, members: Sequence[int], like: Any = None) -> None:
        self.members, self.size = tuple(members), len(members)
        self.index = self.members.index(dist.get_rank())
        like = dist.group.WORLD if like is None else like
        timeout, backend = timeout_of(like), dist.get_backend(like)
        known = (dist.group.WORLD, self.members, timeout, backend)
        if known not in self._groups:
            with _Told("making a group", self.size):
                self._groups[known] = dist.new_group(
                    list(members), timeout=timeout, backend=backend, use_local_synchronization=True
                )
        self._group = self._groups[known]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        with _Told("a sum", self.size):
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def start_sum(self, tensor: Tensor) -> Any:
        """As :meth:`sum_`, under way when it returns; see :meth:`finish`."""
        with _Told("a sum", self.size):
            return dist.all_reduce(tensor, group=self._group, async_op=True)

    def finish(self, work: Any) -> None:
        """Waits for what :meth:`start_sum` has begun; on a GPU its stream does."""
        with _Told("a sum", self.size):
            work.wait()

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, shape ``[size, *tensor.shape]``."""
        found = [torch.empty_like(tensor) for _ in self.members]
        with _Told("a comparison", self.size):
            dist.all_gather(found, tensor, group=self._group)
        return torch.stack(found)

    def follow_first_(self, tensor: Tensor) -> None:
        """What the first rank has, on all."""
        with _Told("a broadcast", self.size):
            dist.broadcast(tensor, self.members[0], group=self._group)


class _Told:
    """Says whose collective has failed, and what that means."""

    def __init__(self, what: str, size: int) -> None:
        self._what, self._size = what, size

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and issubclass(kind, RuntimeError) and not issubclass(kind, CollectiveError):
            raise CollectiveError(
                f"TSAM: {self._what} over {self._size} ranks failed: a rank has died, or has not come within the "
                f"group's timeout ({error}). Nothing was updated; the group cannot be used again: start all ranks from "
                "a checkpoint."
            ) from error
