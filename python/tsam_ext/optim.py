"""TSAM: a thin optimizer around any torch optimizer. It decides when, the sampler and the ops do what.

One step = one gradient estimate (estimates/) into ``p.grad``, then the base optimizer's own step.
Invariant: no arithmetic over elements here, no host sync, no sampler's name; after any exception the parameters are
what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint
from ._compile import graphs_break_at, outside_graphs
from .base import base_of, make_capturable
from .carry import Carry
from .closures import closure_of_user
from .diagnostics import Diagnostics
from .engine.checks import TSAM as OPTIMIZER
from .engine.checks import check_int
from .estimates import Estimate, Sample, part_of
from .loss_scale import Scaler, check_scaler, refuse_closure
from .module_state import ModuleWatch
from .persistence import PersistentOptimizer
from .planning import Kind, planned
from .processes import Processes
from .progress import Progress
from .samplers import Sampler, SamplerName, shown_setting
from .settings import GROUP_KEYS, Length, Settings, Tilt, check_group_values
from .table import Table, first_device
from .together import Reduction, Sync

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch

RHO = 0.05
OWN_NAMES = dict(zip(GROUP_KEYS, GROUP_KEYS, strict=True))


@graphs_break_at("step", "estimate_gradient", and_below=False)
@graphs_break_at("apply", "samples", "part", "first_step", "second_step")
class TSAM(PersistentOptimizer):
    """Tilted sharpness-aware minimization around a base optimizer; with one sample, the default, SAM.

    Each step draws ``num_samples`` perturbations ε of the parameters θ and gives the base optimizer the gradient
    Σ w ∇L(θ+ε) with w = softmax(tilt · L(θ+ε)): the gradient of the tilted objective
    (1/t) log E exp(t L(θ+ε)) (T. Li, T. Zhou, J. Bilmes, "Tilted Sharpness-Aware Minimization", ICML 2025).

    Args:
        params: parameters or parameter groups, as for the base class; or a base optimizer itself; ``None`` if
            ``base_optimizer`` is an instance. Dense float32, float64, bfloat16, float16 or complex tensors on the CPU,
            a GPU or several devices; frozen ones may be anything. A group may set ``rho``, ``radius`` and ``adaptive``
            of its own; where the base has an option of that name, ours is ``tsam_rho`` and so on.
        base_optimizer: optimizer class (it gets ``base_kwargs``) or instance. Default: ``torch.optim.SGD``.
        rho: length of the ascent, ‖ε/D‖ over all groups together; 0 leaves a group unperturbed. A number, or a
            function of the step, as ``radius`` may be. Default 0.05.
        tilt: t, how much higher losses weigh more: 0 is the mean, ``inf`` the worst sample, negative favours low
            losses. A float, a 0-dim tensor, or a function of the step. Default 1. Of one sample it weighs nothing.
        num_samples: s, perturbations per step. Default 1: with ``ascent`` SAM (Foret et al., ICLR 2021).
        sampler: ``"ascent"`` (default), ``"noise"`` or ``"hmc"``, or an object with options: :class:`Ascent`,
            :class:`Noise`, :class:`HMC`, whose pages say what they do and cost.
        adaptive: scale all by D = |θ| elementwise (ASAM with η=0); a zero parameter then never moves. Default False.
        radius: length of the noise (root mean square for gaussian). ``None``: 0 for one sample of ``ascent``, else rho.
        batch: ``"whole"`` (default) or ``"split"``: sample j sees the j-th part of the minibatch, so that s samples
            cost no more than one; wrap the batch in :meth:`part`. Parts weigh by their rows. Needs 2 samples or more.
        every: sample each ``every``-th step, starting with the first. Default 1.
        between: what the other steps take. ``"carry"`` (default for ``ascent``): the plain gradient, and what the last
            sampled one had beside it; ``"plain"`` (default for ``noise`` and ``hmc``, of which only the tilt's part
            can be carried, see README): the plain gradient alone.
        skip_nonfinite_loss: leave samples with a non-finite loss out instead of returning NaN. Default False.
        same_masks: all passes of a step see the same random numbers (dropout), as one forward would. Default True.
        model: module whose buffers shall move as in one forward per step, and whose parameters that another optimizer
            holds shall get one mean gradient, added to their p.grad. Default ``None``.
        generators: the user's own random generators, which all passes of a step shall see alike. Default none.
        scaler: the ``torch.amp.GradScaler`` whose ``scale(loss)`` the closure differentiates, or its scale as a tensor.
            ``hmc`` needs it, to move along true gradients; a pass that overflows rejects its trajectory. ``p.grad`` is
            scaled, and NaN after an overflow, for ``scaler.unscale_``, ``step`` and ``update``. Default ``None``.
        seed: 64-bit seed of the noise; ``None`` draws one from torch's default generator. The same seed gives the
            same noise bits on every machine.
        capturable: count steps on the device, so that each replay of a CUDA graph of a step draws anew. Needs
            ``same_masks=False`` (a capture rewinds no generator), ``every=1``, a tilt that is no function, and of a
            base instance its own ``capturable=True`` if it has that option. Default False.
        rounding: how θ+ε is rounded where a parameter is bfloat16 or float16; float32 and float64 do not look.
            ``"stochastic"`` (default): right in the mean, with random noise of its own. ``"nearest"`` loses what is
            below half a unit in the last place. Better than both: float32 parameters under autocast. See
            :attr:`Diagnostics.realised_norm`.
        process_group: the ranks that train this model with each other. ``"auto"`` (default): those of the
            DistributedDataParallel that is ``model`` or runs in the first pass, or of parameters that are DTensors;
            a group where neither says it (its backward passes reduce gradients); ``None``: this process trains alone.
        sync: over several ranks, ``"global"`` (default): as one process on all their rows; ``"local"``: each rank
            perturbs and tilts on its own rows, by noise of its own, and the gradients are averaged, once;
            ``"samples"``: ranks have the same batch and share the samples.
        reduction: of ``"global"``, ``"tail"`` (default): the mean so far travels beneath the last backward pass;
            ``"manual"``: after it, one reduction less.
        weigh_rows: of ``"manual"``: a rank counts by its rows, which it passes through :meth:`part`. Default False.
        **base_kwargs: go to the base class (``lr``, ``momentum``, ...).

    Raises:
        TypeError, ValueError: for a bad argument, naming it, what came and what was wanted.

    Example:
        >>> import torch, tsam_ext
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = tsam_ext.TSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05, num_samples=3, seed=0)
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
        params: Iterable[Any] | Optimizer | None,
        base_optimizer: type[Optimizer] | Optimizer = torch.optim.SGD,
        *,
        rho: Length = RHO,
        tilt: Tilt = 1.0,
        num_samples: int = 1,
        sampler: Sampler | SamplerName = "ascent",
        adaptive: bool = False,
        radius: Length | None = None,
        batch: Literal["whole", "split"] = "whole",
        every: int = 1,
        between: Literal["carry", "plain"] | None = None,
        skip_nonfinite_loss: bool = False,
        same_masks: bool = True,
        model: nn.Module | None = None,
        generators: Sequence[torch.Generator] = (),
        scaler: Scaler = None,
        seed: int | None = None,
        capturable: bool = False,
        rounding: Literal["nearest", "stochastic"] = "stochastic",
        process_group: ProcessGroup | Literal["auto"] | None = "auto",
        sync: Sync = "global",
        reduction: Reduction = "tail",
        weigh_rows: bool = False,
        **base_kwargs: Any,
    ) -> None:
        own = {"rho": rho, "radius": radius, "adaptive": adaptive}
        check_group_values(own, "", OWN_NAMES)
        # By identity: a 0.05 of the user's is another object than the default, and so is known to be meant.
        meant = {"rho": rho is not RHO, "radius": radius is not None}
        given = {name: own[name] for name, is_meant in meant.items() if is_meant}
        self._settings = Settings(
            tilt=tilt,
            num_samples=num_samples,
            sampler=sampler,  # type: ignore[arg-type]  # a name becomes its sampler there
            batch=batch,
            every=every,
            skip_nonfinite_loss=skip_nonfinite_loss,
            same_masks=same_masks,
            generators=tuple(generators),
            capturable=capturable,
            rounding=rounding,
            between=between,
        )
        chosen = self._settings.sampler
        self._processes = Processes(process_group, sync=sync, reduction=reduction, weigh_rows=weigh_rows, batch=batch)
        self._processes.check_model(model)
        if seed is not None:
            seed = check_int(OPTIMIZER, "seed", seed, 0, (1 << 64) - 1)
        base = base_of(params, base_optimizer, base_kwargs, chosen)
        built = isinstance(base_optimizer, type) and not isinstance(params, Optimizer)
        if capturable:
            make_capturable(base, own=built)
        super().__init__(base, chosen, own=own, given=given, foreign=not built)
        self.model, self.scaler = model, check_scaler(scaler)
        device = first_device(self.param_groups)
        carry = Carry() if self._settings.carries else None
        self._progress = Progress(chosen.init(device), seed, device, capturable=capturable, carry=carry)
        self._progress.history.find(p.grad for group in self.param_groups for p in group["params"])
        self.keep(self._progress)
        self._settings.warn_of_idle_tilt()

    @property
    def settings(self) -> Settings:
        """The settings that hold for all groups, read-only; rho, radius and adaptive stand in ``param_groups``."""
        return self._settings

    @property
    def seed(self) -> int:
        """The seed of the noise: what was given, drawn, or loaded."""
        return self._progress.seed

    @property
    def diagnostics(self) -> Diagnostics:
        """Device tensors that describe the last completed step."""
        return self._progress.diagnostics

    def __repr__(self) -> str:
        lines = [f"    {self._settings.shown()}", f"    base optimizer: {type(self.base_optimizer).__name__}"]
        for g, group in enumerate(self.param_groups):
            options = (f"{key}={shown_setting(group[key])}" for key in self.options(group))
            lines.append(f"    param_groups[{g}]: {len(group['params'])} parameters, {', '.join(options)}")
        return "\n".join(["TSAM (", *lines, ")"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With ``closure``: one whole step; returns the first pass's loss, detached. Without: :meth:`apply`.

        The closure computes the loss, calls ``backward()`` and returns the loss (one element). It runs once per
        gradient: as often as the sampler's page says, and once on plain steps of ``every``. ``p.grad`` is cleared
        before each run. If the first run returns ``None`` and makes no gradient there was no batch: nothing changes
        but what the closure did, no step is counted, and ``None`` comes back.

        Raises:
            TypeError, ValueError: if what comes is no loss, naming it. The closure's exceptions pass through.
            RuntimeError: without a closure when no estimate is pending, so that a training loop which ignores
                closures fails instead of training without perturbations (only the step with no effect by which
                torch.distributed.checkpoint makes the base's state passes, and counts for nothing); with one beside
                ``scaler``; for a closure that never calls backward(), or that writes parameters.
        """
        progress, loss, closure = self._progress, None, closure_of_user(closure)
        if closure is not None:
            refuse_closure(self.scaler)
            with progress.whole_step():
                loss = self.estimate_gradient(closure)
            if loss is None:
                return None
        elif not progress.pending and checkpoint.is_priming(self.base_optimizer):
            if progress.inside is None:  # else the base would see moved parameters
                self.base_optimizer.step()
            return None
        else:
            progress.check_pending(self.scaler)
        self.step_base()
        return loss

    def apply(self) -> None:
        """The base optimizer's step with the gradient that an estimate has left in ``p.grad``."""
        self.step()

    def estimate_gradient(self, closure: Callable[[], Any]) -> Tensor | None:
        """Fills ``p.grad`` with the tilted gradient and leaves the parameters as they are, bit for bit.

        Clipping or unscaling goes between this and :meth:`apply`. Returns the first pass's loss, detached, or ``None``
        where there was no batch. Raises as :meth:`step` does.
        """
        passes = self.samples()
        for sample in passes:
            with sample, torch.enable_grad():
                loss = closure()
                if loss is None and sample.is_first and not sample.has_gradients:
                    self._progress.skip()
                    break
                sample.record(loss)
        else:
            estimate = self._progress.estimate
            assert estimate is not None
            return estimate.loss
        passes.close()
        return None

    def samples(self) -> Generator[Sample]:
        """The same estimate as a loop, one item per gradient, the same body for each; then :meth:`apply`.

        ::

            for sample in opt.samples():
                with sample:
                    loss = criterion(model(x), y)
                    loss.backward()
                    sample.record(loss)
            opt.apply()

        Several backward calls per item accumulate. Leaving the loop early, by break or exception, restores everything.

        Raises:
            RuntimeError: for an item that was not entered with ``with``, or in which no loss was recorded; inside
                :meth:`perturbed`.
            TypeError, ValueError: if what comes is no loss, naming it.
        """
        self._progress.refuse_inside_perturbed("a step")
        progress = self._progress
        progress.abort()
        plain = self._settings.is_plain(progress.step)
        estimate = self._planned("plain" if plain else "sampled")
        progress.begin(estimate)
        looks = self.model is None and estimate.repeats and not progress.history.watched
        try:
            watch = ModuleWatch(estimate.table.parameters, progress.history) if looks else nullcontext()
            with watch, self._processes.watch_alone(estimate.table):
                yield from estimate.passes()
            progress.finish(estimate, plain=plain)
        finally:
            if not progress.pending:
                progress.leave(estimate)

    def _planned(self, kind: Kind) -> Estimate:
        return planned(
            kind,
            self.param_groups,
            self.group_names,
            settings=self._settings,
            progress=self._progress,
            processes=self._processes,
            model=self.model,
            scaler=self.scaler,
        )

    def _table(self) -> Table:
        default, step = self._settings.default_radius, self._progress.step
        return Table.of(self.param_groups, self.group_names, step, default_radius=default)

    def part(self, *batch: Any) -> Any:
        """The rows of ``batch`` that the current pass sees: all of them, or with ``batch="split"`` sample j's part.

        Takes tensors (or anything with ``len`` and slices) of equal length; returns one object for one argument, a
        tuple for several. Of n rows sample j of s sees those from ⌊jn/s⌋ to ⌊(j+1)n/s⌋; a batch of fewer rows than
        samples uses as many samples as rows. Outside a step the batch comes back whole.

        Raises:
            TypeError: for no argument.
            ValueError: for arguments of different lengths, or of another length than in the step's earlier passes.
        """
        return part_of(batch, self._progress.running)

    @contextmanager
    @outside_graphs
    def perturbed(self, sample: int = 0) -> Iterator[None]:
        """The parameters at θ+ε inside the block, θ bit for bit after it, exceptions included.

        ε is the noise of ``sample`` in the coming step; where the sampler ascends and ``p.grad`` holds gradients, the
        ascent along them as well; where it keeps a chain, where that stands. ``p.grad`` is left alone.
        """
        check_int(OPTIMIZER, "sample", sample, 0, self._settings.num_samples - 1)
        self._progress.refuse_inside_perturbed("perturbed()")
        if self._progress.running is not None:
            raise RuntimeError("TSAM: perturbed() inside a step: the parameters are perturbed already.")
        estimate = self._planned("visit")
        try:
            self._progress.inside_perturbed = True
            self._progress.enter(estimate)
            estimate.visit(sample)
            yield
        finally:
            self._progress.inside_perturbed = False
            estimate.undo()
            self._progress.leave()

    @outside_graphs
    def chain_position(self) -> list[Tensor]:
        """ε where the sampler's Markov chain stands, one tensor per perturbed parameter, like it.

        Raises:
            RuntimeError: with a sampler that keeps no chain, inside a step, or before the first step.
        """
        if self._progress.inside_perturbed or self._progress.running is not None:
            raise RuntimeError("TSAM: chain_position() inside a step: the chain is moving.")
        return self._progress.sampler_state.perturbations(self._table())

    def first_step(self, zero_grad: bool = False) -> None:
        """SAM's first half: moves the parameters along the gradient in ``p.grad``. One sample without noise only.

        Raises:
            RuntimeError: with other settings (use :meth:`samples`), or without a gradient.
        """
        self._settings.check_two_steps("first_step", draws=self._table().draws)
        self._progress.refuse_inside_perturbed("first_step()")
        self._progress.abort()
        estimate = self._progress.estimate = self._planned("two steps")
        self._progress.enter(estimate)
        try:
            estimate.first_half()
        except BaseException:
            estimate.undo()
            self._progress.estimate = None
            self._progress.leave()
            raise
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """SAM's second half: puts the parameters back and steps with the gradient now in ``p.grad``.

        Raises:
            RuntimeError: without a first_step before it.
        """
        self._settings.check_two_steps("second_step", draws=self._table().draws)
        running = self._progress.running
        if running is None:
            raise RuntimeError("TSAM: second_step() needs a first_step() before it. Nothing was updated.")
        running.second_half()
        self._progress.estimate = None
        self._progress.completed(running)
        self.apply()
        if zero_grad:
            self.zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("_settings", "_progress", "_processes", "model", "scaler")}
        return super().__getstate__() | own
