"""One gradient estimate: the passes of a step, what moves between them, and how everything is put back.

noise:  draw, [closure], weigh            ascent: draw, [closure], norm and ascend, [closure], weigh
where a sample's weighing and the next one's draw are over the same tensors, one pass does both.
Words moved per float32 element (s samples): noise 5 s, ascent 9 s, ascent with s = 1 and radius 0 (SAM) 7.
Invariant: `saved` holds the bits of every parameter that has moved; whatever way a step ends, they go back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import _cuda, _ops
from .functional.checks import NOISES, is_dense
from .functional.spread import Spread
from .functional.state import STEP_HELD, Slot, new_state
from .module_state import NormStatistics, RandomMasks
from .sample import Sample
from .settings import Settings, reject
from .table import Table, taken


def is_own(gradient: Tensor) -> bool:
    """Whether a gradient's memory is its alone.

    A view, or a gradient inside a larger storage (a reducer's bucket), is overwritten by the next backward pass.
    """
    whole = gradient.untyped_storage().nbytes() == gradient.nbytes
    return whole and not gradient._is_view() and (gradient.is_contiguous() or is_dense(gradient))


class Estimate:
    """The passes of one step over ``table``; see the module's docstring. ``saved`` is the caller's scratch."""

    def __init__(
        self,
        table: Table,
        settings: Settings,
        saved: dict[Tensor, tuple[Any, Tensor]],
        *,
        seed: int,
        step: int | Tensor,
        plain: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self.table, self.settings, self.plain = table, settings, plain
        self.seed = seed
        self.num_samples = 1 if plain else settings.num_samples
        self.spread = Spread(table.parameters)
        self.state = new_state(self.num_samples * self.rows_per_sample, self.spread.home)
        self.spread.follow(self.state)
        self.capturing = any(map(_cuda.capturing, self.spread.devices))
        if isinstance(step, Tensor):  # counted on the device, where a captured step finds it at each replay
            if not self.spread.alone:
                raise reject("capturable", True, f"False, as the parameters lie on {self.spread}")
            self.state[Slot.STEP] = step
            self.step, self.noise_step = 0, STEP_HELD
        elif self.capturing:
            raise RuntimeError("TSAM: a step in a CUDA graph needs capturable=True: replays would draw no new noise.")
        else:
            self.step, self.noise_step = step, step % (1 << 32)
        self.first_loss: Tensor | None = None
        self.current: Sample | None = None
        self.closed = False
        self.rows: int | None = None  # rows of the batch, once part() has seen it
        self._part_called = False
        self._model = model
        self._scratch = saved
        self._origin: dict[int, Tensor] = {}  # parameters that have moved -> their bits at the start
        self._saves: list[list[int]] = []  # which parameters each saving op was to save
        self._buffers: list[Tensor | None] = []
        self._masks: RandomMasks | None = None
        self._statistics: NormStatistics | None = None
        self._tilt = self.state[Slot.TILT]
        self._drawn = -1  # the sample that the parameters have been moved to already
        self._sums: dict[int, Tensor] = {}  # parameters with a gradient -> its weighted mean so far
        self._forms = [(p, p.stride(), p.dtype) for p in table.parameters]
        self._moved, self._base = taken(table.parameters, table.moves), taken(table.base, table.moves)
        self._adaptive, self._radius = taken(table.adaptive, table.moves), taken(table.radius, table.moves)

    def passes(self) -> Iterator[Sample]:
        """One item a gradient. Ending early, by break or exception, puts everything back."""
        try:
            self._begin()
            index = 0
            while index < self.num_samples:
                for probe in (True, False) if self._ascends else (False,):
                    self.current = Sample(self, index, probe)
                    self._prepare(index, probe)
                    yield self.current
                    if not self.current.done:
                        raise RuntimeError("TSAM: run each item of samples() as 'with sample: ...'.")
                index += 1
            self._complete()
        finally:
            self.abort()

    @property
    def repeats(self) -> bool:
        """Whether the step runs the model more than once."""
        return self.num_samples > 1 or self._ascends

    @property
    def rows_per_sample(self) -> int:
        """Counted states a sample, each a row of ``state``."""
        return 1

    @property
    def _ascends(self) -> bool:
        return self.settings.sampler == "ascent" and not self.plain

    def part_bounds(self, rows: int) -> tuple[int, int]:
        """First and last row (exclusive) that the current sample sees of a batch of ``rows``."""
        sample = self.current
        if self.plain or self.settings.batch == "whole" or sample is None:
            return 0, rows
        if rows < 1:
            raise reject("part", "an empty batch", "at least one row")
        if self.rows is None:
            self.rows, self.num_samples = rows, min(self.num_samples, rows)
        elif rows != self.rows:
            raise reject("part", f"{rows} rows", f"{self.rows}, as in the earlier passes of this step")
        self._part_called = True
        return sample.index * rows // self.num_samples, (sample.index + 1) * rows // self.num_samples

    @torch.no_grad()
    def _begin(self) -> None:
        self._masks = RandomMasks(() if self.capturing else self.spread.devices)
        self._statistics = NormStatistics(self._model)
        self._buffers = [parameter.grad for parameter in self.table.parameters]
        self._tilt = self.scalar(0.0 if self.plain else self.settings.tilt_at(self.step))
        self.spread.run(_ops.tilt_begin_, (), self.state, self._tilt)

    def scalar(self, value: float | Tensor) -> Tensor:
        """A number as the kernels take it."""
        if isinstance(value, Tensor):
            return value.detach()
        return torch.full((), value, dtype=torch.float64, device=self.state.device)

    @torch.no_grad()
    def _prepare(self, index: int, probe: bool) -> None:
        if (probe or not self._ascends) and not self.plain:
            if self.table.draws:
                if self._drawn != index:
                    self.perturb(index)
            elif self.first_loss is not None:
                self.restore()
        self.clear_gradients()

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Before each pass: the random numbers of the first one, and no gradients."""
        first = self.first_loss is None
        if not first and self.settings.same_masks and self._masks is not None:
            self._masks.rewind()
        for parameter in self.table.parameters:
            parameter.grad = None

    @torch.no_grad()
    def end_pass(self, sample: Sample) -> None:
        """Takes the gradients of the pass that has just run: ascends along them, or adds them to the mean."""
        assert sample.loss is not None and self._statistics is not None
        split = self.settings.batch == "split" and not self.plain
        if split and not self._part_called:
            raise RuntimeError("TSAM: batch='split' needs opt.part(...) around the batch in each pass.")
        if self.first_loss is None:
            self.first_loss = sample.loss.clone()
        self._statistics.end_pass()
        gradients = self.gradients()
        if sample.probe:
            self.ascend(gradients, sample.index)
        else:
            log_size = 0.0
            if split and self.rows is not None:
                begin, end = self.part_bounds(self.rows)
                # Relative to the first part: parts of equal size leave every exponent untouched.
                log_size = math.log((end - begin) / (self.rows // self.num_samples))
            last = sample.index == self.num_samples - 1
            skip = self.settings.skip_nonfinite_loss
            self.spread.run(_ops.tilt_update_, (), self.state, sample.loss, log_size, sample.index, skip, last)
            if not last and self._merges(gradients):
                self._accumulate_and_perturb(gradients, sample.index + 1)
            else:
                self._accumulate(gradients, adopt=sample.index == 0, zero=sample.index > 0)

    @torch.no_grad()
    def gradients(self) -> dict[int, Tensor]:
        """The gradients that this pass has left, each in its parameter's layout."""
        gradients = {}
        for i, (parameter, stride, dtype) in enumerate(self._forms):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                raise reject(f"{self.table.name(i)}.grad", f"a {gradient.layout} tensor", "a dense gradient")
            if gradient.stride() != stride or gradient.dtype != dtype:
                gradient = torch.empty_like(parameter).copy_(gradient)
            gradients[i] = gradient
        return gradients

    @torch.no_grad()
    def perturb(self, index: int) -> None:
        """theta = theta_0 + noise of sample ``index``; the first time theta_0 is saved in the same pass."""
        moves = self.table.moves
        saves = not self._origin
        if saves:
            self._saving(moves)
        saved = taken(self._origin, moves)
        self.spread.run(_ops.perturb_, moves, self._moved, saved, self.state, *self._draw(index), saves)
        increment_version(self._moved)

    def _draw(self, index: int) -> tuple[Any, ...]:
        """What an op has to know of the noise of sample ``index``."""
        settings = self.settings
        negate = settings.antithetic and index % 2 == 1
        counter = (self.seed, self.noise_step, index - negate, NOISES.index(settings.noise))
        return (self._radius, self._adaptive, self._base, *counter, self.table.dimension, negate)

    def _merges(self, gradients: dict[int, Tensor]) -> bool:
        """Whether the mean of these gradients and the next draw are one pass: over the same tensors, and both due."""
        same = self._sums.keys() == gradients.keys() and list(gradients) == self.table.moves
        return same and self.table.draws and not self.plain

    def _accumulate_and_perturb(self, gradients: dict[int, Tensor], index: int) -> None:
        """Brings the mean up to this sample and moves the parameters to sample ``index``."""
        moves = self.table.moves
        mean, saved = taken(self._sums, moves), taken(self._origin, moves)
        lists = (mean, list(gradients.values()), self._moved, saved)
        self.spread.run(_ops.accumulate_perturb_, moves, *lists, self.state, *self._draw(index))
        increment_version(self._moved)
        self._drawn = index

    @torch.no_grad()
    def ascend(self, gradients: dict[int, Tensor], row: int) -> None:
        """theta += rho D (D g) / |D g| over all perturbed parameters with a gradient; saves those not yet saved."""
        table = self.table
        moves = list(filter(gradients.__contains__, table.moves))
        if not moves:
            return
        saved = list(filter(self._origin.__contains__, moves))
        fresh = [i for i in moves if i not in self._origin] if len(saved) < len(moves) else []
        # A parameter not yet saved has not moved: it is its own origin.
        origins = [self._origin.get(i, table.parameters[i]) for i in moves]
        adaptive = taken(table.adaptive, moves)
        self.spread.run(_ops.grad_norm_, moves, taken(gradients, moves), origins, self.state, adaptive, row)
        for chosen, save in ((saved, False), (fresh, True)):
            if chosen:
                if save:
                    self._saving(chosen)
                self.spread.run(
                    _ops.ascend_,
                    chosen,
                    taken(table.parameters, chosen),
                    taken(self._origin, chosen),
                    taken(gradients, chosen),
                    self.state,
                    taken(table.rho, chosen),
                    taken(table.adaptive, chosen),
                    save,
                )
        increment_version(taken(table.parameters, moves))

    def _saving(self, indices: list[int]) -> None:
        """Announces that the next op saves these parameters, and finds scratch for them.

        The op counts itself in the state, so that an interrupt between this line and the op, or right after the op,
        leaves no doubt whether the scratch holds the parameters.
        """
        self._saves.append(indices)
        for i in indices:
            parameter = self.table.parameters[i]
            form = (parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
            found = self._scratch.get(parameter)
            if found is None or found[0] != form:
                found = self._scratch[parameter] = form, torch.empty_like(parameter, requires_grad=False)
            self._origin[i] = found[1]

    def _accumulate(self, gradients: dict[int, Tensor], *, adopt: bool, zero: bool) -> None:
        """Brings the mean up to this sample.

        ``adopt``: the first gradient's own memory becomes the mean's. ``zero``: a mean that begins here begins at 0, as
        earlier samples had no gradient.
        """
        if gradients.keys() == self._sums.keys():  # all samples but the first, as a rule
            if gradients:
                sums = taken(self._sums, gradients)
                self.spread.run(_ops.accumulate_, gradients, sums, list(gradients.values()), self.state)
            return
        adopted: dict[int, Tensor] = {}
        blended: dict[int, tuple[Tensor, Tensor]] = {}
        for i in sorted(self._sums.keys() | gradients.keys()):
            gradient, total, buffer = gradients.get(i), self._sums.get(i), self._buffers[i]
            if gradient is None:
                assert total is not None
                gradient = torch.zeros_like(self.table.parameters[i], requires_grad=False)
            elif total is None:
                total = self._new_sum(gradient, buffer, zero=zero, adopt=adopt)
                if adopt and total is None:
                    adopted[i] = self._sums[i] = gradient
                    continue
                assert total is not None
                self._sums[i] = total
            blended[i] = (total, gradient)
        if adopted:
            self.spread.run(_ops.accumulate_, adopted, list(adopted.values()), [], self.state)
        if blended:
            totals, added = ([pair[k] for pair in blended.values()] for k in (0, 1))
            self.spread.run(_ops.accumulate_, blended, totals, added, self.state)

    def _new_sum(self, gradient: Tensor, buffer: Tensor | None, *, zero: bool, adopt: bool) -> Tensor | None:
        """Memory for a mean: the buffer that p.grad was, or new; None where the gradient itself may and can serve."""
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        apart = buffer is not None and buffer.data_ptr() != gradient.data_ptr()
        if buffer is not None and apart and buffer.dtype == wide and buffer.stride() == gradient.stride():
            return buffer.zero_() if zero else buffer
        if adopt and self.adoptable(gradient, buffer):
            return None
        total = torch.empty_like(gradient, dtype=wide)
        return total.zero_() if zero else total

    @staticmethod
    def adoptable(gradient: Tensor, buffer: Tensor | None) -> bool:
        """Whether a gradient's memory can become the mean's, where p.grad was ``buffer``."""
        return buffer is None and gradient.dtype in (torch.float32, torch.float64) and is_own(gradient)

    @torch.no_grad()
    def restore(self) -> None:
        """theta = theta_0, bit for bit, for every parameter that has moved."""
        if self._origin:
            parameters = taken(self.table.parameters, self._origin)
            self.spread.run(_ops.restore_, self._origin, parameters, list(self._origin.values()))
            increment_version(parameters)

    @torch.no_grad()
    def _complete(self) -> None:
        self.restore()
        for i, parameter in enumerate(self.table.parameters):
            total, buffer = self._sums.get(i), self._buffers[i]
            if buffer is not None:
                if total is None:
                    buffer.zero_()
                elif total is not buffer:
                    buffer.copy_(total)
                parameter.grad = buffer
            elif total is not None:
                parameter.grad = total if total.dtype == parameter.dtype else total.to(parameter.dtype)
            else:
                parameter.grad = None
        self.closed = True
        self._forget()

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
                for parameter, buffer in zip(self.table.parameters, self._buffers, strict=True):
                    parameter.grad = buffer if buffer is None or self.capturing else buffer.zero_()
                self._masks.rewind()
                if not self.capturing:
                    self._statistics.rewind()
                self._forget()

    def _forget(self) -> None:
        """Lets go of everything the size of the parameters but the scratch."""
        self._sums, self._buffers, self._origin = {}, [], {}

    def undo(self) -> None:
        """As :meth:`restore`, after an exception too: trusts only the copies that an op has finished (syncs once)."""
        try:
            self._put_back()
        except BaseException:
            self._put_back()  # a refused launch or Ctrl-C may come here too, and a copy can be copied again
            raise

    def _put_back(self) -> None:
        # Captured ops finish in their order; there is no number to read yet.
        if self._saves and not self.capturing:
            for device, finished in enumerate(self.spread.saves(self.state)):
                for i in itertools.chain(*self._saves[finished:]):
                    if self.spread.at(device, i):
                        self._origin.pop(i, None)
        self.restore()
