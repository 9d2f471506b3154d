"""Modules and parameters as people have them: normalisation, dropout, frozen, unused, any layout and dtype.

The law behind each: s passes leave a module as one forward would, and gradients are Σ w_j g_j whatever the tensors
look like. Tolerances in float16 and bfloat16: the parameters inside a pass are rounded to 2^-11 and 2^-8 relative.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from tsam_ext import TSAM, reference
from tsam_ext.reference import ReferenceTSAM

SAM = {"num_samples": 1, "radius": 0.0}


def convolutions(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.InstanceNorm2d(3, momentum=None, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(27, 3),
    )
    x, y = torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,))
    return net.to(dtype), x.to(dtype), y


def buffers(net: nn.Module) -> list[Tensor]:
    return [b.clone() for b in net.buffers()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{}, {"sampler": "noise"}, {"every": 2}, SAM])
def test_running_statistics_move_as_in_one_forward(options: dict[str, Any]) -> None:
    """With model=: after each step the buffers are those that the step's first pass left."""
    net, x, y = convolutions()
    optimizer = TSAM(net.parameters(), lr=0.1, model=net, **options)
    after_first: list[list[Tensor]] = []

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        after_first.append(buffers(net))
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            after_first.clear()
            before = buffers(net)
            optimizer.step(closure)
            assert same(buffers(net), after_first[0])
            assert not same(buffers(net), before)
            assert int(net[1].num_batches_tracked) == step + 1
    net.eval()
    frozen = buffers(net)
    optimizer.step(closure)
    assert same(buffers(net), frozen)


def test_statistics_are_those_of_a_plain_forward_where_nothing_moves_first() -> None:
    net, x, y = convolutions()
    twin, _, _ = convolutions()
    twin(x)
    optimizer = TSAM(net.parameters(), lr=0.1, model=net, radius=0.0)

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert same(buffers(net), buffers(twin))


def test_statistics_return_after_an_exception() -> None:
    net, x, y = convolutions()
    optimizer = TSAM(net.parameters(), lr=0.1, model=net)
    before, calls = buffers(net), []

    def closure() -> Tensor:
        calls.append(1)
        loss = cross_entropy(net(x), y)
        if len(calls) == 4:
            raise KeyError
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert same(buffers(net), before)


def test_without_the_model_statistics_move_and_one_warning_says_so() -> None:
    net, x, y = convolutions()
    optimizer = TSAM(net.parameters(), lr=0.1)

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="model=") as caught:
        optimizer.step(closure)
    assert len(caught) == 1
    assert int(net[1].num_batches_tracked) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
        quiet = TSAM(net.parameters(), lr=0.1)
        net.eval()
        quiet.step(closure)


@pytest.mark.parametrize("same_masks", [True, False])
def test_dropout_masks(problem, same_masks: bool) -> None:
    """The same in all passes of a step, new in the next step, and the stream ends as after one forward."""
    task, masks = problem(dropout=0.5), []
    optimizer = TSAM(task.parameters, lr=0.1, same_masks=same_masks)
    task.net[2].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    start = torch.random.get_rng_state()
    task.train(optimizer, 1)
    ended = torch.random.get_rng_state()
    torch.random.set_rng_state(start)
    task.loss()
    assert torch.equal(torch.random.get_rng_state(), ended) == same_masks
    torch.random.set_rng_state(ended)
    assert [torch.equal(m, masks[0]) for m in masks[1:6]] == [same_masks] * 5
    masks.clear()
    task.train(optimizer, 1)
    first = masks[0]
    masks.clear()
    task.train(optimizer, 1)
    assert not torch.equal(first, masks[0])


@pytest.mark.parametrize("sampler", ["ascent", "noise"])
def test_frozen_parameters_are_never_touched(problem, sampler: str) -> None:
    """Not moved, no gradient, not counted in d; yet their elements keep their place in the noise."""
    results = []
    for kind in (TSAM, ReferenceTSAM):
        task = problem()
        frozen = task.parameters[0].requires_grad_(False)
        bits, version, seen = frozen.clone(), frozen._version, []
        optimizer = kind(task.parameters, lr=0.1, sampler=sampler, rho=0.5, seed=2)
        task.net.register_forward_hook(
            lambda *_, frozen=frozen, bits=bits, seen=seen: seen.append(torch.equal(frozen, bits))
        )
        task.train(optimizer, 2)
        results.append(task.flat())
        if kind is TSAM:
            assert all(seen)
            assert frozen._version == version
            assert frozen.grad is None
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_unused_parameters_are_perturbed_and_keep_no_gradient(problem) -> None:
    task, inside = problem(), []
    unused = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
    bits = unused.detach().clone()
    params = [task.parameters[0], unused, *task.parameters[1:]]
    optimizer = TSAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, seed=2)

    def closure() -> Tensor:
        inside.append(unused.detach().clone())
        loss = task.loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(not torch.equal(value, bits) for value in inside)
    assert all(torch.equal(a, b) for a, b in zip(inside[::2], inside[1::2], strict=True))
    assert torch.equal(unused, bits)
    assert unused.grad is None
    assert unused not in optimizer.state


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("used_in", [{0}, {1}, {2}, {0, 2}, {1, 2}])
def test_a_gradient_missing_in_some_passes_counts_as_zero(problem, used_in, buffer: bool) -> None:
    task, seen = problem(), []
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    options = {"sampler": "noise", "radius": 0.5, "tilt": 4.0, "seed": 2}
    optimizer = TSAM([*task.parameters, extra], lr=0.1, **options)
    if buffer:
        extra.grad = torch.full_like(extra, 7.0)
        kept = extra.grad

    def closure() -> Tensor:
        logits = task.net(task.x)
        if len(seen) in used_in:
            logits = logits + extra.sin()
        loss = cross_entropy(logits, task.y)
        loss.backward()
        zero = torch.zeros_like(extra)
        seen.append((loss.detach(), zero if extra.grad is None else extra.grad.clone()))
        return loss

    optimizer.estimate_gradient(closure)
    losses, gradients = (torch.stack(column) for column in zip(*seen, strict=True))
    expected = reference.tilted_reduce(losses, gradients, 4.0)
    torch.testing.assert_close(extra.grad, expected, rtol=1e-12, atol=1e-15)
    assert not buffer or extra.grad is kept


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("sampler", ["ascent", "noise"])
def test_channels_last_parameters(sampler: str, adaptive: bool) -> None:
    """Noise follows storage; a gradient in another layout than its parameter's is brought to it."""
    results = []
    for kind, turned in ((TSAM, False), (TSAM, True), (ReferenceTSAM, False)):
        net, x, y = convolutions()
        net = net[:4].append(nn.Flatten()).append(net[6]).to(memory_format=torch.channels_last)
        strides = [p.stride() for p in net.parameters()]
        options = {"sampler": sampler, "adaptive": adaptive, "rho": 0.5, "seed": 3}
        extra = {"model": net} if kind is TSAM else {}
        optimizer = kind(net.parameters(), lr=0.1, momentum=0.9, **options, **extra)
        net[1].eval()

        def closure(net=net, x=x, y=y, turned=turned) -> Tensor:
            loss = cross_entropy(net(x), y)
            loss.backward()
            if turned:
                for p in net.parameters():
                    p.grad = p.grad.contiguous().clone(memory_format=torch.contiguous_format)
            return loss

        for _ in range(2):
            optimizer.step(closure)
        assert [p.stride() for p in net.parameters()] == strides
        assert net[0].weight.stride() != net[0].weight.contiguous().stride()
        results.append([p.detach() for p in net.parameters()])
    assert same(results[0], results[1])
    for ours, theirs in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
@pytest.mark.parametrize("sampler", ["ascent", "noise"])
def test_low_precision_parameters(problem, dtype, tolerance: float, sampler: str) -> None:
    """As the oracle, to a few roundings of the parameters; restored to their bits; gradients of their dtype."""
    gradients = []
    for kind in (TSAM, ReferenceTSAM):
        task = problem(dtype=dtype)
        copies = task.copies()
        optimizer = kind(task.parameters, lr=0.1, sampler=sampler, rho=0.5, tilt=2.0, seed=3)
        for _ in range(2):  # the second time into buffers that exist
            optimizer.estimate_gradient(task.closure(optimizer))
            assert task.holds(copies)
        assert all(p.grad.dtype == dtype for p in task.parameters)
        gradients.append(task.gradient().float())
        optimizer.base_optimizer.step()
        assert all(p.dtype == dtype for p in task.parameters)
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance * scale)


def test_the_mean_of_low_precision_gradients_is_kept_wide(problem) -> None:
    """64 gradients of 1 and one of 1/64 each time: a bfloat16 running mean would stand still."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    options = {"rho": 0.0, "sampler": "noise", "tilt": 0.0, "num_samples": 128}
    optimizer = TSAM([weight], lr=0.1, **options)
    values = iter([1.0] * 64 + [1.0 + 2**-7] * 64)

    def closure() -> Tensor:
        loss = (weight * next(values)).sum()
        loss.backward()
        return loss

    optimizer.estimate_gradient(closure)
    mean = torch.tensor([1.0 + 2**-8]).bfloat16()
    assert abs(float(weight.grad) - float(mean)) <= 2**-7
    values = iter([256.0] + [1.0] * 127)
    optimizer.estimate_gradient(closure)
    assert float(weight.grad) == pytest.approx((256 + 127) / 128, rel=2**-8)


def test_odd_shapes_and_mixed_dtypes() -> None:
    """0-dim, empty and single elements; float32, float64 and bfloat16 in one optimizer, as the oracle."""
    results = []
    for kind in (TSAM, ReferenceTSAM):
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.tensor(0.5, dtype=torch.float64)),
            nn.Parameter(torch.empty(0, 3)),
            nn.Parameter(torch.randn(1)),
            nn.Parameter(torch.randn(3, 1, 2).transpose(0, 2)),
            nn.Parameter(torch.randn(65, dtype=torch.bfloat16)),
            nn.Parameter(torch.randn(1030)),
        ]
        optimizer = kind(params, lr=0.01, rho=0.5, tilt=1.0, seed=3)

        def closure(params=params) -> Tensor:
            loss = sum(p.double().sin().square().mean() for p in params if p.numel())
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure)) for _ in range(3)]
        results.append((losses, [p.detach().double() for p in params]))
    # Bounded by the bfloat16 parameter, whose step may round the other way: 2^-8 of a value below 4.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 if ours.numel() == 65 else 1e-4)


def test_adaptive_leaves_zeros_alone(problem) -> None:
    task, inside = problem(), []
    with torch.no_grad():
        task.parameters[0][:, 2] = 0.0
    optimizer = TSAM(task.parameters, lr=0.1, adaptive=True, rho=2.0)

    def closure() -> Tensor:
        inside.append(task.parameters[0].detach().clone())
        return task.closure(optimizer)()

    optimizer.estimate_gradient(closure)
    for value in inside:
        assert not value[:, 2].any()
        assert (value[:, 3] != task.parameters[0][:, 3]).all()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradient_tensors_are_filled_not_replaced(problem, set_to_none: bool) -> None:
    ours, theirs = problem(), problem()
    optimizer, twin = (TSAM(t.parameters, lr=0.1, momentum=0.9, seed=2) for t in (ours, theirs))
    ours.train(optimizer, 1)
    theirs.train(twin, 1)
    held = [(p.grad, p.grad.data_ptr()) for p in ours.parameters]
    for _ in range(2):
        if set_to_none:
            twin.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=False)
        ours.train(optimizer, 1)
        theirs.train(twin, 1)
        for p, (grad, pointer) in zip(ours.parameters, held, strict=True):
            assert p.grad is grad
            assert grad.data_ptr() == pointer
        assert ours.holds(theirs.copies())


class NoSync(TorchDispatchMode):
    """Fails on what would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name, name
        assert "is_nonzero" not in name, name
        assert "aten::equal" not in name, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"sampler": "noise", "every": 2}, {"batch": "split"}, SAM])
@pytest.mark.parametrize("tilt", [2.0, float("inf")])
def test_a_step_reads_nothing_from_the_device(problem, options, tilt: float) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, momentum=0.9, tilt=tilt, **options)

    def closure() -> Tensor:
        x, y = optimizer.part(task.x, task.y)
        loss = task.loss(x, y)
        loss.backward()
        return loss

    with NoSync():
        for _ in range(2):
            optimizer.step(closure)
        seen = optimizer.diagnostics
        assert seen.losses.dtype == seen.weights.dtype == seen.tilted_loss.dtype == torch.float64


def test_a_tilt_that_does_nothing_is_said_once(problem) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, tilt=1e-9)
    task.train(optimizer, 2)
    with pytest.warns(UserWarning, match="tilt"):
        assert float(optimizer.diagnostics.ess) == pytest.approx(3.0)
    quiet = TSAM(task.parameters, lr=0.1)  # the default tilt is nobody's choice
    task.train(quiet, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(optimizer.diagnostics.ess) > 2.9
        assert float(quiet.diagnostics.ess) > 1.0


def test_a_step_under_no_grad_runs_the_closure_with_grad(problem) -> None:
    ours, theirs = problem(), problem()
    optimizer, twin = (TSAM(t.parameters, lr=0.1, seed=2) for t in (ours, theirs))
    with torch.no_grad():
        losses = ours.train(optimizer, 2)
    assert losses == theirs.train(twin, 2)
    assert ours.holds(theirs.copies())
