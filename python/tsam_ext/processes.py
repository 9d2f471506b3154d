"""Which processes train one model with an optimizer: given, read off the model or its parameters, or seen in a pass.

DistributedDataParallel as model=, or one whose forward runs in the first pass; parameters that are DTensors; or
process_group=. Never guessed: where torch.distributed has more ranks and nothing says which of them belong together,
the step raises once its first pass has run.
Invariant: before their first step, and after settings may have changed, ranks compare what they must have alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .agreement import agree, check_values
from .engine.checks import TSAM, check_choice, check_flag, check_seed, refuse, shown
from .engine.ranks import Ranks, members_of, world_size
from .exchange import Exchange
from .replicas import Replicas, ReplicaWatch, refuse_hiding, replicas_in
from .shards import is_sharded, sharding_of_all
from .table import Table, kernel_form
from .together import ALONE, Alone, Cooperation, Reduction, Sync, Together, check_reduced

SYNCS, REDUCTIONS = ("global", "local", "samples"), ("tail", "manual")
Facts = Callable[[], Sequence[tuple[str, str]]]


class Seeded(Protocol):
    """What has the seed of the noise, which becomes that of all ranks, and what lasts from step to step."""

    seed: int
    seed_given: bool

    def belong(self, rank: str) -> None:
        """What lasts from step to step is this rank's from here on; "" where all ranks do the same."""


UNKNOWN = (
    "TSAM: torch.distributed has {size} ranks, and nothing says which of them train this model: no "
    "DistributedDataParallel with its parameters ran in the first pass, and none is a DTensor. Pass model=ddp "
    "(model=self.trainer.strategy.model with Lightning's manual optimization), or process_group= (the ranks whose "
    "gradients something else reduces in each backward pass), or process_group=None where this process trains alone. "
    "Nothing was updated."
)


VALUES = (
    "its values differ between ranks, which would train apart: load a checkpoint of the model on all of them, or "
    "before DistributedDataParallel is made, which hands out the first rank's."
)


class Processes:
    """The ranks of one optimizer; made anew with a copy of it, as groups cannot be copied.

    ``process_group``: "auto", None (this process trains alone) or a group. The other arguments: see TSAM.
    """

    def __init__(
        self,
        process_group: Any | Literal["auto"] | None = "auto",
        *,
        sync: Sync = "global",
        reduction: Reduction = "tail",
        weigh_rows: bool = False,
        batch: str = "whole",
    ) -> None:
        check_choice(TSAM, "sync", sync, SYNCS)
        check_choice(TSAM, "reduction", reduction, REDUCTIONS)
        check_flag(TSAM, "weigh_rows", weigh_rows)
        if process_group not in ("auto", None) and not (dist.is_available() and _is_group(process_group)):
            expected = "'auto', None or a torch.distributed.ProcessGroup"
            raise refuse(TSAM, "process_group", shown(process_group), expected, TypeError)
        if weigh_rows and (sync, reduction) != ("global", "manual"):
            got = f"True with sync={sync!r} and reduction={reduction!r}"
            raise refuse(TSAM, "weigh_rows", got, "sync='global' and reduction='manual'")
        if weigh_rows and batch != "whole":
            raise refuse(TSAM, "weigh_rows", f"True with batch={batch!r}", "batch='whole'")
        self._group, self._sync, self._reduction, self._weighs_rows = process_group, sync, reduction, weigh_rows
        self._known: Cooperation | None = None
        self._agreed = False
        self._watched = False  # whether a step of this process alone has been
        self._form: tuple[int, ...] = ()

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Its settings, as ranks compare them."""
        return (("sync", self._sync), ("reduction", f"{self._reduction} {self._weighs_rows}"))

    @property
    def alone(self) -> bool:
        """Whether this process trains by itself."""
        return self._group is None or world_size() == 1

    @property
    def own_place(self) -> str:
        """Which rank this is of how many, where each samples for itself; empty where all do the same."""
        if self._sync == "global" or self._known is None:
            return ""
        return f"{self._known.exchange.ranks.index} of {self._known.exchange.ranks.size}"

    def check_alone(self, table: Table) -> None:
        """ValueError where this process is told to train alone, and holds a part of the parameters."""
        if self._group is None and world_size() > 1:
            own = table.parameters[: table.own]
            sharding = sharding_of_all((table.name(i), parameter) for i, parameter in enumerate(own))
            if sharding is not None and len(sharding.everyone) > 1:
                raise refuse(TSAM, "process_group", "None", "'auto' or a group, as the parameters are DTensors")

    @contextmanager
    def watch_alone(self, table: Table) -> Iterator[None]:
        """ValueError where this process is told to train alone, and a module reduces gradients in the first step."""
        if self._group is not None or self._watched or world_size() == 1:
            yield
            return
        with ReplicaWatch(table.parameters[: table.own], _refuse_replicas):
            yield
        self._watched = True

    def look(self, table: Table, form: tuple[int, ...]) -> None:
        """A step is planned: ranks compare themselves again where groups or checkpoints have come since they did."""
        form = (*form, table.own, len(table.parameters))
        self._agreed &= form == self._form
        self._form = form

    def check_model(self, model: nn.Module | None) -> None:
        """TypeError for what is no module; ValueError where no optimizer sees its gradients, or for other ranks."""
        if model is None:
            return
        if not isinstance(model, nn.Module):
            raise refuse(TSAM, "model", shown(model), "a torch.nn.Module or None", TypeError)
        modules = list(model.modules())
        refuse_hiding(modules)
        if self._group is None and replicas_in(modules, model.parameters()):
            expected = "'auto' or a group, as model is a DistributedDataParallel"
            raise refuse(TSAM, "process_group", "None", expected)

    def step(
        self,
        table: Table,
        modules: Sequence[nn.Module],
        *,
        num_samples: int,
        plain: bool,
        seeded: Seeded,
        facts: Facts,
    ) -> Alone:
        """How the coming step works over ranks. A collective of theirs where they are to compare themselves.

        ``seeded``: has this rank's seed, and gets that of all. ``facts``: what the optimizer must have alike.
        """
        home = table.tensors[0].device if table.tensors else torch.device("cpu")
        if self._known is None or not self._agreed:
            known = self._found(table, modules)
            if known is not None and known.exchange.ranks.size > 1:
                self._settle(known, seeded, facts, home)
                self._compare(known, table, home)
            elif known is not None:
                self._known, self._agreed = known, True
        if self._known is not None and self._known.exchange.ranks.size == 1:
            return ALONE
        own = table.parameters[: table.own]

        def watch(together: Together) -> Any:
            return ReplicaWatch(own, lambda module: self._seen(module, table, together, seeded, facts, home))

        return Together(
            self._known,
            sync="global" if plain else self._sync,
            reduction=self._reduction,
            weighs_rows=self._weighs_rows,
            num_samples=num_samples,
            watch=watch,
            unknown=self._unknown,
        )

    def visit(
        self,
        table: Table,
        modules: Sequence[nn.Module],
        *,
        num_samples: int,
        seeded: Seeded,
        facts: Facts,
        steps: bool = False,
    ) -> Alone:
        """How the parameters are moved outside a step: norms over all ranks that share their rows, and nothing else.

        ``num_samples``: of a step, as ranks that sample for themselves have other noise. ``steps``: a step follows, by
        passes of the user's own, which reduce gradients.
        """
        if steps and self._sync != "global":
            raise refuse(TSAM, "sync", repr(self._sync), "'global' with first_step(): use the samples() loop")
        alone, sharded = Alone(), any(map(is_sharded, table.parameters[: table.own]))
        home = table.tensors[0].device if table.tensors else torch.device("cpu")
        if (sharded or steps) and (self._known is None or not self._agreed):
            known = self._found(table, modules)
            if known is None:
                raise self._unknown()
            if known.exchange.ranks.size > 1:
                self._settle(known, seeded, facts, home)
                self._compare(known, table, home)
        if self._known is not None:
            if steps and not (self._known.reduces or self._known.sharded) and self._known.exchange.ranks.size > 1:
                self._known.reduces = check_reduced(self._known.exchange.ranks, _gradients(table), table, home)
            alone.shards = self._known.shards
            if self._sync == "local":
                alone.noise_offset = self._known.exchange.ranks.index * num_samples
        return alone

    def _found(self, table: Table, modules: Sequence[nn.Module]) -> Cooperation | None:
        """The ranks that train the model, as far as can be told before a pass."""
        own = table.parameters[: table.own]
        sharding = None
        if any(map(is_sharded, own)):
            sharding = sharding_of_all((table.name(i), parameter) for i, parameter in enumerate(own))
        replicas = Replicas(replicas_in(modules, own))
        if sharding is not None and len(sharding.everyone) > 1:
            if not modules:
                expected = "the module, as its parameters are DTensors: copies that it has gathered have to go"
                raise refuse(TSAM, "model", "None", expected)
            if self._sync != "global":
                raise refuse(TSAM, "sync", repr(self._sync), "'global', as ranks share the parameters' rows")
            if self._weighs_rows:
                raise refuse(TSAM, "weigh_rows", "True", "False, as ranks share the parameters' rows")
            members = sharding.everyone
        elif replicas.modules:
            members = replicas.members
        elif self._group != "auto":
            members = members_of(self._group)
        else:
            return self._known  # seen in a pass
        if self._group != "auto" and set(members_of(self._group)) != set(members):
            got = f"a group of ranks {list(members_of(self._group))}"
            raise refuse(TSAM, "process_group", got, f"one of ranks {list(members)}, which share the model")
        known = self._known
        if known is not None and known.exchange.ranks.members == members:
            for module in replicas.modules:
                known.replicas.add(module)
            return known
        ranks = self._ranks(members, replicas.group if replicas.modules else None)
        shard = None if sharding is None else sharding.shard
        shards = None if shard is None else ranks if shard == members else self._ranks(shard, None)
        return Cooperation(Exchange(ranks), replicas, sharded=sharding is not None, shards=shards)

    def _ranks(self, members: Sequence[int], like: Any) -> Ranks:
        return Ranks(members, like if like is not None else None if self._group == "auto" else self._group)

    def _settle(self, known: Cooperation, seeded: Seeded, facts: Facts, home: torch.device) -> bool:
        """The ranks compare themselves; whether this one's seed has become another."""
        if self._sync != "global" and known.replicas.static:
            expected = "False: no pass of its own is reduced, and a static graph wants the first to be"
            raise refuse(
                TSAM, "static_graph of the DistributedDataParallel", f"True with sync={self._sync!r}", expected
            )
        mine = seeded.seed
        alike = agree(known.exchange.ranks, [*facts(), *self.facts], mine, given=seeded.seed_given, home=home)
        known.exchange.begin_anew()
        known.looked = known.reduces = known.checked = False
        self._known, self._agreed = known, True
        seeded.seed = alike
        seeded.belong(self.own_place)
        return alike != mine

    def _compare(self, known: Cooperation, table: Table, home: torch.device) -> None:
        """DisagreementError where ranks start from other values; of shards each rank has rows of its own."""
        if not known.sharded:
            names = list(map(table.name, range(table.own)))
            self._agreed = False
            own = dict(enumerate(table.tensors[: table.own]))
            check_values(known.exchange.ranks, own, names, VALUES, rtol=1e-9, home=home)
            self._agreed = True

    def _seen(
        self, module: Any, table: Table, together: Together, seeded: Seeded, facts: Facts, home: torch.device
    ) -> None:
        """A DistributedDataParallel with our parameters is about to run."""
        known, moved = self._known, False
        if known is not None and module in known.replicas.modules:
            together.runs(module)
            return
        if self._sync != "global" or self._reduction == "manual":
            here = set(map(id, table.parameters))
            if any(parameter.requires_grad and id(parameter) not in here for parameter in module.parameters()):
                got = f"None with sync={self._sync!r} and reduction={self._reduction!r}"
                expected = "the module, as it holds parameters of another optimizer, whose gradients no pass reduces"
                raise refuse(TSAM, "model", got, expected)
        replicas = Replicas([module])
        replicas.check_not_joining()
        if known is None:
            if len(replicas.members) == 1:
                return
            known = Cooperation(Exchange(self._ranks(replicas.members, replicas.group)), replicas)
            moved = self._settle(known, seeded, facts, home)
        else:
            members, everyone = replicas.members, known.exchange.ranks.members
            if members != everyone:
                got = f"a group of ranks {list(everyone)}"
                raise refuse(TSAM, "process_group", got, f"one of ranks {list(members)}, as the module's")
            known.replicas.add(module)
        together.join(known, module, check_seed(TSAM, seeded.seed), moved=moved)

    def _unknown(self) -> Exception:
        if self._known is None:
            return RuntimeError(UNKNOWN.format(size=world_size()))
        what = "weigh_rows=True" if self._weighs_rows else f"sync={self._sync!r}"
        return RuntimeError(
            f"TSAM: {what} needs to keep backward passes from reducing gradients, and no "
            "DistributedDataParallel ran in the first pass: pass model=ddp. Nothing was updated."
        )

    def __getstate__(self) -> dict[str, Any]:
        group = self._group if self._group is None else "auto"
        names = {"sync": self._sync, "reduction": self._reduction, "weigh_rows": self._weighs_rows}
        return {"group": group, "names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["group"], **state["names"])  # type: ignore[misc]


def _refuse_replicas(module: Any) -> None:
    if len(members_of(module.process_group)) > 1:
        expected = "'auto' or a group, as a DistributedDataParallel with these parameters runs"
        raise refuse(TSAM, "process_group", "None", expected)


def _gradients(table: Table) -> dict[int, Tensor]:
    found = {i: parameter.grad for i, parameter in enumerate(table.parameters[: table.own])}
    return {i: kernel_form(each.detach()) for i, each in found.items() if each is not None and not each.is_sparse}


def _is_group(group: Any) -> bool:
    return isinstance(group, dist.ProcessGroup) or group is dist.group.WORLD
