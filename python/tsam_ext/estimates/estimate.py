"""The passes of one step, whichever way it samples: how it begins, what ends a pass, and how everything is put back.

begin; then for each gradient [the user's forward and backward passes], take; complete, abort or skip.
Invariant: after complete the parameters are θ₀ and p.grad is the mean; after abort all is as before the step, p.grad
cleared. A leaf moves the parameters (passes it yields) and takes gradients; it never restores by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tsam_ext import _cuda, _ops
from tsam_ext.carry import UNCARRIED, FullStep, LaterStep
from tsam_ext.engine.checks import TO_NEAREST, TSAM, refuse
from tsam_ext.engine.grad_mode import without_grad
from tsam_ext.engine.spread import Spread
from tsam_ext.engine.state import STEP_HELD, Slot, new_state
from tsam_ext.gradients import Gradients
from tsam_ext.history import NO_BATCH, NO_GRADIENT, TWO_GRADIENTS, VERSION
from tsam_ext.loss_scale import scale_now
from tsam_ext.mean import Mean
from tsam_ext.module_state import Buffers, RandomMasks, drop_derived
from tsam_ext.origin import Origin
from tsam_ext.shards import begin_anew

from .displacement import realised
from .item import Sample
from .step import Report, Step

BACKWARD = (
    "the closure, or the body of samples(), has to compute the loss from the parameters and call backward() on it"
)


class Estimate(ABC):
    """One step over ``step.table``; see the module's docstring."""

    tilt_weighs = True
    carries: type[FullStep] | type[LaterStep] = FullStep
    diagnostics: tuple[str, ...] = ("losses", "weights", "ess", "tilted_loss", "num_nonfinite")

    def __init__(self, step: Step, states_per_sample: int = 1) -> None:
        self.table, self.step = step.table, step
        self.num_samples, self.states_per_sample = step.num_samples, states_per_sample
        self.together = step.together
        self.spread = Spread(step.table.tensors, step.together.shards, step.table.places)
        nowhere = [p for p in step.table.parameters if p.is_meta] if self.spread.has_meta else []
        if any(not isinstance(parameter, FakeTensor) for parameter in nowhere):
            raise refuse(TSAM, "params", "tensors on meta", "tensors in memory (build TSAM after module.to_empty())")
        self.state = new_state(self.num_samples * states_per_sample, self.spread.home)
        self.spread.follow(self.state)
        self.capturing = any(map(_cuda.capturing, self.spread.devices))
        if isinstance(step.count, Tensor):  # counted on the device, where a captured step finds it at each replay
            if not self.spread.alone or self.together.several:
                got = f"True with parameters on {self.spread}" + " of several ranks" * self.together.several
                raise refuse(TSAM, "capturable", got, "False, or parameters on one device of one process")
            self.state[Slot.STEP] = step.count
            self.noise_step = STEP_HELD
        elif self.capturing:
            raise RuntimeError("TSAM: a step in a CUDA graph needs capturable=True: replays would draw no new noise.")
        else:
            self.noise_step = step.count % (1 << 32)
        self.scale = scale_now(step.scaler, self.spread.home)
        self.product = False
        self.first_loss: Tensor | None = None  # of all ranks, where there are several
        self._loss_dtype = torch.float64  # as it was recorded
        self.current: Sample | None = None
        self.closed = self.skipped = False
        self.tilt = self.state[Slot.TILT]
        self.origin = Origin(step.table, self.spread, self.state, step.scratch, self.capturing)
        self.mean = Mean(step.table, self.spread, self.state)
        self.gradients = Gradients(step.table, self.mean)
        self._masks: RandomMasks | None = None
        self._kept_buffers: Buffers | None = None
        self._passes = 0
        self._versions: list[int] | None = None  # of what moves, before the pass
        of_step = step.table, self.spread, step.num_samples
        self.carrying = UNCARRIED if step.carry is None else self.carries(step.carry, *of_step)
        self.half = step.table.half
        self.rounds = step.rounding == "stochastic" and bool(self.half)
        self._realised: Tensor | None = None

    @abstractmethod
    def moves(self) -> Iterator[Sample]:
        """The passes of the step, one item per gradient; before each the parameters are moved to where it is taken."""

    @abstractmethod
    def take(self, sample: Sample, loss: Tensor, gradients: dict[int, Tensor]) -> None:
        """What the gradients of the pass that has just run are for."""

    @abstractmethod
    def move_to(self, sample: int) -> None:
        """Moves the parameters to θ₀+ε of ``sample``, outside a step."""

    @without_grad
    def visit(self, sample: int) -> None:
        """Moves the parameters to θ₀+ε of ``sample``, outside a step; :meth:`undo` brings them back."""
        self.move_to(sample)
        drop_derived(self.step.sharded)

    @without_grad
    def first_half(self) -> None:
        """:meth:`visit` after a pass that the user has run: its gradient has to be there, its buffers are to stay."""
        table, history = self.table, self.step.history
        if any(parameter.grad is not None for parameter in table.parameters[: table.own]):
            history.gradient_seen = True
        elif table.own and not history.gradient_seen:
            raise RuntimeError(f"TSAM: no parameter has got a gradient: {BACKWARD}. Nothing was updated.")
        if any(parameter.grad is not None for parameter in table.parameters[table.own :]):
            history.tell(TWO_GRADIENTS)
        self._kept_buffers = Buffers(self.step.modules, history, capturing=self.capturing)
        self.visit(0)

    @without_grad
    def second_half(self) -> None:
        """θ₀ back, and the buffers as the first pass has left them."""
        self.undo()
        if self._kept_buffers is not None:
            self._kept_buffers.end_pass()  # which learns what moves
            self._kept_buffers.rewind()

    @property
    def repeats(self) -> bool:
        """Whether the step runs the model more than once."""
        return True

    def take_part(self, rows: int) -> tuple[int, int]:
        """Notes that the current pass asks for its rows of a batch; first and last row (exclusive): all of them."""
        return 0, rows

    def saw(self, batch: tuple[Any, ...]) -> None:
        """Takes note of the batch that the current pass asks for; other ranks' may count by their rows."""
        self.together.saw(batch)

    def passes(self) -> Iterator[Sample]:
        """One item per gradient. Ending early, by break or exception, puts everything back."""
        try:
            self._begin()
            yield from self.moves()
            self.complete()
        except Exception as error:
            self.together.fail(error)
            raise
        finally:
            self.current = None
            self.abort()

    @without_grad
    def _begin(self) -> None:
        step, capturing = self.step, self.capturing
        self.together.begin(self.table, self.spread.home, self._restart)
        self.mean.begin()
        if not capturing:
            step.history.check_found(self.mean.found[: self.table.own] if self.mean.finds else ())
        self._kept_buffers = Buffers(step.modules, step.history, capturing=capturing)
        self._masks = RandomMasks(() if capturing else self.spread.devices, () if capturing else step.generators)
        self.tilt = self.scalar(step.tilt)
        self.spread.run(_ops.tilt_begin_, (), self.state, self.tilt)
        self.carrying.begin()

    @property
    def counts_apart(self) -> bool:
        """Whether passes that count steer nothing, so that ranks may add up their means instead of their gradients."""
        return False

    @without_grad
    def _restart(self, seed: int) -> None:
        """Ranks have come to know each other in the first pass, whose model has not run yet: its place may change."""
        self.step = replace(self.step, seed=seed)
        self.origin.restore()
        assert self.current is not None
        if self.current.index != self.together.first:
            self.current.index = self.together.first
            if self.current.index >= self.num_samples:
                got = f"{self.num_samples} with sync='samples' and more ranks than that"
                raise refuse(TSAM, "num_samples", got, "as many as ranks, or model=ddp, by which ranks know each other")
        self.move_again(self.current.index)
        self._note_versions()
        drop_derived(self.step.sharded)

    @abstractmethod
    def move_again(self, sample: int) -> None:
        """Moves the parameters from θ₀ to where the step's first gradient is taken; they have been moved already."""

    def scalar(self, value: float | Tensor) -> Tensor:
        """What a loss is multiplied by, as the kernels take it: negative where the base optimizer maximizes."""
        maximize = self.table.maximize
        if isinstance(value, Tensor):
            return value.detach().neg() if maximize else value.detach()
        return torch.full((), -value if maximize else value, dtype=torch.float64, device=self.state.device)

    def one_pass(self, index: int, *, probe: bool, steers: bool, last: bool) -> Iterator[Sample]:
        """Yields one item, with no gradients and the random numbers of the step's first pass.

        ``steers``: its gradient moves the parameters. ``last``: it is the last of the step.
        """
        self.current = Sample(self, index, probe, steers=steers, last=last)
        if self.first_loss is not None and self.step.same_masks and self._masks is not None:
            self._masks.rewind()
        for parameter in self.table.parameters:
            parameter.grad = None
        drop_derived(self.step.sharded)
        self._passes += 1
        self._note_versions()
        together = self.together
        if together.several:
            if last:
                together.before_last(self.mean)
            together.begin_pass(steers=steers, last=last)
        yield self.current
        if together.several:
            together.end_pass()
        if not self.current.done:
            raise RuntimeError("TSAM: run each item of samples() as 'with sample: ...'.")

    def _note_versions(self) -> None:
        # A forward that writes parameters does so early; two passes of a step are looked at, as it takes some time.
        moved = self.table.moved.tensors if self._passes <= 2 and self.repeats else []
        self._versions = list(map(VERSION, moved))

    @without_grad
    def end_pass(self, sample: Sample, loss: Tensor) -> None:
        """After the user's backward pass: its loss, the buffers that it moved, its gradients."""
        if self._kept_buffers is not None and self._masks is not None:
            if self.first_loss is None:
                self._masks.end_first_pass()
            self._kept_buffers.end_pass()
        self._check_unwritten()
        gradients = self.gradients.gather()
        if next(iter(gradients), self.table.own) < self.table.own:
            self.step.history.gradient_seen = True
        elif self.table.own:
            self._without_gradients(sample)
        self._loss_dtype = loss.dtype
        together = self.together
        if together.several:
            loss = together.meet(loss, self.num_samples)
            gradients = together.weigh(gradients, steers=sample.steers)
            if self.first_loss is None:
                together.prepare(self.mean, counts_apart=self.counts_apart)
            if sample.last:
                together.after_last(self.mean)
        if self.first_loss is None:
            self.first_loss = loss.clone()
        self.take(sample, loss, gradients)

    def _check_unwritten(self) -> None:
        """Refuses a pass that has written a parameter which is about to be put back."""
        if self._versions:
            moves = self.table.moves
            now = list(map(VERSION, self.table.moved.tensors))
            if now != self._versions:
                i = next(i for i, old, new in zip(moves, self._versions, now, strict=True) if old != new)
                raise RuntimeError(
                    f"TSAM: {self.table.name(i)} was written by the closure or the forward pass "
                    "(Embedding(max_norm=...), clamp_, ...) while it was perturbed, and would be put back. Nothing was "
                    "updated. Write it after the step instead, under torch.no_grad()."
                )

    def _without_gradients(self, sample: Sample) -> None:
        if not self.step.history.gradient_seen:
            raise RuntimeError(f"TSAM: no parameter has got a gradient: {BACKWARD}. Nothing was updated.")
        if not sample.differentiable:
            raise RuntimeError(
                f"TSAM: a pass left no gradient, and its loss has none: {BACKWARD}. Nothing was updated."
            )
        self.step.history.tell(NO_GRADIENT)

    def rounding(self, number: int) -> int:
        """An op's ``rounding``, with this sample of the counter where there is anything to round stochastically."""
        return number if self.rounds else TO_NEAREST

    @without_grad
    def measure(self, gradients: dict[int, Tensor]) -> None:
        """Notes for the report how far half-precision parameters are from θ₀, and how far along these gradients."""
        if self.half:
            norm = self.state[Slot.GRAD_NORM]
            self._realised = realised(self.table, self.spread, self.origin.copies, self.half, gradients, norm)

    @without_grad
    def complete(self) -> None:
        """θ₀ back, and the mean of all ranks into p.grad."""
        together = self.together
        if self.first_loss is None:  # no sample was this rank's
            together.prepare(self.mean, counts_apart=self.counts_apart)
        self.first_loss = together.finish(self.mean, self.state, self.first_loss, self.states_per_sample)
        self.end_mean()
        self.origin.restore()
        drop_derived(self.step.sharded)
        self.step.history.leave(self.mean.hand_over(mixed=self.gradients.mixed))
        self.closed = True
        self.forget()

    def end_mean(self) -> None:
        """The mean is that of all ranks: what it leaves for later steps, or gets from earlier ones."""
        self.carrying.complete(self.mean.sums, self.together)

    @without_grad
    def skip(self) -> None:
        """The batch was no batch: parameters go back, and p.grad with its values.

        Generators and buffers stay as the closure has left them: who skips at random would draw the same again.
        """
        self.together.skip()
        self.closed = self.skipped = True
        self.undo()
        self.mean.give_back(zero=False)
        self.forget()
        if not self.step.history.gradient_seen:
            self.step.history.tell(NO_BATCH)

    def fail(self, error: BaseException | None) -> None:
        """As :meth:`abort`, by an exception, which other ranks get to know of."""
        try:
            self.together.fail(error)
        finally:
            self.abort()

    @without_grad
    def abort(self) -> None:
        """Puts parameters, gradients, generators and buffers back to before the step. Idempotent."""
        if self.together.several:
            self.together.end_pass()
        if self.closed:
            return
        self.closed = True
        try:
            if not self.capturing:  # under capture nothing has run, and what ends takes no more launches
                self.undo()
        finally:
            drop_derived(self.step.sharded)
            if self.step.sharded:
                begin_anew(self.step.sharded)
            if self._masks is not None and self._kept_buffers is not None:
                self.mean.give_back(zero=not self.capturing)
                self._masks.rewind()
                if not self.capturing:
                    self._kept_buffers.rewind()
                self.forget()

    @without_grad
    def undo(self) -> None:
        """θ₀ back, after an exception too."""
        self.origin.undo()
        self.origin.forget()
        drop_derived(self.step.sharded)

    @without_grad
    def originals(self) -> list[tuple[Tensor, Tensor]]:
        """What the step has written, and a copy of what it was before: parameters that have moved, buffers. Syncs."""
        table, moved = self.table, []
        for i, copy in self.origin.finished().items():
            moved.append((table.parameters[i], torch.view_as_complex(copy) if table.dtypes[i].is_complex else copy))
        return moved + ([] if self._kept_buffers is None else self._kept_buffers.saved())

    def forget(self) -> None:
        """Lets go of everything of the size of the parameters but the scratch."""
        self.mean.forget()
        self.origin.forget()
        self.carrying.forget()

    @property
    def has_left_gradients(self) -> bool:
        """Whether any parameter of the optimizer has a gradient now."""
        return any(parameter.grad is not None for parameter in self.table.parameters[: self.table.own])

    @property
    def loss(self) -> Tensor:
        """The loss of the step's first pass, over all ranks."""
        assert self.first_loss is not None
        return self.first_loss.to(self._loss_dtype)

    @property
    def report(self) -> Report:
        """What diagnostics and health of the completed step are computed from."""
        return Report(
            state=self.state,
            num_samples=self.num_samples,
            names=self.diagnostics + ("carried_ratio",) * (self.carrying.scalars is not None),
            states_per_sample=self.states_per_sample,
            tilt_weighs=self.tilt_weighs,
            dimension_over_rho=self.table.dimension_over_rho,
            first_loss=self.first_loss,
            loss_dtype=self._loss_dtype,
            moved=self.table.draws,
            split=self.step.split,
            scale=self.scale,
            rho=0.0 if self.scale is None else max(self.table.rho, default=0.0),
            product=self.product,
            realised=self._realised,
            direction=self.carrying.scalars,
        )
