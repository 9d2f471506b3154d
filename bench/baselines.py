"""The competitors that ``overhead`` and ``step`` time, each as its users have it, and each checked before it is timed.

loop: the flow of public TSAM scripts: a Python loop over tensors, a norm read on the host for each, s gradient copies;
foreach: the best TSAM that plain torch gives: torch._foreach_*, a streaming mean, nothing read on the host;
compiled: the same passes under torch.compile; wrapper: the flow of the much-copied 60-line SAM; library:
pytorch_optimizer's SAM. Invariant: estimate_gradient leaves the parameters as they were and the estimate in p.grad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

Closure = Callable[[], Tensor]
Tensors = list[Tensor]


class Estimator(Protocol):
    """What is timed: one gradient estimate."""

    def estimate_gradient(self, closure: Closure) -> Any:
        """Runs the closure once per gradient and fills p.grad."""


class LoopTSAM:
    """TSAM (ascent, gaussian) with loops over tensors, ``.item()`` for each norm, and s copies of the gradient.

    Words per element: s (draw 1, scale 2, add 3, norm 1, scale 2, ascend 3, copy 2, restore 2, mean 5), save 2, zero 1.
    """

    def __init__(self, params: Tensors, *, rho: float, radius: float, tilt: float, num_samples: int) -> None:
        self.params, self.rho, self.radius, self.tilt, self.num_samples = params, rho, radius, tilt, num_samples
        self.dimension = sum(p.numel() for p in params)

    @property
    def words(self) -> int:
        """Words per element of one estimate."""
        return 21 * self.num_samples + 3

    @torch.no_grad()
    def estimate_gradient(self, closure: Closure) -> Tensor:
        """Draws, ascends, copies the gradient, restores; s times, and then the weighted mean of the copies."""
        saved = [p.detach().clone() for p in self.params]
        losses, gradients = [], []
        for _ in range(self.num_samples):
            if self.radius:
                for p in self.params:
                    p.add_(torch.randn_like(p) * (self.radius / math.sqrt(self.dimension)))
            self._run(closure)
            norm = math.sqrt(sum(_gradient(p).norm().item() ** 2 for p in self.params))
            for p in self.params:
                p.add_(_gradient(p) * (self.rho / (norm + 1e-12)))
            losses.append(self._run(closure).item())
            gradients.append([_gradient(p).clone() for p in self.params])
            for p, before in zip(self.params, saved, strict=True):
                p.copy_(before)
        lifts = [math.exp(self.tilt * (loss - max(losses))) for loss in losses]
        for i, p in enumerate(self.params):
            mean = torch.zeros_like(p)
            for lift, of_sample in zip(lifts, gradients, strict=True):
                mean += lift / sum(lifts) * of_sample[i]
            p.grad = mean
        return torch.tensor(losses[0])

    def _run(self, closure: Closure) -> Tensor:
        for p in self.params:
            p.grad = None
        with torch.enable_grad():
            return closure()


class LoopHMC:
    """Hamiltonian TSAM with loops over tensors: a chain that goes on, kicks, exact rotations of the gaussian prior, an
    accept test on the host, and s copies of the gradient. ε = rho x / √d, density ∝ exp(−‖x‖²/2 + delta L(θ + ε)).
    """

    def __init__(
        self, params: Tensors, *, rho: float, delta: float, tilt: float, num_samples: int, angle: float = math.pi / 2
    ) -> None:
        self.params, self.delta, self.tilt, self.num_samples, self.angle = params, delta, tilt, num_samples, angle
        self.scale = rho / math.sqrt(sum(p.numel() for p in params))
        self.position = [torch.randn_like(p) for p in params]

    @torch.no_grad()
    def estimate_gradient(self, closure: Closure) -> Tensor:
        """One gradient where the chain stands, then one for each trajectory of one leapfrog step."""
        saved = [p.detach().clone() for p in self.params]
        loss, gradient = self._at(saved, self.position, closure)
        losses, gradients = [], []
        for _ in range(self.num_samples):
            momentum = [torch.randn_like(p) for p in self.params]
            before = self._energy(loss, self.position, momentum)
            position = [p.clone() for p in self.position]
            self._kick(momentum, gradient)
            for x, v in zip(position, momentum, strict=True):
                turned = x * math.cos(self.angle) + v * math.sin(self.angle)
                v.copy_(v * math.cos(self.angle) - x * math.sin(self.angle))
                x.copy_(turned)
            new_loss, new_gradient = self._at(saved, position, closure)
            self._kick(momentum, new_gradient)
            after = self._energy(new_loss, position, momentum)
            if torch.rand(()).item() < math.exp(min(0.0, before - after)):
                self.position, loss, gradient = position, new_loss, new_gradient
            losses.append(loss)
            gradients.append(gradient)
        exponents = torch.tensor([(self.tilt - self.delta) * one for one in losses], dtype=torch.float64)
        weights = torch.softmax(exponents, 0).tolist()
        for i, (p, old) in enumerate(zip(self.params, saved, strict=True)):
            p.copy_(old)
            p.grad = torch.stack([w * g[i] for w, g in zip(weights, gradients, strict=True)]).sum(0)
        return torch.tensor(losses[0])

    def _at(self, saved: Tensors, position: Tensors, closure: Closure) -> tuple[float, Tensors]:
        for p, old, x in zip(self.params, saved, position, strict=True):
            p.copy_(old + self.scale * x)
            p.grad = None
        with torch.enable_grad():
            loss = closure()
        return loss.item(), [_gradient(p).clone() for p in self.params]

    def _kick(self, momentum: Tensors, gradient: Tensors) -> None:
        for v, g in zip(momentum, gradient, strict=True):
            v.add_(g * (0.5 * self.angle * self.delta * self.scale))

    def _energy(self, loss: float, position: Tensors, momentum: Tensors) -> float:
        squares = sum(t.square().sum().item() for t in [*position, *momentum])
        return 0.5 * squares - self.delta * loss


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def move(params: Tensors, saved: Tensors, noise: Tensors, scale: float) -> None:
    """θ = θ₀ + scale z. Words: read 2, write 1."""
    for p, before, z in zip(params, saved, noise, strict=True):
        torch.add(before, z, alpha=scale, out=p)


def norm(grads: Tensors) -> Tensor:
    """‖g‖ over the list. Words: read 1."""
    total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return total


def ascend(params: Tensors, grads: Tensors, scale: Tensor) -> None:
    """θ += scale g. Words: read 2, write 1."""
    torch._foreach_addcmul_(params, grads, [scale] * len(grads))


def blend(mean: Tensors, grads: Tensors, weight: Tensor) -> None:
    """A += weight (g - A). Words: read 2, write 1."""
    torch._foreach_lerp_(mean, grads, [weight] * len(grads))


def blend_each(mean: Tensors, grads: Tensors, weight: Tensor) -> None:
    """As :func:`blend`, for torch.compile: inductor has no lowering of the foreach lerp and would copy."""
    for of_mean, gradient in zip(mean, grads, strict=True):
        of_mean.lerp_(gradient, weight)


def save(saved: Tensors, params: Tensors) -> None:
    """A copy. Words: read 1, write 1."""
    torch._foreach_copy_(saved, params)


class ForeachTSAM:
    """The same estimate in torch._foreach_*: one draw over all tensors, weights on the device, one mean.

    Words per element: s (draw 1, move 3, norm 1, ascend 3, mean 3 but for the first), save 2, restore 2.
    ``passes`` are attributes, so that a benchmark can time or compile each.
    """

    WORDS: ClassVar[dict[str, int]] = {
        "draw": 1,
        "move": 3,
        "norm": 1,
        "ascend": 3,
        "blend": 3,
        "save": 2,
        "restore": 2,
    }

    def __init__(self, params: Tensors, *, rho: float, radius: float, tilt: float, num_samples: int) -> None:
        self.params, self.rho, self.radius, self.tilt, self.num_samples = params, rho, radius, tilt, num_samples
        sizes = [p.numel() for p in params]
        self.scale = radius / math.sqrt(sum(sizes))
        self._flat = torch.empty(sum(sizes) if radius else 0, dtype=params[0].dtype, device=params[0].device)
        parts = self._flat.split(sizes) if radius else ()  # type: ignore[no-untyped-call]
        self.noise = [z.view_as(p) for z, p in zip(parts, params, strict=False)]
        self.saved = [torch.empty_like(p) for p in params]
        self.passes: dict[str, Callable[..., Any]] = {
            "draw": self._flat.normal_, "move": move, "norm": norm, "ascend": ascend,
            "blend": blend, "save": save, "restore": save,
        }  # fmt: skip

    @property
    def words(self) -> int:
        """Words per element of one estimate."""
        w, s = self.WORDS, self.num_samples
        first = w["draw"] + w["move"] if self.radius else w["restore"]
        always = s * (first + w["norm"] + w["ascend"] + w["blend"]) - w["blend"] + w["save"] + w["restore"]
        return always if self.radius else always - w["restore"]

    @torch.no_grad()
    def estimate_gradient(self, closure: Closure) -> Tensor:
        """As the module says."""
        run, params = self.passes, self.params
        run["save"](self.saved, params)
        mean: Tensors = []
        first = top = total = one = torch.ones((), dtype=torch.float64, device=params[0].device)
        for j in range(self.num_samples):
            if self.radius:
                run["draw"]()
                run["move"](params, self.saved, self.noise, self.scale)
            elif j > 0:
                run["restore"](params, self.saved)
            self._closure(closure)
            grads = [_gradient(p) for p in params]
            run["ascend"](params, grads, self.rho / (run["norm"](grads) + 1e-12))
            del grads  # its memory is the next gradient's
            loss = self._closure(closure).detach()
            grads = [_gradient(p) for p in params]
            exponent = self.tilt * loss.double()
            if j == 0:
                mean, first, top, total = grads, loss, exponent, one
            else:
                higher = torch.maximum(top, exponent)
                added = (exponent - higher).exp()
                total, top = total * (top - higher).exp() + added, higher
                run["blend"](mean, grads, (added / total).to(params[0].dtype))
            del grads
        run["restore"](params, self.saved)
        for p, of_mean in zip(params, mean, strict=True):
            p.grad = of_mean
        return first

    def _closure(self, closure: Closure) -> Tensor:
        for p in self.params:
            p.grad = None
        with torch.enable_grad():
            return closure()


def compiled(estimator: ForeachTSAM) -> ForeachTSAM:
    """The passes under torch.compile, shapes fixed; the draw stays outside, where it is faster (bench/README.md)."""
    estimator.passes["blend"] = blend_each
    for name, run in estimator.passes.items():
        if name != "draw":
            estimator.passes[name] = torch.compile(run, dynamic=False)
    return estimator


class WrapperSAM:
    """SAM as the much-copied wrapper does it: a clone, a scaled gradient and a rebinding of p.data for each tensor.

    Words per element: norm 1, clone 2, scale 2, add 3; the restore rebinds.
    """

    def __init__(self, params: Tensors, *, rho: float) -> None:
        self.params, self.rho = params, rho
        self.old: dict[Tensor, Tensor] = {}

    def estimate_gradient(self, closure: Closure) -> Tensor:
        """first_step, the second gradient, and second_step without the base optimizer's own."""
        loss = self._run(closure)
        with torch.no_grad():
            total = torch.stack([_gradient(p).norm(p=2) for p in self.params]).norm(p=2)
            scale = self.rho / (total + 1e-12)
            for p in self.params:
                self.old[p] = p.data.clone()
                p.add_(_gradient(p) * scale)
        self._run(closure)
        for p in self.params:
            p.data = self.old[p]
        return loss

    def _run(self, closure: Closure) -> Tensor:
        for p in self.params:
            p.grad = None
        return closure()


class _Still(torch.optim.SGD):
    """A base optimizer whose step does nothing: the estimate alone is compared."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


class LibrarySAM:
    """pytorch_optimizer's SAM, its foreach path, around a base optimizer that does nothing."""

    def __init__(self, params: Tensors, *, rho: float) -> None:
        import pytorch_optimizer  # of the extra "bench"; the other ways go without

        self.optimizer = pytorch_optimizer.SAM(params, _Still, rho=rho, foreach=True)

    def estimate_gradient(self, closure: Closure) -> Tensor:
        """The first gradient, then its step with the closure for the second."""
        self.optimizer.zero_grad()
        loss = closure()

        def again() -> Tensor:
            self.optimizer.zero_grad()
            return closure()

        self.optimizer.step(again)  # type: ignore[arg-type]
        return loss


def disagreement(make: Callable[[Tensors], Estimator], *, rho: float, radius: float, tilt: float, s: int) -> str:
    """What an estimator does otherwise than TSAM's definition, on a small function; empty if nothing.

    Every gradient that it asks for is looked at: the noise has the right length (8 standard errors), the ascent is
    ρ g/‖g‖, the estimate the mean of the later gradients by softmax(t L), and the parameters come back bit for bit.
    """
    generator = torch.Generator().manual_seed(5)
    shapes: Sequence[tuple[int, ...]] = ((40, 30), (30,), (7, 5, 3), (1,))
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    before = [p.detach().clone() for p in params]
    scales = [torch.randn(shape, generator=generator) for shape in shapes]
    start, d = torch.cat([p.detach().flatten() for p in params]).double(), sum(p.numel() for p in params)
    seen: list[tuple[Tensor, Tensor, float]] = []

    def closure() -> Tensor:
        loss: Tensor = sum((a * p).sin().sum() for a, p in zip(scales, params, strict=True)) * 20  # type: ignore[assignment]
        loss.backward()  # type: ignore[no-untyped-call]
        where, gradient = (torch.cat([x.detach().flatten() for x in xs]).double() for xs in (params, _grads(params)))
        seen.append((where, gradient, float(loss.detach())))
        return loss.detach()

    tensors: Tensors = list(params)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        make(tensors).estimate_gradient(closure)
    if len(seen) != 2 * s:
        return f"{len(seen)} gradients, expected {2 * s}"
    if not all(torch.equal(p, b) for p, b in zip(params, before, strict=True)):
        return "the parameters have not come back"
    for j, (first, second) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        length = float((first[0] - start).norm())
        if abs(length - radius) > 8 * radius / math.sqrt(2 * d) + 1e-5:
            return f"noise of length {length} in sample {j}, expected {radius}"
        ascent = rho * first[1] / first[1].norm()
        if float((second[0] - first[0] - ascent).norm()) > 1e-4 * rho:
            return f"the ascent of sample {j} is not rho g / |g|"
    if radius and s > 1 and torch.equal(seen[0][0], seen[2][0]):
        return "two samples have the same noise"
    weights = (tilt * torch.tensor([loss for _, _, loss in seen[1::2]], dtype=torch.float64)).softmax(0)
    want = sum(w * g for w, (_, g, _) in zip(weights, seen[1::2], strict=True))
    got = torch.cat([g.flatten() for g in _grads(params)]).double()
    return "" if float((got - want).norm()) < 1e-5 * float(want.norm()) else "the estimate is not the tilted mean"


def _grads(params: Sequence[Tensor]) -> Tensors:
    return [_gradient(p) for p in params]
