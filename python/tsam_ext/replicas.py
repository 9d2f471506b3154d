"""Models of which each rank has a whole copy: DistributedDataParallel, and which backward passes reduce gradients.

pass: [no_sync] forward, backward; the gradients of a pass in no_sync stay this rank's own.
Wrappers that keep gradients where no optimizer sees them are refused by name.
Invariant: a module's settings are as they were outside a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .engine.checks import TSAM, refuse
from .engine.ranks import Ranks, members_of

HIDING = {  # what a module's class is called, with the package that it comes from
    "FullyShardedDataParallel": ("torch", "torch.distributed.fsdp.fully_shard (FSDP2), whose parameters are DTensors"),
    "DeepSpeedEngine": ("deepspeed", "DistributedDataParallel, or torch.distributed.fsdp.fully_shard"),
    "DistributedDataParallel": ("megatron", "torch's DistributedDataParallel, or fully_shard"),
}

NO_SYNC = (
    "TSAM: a step inside DistributedDataParallel.no_sync(): its gradients would not be reduced. Run all microbatches "
    "inside the closure, or inside the body of samples(); no_sync() may be there, but not around the last. Nothing "
    "was updated."
)


def refuse_hidden(name: str, parameter: Tensor) -> None:
    """ValueError for a parameter whose gradient its owner keeps to itself, or of which it holds a hidden part."""
    kind = type(parameter).__name__
    for found, what in (
        (kind == "FlatParameter" or hasattr(parameter, "_fsdp_flattened"), "FullyShardedDataParallel (FSDP1)"),
        (hasattr(parameter, "ds_id"), "DeepSpeed"),
        (hasattr(parameter, "main_grad"), "Megatron"),
    ):
        if found:
            expected = "one whose gradient is in p.grad: DistributedDataParallel or fully_shard (FSDP2)"
            raise refuse(TSAM, name, f"a parameter that {what} manages", expected)


def refuse_hiding(modules: Iterable[nn.Module]) -> None:
    """ValueError for a module that keeps its parameters' gradients to itself."""
    for module in modules:
        kind = type(module)
        package, instead = HIDING.get(kind.__name__, ("", ""))
        if package and kind.__module__.startswith(package) and not isinstance(module, DistributedDataParallel):
            raise refuse(TSAM, "model", f"a {kind.__module__}.{kind.__name__}", instead)


def replicas_in(modules: Iterable[nn.Module], own: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules among these that have any of the parameters."""
    found = [module for module in modules if isinstance(module, DistributedDataParallel)]
    if not found:
        return []
    wanted = set(map(id, own))
    return [module for module in found if any(id(p) in wanted for p in module.parameters())]


class Replicas:
    """The DistributedDataParallel modules that hold the parameters, over the same ranks each."""

    def __init__(self, modules: Sequence[DistributedDataParallel]) -> None:
        self.modules: list[DistributedDataParallel] = []
        self._forwards: list[bool] = []  # of a pass that reduces: whether each forward of a module is to
        for module in modules:
            self.add(module)

    def add(self, module: DistributedDataParallel) -> None:
        """One more; ValueError where it has other ranks, or cannot be driven."""
        if module in self.modules:
            return
        if self.modules and members_of(module.process_group) != self.members:
            got = f"DistributedDataParallel modules over ranks {list(members_of(module.process_group))}"
            raise refuse(TSAM, "model", got, f"ranks {list(self.members)} as of the other module")
        if getattr(module, "_delay_all_reduce_all_params", False):
            got = "a DistributedDataParallel with delay_all_reduce_named_params for all parameters"
            raise refuse(TSAM, "model", got, "one that reduces gradients in its backward pass")
        self.modules.append(module)

    @property
    def group(self) -> Any:
        """The process group of the modules."""
        return self.modules[0].process_group

    @property
    def members(self) -> tuple[int, ...]:
        """Their ranks, as the world numbers them."""
        return members_of(self.group)

    @property
    def static(self) -> bool:
        """Whether any module wants its first pass ever reduced."""
        return any(module.static_graph for module in self.modules)

    @property
    def follows_first(self) -> bool:
        """Whether buffers are to be those of the first rank."""
        return any(module.broadcast_buffers for module in self.modules)

    def follow_first(self, ranks: Ranks) -> None:
        """The running statistics of all ranks are those of the first, as a model that is evaluated on any wants."""
        buffers = [
            buffer
            for module in self.modules
            for name, buffer in module.module.named_buffers()
            if name not in module.parameters_to_ignore
            and buffer.dtype.is_floating_point
            and buffer.layout is torch.strided
        ]
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for buffer in buffers:
            alike.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        for tensors in alike.values():
            joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
            ranks.follow_first_(joined)
            for tensor, found in zip(tensors, torch.split(joined, [t.numel() for t in tensors]), strict=True):
                tensor.copy_(found.view_as(tensor))

    def check_ready(self) -> None:
        """RuntimeError inside join(), or inside a no_sync() of the user's around a whole step."""
        self.check_not_joining()
        if not all(module.require_backward_grad_sync for module in self.modules):
            raise RuntimeError(NO_SYNC)

    def check_not_joining(self) -> None:
        """RuntimeError inside join()."""
        for module in self.modules:
            config = getattr(module, "_join_config", None)
            if getattr(config, "enable", False):
                raise RuntimeError(
                    "TSAM: a step inside DistributedDataParallel.join(): ranks that have run out of batches cannot "
                    "take part in it. Give all ranks the same number of batches (DistributedSampler does). Nothing was "
                    "updated."
                )

    @property
    def held_back(self) -> bool:
        """Whether all forwards of the last pass that was to reduce were inside a no_sync() of the user's."""
        return bool(self._forwards) and not any(self._forwards)

    def _note(self, module: Any, _inputs: Any) -> None:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._forwards.append(torch.compiler.is_compiling() or module.require_backward_grad_sync)

    @contextmanager
    def one_pass(self, *, reduces: bool) -> Iterator[None]:
        """The passes inside reduce their gradients, or do not."""
        with ExitStack() as stack:
            self._forwards = []
            for module in self.modules:
                if not reduces:
                    stack.enter_context(module.no_sync())
                    continue
                stack.callback(module.register_forward_pre_hook(self._note).remove)
                if module.find_unused_parameters and not module.static_graph:
                    # It counts as used what passes without a reduction have used before, whose gradients are not here.
                    module.reducer._reset_state()
            yield


class ReplicaWatch:
    """Tells of each DistributedDataParallel that has the parameters, whenever its forward begins inside the block.

    A pre-hook for all modules: ``tell`` runs before the module decides whether its backward pass reduces gradients.
    """

    def __init__(self, own: Iterable[Tensor], tell: Any) -> None:
        self._own, self._tell = list(own), tell
        self._others: set[int] = set()
        self._handle: Any = None

    def __enter__(self) -> None:
        self._handle = nn.modules.module.register_module_forward_pre_hook(self._look)

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _look(self, module: nn.Module, _inputs: Any) -> None:
        if torch.compiler.is_compiling() or id(module) in self._others:
            return
        found = replicas_in([module], self._own)
        if not found:
            refuse_hiding([module])
            self._others.add(id(module))
        for replica in found:
            self._tell(replica)
