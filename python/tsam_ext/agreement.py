"""What ranks that train one model must have alike, compared once, before the first of their steps.

One gather of a few float64 numbers: 48 bits of a digest for each thing that must agree, then the seed in two halves.
Invariant: all ranks see the same numbers, and so raise the same error, or none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .engine.ranks import Ranks

HALF = 1 << 32


def _digest(text: str) -> float:
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


def agree(ranks: Ranks, facts: Sequence[tuple[str, str]], seed: int, *, given: bool, home: torch.device) -> int:
    """The seed of all ranks: the one that all have been given, else the first rank's. RuntimeError where facts differ.

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
        raise RuntimeError(
            f"TSAM: ranks that train one model differ in: {', '.join(differs)}. Rank {ranks.members[0]} has another "
            f"than {_ranks(sorted(set(others)))}. Give all ranks the same. Nothing was updated."
        )
    return seeds[0]


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def check_alike(ranks: Ranks, values: Tensor, what: str, *, rtol: float = 0.0) -> None:
    """RuntimeError, on all ranks, unless a vector of numbers is the same on all; NaN: a rank that has none.

    A collective; reads what comes.
    """
    rows = ranks.gathered(values).tolist()
    for column in zip(*rows, strict=True):
        known = [number for number in column if number == number]
        if known and max(known) - min(known) > rtol * max(map(abs, known)):
            raise RuntimeError(f"TSAM: {what} Nothing was updated.")
