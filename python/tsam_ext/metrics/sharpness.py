"""How much an objective L rises around θ: by noise on average, by one ascent on groups of rows, and the tilted mean.

Average: E_ν L(θ + r D ν) − L(θ). Ascent: the mean over groups of L_m(θ + ρ D (D g)/‖D g‖) − L_m(θ), g = ∇L_m(θ).
Tilted: (1/t) log mean_j exp(t L(θ + r D ν_j)). D is 1, or |θ| elementwise with ``adaptive``.
Invariant: sample j of a seed is the noise that TSAM draws in step 0 with that seed for its sample j, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tsam_ext.engine.checks import check_flag, check_int, check_length, check_noise, check_seed, check_tilt, refuse
from tsam_ext.functional import tilted_loss, tilted_weights

from .evaluation import Evaluation, Progress, check_objective, evaluating
from .objective import Objective

MAX_SAMPLES = 1 << 28  # those that the noise can tell apart


@dataclass(frozen=True)
class SampleMean:
    """A mean and how well it is known.

    Attributes:
        mean: over the samples.
        standard_error: of the mean; NaN for a single sample.
        samples: what was averaged, float64 on the CPU, one entry for each sample.
    """

    mean: float
    standard_error: float
    samples: Tensor

    @classmethod
    def of(cls, samples: Tensor) -> SampleMean:
        """Of samples that count alike; reads them."""
        samples = samples.cpu()
        error = float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else math.nan
        return cls(float(samples.mean()), error, samples)


@dataclass(frozen=True)
class TiltedObjective:
    """What :func:`tilted_objective` found.

    Attributes:
        value: (1/t) log mean_j exp(t L_j).
        ess: (Σw)²/Σw² of w = softmax(t L): ``num_samples`` where all weigh the same, 1 where one decides.
        losses: ``[num_samples]``, float64, on the CPU: L_j.
    """

    value: float
    ess: float
    losses: Tensor


def average_sharpness(
    objective: Objective,
    radius: float,
    *,
    num_samples: int = 100,
    noise: str = "gaussian",
    adaptive: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> SampleMean:
    """How much the loss rises by noise: the mean of L(θ + radius D ν) − L(θ). 1 + num_samples passes over the rows.

    For a quadratic and ν on the unit sphere (or gaussian) it is radius² trace(H) / (2 n) in the mean.

    Args:
        objective: of n elements.
        radius: length of the noise, not below 0 (for gaussian its root mean square).
        num_samples: at least 1; the standard error needs 2. Default 100.
        noise: ``"gaussian"`` (default; ν = z/√n), ``"sphere"``, ``"ball"`` or ``"rademacher"``, as for TSAM.
        adaptive: D = |θ| elementwise instead of 1. Default False.
        seed: of the noise, 64 bits. Default 0.
        progress: called with (passes made, 1 + num_samples) after each.

    Returns:
        A :class:`SampleMean` of the rises.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source: M. Andriushchenko and N. Flammarion, "Towards understanding sharpness-aware minimization", ICML 2022
    (arXiv 2206.06232), where average- and worst-case sharpness are set side by side.

    Example:
        >>> import torch
        >>> x = torch.zeros(4, requires_grad=True)
        >>> f = Objective.of_function(lambda: 3.0 * x.square().sum(), [x])
        >>> round(average_sharpness(f, radius=0.1, noise="sphere", num_samples=2).mean, 6)
        0.03
    """
    op = "metrics.average_sharpness"
    settings = _checked_draws(op, radius, num_samples, noise, adaptive, seed)
    with evaluating(objective, op, settings, progress, 1 + num_samples) as at:
        before = at.loss()
        return SampleMean.of(_drawn_losses(at, radius, num_samples, noise, adaptive, seed) - before)


def tilted_objective(
    objective: Objective,
    tilt: float,
    radius: float,
    *,
    num_samples: int = 100,
    noise: str = "gaussian",
    adaptive: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> TiltedObjective:
    """TSAM's own objective as a number: (1/t) log mean_j exp(t L(θ + radius D ν_j)). num_samples passes over the rows.

    With few samples it is biased towards the mean loss: a large tilt needs many, and ``ess`` says how many count.

    Args:
        objective: any.
        tilt: t, any number: 0 is the mean, inf the largest loss and -inf the smallest.
        radius, num_samples, noise, adaptive, seed: as for :func:`average_sharpness`.
        progress: called with (passes made, num_samples) after each.

    Returns:
        A :class:`TiltedObjective`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source: T. Li, T. Zhou, J. Bilmes, "Tilted Sharpness-Aware Minimization", ICML 2025 (arXiv 2410.22656), section 3.

    Example:
        >>> import torch
        >>> x = torch.zeros(4, requires_grad=True)
        >>> f = Objective.of_function(lambda: 3.0 * x.square().sum(), [x])
        >>> found = tilted_objective(f, 20.0, radius=0.1, noise="sphere", num_samples=8)
        >>> round(found.value, 6), round(found.ess, 3)
        (0.03, 8.0)
    """
    op = "metrics.tilted_objective"
    tilt = check_tilt(op, tilt)
    settings = {"tilt": tilt, **_checked_draws(op, radius, num_samples, noise, adaptive, seed)}
    with evaluating(objective, op, settings, progress, num_samples) as at:
        losses = _drawn_losses(at, radius, num_samples, noise, adaptive, seed)
    weights = tilted_weights(losses, tilt)
    ess = weights.sum().square() / weights.square().sum()
    return TiltedObjective(float(tilted_loss(losses, tilt)), float(ess), losses)


def ascent_sharpness(
    objective: Objective,
    rho: float,
    *,
    group_size: int | None = None,
    adaptive: bool = False,
    progress: Progress | None = None,
) -> SampleMean:
    """How much the loss of m rows rises by SAM's own step: the mean over groups of L_m(θ + ρ D (D g)/‖D g‖) − L_m(θ).

    One pass over the rows: of each group a gradient and one more loss. A lower bound of the largest rise within rho.
    Where g = 0 nothing moves.

    Args:
        objective: differentiable.
        rho: length of the ascent, not below 0.
        group_size: m, rows of a batch that follow each other; what is left over at a batch's end is a smaller group.
            ``None`` (default): each batch of the loader is a group. A function without rows is one group.
        adaptive: D = |θ| elementwise (ASAM with η = 0) instead of 1. Default False.
        progress: called with (batches done, batches of the loader, 0 if it does not say) after each batch.

    Returns:
        A :class:`SampleMean` of the groups' rises, each counting by its rows; over all ranks, ``samples`` of this one.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source: P. Foret et al., "Sharpness-aware minimization", ICLR 2021, section 4.2 (m-sharpness); M. Andriushchenko and
    N. Flammarion, ICML 2022 (arXiv 2206.06232); adaptive: J. Kwon et al., "ASAM", ICML 2021.

    Example:
        >>> import torch
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> f = Objective.of_function(lambda: x.square().sum() / 2, [x])
        >>> round(ascent_sharpness(f, rho=0.1).mean, 5)  # 5.1²/2 − 5²/2
        0.505
    """
    op = "metrics.ascent_sharpness"
    rho = check_length(op, "rho", rho)
    check_flag(op, "adaptive", adaptive)
    size = check_objective(op, objective).check_group(op, "group_size", group_size)
    settings = {"rho": rho, "group_size": size, "adaptive": adaptive}
    with evaluating(objective, op, settings, progress, objective.num_batches) as at:
        rises, weights = at.rises(rho, size, adaptive)
        sums = at.summed(torch.stack([(weights * rises).sum(), weights.sum(), (weights > 0.0).sum().double()]))
        total, weight, count = sums.tolist()
        if weight == 0.0:
            raise refuse(op, "objective: loader", "0 rows", "at least one")
        mean = total / weight
        spread = float(at.summed((weights * (rises - mean)).square().sum().reshape(1)))
        error = math.sqrt(spread * count / (count - 1)) / weight if count > 1 else math.nan
        return SampleMean(mean, error, rises.cpu())


def _checked_draws(
    op: str, radius: object, num_samples: object, noise: object, adaptive: object, seed: object
) -> Mapping[str, object]:
    check_length(op, "radius", radius)
    check_int(op, "num_samples", num_samples, 1, MAX_SAMPLES)
    check_noise(op, "noise", noise)
    check_flag(op, "adaptive", adaptive)
    check_seed(op, seed)
    return {"radius": radius, "num_samples": num_samples, "noise": noise, "adaptive": adaptive, "seed": seed}


def _drawn_losses(at: Evaluation, radius: float, num_samples: int, noise: str, adaptive: bool, seed: int) -> Tensor:
    """The loss at each draw of noise, float64, on the CPU."""
    losses = []
    for sample in range(num_samples):
        at.perturb(radius, noise, seed, sample, adaptive)
        losses.append(at.loss())
    return torch.tensor(losses, dtype=torch.float64)
