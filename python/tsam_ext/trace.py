"""What a run of Hamiltonian Monte Carlo hands back: the draws of one chain, how each came about, and how to go on.

Layout: one row a draw in every tensor, on the chain's device; ``state`` is a plain dict, for torch.save and
torch.load(weights_only=True).
Invariant: rows and state speak of whole transitions alone, in an interrupted run too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .engine.checks import refuse
from .engine.state import CHAIN_SLOTS, ChainSlot
from .walk import Walk

STATE_VERSION = 1

Draws = TypeVar("Draws", Tensor, list[Tensor])


@dataclass(frozen=True)
class Trace(Generic[Draws]):
    """What :func:`sample` found: the draws of one chain and how each came about.

    Attributes:
        draws: a tensor per entry of ``position``: ``[num_samples, *shape]``, of its dtype and on its device. One
            tensor, without a list, where ``position`` was a tensor.
        log_density: ``[num_samples]``, float64: the log density at each draw.
        acceptance_rate: ``[num_samples]``, float64: min(1, e^(-energy error)) of the proposal behind each draw.
        diverging: ``[num_samples]``, bool: the energy error was above 1000 in magnitude or not finite; so is a proposal
            outside the support of the density, and one where ``log_density`` raised (``on_error="reject"``).
        energy_error: ``[num_samples]``, float64: the change of the Hamiltonian along the trajectory.
        rounding: ``[num_samples]``, float64: about how far the rounding of the log density moves the energy error:
            |log density| times the relative spacing of the dtype that ``log_density`` returns (2⁻²³ for float32, 2⁻⁵²
            for float64, 2⁻⁷ for bfloat16, 2⁻¹⁰ for float16). Above 0.3 the accept test is rounding noise. It
            knows nothing of a coarser dtype inside ``log_density``.
        step_size: the step size of all draws (after burn-in), before jitter.
        errors: in how many transitions, of the burn-in too, ``log_density`` raised an exception that rejected.
        interrupted: whether the run ended before its last draw, by Ctrl-C or an exception; the tensors then have fewer
            rows than the run was to have.
        state: what :func:`resume` needs to go on, a dict for ``torch.save``: the last position, the number of
            transitions, and the run's options.
    """

    draws: Draws
    log_density: Tensor
    acceptance_rate: Tensor
    diverging: Tensor
    energy_error: Tensor
    rounding: Tensor
    step_size: float
    errors: int
    interrupted: bool
    state: dict[str, Any]

    def __len__(self) -> int:
        """The number of draws."""
        return len(self.log_density)

    def to_dict(self, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """The draws and their statistics as NumPy arrays, with a leading axis of length 1 for the chain.

        For ArviZ: ``arviz.from_dict(trace.to_dict())`` from 1.0 on, ``arviz.from_dict(**trace.to_dict())`` before.

        Args:
            names: a name a tensor of ``draws``; ``None``: x0, x1, ..., or x where ``draws`` is a tensor.

        Returns:
            ``{"posterior": {name: [1, num_samples, *shape]}, "sample_stats": {name: [1, num_samples]}}``; the
            statistics are lp, acceptance_rate, diverging and energy_error. NumPy has no bfloat16: float32 instead.

        Raises:
            TypeError, ValueError: not one name a tensor, or a name twice.
        """
        tensors = as_list(self.draws)
        op, expected = "hmc.Trace.to_dict", f"{len(tensors)} different names"
        if not isinstance(names, (list, tuple, type(None))):
            raise refuse(op, "names", type(names).__name__, f"a list of {expected}", TypeError)
        default = ["x"] if isinstance(self.draws, Tensor) else [f"x{i}" for i in range(len(tensors))]
        chosen = default if names is None else list(names)
        for i, name in enumerate(chosen):
            if not isinstance(name, str):
                raise refuse(op, f"names[{i}]", type(name).__name__, "a string", TypeError)
        if len(chosen) != len(tensors) or len(set(chosen)) != len(chosen):
            raise refuse(op, "names", names, expected)
        statistics = {
            "lp": self.log_density,
            "acceptance_rate": self.acceptance_rate,
            "diverging": self.diverging,
            "energy_error": self.energy_error,
        }
        return {
            "posterior": {name: _array(draws) for name, draws in zip(chosen, tensors, strict=True)},
            "sample_stats": {name: _array(values) for name, values in statistics.items()},
        }


class Rows:
    """Memory for the draws of one run, after those of the trace ``before``."""

    def __init__(self, walk: Walk, already: int, num_samples: int, before: Trace[Any] | None) -> None:
        self._walk, self._already, self._num_samples, self._before = walk, already, num_samples, before
        self._draws = [tensor.new_empty((num_samples, *tensor.shape)) for tensor in walk.kept]
        self._scalars = walk.scalars.new_empty((num_samples, CHAIN_SLOTS))

    def keep(self, draw: int) -> None:
        """The chain's state is the draw of this number, counted from the first of the chain."""
        row = draw - self._already
        self._scalars[row] = self._walk.scalars
        for stored, here in zip(self._draws, self._walk.kept, strict=True):
            stored[row] = here

    @torch.inference_mode(False)
    @torch.no_grad()
    def trace(self) -> Trace[Any]:
        """What whole transitions have made. Waits for the device."""
        walk, state = self._walk, self._walk.state()
        done = walk.options.num_draws(state["transitions"]) - self._already
        # Not a view of memory for draws that never came.
        draws, scalars = self._draws, self._scalars
        if done < self._num_samples:
            draws, scalars = [tensor[:done].clone() for tensor in draws], scalars[:done].clone()
        found: Trace[Any] = Trace(
            draws=draws[0] if walk.bare else draws,
            log_density=scalars[:, ChainSlot.LOSS].clone(),
            acceptance_rate=scalars[:, ChainSlot.ACCEPTANCE].clone(),
            diverging=scalars[:, ChainSlot.DIVERGENT] > 0.0,
            energy_error=scalars[:, ChainSlot.ENERGY].clone(),
            rounding=scalars[:, ChainSlot.LOSS].abs() * walk.epsilon,
            step_size=math.exp(state["log_step_size"]),
            errors=walk.complete.errors,
            interrupted=done < self._num_samples,
            state={"version": STATE_VERSION, "num_samples": self._already + self._num_samples, **state},
        )
        return found if self._before is None else _joined(self._before, found)


def as_list(draws: Tensor | list[Tensor]) -> list[Tensor]:
    """The tensors of a trace's draws."""
    return [draws] if isinstance(draws, Tensor) else draws


def _joined(first: Trace[Any], then: Trace[Any]) -> Trace[Any]:
    """One trace of a run in two parts: the rows of both, and the end of the second."""

    def both(name: str) -> Tensor:
        return torch.cat([getattr(part, name).to(then.log_density.device) for part in (first, then)])

    pairs = zip(as_list(first.draws), as_list(then.draws), strict=True)
    draws = [torch.cat([a.to(b.device), b]) for a, b in pairs]
    return replace(
        then,
        draws=draws[0] if isinstance(then.draws, Tensor) else draws,
        log_density=both("log_density"),
        acceptance_rate=both("acceptance_rate"),
        diverging=both("diverging"),
        energy_error=both("energy_error"),
        rounding=both("rounding"),
        errors=first.errors + then.errors,
    )


def _array(values: Tensor) -> Any:
    return (values.float() if values.dtype == torch.bfloat16 else values)[None].numpy(force=True)
