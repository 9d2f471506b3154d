"""What torch.compile is told of this package: which functions it may trace, and which it leaves to Python.

Each function of _C stands for its torch.ops object: Dynamo knows no function of an extension module by itself. A step
of the optimizer breaks the graph (outside_graphs). Importing Dynamo takes longer than the rest of this package, so this
waits until somebody imports it. Without Dynamo nothing here runs, and no call of a marked function costs more.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, ModuleType
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

from . import _C, _ops

P = ParamSpec("P")
T = TypeVar("T")
Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound="type[torch.autograd.Function]")


def kept_whole(function: Function) -> Function:
    """Class decorator: Dynamo puts the Function itself into its graphs where it would put one that torch.func refuses.

    That is what it does before torch 2.11 (its own has no setup_context); later ones trace what the Function does.
    """
    if torch.__version__ < "2.11":  # a comparison of versions, not of strings
        allow: Callable[[Any], Any] = torch.compiler.allow_in_graph
        _once_imported(lambda: allow(function))
    return function


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Has torch.compile break the graph at a call of ``function`` and trace nothing that it calls, as decorator.

    Models and functions that were compiled themselves stay so. A generator is wrapped: Dynamo looks anew each time that
    one goes on.
    """
    if not inspect.isgeneratorfunction(function):
        return _mark(function, and_below=True)

    @functools.wraps(function)
    def start(*args: P.args, **kwargs: P.kwargs) -> T:
        return cast("T", _Resumed(cast("Iterator[Any]", function(*args, **kwargs))))

    return _mark(start, and_below=True)


def graphs_break_at(*names: str, and_below: bool = True) -> Callable[[Class], Class]:
    """Class decorator: :func:`outside_graphs` for these methods.

    Not ``and_below``: they run code of the user's, which Dynamo may compile.
    """

    def marked(kind: Class) -> Class:
        for name in names:
            method = vars(kind)[name]
            setattr(kind, name, outside_graphs(method) if and_below else _mark(method, and_below=False))
        return kind

    return marked


def _mark(function: Callable[P, T], *, and_below: bool) -> Callable[P, T]:
    # Dynamo's own sign of torch.compiler.disable, which is a wrapper of 1 us a call and needs Dynamo to be imported.
    signed = cast("Any", function)
    signed._torchdynamo_disable = True
    signed._torchdynamo_disable_msg = "a step of TSAM moves the parameters between passes"
    code: CodeType = signed.__code__
    _once_imported(lambda: _leave_to_python(code, and_below))
    return function


def _leave_to_python(code: CodeType, and_below: bool) -> None:
    """Tells Dynamo to compile no frame of this code, nor, ``and_below``, those that it calls."""
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:  # a torch without these: Dynamo tries to compile such frames where it meets them
        return
    below = _FrameAction.SKIP if and_below else _FrameAction.DEFAULT
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, below))


def _once_imported(tell: Callable[[], Any]) -> None:
    """Tells Dynamo something: now, or when it has been imported."""
    if "torch._dynamo" in sys.modules and _finder not in sys.meta_path:
        tell()
    else:
        _waiting.append(tell)


def _register() -> None:
    from torch.compiler import substitute_in_graph

    while _waiting:
        _waiting.pop()()
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
    _waiting: list[Callable[[], Any]] = []
    _finder = _Finder()
    if "torch._dynamo" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _finder)


class _Resumed(Generic[T]):
    """A generator each of whose turns is a call that Dynamo leaves alone."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    @outside_graphs
    def __iter__(self) -> Iterator[T]:
        return self

    @outside_graphs
    def __next__(self) -> T:
        return cast("T", next(self._generator))

    @outside_graphs
    def throw(self, *error: Any) -> T:
        return cast("T", self._generator.throw(*error))

    @outside_graphs
    def close(self) -> None:
        self._generator.close()

    @outside_graphs
    def __del__(self) -> None:
        self._generator.close()
