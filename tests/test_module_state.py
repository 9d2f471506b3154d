"""What forward passes leave behind besides gradients: buffers and random numbers.

The law: after a completed step it is as after one forward pass, the first; after an exception, as before the step.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_options import WAYS, tsam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from tsam_ext import TSAM

SAMPLERS = WAYS | {"split": {"batch": "split"}}


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


@pytest.mark.parametrize("which", ["spectral", "codebook and norm"])
def test_buffers_in_the_two_step_form(which: str) -> None:
    net, x, y = build(which)
    optimizer = tsam(net.parameters(), lr=0.1, model=net, **SAMPLERS["sam"])
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        after_first = values(net)
        optimizer.first_step(zero_grad=True)
        cross_entropy(net(x), y).backward()
        optimizer.second_step()
        assert alike(values(net), after_first)


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
    optimizer = TSAM(net.parameters(), lr=0.1, model=net, num_samples=3)

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

    with pytest.warns(UserWarning, match=r"moved each time; pass model="):
        optimizer.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)


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
    optimizer = TSAM(task.parameters, lr=0.1, generators=[own], num_samples=3)
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
