"""Lets torch.compile trace the functions of _C: Dynamo is told that each stands for its torch.ops object.

Dynamo knows no function of an extension module by itself, and importing it takes longer than the rest of this package;
so this waits until somebody imports it. Without Dynamo nothing here runs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

from . import _C, _ops


def _register() -> None:
    from torch.compiler import substitute_in_graph

    for name in _ops.NAMES:
        op = getattr(_ops, name)

        def stand_in(*args: Any, _op: Any = op) -> Any:
            return _op(*args)

        substitute_in_graph(getattr(_C, name), skip_signature_check=True)(stand_in)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch._dynamo as everybody else would, with a loader that registers as soon as it has run.

    It stays until then: to be found is not to be imported, and an import may fail and be tried again. While it asks
    the others it finds nothing itself, as one of another import of this module may ask it.
    """

    def __init__(self) -> None:
        self._asks = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch._dynamo" or self._asks:
            return None
        self._asks = True
        try:
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                spec = None if find is None or finder is self else find(name, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader, self)
                    return cast("importlib.machinery.ModuleSpec", spec)
            return None
        finally:
            self._asks = False


class _Loader(importlib.abc.Loader):
    """The loader that it is given, but for what follows the module's execution."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            _register()


if "_finder" not in globals():  # a reload keeps the one that is there: Dynamo refuses to be told twice
    _finder = _Finder()
    if "torch._dynamo" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _finder)
