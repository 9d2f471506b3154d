"""One step of several ranks: which passes reduce gradients, what is summed when, and how the ranks' means become one.

global   losses are means over ranks; probes are reduced by their backward pass; the other passes' mean stays local and
         travels once: beneath the last backward pass (tail), or after it (manual).
local    each rank takes its own step on its own rows; the mean over ranks of their tilted gradients, once.
samples  each rank takes its share of the samples on the same rows; an exact log-sum-exp over ranks, once.
Invariant: every rank makes the same collectives in the same order; a step of one process makes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .agreement import DisagreementError, check_alike, check_values, fingerprint
from .engine.checks import TSAM, check_seed
from .engine.notices import warn
from .engine.ranks import CollectiveError, Ranks
from .exchange import Exchange, OtherRankError
from .flat import Flat
from .mean import Mean
from .replicas import NO_SYNC, Replicas
from .shared_tilt import join_states
from .table import Table

Sync = Literal["global", "local", "samples"]
Reduction = Literal["tail", "manual"]
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: the seeds of ranks' chains lie far apart
REDUCED = (
    "gradients differ between ranks after a backward pass that was to reduce them: nothing has reduced them. Of a "
    "DistributedDataParallel call the module itself in each pass, not what it wraps, and without no_sync() around all "
    "of a pass; it reduces what it holds and what was trainable when it was made, nothing else. Without one, wrap the "
    "model in it, or use fully_shard."
)
HOOKS = (
    "no DistributedDataParallel was seen in a step of several ranks, but their gradients are the same: something "
    "reduces them in each backward pass. The result is right, at one reduction for each gradient."
)
SAME_BATCH = (
    "sync='samples' needs the same batch on all ranks, and part() has seen different rows: a DistributedSampler gives "
    "each rank its own. Use sync='global' or 'local', or a sampler that gives all ranks the same."
)


def check_reduced(ranks: Ranks, gradients: dict[int, Tensor], table: Table, home: torch.device) -> bool:
    """DisagreementError unless ranks have the same gradients, but for rounding; whether any said something."""
    own = {i: gradient for i, gradient in gradients.items() if i < table.own}
    names = [f"{table.name(i)}.grad" for i in range(table.own)]
    return check_values(ranks, own, names, REDUCED, rtol=1e-3, home=home)


class Alone:
    """A step of one process: no collective, all samples."""

    first, stride, noise_offset = 0, 1, 0
    closes = True  # whether the last sample closes the weights
    shards: Ranks | None = None
    several = False

    def begin(self, table: Table, home: torch.device, restart: Callable[[int], None]) -> None:
        """The passes begin. ``restart``: moves the parameters anew, where ranks come to know each other in a pass."""

    def begin_pass(self, *, steers: bool, last: bool) -> None:
        """One gradient follows. ``steers``: it moves the parameters; ``last``: it is the step's last."""

    def end_pass(self) -> None:
        """It is there, or never will be. Idempotent."""

    def meet(self, loss: Tensor, num_samples: int) -> Tensor:
        """The loss of a pass over all ranks. ``num_samples``: how many samples this one takes."""
        return loss

    def weigh(self, gradients: dict[int, Tensor], *, steers: bool) -> dict[int, Tensor]:
        """A pass's gradients, as they count over all ranks."""
        return gradients

    def prepare(self, mean: Mean, *, counts_apart: bool) -> None:
        """After the first pass: where the mean is to lie. ``counts_apart``: whether those that count steer nothing."""

    def before_last(self, mean: Mean) -> None:
        """The last pass that counts is about to run."""

    def after_last(self, mean: Mean) -> None:
        """It has run, and is about to count."""

    def decided(self, *scalars: Tensor) -> None:
        """A decision has been taken, on these scalars: it is the first rank's."""

    def chain_seed(self, seed: int) -> int:
        """The seed of a chain's noise."""
        return seed

    def saw(self, batch: Sequence[Any]) -> None:
        """The rows that a pass asks for."""

    def finish(self, mean: Mean, state: Tensor, first_loss: Tensor | None, states_per_sample: int) -> Tensor | None:
        """All passes are over: the mean, and ``state``, become those of all ranks; returns the first loss of all."""
        return first_loss

    def average(self, gradients: dict[int, Tensor], state: Tensor, *, reduced: bool) -> dict[int, Tensor]:
        """The means over all ranks of these means; ``state``: their weights. ``reduced``: ranks had the same."""
        return gradients

    def skip(self) -> None:
        """There was no batch."""

    def fail(self, error: BaseException | None) -> None:
        """This rank leaves the step by an exception."""


ALONE = Alone()


@dataclass
class Cooperation:
    """What lasts from step to step among the ranks of one optimizer.

    ``sharded``: whether each rank holds a part of the parameters; ``shards``: the ranks that share the rows.
    """

    exchange: Exchange
    replicas: Replicas
    sharded: bool = False
    shards: Ranks | None = None
    flat: Flat | None = None
    probe: Flat | None = None  # where ranks count by their rows
    synced: bool = False  # whether any pass has ever been reduced, as a static graph wants of the first
    looked: bool = False  # whether a whole pass has been watched for modules that reduce gradients
    reduces: bool = False  # whether a pass has shown that gradients are reduced
    checked: bool = False  # whether a step has shown that batches are the same


class Together(Alone):
    """A step of several ranks that know each other, or come to in its first pass.

    ``watch``: a context in which ranks are looked for while the first pass runs; what it finds comes through
    :meth:`join`, and after it ``unknown`` raises.
    """

    several = True

    def __init__(
        self,
        known: Cooperation | None,
        *,
        sync: Sync,
        reduction: Reduction,
        weighs_rows: bool,
        num_samples: int,
        watch: Callable[[Together], Any],
        unknown: Callable[[], Exception],
    ) -> None:
        self._known, self._watch, self._unknown = known, watch, unknown
        self._sync, self._reduction, self._weighs_rows = sync, reduction, weighs_rows
        self._num_samples = num_samples
        self._table, self._home = Table(), torch.device("cpu")
        self._restart: Callable[[int], None] | None = None
        self._stack = ExitStack()  # of the pass that is under way
        self._unsynced: list[Any] = []  # modules that joined in a no_sync() of the user's, and ran nowhere else yet
        self._reduces = self._last = False  # whether that pass is to reduce its gradients; whether it is the last
        self._works: list[Any] | None = None
        self._rows: int | None = None
        self._seen: Tensor | None = None  # a fingerprint of the rows of the last pass that asked for any
        self._factor: Tensor | None = None
        self._over = self._closed = self._summed = False
        self.closes = sync != "samples"
        if known is not None:
            self._settle(known)

    def _settle(self, known: Cooperation) -> None:
        ranks = known.exchange.ranks
        self._known, self.shards = known, known.shards
        if self._sync == "samples":
            self.first, self.stride = ranks.index, ranks.size
        if self._sync == "local":
            self.noise_offset = ranks.index * self._num_samples

    @property
    def known(self) -> Cooperation:
        """What the ranks share. RuntimeError where they do not know each other."""
        if self._known is None:
            raise self._unknown()
        return self._known

    @property
    def ranks(self) -> Ranks:
        """The ranks that train the model."""
        return self.known.exchange.ranks

    def begin(self, table: Table, home: torch.device, restart: Callable[[int], None]) -> None:
        """See :class:`Alone`. RuntimeError where this rank or its model cannot take part."""
        self._table, self._home, self._restart = table, home, restart
        if self._known is not None:
            self._known.replicas.check_ready()
            self._known.exchange.begin()

    def join(self, known: Cooperation, module: Any, seed: int, *, moved: bool) -> None:
        """``module``, the first to run in a pass, makes the ranks known; ``moved``: by another seed than theirs."""
        is_new = self._known is None
        self._settle(known)
        if is_new:
            known.exchange.begin()
        if known.replicas.static and not known.synced and self._sync == "global":
            self._reduces = True
        self._unsynced.append(module)
        self.runs(module)
        if is_new and (moved or self._sync != "global"):
            assert self._restart is not None
            self._restart(seed)

    def runs(self, module: Any) -> None:
        """A module that joined in this pass is about to run: a microbatch of several, maybe in a no_sync() of its own.

        The user's no_sync() would end ours with it, so ours begins at the first forward outside.
        """
        if module.require_backward_grad_sync and module in self._unsynced:
            self._unsynced.remove(module)
            if not self._reduces:
                self._stack.enter_context(module.no_sync())

    def begin_pass(self, *, steers: bool, last: bool) -> None:
        """See :class:`Alone`."""
        known, self._last, self._rows = self._known, last, None
        self._reduces = self._sync == "global" and (
            (not self._weighs_rows if steers else last and self._reduction == "tail")
            or (known is not None and known.replicas.static and not known.synced)
        )
        if known is None or not known.looked:
            self._stack.enter_context(self._watch(self))
        if known is not None:
            self._stack.enter_context(known.replicas.one_pass(reduces=self._reduces))

    def end_pass(self) -> None:
        """See :class:`Alone`."""
        self._stack.close()

    def meet(self, loss: Tensor, num_samples: int) -> Tensor:
        """See :class:`Alone`; under "local" and "samples" it stays this rank's own."""
        known = self.known
        if self._unsynced or (self._reduces and known.replicas.held_back):
            raise RuntimeError(NO_SYNC)
        known.looked = True
        known.synced |= self._reduces
        if (self._sync != "global" or self._weighs_rows) and not known.replicas.modules:
            raise self._unknown()
        if self._sync != "global":
            return loss
        weight = 1.0 if not self._weighs_rows else self._weight()
        self._closed = self._last
        fewer = self._num_samples - num_samples
        total = known.exchange.meet(loss, self._home, weight=weight, fewer=fewer)
        if self._weighs_rows:
            self._factor = weight * known.exchange.ranks.size / known.exchange.weight
        return total

    def _weight(self) -> float:
        if self._rows is None:
            raise RuntimeError("TSAM: weigh_rows=True needs opt.part(...) around the batch in each pass.")
        return float(self._rows)

    def weigh(self, gradients: dict[int, Tensor], *, steers: bool) -> dict[int, Tensor]:
        """See :class:`Alone`. DisagreementError where a pass that was to reduce its gradients has not."""
        known = self.known
        reduced = self._reduces or not known.replicas.modules
        if reduced and self._sync == "global" and not (known.reduces or known.sharded):
            known.reduces = check_reduced(self.ranks, gradients, self._table, self._home)
            if known.reduces and not known.replicas.modules:
                warn(HOOKS)
        if self._factor is None:
            return gradients
        factors = {g.device: self._factor.to(g.device) for g in gradients.values()}
        weighed = {i: gradient * factors[gradient.device].to(gradient.dtype) for i, gradient in gradients.items()}
        return self._added_up(weighed) if steers else weighed

    def _added_up(self, gradients: dict[int, Tensor]) -> dict[int, Tensor]:
        """Their means over ranks; of a parameter that other ranks alone have used too."""
        table, known = self._table, self.known
        if known.probe is None or not known.probe.fits(table, [None] * len(table.tensors)):
            known.probe = Flat(table)
        means = known.probe.means(gradients, self.ranks)
        return {i: mean.to(table.tensors[i].dtype) for i, mean in means.items()}

    def prepare(self, mean: Mean, *, counts_apart: bool) -> None:
        """See :class:`Alone`."""
        known, table = self.known, self._table
        if self._sync == "global":
            alone = self._num_samples == 1 and self._reduction == "tail"
            if not counts_apart or alone or not known.replicas.modules:
                return
        if known.flat is None or not known.flat.fits(table, mean.found):
            known.flat = Flat(table)
        mean.flat = known.flat
        if self._sync == "samples":
            mean.flat.zero_()  # what has no weight counts as nothing, whatever it was

    def before_last(self, mean: Mean) -> None:
        """See :class:`Alone`."""
        if self._sync == "global" and self._reduction == "tail" and mean.flat is not None:
            with torch.no_grad():
                self._works = mean.start_sum(self.ranks)

    def after_last(self, mean: Mean) -> None:
        """See :class:`Alone`."""
        if self._works is not None:
            works, self._works, self._summed = self._works, None, True
            mean.finish_sum(self.ranks, works, 1.0 / self.ranks.size)

    def decided(self, *scalars: Tensor) -> None:
        """See :class:`Alone`; ranks under "local" and "samples" decide for themselves."""
        if self._sync == "global":
            joined = torch.cat([each.reshape(-1) for each in scalars])
            self.ranks.follow_first_(joined)
            for each, decided in zip(scalars, torch.split(joined, [each.numel() for each in scalars]), strict=True):
                each.copy_(decided.view_as(each))

    def chain_seed(self, seed: int) -> int:
        """See :class:`Alone`: a chain of its own per rank, but under "global"."""
        if self._sync == "global" or self._known is None:
            return seed
        return check_seed(TSAM, (seed + self.ranks.index * GOLDEN) % (1 << 64))

    def saw(self, batch: Sequence[Any]) -> None:
        """See :class:`Alone`."""
        self._rows = len(batch[0]) + (self._rows or 0)
        if self._sync == "samples" and not (self._known is not None and self._known.checked):
            tensors = [each.detach() for each in batch if isinstance(each, Tensor)]
            nothing = torch.zeros(3, dtype=torch.float64, device=self._home)
            self._seen = sum((fingerprint(each).to(self._home) for each in tensors), nothing)

    def finish(self, mean: Mean, state: Tensor, first_loss: Tensor | None, states_per_sample: int) -> Tensor | None:
        """See :class:`Alone`."""
        known = self.known
        if self._sync != "global":
            known.exchange.meet(None, self._home)
            self._closed = True
        factor: float | Tensor = 1.0 / self.ranks.size
        if self._sync == "samples":
            factor, first_loss = self._join_samples(state, first_loss, states_per_sample)
        if mean.flat is not None and not self._summed:
            if isinstance(factor, Tensor):
                mean.flat.scale_(factor)
                factor = 1.0
            mean.finish_sum(self.ranks, mean.start_sum(self.ranks), factor)
        if self._sync == "samples" or known.replicas.follows_first:
            known.replicas.follow_first(self.ranks)
        return first_loss

    def average(self, gradients: dict[int, Tensor], state: Tensor, *, reduced: bool) -> dict[int, Tensor]:
        """See :class:`Alone`."""
        if self._sync == "global" and reduced:
            return gradients
        if self._sync == "samples":
            _, shares = join_states(self.ranks.gathered(state), 1)
            for gradient in gradients.values():
                gradient.mul_((shares[self.ranks.index] * self.ranks.size).to(gradient.device, gradient.dtype))
        return Flat(self._table).means(gradients, self.ranks)

    def _join_samples(
        self, state: Tensor, first_loss: Tensor | None, states_per_sample: int
    ) -> tuple[Tensor, Tensor | None]:
        """This rank's share of the weights, and the first loss of all; ``state`` becomes that of all samples."""
        known, ranks = self.known, self.ranks
        if not known.checked:
            unseen = torch.full((3,), float("nan"), dtype=torch.float64, device=self._home)
            check_alike(ranks, unseen if self._seen is None else self._seen, SAME_BATCH)
            known.checked = True
        first = torch.full((1,), float("nan"), dtype=torch.float64, device=state.device)
        if first_loss is not None:
            first.copy_(first_loss.reshape(1))
        all_states = ranks.gathered(torch.cat([state, first]))
        joined, shares = join_states(all_states[:, :-1], states_per_sample)
        state.copy_(joined)
        dtype = torch.float64 if first_loss is None else first_loss.dtype
        return shares[ranks.index], all_states[0, -1].to(dtype)

    def skip(self) -> None:
        """See :class:`Alone`. OtherRankError where other ranks had a batch."""
        if self._known is not None:
            self._over = True
            self._known.exchange.meet(None, self._home, skipped=True)

    def fail(self, error: BaseException | None) -> None:
        """See :class:`Alone`: the others learn of it in their next exchange."""
        if self._known is None or self._over:
            return
        self._over = True
        if isinstance(error, CollectiveError):
            self._known.exchange.lost(error)
        elif not isinstance(error, (OtherRankError, DisagreementError)):  # which all ranks have raised
            self._known.exchange.leave(self._home, missed=self._closed)
