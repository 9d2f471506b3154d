"""Hamiltonian Monte Carlo on any differentiable log density over a list of tensors: the engine of TSAM's sampler hmc.

    trace = tsam_ext.hmc.sample(lambda x: -0.5 * x[0].square().sum(), [torch.zeros(3)], seed=0)
    trace.draws[0].mean(0)

Layout: theta = T x with T = √inverse_mass a tensor, unit normal momenta, theta_0 = 0 and a flat prior; one call of the
log density per gradient. Invariant: the host reads nothing of a transition, and the caller's tensors are not written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._cuda import why_not
from .engine.checks import (
    check_each,
    check_flag,
    check_int,
    check_list,
    check_number,
    check_positive,
    check_seed,
    refuse,
)
from .engine.spread import Spread
from .engine.state import CHAIN_SLOTS, ChainSlot, new_state
from .integrators import LEAPFROG, MCLACHLAN, substeps
from .phase_space import FLAT, PhaseSpace

__all__ = ["LEAPFROG", "MCLACHLAN", "Trace", "sample"]

LogDensity = Callable[[list[Tensor]], Tensor]
OP = "hmc.sample"


@dataclass(frozen=True)
class Trace:
    """What :func:`sample` found: the draws of one chain and how each came about.

    Attributes:
        draws: a tensor per entry of ``position``: ``[num_samples, *shape]``, of its dtype and on its device.
        log_density: ``[num_samples]``, float64: the log density at each draw.
        acceptance_rate: ``[num_samples]``, float64: min(1, e^(-energy error)) of the proposal behind each draw.
        diverging: ``[num_samples]``, bool: the energy error was above 1000 in magnitude or not finite; so is a proposal
            outside the support of the density.
        energy_error: ``[num_samples]``, float64: the change of the Hamiltonian along the trajectory.
        step_size: the step size of all draws (after burn-in).
    """

    draws: list[Tensor]
    log_density: Tensor
    acceptance_rate: Tensor
    diverging: Tensor
    energy_error: Tensor
    step_size: float

    def to_dict(self, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """The draws and their statistics as NumPy arrays, with a leading axis of length 1 for the chain.

        For ArviZ: ``arviz.from_dict(trace.to_dict())`` from 1.0 on, ``arviz.from_dict(**trace.to_dict())`` before.

        Args:
            names: a name a tensor of ``draws``; ``None``: x0, x1, ...

        Returns:
            ``{"posterior": {name: [1, num_samples, *shape]}, "sample_stats": {name: [1, num_samples]}}``; the
            statistics are lp, acceptance_rate, diverging and energy_error. NumPy has no bfloat16: float32 instead.

        Raises:
            TypeError, ValueError: not one name a tensor, or a name twice.
        """
        op, expected = "hmc.Trace.to_dict", f"{len(self.draws)} different names"
        if not isinstance(names, (list, tuple, type(None))):
            raise refuse(op, "names", type(names).__name__, f"a list of {expected}", TypeError)
        chosen = [f"x{i}" for i in range(len(self.draws))] if names is None else list(names)
        for i, name in enumerate(chosen):
            if not isinstance(name, str):
                raise refuse(op, f"names[{i}]", type(name).__name__, "a string", TypeError)
        if len(chosen) != len(self.draws) or len(set(chosen)) != len(chosen):
            raise refuse(op, "names", names, expected)
        statistics = {
            "lp": self.log_density,
            "acceptance_rate": self.acceptance_rate,
            "diverging": self.diverging,
            "energy_error": self.energy_error,
        }
        return {
            "posterior": {name: _array(draws) for name, draws in zip(chosen, self.draws, strict=True)},
            "sample_stats": {name: _array(values) for name, values in statistics.items()},
        }


def sample(
    log_density: LogDensity,
    position: Sequence[Tensor],
    *,
    num_samples: int = 1000,
    burn_in: int = 500,
    thin: int = 1,
    num_leapfrog_steps: int = 10,
    step_size: float = 0.1,
    inverse_mass: float | Sequence[float] = 1.0,
    adapt_step_size: bool = True,
    metropolis: bool = True,
    integrator: Sequence[float] = LEAPFROG,
    seed: int | None = None,
    progress: bool = False,
) -> Trace:
    """Draws from the density ∝ exp(log_density) by Hamiltonian Monte Carlo: one chain from ``position``.

    Args:
        log_density: takes a list of tensors like ``position``, that require grad, and returns the log density there, up
            to a constant: one floating-point element. It must be deterministic. -inf (or NaN) rejects a proposal, so a
            density may have bounded support. The list's tensors change after the call: clone what is to be kept.
        position: where the chain starts: tensors of any shapes, of float32, float64, bfloat16 or float16, also mixed.
            Not written.
        num_samples: how many draws to keep, at least 1. Default 1000.
        burn_in: transitions before the first draw, not below 0. Default 500.
        thin: keep every thin-th draw, at least 1. Default 1. Only memory is saved by it.
        num_leapfrog_steps: steps of the integrator per transition, at least 1. Default 10.
        step_size: the integrator's step, in units of √inverse_mass: above 0. Default 0.1.
        inverse_mass: M⁻¹, above 0: about the variance of the elements; one for all, or one per tensor. Default 1.
        adapt_step_size: during burn-in move the step size towards an acceptance rate of 0.8: log step size by
            0.05 (acceptance - 0.8) per transition, so upwards by a factor of 150 at most in 500. Default True.
        metropolis: accept or reject by the energy error. Without, every finite proposal is taken, and the draws are
            biased by the step size. Default True.
        integrator: coefficients (kick, drift, ..., kick), the same backwards, the kicks adding up to 1 and the drifts
            too: ``LEAPFROG`` (default), ``MCLACHLAN`` (two gradients per step) or your own.
        seed: 64-bit seed of momenta and decisions; ``None`` draws one from torch's default generator. A seed gives the
            same bits on every processor and thread count as far as ``log_density`` does.
        progress: show a bar (needs tqdm). Default False.

    Returns:
        A :class:`Trace`. The density was evaluated 1 + (burn_in + thin num_samples) num_leapfrog_steps k times, with k
        the number of drifts in ``integrator``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted; also where the log density or its
            gradient is not finite at the start or does not depend on one of the tensors.
        ImportError: ``progress`` without tqdm.
        Exceptions of ``log_density``, and KeyboardInterrupt, pass through; no draws are returned then.

    A trajectory of constant length can be close to a period of the dynamics, and then hardly moves; a chain that mixes
    badly at a high acceptance rate may need another num_leapfrog_steps.

    Source: R. Neal, "MCMC using Hamiltonian dynamics", 2011 (arXiv 1206.1901).

    Example:
        >>> import torch
        >>> trace = sample(lambda x: -0.5 * (x[0] - 3.0).square().sum(), [torch.zeros(2)], num_samples=200, seed=0)
        >>> trace.draws[0].shape, bool((trace.draws[0].mean(0) - 3.0).abs().max() < 0.5)
        (torch.Size([200, 2]), True)
    """
    tensors = _check_position(position)
    num_samples = check_int(OP, "num_samples", num_samples, 1, 1 << 31)
    burn_in = check_int(OP, "burn_in", burn_in, 0, 1 << 31)
    thin = check_int(OP, "thin", thin, 1, 1 << 31)
    total = check_int(OP, "burn_in + thin * num_samples", burn_in + thin * num_samples, 1, (1 << 32) - 1)
    for name, flag in (("adapt_step_size", adapt_step_size), ("metropolis", metropolis), ("progress", progress)):
        check_flag(OP, name, flag)
    scales = [math.sqrt(value) for value in _check_inverse_mass(inverse_mass, tensors)]
    plan = substeps(_check_integrator(integrator), check_int(OP, "num_leapfrog_steps", num_leapfrog_steps, 1, 1 << 16))
    log_step = math.log(check_positive(OP, "step_size", step_size))
    if not callable(log_density):
        raise refuse(OP, "log_density", type(log_density).__name__, "a function of a list of tensors", TypeError)
    key = check_seed(OP, int(torch.randint(0, (1 << 63) - 1, (), device="cpu")) if seed is None else seed)
    transitions = _with_bar(range(total)) if progress else range(total)
    # Inside inference_mode the log density would have no gradient.
    with torch.inference_mode(False), torch.no_grad():
        walk = _Walk(log_density, tensors, scales, plan, log_step, key, metropolis)
        draws = [tensor.new_empty((num_samples, *tensor.shape)) for tensor in tensors]
        scalars = walk.scalars.new_empty((num_samples, CHAIN_SLOTS))
        for transition in transitions:
            walk.transition(transition)
            if transition < burn_in and adapt_step_size:
                walk.adapt()
            kept, skipped = divmod(transition - burn_in + 1, thin)
            if transition >= burn_in and skipped == 0:
                scalars[kept - 1] = walk.scalars
                for draw, here in zip(draws, walk.kept, strict=True):
                    draw[kept - 1] = here
    return Trace(
        draws=draws,
        log_density=scalars[:, ChainSlot.LOSS].clone(),
        acceptance_rate=scalars[:, ChainSlot.ACCEPTANCE].clone(),
        diverging=scalars[:, ChainSlot.DIVERGENT] > 0.0,
        energy_error=scalars[:, ChainSlot.ENERGY].clone(),
        step_size=math.exp(float(scalars[-1, ChainSlot.LOG_STEP])),
    )


class _Walk:
    """One chain: where it is, and the gradient there."""

    def __init__(
        self,
        log_density: LogDensity,
        start: list[Tensor],
        scales: list[float],
        plan: tuple[list[tuple[float, float]], float],
        log_step: float,
        seed: int,
        metropolis: bool,
    ) -> None:
        self._log_density, self._metropolis = log_density, metropolis
        self._substeps, self._last_kick = plan
        self.kept = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in start]
        self._fresh, self._carried = ([torch.zeros_like(t) for t in self.kept] for _ in range(2))
        wide = [torch.float64 if tensor.dtype == torch.float64 else torch.float32 for tensor in self.kept]

        def buffers() -> list[Tensor]:
            return [torch.zeros_like(t, dtype=w) for t, w in zip(self.kept, wide, strict=True)]

        x = buffers(), buffers(), buffers()
        for first, tensor, scale in zip(x[0], self.kept, scales, strict=True):
            first.copy_(tensor).div_(scale)
        # The noise's element indices, each tensor's rounded up to whole quads.
        sizes = [-(-tensor.numel() // 4) * 4 for tensor in self.kept]
        device = self.kept[0].device  # torch's default device may be another
        self.scalars = torch.zeros(CHAIN_SLOTS, dtype=torch.float64, device=device)
        self.scalars[ChainSlot.LOG_STEP] = log_step
        self._one = self.scalars.new_ones(())
        self._phase = PhaseSpace(
            spread=Spread(self.kept),
            indices=list(range(len(self.kept))),
            position=[torch.zeros_like(tensor) for tensor in self.kept],
            saved=[torch.zeros_like(tensor) for tensor in self.kept],
            x=x,
            momentum=[torch.zeros_like(first) for first in x[0]],
            scalars=self.scalars,
            state=new_state(0, device),
            rho=scales,
            adaptive=[False] * len(scales),
            base=[sum(sizes[:i]) for i in range(len(sizes))],
            seed=seed,
            step=0,
            dimension=sum(tensor.numel() for tensor in self.kept),
            prior=FLAT,
        )
        self._place()

    def adapt(self) -> None:
        """Moves the step size towards an acceptance of 0.8."""
        self._phase.adapt(math.inf)

    def transition(self, step: int) -> None:
        """One trajectory and its decision; ``step`` numbers the noise, and the counts start anew."""
        phase = self._phase
        phase.step = step
        self._begin(self.scalars[ChainSlot.LOSS].clone())
        for n, (kick, drift) in enumerate(self._substeps):
            gradients = self._fresh if n else self._carried
            phase.leapfrog(gradients, trajectory=0, kick=kick, drift=drift, first=n == 0, measure=False)
            value = self._evaluate(self._fresh)
        phase.end(
            self._fresh,
            value,
            trajectory=0,
            kick=self._last_kick,
            row=-1,
            metropolis=self._metropolis,
            skip_nonfinite=False,
            last=True,
        )
        # The momenta stand in for the accumulator, which is not written as nothing is counted.
        phase.carry(phase.indices, phase.momentum, self._carried, self._fresh, count=False)
        taken = self.scalars[ChainSlot.TAKEN] > 0.0
        for kept, theta in zip(self.kept, phase.position, strict=True):
            torch.where(taken, theta, kept, out=kept)

    def _place(self) -> None:
        """theta = T x, and the log density and its gradient there, which must be finite."""
        self._phase.place(draw=False)
        for kept, theta in zip(self.kept, self._phase.position, strict=True):
            kept.copy_(theta)  # T may have rounded the start
        value = self._evaluate(self._carried, start=True)
        if not bool(value.isfinite()):
            raise refuse(OP, "log_density", f"{float(value)} at the start", "a finite value there")
        for i, gradient in enumerate(self._carried):
            if not bool(gradient.isfinite().all()):
                got = f"a gradient for position[{i}] that is not finite at the start"
                raise refuse(OP, "log_density", got, "a finite one there")
        self._begin(value)

    def _begin(self, value: Tensor) -> None:
        self._phase.begin(self._carried, value, tilt=self._one, delta=self._one, automatic=False)

    def _evaluate(self, gradients: list[Tensor], start: bool = False) -> Tensor:
        """The log density at theta, and its gradient into ``gradients``: zero for what it does not depend on."""
        leaves = [theta.detach().requires_grad_() for theta in self._phase.position]
        with torch.enable_grad():
            value = self._log_density(list(leaves))
            if not isinstance(value, Tensor):
                raise refuse(OP, "log_density", type(value).__name__, "a tensor of one element", TypeError)
            if value.numel() != 1 or not value.dtype.is_floating_point or value.device != leaves[0].device:
                got = f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
                raise refuse(OP, "log_density", got, f"a floating-point tensor of one element on {leaves[0].device}")
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if value.requires_grad:
                found = torch.autograd.grad(value.reshape(()), leaves, allow_unused=True)
        for i, (target, gradient) in enumerate(zip(gradients, found, strict=True)):
            if gradient is not None:
                target.copy_(gradient)  # autograd may hand out expanded tensors, and one for several leaves
            elif start and target.numel():
                got = f"a value that does not depend on position[{i}]"
                raise refuse(OP, "log_density", got, "one that is differentiable in every tensor of position")
            else:
                target.zero_()
        return value.detach().double()


def _array(values: Tensor) -> Any:
    return (values.float() if values.dtype == torch.bfloat16 else values)[None].numpy(force=True)


def _with_bar(transitions: range) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        got = "True without the package tqdm"
        raise refuse(OP, "progress", got, "False, or tqdm installed (pip install tqdm)", ImportError) from error
    bar: Iterable[int] = tqdm(transitions, desc="hmc.sample", unit="transition")
    return bar


def _check_position(position: object) -> list[Tensor]:
    tensors = check_list(OP, "position", position)
    if not any(tensor.numel() for tensor in tensors):
        raise refuse(OP, "position", "no elements", "a list of tensors with at least one element")
    for i, tensor in enumerate(tensors):
        if (cause := why_not(tensor.device)) is not None:
            raise refuse(OP, f"position[{i}]", f"a tensor on {tensor.device}", f"one that kernels run on ({cause})")
        if tensor.device != (home := tensors[0].device):
            raise refuse(OP, f"position[{i}]", f"a tensor on {tensor.device}", f"one on {home}, as position[0] is")
    return tensors


def _check_inverse_mass(value: object, position: list[Tensor]) -> list[float]:
    values = check_each(OP, "inverse_mass", value, len(position), "position", check_positive)
    for i, (number, tensor) in enumerate(zip(values, position, strict=True)):
        limits = torch.finfo(tensor.dtype)
        if not limits.tiny <= math.sqrt(number) <= limits.max:
            expected = f"a number whose root is a normal {tensor.dtype}, as position[{i}] is scaled by it"
            raise refuse(OP, f"inverse_mass[{i}]", repr(number), expected)
    return values


def _check_integrator(integrator: object) -> list[float]:
    expected = "coefficients (kick, drift, ..., kick), the same backwards, kicks and drifts adding up to 1 each"
    if not isinstance(integrator, (list, tuple)):
        raise refuse(OP, "integrator", type(integrator).__name__, expected, TypeError)
    number = "a finite number"
    values = [check_number(OP, f"integrator[{i}]", v, number, or_tensor=False) for i, v in enumerate(integrator)]
    odd = len(values) >= 3 and len(values) % 2 == 1
    if not odd or values != values[::-1] or any(abs(sum(values[k::2]) - 1.0) > 1e-12 for k in (0, 1)):
        raise refuse(OP, "integrator", integrator, expected)
    return values
