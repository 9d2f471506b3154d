"""What ranks that train one model must have alike, compared once, before the first of their steps.

One gather of a few float64 numbers: 48 bits of a digest for each thing that must agree, then the seed in two halves.
Parameters, and gradients in the first pass that is to reduce them, are compared by three numbers each.
Invariant: all ranks see the same numbers, and so raise the same error, or none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .engine.ranks import Ranks

HALF = 1 << 32
RUN = 1 << 20  # elements that a comparison takes at a time


class DisagreementError(RuntimeError):
    """Ranks differ in what they must have alike; raised on all of them at the same place."""


def _digest(text: str) -> float:
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


def agree(ranks: Ranks, facts: Sequence[tuple[str, str]], seed: int, *, given: bool, home: torch.device) -> int:
    """The seed of all ranks: the one that all have been given, else the first's. DisagreementError where they differ.

    ``facts``: what is compared, and this rank's text of it. A collective of all ranks; reads what comes.
    """
    numbers = [_digest(text) for _, text in facts] + [float(given), float(seed // HALF), float(seed % HALF)]
    found = ranks.gathered(torch.tensor(numbers, dtype=torch.float64, device=home)).tolist()
    differs = [name for i, (name, _) in enumerate(facts) if len({row[i] for row in found}) > 1]
    seeds = [int(row[-2]) * HALF + int(row[-1]) for row in found]
    had = [bool(row[-3]) for row in found]
    if len(set(had)) > 1 or (all(had) and len(set(seeds)) > 1):
        differs.append("seed")
    if differs:
        place = [i for i, (name, _) in enumerate(facts) if name in differs]
        first = found[0]
        others = [ranks.members[r] for r, row in enumerate(found) if any(row[i] != first[i] for i in place)]
        if "seed" in differs:
            others += [ranks.members[r] for r in range(1, len(found)) if (had[r], seeds[r]) != (had[0], seeds[0])]
        raise DisagreementError(
            f"TSAM: ranks that train one model differ in: {', '.join(differs)}. Rank {ranks.members[0]} has another "
            f"than {_ranks(sorted(set(others)))}. Give all ranks the same. Nothing was updated."
        )
    return seeds[0]


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def check_alike(ranks: Ranks, values: Tensor, what: str) -> None:
    """DisagreementError unless a vector of numbers is the same on all ranks; NaN: a rank that has none.

    A collective; reads what comes.
    """
    rows = ranks.gathered(values).tolist()
    for column in zip(*rows, strict=True):
        known = [number for number in column if number == number]
        if known and max(known) != min(known):
            raise DisagreementError(f"TSAM: {what} Nothing was updated.")


def check_values(
    ranks: Ranks, tensors: Mapping[int, Tensor], names: Sequence[str], what: str, *, rtol: float, home: torch.device
) -> bool:
    """DisagreementError, naming the first, unless so many tensors have the same values on all ranks.

    ``rtol``: how far apart they may be, in lengths of the longest; one that a rank does not have counts as zeros.
    Whether any said something: none does where all are 0 or not finite. A collective; reads what comes.
    """
    nothing = torch.zeros(3, dtype=torch.float64, device=home)
    prints = [fingerprint(tensors[i]).to(home) if i in tensors else nothing for i in range(len(names))]
    said = False
    found = ranks.gathered(torch.stack(prints)).tolist() if prints else []
    for place, name in enumerate(names):
        each = [rank[place] for rank in found]
        length = max(norm for norm, _, _ in each)
        apart = max(max(column) - min(column) for column in zip(*each, strict=True))
        if not math.isfinite(length + apart):
            continue
        if apart > rtol * length:
            raise DisagreementError(f"TSAM: {name}: {what} Nothing was updated.")
        said |= length > 0.0
    return said


def fingerprint(tensor: Tensor) -> Tensor:
    """The norm, and the products with two waves: of other values with the same norm as good as never the same."""
    values = tensor.detach().reshape(-1)
    found = torch.zeros(3, dtype=torch.float64, device=values.device)
    for begin in range(0, values.numel(), RUN):
        run = values[begin : begin + RUN].double()
        places = torch.arange(begin, begin + run.numel(), dtype=torch.float64, device=run.device)
        found += torch.stack([run @ run, run @ places.sin(), run @ places.cos()])
    found[0].sqrt_()
    return found
