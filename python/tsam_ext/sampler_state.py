"""What lasts from one step to the next beside the base optimizer's state, and how a checkpoint holds it.

Layout: numbers, which stand in every parameter group, and tensors, one per parameter or none, beside its state.
The names of both are known before the first step, as torch.distributed.checkpoint asks the live optimizer for them.
Invariant: `check` refuses whatever `load` could not take, before anything has changed; inside a step, `save` gives what
was before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from .table import Table


@dataclass(frozen=True)
class Saved:
    """``numbers`` by name; ``tensors`` by name, each a list with an entry per parameter."""

    numbers: dict[str, float | str] = field(default_factory=dict)
    tensors: dict[str, list[Tensor | None]] = field(default_factory=dict)


class SamplerState:
    """The state of a sampler that keeps nothing; one that keeps something derives from it.

    ``numbers`` and ``tensors``: the names of what :meth:`save` gives.
    """

    numbers: ClassVar[tuple[str, ...]] = ()
    tensors: ClassVar[tuple[str, ...]] = ()

    def save(self, parameters: Sequence[Tensor]) -> Saved:
        """What a checkpoint holds. May wait for the device."""
        return Saved()

    def check(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """ValueError if ``saved`` cannot be loaded."""

    def load(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """Takes what :meth:`save` gave; starts anew where that was another sampler's."""

    def kept(self, parameter: Tensor) -> dict[str, Tensor]:
        """What :meth:`save` gives of one parameter, by name; nothing of a frozen one."""
        return {}

    def belong(self, rank: str) -> bool:
        """A step of the given rank ("" where all ranks share what is kept) goes on from here; False if it cannot."""
        return True

    def settle(self) -> None:
        """The step is over: from here on it is saved as it has ended."""

    def perturbations(self, table: Table) -> list[Tensor]:
        """ε of each perturbed parameter as the last step left it. RuntimeError where nothing is kept."""
        raise RuntimeError("TSAM: chain_position() needs a sampler that keeps a chain, and a step.")


class Joined(MutableMapping[Any, Any]):
    """A dict with entries of ours beside its own, which it does not hold: writes go to the dict, but for ours."""

    def __init__(self, held: Any, ours: dict[str, Any]) -> None:
        self._held, self._ours = held, ours

    def __getitem__(self, key: Any) -> Any:
        return self._ours[key] if key in self._ours else self._held[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if key not in self._ours:
            self._held[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[Any]:
        yield from self._held
        yield from self._ours

    def __len__(self) -> int:
        return len(self._held) + len(self._ours)

    def __repr__(self) -> str:
        return repr(dict(self))


class JoinedState(MutableMapping[Any, Any]):
    """A base optimizer's state with what a sampler keeps of each parameter beside that parameter's, out of its sight.

    The base makes a parameter's state in its first step, where it finds none: an entry of ours in there would be taken
    for it. So this is a view; what is written into it goes to the base's own.
    """

    def __init__(self, held: Any, ours: Callable[[Tensor], dict[str, Any]]) -> None:
        self._held, self._of = held, ours

    def __getitem__(self, key: Any) -> Any:
        entry = self._held[key]
        ours = self._of(key) if isinstance(key, Tensor) and isinstance(entry, dict) else {}
        return Joined(entry, ours) if ours else entry

    def __contains__(self, key: object) -> bool:  # without asking for it, which would make a default
        return key in self._held

    def get(self, key: Any, default: Any = None) -> Any:
        """As a dict's, which makes no default either."""
        return self[key] if key in self._held else default

    def __setitem__(self, key: Any, value: Any) -> None:
        ours = self._of(key) if isinstance(key, Tensor) and isinstance(value, (dict, Joined)) else {}
        self._held[key] = {k: v for k, v in value.items() if k not in ours} if ours else value

    def __delitem__(self, key: Any) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return repr(dict(self))
