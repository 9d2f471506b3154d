"""The passes of one step, whichever way it samples: how it begins, what ends a pass, and how everything is put back.

begin; then for each gradient [the user's forward and backward passes], take; complete or abort.
Invariant: after complete the parameters are θ₀ and p.grad is the mean; after abort all is as before the step, p.grad
cleared. A leaf moves the parameters (passes it yields) and takes gradients; it never restores by itself.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from tsam_ext import _cuda, _ops
from tsam_ext._compile import graphs_break_at
from tsam_ext.engine.checks import TSAM, refuse, shown
from tsam_ext.engine.spread import Spread
from tsam_ext.engine.state import STEP_HELD, Slot, new_state
from tsam_ext.mean import Mean
from tsam_ext.module_state import NormStatistics, RandomMasks
from tsam_ext.origin import Origin, Scratch
from tsam_ext.table import Table


@dataclass(frozen=True)
class Step:
    """What an estimate is given.

    ``seed``: signed 64-bit. ``count``: steps before this one; a tensor where steps are counted on the device.
    ``scratch``: memory for copies that lasts between steps.
    """

    table: Table
    scratch: Scratch
    seed: int
    count: int | Tensor
    num_samples: int = 1
    tilt: float | Tensor = 0.0
    split: bool = False
    skip_nonfinite_loss: bool = False
    same_masks: bool = True
    model: nn.Module | None = None


@dataclass(frozen=True)
class Report:
    """What a completed step leaves for its diagnostics; ``names`` are those that say something of it.

    ``state``: its scalars (engine/state.py); ``chain``: a copy of the chain's. ``tilt_weighs``: whether a tilt makes
    the weights differ if it acts. ``dimension_over_rho``: d/ρ, NaN where groups differ in rho.
    """

    state: Tensor
    num_samples: int
    names: tuple[str, ...]
    states_per_sample: int = 1
    tilt_weighs: bool = False
    chain: Tensor | None = None
    dimension_over_rho: float = float("nan")


@graphs_break_at("record", "__enter__", "__exit__")
class Sample:
    """One gradient of a step: a context manager around the forward and backward passes that compute it.

    The item of :meth:`TSAM.samples`. Leaving it hands the gradients over, or, by an exception, restores everything.

    Attributes:
        index: which sample of the step, from 0.
        probe: whether this gradient is only on the way: an ascent follows, or a chain moves on.
        loss: what :meth:`record` was given, detached, as a tensor; None before.
        done: whether the pass is over.
    """

    def __init__(self, estimate: Estimate, index: int, probe: bool) -> None:
        self._estimate = estimate
        self.index = index
        self.probe = probe
        self.loss: Tensor | None = None
        self.done = False

    def record(self, loss: Tensor | float) -> None:
        """Records the loss (one element, any floating-point dtype) of this pass, once, inside ``with``.

        Nothing is read from a device.

        Raises:
            TypeError, ValueError: if it is no loss, or lies on a device that holds no parameter.
        """
        spread = self._estimate.spread
        if not isinstance(loss, Tensor):
            if isinstance(loss, bool) or not isinstance(loss, numbers.Real):
                expected = "a floating-point tensor of one element or a number (a closure has to return the loss)"
                raise refuse(TSAM, "loss", shown(loss), expected, TypeError)
            loss = torch.tensor(float(loss), dtype=torch.float64, device=spread.home)
        if loss.numel() != 1 or not loss.dtype.is_floating_point:
            got = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
            raise refuse(TSAM, "loss", got, "a floating-point tensor of one element")
        if loss.device not in spread.devices:
            raise refuse(TSAM, "loss", f"a tensor on {loss.device}", f"one on {spread}, as the parameters are")
        self.loss = loss.detach()

    def __enter__(self) -> Sample:
        if self.done or self._estimate.closed:
            raise RuntimeError("TSAM: this item of samples() is over; enter each item once, as the loop yields it.")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._estimate.abort()
            return
        try:
            if self.loss is None:
                raise RuntimeError("TSAM: sample.record(loss) was not called inside 'with sample:'.")
            self._estimate.end_pass(self, self.loss)
        except BaseException:
            self._estimate.abort()
            raise
        self.done = True

    def __repr__(self) -> str:
        what = "probe" if self.probe else "counted"
        return f"Sample(index={self.index}, {what}, {'done' if self.done else 'open'})"


class Estimate(ABC):
    """One step over ``step.table``; see the module's docstring."""

    tilt_weighs = True
    diagnostics: tuple[str, ...] = ("losses", "weights", "ess", "tilted_loss", "num_nonfinite")

    def __init__(self, step: Step, states_per_sample: int = 1) -> None:
        self.table, self.step = step.table, step
        self.num_samples, self.states_per_sample = step.num_samples, states_per_sample
        self.spread = Spread(step.table.parameters)
        self.state = new_state(self.num_samples * states_per_sample, self.spread.home)
        self.spread.follow(self.state)
        self.capturing = any(map(_cuda.capturing, self.spread.devices))
        if isinstance(step.count, Tensor):  # counted on the device, where a captured step finds it at each replay
            if not self.spread.alone:
                got = f"True with parameters on {self.spread}"
                raise refuse(TSAM, "capturable", got, "False, or parameters on one device")
            self.state[Slot.STEP] = step.count
            self.noise_step = STEP_HELD
        elif self.capturing:
            raise RuntimeError("TSAM: a step in a CUDA graph needs capturable=True: replays would draw no new noise.")
        else:
            self.noise_step = step.count % (1 << 32)
        self.first_loss: Tensor | None = None
        self.current: Sample | None = None
        self.closed = False
        self.tilt = self.state[Slot.TILT]
        self.origin = Origin(step.table, self.spread, self.state, step.scratch, self.capturing)
        self.mean = Mean(step.table, self.spread, self.state)
        self._masks: RandomMasks | None = None
        self._statistics: NormStatistics | None = None
        self._forms = [(p, p.stride(), p.dtype) for p in step.table.parameters]

    @abstractmethod
    def moves(self) -> Iterator[Sample]:
        """The passes of the step, one item per gradient; before each the parameters are moved to where it is taken."""

    @abstractmethod
    def take(self, sample: Sample, loss: Tensor, gradients: dict[int, Tensor]) -> None:
        """What the gradients of the pass that has just run are for."""

    @abstractmethod
    def visit(self, sample: int) -> None:
        """Moves the parameters to θ₀+ε of ``sample``, outside a step; :meth:`undo` brings them back."""

    @property
    def repeats(self) -> bool:
        """Whether the step runs the model more than once."""
        return True

    def take_part(self, rows: int) -> tuple[int, int]:
        """Notes that the current pass asks for its rows of a batch; first and last row (exclusive): all of them."""
        return 0, rows

    def passes(self) -> Iterator[Sample]:
        """One item per gradient. Ending early, by break or exception, puts everything back."""
        try:
            self._begin()
            yield from self.moves()
            self.complete()
        finally:
            self.abort()

    @torch.no_grad()
    def _begin(self) -> None:
        self.mean.begin()
        self._statistics = NormStatistics(self.step.model)
        self._masks = RandomMasks(() if self.capturing else self.spread.devices)
        self.tilt = self.scalar(self.step.tilt)
        self.spread.run(_ops.tilt_begin_, (), self.state, self.tilt)

    def scalar(self, value: float | Tensor) -> Tensor:
        """A number as the kernels take it."""
        if isinstance(value, Tensor):
            return value.detach()
        return torch.full((), value, dtype=torch.float64, device=self.state.device)

    def one_pass(self, index: int, *, probe: bool) -> Iterator[Sample]:
        """Yields one item, with no gradients and the random numbers of the step's first pass."""
        self.current = Sample(self, index, probe)
        if self.first_loss is not None and self.step.same_masks and self._masks is not None:
            self._masks.rewind()
        for parameter in self.table.parameters:
            parameter.grad = None
        yield self.current
        if not self.current.done:
            raise RuntimeError("TSAM: run each item of samples() as 'with sample: ...'.")

    @torch.no_grad()
    def end_pass(self, sample: Sample, loss: Tensor) -> None:
        """After the user's backward pass: its loss, the buffers that it moved, its gradients."""
        if self.first_loss is None:
            self.first_loss = loss.clone()
        if self._statistics is not None:
            self._statistics.end_pass()
        self.take(sample, loss, self.gradients())

    @torch.no_grad()
    def gradients(self) -> dict[int, Tensor]:
        """The gradients that this pass has left, each in its parameter's layout."""
        gradients = {}
        for i, (parameter, stride, dtype) in enumerate(self._forms):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                raise refuse(TSAM, f"{self.table.name(i)}.grad", f"a {gradient.layout} tensor", "a dense gradient")
            if gradient.stride() != stride or gradient.dtype != dtype:
                gradient = torch.empty_like(parameter).copy_(gradient)
            gradients[i] = gradient
        return gradients

    @torch.no_grad()
    def complete(self) -> None:
        """θ₀ back, and the mean into p.grad."""
        self.origin.restore()
        self.mean.hand_over()
        self.closed = True
        self.forget()

    @torch.no_grad()
    def abort(self) -> None:
        """Puts parameters, gradients, generators and statistics back to before the step. Idempotent."""
        if self.closed:
            return
        self.closed = True
        try:
            if not self.capturing:  # under capture nothing has run, and what ends takes no more launches
                self.undo()
        finally:
            if self._masks is not None and self._statistics is not None:
                self.mean.give_back(zero=not self.capturing)
                self._masks.rewind()
                if not self.capturing:
                    self._statistics.rewind()
                self.forget()

    @torch.no_grad()
    def undo(self) -> None:
        """θ₀ back, after an exception too."""
        self.origin.undo()

    def forget(self) -> None:
        """Lets go of everything of the size of the parameters but the scratch."""
        self.mean.forget()
        self.origin.forget()

    @property
    def report(self) -> Report:
        """What the diagnostics of the completed step are computed from."""
        return Report(
            state=self.state,
            num_samples=self.num_samples,
            names=self.diagnostics,
            states_per_sample=self.states_per_sample,
            tilt_weighs=self.tilt_weighs,
            dimension_over_rho=self.table.dimension_over_rho,
        )
