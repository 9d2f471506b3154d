"""One chain of Hamiltonian Monte Carlo on a log density: its options, where it is, and its transitions.

Layout: theta = T x with T = √inverse_mass a tensor, unit normal momenta, theta_0 = 0 and a flat prior; one call of the
log density per gradient. Invariants: the host reads nothing of a transition; ``complete`` is replaced in one assignment
and speaks of whole transitions alone, whatever an interrupt has left half done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import _ops
from .engine.checks import (
    NOISES,
    check_choice,
    check_each,
    check_flag,
    check_int,
    check_number,
    check_positive,
    check_seed,
    refuse,
)
from .engine.spread import Spread
from .engine.state import CHAIN_SLOTS, ChainSlot, new_state
from .integrators import substeps
from .phase_space import FLAT, PhaseSpace

ON_ERROR = ("raise", "reject")


def place_of(index: int, bare: bool) -> str:
    """The name of one tensor of ``position`` in error messages."""
    return "position" if bare else f"position[{index}]"


@dataclass(frozen=True)
class Options:
    """What holds for all transitions of a chain; the arguments of ``hmc.sample`` say what each means."""

    burn_in: int
    thin: int
    num_leapfrog_steps: int
    step_size_jitter: float
    inverse_mass: list[float]
    adapt_step_size: bool
    metropolis: bool
    integrator: list[float]
    on_error: str
    seed: int

    def num_draws(self, transitions: int) -> int:
        """How many draws the first transitions of a run make."""
        return max(0, transitions - self.burn_in) // self.thin


def check_options(op: str, position: list[Tensor], bare: bool, values: dict[str, Any]) -> Options:
    """Options in Python's own numbers; TypeError or ValueError for a bad one, naming it."""
    for name in ("adapt_step_size", "metropolis"):
        check_flag(op, name, values[name])
    jitter = check_number(
        op, "step_size_jitter", values["step_size_jitter"], "a number from 0 to 1", 0.0, or_tensor=False
    )
    if jitter > 1.0:
        raise refuse(op, "step_size_jitter", jitter, "a number from 0 to 1")
    check_seed(op, values["seed"])
    return Options(
        burn_in=check_int(op, "burn_in", values["burn_in"], 0, 1 << 31),
        thin=check_int(op, "thin", values["thin"], 1, 1 << 31),
        num_leapfrog_steps=check_int(op, "num_leapfrog_steps", values["num_leapfrog_steps"], 1, 1 << 16),
        step_size_jitter=jitter,
        inverse_mass=_check_inverse_mass(op, values["inverse_mass"], position, bare),
        adapt_step_size=values["adapt_step_size"],
        metropolis=values["metropolis"],
        integrator=_check_integrator(op, values["integrator"]),
        on_error=check_choice(op, "on_error", values["on_error"], ON_ERROR),
        seed=int(values["seed"]),
    )


class Jitter:
    """The factor of each transition's step size: 1 + width (2u - 1), with u uniform in (0, 1).

    The bits of u are 32 random signs, elements 32 t to 32 t + 31 for transition t of a stream that nothing else here
    draws from; every operation on them is exact. So a seed gives the same factors on every machine. They are drawn on
    the host, many at a time.
    """

    _BLOCK, _BITS = 512, 32

    def __init__(self, width: float, seed: int) -> None:
        self._width, self._seed = width, seed
        self._held: tuple[int, list[float]] = (-1, [])  # the number of a block, and its factors

    def at(self, transition: int) -> float:
        """The factor of a transition."""
        if self._width == 0.0:
            return 1.0
        block, place = divmod(transition, self._BLOCK)
        if block != self._held[0]:
            self._held = (block, self._draw(block))
        return self._held[1][place]

    def _draw(self, block: int) -> list[float]:
        size, kind = self._BLOCK * self._BITS, NOISES.index("rademacher")
        one = torch.ones((), dtype=torch.float64, device="cpu")
        zeros = torch.zeros(size, dtype=torch.float64, device="cpu")
        signs = _ops.perturb(zeros, one, self._seed, 0, block * size, kind).view(-1, self._BITS)
        halves = 0.5 ** torch.arange(1, self._BITS + 1, dtype=torch.float64, device="cpu")
        uniform = ((signs < 0.0) * halves).sum(1) + 0.5**33
        return cast(list[float], (1.0 + self._width * (2.0 * uniform - 1.0)).tolist())


class Complete(NamedTuple):
    """How far a chain has come: its whole transitions, its scalars after the last one, and how many of them erred."""

    transitions: int
    scalars: Tensor
    errors: int


class Walk:
    """One chain: where it is, and the gradient there.

    Starts at ``position``, or at ``x`` in units of √inverse_mass (wide, as :meth:`state` has it), before the transition
    of the number ``transitions``. ``epsilon``: the spacing of the log density's dtype, relative to the value.
    """

    def __init__(
        self,
        op: str,
        log_density: Callable[[Any], Tensor],
        position: list[Tensor],
        options: Options,
        *,
        bare: bool,
        log_step: float,
        x: list[Tensor] | None = None,
        transitions: int = 0,
    ) -> None:
        self.options, self.bare, self.epsilon, self.first_error = options, bare, 0.0, ""
        self._op, self._log_density = op, log_density
        self._erred = False
        self._substeps, self._last_kick = substeps(options.integrator, options.num_leapfrog_steps)
        self._scales = [math.sqrt(value) for value in options.inverse_mass]
        self.kept = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in position]
        self._fresh, self._carried = ([torch.zeros_like(t) for t in self.kept] for _ in range(2))
        wide = [torch.float64 if tensor.dtype == torch.float64 else torch.float32 for tensor in self.kept]

        def buffers() -> list[Tensor]:
            return [torch.zeros_like(t, dtype=w) for t, w in zip(self.kept, wide, strict=True)]

        self._x = buffers(), buffers(), buffers()
        for i, first in enumerate(self._x[0]):
            if x is None:
                first.copy_(self.kept[i]).div_(self._scales[i])
            else:
                first.copy_(x[i])
        # The noise's element indices, each tensor's rounded up to whole quads.
        sizes = [-(-tensor.numel() // 4) * 4 for tensor in self.kept]
        device = self.kept[0].device  # torch's default device may be another
        self.scalars = torch.zeros(CHAIN_SLOTS, dtype=torch.float64, device=device)
        self.scalars[ChainSlot.LOG_STEP] = log_step
        self._one = self.scalars.new_ones(())
        self._nan = self.scalars.new_full((), math.nan)
        seed = check_seed(op, options.seed)
        self._jitter = Jitter(options.step_size_jitter, seed)
        self._phase = PhaseSpace(
            spread=Spread(self.kept),
            indices=list(range(len(self.kept))),
            position=[torch.zeros_like(tensor) for tensor in self.kept],
            saved=[torch.zeros_like(tensor) for tensor in self.kept],
            x=self._x,
            momentum=[torch.zeros_like(first) for first in self._x[0]],
            scalars=self.scalars,
            state=new_state(0, device),
            rho=self._scales,
            adaptive=[False] * len(self._scales),
            base=[sum(sizes[:i]) for i in range(len(sizes))],
            seed=seed,
            step=0,
            dimension=sum(tensor.numel() for tensor in self.kept),
            prior=FLAT,
        )
        self._place()
        self.complete = Complete(transitions, self.scalars.clone(), 0)

    def transition(self) -> None:
        """The next trajectory and its decision; in the burn-in the step size is adapted. :meth:`commit` ends it."""
        phase, options, step = self._phase, self.options, self.complete.transitions
        phase.step = step  # numbers the noise
        # One step size for all of a trajectory, drawn without looking at the chain: given the factor the transition is
        # an ordinary one, reversible and volume-preserving, whose accept test is exact. So each of them leaves the
        # density as it is, and so does a random choice among them.
        factor = self._jitter.at(step)
        self._erred = False
        self._begin(self.complete.scalars[ChainSlot.LOSS])
        value = self._nan
        for n, (kick, drift) in enumerate(self._substeps):
            gradients = self._fresh if n else self._carried
            phase.leapfrog(
                gradients, trajectory=0, kick=factor * kick, drift=factor * drift, first=n == 0, measure=False
            )
            value = self._evaluate(self._fresh)
            if self._erred:
                break
        phase.end(
            self._fresh,
            value,
            trajectory=0,
            kick=factor * self._last_kick,
            row=-1,
            metropolis=options.metropolis,
            skip_nonfinite=False,
            last=True,
        )
        # The momenta stand in for the accumulator, which is not written as nothing is counted.
        phase.carry(phase.indices, phase.momentum, self._carried, self._fresh, count=False)
        taken = self.scalars[ChainSlot.TAKEN] > 0.0
        for kept, theta in zip(self.kept, phase.position, strict=True):
            torch.where(taken, theta, kept, out=kept)
        if options.adapt_step_size and step < options.burn_in:
            phase.adapt(math.inf)  # towards an acceptance of 0.8

    def commit(self) -> None:
        """Counts the transition, once its draw is stored: until then the chain stands where it began."""
        before = self.complete
        self.complete = Complete(before.transitions + 1, self.scalars.clone(), before.errors + self._erred)

    def state(self) -> dict[str, Any]:
        """The chain after its last whole transition, in plain numbers, strings and tensors. Waits for the device.

        The buffer that held it then is not written before the transition after the next.
        """
        numbers = self.complete.scalars.tolist()
        x = [tensor.clone() for tensor in self._x[int(numbers[ChainSlot.CURRENT])]]
        theta = [(a * scale).to(k.dtype) for a, scale, k in zip(x, self._scales, self.kept, strict=True)]
        return {
            "position": theta[0] if self.bare else theta,
            "x": x[0] if self.bare else x,
            "log_step_size": numbers[ChainSlot.LOG_STEP],
            "transitions": self.complete.transitions,
            **asdict(self.options),
        }

    def _place(self) -> None:
        """theta = T x, and the log density and its gradient there, which must be finite."""
        self._phase.place(draw=False)
        for kept, theta in zip(self.kept, self._phase.position, strict=True):
            kept.copy_(theta)  # T may have rounded the start
        value = self._evaluate(self._carried, start=True)
        if not bool(value.isfinite()):
            raise refuse(self._op, "log_density", f"{float(value)} at the start", "a finite value there")
        for i, gradient in enumerate(self._carried):
            if not bool(gradient.isfinite().all()):
                got = f"a gradient for {place_of(i, self.bare)} that is not finite at the start"
                raise refuse(self._op, "log_density", got, "a finite one there")
        self._begin(value)

    def _begin(self, value: Tensor) -> None:
        self._phase.begin(self._carried, value, tilt=self._one, delta=self._one, automatic=False)

    def _evaluate(self, gradients: list[Tensor], start: bool = False) -> Tensor:
        """The log density at theta, and its gradient into ``gradients``: zero for what it does not depend on.

        NaN, which rejects, where it raised; not at the start, and a result of the wrong kind is never let pass.
        """
        leaves = [theta.detach().requires_grad_() for theta in self._phase.position]
        found: Sequence[Tensor | None] = [None] * len(leaves)
        try:
            with torch.enable_grad():
                value = self._log_density(leaves[0] if self.bare else list(leaves))
                wrong = self._why_not(value)
                if wrong is None and value.requires_grad:
                    found = torch.autograd.grad(value.reshape(()), leaves, allow_unused=True)
        except Exception as error:
            if start or self.options.on_error == "raise":
                raise
            self._erred = True
            self.first_error = self.first_error or f"{type(error).__name__}: {error}"
            return self._nan
        if wrong is not None:
            raise wrong
        if start:
            self.epsilon = torch.finfo(value.dtype).eps
        for i, (target, gradient) in enumerate(zip(gradients, found, strict=True)):
            if gradient is not None:
                target.copy_(gradient)  # autograd may hand out expanded tensors, and one for several leaves
            elif start and target.numel():
                got = f"a value that does not depend on {place_of(i, self.bare)}"
                raise refuse(self._op, "log_density", got, "one that is differentiable in every tensor of position")
            else:
                target.zero_()
        return value.detach().double()

    def _why_not(self, value: object) -> Exception | None:
        home = self.kept[0].device
        if not isinstance(value, Tensor):
            return refuse(self._op, "log_density", type(value).__name__, "a tensor of one element", TypeError)
        if value.numel() != 1 or not value.dtype.is_floating_point or value.device != home:
            got = f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
            return refuse(self._op, "log_density", got, f"a floating-point tensor of one element on {home}")
        return None


def _check_inverse_mass(op: str, value: object, position: list[Tensor], bare: bool) -> list[float]:
    values = check_each(op, "inverse_mass", value, len(position), "position", check_positive)
    for i, (number, tensor) in enumerate(zip(values, position, strict=True)):
        limits = torch.finfo(tensor.dtype)
        if not limits.tiny <= math.sqrt(number) <= limits.max:
            expected = f"a number whose root is a normal {tensor.dtype}, as {place_of(i, bare)} is scaled by it"
            raise refuse(op, "inverse_mass" if bare else f"inverse_mass[{i}]", repr(number), expected)
    return values


def _check_integrator(op: str, integrator: object) -> list[float]:
    expected = "coefficients (kick, drift, ..., kick), the same backwards, kicks and drifts adding up to 1 each"
    if not isinstance(integrator, (list, tuple)):
        raise refuse(op, "integrator", type(integrator).__name__, expected, TypeError)
    number = "a finite number"
    values = [check_number(op, f"integrator[{i}]", v, number, or_tensor=False) for i, v in enumerate(integrator)]
    odd = len(values) >= 3 and len(values) % 2 == 1
    if not odd or values != values[::-1] or any(abs(sum(values[k::2]) - 1.0) > 1e-12 for k in (0, 1)):
        raise refuse(op, "integrator", integrator, expected)
    return values
