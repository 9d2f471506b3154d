"""The hmc ops over one list of tensors: where a Markov chain's positions and momenta lie, and what each op is told.

Layout: theta = saved + T x, T = rho D (ball) or rho D/√d (gaussian); three buffers x per tensor, of which the chain's
scalars (csrc/core/metropolis.h) say which holds its state and which the proposal; one momentum per tensor.
Invariant: the constant arguments are written down once, here, in the order of csrc/ops/schema.cpp; nothing is decided.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import increment_version

from . import _ops
from .engine.checks import TO_NEAREST
from .engine.spread import Spread

GAUSSIAN, BALL, FLAT = 0, 1, 2  # priors, as csrc/core/hmc.h numbers them
PRIORS = ("gaussian", "ball")  # those that a sampler may name


@dataclass
class PhaseSpace:
    """The tensors of a chain and what the ops have to know of them; :class:`TSAM` and ``hmc.sample`` call these.

    ``indices``: which tensors of the ``spread`` the lists are. ``state``: a step's float64 scalars, ``scalars``: the
    chain's. ``rho``, ``adaptive``, ``base``: per tensor; ``base`` is the element index of its first element in the
    noise. ``step`` numbers the noise. ``rounding``: of half-precision positions (csrc/core/round.h).
    """

    spread: Spread
    indices: list[int]
    position: list[Tensor]
    saved: list[Tensor]
    x: tuple[list[Tensor], list[Tensor], list[Tensor]]
    momentum: list[Tensor]
    scalars: Tensor
    state: Tensor
    rho: list[float]
    adaptive: list[bool]
    base: list[int]
    seed: int
    step: int
    dimension: int
    prior: int
    rounding: int = TO_NEAREST

    def place(self, *, draw: bool) -> None:
        """Saves the position as the origin, and moves it to the chain's state: a draw from the prior, or as it is."""
        self.spread.run(
            _ops.hmc_place_,
            self.indices,
            self.position,
            self.saved,
            *self.x,
            self.scalars,
            self.state,
            self.rho,
            self.adaptive,
            self.base,
            self.seed,
            self.step,
            self.dimension,
            self.prior,
            draw,
            self.rounding,
        )
        increment_version(self.position)

    def begin(self, gradients: list[Tensor], loss: Tensor, *, tilt: Tensor, delta: Tensor, automatic: bool) -> None:
        """Starts the counts of a step from the chain's state, its loss and its gradients."""
        self.spread.run(
            _ops.hmc_begin_,
            self.indices,
            self.saved,
            gradients,
            self.scalars,
            self.state,
            loss,
            tilt,
            delta,
            automatic,
            self.rho,
            self.adaptive,
            self.dimension,
            self.prior,
        )

    def leapfrog(
        self, gradients: list[Tensor], *, trajectory: int, kick: float, drift: float, first: bool, measure: bool
    ) -> None:
        """A kick and a drift, in units of the chain's step size; the ``first`` of a trajectory draws the momentum."""
        self.spread.run(
            _ops.hmc_leapfrog_,
            self.indices,
            self.position,
            self.saved,
            self.momentum,
            *self.x,
            gradients,
            self.scalars,
            self.rho,
            self.adaptive,
            self.base,
            self.seed,
            self.step,
            trajectory,
            self.dimension,
            self.prior,
            kick,
            drift,
            first,
            measure,
            self.rounding,
        )
        increment_version(self.position)

    def end(
        self,
        gradients: list[Tensor],
        loss: Tensor,
        *,
        trajectory: int,
        kick: float,
        row: int,
        metropolis: bool,
        skip_nonfinite: bool,
        last: bool,
    ) -> None:
        """The last kick, the decision, and the weight of the state that the chain is in (``row`` −1: not counted)."""
        self.spread.run(
            _ops.hmc_end_,
            self.indices,
            self.saved,
            self.momentum,
            gradients,
            self.scalars,
            self.state,
            loss,
            self.rho,
            self.adaptive,
            self.seed,
            self.step,
            trajectory,
            self.dimension,
            self.prior,
            kick,
            row,
            metropolis,
            skip_nonfinite,
            last,
        )

    def recycle(
        self, loss: Tensor, *, share: float, row: int, part: int, metropolis: bool, skip_nonfinite: bool, last: bool
    ) -> None:
        """The weight of one state of a trajectory; ``part``: inner, start or end (csrc/core/recycle.h)."""
        scalars = (self.scalars, self.state, loss)
        self.spread.run(_ops.hmc_recycle_, (), *scalars, share, row, part, metropolis, skip_nonfinite, last)

    def carry(
        self,
        indices: Iterable[int],
        accumulator: list[Tensor],
        carried: list[Tensor],
        gradients: list[Tensor],
        *,
        count: bool,
    ) -> None:
        """The gradients of the chain's state go into ``carried`` and, where they ``count``, into the mean."""
        scalars = (self.scalars, self.state)
        self.spread.run(_ops.hmc_carry_, indices, accumulator, carried, gradients, *scalars, count)

    def adapt(self, highest: float) -> None:
        """Moves the log step size towards an acceptance of 0.8, at most up to ``highest``."""
        self.spread.run(_ops.hmc_adapt_, (), self.scalars, highest)
