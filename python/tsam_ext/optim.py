"""TSAM: a thin optimizer around any torch optimizer. It decides when, the ops do what.

One step = one gradient estimate (estimate.py) into ``p.grad``, then the base optimizer's own step.
Invariant: no arithmetic over elements here, no host sync, and after any exception the parameters are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint
from .base import WrappingOptimizer, base_of, check_groups, make_capturable, with_capturable
from .chain import Chain
from .estimate import Estimate
from .hmc_estimate import HmcEstimate
from .metrics import Diagnostics
from .module_state import TrainingNormWatch
from .sample import Sample
from .settings import Settings, Tilt, check_group, checked_int, reject
from .table import Table


class TSAM(WrappingOptimizer):
    """Tilted sharpness-aware minimization around a base optimizer.

    Each step draws ``num_samples`` perturbations ε of the parameters θ and gives the base optimizer the gradient
    Σ w ∇L(θ+ε) with w = softmax(tilt · L(θ+ε)): the gradient of the tilted objective
    (1/t) log E exp(t L(θ+ε)) (T. Li, T. Zhou, J. Bilmes, "Tilted Sharpness-Aware Minimization", ICML 2025).

    Args:
        params: parameters or parameter groups, as for the base class; ``None`` if ``base_optimizer`` is an instance.
            A group may set ``rho``, ``radius`` and ``adaptive`` of its own. Dense float32, float64, bfloat16 or
            float16 tensors on the CPU, a GPU or several devices.
        base_optimizer: optimizer class (it gets ``base_kwargs``) or instance. Default: ``torch.optim.SGD``.
        rho: length of the ascent, ‖ε/D‖ over all groups together; 0 leaves a group unperturbed. Default 0.05.
        tilt: t, how much higher losses weigh more: 0 is the mean, ``inf`` the worst sample, negative favours low
            losses. A float, a 0-dim tensor, or a function of the step. Default 1.
        num_samples: s, perturbations a step. Default 3.
        sampler: ``"ascent"`` (default; noise, then an ascent of length rho along the gradient there: 2 gradients a
            sample), ``"noise"`` (1 gradient a sample) or ``"hmc"`` (Hamiltonian Monte Carlo on the density
            ∝ prior(ε) exp(delta · L(θ+ε)): 1 + num_leapfrog_steps · (num_samples + burn_in) gradients a step).
        radius: length of the noise (its root mean square for gaussian); ``None``: the group's rho; 0: no noise.
        noise: ``"gaussian"`` (z/√d; default), ``"sphere"`` (z/‖z‖), ``"ball"`` (within it), ``"rademacher"`` (±1/√d).
        adaptive: scale everything by D = |θ| elementwise (ASAM with η=0); a zero parameter then never moves.
        batch: ``"whole"`` (default) or ``"split"``: sample j sees the j-th part of the minibatch, so that s samples
            cost no more than one; wrap the batch in :meth:`part`. Parts weigh by their rows.
        every: sample each ``every``-th step, starting with the first; the others take the plain gradient. Default 1.
        antithetic: every second sample takes −z of the one before. Default False.
        skip_nonfinite_loss: leave samples with a non-finite loss out instead of returning NaN. Default False.
        same_masks: all passes of a step see the same random numbers (dropout), as one forward would. Default True.
        model: module whose normalisation layers shall see each step as one forward. Default ``None``.
        seed: 64-bit seed of the noise; ``None`` draws one from torch's default generator. The same seed gives the
            same noise bits on every machine.
        delta: for ``hmc``, δ, how far the samples lean towards high losses; they then weigh by exp((tilt − δ) L). A
            float, a 0-dim tensor, ``None`` (default: δ = tilt, so that all weigh the same) or ``"auto"``:
            delta_scale · √d / ‖T∇L‖ with the norm a running mean on the device, T = rho D. A heuristic: with
            delta_scale 1 the sampled losses are lifted by about one standard deviation.
        delta_scale: see delta. Default 1.
        num_leapfrog_steps: for ``hmc``, N, gradients a trajectory. Default 1.
        step_size: for ``hmc``, the angle (gaussian prior) or length (ball) of one drift; ``None``: π/(2N).
        adapt_step_size: move step_size towards an acceptance of 0.8 after each step, never above π/(2N) or a larger
            step_size of the user's. Default True.
        prior: for ``hmc``, ``"gaussian"`` (default; ε = rho D x/√d with x standard normal) or ``"ball"`` (‖ε/(rho D)‖
            ≤ 1, the paper's constraint).
        metropolis: accept or reject each trajectory, which makes the samples exact. Default True.
        chain: ``"persistent"`` (default; goes on from the last step's ε, which checkpoints hold) or ``"fresh"`` (starts
            each step from the prior: biased towards it unless burn_in is long).
        burn_in: trajectories before the first sample of a step. Default 0.
        recycle: for ``hmc``, count all N states of a trajectory and its start, each by its chance of being accepted (of
            not moving on), instead of the one that it ends with: more states for the same gradients. Default False.
        capturable: count steps on the device, so that each replay of a CUDA graph of a step draws anew. Needs
            ``same_masks=False`` (a capture rewinds no generator; with hmc: no dropout), ``every=1``, a tilt that is no
            function, and of a base instance its own ``capturable=True`` if it has that option. Default False.
        **base_kwargs: go to the base class (``lr``, ``momentum``, ...).

    Raises:
        TypeError, ValueError: for a bad argument, naming it, what came and what was wanted.

    Example:
        >>> import torch, tsam_ext
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = tsam_ext.TSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05, tilt=5.0, seed=0)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, 1)
        >>> def closure():
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = opt.step(closure)
        >>> tuple(opt.diagnostics.losses.shape)
        (3,)
    """

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: type[Optimizer] | Optimizer = torch.optim.SGD,
        *,
        rho: float = 0.05,
        tilt: Tilt = 1.0,
        num_samples: int = 3,
        sampler: str = "ascent",
        radius: float | None = None,
        noise: str = "gaussian",
        adaptive: bool = False,
        batch: str = "whole",
        every: int = 1,
        antithetic: bool = False,
        skip_nonfinite_loss: bool = False,
        same_masks: bool = True,
        model: nn.Module | None = None,
        seed: int | None = None,
        delta: float | str | Tensor | None = None,
        delta_scale: float = 1.0,
        num_leapfrog_steps: int = 1,
        step_size: float | None = None,
        adapt_step_size: bool = True,
        prior: str = "gaussian",
        metropolis: bool = True,
        chain: str = "persistent",
        burn_in: int = 0,
        recycle: bool = False,
        capturable: bool = False,
        **base_kwargs: Any,
    ) -> None:
        own = {"rho": rho, "radius": radius, "adaptive": adaptive}
        check_group(own)
        hmc = {"delta": delta, "delta_scale": delta_scale, "num_leapfrog_steps": num_leapfrog_steps}
        hmc |= {"step_size": step_size, "adapt_step_size": adapt_step_size, "prior": prior}
        hmc |= {"metropolis": metropolis, "chain": chain, "burn_in": burn_in, "recycle": recycle}
        values = {"tilt": tilt, "num_samples": num_samples, "sampler": sampler, "noise": noise, "batch": batch}
        values |= {"every": every, "antithetic": antithetic, "skip_nonfinite_loss": skip_nonfinite_loss}
        values |= {"same_masks": same_masks, "capturable": capturable}
        self._settings = Settings.checked(hmc, values)
        if model is not None and not isinstance(model, nn.Module):
            raise reject("model", model, "a torch.nn.Module or None", TypeError)
        if seed is not None:
            seed = checked_int("seed", seed, 0, (1 << 64) - 1)
        base = base_of(params, base_optimizer, base_kwargs)
        check_groups(base.param_groups)
        if capturable:
            make_capturable(base, own=isinstance(base_optimizer, type))

        self._base: Optimizer | None = None
        super().__init__(base.param_groups, {})
        self._base = base
        self._own_defaults = own
        self._set_own_keys()
        self.model = model
        self.seed = int(torch.randint(0, (1 << 63) - 1, ())) if seed is None else seed
        self._tilt_is_own = not (isinstance(tilt, (int, float)) and tilt in (0.0, 1.0))
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        self._step: int | Tensor = torch.zeros((), dtype=torch.float64, device=device) if capturable else 0
        self._chain = Chain(self._settings.hmc, device)
        self._forget()

    def _forget(self) -> None:
        """Scratch that is never saved or copied."""
        self._saved: dict[Tensor, tuple[Any, Tensor]] = {}
        self._estimate: Estimate | None = None
        self._pending = False
        self._inside_perturbed = False
        self._watched = False
        self._diagnostics = Diagnostics()

    @property
    def diagnostics(self) -> Diagnostics:
        """Device tensors that describe the last completed step."""
        return self._diagnostics

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With ``closure``: one whole step; returns the first pass's loss, detached. Without: :meth:`apply`.

        The closure computes the loss, calls ``backward()`` and returns the loss (one element). It runs once a
        gradient: s times for ``noise``, 2s for ``ascent``, once on plain steps of ``every``. ``p.grad`` is cleared
        before each run.

        Raises:
            RuntimeError: without a closure when no estimate is pending, so that a training loop which ignores
                closures fails instead of training without perturbations.
        """
        loss = None
        if closure is not None:
            loss = self.estimate_gradient(closure)
        elif not self._pending:
            raise RuntimeError(
                "TSAM: step() without a closure needs an estimate: call step(closure), or estimate_gradient(closure) "
                "or the samples() loop before it. Nothing was updated."
            )
        self.base_optimizer.step()
        self._pending = False
        self._step += 1
        return loss

    def apply(self) -> None:
        """The base optimizer's step with the gradient that an estimate has left in ``p.grad``."""
        self.step()

    def estimate_gradient(self, closure: Callable[[], Any]) -> Tensor:
        """Fills ``p.grad`` with the tilted gradient and leaves the parameters as they are, bit for bit.

        Clipping or unscaling goes between this and :meth:`apply`. Returns the first pass's loss, detached.
        """
        for sample in self.samples():
            with sample, torch.enable_grad():
                sample.record(closure())
        assert self._estimate is not None and self._estimate.first_loss is not None
        return self._estimate.first_loss

    def samples(self) -> Iterator[Sample]:
        """The same estimate as a loop, one item a gradient, the same body for each; then :meth:`apply`.

        ::

            for sample in opt.samples():
                with sample:
                    loss = criterion(model(x), y)
                    loss.backward()
                    sample.record(loss)
            opt.apply()

        Several backward calls an item accumulate. Leaving the loop early, by break or exception, restores everything.
        """
        self._refuse_inside_perturbed("a step")
        table = Table.of(self.param_groups)
        self._end_estimate()
        estimate = self._estimate = self._new_estimate(table, plain=self._settings.is_plain(self._step))
        watch = TrainingNormWatch() if self.model is None and not self._watched and estimate.repeats else None
        try:
            yield from estimate.passes()
        finally:
            if watch is not None:
                self._watched = True
                watch.close()
            estimate.current = None
        self._pending = True
        inert = estimate.plain or (isinstance(estimate, HmcEstimate) and self._settings.hmc.delta is None)
        own_tilt = self._tilt_is_own and not inert  # with delta = tilt equal weights are meant
        chain = self._chain.scalars.clone() if isinstance(estimate, HmcEstimate) else None
        rows = (estimate.num_samples, estimate.rows_per_sample)
        self._diagnostics._attach(estimate.state, rows, own_tilt, chain, table.dimension_over_rho)

    def _new_estimate(self, table: Table, plain: bool) -> Estimate:
        seed = self.seed - (1 << 64) if self.seed >= 1 << 63 else self.seed
        if isinstance(self._step, Tensor) and table.parameters:
            self._step = self._step.to(table.parameters[0].device)  # the model may have moved since
        common: dict[str, Any] = {"seed": seed, "step": self._step, "plain": plain, "model": self.model}
        if self._settings.sampler == "hmc" and not plain:
            return HmcEstimate(table, self._settings, self._saved, chain=self._chain, **common)
        return Estimate(table, self._settings, self._saved, **common)

    def _end_estimate(self) -> None:
        """Undoes what is left of an estimate that nobody finished."""
        self._pending = False
        if self._estimate is not None:
            self._estimate.abort()
        self._estimate = None

    def part(self, *batch: Any) -> Any:
        """The rows of ``batch`` that the current pass sees: all of them, or with ``batch="split"`` sample j's part.

        Takes tensors (or anything with ``len`` and slices) of equal length; returns one object for one argument, a
        tuple for several. Of n rows sample j of s sees those from ⌊jn/s⌋ to ⌊(j+1)n/s⌋; a batch of fewer rows than
        samples uses as many samples as rows. Outside a step the batch comes back whole.

        Raises:
            ValueError: for arguments of different lengths, or of another length than in the step's earlier passes.
        """
        if not batch:
            raise TypeError("TSAM: part: got no argument, expected the tensors of one batch")
        rows = len(batch[0])
        for i, rest in enumerate(batch):
            if len(rest) != rows:
                raise reject(f"part: argument {i}", f"{len(rest)} rows", f"{rows}, as in argument 0")
        begin, end = 0, rows
        if self._estimate is not None and not self._estimate.closed:
            begin, end = self._estimate.part_bounds(rows)
        parts = batch if (begin, end) == (0, rows) else tuple(item[begin:end] for item in batch)
        return parts[0] if len(parts) == 1 else parts

    @contextmanager
    def perturbed(self, sample: int = 0) -> Iterator[None]:
        """The parameters at θ+ε inside the block, θ bit for bit after it, exceptions included.

        ε is the noise of ``sample`` in the coming step; with the sampler ``ascent`` and gradients in ``p.grad``, the
        ascent along them as well; with ``hmc`` it is where the chain stands. ``p.grad`` is left alone.
        """
        checked_int("sample", sample, 0, self._settings.num_samples - 1)
        self._refuse_inside_perturbed("perturbed()")
        if self._estimate is not None and not self._estimate.closed:
            raise RuntimeError("TSAM: perturbed() inside a step: the parameters are perturbed already.")
        estimate = self._new_estimate(Table.of(self.param_groups), plain=False)
        self._inside_perturbed = True
        try:
            if isinstance(estimate, HmcEstimate):
                estimate.place(fresh=False)
            elif estimate.table.draws:
                estimate.perturb(sample)
            if self._settings.sampler == "ascent":
                estimate.ascend(estimate.gradients(), sample)
            yield
        finally:
            self._inside_perturbed = False
            estimate.undo()

    def chain_position(self) -> list[Tensor]:
        """ε where the chain of the sampler ``hmc`` stands, one tensor a perturbed parameter, like it.

        Raises:
            RuntimeError: with another sampler, inside a step, or before the first step.
        """
        if self._settings.sampler != "hmc" or not self._chain.started:
            raise RuntimeError("TSAM: chain_position() needs sampler='hmc' and a step.")
        if self._inside_perturbed or (self._estimate is not None and not self._estimate.closed):
            raise RuntimeError("TSAM: chain_position() inside a step: the chain is moving.")
        return self._chain.perturbations(Table.of(self.param_groups))

    def _refuse_inside_perturbed(self, what: str) -> None:
        if self._inside_perturbed:
            raise RuntimeError(f"TSAM: {what} inside perturbed(): what is there now is not where the step starts.")

    def first_step(self, zero_grad: bool = False) -> None:
        """SAM's first half: moves the parameters along the gradient in ``p.grad``. ``num_samples=1, radius=0`` only.

        Raises:
            RuntimeError: with other settings (use :meth:`samples`).
        """
        self._check_two_steps("first_step")
        self._refuse_inside_perturbed("first_step()")
        self._end_estimate()
        estimate = self._estimate = self._new_estimate(Table.of(self.param_groups), plain=False)
        try:
            estimate.ascend(estimate.gradients(), 0)
        except BaseException:
            estimate.undo()
            self._estimate = None
            raise
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """SAM's second half: puts the parameters back and steps with the gradient now in ``p.grad``.

        Raises:
            RuntimeError: without a first_step before it.
        """
        self._check_two_steps("second_step")
        if self._estimate is None or self._estimate.closed:
            raise RuntimeError("TSAM: second_step() needs a first_step() before it. Nothing was updated.")
        self._estimate.undo()
        self._estimate = None
        self._pending = True
        self.apply()
        if zero_grad:
            self.zero_grad()

    def _check_two_steps(self, name: str) -> None:
        if not self._settings.two_steps or Table.of(self.param_groups).draws:
            raise RuntimeError(
                f"TSAM: {name}() is SAM's two-step form and needs num_samples=1, radius=0, sampler='ascent', "
                "batch='whole' and every=1; use the samples() loop or step(closure) with these settings."
            )

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict with one more key, ``"tsam"``; no scratch."""
        chain = self._chain.pack(self.param_groups) if self._settings.sampler == "hmc" else None
        return checkpoint.pack(self.base_optimizer, self._settings, step=int(self._step), seed=self.seed, chain=chain)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave; continuing then gives the same bits as never having stopped.

        A state dict of the base optimizer alone loads too: step and seed stay as they are. The settings are those of
        this object, not the saved ones.

        Raises:
            ValueError: before anything changes, if the base class, the shapes or the noise scheme differ.
        """
        rest, own = checkpoint.unpack(self.base_optimizer, state_dict)
        rest = with_capturable(rest, self.param_groups) if self._settings.capturable else rest
        self.base_optimizer.load_state_dict(rest)
        self._set_own_keys()
        self._end_estimate()
        if own is not None:
            step, self.seed, chain = own
            self._step = self._step.fill_(step) if isinstance(self._step, Tensor) else step
            if self._settings.sampler == "hmc":
                self._chain.unpack(self.param_groups, chain)

    def __getstate__(self) -> dict[str, Any]:
        keep = ("_base", "_settings", "_own_defaults", "model", "seed", "_tilt_is_own", "_step", "_chain")
        return {key: self.__dict__[key] for key in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
