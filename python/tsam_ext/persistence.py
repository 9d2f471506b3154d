"""What an optimizer that wraps another saves, loads and shows, also while one of its steps is under way.

Inside a step the parameters stand at θ+ε, buffers and a sampler's chain have moved on; what is saved there is what was
before the step, so that a run goes on from it as one that was never stopped.
Invariant: saving writes nothing, so it may happen at any pass, in a signal handler too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, hooks
from ._compile import graphs_break_at
from .base import WrappingOptimizer, with_capturable
from .engine.checks import TSAM, refuse, shown
from .module_state import drop_derived
from .progress import Progress
from .sampler_state import JoinedState
from .shards import as_local, as_parameter


@graphs_break_at("state_dict", "load_state_dict", "zero_grad", "original_state_dict", "step_base", "train", "eval")
class PersistentOptimizer(WrappingOptimizer):
    """Adds to the wrapping optimizer all that a checkpoint needs of what changes between its steps, its progress."""

    _kept: Progress | None = None

    def keep(self, progress: Progress) -> None:
        """Tells it its progress, once built."""
        self._kept = progress
        self._count_steps()

    def _count_steps(self) -> None:
        """A step counts from when the base has written it: hooks that run after that may save."""
        base, own = self.base_optimizer, self._own
        if hasattr(base, "_optimizer_step_post_hooks"):
            base.register_step_post_hook(lambda *_: own.count())

    @property
    def _own(self) -> Progress:
        assert self._kept is not None
        return self._kept

    def beside(self, state: Any) -> Any:
        """The base optimizer's state; with a sampler that keeps tensors a view that has them, as a checkpoint does."""
        keeps = self._kept is not None and self._kept.kept.has_tensors
        return JoinedState(state, self._kept_of) if keeps else state

    def _kept_of(self, parameter: Tensor) -> dict[str, Tensor]:
        kept = self._own.kept.kept(parameter)
        return {f"{checkpoint.PREFIX}{name}": tensor for name, tensor in kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with entries named ``tsam_...`` in each group and no scratch.

        A sampler that keeps something per parameter has it beside that parameter's state. Inside a step it is that of
        before the step. For a base optimizer alone take ``opt.base_optimizer.state_dict()``: in a plain one our entries
        would stay. torch.distributed.checkpoint keeps all of it in its nested form; in its flat form where the sampler
        that loads is of the kind of the one that saved.

        Hooks of this object run around the whole; those of the base around its own part.
        """
        return hooks.saved(self, self._pack)

    def _pack(self) -> dict[str, Any]:
        own = self._own
        numbers = {"step": int(own.step), "seed": own.seed}
        return checkpoint.pack(self.base_optimizer, own.kept, self.group_names, **numbers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave; continuing then gives the same bits as never having stopped.

        A state dict of the base optimizer alone loads too: step, seed and each group's rho, radius and adaptive stay as
        they are. The other settings are those of this object in any case. A step under way is undone.

        Raises:
            TypeError, ValueError: before anything changes, if the version, base class, shapes or noise scheme differ,
                a value could not have been saved, or a group has a radius and the sampler knows none.
        """
        hooks.load(self, state_dict, self._take)

    def _take(self, state: Any) -> None:
        own, base = self._own, self.base_optimizer
        rest, numbers = checkpoint.unpack(base, self.sampler, own.kept, self.group_names, state)
        base.load_state_dict(with_capturable(rest, base.param_groups) if isinstance(own.step, Tensor) else rest)
        self.set_group_keys()  # for a base that runs no hooks
        own.abort()
        own.loads += 1
        if numbers is not None:
            step, own.seed, kept = numbers
            own.seed_given = True
            own.set_step(step)
            own.kept.load(kept, [p for group in base.param_groups for p in group["params"]])

    def step_base(self) -> None:
        """The base optimizer's own step, which counts: one that torch.compile has traced may have other bits."""
        with self._own.taken():
            self.base_optimizer.step()
            drop_derived()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as any optimizer does, and with them an estimate that no step has used."""
        super().zero_grad(set_to_none)
        self._own.pending = False

    def original_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """``model.state_dict()`` as it was before the step, or :meth:`perturbed` block, that is under way.

        Writes nothing, and so may be called anywhere: between forward and backward, in a signal handler. What has
        moved, parameters and the buffers that the optimizer looks after (``model=``), is there as a copy of what it
        was; all else, and everything outside a step, as ``model.state_dict()`` gives it. Waits for the device.

        Args:
            model: the module, bare or wrapped; it may have parameters that are not this optimizer's. Entries that its
                hooks compute from parameters, instead of handing out their memory, stay as they are.

        Raises:
            TypeError: if it is no module.
        """
        if not isinstance(model, nn.Module):
            raise refuse(TSAM, "model", shown(model), "a torch.nn.Module", TypeError)
        state: dict[str, Any] = model.state_dict()
        written: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for live, before in self._own.originals():
            live = as_local(live)
            if live.numel():
                written.setdefault(live.untyped_storage().data_ptr(), []).append((live, before))
        copies: dict[Any, Tensor] = {}  # tied entries share one, as they share their memory
        for name, value in state.items() if written else ():
            if isinstance(value, Tensor) and value.layout is torch.strided and value.numel():
                held = as_local(value)
                memory = held.untyped_storage().data_ptr()
                place = (memory, held.storage_offset(), held.shape, held.stride(), held.dtype)
                original = copies[place] if place in copies else _original(held, written.get(memory, []))
                if original is not None:
                    copies[place] = original
                    state[name] = as_parameter(value, original)
        return state

    def train(self) -> None:
        """The base optimizer's ``train()``, where it has one: schedule-free ones go on from their training weights.

        Raises:
            RuntimeError: inside a step or :meth:`perturbed`, where the base would move parameters that have been moved.
        """
        self._switch("train")

    def eval(self) -> None:
        """The base optimizer's ``eval()``, where it has one: schedule-free ones show their averaged weights.

        Raises:
            RuntimeError: as :meth:`train`.
        """
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        switch = getattr(self.base_optimizer, mode, None)
        if switch is not None:
            if self._own.inside is not None:
                raise RuntimeError(f"TSAM: {mode}() inside a step: the parameters are perturbed.")
            switch()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_kept": self._kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._count_steps()


def _extent(tensor: Tensor) -> int:
    """How far its elements reach in memory from the first."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _original(value: Tensor, written: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """A copy of what ``value`` was, where it is one of the tensors written or a view into it."""
    for live, before in written:
        first = value.storage_offset() - live.storage_offset()
        if value.dtype == live.dtype and first >= 0 and first + _extent(value) <= _extent(live):
            if first == 0 and value.shape == live.shape and value.stride() == live.stride():
                return before.clone()
            if before.stride() == live.stride():
                return before.as_strided(value.shape, value.stride(), before.storage_offset() + first).clone()
    return None
