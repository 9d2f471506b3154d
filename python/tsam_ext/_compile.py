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
from typing import Any

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

    It stays until then: to be found is not to be imported, and an import may fail and be tried again.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch._dynamo":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


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


if "torch._dynamo" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Finder())
