"""What a forward pass leaves behind besides gradients, and how several passes leave it as one would.

Random numbers: the generators' states are saved before the first pass; if that draws, later passes draw the same.
Buffers: those that a pass moves are saved after the first pass and put back after each later one.
Values made from parameters and kept (autocast's casts, parametrize.cached()) are dropped before each pass.
Invariant: after a completed step all is as after one forward; after an exception, as before the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from .history import VERSION, History
from .shards import drop_gathered

STILL, COUNTED, SILENT = "still", "counted", "silent"  # how a buffer moves: with its version, or without


def drop_derived(sharded: Sequence[Any] = ()) -> None:
    """Drops what was made from the parameters where they were: they have moved, or are about to.

    Autocast keeps the low-precision copy of each weight until its outermost block ends, parametrize.cached() each
    parametrized tensor, and a module of fully_shard (``sharded``) the weights that it has gathered.
    """
    if sharded:
        drop_gathered(sharded)
    torch.clear_autocast_cache()
    if parametrize._cache_enabled:
        parametrize._cache.clear()


def drawn_seed() -> int:
    """A number below 2^63 from torch's default generator, also where tensors are fake."""
    with _disable_current_modes():
        return int(torch.randint(0, (1 << 63) - 1, (), device="cpu"))


def _bytes(state: Tensor) -> bytes:
    """A generator's state, which lies on the host, without an op."""
    return ctypes.string_at(state.data_ptr(), state.nbytes)


class RandomMasks:
    """Random generators at the start of a step: the default ones (CPU, and CUDA where parameters live), and the user's.

    They are rewound only if the first pass drew from them: another thread may draw meanwhile. Python's ``random`` and
    NumPy's generators are not touched.
    """

    def __init__(self, devices: Iterable[torch.device], own: Sequence[torch.Generator]) -> None:
        cuda = sorted({d.index for d in devices if d.type == "cuda" and d.index is not None})
        every = [torch.default_generator, *(torch.cuda.default_generators[index] for index in cuda), *own]
        self._before = [(generator, generator.get_state()) for generator in every]
        self._drawn: list[tuple[torch.Generator, Tensor]] | None = None

    def _moved(self) -> list[tuple[torch.Generator, Tensor]]:
        return [(g, before) for g, before in self._before if _bytes(g.get_state()) != _bytes(before)]

    def end_first_pass(self) -> None:
        """Notes which generators the first pass has drawn from."""
        self._drawn = self._moved()

    def rewind(self) -> None:
        """Puts the generators that the first pass draws from back to where they were."""
        for generator, state in self._moved() if self._drawn is None else self._drawn:
            generator.set_state(state)


@dataclass
class _Buffer:
    """One buffer of a module in training, and what is kept of it.

    ``first``: the object before the step; ``before``: a copy of its values, where it may move; ``after``: the object
    that the first pass left and a copy of its values; ``silent``: its kernels move it without counting its version.
    """

    module: nn.Module
    name: str
    silent: bool
    first: Tensor | None
    version: int
    before: Tensor | None = None
    after: tuple[Tensor | None, Tensor | None] | None = None

    @property
    def now(self) -> Tensor | None:
        """The buffer as it is."""
        return self.module._buffers.get(self.name)

    def note(self) -> None:
        """From here on a change of object or version is a pass's."""
        now = self.now
        self.version = -1 if now is None else now._version

    def touched(self, known: Tensor | None) -> bool:
        """Whether the buffer is another object, or has been written, since :meth:`note`."""
        now = self.now
        return now is not known or (now is not None and (self.silent or now._version != self.version))

    def keep(self) -> None:
        """Remembers what the first pass has left."""
        now = self.now
        self.after = now, None if now is None else now.clone()
        self.note()

    def put(self, tensor: Tensor | None, values: Tensor | None) -> None:
        """Makes this the buffer, with these values."""
        self.module._buffers[self.name] = tensor
        if tensor is not None and values is not None:
            tensor.copy_(values)
        self.note()


class Buffers:
    """Buffers of the modules of ``model`` that are in training.

    Normalisation layers' always count as moving, as their kernels write running_mean and running_var without counting
    versions. Every other one is copied and compared by value in the first step that sees it, which waits for its
    device; later steps copy only what moves, and notice by object or version what begins to.
    """

    def __init__(self, modules: Iterable[nn.Module], history: History, *, capturing: bool) -> None:
        self._capturing = capturing
        self._entries: list[tuple[_Buffer, dict[str, str]]] = []
        self._is_first = True
        for module in modules:
            if not module._buffers or not module.training:
                continue
            known = history.buffers.get(module)
            if known is None:
                known = history.buffers[module] = {}
            norm = isinstance(module, _NormBase) and module.track_running_stats
            for name, tensor in module._buffers.items():
                if tensor is not None and (is_lazy(tensor) or tensor.is_inference()):
                    continue
                if norm:
                    known[name] = SILENT
                kind = known.get(name)
                buffer = _Buffer(module, name, kind == SILENT, tensor, -1 if tensor is None else tensor._version)
                if tensor is not None and kind != STILL:
                    buffer.before = tensor.clone()
                self._entries.append((buffer, known))

    def end_pass(self) -> None:
        """After the first pass: remember what it has left. After each later one: put that back."""
        first, self._is_first = self._is_first, False
        for buffer, known in self._entries:
            if first:
                self._look(buffer, known)
            elif buffer.after is not None:
                if buffer.touched(buffer.after[0]):
                    buffer.put(*buffer.after)
            elif buffer.touched(buffer.first):  # a later pass alone has moved it
                known[buffer.name] = COUNTED
                buffer.put(buffer.first, buffer.before)

    def _look(self, buffer: _Buffer, known: dict[str, str]) -> None:
        if buffer.touched(buffer.first):
            known.setdefault(buffer.name, COUNTED)
            if known[buffer.name] == STILL:
                known[buffer.name] = COUNTED
            buffer.keep()
        elif buffer.name not in known and not self._capturing:
            now = buffer.now
            moved = now is not None and buffer.before is not None and not torch.equal(now, buffer.before)
            known[buffer.name] = SILENT if moved else STILL
            if moved:
                buffer.silent = True
                buffer.keep()

    def rewind(self) -> None:
        """Puts the buffers back to before the step."""
        for buffer, _ in self._entries:
            if buffer.before is not None or buffer.now is not buffer.first:
                buffer.put(buffer.first, buffer.before)

    def saved(self) -> list[tuple[Tensor, Tensor]]:
        """Each buffer that may have moved, as it is, and what it was before the step."""
        found = []
        for buffer, _ in self._entries:
            now = buffer.now
            before = buffer.first if buffer.before is None and now is not buffer.first else buffer.before
            if now is not None and before is not None:
                found.append((now, before))
        return found


class ModuleWatch:
    """Looks at the modules that run in a first step without ``model``, and says what that means for them.

    A forward hook for all modules, in place inside a ``with`` block around that step. ``own``: the optimizer's
    parameters. After an exception nothing is said.
    """

    def __init__(self, own: Iterable[Tensor], history: History) -> None:
        self._own, self._history = set(map(id, own)), history
        self._norms = False
        self._entries: list[_Buffer] = []
        self._others: dict[int, tuple[nn.Parameter, Tensor | None, int]] = {}
        self._seen: set[nn.Module] = set()
        self._handle: Any = None

    def __enter__(self) -> None:
        self._handle = nn.modules.module.register_module_forward_pre_hook(self._look)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._handle.remove()
        self._history.watched = True
        if kind is None:
            self._tell()

    def _look(self, module: nn.Module, _inputs: Any) -> None:
        norm = isinstance(module, _NormBase) and module.training and module.track_running_stats
        if torch.compiler.is_compiling():  # into the graph of a model that was compiled, which may not break here
            if norm:
                self._norms = True
            return
        if module in self._seen:
            return
        self._seen.add(module)
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in self._own:
                gradient = parameter.grad
                version = -1 if gradient is None else gradient._version
                self._others.setdefault(id(parameter), (parameter, gradient, version))
        if norm:
            self._norms = True
        elif module.training:
            for name, tensor in module._buffers.items():
                if tensor is None or not (is_lazy(tensor) or tensor.is_inference()):
                    self._entries.append(
                        _Buffer(module, name, False, tensor, -1 if tensor is None else VERSION(tensor))
                    )

    def _tell(self) -> None:
        if self._norms or any(buffer.touched(buffer.first) for buffer in self._entries):
            what = "a training normalisation layer with running statistics" if self._norms else "a module in training"
            self._history.tell(
                f"{what} ran several times in one step, and its "
                f"{'statistics' if self._norms else 'buffers'} moved each time; pass model=... to TSAM to have them "
                "move once."
            )
        if any(p.grad is not g or (g is not None and g._version != v) for p, g, v in self._others.values()):
            self._history.tell(
                "parameters that this optimizer does not hold got a gradient in each pass of a step, and the sum of "
                "all of them; pass model=... to TSAM to have them get one mean gradient."
            )
