"""One measurement: passes over an objective's rows, at the parameters and beside them, and everything back afterwards.

Mean: Σ_b n_b x_b / Σ_b n_b in float64, on one device; with several ranks one sum of all their vectors for each pass.
Hessian times v: ∇(∇L · v), by differentiating the gradient's graph. ε = r D ν is the noise of TSAM's own ops.
Invariant: after it, and after any exception, parameters, buffers and torch's generators have the bits that they had;
p.grad is never touched. Each pass sees one function: generators and buffers begin it as the first pass found them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tsam_ext.agreement import agree, check_values
from tsam_ext.engine.checks import refuse
from tsam_ext.engine.ranks import CollectiveError
from tsam_ext.exchange import OtherRankError
from tsam_ext.functional import ascend_, grad_norm_, new_state, perturb_, restore_
from tsam_ext.module_state import RandomMasks, drop_derived

from .objective import Objective

ROWS, FAILED, HEAD = 0, 1, 2  # before the sums of a pass: what its rows count, and how many ranks have raised
Progress = Callable[[int, int], object]
VALUES = "ranks do not have the same values."


class _Surroundings:
    """What a forward pass reads and writes beside parameters: torch's generators, buffers, copies of parameters."""

    def __init__(self, modules: Sequence[nn.Module], devices: Iterable[torch.device]) -> None:
        self.masks = RandomMasks(devices, ())
        self._found = [
            (module, name, tensor, _copy(tensor)) for module in modules for name, tensor in module._buffers.items()
        ]

    def put_back(self) -> None:
        """All as it was found."""
        self.masks.rewind()
        self.put_back_buffers()

    def put_back_buffers(self) -> None:
        """Buffers as they were found, and no copies of parameters that have moved since."""
        for module, name, tensor, values in self._found:
            module._buffers[name] = tensor
            if tensor is not None and values is not None:
                tensor.copy_(values)
        drop_derived()


def _copy(tensor: Tensor | None) -> Tensor | None:
    """A buffer's values, where a pass can write them: not where one element is seen at several places."""
    if tensor is None or is_lazy(tensor) or tensor.is_inference():
        return None
    seen_once = all(stride or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.clone() if seen_once else None


class Evaluation:
    """What :func:`evaluating` hands out. Vectors are float64, ``[num_elements]``, on ``home``."""

    def __init__(self, objective: Objective, op: str, progress: Progress | None, total: int) -> None:
        self.objective, self.op = objective, op
        self.parameters = objective.parameters
        self.home = self.parameters[0].device
        self._devices = {parameter.device for parameter in self.parameters}
        self._saved = [parameter.detach().clone() for parameter in self.parameters]
        self._versions = [parameter._version for parameter in self.parameters]
        self._surroundings = _Surroundings(objective.modules, self._devices)
        self._state = new_state(1, self.home)
        self._progress, self._total, self._done = progress, total, 0
        self._moved = False
        self._weight: float | None = None  # of a whole pass

    def agree(self, settings: Mapping[str, object], directions: Sequence[Sequence[Tensor]]) -> None:
        """DisagreementError unless all ranks measure the same, at the same parameters."""
        ranks = self.objective.ranks
        if ranks is None:
            return
        form = [(name, tensor.shape, tensor.dtype) for name, tensor in self._named()]
        facts = [("the metric", self.op), ("the parameters' names, shapes and dtypes", repr(form))]
        facts += [(name, repr(value)) for name, value in settings.items()]
        agree(ranks, facts, 0, given=True, home=self.home)
        tensors = [*self.parameters, *(tensor for direction in directions for tensor in direction)]
        names = [*self.objective.names, *(f"directions[{i}]" for i, d in enumerate(directions) for _ in d)]
        check_values(ranks, dict(enumerate(tensors)), names, VALUES, rtol=1e-9, home=self.home)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return zip(self.objective.names, self.parameters, strict=True)

    def put_back(self) -> None:
        """Parameters, buffers and generators as they were."""
        if self._moved or any(p._version != v for p, v in zip(self.parameters, self._versions, strict=True)):
            for parameter, saved in zip(self.parameters, self._saved, strict=True):
                parameter.copy_(saved)
        self._surroundings.put_back()

    def loss(self) -> float:
        """L over all rows, where the parameters are. One pass."""

        def add(batch: Any, weight: float, sums: Tensor) -> None:
            sums.add_(self.objective.loss(batch).detach().to(self.home, torch.float64), alpha=weight)

        return float(self._mean(1, add))

    def hessian_product(self, vector: Tensor) -> Tensor:
        """The Hessian of L times a vector. One pass, twice a gradient's work."""
        directions = as_tensors(vector, self.parameters)

        def add(batch: Any, weight: float, sums: Tensor) -> None:
            with torch.enable_grad():
                loss = self.objective.loss(batch)
                self._check_depends(loss)
                first = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
                # A gradient that does not depend on the parameters has no derivative: zero.
                pairs = [(g, d) for g, d in zip(first, directions, strict=True) if g is not None and g.requires_grad]
                if not pairs:
                    return
                outputs, along = zip(*pairs, strict=True)
                second = torch.autograd.grad(outputs, self.parameters, along, allow_unused=True)
            for total, part in zip(torch.split(sums, [p.numel() for p in self.parameters]), second, strict=True):
                if part is not None:
                    total.add_(part.detach().reshape(-1).to(self.home), alpha=weight)

        return self._mean(len(vector), add)

    def draw(self, kind: str, seed: int, sample: int) -> list[Tensor]:
        """ν, one tensor for each parameter: the noise that TSAM draws in step 0 with that seed."""
        drawn = [torch.zeros_like(parameter) for parameter in self.parameters]
        zeros = [torch.empty_like(parameter) for parameter in drawn]
        perturb_(drawn, zeros, self._state, 1.0, seed=seed, sample=sample, kind=kind, base=self.objective.base)
        return drawn

    def perturb(self, radius: float, kind: str, seed: int, sample: int, adaptive: bool) -> None:
        """Moves the parameters to θ + r D ν."""
        self._moved = True
        perturb_(
            self.parameters, self._saved, self._state, radius, seed=seed, sample=sample, kind=kind, adaptive=adaptive,
            base=self.objective.base, save=False,
        )  # fmt: skip

    def move(self, directions: Sequence[Sequence[Tensor]], lengths: Sequence[float]) -> None:
        """Moves the parameters to θ + Σ_i lengths_i directions_i; lengths of 0 leave θ's bits."""
        self._moved = True
        for i, (parameter, saved) in enumerate(zip(self.parameters, self._saved, strict=True)):
            place = saved.double()
            for direction, length in zip(directions, lengths, strict=True):
                place = place.add(direction[i].to(saved.device, torch.float64), alpha=length)
            parameter.copy_(place)

    def rises(self, rho: float, size: int | None, adaptive: bool) -> tuple[Tensor, Tensor]:
        """L_m(θ + ρ D (D g)/‖D g‖) − L_m(θ) of this rank's groups of ``size`` rows, and what each counts."""
        found: list[Tensor] = []
        weights: list[float] = []

        def measure() -> None:
            for batch, _ in self.objective.batches():
                for group in self.objective.groups(batch, size):
                    found.append(self._rise(group, rho, adaptive))
                    weights.append(self.objective.weight(group))
                self._tell()

        self._guarded(torch.zeros(HEAD, dtype=torch.float64, device=self.home), measure)
        zero = torch.zeros(0, dtype=torch.float64, device=self.home)
        return torch.cat([zero, *found]), zero.new_tensor(weights)

    def _rise(self, group: Any, rho: float, adaptive: bool) -> Tensor:
        masks = RandomMasks(self._devices, ())
        self._surroundings.put_back_buffers()
        with torch.enable_grad():
            loss = self.objective.loss(group)
            self._check_depends(loss)
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(p) if g is None else torch.empty_like(p).copy_(g)
            for p, g in zip(self._saved, found, strict=True)
        ]
        grad_norm_(gradients, self._saved, self._state, adaptive=adaptive)
        self._moved = True
        ascend_(self.parameters, self._saved, gradients, self._state, rho, adaptive=adaptive)
        self._surroundings.put_back_buffers()
        masks.rewind()  # the same masks, and for the next group the generators as one forward leaves them
        higher = self.objective.loss(group)
        restore_(self.parameters, self._saved)
        return (higher.double() - loss.detach().double()).reshape(1).to(self.home)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        return values if self.objective.ranks is None else self.objective.ranks.sum_(values)

    def _check_depends(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise refuse(self.op, "objective", "a loss that depends on no parameter", "one that autograd can follow")

    def _mean(self, length: int, add: Callable[[Any, float, Tensor], None]) -> Tensor:
        """The mean over all rows of what ``add(batch, weight, sums)`` adds to ``sums``. One pass."""
        sums = torch.zeros(HEAD + length, dtype=torch.float64, device=self.home)

        def walk() -> None:
            total = 0.0
            for batch, weight in self.objective.batches():
                add(batch, weight, sums[HEAD:])
                total += weight
            sums[ROWS] = total
            self._tell()

        weight = self._guarded(sums, walk)
        first = self._weight = weight if self._weight is None else self._weight
        if weight == 0.0 or not math.isclose(weight, first, rel_tol=1e-9):
            got = f"{weight:g} rows" if weight == first else f"{weight:g} rows in a pass after {first:g}"
            raise refuse(self.op, "objective: loader", got, "the same rows in each pass, at least one")
        return sums[HEAD:].div_(weight)

    def _guarded(self, sums: Tensor, work: Callable[[], None]) -> float:
        """Runs one pass, adds ``sums`` over ranks, returns what all rows count; a rank that raises tells the others."""
        ranks = self.objective.ranks
        try:
            self._surroundings.put_back()
            work()
        except BaseException:
            if ranks is not None:
                sums.zero_()[FAILED] = 1.0
                with suppress(CollectiveError):
                    ranks.sum_(sums)
            raise
        self.summed(sums)
        weight, failed = sums[:HEAD].tolist()
        if failed:
            raise OtherRankError(
                f"tsam.{self.op}: another rank has raised ({failed:.0f} in all); here all is as before."
            )
        return float(weight)

    def _tell(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


@contextmanager
def evaluating(
    objective: object,
    op: str,
    settings: Mapping[str, object],
    progress: object,
    total: int,
    directions: Sequence[Sequence[Tensor]] = (),
) -> Iterator[Evaluation]:
    """One measurement. ``settings``: its arguments, which ranks compare; ``total``: how often progress is called."""
    checked = check_objective(op, objective)
    if progress is not None and not callable(progress):
        raise refuse(op, "progress", type(progress).__name__, "None or a function of (done, total)", TypeError)
    # Inside inference_mode nothing would have a derivative.
    with torch.inference_mode(False), torch.no_grad():
        evaluation = Evaluation(checked, op, progress, total)
        evaluation.agree(settings, directions)
        try:
            yield evaluation
        finally:
            try:
                evaluation.put_back()
            except BaseException:  # an interrupt that comes just then
                evaluation.put_back()
                raise


def check_objective(op: str, objective: object) -> Objective:
    """``objective`` if it is one; TypeError otherwise."""
    if not isinstance(objective, Objective):
        raise refuse(op, "objective", type(objective).__name__, "a metrics.Objective", TypeError)
    return objective


def as_vector(tensors: Sequence[Tensor], home: torch.device) -> Tensor:
    """All elements of the tensors in one, float64."""
    return torch.cat([tensor.detach().reshape(-1).to(home, torch.float64) for tensor in tensors])


def as_tensors(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The elements of one vector in tensors of the shapes, dtypes and devices of ``like``."""
    parts = torch.split(vector, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape).to(tensor.device, tensor.dtype) for part, tensor in zip(parts, like, strict=True)]
