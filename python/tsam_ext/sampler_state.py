"""What lasts from one step to the next beside the base optimizer's state, and how a checkpoint holds it.

Layout: numbers, which stand in every parameter group, and tensors, one per parameter or none, beside its state.
Invariant: `check` refuses whatever `load` could not take, before anything has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .table import Table


@dataclass(frozen=True)
class Saved:
    """``numbers`` by name; ``tensors`` by name, each a list with an entry per parameter."""

    numbers: dict[str, float | str] = field(default_factory=dict)
    tensors: dict[str, list[Tensor | None]] = field(default_factory=dict)


class SamplerState:
    """The state of a sampler that keeps nothing; one that keeps something derives from it."""

    def save(self, parameters: Sequence[Tensor]) -> Saved:
        """What a checkpoint holds. May wait for the device."""
        return Saved()

    def check(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """ValueError if ``saved`` cannot be loaded."""

    def load(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """Takes what :meth:`save` gave; starts anew where that was another sampler's."""

    def perturbations(self, table: Table) -> list[Tensor]:
        """ε of each perturbed parameter as the last step left it. RuntimeError where nothing is kept."""
        raise RuntimeError("TSAM: chain_position() needs a sampler that keeps a chain, and a step.")
