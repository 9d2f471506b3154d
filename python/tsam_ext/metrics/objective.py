"""What a metric is measured on: L(θ) = Σ_b n_b L_b(θ) / Σ_b n_b over a loader's batches, or any function of tensors.

Layout: θ is the list of the trainable parameters; element indices, by which noise is drawn, count all parameters in
their order, each base rounded up to a multiple of 4, frozen ones keeping theirs, as TSAM counts them.
Invariant: an Objective that exists is valid, holds no state of a measurement, and has not run the loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from tsam_ext.engine.checks import check_int, check_number, refuse, shown
from tsam_ext.engine.ranks import Ranks, members_of, world_size
from tsam_ext.replicas import refuse_hidden, refuse_hiding
from tsam_ext.shards import is_sharded

OP = "metrics.Objective"
WIDE = (torch.float32, torch.float64)


class Objective:
    """A loss over all rows of a loader as a function of a model's trainable parameters.

    Everything is measured in the mode that the model is in: call ``model.eval()`` first where that is meant. In
    training mode BatchNorm normalises by each batch, and every pass over the rows has the same dropout masks. What
    passes write into buffers (running statistics too) is put back after each metric, bit for bit, as are the parameters
    and torch's random generators; Python's and NumPy's, and a loader's own, are not.

    Args:
        model: a module; its frozen parameters are left out, the others have to be float32 or float64. Of a
            DistributedDataParallel the module inside is what runs. For what needs the Hessian torch has to have its
            second derivatives: of attention inside ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, of a
            compiled module not.
        loader: batches, walked once for each pass: a list, a DataLoader, any iterable that can be walked again. The
            rows must be the same in each walk, their order may differ; torch's generators start each walk in the same
            state.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the batch's rows: one floating-point element. It
            runs under ``torch.no_grad()`` where no derivative is asked for.
        rows: ``rows(batch)`` is how much a batch counts, a number not below 0 (tokens, say). ``None`` (default): the
            size of dimension 0 of its first tensor.
        process_group: the ranks that each have a part of the rows: values are those of all rows. ``"auto"`` (default):
            the group of a DistributedDataParallel, else this process if it is the only one. ``None``: this process
            alone.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted. DTensors (fully_shard), parameters of
            DeepSpeed, Megatron and FSDP1, and half-precision or complex parameters are refused by name.

    Example:
        >>> import torch
        >>> net, rows = torch.nn.Linear(2, 1), torch.randn(8, 2)
        >>> objective = Objective(net, rows.split(3), lambda net, x: net(x).square().mean())
        >>> objective.num_elements
        3
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        rows: Callable[[Any], float] | None = None,
        process_group: Any = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise refuse(OP, "model", shown(model), "a torch.nn.Module", TypeError)
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            expected = "batches that can be walked again and again: a list of them, or a DataLoader"
            raise refuse(OP, "loader", shown(loader), expected, TypeError)
        _check_callable("loss_fn", loss_fn, "a function of the model and a batch")
        if rows is not None:
            _check_callable("rows", rows, "None or a function of a batch")
        outer = model
        if isinstance(model, DistributedDataParallel):
            model = model.module  # whose passes wait for no other rank
        modules = list(model.modules())
        refuse_hiding(modules)
        if any(isinstance(module, DistributedDataParallel) for module in modules):
            raise refuse(OP, "model", "a module around a DistributedDataParallel", "the DistributedDataParallel itself")
        named = list(model.named_parameters())
        if len({id(tensor) for _, tensor in named}) < len(named):
            raise refuse(OP, "params", "a tensor twice", "different tensors")
        chosen = [i for i, (name, tensor) in enumerate(named) if _check_parameter(name, tensor)]
        if not any(named[i][1].numel() for i in chosen):
            raise refuse(OP, "model", "no element that requires grad", "parameters that do")
        sizes = [(tensor.numel() * (1 + tensor.is_complex()) + 3) // 4 * 4 for _, tensor in named]
        base = list(itertools.accumulate(sizes, initial=0))
        self.names = [named[i][0] for i in chosen]
        self.parameters = [named[i][1] for i in chosen]
        self.base = [base[i] for i in chosen]
        self.num_elements = sum(tensor.numel() for tensor in self.parameters)
        self.modules, self.ranks = modules, _ranks_of(process_group, outer)
        self._model, self._loader, self._loss_fn, self._rows = model, loader, loss_fn, rows

    @classmethod
    def of_function(
        cls, function: Callable[[], Tensor], params: Iterable[Tensor], *, process_group: Any = "auto"
    ) -> Objective:
        """Any differentiable function of tensors: ``function()`` reads ``params``, which are moved where they lie.

        Args:
            function: takes nothing and returns one floating-point element, the same for the same values of ``params``.
            params: leaf tensors of float32 or float64; those that do not require grad are left out.
            process_group: as for :class:`Objective`; the value is the mean over ranks. ``"auto"`` needs this process to
                be the only one.

        Raises:
            TypeError, ValueError: as :class:`Objective`.

        Example:
            >>> import torch
            >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> Objective.of_function(lambda: (x[0] * x[1]).square(), [x]).num_elements
            2
        """
        _check_callable("function", function, "a function of nothing")
        if isinstance(params, Tensor) or not isinstance(params, Iterable):
            raise refuse(OP, "params", shown(params), "a list of tensors", TypeError)
        model = _Function(function, list(params))
        return cls(model, [None], lambda net, _: net(), rows=lambda _: 1.0, process_group=process_group)

    @property
    def num_batches(self) -> int:
        """How many batches a pass has; 0 where the loader does not say."""
        try:
            return len(self._loader) if isinstance(self._loader, Sized) else 0
        except TypeError:  # a DataLoader over a dataset without length
            return 0

    def batches(self) -> Iterator[tuple[Any, float]]:
        """Each batch of one pass, and how much it counts."""
        for batch in self._loader:
            yield batch, self.weight(batch)

    def weight(self, batch: Any) -> float:
        """How much a batch counts in the mean."""
        if self._rows is None:
            return float(_length(batch))
        expected = "a finite number not below 0"
        return check_number(OP, "rows(batch)", self._rows(batch), expected, 0.0, or_tensor=False)

    def groups(self, batch: Any, size: int | None) -> Iterator[Any]:
        """A batch in groups of ``size`` consecutive rows, the last of what is left; None: the batch."""
        length = 0 if size is None else _length(batch)
        if size is None or size >= length:
            yield batch
            return
        tree = _plain(batch)
        for begin in range(0, length, size):

            def rows(leaf: Any, begin: int = begin) -> Any:
                has_rows = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == length
                return leaf[begin : begin + size] if has_rows else leaf

            yield tree_map(rows, tree)

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch, 0-dim; TypeError or ValueError for what is none."""
        loss = self._loss_fn(self._model, batch)
        if not isinstance(loss, Tensor):
            raise refuse(OP, "loss", shown(loss), "a tensor of one element", TypeError)
        if loss.numel() != 1 or not loss.dtype.is_floating_point:
            got = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
            raise refuse(OP, "loss", got, "one floating-point element: the mean over the batch's rows")
        return loss.reshape(())

    def check_group(self, op: str, argument: str, value: object) -> int | None:
        """``value`` as a number of rows, or None; ValueError where there are no rows."""
        if value is None:
            return None
        if isinstance(self._model, _Function):
            raise refuse(op, argument, shown(value), "None, as the objective is a function without rows")
        return check_int(op, argument, value, 1, 1 << 62)

    def check_direction(self, op: str, argument: str, value: object) -> list[Tensor]:
        """``value`` if it is a list of tensors like the parameters."""
        if not isinstance(value, (list, tuple)) or len(value) != len(self.parameters):
            got = f"{len(value)} entries" if isinstance(value, (list, tuple)) else shown(value)
            raise refuse(op, argument, got, f"a list of {len(self.parameters)} tensors, one for each parameter")
        for i, (tensor, parameter) in enumerate(zip(value, self.parameters, strict=True)):
            if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape or tensor.is_complex():
                expected = f"a real tensor of shape {tuple(parameter.shape)}, as {self.names[i]}"
                raise refuse(op, f"{argument}[{i}]", shown(tensor), expected)
        return [tensor.detach() for tensor in value]


class _Function(nn.Module):
    """A function of tensors that are its parameters, whatever their class."""

    def __init__(self, function: Callable[[], Tensor], params: list[Tensor]) -> None:
        super().__init__()
        self.function, self.params = function, params

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """The tensors."""
        return ((f"params[{i}]", tensor) for i, tensor in enumerate(self.params))

    def forward(self) -> Tensor:
        """The value."""
        return self.function()


def _check_callable(argument: str, value: object, expected: str) -> None:
    if not callable(value):
        raise refuse(OP, argument, shown(value), expected, TypeError)


def _check_parameter(name: str, tensor: object) -> bool:
    """Whether it is one to move: TypeError or ValueError for one that requires grad and cannot be."""
    if not isinstance(tensor, Tensor):
        raise refuse(OP, name, shown(tensor), "a tensor", TypeError)
    if not tensor.requires_grad:
        return False
    refuse_hidden(name, tensor)
    if is_sharded(tensor):
        raise refuse(OP, name, "a DTensor", "a tensor that this process holds whole, as of DistributedDataParallel")
    if tensor.dtype not in WIDE or tensor.layout is not torch.strided or tensor.device.type == "meta":
        got = f"a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}"
        raise refuse(OP, name, got, "a dense tensor of float32 or float64 (frozen ones may be of any kind)")
    if not tensor.is_leaf or tensor.is_inference():
        got = "an inference tensor" if tensor.is_inference() else "the result of an operation"
        raise refuse(OP, name, got, "a leaf tensor that requires grad")
    return True


def _ranks_of(group: Any, model: nn.Module) -> Ranks | None:
    """The ranks that share the rows; None where this process has all."""
    if group not in ("auto", None) and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise refuse(OP, "process_group", shown(group), "'auto', None or a torch.distributed.ProcessGroup", TypeError)
    if group is None or world_size() == 1:
        return None
    if group == "auto":
        if not isinstance(model, DistributedDataParallel):
            got = f"'auto' in one of {world_size()} processes, without a DistributedDataParallel"
            raise refuse(OP, "process_group", got, "the group that shares the rows, or None: this process alone")
        group = model.process_group
    members = members_of(group)
    return Ranks(members, group) if len(members) > 1 else None


def _plain(batch: Any) -> Any:
    """A batch as torch's trees know it: a mapping of any kind as a dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _length(batch: Any) -> int:
    """The rows of a batch."""
    for leaf in tree_leaves(_plain(batch)):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise refuse(OP, "loader", f"a batch ({shown(batch)}) without a tensor", "tensors with rows, or the argument rows")
