"""What a forward pass leaves behind besides gradients, and how several passes leave it as one would.

Random masks: generator states are saved before the first pass and set again before each later one.
Normalisation layers: their running statistics are saved after the first pass and put back after each later one.
Invariant: after a completed step both are as after one forward; after an exception, as before the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .engine.notices import warn


class RandomMasks:
    """The default generators (CPU, and CUDA where parameters live) at the start of a step.

    Python's ``random`` and NumPy's generators are not touched.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cuda = sorted({d.index for d in devices if d.type == "cuda" and d.index is not None})
        self._cpu_state = torch.default_generator.get_state()
        self._cuda_states = [torch.cuda.get_rng_state(index) for index in self._cuda]

    def rewind(self) -> None:
        """Puts the generators back to where they were."""
        torch.default_generator.set_state(self._cpu_state)
        for index, state in zip(self._cuda, self._cuda_states, strict=True):
            torch.cuda.set_rng_state(state, index)


class NormStatistics:
    """Running statistics of the normalisation layers of ``model`` that move in training.

    BatchNorm, SyncBatchNorm and InstanceNorm with ``track_running_stats``, with any momentum, inside compiled or
    wrapped modules too: buffers are copied, no layer is changed.
    """

    def __init__(self, model: nn.Module | None) -> None:
        layers = () if model is None else model.modules()
        self._buffers = [
            buffer
            for layer in layers
            if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats
            for buffer in layer.buffers(recurse=False)
        ]
        self._before = [buffer.clone() for buffer in self._buffers]
        self._after_first: list[torch.Tensor] | None = None

    def end_pass(self) -> None:
        """After the first pass: remember. After each later one: put back what the first one left."""
        if self._after_first is None:
            self._after_first = [buffer.clone() for buffer in self._buffers]
        else:
            self._write(self._after_first)

    def rewind(self) -> None:
        """Puts the statistics back to before the step."""
        self._write(self._before)

    def saved_buffers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each buffer, and its copy from before the step."""
        return list(zip(self._buffers, self._before, strict=True))

    def _write(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, values, strict=True):
                buffer.copy_(value)


class TrainingNormWatch:
    """Warns once if a training BatchNorm runs while no ``model`` was given to the optimizer.

    A forward hook for all modules, in place during the first step only.
    """

    def __init__(self) -> None:
        self._seen = False
        self._handle: Any = nn.modules.module.register_module_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, _inputs: Any) -> None:
        if isinstance(module, _NormBase) and module.training and module.track_running_stats:
            self._seen = True

    def close(self) -> None:
        """Takes the hook away and warns if there is reason to."""
        self._handle.remove()
        if self._seen:
            warn(
                "a training normalisation layer with running statistics ran several times in one step, and its "
                "statistics moved each time; pass model=... to TSAM to have them move once."
            )
