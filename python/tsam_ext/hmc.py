"""Hamiltonian Monte Carlo on any differentiable log density over tensors: the engine of TSAM's sampler hmc.

    trace = tsam_ext.hmc.sample(lambda x: -0.5 * x.square().sum(), torch.zeros(3), seed=0)
    trace.draws.mean(0)

``sample`` starts a chain and ``resume`` goes on with it; both end in ``_run``. Invariant: the host reads nothing of a
transition, the caller's tensors are not written, and what ends a run early leaves the draws that were there.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._cuda import why_not
from .engine.checks import check_flag, check_int, check_list, check_number, check_positive, check_tensor, refuse, shown
from .engine.notices import warn
from .integrators import LEAPFROG, MCLACHLAN
from .trace import STATE_VERSION, Rows, Trace
from .walk import Options, Walk, check_options

__all__ = ["LEAPFROG", "MCLACHLAN", "Trace", "resume", "sample"]

OnError = Literal["raise", "reject"]
OP, RESUME = "hmc.sample", "hmc.resume"
HIGHEST_ROUNDING = 0.3  # as TSAM's own diagnostic


@overload
def sample(
    log_density: Callable[[Tensor], Tensor],
    position: Tensor,
    *,
    num_samples: int = 1000,
    burn_in: int = 500,
    thin: int = 1,
    num_leapfrog_steps: int = 10,
    step_size: float = 0.1,
    step_size_jitter: float = 0.5,
    inverse_mass: float | Sequence[float] = 1.0,
    adapt_step_size: bool = True,
    metropolis: bool = True,
    integrator: Sequence[float] = LEAPFROG,
    on_error: OnError = "raise",
    seed: int | None = None,
    progress: bool = False,
) -> Trace[Tensor]: ...


@overload
def sample(
    log_density: Callable[[list[Tensor]], Tensor],
    position: Sequence[Tensor],
    *,
    num_samples: int = 1000,
    burn_in: int = 500,
    thin: int = 1,
    num_leapfrog_steps: int = 10,
    step_size: float = 0.1,
    step_size_jitter: float = 0.5,
    inverse_mass: float | Sequence[float] = 1.0,
    adapt_step_size: bool = True,
    metropolis: bool = True,
    integrator: Sequence[float] = LEAPFROG,
    on_error: OnError = "raise",
    seed: int | None = None,
    progress: bool = False,
) -> Trace[list[Tensor]]: ...


def sample(
    log_density: Callable[[Any], Tensor],
    position: Tensor | Sequence[Tensor],
    *,
    num_samples: int = 1000,
    burn_in: int = 500,
    thin: int = 1,
    num_leapfrog_steps: int = 10,
    step_size: float = 0.1,
    step_size_jitter: float = 0.5,
    inverse_mass: float | Sequence[float] = 1.0,
    adapt_step_size: bool = True,
    metropolis: bool = True,
    integrator: Sequence[float] = LEAPFROG,
    on_error: OnError = "raise",
    seed: int | None = None,
    progress: bool = False,
) -> Trace[Any]:
    """Draws from the density ∝ exp(log_density) by Hamiltonian Monte Carlo: one chain from ``position``.

    Args:
        log_density: takes what ``position`` is, a tensor or a list of tensors that require grad, and returns the log
            density there, up to a constant: one floating-point element. It must be deterministic. -inf (or NaN) rejects
            a proposal, so a density may have bounded support. The tensors change after the call: clone what is to be
            kept. Values of large magnitude want float64: a warning says where rounding decides.
        position: where the chain starts: a tensor, or a list of tensors of any shapes, of float32, float64, bfloat16
            or float16, also mixed. Not written.
        num_samples: how many draws to keep, at least 1. Default 1000.
        burn_in: transitions before the first draw, not below 0. Default 500.
        thin: keep every thin-th draw, at least 1. Default 1. Only memory is saved by it.
        num_leapfrog_steps: steps of the integrator per transition, at least 1. Default 10.
        step_size: the integrator's step, in units of √inverse_mass: above 0. Default 0.1.
        step_size_jitter: w from 0 to 1: each transition's steps are step_size times one random number, uniform between
            1 - w and 1 + w. Default 0.5. 0 switches it off: then a trajectory can be close to a period of the dynamics
            and hardly move. At 0.5 the mean correlation after trajectories of one mean period is 0 on a gaussian.
        inverse_mass: M⁻¹, above 0: about the variance of the elements; one for all, or one per tensor. Default 1.
        adapt_step_size: during burn-in move the step size, the mean one, towards an acceptance rate of 0.8: its log by
            0.05 (acceptance - 0.8) per transition, so upwards by a factor of 150 at most in 500. Default True.
        metropolis: accept or reject by the energy error. Without, every finite proposal is taken, and the draws are
            biased by the step size. Default True.
        integrator: coefficients (kick, drift, ..., kick), the same backwards, the kicks adding up to 1 and the drifts
            too: ``LEAPFROG`` (default), ``MCLACHLAN`` (two gradients per step) or your own.
        on_error: what an exception of ``log_density`` does in a trajectory: ``"raise"`` (default) lets it pass
            through; ``"reject"`` rejects the proposal, as -inf does, and counts it in ``Trace.errors``. At the start
            it always passes through, and so does a result that is no tensor of one element.
        seed: 64-bit seed of momenta, jitter and decisions; ``None`` draws one from torch's default generator. A seed
            gives the same bits on every processor and thread count as far as ``log_density`` does.
        progress: show a bar (needs tqdm). Default False.

    Returns:
        A :class:`Trace`. The density was evaluated 1 + (burn_in + thin num_samples) num_leapfrog_steps k times, with k
        the number of drifts in ``integrator``. Ctrl-C after the first draw returns the draws that are there, and warns.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted; also where the log density or its
            gradient is not finite at the start or does not depend on one of the tensors.
        ImportError: ``progress`` without tqdm.
        Exceptions of ``log_density``, and KeyboardInterrupt before the first draw, pass through. After the first
            transition they carry what was there, as ``error.trace``, for :func:`resume`.

    Warns:
        UserWarning: where rounding decides instead of the density (see ``Trace.rounding``), where ``log_density``
            raised in every transition, and where the run was interrupted.

    Source: R. Neal, "MCMC using Hamiltonian dynamics", 2011 (arXiv 1206.1901); random step sizes: there, where
    ergodicity is discussed, and P. Mackenzie, "An improved hybrid Monte Carlo method", Physics Letters B 226, 1989.

    Example:
        >>> import torch
        >>> trace = sample(lambda x: -0.5 * (x - 3.0).square().sum(), torch.zeros(2), num_samples=200, seed=0)
        >>> trace.draws.shape, bool((trace.draws.mean(0) - 3.0).abs().max() < 0.5)
        (torch.Size([200, 2]), True)
    """
    tensors, bare = _check_position(OP, "position", position)
    num_samples = check_int(OP, "num_samples", num_samples, 1, 1 << 31)
    log_step = math.log(check_positive(OP, "step_size", step_size))
    values = {
        "burn_in": burn_in,
        "thin": thin,
        "num_leapfrog_steps": num_leapfrog_steps,
        "step_size_jitter": step_size_jitter,
        "inverse_mass": inverse_mass,
        "adapt_step_size": adapt_step_size,
        "metropolis": metropolis,
        "integrator": integrator,
        "on_error": on_error,
        "seed": int(torch.randint(0, (1 << 63) - 1, (), device="cpu")) if seed is None else seed,
    }
    options = check_options(OP, tensors, bare, values)
    start = {"position": tensors, "bare": bare, "log_step": log_step}
    return _run(OP, log_density, start, options, num_samples, progress)


@overload
def resume(
    log_density: Callable[[Tensor], Tensor],
    trace: Trace[Tensor],
    *,
    num_samples: int | None = None,
    on_error: OnError | None = None,
    progress: bool = False,
) -> Trace[Tensor]: ...


@overload
def resume(
    log_density: Callable[[list[Tensor]], Tensor],
    trace: Trace[list[Tensor]],
    *,
    num_samples: int | None = None,
    on_error: OnError | None = None,
    progress: bool = False,
) -> Trace[list[Tensor]]: ...


@overload
def resume(
    log_density: Callable[[Any], Tensor],
    trace: Mapping[str, Any],
    *,
    num_samples: int | None = None,
    on_error: OnError | None = None,
    progress: bool = False,
) -> Trace[Any]: ...


def resume(
    log_density: Callable[[Any], Tensor],
    trace: Trace[Any] | Mapping[str, Any],
    *,
    num_samples: int | None = None,
    on_error: OnError | None = None,
    progress: bool = False,
) -> Trace[Any]:
    """Goes on with a chain of :func:`sample` where it ended: the draws are, bit for bit, those of one longer run.

    Args:
        log_density: the same function as before, which is not checked.
        trace: a :class:`Trace`, also one of an interrupted run or the ``trace`` of an exception; or the ``state`` of
            one, from a file too: ``torch.save(trace.state, file)``, ``torch.load(file)``. Not changed.
        num_samples: how many further draws to make, at least 1; ``None`` (default): those that an interrupted run
            lacks.
        on_error: as for :func:`sample`; ``None`` (default): as it was.
        progress: show a bar (needs tqdm). Default False.

    Returns:
        A :class:`Trace` of the draws of ``trace`` and then the further ones; from a state, of the further ones alone.

    Raises:
        TypeError, ValueError: as :func:`sample`, and for a dict that is not the state of a trace.
        Other exceptions as :func:`sample`; ``error.trace`` has the earlier draws too.

    Warns:
        UserWarning: as :func:`sample`.

    Example:
        >>> import torch
        >>> density, start = lambda x: -0.5 * x.square().sum(), torch.zeros(2)
        >>> half = sample(density, start, num_samples=50, burn_in=20, seed=0)
        >>> whole = sample(density, start, num_samples=100, burn_in=20, seed=0)
        >>> torch.equal(resume(density, half, num_samples=50).draws, whole.draws)
        True
    """
    before = trace if isinstance(trace, Trace) else None
    state = _check_state(trace)
    tensors, bare = _check_position(RESUME, "trace['position']", state["position"])
    values = {field.name: state[field.name] for field in fields(Options)}
    if on_error is not None:
        values["on_error"] = on_error
    options = check_options(RESUME, tensors, bare, values)
    transitions = check_int(RESUME, "trace['transitions']", state["transitions"], 0, (1 << 32) - 1)
    x, like = _check_position(RESUME, "trace['x']", state["x"])
    if (like, [part.shape for part in x]) != (bare, [tensor.shape for tensor in tensors]):
        raise refuse(RESUME, "trace['x']", "tensors of other shapes", "those of trace['position']")
    if num_samples is None:
        asked = check_int(RESUME, "trace['num_samples']", state["num_samples"], 1, 1 << 32)
        num_samples = asked - options.num_draws(transitions)
        if num_samples < 1:
            raise refuse(RESUME, "num_samples", None, f"a number, as the {asked} draws of the run are there")
    num_samples = check_int(RESUME, "num_samples", num_samples, 1, 1 << 31)
    log_step = check_number(RESUME, "trace['log_step_size']", state["log_step_size"], "a finite number")
    start = {"position": tensors, "bare": bare, "log_step": log_step, "x": x, "transitions": transitions}
    return _run(RESUME, log_density, start, options, num_samples, progress, before)


def _run(
    op: str,
    log_density: Callable[[Any], Tensor],
    start: dict[str, Any],
    options: Options,
    num_samples: int,
    progress: bool,
    before: Trace[Any] | None = None,
) -> Trace[Any]:
    """``num_samples`` draws from ``start``, what Walk is told of it, after those of the trace ``before``."""
    check_flag(op, "progress", progress)
    if not callable(log_density):
        expected = f"a function of {'a tensor' if start['bare'] else 'a list of tensors'}"
        raise refuse(op, "log_density", type(log_density).__name__, expected, TypeError)
    first = start.get("transitions", 0)
    already = options.num_draws(first)
    needed = options.burn_in + options.thin * (already + num_samples)
    total = check_int(op, "burn_in + thin * num_samples", needed, 1, (1 << 32) - 1)
    transitions = _with_bar(op, range(first, total)) if progress else range(first, total)
    # Inside inference_mode the log density would have no gradient.
    with torch.inference_mode(False), torch.no_grad():
        walk = Walk(op, log_density, options=options, **start)
        rows = Rows(walk, already, num_samples, before)
    try:
        try:
            with torch.inference_mode(False), torch.no_grad():
                for transition in transitions:
                    walk.transition()
                    kept, skipped = divmod(transition - options.burn_in + 1, options.thin)
                    if transition >= options.burn_in and skipped == 0:
                        rows.keep(kept - 1)
                    walk.commit()
                trace = rows.trace()
        except KeyboardInterrupt:
            trace = rows.trace()
            if len(trace) == 0:
                raise
        _warn_of(op, trace, walk, first)
        return trace
    except BaseException as error:
        if walk.complete.transitions > 0:
            with contextlib.suppress(Exception):  # a device that failed has no draws to give, and the error says more
                error.__dict__["trace"] = trace = rows.trace()
                if sys.version_info >= (3, 11):
                    error.add_note(f"{op}: error.trace has {len(trace)} draws, and hmc.resume goes on from it.")
        raise


def _warn_of(op: str, trace: Trace[Any], walk: Walk, first: int) -> None:
    """What the user has to hear of a run, at its end."""
    if trace.interrupted:
        whole = trace.state["num_samples"]
        warn(f"{op}: interrupted after {len(trace)} of {whole} draws; hmc.resume goes on from this trace.")
    if 0 < walk.complete.errors == walk.complete.transitions - first:
        warn(
            f"{op}: log_density raised in each of the {walk.complete.errors} transitions, and the chain never moved. "
            f"The first exception: {walk.first_error}"
        )
    rounding = float(trace.rounding.mean())
    if walk.options.metropolis and rounding > HIGHEST_ROUNDING:
        warn(
            f"{op}: the rounding of the log density moves the energy error by about {rounding:.2f} (Trace.rounding): "
            "the accept test is rounding noise. Compute the log density in float64, or leave a constant out of it."
        )


def _with_bar(op: str, transitions: range) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        got = "True without the package tqdm"
        raise refuse(op, "progress", got, "False, or tqdm installed (pip install tqdm)", ImportError) from error
    bar: Iterable[int] = tqdm(transitions, desc=op, unit="transition")
    return bar


def _check_position(op: str, argument: str, position: object) -> tuple[list[Tensor], bool]:
    """The tensors of a position, and whether it is one without a list around it."""
    bare = isinstance(position, Tensor)
    if not isinstance(position, (Tensor, list, tuple)):
        expected = "a tensor or a list of tensors"
        if isinstance(position, Trace):
            expected += " (hmc.resume goes on from a trace)"
        raise refuse(op, argument, type(position).__name__, expected, TypeError)
    tensors = [check_tensor(op, argument, position)] if bare else check_list(op, argument, position)
    if not any(tensor.numel() for tensor in tensors):
        raise refuse(op, argument, "no elements", "a tensor, or a list of tensors, with at least one element")
    for i, tensor in enumerate(tensors):
        place, home = argument if bare else f"{argument}[{i}]", tensors[0].device
        if (cause := why_not(tensor.device)) is not None:
            raise refuse(op, place, f"a tensor on {tensor.device}", f"one that kernels run on ({cause})")
        if tensor.device != home:
            raise refuse(op, place, f"a tensor on {tensor.device}", f"one on {home}, as {argument}[0] is")
    return tensors, bare


def _check_state(trace: object) -> Mapping[str, Any]:
    """What is in the dict is checked like the arguments that it was made of."""
    state = trace.state if isinstance(trace, Trace) else trace
    expected = "a trace of hmc.sample, or its state"
    if not isinstance(state, Mapping):
        raise refuse(RESUME, "trace", type(trace).__name__, expected, TypeError)
    names = ["version", "num_samples", "position", "x", "log_step_size", "transitions"]
    for name in (*names, *(field.name for field in fields(Options))):
        if name not in state:
            raise refuse(RESUME, "trace", f"a dict without {name!r}", expected)
    if state["version"] != STATE_VERSION:
        raise refuse(RESUME, "trace['version']", shown(state["version"]), f"{STATE_VERSION}, as this tsam_ext writes")
    return state
