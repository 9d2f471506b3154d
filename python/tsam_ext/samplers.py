"""The samplers as settings objects: Ascent, Noise and HMC, frozen and self-checking.

What an option means is decided here, in its sampler's class: which estimate it makes, what of TSAM's own settings it
refuses, what lasts between steps and so stands in a checkpoint, and, by its estimate, which diagnostics it adds.
Invariant: a sampler that exists is valid; an option that means nothing for it does not exist or is refused by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from .chain import Chain
from .engine.checks import (
    NOISES,
    TSAM,
    check_choice,
    check_flag,
    check_int,
    check_number,
    check_positive,
    check_scalar_tensor,
    refuse,
    shown,
)
from .estimates import Estimate, HamiltonianEstimate, PerturbationEstimate, Step
from .phase_space import PRIORS
from .sampler_state import SamplerState

NoiseKind = Literal["gaussian", "sphere", "ball", "rademacher"]
CHAINS = ("persistent", "fresh")
MAX_SAMPLES = 1 << 16


def shown_setting(value: object) -> str:
    """A setting for a repr; of a tensor the form alone, so that nothing waits for a device."""
    if isinstance(value, Tensor):
        return f"<{value.dtype} tensor on {value.device.type}>"
    return getattr(value, "__name__", "a function") if callable(value) else repr(value)


@dataclass(frozen=True, eq=False, repr=False)
class Sampler(ABC):
    """How a step samples its perturbations; what every sampler has to decide."""

    two_steps: ClassVar[bool] = False  # whether one sample without noise is SAM's ascent and descent
    carries: ClassVar[bool] = False  # whether its steps leave a direction to later ones where nobody says
    tilts_one: ClassVar[bool] = False  # whether the tilt says something to one sample too
    keeps: ClassVar[type[SamplerState]] = SamplerState  # what lasts from step to step

    @abstractmethod
    def estimate(self, step: Step, state: SamplerState) -> Estimate:
        """The passes of one step."""

    def init(self, device: torch.device) -> SamplerState:
        """What lasts from step to step, before the first: nothing."""
        return SamplerState()

    def default_radius(self, num_samples: int) -> float | None:
        """The radius of a group that sets none; ``None``: its rho."""
        return None

    def check_settings(self, *, num_samples: int, batch: str, same_masks: bool, capturable: bool) -> None:
        """ValueError, naming both, for a setting of TSAM's that means nothing for this sampler."""
        return

    def check_lengths(self, where: str, own: Mapping[str, Any], for_all: Mapping[str, Any]) -> None:
        """ValueError for a rho or radius that means nothing here: one that the user has set, in a group or for all."""
        return

    def check_tilt(self, argument: str, tilt: float) -> None:
        """ValueError for a tilt that this sampler cannot take."""
        return

    def refuses(self, argument: str, got: object, expected: str) -> Exception:
        """The exception for a setting that means nothing for this sampler."""
        return refuse(TSAM, argument, shown(got), f"{expected}, as the sampler is {type(self).__name__}")

    def __repr__(self) -> str:
        shown_fields = (f"{field.name}={shown_setting(getattr(self, field.name))}" for field in fields(self))
        return f"{type(self).__name__}({', '.join(shown_fields)})"


@dataclass(frozen=True, repr=False)
class _Drawing(Sampler):
    """The options of both samplers that draw their perturbations independently."""

    noise: NoiseKind = "gaussian"
    antithetic: bool = False
    ascends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(type(self).__name__, "noise", self.noise, NOISES)
        check_flag(type(self).__name__, "antithetic", self.antithetic)

    def check_settings(self, *, num_samples: int, batch: str, same_masks: bool, capturable: bool) -> None:
        """A single sample has none before it to be the negative of."""
        if self.antithetic and num_samples == 1:
            expected = f"2 or more, as the sampler is {type(self).__name__}(antithetic=True)"
            raise refuse(TSAM, "num_samples", 1, expected)

    def estimate(self, step: Step, state: SamplerState) -> Estimate:
        """One or two passes per sample."""
        kind = NOISES.index(self.noise)
        return PerturbationEstimate(step, noise=kind, antithetic=self.antithetic, ascends=self.ascends)


class Ascent(_Drawing):
    """Noise, then an ascent of length rho along the gradient there: 2 gradients per sample (the paper's algorithm).

    Weights softmax(tilt L) at the end of the ascent. One sample draws no noise unless ``radius`` is set: SAM, and with
    ``adaptive`` ASAM.

    Args:
        noise: ``"gaussian"`` (z/√d, norm about 1; default), ``"sphere"`` (z/‖z‖), ``"ball"`` (uniform in the unit ball)
            or ``"rademacher"`` (±1/√d; the cheapest draw). Each is scaled by the group's radius.
        antithetic: every second sample takes the negative of the noise before it. Needs 2 samples. Default False.

    Raises:
        TypeError, ValueError: for a bad option, naming it.

    Source: T. Li, T. Zhou, J. Bilmes, "Tilted Sharpness-Aware Minimization", ICML 2025 (arXiv 2410.22656), Algorithm 1.

    Example:
        >>> Ascent(noise="sphere")
        Ascent(noise='sphere', antithetic=False)
    """

    two_steps = True
    carries = True
    ascends = True

    def default_radius(self, num_samples: int) -> float | None:
        """No noise for one sample: it smooths nothing, and SAM has none."""
        return 0.0 if num_samples == 1 else None


class Noise(_Drawing):
    """Noise alone: the tilted objective over μ, 1 gradient per sample; with ``batch="split"`` plain SGD's price.

    The noise has the length ``radius``, or rho where radius is not set: give one of the two. rho=0 leaves a group
    unperturbed. Weights softmax(tilt L).

    Args:
        noise, antithetic: as for :class:`Ascent`.

    Raises:
        TypeError, ValueError: for a bad option, naming it.

    Example:
        >>> Noise(antithetic=True)
        Noise(noise='gaussian', antithetic=True)
    """

    def check_lengths(self, where: str, own: Mapping[str, Any], for_all: Mapping[str, Any]) -> None:
        """Where there is a radius rho says no more than whether it is 0."""
        radius = own.get("radius", for_all.get("radius"))
        if radius is not None and own.get("rho"):
            got = f"{own['rho']} beside radius={radius}"
            raise refuse(TSAM, f"{where}rho", got, "one of the two, or rho=0, as the sampler is Noise")


@dataclass(frozen=True, eq=False, repr=False)
class HMC(Sampler):
    """Hamiltonian Monte Carlo on the density ∝ prior(ε) exp(delta L(θ+ε)): exact, as the paper's theory has it.

    1 + num_leapfrog_steps (num_samples + burn_in) gradients per step, and 7 P of extra memory. Weights
    softmax((tilt − delta) L). The loss must be one function within a step: the same rows and masks in each pass.

    Args:
        delta: δ, how far the samples lean towards high losses. A number, a 0-dim tensor, ``None`` (default: the tilt,
            so that all samples weigh the same) or ``"auto"``: delta_scale √d/‖T∇L‖ with the norm a running mean on
            the device, T = rho D: at delta_scale 1 the sampled losses are lifted by about one standard deviation.
        delta_scale: see delta. Default 1.
        num_leapfrog_steps: N, gradients per trajectory. Default 1.
        step_size: the angle (gaussian prior) or length (ball) of one drift; ``None`` (default): π/(2N).
        adapt_step_size: move step_size towards an acceptance of 0.8 after each step, never above π/(2N) or a larger
            step_size of the user's. Default True.
        prior: ``"gaussian"`` (default; ε = rho D x/√d with x standard normal) or ``"ball"`` (‖ε/(rho D)‖ ≤ 1, the
            paper's constraint set).
        metropolis: accept or reject each trajectory, which makes the samples exact. Default True.
        chain: ``"persistent"`` (default; goes on from the last step's ε, which checkpoints hold) or ``"fresh"`` (starts
            each step from the prior: biased towards it unless burn_in is long).
        burn_in: trajectories before the first sample of a step. Default 0.
        recycle: count all N states of a trajectory and its start, each by its chance of being accepted (of not moving
            on), instead of the one it ends with: more states for the same gradients. Default False.

    Raises:
        TypeError, ValueError: for a bad option, naming it.

    Source: R. Neal, "MCMC using Hamiltonian dynamics", 2011 (arXiv 1206.1901); Li, Zhou, Bilmes (arXiv 2410.22656).

    Example:
        >>> HMC(delta=2.0).num_leapfrog_steps
        1
    """

    tilts_one: ClassVar[bool] = True  # as delta, where that is not given
    keeps: ClassVar[type[SamplerState]] = Chain

    delta: float | Tensor | Literal["auto"] | None = None
    delta_scale: float = 1.0
    num_leapfrog_steps: int = 1
    step_size: float | None = None
    adapt_step_size: bool = True
    prior: Literal["gaussian", "ball"] = "gaussian"
    metropolis: bool = True
    chain: Literal["persistent", "fresh"] = "persistent"
    burn_in: int = 0
    recycle: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, object] = {}
        if isinstance(self.delta, Tensor):
            check_scalar_tensor("HMC", "delta", self.delta)
        elif self.delta is not None and self.delta != "auto":
            expected = "None, a finite number, a 0-dim tensor or 'auto'"
            checked["delta"] = check_number("HMC", "delta", self.delta, expected, or_tensor=False)
        checked["delta_scale"] = check_number(
            "HMC", "delta_scale", self.delta_scale, "a finite number", or_tensor=False
        )
        if self.delta_scale != 1.0 and not isinstance(self.delta, str):
            raise refuse("HMC", "delta_scale", shown(self.delta_scale), "1.0, as delta is not 'auto'")
        checked["num_leapfrog_steps"] = check_int("HMC", "num_leapfrog_steps", self.num_leapfrog_steps, 1, 1 << 16)
        if self.step_size is not None:
            expected = "None or a finite number above 0"
            checked["step_size"] = check_positive("HMC", "step_size", self.step_size, expected)
        for name in ("adapt_step_size", "metropolis", "recycle"):
            check_flag("HMC", name, getattr(self, name))
        check_choice("HMC", "prior", self.prior, PRIORS)
        check_choice("HMC", "chain", self.chain, CHAINS)
        checked["burn_in"] = check_int("HMC", "burn_in", self.burn_in, 0, MAX_SAMPLES)
        for name, value in checked.items():  # Python's own numbers in place of NumPy's
            object.__setattr__(self, name, value)

    def estimate(self, step: Step, state: SamplerState) -> Estimate:
        """The passes that move the chain."""
        return HamiltonianEstimate(
            step,
            cast(Chain, state),
            num_leapfrog_steps=self.num_leapfrog_steps,
            burn_in=self.burn_in,
            fresh=self.chain == "fresh",
            delta=self.delta_scale if isinstance(self.delta, str) else self.delta,
            automatic=isinstance(self.delta, str),
            metropolis=self.metropolis,
            recycle=self.recycle,
        )

    def init(self, device: torch.device) -> Chain:
        """The chain. Adaptation stops at a quarter turn per trajectory, or at the user's step size if larger."""
        quarter = math.pi / (2 * self.num_leapfrog_steps)
        first = quarter if self.step_size is None else self.step_size
        highest = max(first, quarter)
        return Chain(device, prior=self.prior, step_size=first, highest_step_size=highest, adapts=self.adapt_step_size)

    def check_settings(self, *, num_samples: int, batch: str, same_masks: bool, capturable: bool) -> None:
        """The accept test compares losses of one function: the same rows and the same masks at every position."""
        if batch != "whole":
            raise self.refuses("batch", batch, "'whole'")
        if same_masks is capturable:
            raise self.refuses("same_masks", same_masks, repr(not capturable))

    def check_lengths(self, where: str, own: Mapping[str, Any], for_all: Mapping[str, Any]) -> None:
        """The prior has the scale rho; there is no other length."""
        if own.get("radius") is not None:
            raise self.refuses(f"{where}radius", own["radius"], "None (the scale is rho)")

    def check_tilt(self, argument: str, tilt: float) -> None:
        """delta is the tilt unless it is set, and must be finite."""
        if self.delta is None and math.isinf(tilt):
            raise refuse(TSAM, argument, shown(tilt), "a finite tilt, as the sampler is HMC with delta=None")


SamplerName = Literal["ascent", "noise", "hmc"]
BY_NAME: dict[str, Callable[[], Sampler]] = {"ascent": Ascent, "noise": Noise, "hmc": HMC}


def sampler_of(sampler: object) -> Sampler:
    """A sampler from its name, with its defaults, or the object itself; TypeError or ValueError otherwise."""
    if isinstance(sampler, Sampler):
        return sampler
    if not isinstance(sampler, str):
        expected = f"{' or '.join(map(repr, BY_NAME))}, or an Ascent, Noise or HMC object"
        raise refuse(TSAM, "sampler", shown(sampler), expected, TypeError)
    return BY_NAME[check_choice(TSAM, "sampler", sampler, tuple(BY_NAME))]()


def owner_of(option: str, chosen: Sampler) -> str | None:
    """The sampler class that has an option of this name, the chosen one first; None if none has."""
    for kind in (type(chosen), Ascent, Noise, HMC):
        if option in {field.name for field in fields(kind)}:
            return kind.__name__
    return None
