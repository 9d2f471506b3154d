"""Hamiltonian Monte Carlo in plain torch: a chain of states x with density ∝ prior(x) e^(δ L(θ₀ + T c x)).

q = T c g;  kick p += a q, a = δh times ½, 1, ..., 1, ½;  between them a drift for the time h, exact under the prior.
ΔH = Σ_kicks (a p·q + a²/2 q·q) - δ (L_N - L_0), p before the kick;  accepted when log U < -ΔH.
Recycling: state n of a trajectory counts α_n = min(1, e^(H_0 - H_n)), its start Σ_n (1 - α_n).
c and h: 1/√d and the step size (gaussian prior), 1 and the step size/√d (ball). Positions are float64 lists.
Invariant: a state carries its own loss and gradient; the start is no sample, a rejection repeats the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .drift import ball_drift, dot, rotation_drift
from .noise import ACCEPT, BALL_RADIUS, MOMENTUM, PERTURBATION, noise_scale, normal, uniform

DRIFTS = {"gaussian": rotation_drift, "ball": ball_drift}


class Draws(Protocol):
    """Where random numbers come from: normals over the list, and single uniforms, by purpose and sample."""

    def normal(self, purpose: int, sample: int) -> list[Tensor]:
        """Standard normals in the shapes of the list, float64."""

    def uniform(self, purpose: int, sample: int) -> float:
        """A uniform number in (0, 1)."""


@dataclass
class PhiloxDraws:
    """The documented scheme: a pure function of (seed, step, sample, purpose, element)."""

    like: Sequence[Tensor]
    offsets: Sequence[int]
    seed: int
    step: int = 0

    def normal(self, purpose: int, sample: int) -> list[Tensor]:
        """The normal of element offset + i lies at storage position i."""
        found = []
        for tensor, base in zip(self.like, self.offsets, strict=True):
            stored = normal(tensor.numel(), base, self.seed, self.step, sample, purpose, tensor.device)
            found.append(torch.as_strided(stored, tensor.shape, tensor.stride()))
        return found

    def uniform(self, purpose: int, sample: int) -> float:
        """The uniform of the last element."""
        return uniform(self.seed, self.step, sample, purpose)


@dataclass
class TorchDraws:
    """Torch's own generators, one after another, whatever purpose and sample are: fast."""

    like: Sequence[Tensor]
    generators: dict[torch.device, torch.Generator]

    def normal(self, purpose: int, sample: int) -> list[Tensor]:
        """The next normals."""
        return [
            torch.empty(t.shape, dtype=torch.float64, device=t.device).normal_(generator=self.generators[t.device])
            for t in self.like
        ]

    def uniform(self, purpose: int, sample: int) -> float:
        """The next uniform, of the first generator."""
        generator = next(iter(self.generators.values()))
        return float(torch.rand((), dtype=torch.float64, generator=generator, device=generator.device))


@dataclass
class ChainState:
    """A position x, the loss and its gradient q with respect to x there, and whatever else was computed there."""

    position: list[Tensor]
    loss: float
    gradient: list[Tensor]
    extra: Any = None


@dataclass
class Trajectory:
    """What an accept test saw and said."""

    energy: float
    log_uniform: float
    accepted: bool

    @property
    def acceptance(self) -> float:
        """min(1, e^-ΔH); 0 where that is not finite."""
        return math.exp(-max(self.energy, 0.0)) if math.isfinite(self.energy) else 0.0


Evaluate = Callable[[list[Tensor]], ChainState]


def scaled_loss(loss: Callable[[list[Tensor]], Tensor], scales: Sequence[Tensor | float]) -> Evaluate:
    """The target of a chain from a differentiable loss of the perturbations ε = scale x, one scale a tensor (T c)."""

    def evaluate(position: list[Tensor]) -> ChainState:
        x = [part.detach().requires_grad_() for part in position]
        with torch.enable_grad():
            value = loss([scale * part for scale, part in zip(scales, x, strict=True)])
            gradient = torch.autograd.grad(value, x)
        return ChainState(position, float(value.detach()), list(gradient))

    return evaluate


def leapfrog_coefficients(num_steps: int) -> list[tuple[float, float]]:
    """(kick, drift) as fractions of δh and h, in order; the last drift is none."""
    kicks = [0.5, *[1.0] * (num_steps - 1), 0.5]
    return list(zip(kicks, [1.0] * num_steps + [0.0], strict=True))


def integrate(
    evaluate: Evaluate,
    start: ChainState,
    momentum: Sequence[Tensor],
    coefficients: Sequence[tuple[float, float]],
    *,
    prior: str,
    delta: float,
    h: float,
    path: list[tuple[ChainState, float]] | None = None,
) -> tuple[ChainState, list[Tensor], float]:
    """One trajectory from ``start``: the state and the momentum at its end, and ΔH.

    ``path`` gets each state on the way, the end too, and what ΔH would be if the trajectory ended there.
    """
    state, p, energy = start, list(momentum), 0.0
    closing = coefficients[-1][0] * delta * h
    for n, (kick, drift) in enumerate(coefficients):
        a, q = kick * delta * h, state.gradient
        if path is not None and n > 0:
            work = closing * dot(p, q) + 0.5 * closing * closing * dot(q, q)
            path.append((state, energy + work - delta * (state.loss - start.loss)))
        energy += a * dot(p, q) + 0.5 * a * a * dot(q, q)
        p = [v + a * force for v, force in zip(p, q, strict=True)]
        if drift != 0.0:
            x, p = DRIFTS[prior](state.position, p, drift * h)
            state = evaluate(x)
    return state, p, energy - delta * (state.loss - start.loss)


class HamiltonianChain:
    """What lasts from step to step: position, step size and mean gradient norm; arguments as :class:`tsam_ext.TSAM`'s.

    ``start`` and then ``sample`` are one step; ``trajectories`` describes the last one, burn-in included.
    """

    def __init__(
        self,
        *,
        delta: float | str | None = None,
        delta_scale: float = 1.0,
        num_leapfrog_steps: int = 1,
        step_size: float | None = None,
        adapt_step_size: bool = True,
        prior: str = "gaussian",
        metropolis: bool = True,
        chain: str = "persistent",
        burn_in: int = 0,
        recycle: bool = False,
    ) -> None:
        quarter = math.pi / (2 * num_leapfrog_steps)
        first = quarter if step_size is None else step_size
        self.given_delta = delta
        self.delta_scale = delta_scale
        self.coefficients = leapfrog_coefficients(num_leapfrog_steps)
        self.adapt_step_size = adapt_step_size
        self.prior = prior
        self.metropolis = metropolis
        self.fresh = chain == "fresh"
        self.burn_in = burn_in
        self.recycle = recycle
        self.log_step, self.highest_log_step = math.log(first), math.log(max(first, quarter))
        self.gradient_norm, self.num_norms = 0.0, 0
        self.position: list[Tensor] | None = None
        self.delta = math.nan
        self.trajectories: list[Trajectory] = []

    def unit(self, dimension: int) -> float:
        """c: what the coordinates of this prior are to be multiplied with, beside T."""
        return max(dimension, 1) ** -0.5 if self.prior == "gaussian" else 1.0

    def start(self, evaluate: Evaluate, draws: Draws, tilt: float = 0.0) -> ChainState:
        """The state that the step begins with, and with it δ."""
        position = self.position
        if position is None or self.fresh:
            position = draws.normal(PERTURBATION, 0)
            if self.prior == "ball":
                radius = float(noise_scale(position, "ball", lambda: draws.uniform(BALL_RADIUS, 0)))
                position = [radius * z for z in position]
        state = evaluate(position)
        self.delta = self._delta_of(state, tilt)
        return state

    def _delta_of(self, state: ChainState, tilt: float) -> float:
        if not isinstance(self.given_delta, str):
            return tilt if self.given_delta is None else self.given_delta
        dimension = sum(q.numel() for q in state.gradient)
        norm = math.sqrt(dot(state.gradient, state.gradient)) / self.unit(dimension)
        if math.isfinite(norm):
            self.num_norms += 1
            self.gradient_norm += (norm - self.gradient_norm) / min(self.num_norms, 20)
        return self.delta_scale * math.sqrt(dimension) / self.gradient_norm if self.gradient_norm > 0.0 else 0.0

    def sample(
        self, state: ChainState, evaluate: Evaluate, draws: Draws, num_samples: int
    ) -> Iterator[tuple[ChainState, float]]:
        """``burn_in`` trajectories, then ``num_samples`` more; then the chain has moved.

        Yields each state that counts and its share: the one after each trajectory, 1; with ``recycle`` all on its way
        and then its start, by their chances.
        """
        self.trajectories = []
        dimension = sum(x.numel() for x in state.position)
        h = math.exp(self.log_step)
        if self.prior == "ball":
            h /= math.sqrt(max(dimension, 1))
        for number in range(self.burn_in + num_samples):
            momentum = draws.normal(MOMENTUM, number)
            path: list[tuple[ChainState, float]] = []
            proposal, _, energy = integrate(
                evaluate, state, momentum, self.coefficients, prior=self.prior, delta=self.delta, h=h, path=path
            )
            log_uniform = math.log(draws.uniform(ACCEPT, number))
            finite = math.isfinite(energy) and math.isfinite(proposal.loss)
            accepted = finite and (not self.metropolis or log_uniform < -energy)
            self.trajectories.append(Trajectory(energy if finite else math.nan, log_uniform, accepted))
            if number >= self.burn_in and self.recycle:
                shares = [self._chance(energy) for _, energy in path]
                for (on_path, _), share in zip(path, shares, strict=True):
                    yield on_path, share
                yield state, sum(1.0 - share for share in shares)
            if accepted:
                state = proposal
            if number >= self.burn_in and not self.recycle:
                yield state, 1.0
        if self.adapt_step_size:
            step = self.log_step + 0.05 * (self.acceptance - 0.8)
            self.log_step = min(step, self.highest_log_step)
        self.position = state.position

    def _chance(self, energy: float) -> float:
        if not math.isfinite(energy):
            return 0.0
        return math.exp(-max(energy, 0.0)) if self.metropolis else 1.0

    @property
    def acceptance(self) -> float:
        """The mean of min(1, e^-ΔH) over the last step's trajectories."""
        return sum(t.acceptance for t in self.trajectories) / len(self.trajectories)
