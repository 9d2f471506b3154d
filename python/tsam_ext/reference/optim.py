"""TSAM in plain Python: the oracle of the compiled one, and what it is timed against.

One step: Σ w_j ∇L(θ + ε_j) into p.grad, w = softmax(log n + t L), then the base optimizer's step.
ε = r D ν, and for the sampler "ascent" ρ D (D g)/‖D g‖ more, g = ∇L(θ + r D ν); D = |θ| elementwise
where adaptive, else 1; for "hmc" the states of a chain (hmc.py). Norms and d are over all perturbed parameters
(trainable, rho not 0). Extra memory: one copy and one mean, for "hmc" also the chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .hmc import ChainState, Draws, HamiltonianChain, PhiloxDraws, TorchDraws
from .noise import base_offsets, global_norm, noise_scale, unit_noise
from .rounding import write
from .tilt import StreamingTilt, tilted_weights


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the arithmetic: float64 for float64, else float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def ascend(
    parameters: Sequence[Tensor],
    origins: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rho: Sequence[float],
    adaptive: Sequence[bool],
    store: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None,
) -> Tensor:
    """θ += ρ D (D g)/‖D g‖ in place, D = |θ₀| (``origins``) where adaptive, else 1.

    SAM (Foret et al., ICLR 2021), ASAM with η = 0 (Kwon et al., ICML 2021). A zero gradient moves
    nothing. Returns ‖D g‖ over the whole list, 0-dim float64. ``store(parameters, values)`` writes θ.
    """
    scales = [
        _wide(o).abs() if a else torch.ones((), dtype=_wide(o).dtype, device=o.device)
        for o, a in zip(origins, adaptive, strict=True)
    ]
    scaled = [d * _wide(g) for d, g in zip(scales, gradients, strict=True)]
    norm = global_norm(scaled)
    inverse = torch.where(norm == 0.0, 0.0, norm.reciprocal())
    moved = [_wide(p) + (r * inverse) * (d * h) for p, d, h, r in zip(parameters, scales, scaled, rho, strict=True)]
    if store is not None:
        store(parameters, moved)
    else:
        for p, theta in zip(parameters, moved, strict=True):
            p.copy_(theta)
    return norm


@dataclass
class _Perturbed:
    """One perturbed parameter: its copy, where its noise starts and what its group says."""

    parameter: Tensor
    origin: Tensor
    offset: int
    rho: float
    radius: float
    adaptive: bool


class ReferenceTSAM:
    """TSAM in plain Python, closure form only; arguments as those of :class:`tsam_ext.TSAM`.

    One more: ``rng="torch"`` draws with ``Tensor.normal_`` (for timing), ``"philox"`` (default)
    with the documented scheme. One host sync a sample, the loss. ``seed=None`` is 0; nothing is checked.
    """

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: type[Optimizer] | Optimizer = torch.optim.SGD,
        *,
        rho: float = 0.05,
        tilt: float | Tensor | Callable[[int], float] = 1.0,
        num_samples: int = 1,
        sampler: str = "ascent",
        radius: float | None = None,
        noise: str = "gaussian",
        adaptive: bool = False,
        batch: str = "whole",
        every: int = 1,
        antithetic: bool = False,
        skip_nonfinite_loss: bool = False,
        same_masks: bool = True,
        seed: int | None = None,
        rng: str = "philox",
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
        rounding: str = "stochastic",
        **base_kwargs: Any,
    ) -> None:
        make: Any = base_optimizer
        self.base_optimizer: Optimizer = (
            make(params, **base_kwargs) if isinstance(base_optimizer, type) else base_optimizer
        )
        self.defaults: dict[str, Any] = {"rho": rho, "radius": radius, "adaptive": adaptive}
        self.tilt = tilt
        self.num_samples = num_samples
        self.sampler = sampler
        self.noise = noise
        self.batch = batch
        self.every = every
        self.antithetic = antithetic
        self.skip_nonfinite_loss = skip_nonfinite_loss
        self.same_masks = same_masks
        self.seed = seed or 0
        self.rng = rng
        self.rounding = rounding
        self.chain = HamiltonianChain(
            delta=delta,
            delta_scale=delta_scale,
            num_leapfrog_steps=num_leapfrog_steps,
            step_size=step_size,
            adapt_step_size=adapt_step_size,
            prior=prior,
            metropolis=metropolis,
            chain=chain,
            burn_in=burn_in,
            recycle=recycle,
        )
        self._positions: dict[Tensor, Tensor] = {}
        self.num_steps = 0
        self.losses = self.weights = self.gradient_norms = torch.empty(0, dtype=torch.float64)
        self.ess, self.num_nonfinite = math.nan, 0
        self._sample, self._count, self._sampled, self._rows = 0, 1, False, 0
        self._passes: list[Tensor] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base_optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's zero_grad."""
        self.base_optimizer.zero_grad(set_to_none)

    def part(self, *batch: Any) -> Any:
        """The rows [jn/s, (j+1)n/s) of each argument for sample j of a split batch, else all."""
        if self.batch == "split" and self._sampled:
            self._rows = len(batch[0])
            self._count = min(self._count, self._rows)
            begin, end = self._bounds()
            batch = tuple(item[begin:end] for item in batch)
        return batch[0] if len(batch) == 1 else batch

    def _bounds(self) -> tuple[int, int]:
        j, n, s = self._sample, self._rows, self._count
        return j * n // s, (j + 1) * n // s

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step: estimate_gradient, then the base optimizer's step; returns the first loss."""
        loss = self.estimate_gradient(closure)
        self.base_optimizer.step()
        self.num_steps += 1
        return loss

    def estimate_gradient(self, closure: Callable[[], Tensor]) -> Tensor:
        """Fills p.grad with the tilted gradient; returns the first pass's loss, detached."""
        self._sampled = self.num_steps % self.every == 0
        self._sample, self._rows = 0, 0
        self._count = self.num_samples if self._sampled else 1
        self._passes = []
        moved = self._perturbed_parameters() if self._sampled else []
        trained = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        tilt = self.tilt(self.num_steps) if callable(self.tilt) else float(self.tilt)
        state = StreamingTilt(tilt if self._sampled else 0.0, self.skip_nonfinite_loss)
        means: list[Tensor | None] = [None for _ in trained]
        losses, log_sizes, norms = [], [], []
        owners: list[list[Tensor]] = []  # the positions of the chain's states that were counted
        masks = torch.random.get_rng_state()
        try:
            if self._sampled and self.sampler == "hmc":
                for sample, share in self._chain_states(closure, moved, trained, masks, state):
                    losses.append(sample.loss)
                    log_sizes.append(math.log(share) if share > 0.0 else -math.inf)
                    owners.append(sample.position)
                    if share > 0.0:
                        self._accumulate(means, sample.extra, *state.update(sample.loss, log_sizes[-1]))
                self._count = 0
            while self._sample < self._count:
                self._perturb(moved)
                if self._sampled and self.sampler == "ascent":
                    self._run(closure, trained, masks)
                    norms.append(self._ascend(moved))
                losses.append(float(self._run(closure, trained, masks)))
                begin, end = self._bounds()
                log_sizes.append(math.log(end - begin) if end > begin else 0.0)
                self._accumulate(means, [p.grad for p in trained], *state.update(losses[-1], log_sizes[-1]))
                self._sample += 1
        finally:
            self._sampled = False
            with torch.no_grad():
                for m in moved:
                    m.parameter.copy_(m.origin)
        for p, mean in zip(trained, means, strict=True):
            p.grad = None if mean is None else mean.to(p.dtype)
        self.losses = torch.tensor(losses, dtype=torch.float64)
        sizes = torch.tensor(log_sizes, dtype=torch.float64).exp()
        counted = (self.losses.isfinite() | (not self.skip_nonfinite_loss)) & (sizes > 0.0)
        self.weights = torch.zeros_like(sizes)
        if counted.any():
            self.weights[counted] = tilted_weights(self.losses[counted], state.tilt, sizes[counted])
        self.gradient_norms = torch.stack(norms) if norms else torch.full_like(sizes, math.nan)
        self.ess, self.num_nonfinite = state.ess, state.num_nonfinite
        if owners and self.chain.recycle:
            totals: dict[int, float] = {}
            for owner, weight in zip(owners, self.weights.tolist(), strict=True):
                totals[id(owner)] = totals.get(id(owner), 0.0) + weight
            self.ess = 1.0 / sum(total * total for total in totals.values())
        return self._passes[0]

    def _perturbed_parameters(self) -> list[_Perturbed]:
        """Trainable parameters of groups with rho != 0, copied; offsets count every parameter."""
        entries: list[tuple[Tensor, dict[str, Any]]] = [
            (p, {key: group.get(key, value) for key, value in self.defaults.items()})
            for group in self.param_groups
            for p in group["params"]
        ]
        offsets = base_offsets([p.numel() for p, _ in entries])
        moved = []
        for (p, own), offset in zip(entries, offsets, strict=True):
            if p.requires_grad and own["rho"] != 0.0:
                radius = own["radius"]
                if radius is None:  # SAM has no noise
                    radius = 0.0 if self.sampler == "ascent" and self.num_samples == 1 else own["rho"]
                origin = p.detach().clone()
                moved.append(_Perturbed(p, origin, offset, own["rho"], radius, own["adaptive"]))
        return moved

    def _run(self, closure: Callable[[], Tensor], trained: Sequence[Tensor], masks: Tensor) -> Tensor:
        """One forward and backward pass under the step's random masks."""
        if self._passes and self.same_masks:
            torch.random.set_rng_state(masks)
        for p in trained:
            p.grad = None
        self._passes.append(closure().detach().clone())
        return self._passes[-1]

    @torch.no_grad()
    def _perturb(self, moved: list[_Perturbed]) -> None:
        """θ = θ₀ + r D ν of the current sample."""
        if not any(m.radius for m in moved):
            for m in moved:
                m.parameter.copy_(m.origin)
            return
        noise, scale = self._torch_noise(moved) if self.rng == "torch" else self._noise(moved)
        for m, v in zip(moved, noise, strict=True):
            theta = _wide(m.origin)
            shift = v.to(theta.dtype) * (m.radius * scale)
            self._write([m], [torch.addcmul(theta, shift, theta.abs()) if m.adaptive else theta + shift], 0)

    def _write(self, moved: Sequence[_Perturbed], values: Sequence[Tensor], ascent: int) -> None:
        """θ = values, rounded; ``ascent``: 1 for an ascent, 0 for noise. A chain rounds alike at all its positions."""
        number = 0 if self.sampler == "hmc" else 2 * self._sample + ascent
        where = {"seed": self.seed, "step": self.num_steps, "sample": number}
        write([m.parameter for m in moved], values, [m.offset for m in moved], rounding=self.rounding, **where)

    def _noise(self, moved: list[_Perturbed]) -> tuple[list[Tensor], Tensor]:
        noise = unit_noise(
            [m.parameter for m in moved],
            [m.offset for m in moved],
            seed=self.seed,
            step=self.num_steps,
            sample=self._sample,
            noise=self.noise,
            antithetic=self.antithetic,
        )
        return noise, torch.ones((), dtype=torch.float64)

    def _torch_noise(self, moved: list[_Perturbed]) -> tuple[list[Tensor], Tensor]:
        """Normals or signs of generators of our own, seeded by (seed, step, sample)."""
        odd = self.antithetic and self._sample % 2 == 1
        draw = self._sample - 1 if odd else self._sample
        generators = self._generators(moved, draw)
        z = [torch.empty_like(_wide(m.origin)).normal_(generator=generators[m.parameter.device]) for m in moved]
        if self.noise == "rademacher":
            z = [torch.ones_like(part).copysign(part) for part in z]
        first = generators[moved[0].parameter.device]
        scale = noise_scale(z, self.noise, lambda: float(torch.rand((), generator=first, device=first.device)))
        return z, -scale if odd else scale

    def _generators(self, moved: Sequence[_Perturbed], draw: int) -> dict[torch.device, torch.Generator]:
        generators = {}
        for device in {m.parameter.device for m in moved}:
            generators[device] = torch.Generator(device)
            generators[device].manual_seed((self.seed << 32) + (self.num_steps << 12) + draw & (1 << 63) - 1)
        return generators

    def _ascend(self, moved: list[_Perturbed]) -> Tensor:
        """The ascent, over the perturbed parameters that have a gradient."""
        pairs = [(m, m.parameter.grad) for m in moved if m.parameter.grad is not None]
        return ascend(
            [m.parameter for m, _ in pairs],
            [m.origin for m, _ in pairs],
            [g for _, g in pairs],
            [m.rho for m, _ in pairs],
            [m.adaptive for m, _ in pairs],
            lambda _, values: self._write([m for m, _ in pairs], values, 1),
        )

    def _chain_states(
        self,
        closure: Callable[[], Tensor],
        moved: Sequence[_Perturbed],
        trained: Sequence[Tensor],
        masks: Tensor,
        tilted: StreamingTilt,
    ) -> Iterator[tuple[ChainState, float]]:
        """The chain's states of this step and their shares, with the gradients of ``trained``; turns t into t - δ."""
        scales = self._chain_scales(moved)

        def evaluate(position: list[Tensor]) -> ChainState:
            with torch.no_grad():
                for m, scale, x in zip(moved, scales, position, strict=True):
                    self._write([m], [m.origin.double() + scale * x], 0)
            loss = float(self._run(closure, trained, masks))
            gradients = [None if p.grad is None else p.grad.clone() for p in trained]
            own = [torch.zeros_like(m.origin) if m.parameter.grad is None else m.parameter.grad for m in moved]
            force = [scale * g.double() for scale, g in zip(scales, own, strict=True)]
            return ChainState(position, loss, force, gradients)

        chain, draws = self.chain, self._draws(moved)
        known = all(m.parameter in self._positions for m in moved)
        chain.position = [self._positions[m.parameter] for m in moved] if known and self._positions else None
        start = chain.start(evaluate, draws, tilted.tilt)
        tilted.tilt = 0.0 if tilted.tilt == chain.delta else tilted.tilt - chain.delta
        yield from chain.sample(start, evaluate, draws, self.num_samples)
        assert chain.position is not None
        self._positions.update(zip([m.parameter for m in moved], chain.position, strict=True))

    def _chain_scales(self, moved: Sequence[_Perturbed]) -> list[Tensor]:
        """T c of each perturbed parameter, float64."""
        unit = self.chain.unit(sum(m.origin.numel() for m in moved))
        return [m.rho * unit * (m.origin.abs() if m.adaptive else torch.ones_like(m.origin)).double() for m in moved]

    def _draws(self, moved: Sequence[_Perturbed]) -> Draws:
        parameters = [m.parameter.detach() for m in moved]
        if self.rng == "torch":
            return TorchDraws(parameters, self._generators(moved, 0))
        return PhiloxDraws(parameters, [m.offset for m in moved], self.seed, self.num_steps)

    def chain_position(self) -> list[Tensor]:
        """ε = T c x of each perturbed parameter where the chain of "hmc" stands, float64."""
        moved = self._perturbed_parameters()
        scales = self._chain_scales(moved)
        return [scale * self._positions[m.parameter] for m, scale in zip(moved, scales, strict=True)]

    @staticmethod
    def _accumulate(means: list[Tensor | None], gradients: Sequence[Tensor | None], keep: float, add: float) -> None:
        """A <- keep A + add g; a gradient that is None in some passes counts as zero there."""
        for i, gradient in enumerate(gradients):
            mean = means[i]
            if gradient is None and mean is None:
                continue
            if mean is None:
                assert gradient is not None
                mean = means[i] = torch.zeros_like(_wide(gradient))
            StreamingTilt.blend(mean, torch.zeros_like(mean) if gradient is None else gradient, keep, add)
