"""Estimates at drawn perturbations: the plain gradient, noise alone, and noise followed by an ascent.

noise:  draw, [closure], weigh            ascent: draw, [closure], norm and ascend, [closure], weigh
where a sample's weighing and the next one's draw are over the same tensors, one pass does both.
Words moved per float32 element (s samples): noise 5 s, ascent 9 s, ascent with s = 1 and radius 0 (SAM) 7.
Invariant: a parameter is at θ₀, or its bits at θ₀ are with the origin.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import increment_version

from tsam_ext import _ops
from tsam_ext.carry import FullStep, LaterStep
from tsam_ext.engine.checks import TSAM, refuse
from tsam_ext.engine.grad_mode import without_grad
from tsam_ext.table import taken

from .estimate import Estimate
from .item import Sample
from .parts import Parts
from .step import Step


class PlainEstimate(Estimate):
    """The gradient at θ₀, whatever the sampler: what the steps between those of ``every`` take."""

    tilt_weighs = False
    carries = LaterStep

    @property
    def repeats(self) -> bool:
        """Never."""
        return False

    @property
    def counts_apart(self) -> bool:
        """Its one gradient moves nothing: it travels as a mean does, or is reduced by its own pass."""
        return True

    def moves(self) -> Iterator[Sample]:
        """One pass, where the parameters are."""
        yield from self.one_pass(0, probe=False, steers=False, last=True)

    def move_again(self, sample: int) -> None:
        """Nowhere but θ₀."""

    def take(self, sample: Sample, loss: Tensor, gradients: dict[int, Tensor]) -> None:
        """The gradient is the mean."""
        skip = self.step.skip_nonfinite_loss
        self.spread.run(_ops.tilt_update_, (), self.state, loss, 0.0, 0, skip, True)
        self.mean.add(gradients, adopt=True, zero=False)

    def move_to(self, sample: int) -> None:
        """Nowhere but θ₀."""


class PerturbationEstimate(Estimate):
    """A draw per sample, and an ascent along the gradient there if it ``ascends``; ``noise`` is a kind's number."""

    def __init__(self, step: Step, *, noise: int, antithetic: bool, ascends: bool) -> None:
        super().__init__(step)
        self.parts = Parts(step.num_samples) if step.split else None
        if ascends:
            self.diagnostics = (*self.diagnostics, "gradient_norms", "implied_delta")
        if self.half:
            names = ("realised_norm", "realised_ascent") if ascends else ("realised_norm",)
            self.diagnostics = (*self.diagnostics, *names)
        self._antithetic, self._ascends, self._kind = antithetic, ascends, noise
        self._probe: dict[int, Tensor] = {}  # a probe's gradients, until its sample is known to count
        self._drawn = -1  # the sample that the parameters have been moved to already
        self._moved = step.table.moved

    @property
    def repeats(self) -> bool:
        """Whether there is more than one sample, or a probe before the only one."""
        return self.num_samples > 1 or self._ascends

    def moves(self) -> Iterator[Sample]:
        """One pass per sample of this rank's; with an ascent a probe before it."""
        together = self.together
        index = together.first
        while index < self.num_samples:  # which part() may lower
            self._move_to(index)
            for probe in (True, False) if self._ascends else (False,):
                if self.parts is not None:
                    self.parts.asked = False
                last = not probe and index + together.stride >= self.num_samples
                for sample in self.one_pass(index, probe=probe, steers=probe, last=last):
                    yield sample
                    index = sample.index  # ranks that come to know each other in the first pass may share the samples
            index += together.stride

    @property
    def counts_apart(self) -> bool:
        """All but probes."""
        return True

    def move_again(self, sample: int) -> None:
        """As before the first pass, by what is known now; refused where that has taken another sample's rows."""
        if self.parts is not None and self.parts.asked and self.together.stride > 1:
            got = "'split' with sync='samples', and part() came before the model"
            raise refuse(TSAM, "batch", got, "'whole', or model=ddp, by which ranks know each other before the pass")
        self._move_to(sample)

    @without_grad
    def _move_to(self, index: int) -> None:
        """θ₀ + noise of sample ``index``, unless the sample before has moved there already."""
        if not self.table.draws:
            if self.first_loss is not None:
                self.origin.restore()
        elif self._drawn != index:
            self._perturb(index)

    def take_part(self, rows: int) -> tuple[int, int]:
        """Notes that the current pass asks for its rows of a batch; first and last row (exclusive) of them."""
        if self.parts is None or self.current is None:
            return 0, rows
        bounds = self.parts.take(rows, self.current.index)
        self.num_samples = self.parts.num_samples
        return bounds

    def take(self, sample: Sample, loss: Tensor, gradients: dict[int, Tensor]) -> None:
        """Ascends along the gradients of a probe; weighs the others into the mean."""
        if self.parts is not None and not self.parts.asked:
            raise RuntimeError("TSAM: batch='split' needs opt.part(...) around the batch in each pass.")
        index, skip, together = sample.index, self.step.skip_nonfinite_loss, self.together
        next_one = index + together.stride
        last = next_one >= self.num_samples
        log_size = 0.0 if self.parts is None else self.parts.log_size(index)
        if isinstance(self.carrying, FullStep):
            self._carry(self.carrying, sample, loss, log_size, gradients)
        if sample.probe:
            self._ascend(gradients, index)
        if last and sample.probe is self._ascends:
            self.measure(self.gradients.as_moved(gradients) if self._ascends else {})
        if sample.probe:
            return
        self.spread.run(_ops.tilt_update_, (), self.state, loss, log_size, index, skip, last and together.closes)
        if not last and self._merges(gradients):
            self._add_and_perturb(gradients, next_one)
        else:
            first = index == together.first
            self.mean.add(gradients, adopt=first, zero=not first)

    def _carry(
        self, full: FullStep, sample: Sample, loss: Tensor, log_size: float, gradients: dict[int, Tensor]
    ) -> None:
        """A sample's first gradient goes into the mean that a carried direction is measured against.

        Where samples may be skipped a probe's waits, in memory of its own, for the loss that decides it.
        """
        skip, reduced = self.step.skip_nonfinite_loss, self._ascends or self.mean.flat is None
        if self._ascends and skip and sample.probe:
            self._probe = gradients
        elif sample.probe is self._ascends or self._probe:
            first, self._probe = self._probe or gradients, {}
            memory = {"adopt": self._ascends, "reduced": reduced}
            full.add(sample.index, first, loss, log_size=log_size, skip=skip, **memory)

    def forget(self) -> None:
        """As the base class's, a probe's gradients too."""
        super().forget()
        self._probe = {}

    def move_to(self, sample: int) -> None:
        """The noise of ``sample``; with an ascent and gradients in p.grad, the ascent along them as well."""
        if self.table.draws:
            self._perturb(sample)
        if self._ascends:
            self._ascend(self.gradients.gather(), sample)

    def _noise(self, index: int) -> tuple[list[float], list[bool], list[int], int, int, int, int, int, bool]:
        """What an op has to know of the noise of sample ``index``, as perturb_ and accumulate_perturb_ take it."""
        negate = self._antithetic and index % 2 == 1
        counter = (self.step.seed, self.noise_step, self._number(index) - negate, self._kind)
        moved = self._moved
        return (moved.radius, moved.adaptive, moved.base, *counter, self.table.dimension, negate)

    def _number(self, index: int) -> int:
        """A sample's place in the noise: of ranks that sample for themselves each has its own."""
        return self.together.noise_offset + index

    def _perturb(self, index: int) -> None:
        """theta = theta_0 + noise of sample ``index``; the first time theta_0 is saved in the same pass."""
        moves, moved = self.table.moves, self._moved.tensors
        saves = not self.origin.copies
        if saves:
            self.origin.save(moves)
        saved = taken(self.origin.copies, moves)
        rounding = self.rounding(2 * self._number(index))
        self.spread.run(_ops.perturb_, moves, moved, saved, self.state, *self._noise(index), saves, rounding)
        increment_version(moved)

    def _merges(self, gradients: dict[int, Tensor]) -> bool:
        """Whether the mean of these gradients and the next draw are one pass: over the same tensors, and both due."""
        # Of all parameters there is one order, that of the list.
        lengths = {len(gradients), len(self.mean.sums), len(self.table.moves), len(self.table.parameters)}
        return len(lengths) == 1 and self.table.draws and not self.gradients.mixed

    def _add_and_perturb(self, gradients: dict[int, Tensor], index: int) -> None:
        """Brings the mean up to this sample and moves the parameters to sample ``index``."""
        moves = self.table.moves
        self.spread.run(
            _ops.accumulate_perturb_,
            moves,
            taken(self.mean.sums, moves),
            list(gradients.values()),
            self._moved.tensors,
            taken(self.origin.copies, moves),
            self.state,
            *self._noise(index),
            self.rounding(2 * self._number(index)),
        )
        increment_version(self._moved.tensors)
        self._drawn = index

    def _ascend(self, gradients: dict[int, Tensor], row: int) -> None:
        """theta += rho D (D g) / |D g| over all perturbed parameters with a gradient; saves those not yet saved.

        Where the base optimizer maximizes, the worse side is downhill.
        """
        table, copies, gradients = self.table, self.origin.copies, self.gradients.as_moved(gradients)
        moves = table.moves
        if len(gradients) < len(table.parameters):
            moves = list(filter(gradients.__contains__, moves))
        if not moves:
            return
        counter = (self.step.seed, self.noise_step, self.rounding(2 * self._number(row) + 1))
        if len(moves) == len(table.moves) and len(copies) in (0, len(moves)):
            self._ascend_all(gradients, row, counter)
            return
        saved = list(filter(copies.__contains__, moves))
        fresh = [i for i in moves if i not in copies] if len(saved) < len(moves) else []
        # A parameter not yet saved has not moved: it is its own origin.
        origins = [copies.get(i, table.tensors[i]) for i in moves]
        adaptive = taken(table.adaptive, moves)
        self.spread.run(_ops.grad_norm_, moves, taken(gradients, moves), origins, self.state, adaptive, row)
        for chosen, saves in ((saved, False), (fresh, True)):
            if chosen:
                if saves:
                    self.origin.save(chosen)
                rho = taken(table.rho, chosen)
                self.spread.run(
                    _ops.ascend_,
                    chosen,
                    taken(table.tensors, chosen),
                    taken(copies, chosen),
                    taken(gradients, chosen),
                    self.state,
                    [-length for length in rho] if table.maximize else rho,
                    taken(table.adaptive, chosen),
                    saves,
                    taken(table.base, chosen) if self.rounds else [],
                    *counter,
                )
        increment_version(taken(table.tensors, moves))

    def _ascend_all(self, gradients: dict[int, Tensor], row: int, counter: tuple[int, int, int]) -> None:
        """The same in one call, where all that moves has a gradient, and either all of it is saved or nothing."""
        moves, moved, origin = self.table.moves, self._moved, self.origin
        saves = not origin.copies
        if saves:
            origin.save(moves)
        self.spread.run(
            _ops.norm_ascend_,
            moves,
            moved.tensors,
            taken(origin.copies, moves) if saves or any(moved.scales) else [],
            taken(gradients, moves),
            self.state,
            moved.ascent,
            moved.scales,
            saves,
            row,
            moved.base if self.rounds else [],
            *counter,
        )
        increment_version(moved.tensors)
