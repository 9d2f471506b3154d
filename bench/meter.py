"""What an estimate does, counted: op calls, reads of a tensor's value on the host, and the most bytes alive at once.

Every op passes a dispatch mode. Live bytes are those of storages that ops inside have made and that still live, also
between two times that it is entered; what was there before, an ``out`` argument too, is not counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique", "masked_select")


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered; ``calls``, ``syncs`` and ``peak`` are the result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.syncs = self.peak = 0
        self._alive: dict[int, int] = {}

    def restart(self) -> None:
        """Counts anew; what lives goes on being counted as alive."""
        self.calls = self.syncs = 0
        self.peak = sum(self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op and looks at what it returns."""
        kwargs = kwargs or {}
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **kwargs)
        self.calls += 1
        self.syncs += func._schema.name.split("::")[1] in SYNCS
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._alive and key not in given:
                    self._alive[key] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result
