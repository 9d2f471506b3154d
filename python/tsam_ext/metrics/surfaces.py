"""The loss on a grid of points around θ: L(θ + Σ_i c_i d_i), along random directions or given ones.

Filter-normalised: each row of a direction's tensor gets the length of that row of the parameter, d ← d ‖θ_row‖/‖d_row‖;
tensors of less than two dimensions (biases, norms' scales) do not move.
Layout: losses ``[len(c_1), len(c_2), ...]``. Invariant: where all c_i are 0 it is the loss at θ's own bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsam_ext.engine.checks import check_flag, check_number, check_seed, refuse, shown

from .evaluation import Progress, check_objective, evaluating
from .objective import Objective


@dataclass(frozen=True)
class Surface:
    """What :func:`surface` found.

    Attributes:
        losses: ``[len(c_1)]`` or ``[len(c_1), len(c_2)]``, float64, on the CPU.
        coordinates: c_1 and c_2, float64, on the CPU.
        directions: for each coordinate a list of tensors like the parameters, as they were used.
    """

    losses: Tensor
    coordinates: tuple[Tensor, ...]
    directions: list[list[Tensor]]


def surface(
    objective: Objective,
    *coordinates: Tensor | Sequence[float],
    directions: Sequence[Sequence[Tensor]] | None = None,
    filter_normalised: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Surface:
    """The loss along a line or on a plane through the parameters. One pass over the rows for each point.

    Args:
        objective: any.
        coordinates: one vector of finite numbers for a line, two for a plane; ``torch.linspace(-1, 1, 21)``, say.
        directions: one for each coordinate, each a list of tensors like the parameters, as the ``eigenvectors`` of a
            :class:`Spectrum` are. ``None`` (default): gaussian, of length about 1 before they are normalised.
        filter_normalised: give each row (the weights of one neuron or filter) of each direction the length of that row
            of the parameters, and leave biases and other tensors of less than two dimensions where they are, so that
            surfaces of several nets can be compared. Default True; False takes directions as they are.
        seed: of random directions, 64 bits. Default 0.
        progress: called with (points done, points) after each.

    Returns:
        A :class:`Surface`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source: H. Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018 (arXiv 1712.09913), section 4.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> f = Objective.of_function(lambda: x.square().sum(), [x])
        >>> surface(f, [0.0, 1.0], directions=[[torch.tensor([[0.0, 2.0]])]]).losses  # at (3, 4) and (3, 4 + 5)
        tensor([25., 90.], dtype=torch.float64)
    """
    op = "metrics.surface"
    checked = check_objective(op, objective)
    if not 1 <= len(coordinates) <= 2:
        raise refuse(op, "coordinates", f"{len(coordinates)} vectors", "one for a line or two for a plane")
    axes = [_axis(op, f"coordinates[{i}]", axis) for i, axis in enumerate(coordinates)]
    check_flag(op, "filter_normalised", filter_normalised)
    check_seed(op, seed)
    given: list[list[Tensor]] = []
    if directions is not None:
        if not isinstance(directions, (list, tuple)) or len(directions) != len(axes):
            got = f"{len(directions)} entries" if isinstance(directions, (list, tuple)) else shown(directions)
            raise refuse(op, "directions", got, f"a list of {len(axes)}, one for each vector of coordinates")
        given = [checked.check_direction(op, f"directions[{i}]", d) for i, d in enumerate(directions)]
    settings = {"coordinates": axes, "filter_normalised": filter_normalised, "seed": seed, "directions": len(given)}
    points = math.prod(map(len, axes))
    with evaluating(objective, op, settings, progress, points, given) as at:
        along = given or [at.draw("gaussian", seed, i) for i in range(len(axes))]
        if filter_normalised:
            along = [list(map(_normalised, direction, at.parameters)) for direction in along]
        losses = []
        for lengths in itertools.product(*axes):
            at.move(along, lengths)
            losses.append(at.loss())
    found = tuple(torch.tensor(axis, dtype=torch.float64) for axis in axes)
    return Surface(torch.tensor(losses, dtype=torch.float64).view(*map(len, axes)), found, along)


def _axis(op: str, argument: str, values: object) -> list[float]:
    """The numbers of one coordinate."""
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, (list, tuple, range)) or not values:
        raise refuse(op, argument, shown(values), "a vector of at least one number", TypeError)
    return [check_number(op, f"{argument}[{i}]", v, "a finite number", or_tensor=False) for i, v in enumerate(values)]


def _normalised(direction: Tensor, parameter: Tensor) -> Tensor:
    """Each row with the length of the parameter's row; 0 where either is 0, and where there are no rows."""
    if parameter.dim() < 2:
        return torch.zeros_like(parameter)
    rest = tuple(range(1, parameter.dim()))
    wide = direction.to(parameter.device, torch.float64)
    lengths = torch.linalg.vector_norm(wide, dim=rest, keepdim=True)
    target = torch.linalg.vector_norm(parameter.detach().double(), dim=rest, keepdim=True)
    return (wide * torch.where(lengths > 0.0, target / lengths, 0.0)).to(parameter.dtype)
