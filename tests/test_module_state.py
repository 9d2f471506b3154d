"""What forward passes leave behind besides gradients: buffers, random numbers, other optimizers' gradients.

The law: after a completed step it is as after one forward pass, the first; after an exception, as before the step. What
another optimizer holds gets the weighted mean of the passes' gradients, added as a backward pass would add it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from tsam_ext import TSAM

SAMPLERS: dict[str, dict[str, Any]] = {
    "ascent": {},
    "noise": {"sampler": "noise"},
    "hmc": {"sampler": "hmc", "delta": 4.0},
    "sam": {"num_samples": 1, "radius": 0.0},
    "split": {"batch": "split"},
}


class Codebook(nn.Module):
    """A running mean in place, a queue that is replaced, a counter written behind autograd's back, a late buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("queue", torch.zeros(2, 3, dtype=torch.float64))
        self.register_buffer("silent", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("late", None)
        self.register_buffer("fixed", torch.ones(1000))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        seen = x.detach().mean(0)
        if self.training:
            self.calls += 1
            self.mean.lerp_(seen, 0.1)
            self.queue = torch.cat([self.queue[1:], seen[None]])
            self.silent.data.add_(seen)  # .data has a version counter of its own
            if self.calls > 1:
                self.late = seen if self.late is None else self.late.add_(seen)
        return x + self.mean + self.queue.mean(0) + 0.1 * self.silent


def build(which: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    first = nn.Linear(5, 3)
    layers: dict[str, Callable[[], nn.Module]] = {
        "spectral": lambda: spectral_norm(first),
        "old spectral": lambda: old_spectral_norm(first),
        "codebook": lambda: nn.Sequential(first, Codebook()),
        "codebook and norm": lambda: nn.Sequential(first, Codebook(), nn.BatchNorm1d(3)),
        "observer": lambda: nn.Sequential(first, torch.ao.quantization.MovingAverageMinMaxObserver()),
    }
    net = nn.Sequential(layers[which](), nn.Tanh(), nn.Linear(3, 2)).double()
    return net, torch.randn(9, 5, dtype=torch.float64), torch.randint(0, 2, (9,))


WHICH = ("spectral", "old spectral", "codebook", "codebook and norm", "observer")


def values(net: nn.Module) -> dict[str, Tensor | None]:
    return {
        f"{name}.{key}": None if buffer is None else buffer.clone()
        for name, module in net.named_modules()
        for key, buffer in module._buffers.items()
    }


def alike(first: dict[str, Tensor | None], second: dict[str, Tensor | None]) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore:Please use:FutureWarning", "ignore:.*ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SAMPLERS)
def test_buffers_end_as_after_the_first_forward(name: str, which: str) -> None:
    net, x, y = build(which)
    optimizer = tsam(net.parameters(), lr=0.1, model=net, **SAMPLERS[name])
    after_first: list[dict[str, Tensor | None]] = []

    def closure() -> Tensor:
        rows, labels = optimizer.part(x, y)
        loss = cross_entropy(net(rows), labels)
        loss.backward()
        after_first.append(values(net))
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in range(4):
            after_first.clear()
            before = values(net)
            optimizer.step(closure)
            if step != 0 or "codebook" not in which:  # its late buffer begins in the first step's second pass
                assert alike(values(net), after_first[0])
            assert not alike(values(net), before)
    if which != "observer":  # which looks in evaluation too
        net.eval()
        before = values(net)
        optimizer.step(closure)
        assert alike(values(net), before)


@pytest.mark.filterwarnings("ignore:Please use:FutureWarning", "ignore:.*ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("which", WHICH)
def test_buffers_return_after_an_exception(which: str, steps: int, at: int) -> None:
    net, x, y = build(which)
    optimizer = tsam(net.parameters(), lr=0.1, model=net)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = cross_entropy(net(x), y)
        loss.backward()
        if calls == 6 * steps + at:
            raise KeyError
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    before = values(net)
    objects = [buffer for module in net.modules() for buffer in module._buffers.values()]
    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert alike(values(net), before)
    now = [buffer for module in net.modules() for buffer in module._buffers.values()]
    assert all(a is b for a, b in zip(now, objects, strict=True))


class Clones(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_later_steps_copy_only_what_moves() -> None:
    net, x, y = build("codebook")
    optimizer = tsam(net.parameters(), lr=0.1, model=net)

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    counts = []
    for _ in range(3):
        with Clones() as clones:
            optimizer.step(closure)
        counts.append(clones.sizes.count(1000))
    assert counts == [1, 0, 0]


def test_a_buffer_that_begins_to_move_is_noticed() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))
            self.moves = False

        def forward(self, x: Tensor) -> Tensor:
            if self.moves:
                self.count += 1
            return x

    late = Late()
    net = nn.Sequential(nn.Linear(3, 2), late)
    optimizer = TSAM(net.parameters(), lr=0.1, model=net)

    def closure() -> Tensor:
        loss = net(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    late.moves = True
    for step in range(3):
        optimizer.step(closure)
        assert float(late.count) == step + 1


@pytest.mark.parametrize("which", ["spectral", "codebook and norm"])
def test_without_the_model_buffers_move_and_one_warning_says_so(which: str) -> None:
    net, x, y = build(which)
    optimizer = tsam(net.parameters(), lr=0.1)

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"moved each time; pass model=") as caught:
        for _ in range(2):
            optimizer.step(closure)
    assert len(caught) == 1


# Other optimizers' parameters.


class Halves(nn.Module):
    """A backbone that TSAM holds, a head that another optimizer holds, an embedding with sparse gradients."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rows = nn.Embedding(7, 4, sparse=True, dtype=dtype)
        self.body = nn.Linear(4, 5, dtype=dtype)
        self.head = nn.Linear(5, 2, dtype=dtype)
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex128))
        self.index, self.y = torch.tensor([0, 2, 2, 5, 6, 1]), torch.randint(0, 2, (6,))

    def loss(self, index: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        index, y = (self.index if index is None else index), (self.y if y is None else y)
        out = self.head(torch.tanh(self.body(self.rows(index))))
        return cross_entropy((out * self.phase).abs(), y)


def dense(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient.clone()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_another_optimizer_s_parameters_get_the_weighted_mean(name: str, before: bool) -> None:
    net = Halves()
    others = [net.rows.weight, net.head.weight, net.head.bias, net.phase]
    optimizer = tsam(net.body.parameters(), lr=0.1, rho=0.5, tilt=3.0, model=net, **SAMPLERS[name])
    if before:
        net.loss().backward()
        optimizer.zero_grad()
    was = [dense(p) if before else torch.zeros_like(p) for p in others]
    objects = [p.grad for p in others]
    values, bits = [p.detach().clone() for p in others], []
    seen: list[tuple[list[Tensor], float]] = []

    def closure() -> Tensor:
        bits.append(all(map(torch.equal, others, values)))
        loss = net.loss(*optimizer.part(net.index, net.y))
        loss.backward()
        seen.append(([dense(p) for p in others], float(loss)))
        return loss

    optimizer.step(closure)
    assert all(bits), "they are not perturbed"
    diagnostics = optimizer.diagnostics
    weights, losses = diagnostics.weights.tolist(), diagnostics.losses.tolist()
    # Which pass each counted state came from: by its loss (hmc counts a state again after a rejection).
    of_state = [next(g for g, value in reversed(seen) if value == loss) for loss in losses]
    for i, parameter in enumerate(others):
        mean = sum(w * g[i] for w, g in zip(weights, of_state, strict=True))
        torch.testing.assert_close(dense(parameter), was[i] + mean, rtol=1e-12, atol=1e-14)
    assert net.rows.weight.grad is not None and net.rows.weight.grad.is_sparse
    if before:
        assert all(p.grad is o for p, o in zip(others[1:], objects[1:], strict=True))
    torch.optim.SparseAdam([net.rows.weight], lr=0.1).step()


@pytest.mark.parametrize("at", [1, 3])
def test_another_optimizer_s_gradients_return_after_an_exception(at: int) -> None:
    net = Halves()
    others = [net.rows.weight, net.head.weight, net.head.bias, net.phase]
    optimizer = tsam(net.body.parameters(), lr=0.1, model=net)
    net.loss().backward()
    optimizer.zero_grad()
    was, calls = [dense(p) for p in others], []

    def closure() -> Tensor:
        calls.append(1)
        loss = net.loss()
        loss.backward()
        if len(calls) == at:
            raise KeyError
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert all(torch.equal(dense(p), g) for p, g in zip(others, was, strict=True))


def test_two_halves_with_two_optimizers_train_as_by_hand() -> None:
    """SAM on the body and plain SGD on the head, whose gradient is the one at the perturbed body."""
    net, hand = Halves(), Halves()
    sam = tsam(net.body.parameters(), lr=0.1, rho=0.3, model=net, **SAMPLERS["sam"])
    rest = [p for p in net.parameters() if not any(p is q for q in net.body.parameters())]
    sgd = torch.optim.SGD(rest, lr=0.2)
    for _ in range(3):
        sgd.zero_grad()

        def closure() -> Tensor:
            loss = net.loss()
            loss.backward()
            return loss

        sam.step(closure)
        sgd.step()

        body = list(hand.body.parameters())
        other = [hand.rows.weight, hand.head.weight, hand.head.bias, hand.phase]
        hand.zero_grad()
        hand.loss().backward()
        ascent = [p.grad.clone() for p in body]
        norm = sum(g.square().sum() for g in ascent).sqrt()
        hand.zero_grad()
        with torch.no_grad():
            moved = [(p, p.clone(), p.add_(0.3 * g / norm)) for p, g in zip(body, ascent, strict=True)]
        hand.loss().backward()
        with torch.no_grad():
            for p, start, _ in moved:
                p.copy_(start - 0.1 * p.grad)
            for p in other:
                p -= 0.2 * dense(p)
    for ours, theirs in zip(net.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_without_the_model_the_sum_of_all_passes_is_said() -> None:
    net = Halves()
    optimizer = tsam(net.body.parameters(), lr=0.1)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = net, net.head

        def forward(self) -> Tensor:
            return self.net.loss()

    whole = Whole()

    def closure() -> Tensor:
        loss = whole()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"does not hold got a gradient in each pass.*model=") as caught:
        for _ in range(2):
            optimizer.step(closure)
    assert len(caught) == 1


# Random numbers.


def test_a_generator_that_no_pass_uses_is_left_to_other_threads(problem) -> None:
    """A data thread draws from the default generator while the passes run: its numbers do not repeat."""
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)
    drawn: list[float] = []

    def draw() -> None:
        drawn.append(float(torch.rand(())))

    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 6 != 1:  # the thread happens to sleep during the first pass
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()
        loss = task.loss()
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    assert len(drawn) == len(set(drawn)) == 50


@pytest.mark.parametrize("fails", [0, 1, 4])
def test_generators_of_the_user_s_own(problem, fails: int) -> None:
    """Masks from a private generator: the same in each pass, and the stream ends as after one forward."""
    task, own = problem(), torch.Generator().manual_seed(3)
    twin = torch.Generator().manual_seed(3)
    optimizer = TSAM(task.parameters, lr=0.1, generators=[own])
    masks: list[Tensor] = []

    def closure() -> Tensor:
        masks.append(torch.bernoulli(torch.full((12, 5), 0.5, dtype=torch.float64), generator=own))
        loss = task.loss(task.x * masks[-1])
        loss.backward()
        if len(masks) == fails:
            raise KeyError
        return loss

    start = own.get_state()
    if fails:
        with pytest.raises(KeyError):
            optimizer.step(closure)
        assert torch.equal(own.get_state(), start)
        return
    for _ in range(2):
        masks.clear()
        optimizer.step(closure)
        expected = torch.bernoulli(torch.full((12, 5), 0.5, dtype=torch.float64), generator=twin)
        assert all(torch.equal(mask, expected) for mask in masks)
        assert torch.equal(own.get_state(), twin.get_state())


def test_generators_are_checked(problem) -> None:
    with pytest.raises(TypeError, match=r"^TSAM: generators\[1\]: got 3, expected a torch\.Generator"):
        TSAM(problem().parameters, lr=0.1, generators=[torch.Generator(), 3])  # type: ignore[list-item]
