"""Diagnostics of one step, computed from the step's float64 state tensor when they are read.

Layout of the state: engine/state.py. Which of them say something of a step its estimate knows (Report.names).
Invariant: everything here is a device tensor of its own; nothing waits for a device, nothing warns (health.py does).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _ops
from .engine.state import HEADER, RATIO, ROW, ChainSlot, Slot, new_state
from .estimates import Report

__all__ = ["Diagnostics"]


class Diagnostics:
    """Device tensors that describe the last step of a :class:`tsam_ext.TSAM`.

    Reading one copies a few scalars on the device; turning it into a Python number is the reader's sync.
    Before the first step every value is NaN and every vector empty. :meth:`to_dict` has those that say something of
    the step: of the sampler ``hmc`` for instance no ``gradient_norms``.

    Example:
        >>> Diagnostics()
        Diagnostics(before the first step)
    """

    def __init__(self) -> None:
        self._report = Report(new_state(0, torch.device("cpu")), num_samples=0, names=())

    def update(self, report: Report) -> None:
        """Describes another step from now on. TSAM calls this at the end of each."""
        self._report = report

    def to_dict(self) -> dict[str, Tensor]:
        """What there is to say of the last step, by name, as device tensors."""
        return {name: getattr(self, name) for name in self._report.names}

    def __repr__(self) -> str:
        names = ", ".join(self._report.names) or "before the first step"
        return f"Diagnostics({names})"

    @property
    def _num_rows(self) -> int:
        return self._report.num_samples * self._report.states_per_sample

    def _column(self, index: int) -> Tensor:
        rows = self._report.state[HEADER : HEADER + ROW * self._num_rows].view(self._num_rows, ROW)
        return rows[:, index].clone()

    def _summary(self) -> Tensor:
        return _ops.tilt_summary(self._report.state, self._num_rows)

    @property
    def losses(self) -> Tensor:
        """Loss of each sample where its gradient was taken, float64, shape ``[s]``.

        With ``recycle`` one entry per counted state: for each trajectory its N states, then its start; ``[s (N + 1)]``.
        """
        return self._column(0)

    @property
    def weights(self) -> Tensor:
        """Weight of each sample in the gradient, summing to 1, float64, shape ``[s]``.

        ``softmax(log n + tilt * loss)`` with n the rows of the sample's part of the batch (paper, Section 3: the
        gradient of the tilted objective). A skipped sample has weight 0. With ``recycle`` in the order of
        :attr:`losses`, and times each state's chance of being accepted.
        """
        return self._summary()[: self._num_rows]

    @property
    def ess(self) -> Tensor:
        """Effective sample size (Σw)²/Σw², float64, 0-dim: s says the tilt is inert, 1 that one sample decides.

        With ``recycle`` a state's weight is the sum over all its counts.
        A tilt that stays inert is warned of, whoever reads this or not.
        """
        return self._summary()[self._num_rows]

    @property
    def tilted_loss(self) -> Tensor:
        """(1/t) log(Σ n e^{tL} / Σ n) over the samples, float64, 0-dim; the mean at t=0, the extreme at t=±inf.

        For the sampler ``noise`` an estimate of the tilted objective (Li, Zhou and Bilmes, ICML 2025).
        """
        return self._summary()[self._num_rows + 1]

    @property
    def gradient_norms(self) -> Tensor:
        """‖D∇L‖ at the start of each ascent, float64, shape ``[s]``; NaN where the sampler takes no norm."""
        return self._column(2)

    @property
    def implied_delta(self) -> Tensor:
        """d/(ρ‖D∇L‖), float64, shape ``[s]``: about the δ at which ``hmc`` leans as far as the ascent of ``ascent``.

        An order of magnitude: a lean of the position by the whole length ρ. NaN where the sampler takes no norm or the
        groups have several rho.
        """
        return self._report.dimension_over_rho / self.gradient_norms

    @property
    def realised_norm(self) -> Tensor:
        """‖(θ-θ₀)/D‖ over the half-precision parameters at the last counted sample, float64, 0-dim.

        What rounding has left of ε, and added to it: nearest rounding loses what is below half a unit in the last
        place, stochastic rounding adds random noise. Far above rho where that noise is most of the movement. NaN where
        no bfloat16 or float16 parameter is perturbed.
        """
        return self._realised(0)

    @property
    def realised_ascent(self) -> Tensor:
        """The share of the ascent along the gradient that rounding has left, float64, 0-dim: 1 where all is there.

        (θ-θ₀)·g ‖Dg‖ / Σ rho (Dg)² over the half-precision parameters at the last sample. NaN without an ascent.
        """
        return self._realised(2)

    def _realised(self, index: int) -> Tensor:
        if self._report.realised is None:
            return torch.full((), float("nan"), dtype=torch.float64, device=self._report.state.device)
        return self._report.realised[index].clone()

    @property
    def carried_ratio(self) -> Tensor:
        """‖v‖/‖G‖ of the direction that the step has left for those after it, float64, 0-dim.

        With ``every`` and ``between="carry"``: how long what the tilted gradient has beside the plain one is, over the
        plain one. NaN in a step that leaves none.
        """
        if self._report.direction is None:
            return torch.full((), float("nan"), dtype=torch.float64, device=self._report.state.device)
        return self._report.direction[RATIO].clone()

    @property
    def num_nonfinite(self) -> Tensor:
        """Samples of the last step with a non-finite loss, float64, 0-dim."""
        return self._report.state[Slot.NONFINITE].clone()

    def _of_chain(self, slot: int) -> Tensor:
        if self._report.chain is None:
            return torch.full((), float("nan"), dtype=torch.float64, device=self._report.state.device)
        return self._report.chain[slot].clone()

    @property
    def acceptance_rate(self) -> Tensor:
        """Sampler ``hmc``: mean of min(1, e^−ΔH) over the step's trajectories, float64, 0-dim.

        Of a mean below 0.2 over ten steps a warning comes by itself: the chain hardly moves.
        """
        return self._of_chain(ChainSlot.ACCEPTANCE) / self._of_chain(ChainSlot.TRAJECTORIES)

    @property
    def energy_errors(self) -> Tensor:
        """Sampler ``hmc``: ΔH of the trajectory before each sample, float64, shape ``[s]``; NaN with other samplers."""
        if self._report.states_per_sample == 1:
            return self._column(3)
        return self._column(3)[self._report.states_per_sample - 2 :: self._report.states_per_sample].clone()

    @property
    def num_divergent(self) -> Tensor:
        """Sampler ``hmc``: trajectories of the step with |ΔH| above 1000 or anything not finite, float64, 0-dim."""
        return self._of_chain(ChainSlot.DIVERGENT)

    @property
    def distance(self) -> Tensor:
        """Sampler ``hmc``: how far a trajectory moves ε/(rho D), rejections counted as 0, float64, 0-dim.

        √2 is the distance of two independent draws under the gaussian prior.
        """
        return self._of_chain(ChainSlot.MOVED) / self._of_chain(ChainSlot.TRAJECTORIES)

    @property
    def delta(self) -> Tensor:
        """Sampler ``hmc``: δ of the step, float64, 0-dim."""
        return self._of_chain(ChainSlot.DELTA)

    @property
    def step_size(self) -> Tensor:
        """Sampler ``hmc``: the step size that the next step will use, float64, 0-dim."""
        return self._of_chain(ChainSlot.LOG_STEP).exp()

    @property
    def rounding(self) -> Tensor:
        """Sampler ``hmc``: δ|L|·2⁻²³, by how much the rounding of a float32 loss moves ΔH, float64, 0-dim.

        Of a mean above 0.3 over ten steps, at the loss's own precision, a warning comes by itself: the accept test is
        rounding noise.
        """
        return self._of_chain(ChainSlot.ROUNDING)
