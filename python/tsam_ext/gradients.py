"""The gradients that a pass has left in p.grad, each in the layout that the kernels want.

Layout: by index into the step's table; a gradient in its parameter's strides, of a complex one the real pairs, of a
sparse one (of another optimizer's parameter) all rows. Its dtype is what torch put there; ops that move parameters
want theirs.
Invariant: in the usual case nothing is copied, and each gradient is looked at once per pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .engine.checks import DTYPES, TSAM, refuse
from .mean import GRAD, Mean
from .shards import as_local
from .table import DTYPE, STRIDE, Table, kernel_form, taken

NONE, CONTIGUOUS = type(None), Tensor.is_contiguous


class Gradients:
    """Gathers those of one step. ``mixed``: whether any differs from its parameter in more than values."""

    def __init__(self, table: Table, mean: Mean) -> None:
        self.mixed = False
        self._table, self._mean = table, mean
        self._has_looked = False  # at the dtypes: what torch allows in p.grad does not change within a step

    def gather(self) -> dict[int, Tensor]:
        """What p.grad holds now; ValueError for a sparse gradient of a parameter that is ours. Under no_grad()."""
        table = self._table
        found = dict(enumerate(map(GRAD, table.parameters)))
        if NONE in set(map(type, found.values())):
            found = {i: gradient for i, gradient in found.items() if gradient is not None}
        try:
            if table.is_contiguous:
                usual = all(map(CONTIGUOUS, found.values()))
            else:
                usual = list(map(STRIDE, found.values())) == taken(table.strides, found)
        except RuntimeError:  # sparse ones have no strides
            usual = False
        if usual and not self._has_looked:
            self._has_looked = True
            of_parameters = list(map(DTYPE, found.values())) == taken(table.dtypes, found)
            self.mixed = table.tensors is not table.parameters or not of_parameters
        if usual and not self.mixed:
            return found
        self.mixed = True
        return {i: self._in_form(i, gradient) for i, gradient in found.items()}

    def _in_form(self, index: int, gradient: Tensor) -> Tensor:
        table = self._table
        if gradient.layout is not torch.strided:
            if index < table.own:
                raise refuse(TSAM, f"{table.name(index)}.grad", f"a {gradient.layout} tensor", "a dense gradient")
            self._mean.goes_back_sparse(index)
            gradient = gradient.to_dense()
        gradient, like = as_local(gradient), as_local(table.parameters[index])
        if gradient.stride() != like.stride() or gradient.is_conj() or gradient.is_neg():
            gradient = torch.empty_like(like, dtype=gradient.dtype).copy_(gradient)
        if not gradient.is_complex() and gradient.dtype not in DTYPES:
            gradient = gradient.float()
        return kernel_form(gradient)

    def as_moved(self, gradients: dict[int, Tensor]) -> dict[int, Tensor]:
        """Those of what this optimizer holds in the dtypes of their parameters, as ops that move those want them."""
        if not self.mixed:
            return gradients
        tensors, own = self._table.tensors, self._table.own
        return {i: g.to(tensors[i].dtype) if i < own else g for i, g in gradients.items()}
