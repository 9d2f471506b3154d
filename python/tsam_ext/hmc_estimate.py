"""One step of the sampler hmc: the passes that move its chain, and what they count.

start; [closure]; then per trajectory: draw momentum, (kick, drift, [closure]) N times, accept or reject, weigh.
Words moved per float32 element: s (7 N + 5), ball s (10 N + 5), plus s where N > 1 (distance), and start and restore,
less 2 where the mean begins in a gradient's memory; recycling counts N + 1 states a trajectory instead of one:
s (3 N + 1) more.
Invariant: the host never learns a decision, and an exception leaves the chain as the step found it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _ops
from .chain import SLOTS, Chain, ChainSlot
from .estimate import Estimate, is_own
from .functional.state import STEP_HELD, Slot
from .integrators import LEAPFROG, substeps
from .sample import Sample
from .settings import PRIORS
from .table import taken

INNER, START, END = 0, 1, 2  # the parts of a trajectory, as csrc/core/recycle.h has them


class HmcEstimate(Estimate):
    """One step's passes of the sampler ``hmc``; ``chain`` moves on if the step completes."""

    def __init__(self, *args: Any, chain: Chain, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chain = chain
        self._hmc = self.settings.hmc
        self._before: tuple[Tensor, bool] | None = None
        self._loss: Tensor | None = None
        self._fresh: dict[int, Tensor] = {}  # the gradients of the last pass
        self._carried: dict[int, Tensor] = {}  # those of the chain's state
        self._zeros: dict[int, Tensor] = {}
        self._momentum: list[Tensor] = []
        self._x: list[list[Tensor]] = []  # the chain's three buffers of each moved parameter
        self._rho = taken(self.table.rho, self.table.moves)
        self._prior = PRIORS.index(self._hmc.prior)
        self._substeps, self._last_kick = substeps(LEAPFROG, self._hmc.num_leapfrog_steps)

    @property
    def repeats(self) -> bool:
        """Always: the start and at least one trajectory."""
        return True

    @property
    def rows_per_sample(self) -> int:
        """Counted states a trajectory: its N states and its start with ``recycle``, otherwise the one it ends with."""
        return self.settings.hmc.num_leapfrog_steps + 1 if self.settings.hmc.recycle else 1

    def passes(self) -> Iterator[Sample]:
        """One item a gradient: 1 + N (burn_in + s). Ending early puts everything back, the chain too."""
        total = self._hmc.burn_in + self.num_samples
        try:
            self._begin()
            self.place(fresh=self._hmc.chain == "fresh")
            yield from self._pass(0, counted=False)
            self._take_start()
            for trajectory in range(total):
                sample = trajectory - self._hmc.burn_in
                for n in range(len(self._substeps)):
                    self._leapfrog(trajectory, n)
                    if self._hmc.recycle and n > 0 and sample >= 0:
                        self._recycle(INNER, sample, n - 1, self._fresh)
                    yield from self._pass(max(sample, 0), counted=sample >= 0)
                self._end_trajectory(trajectory, sample)
            if self._hmc.adapt_step_size:
                self.spread.run(_ops.hmc_adapt_, (), self.chain.scalars, self._hmc.highest_log_step)
            self._complete()
            self.chain.step_ends(self._moved)
            self._before = None
        finally:
            self.abort()

    def _pass(self, index: int, counted: bool) -> Iterator[Sample]:
        self.current = Sample(self, index, probe=not counted)
        self._fresh = {}  # the closure is about to make others
        self.clear_gradients()
        yield self.current
        if not self.current.done:
            raise RuntimeError("TSAM: run each item of samples() as 'with sample: ...'.")

    @torch.no_grad()
    def end_pass(self, sample: Sample) -> None:
        """Keeps the pass's loss and gradients; what they are for is the trajectory's to know."""
        assert sample.loss is not None and self._statistics is not None
        self._loss = sample.loss
        if self.first_loss is None:
            self.first_loss = sample.loss.clone()
        self._statistics.end_pass()
        self._fresh = self.gradients()

    @torch.no_grad()
    def place(self, *, fresh: bool) -> None:
        """theta = theta_0 + the chain's position, or a draw from the prior: ``fresh``, or no chain to go on with.

        A draw overwrites where the chain stood, so that after an exception it stands nowhere.
        """
        chain = self.chain
        if self.capturing and not (fresh or chain.started):
            raise RuntimeError("TSAM: hmc in a CUDA graph needs a step before the capture, to go on from.")
        chain.scalars = chain.scalars.to(self.spread.home)  # the model may have moved since
        buffers = [chain.buffers(parameter) for parameter in self._moved]
        self._x = [[held[k] for held in buffers] for k in range(3)]
        draw = fresh or not chain.started
        self._before = (chain.scalars.clone(), not draw)
        if self.noise_step == STEP_HELD:
            chain.scalars[ChainSlot.CHAIN_STEP] = self.state[Slot.STEP]
        self.spread.follow(chain.scalars, slice(ChainSlot.TOTALS, SLOTS))
        self._saving(self.table.moves)
        self.spread.run(
            _ops.hmc_place_,
            self.table.moves,
            self._moved,
            self._saved(),
            *self._x,
            chain.scalars,
            self.state,
            self._rho,
            self._adaptive,
            self._base,
            self.seed,
            self.noise_step,
            self.table.dimension,
            self._prior,
            draw,
        )
        self._has_moved()

    def _take_start(self) -> None:
        """The chain's state at the start of the step: its gradient is carried from here on."""
        for i, gradient in self._fresh.items():
            self._carried[i] = gradient if is_own(gradient) else gradient.clone()
        automatic = isinstance(self._hmc.delta, str)
        delta = self._hmc.delta_scale if isinstance(self._hmc.delta, str) else self._hmc.delta
        assert self._loss is not None
        self.spread.run(
            _ops.hmc_begin_,
            self.table.moves,
            self._saved(),
            self._of_moved(self._carried),
            self.chain.scalars,
            self.state,
            self._loss,
            self._tilt,
            self._tilt if delta is None else self.scalar(delta),
            automatic,
            self._rho,
            self._adaptive,
            self.table.dimension,
            self._prior,
        )

    @torch.no_grad()
    def _leapfrog(self, trajectory: int, n: int) -> None:
        """Kick and drift; the first kick of a trajectory is by the carried gradient and on a fresh momentum."""
        if not self._momentum:
            self._momentum = [self.chain.momentum(parameter) for parameter in self._moved]
        self.spread.run(
            _ops.hmc_leapfrog_,
            self.table.moves,
            self._moved,
            self._saved(),
            self._momentum,
            *self._x,
            self._of_moved(self._carried if n == 0 else self._fresh),
            self.chain.scalars,
            self._rho,
            self._adaptive,
            self._base,
            self.seed,
            self.noise_step,
            trajectory,
            self.table.dimension,
            self._prior,
            *self._substeps[n],
            n == 0,
            n == len(self._substeps) - 1,
        )
        self._has_moved()

    @torch.no_grad()
    def _end_trajectory(self, trajectory: int, sample: int) -> None:
        """Accept or reject; then the chain's state, whichever it is, is counted."""
        assert self._loss is not None
        self.spread.run(
            _ops.hmc_end_,
            self.table.moves,
            self._saved(),
            self._momentum,
            self._of_moved(self._fresh),
            self.chain.scalars,
            self.state,
            self._loss,
            self._rho,
            self._adaptive,
            self.seed,
            self.noise_step,
            trajectory,
            self.table.dimension,
            self._prior,
            self._last_kick,
            -1 if self._hmc.recycle else max(sample, -1),
            self._hmc.metropolis,
            self.settings.skip_nonfinite_loss,
            sample == self.num_samples - 1,
        )
        for i in self._fresh.keys() - self._carried.keys():
            self._carried[i] = torch.zeros_like(self._fresh[i])
        indices = sorted(self._carried)
        if self._hmc.recycle and sample >= 0:
            n = len(self._substeps)
            self._recycle(START, sample, n, self._carried)
            self._recycle(END, sample, n - 1, self._fresh)
        counted = sample >= 0 and not self._hmc.recycle
        # Before and at the first counted sample the proposal's memory may stand for the mean; once counted it is.
        adopts = sample <= 0 and not self._sums and all(map(self._adoptable, indices))
        if adopts and counted:
            self._sums = {i: self._fresh[i] for i in indices}
        for i in indices:
            if i not in self._sums and not adopts:
                total = self._new_sum(self._carried[i], self._buffers[i], zero=sample > 0, adopt=False)
                assert total is not None
                self._sums[i] = total
        fresh = [self._fresh[i] if i in self._fresh else self._zero(i) for i in indices]
        self.spread.run(
            _ops.hmc_carry_,
            indices,
            fresh if adopts else taken(self._sums, indices),
            taken(self._carried, indices),
            [] if adopts else fresh,
            self.chain.scalars,
            self.state,
            counted,
        )

    def _adoptable(self, index: int) -> bool:
        """Whether the memory of the proposal's gradient can become the mean's: new memory costs more than a pass."""
        return index in self._fresh and self.adoptable(self._fresh[index], self._buffers[index])

    def _recycle(self, part: int, sample: int, row: int, gradients: dict[int, Tensor]) -> None:
        """Counts one state of the trajectory, with its gradient, into the given row of the sample's."""
        assert self._loss is not None
        self.spread.run(
            _ops.hmc_recycle_,
            (),
            self.chain.scalars,
            self.state,
            self._loss,
            self._last_kick / (self._substeps[1][0] if part == INNER else self._last_kick),
            self.rows_per_sample * sample + row,
            part,
            self._hmc.metropolis,
            self.settings.skip_nonfinite_loss,
            part == END and sample == self.num_samples - 1,
        )
        self._accumulate(gradients, adopt=False, zero=part != INNER or (sample, row) != (0, 0))

    @torch.no_grad()
    def undo(self) -> None:
        """As the base class's, and the chain is where the step found it."""
        try:
            super().undo()
        finally:
            self._go_back()

    def abort(self) -> None:
        """As the base class's; also where the step was complete but for the chain."""
        try:
            super().abort()
        finally:
            self._go_back(launches=not self.capturing)

    def _go_back(self, launches: bool = True) -> None:
        if self._before is not None:
            scalars, self.chain.started = self._before
            if launches:
                self.chain.scalars.copy_(scalars)
            self._before = None

    def _forget(self) -> None:
        super()._forget()
        self._fresh, self._carried, self._zeros, self._momentum = {}, {}, {}, []

    def _saved(self) -> list[Tensor]:
        return taken(self._origin, self.table.moves)

    def _of_moved(self, gradients: dict[int, Tensor]) -> list[Tensor]:
        return [gradients[i] if i in gradients else self._zero(i) for i in self.table.moves]

    def _zero(self, index: int) -> Tensor:
        if index not in self._zeros:
            self._zeros[index] = torch.zeros_like(self.table.parameters[index], requires_grad=False)
        return self._zeros[index]

    def _has_moved(self) -> None:
        torch.autograd.graph.increment_version(self._moved)
