"""How far half-precision parameters really are from θ₀, whatever rounding has made of noise and ascent.

Words moved of half precision: read 3, without gradients 2; of wider parameters none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tsam_ext import _ops
from tsam_ext.engine.spread import Spread
from tsam_ext.table import Table, taken


def realised(
    table: Table,
    spread: Spread,
    copies: Mapping[int, Tensor],
    half: Sequence[int],
    gradients: Mapping[int, Tensor],
    grad_norm: Tensor,
) -> Tensor:
    """float64 [3]: ‖(θ-θ₀)/D‖, that over the longest rho or radius, and the share of the ascent along the gradients.

    ``half``: the indices of half-precision parameters that are perturbed; ``copies``: θ₀ of those that have moved.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=spread.home)
    spread.follow(sums)
    along = [i for i in half if i in gradients]
    for chosen, known in ((along, True), ([i for i in half if i not in gradients], False)):
        chosen = [i for i in chosen if i in copies]
        if chosen:
            spread.run(
                _ops.displacement_,
                chosen,
                taken(table.tensors, chosen),
                taken(copies, chosen),
                taken(gradients, chosen) if known else [],
                sums,
                taken(table.rho, chosen),
                taken(table.adaptive, chosen),
            )
    sums = spread.total(sums)
    longest = max(max(table.rho[i], table.radius[i]) for i in half)
    # Where the base optimizer maximizes, the ascent goes downhill.
    downhill = -1.0 if table.maximize else 1.0
    norm, share = sums[0].sqrt(), downhill * sums[1] * grad_norm / sums[2]
    return torch.stack([norm, norm / longest, share])
