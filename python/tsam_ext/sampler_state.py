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

import torch
from torch import Tensor

from .engine.checks import TSAM, refuse, shown
from .shards import as_local
from .table import Table, kernel_form


@dataclass(frozen=True)
class Saved:
    """``numbers`` by name; ``tensors`` by name, each a list with an entry per parameter."""

    numbers: dict[str, float | str] = field(default_factory=dict)
    tensors: dict[str, list[Tensor | None]] = field(default_factory=dict)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What is kept of a parameter is kept in this."""
    return torch.promote_types(tensor.dtype, torch.float32)


def check_tensors(saved: Saved, name: str, parameters: Sequence[Tensor]) -> None:
    """ValueError unless the tensors of that name are finite, and shaped as what is kept of these parameters."""
    for i, (kept, parameter) in enumerate(zip(saved.tensors.get(name, ()), parameters, strict=False)):
        if kept is None:
            continue
        shape, dtype = (*parameter.shape, *(2,) * parameter.is_complex()), wide_dtype(kernel_form(parameter))
        got: str | None = shown(kept)
        if isinstance(kept, Tensor):
            got = f"a {kept.layout} {kept.dtype} tensor of shape {tuple(kept.shape)} on {kept.device.type}"
            dense = kept.layout is torch.strided and kept.device.type != "meta"
            if dense and kept.dtype == dtype and kept.shape == shape:
                got = None if bool(as_local(kept).isfinite().all()) else f"a {name} that is not finite"
        if got is not None:
            expected = f"a finite {dtype} tensor of shape {shape}"
            raise refuse(TSAM, f"load_state_dict: {name} of parameter {i}", got, expected)


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


class KeptStates(SamplerState):
    """Several of them, each with tensors of its own names, as a checkpoint holds them beside each other."""

    def __init__(self, *states: SamplerState) -> None:
        self._states = states

    @property
    def has_tensors(self) -> bool:
        """Whether any keeps something of each parameter."""
        return any(state.tensors for state in self._states)

    def save(self, parameters: Sequence[Tensor]) -> Saved:
        """Of all."""
        saved = [state.save(parameters) for state in self._states]
        numbers = {name: number for each in saved for name, number in each.numbers.items()}
        return Saved(numbers, {name: tensors for each in saved for name, tensors in each.tensors.items()})

    def check(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """ValueError if any cannot load its part."""
        for state in self._states:
            state.check(saved, parameters)

    def load(self, saved: Saved, parameters: Sequence[Tensor]) -> None:
        """Each takes its part."""
        for state in self._states:
            state.load(saved, parameters)

    def kept(self, parameter: Tensor) -> dict[str, Tensor]:
        """Of all."""
        return {name: tensor for state in self._states for name, tensor in state.kept(parameter).items()}


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
