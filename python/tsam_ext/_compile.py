"""Lets torch.compile trace the functions of _C: Dynamo is told that each stands for its torch.ops object.

Dynamo knows no function of an extension module by itself, and importing it takes longer than the rest of this package;
so this waits until somebody imports it. Without Dynamo nothing here runs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
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


class _OnceDynamoIsThere(importlib.abc.MetaPathFinder):
    """Finds torch._dynamo as everybody else would, and registers as soon as it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "torch._dynamo" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _OnceDynamoIsThere())
