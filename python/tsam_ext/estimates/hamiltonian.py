"""One step of Hamiltonian Monte Carlo: the passes that move its chain, and what they count.

start; [closure]; then per trajectory: draw momentum, (kick, drift, [closure]) N times, accept or reject, weigh.
Words moved per float32 element: s (7 N + 5), ball s (10 N + 5), plus s where N > 1 (distance), and start and restore,
less 2 where the mean begins in a gradient's memory; recycling counts N + 1 states per trajectory instead of one:
s (3 N + 1) more; with a loss scale 2 a gradient and 2 at the end more.
Invariant: the host never learns a decision, and an exception leaves the chain as the step found it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tsam_ext.carry import FullStep
from tsam_ext.chain import Chain
from tsam_ext.engine.checks import TSAM, refuse
from tsam_ext.engine.grad_mode import without_grad
from tsam_ext.engine.state import CHAIN_SLOTS, STEP_HELD, ChainSlot, Slot
from tsam_ext.integrators import LEAPFROG, substeps
from tsam_ext.loss_scale import LossScale, make_finite
from tsam_ext.mean import owned
from tsam_ext.phase_space import PhaseSpace
from tsam_ext.table import taken

from .estimate import Estimate
from .item import Sample
from .step import Report, Step

INNER, START, END = 0, 1, 2  # the parts of a trajectory, as csrc/core/recycle.h has them


class HamiltonianEstimate(Estimate):
    """The passes of one step; ``chain`` moves on if the step completes.

    ``delta``: δ, None for the tilt; with ``automatic`` the factor of the running scale. ``fresh``: start from a draw.
    """

    def __init__(
        self,
        step: Step,
        chain: Chain,
        *,
        num_leapfrog_steps: int,
        burn_in: int,
        fresh: bool,
        delta: float | Tensor | None,
        automatic: bool,
        metropolis: bool,
        recycle: bool,
    ) -> None:
        super().__init__(step, num_leapfrog_steps + 1 if recycle else 1)
        self.chain = chain
        self.tilt_weighs = delta is not None
        self.diagnostics = (*self.diagnostics, "acceptance_rate", "energy_errors", "num_divergent", "distance", "delta")
        self.diagnostics = (*self.diagnostics, "step_size", "rounding")
        self.diagnostics += ("realised_norm",) if self.half else ()
        self._burn_in, self._fresh_start, self._delta, self._automatic = burn_in, fresh, delta, automatic
        self._metropolis, self._recycles = metropolis, recycle
        self._substeps, self._last_kick = substeps(LEAPFROG, num_leapfrog_steps)
        self._scaling = None if self.scale is None else LossScale(self.scale, self.together.shards)
        if self._scaling is not None and any(p.dtype == torch.float16 for p in self.table.parameters):
            expected = "none with float16 parameters and hmc: small gradients would vanish when divided"
            raise refuse(TSAM, "scaler", "one", expected)
        self._under_way = False  # whether the chain has left the place where the step found it
        self._phase: PhaseSpace | None = None
        self._loss = self.state[Slot.FIRST_LOSS]  # of the last pass
        self._fresh: dict[int, Tensor] = {}  # the gradients of the last pass
        self._carried: dict[int, Tensor] = {}  # those of the chain's state
        self._zeros: dict[int, Tensor] = {}

    def moves(self) -> Iterator[Sample]:
        """1 + N (burn_in + s) passes, s being this rank's samples; none where it has none."""
        if self.together.first >= self.num_samples:
            return
        self._place(fresh=self._fresh_start)
        yield from self._pass(self.together.first, counted=False)
        phase = self._phase  # placed anew where ranks came to know each other in that pass
        assert phase is not None
        self._take_start(phase)
        own = range(self.together.first, self.num_samples, self.together.stride)
        for trajectory, sample in enumerate([-1] * self._burn_in + list(own)):
            for n in range(len(self._substeps)):
                self._leapfrog(phase, trajectory, n)
                if self._recycles and n > 0 and sample >= 0:
                    self._recycle(phase, INNER, sample, n - 1, self._fresh)
                last = sample == own[-1] and n == len(self._substeps) - 1
                yield from self._pass(max(sample, own[0]), counted=sample >= 0, last=last)
            self._end_trajectory(phase, trajectory, sample)
        self.measure({})
        if self.chain.adapts:
            phase.adapt(self.chain.highest_log_step)

    def _pass(self, index: int, *, counted: bool, last: bool = False) -> Iterator[Sample]:
        self._fresh = {}  # the closure is about to make others
        yield from self.one_pass(index, probe=not counted, steers=True, last=last)

    def move_again(self, sample: int) -> None:
        """The chain begins again from where the step found it, or from another draw."""
        self.chain.go_back()
        self._place(fresh=self._fresh_start)

    def take(self, sample: Sample, loss: Tensor, gradients: dict[int, Tensor]) -> None:
        """Keeps the pass's loss and gradients; what they are for is the trajectory's to know."""
        gradients = self.gradients.as_moved(gradients)
        self._loss = loss
        self._fresh = gradients if self._scaling is None else self._scaling.divide(gradients)

    def move_to(self, sample: int) -> None:
        """Where the chain stands; a draw from the prior if it stands nowhere."""
        self._place(fresh=False)

    @without_grad
    def _place(self, *, fresh: bool) -> PhaseSpace:
        """theta = theta_0 + the chain's position, or a draw from the prior: ``fresh``, or no chain to go on with.

        A draw overwrites where the chain stood, so that after an exception it stands nowhere.
        """
        chain, table = self.chain, self.table
        if self.capturing and not (fresh or chain.started):
            raise RuntimeError("TSAM: hmc in a CUDA graph needs a step before the capture, to go on from.")
        chain.scalars = chain.scalars.to(self.spread.home)  # the model may have moved since
        buffers = [chain.buffers(parameter) for parameter in taken(table.parameters, table.moves)]
        draw = fresh or not chain.started
        chain.step_begins(draw=draw)
        self._under_way = True
        if self.noise_step == STEP_HELD:
            chain.scalars[ChainSlot.CHAIN_STEP] = self.state[Slot.STEP]
        self.spread.follow(chain.scalars, slice(ChainSlot.TOTALS, CHAIN_SLOTS))
        self.origin.save(table.moves)
        self._phase = phase = PhaseSpace(
            spread=self.spread,
            indices=table.moves,
            position=taken(table.tensors, table.moves),
            saved=taken(self.origin.copies, table.moves),
            x=([held[0] for held in buffers], [held[1] for held in buffers], [held[2] for held in buffers]),
            momentum=[],
            scalars=chain.scalars,
            state=self.state,
            rho=taken(table.rho, table.moves),
            adaptive=taken(table.adaptive, table.moves),
            base=taken(table.base, table.moves),
            seed=self.together.chain_seed(self.step.seed),
            step=self.noise_step,
            dimension=table.dimension,
            prior=chain.prior_number,
            rounding=self.rounding(0),  # the same at each position, so that the loss is one function of x
        )
        phase.place(draw=draw)
        return phase

    @without_grad
    def _take_start(self, phase: PhaseSpace) -> None:
        """The chain's state at the start of the step: its gradient is carried from here on."""
        own = owned(self._fresh)
        for i, gradient in self._fresh.items():
            self._carried[i] = gradient if i in own else gradient.clone()
        delta = self.tilt if self._delta is None else self.scalar(self._delta)
        gradients = self._of_moved(self._carried)
        phase.begin(gradients, self._loss, tilt=self.tilt, delta=delta, automatic=self._automatic)
        if self._automatic:
            self.together.decided(phase.scalars, self.state)
        if self._scaling is not None:
            self._scaling.spoiled(self._loss)  # the step, but no trajectory of it
            make_finite(self._carried.values())

    @without_grad
    def _leapfrog(self, phase: PhaseSpace, trajectory: int, n: int) -> None:
        """Kick and drift; the first kick of a trajectory is by the carried gradient and on a fresh momentum."""
        if not phase.momentum:
            parameters = taken(self.table.parameters, self.table.moves)
            phase.momentum = [self.chain.momentum(parameter) for parameter in parameters]
        kick, drift = self._substeps[n]
        if self._scaling is not None and n > 0:
            make_finite(self._fresh.values())
        phase.leapfrog(
            self._of_moved(self._carried if n == 0 else self._fresh),
            trajectory=trajectory,
            kick=kick,
            drift=drift,
            first=n == 0,
            measure=n == len(self._substeps) - 1,
        )

    @without_grad
    def _end_trajectory(self, phase: PhaseSpace, trajectory: int, sample: int) -> None:
        """Accept or reject; then the chain's state, whichever it is, is counted."""
        phase.end(
            self._of_moved(self._fresh),
            self._loss if self._scaling is None else self._scaling.spoiled(self._loss),
            trajectory=trajectory,
            kick=self._last_kick,
            row=-1 if self._recycles else max(sample, -1),
            metropolis=self._metropolis,
            skip_nonfinite=self.step.skip_nonfinite_loss,
            last=self._closes(sample),
        )
        self.together.decided(phase.scalars, self.state)
        for i in self._fresh.keys() - self._carried.keys():
            self._carried[i] = torch.zeros_like(self._fresh[i])
        indices = sorted(self._carried)
        if self._recycles and sample >= 0:
            n = len(self._substeps)
            self._recycle(phase, START, sample, n, self._carried)
            self._recycle(phase, END, sample, n - 1, self._fresh)
        counted, first = sample >= 0 and not self._recycles, self.together.first
        # Before and at the first counted sample the proposal's memory may stand for the mean; once counted it is.
        begins = sample <= first and self.mean.begins_in(self._fresh, indices, keep=counted)
        fresh = [self._fresh[i] if i in self._fresh else self._zero(i) for i in indices]
        carried = taken(self._carried, indices)
        if begins:
            phase.carry(indices, fresh, carried, [], count=counted)
        else:
            self.mean.cover(dict(zip(indices, carried, strict=True)), zero=sample > first)
            phase.carry(indices, taken(self.mean.sums, indices), carried, fresh, count=counted)
        if sample >= 0 and isinstance(self.carrying, FullStep):
            self.carrying.add(sample, self._carried, torch.zeros_like(self.tilt))

    @without_grad
    def _recycle(self, phase: PhaseSpace, part: int, sample: int, row: int, gradients: dict[int, Tensor]) -> None:
        """Counts one state of the trajectory, with its gradient, into the given row of the sample's."""
        phase.recycle(
            self._loss,
            share=self._last_kick / (self._substeps[1][0] if part == INNER else self._last_kick),
            row=self.states_per_sample * sample + row,
            part=part,
            metropolis=self._metropolis,
            skip_nonfinite=self.step.skip_nonfinite_loss,
            last=part == END and self._closes(sample),
        )
        self.mean.add(gradients, adopt=False, zero=part != INNER or (sample, row) != (self.together.first, 0))

    def _closes(self, sample: int) -> bool:
        """Whether the weights are complete with this sample; those of several ranks may not be."""
        return self.together.closes and sample == self.num_samples - 1

    def end_mean(self) -> None:
        """As the base class's, by true gradients; then the mean is scaled, as the scaler expects it."""
        super().end_mean()
        if self._scaling is not None:
            self._scaling.put_back(self.mean.sums.values())

    def complete(self) -> None:
        """As the base class's, and the chain goes on from where it is."""
        super().complete()
        if self._under_way:  # not where this rank had no sample
            self.chain.step_ends(taken(self.table.parameters, self.table.moves))
            self._under_way = False

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

    @without_grad
    def _go_back(self, launches: bool = True) -> None:
        if self._under_way:
            self.chain.go_back(launches=launches)
            self._under_way = False

    def forget(self) -> None:
        """Lets go of the gradients and of the lists too."""
        super().forget()
        self._fresh, self._carried, self._zeros, self._phase = {}, {}, {}, None

    @property
    def report(self) -> Report:
        """With a copy of the chain's scalars."""
        return replace(super().report, chain=self.chain.scalars.clone())

    def _of_moved(self, gradients: dict[int, Tensor]) -> list[Tensor]:
        return [gradients[i] if i in gradients else self._zero(i) for i in self.table.moves]

    def _zero(self, index: int) -> Tensor:
        if index not in self._zeros:
            self._zeros[index] = torch.zeros_like(self.table.tensors[index], requires_grad=False)
        return self._zeros[index]
