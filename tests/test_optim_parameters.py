"""Parameters as people have them: frozen, unused, used now and then, of any layout, size and dtype.

The law behind each: p.grad = Σ w_j g_j whatever the tensors look like, and every parameter keeps its bits, its
memory and its gradient tensor. In float16 and bfloat16 a pass rounds its parameters to 2^-11 and 2^-8 relative.
"""

from __future__ import annotations

import pytest
import torch
from flat_options import tsam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM, reference
from tsam_ext.reference import ReferenceTSAM


@pytest.mark.parametrize("sampler", ["ascent", "noise"])
def test_frozen_parameters_are_never_touched(problem, sampler: str) -> None:
    """Not moved, no gradient, not counted in d; their elements keep their place. Then unfrozen."""
    results = []
    for kind in (tsam, ReferenceTSAM):
        task = problem()
        frozen = task.parameters[0].requires_grad_(False)
        bits, version, seen = frozen.clone(), frozen._version, []
        optimizer = kind(task.parameters, lr=0.1, sampler=sampler, rho=0.5, seed=2, num_samples=3)
        task.net.register_forward_hook(
            lambda *_, frozen=frozen, bits=bits, seen=seen: seen.append(torch.equal(frozen, bits))
        )
        task.train(optimizer, 2)
        if kind is TSAM:
            assert all(seen)
            assert frozen._version == version
            assert frozen.grad is None
        frozen.requires_grad_(True)
        task.train(optimizer, 2)
        assert not torch.equal(frozen, bits)
        results.append(task.flat())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_unused_parameters_are_perturbed_and_keep_no_gradient(problem) -> None:
    task, inside = problem(), []
    unused = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
    bits = unused.detach().clone()
    params = [task.parameters[0], unused, *task.parameters[1:]]
    optimizer = tsam(params, torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, seed=2)

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
    optimizer = tsam([*task.parameters, extra], lr=0.1, **options)
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


def test_a_gradient_that_comes_late_finds_its_own_mean() -> None:
    """All of one shape, so that no check sees them swapped: slopes 1, 2 and 3, the first from the second sample on."""
    params = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    optimizer = tsam(params, lr=0.0, sampler="noise", tilt=0.0, num_samples=4, seed=0)
    for sample in optimizer.samples():
        with sample:
            used = [(k + 1.0) * p.sum() for k, p in enumerate(params) if k > 0 or sample.index > 0]
            loss = torch.stack(used).sum()
            loss.backward()
            sample.record(torch.zeros(()))
    for slope, p in zip((0.75, 2.0, 3.0), params, strict=True):
        torch.testing.assert_close(p.grad, torch.full((4,), slope), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("radius", [0.0, 0.5])
@pytest.mark.parametrize("used_in", [{0}, {1}, {2}, {5}, {0, 3}, {2, 3}, {1, 2, 4}, set()])
def test_an_ascent_with_gradients_missing_is_the_oracle_s(problem, used_in, radius: float) -> None:
    """Also where a parameter first moves in a later sample than the others."""
    results = []
    for kind in (tsam, ReferenceTSAM):
        task, calls = problem(), []
        extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
        params = [extra, *task.parameters]
        optimizer = kind(params, lr=0.1, rho=0.5, radius=radius, tilt=4.0, seed=2, num_samples=3)

        def closure(task=task, calls=calls, extra=extra) -> Tensor:
            logits = task.net(task.x)
            if len(calls) in used_in:
                logits = logits + extra.sin()
            calls.append(1)
            loss = cross_entropy(logits, task.y)
            loss.backward()
            return loss

        optimizer.estimate_gradient(closure)
        assert extra.tolist() == [1.0] * 3
        assert (extra.grad is None) == (not used_in & {1, 3, 5})
        zero = torch.zeros_like(extra)
        results.append([zero if extra.grad is None else extra.grad, task.gradient(), task.flat()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("sampler", ["ascent", "noise"])
def test_channels_last_parameters(sampler: str, adaptive: bool) -> None:
    """Noise follows storage; a gradient in another layout than its parameter's is brought to it."""
    results = []
    for kind, turned in ((tsam, False), (tsam, True), (ReferenceTSAM, False)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(27, 3))
        net = net.double().to(memory_format=torch.channels_last)
        x, y = torch.randn(8, 2, 6, 6).double(), torch.randint(0, 3, (8,))
        strides = [p.stride() for p in net.parameters()]
        options = {"sampler": sampler, "adaptive": adaptive, "rho": 0.5, "seed": 3, "num_samples": 3}
        optimizer = kind(net.parameters(), lr=0.1, momentum=0.9, **options)

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
    for ours, turned, theirs in zip(*results, strict=True):
        assert torch.equal(ours, turned)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
@pytest.mark.parametrize("sampler", ["ascent", "noise"])
def test_low_precision_parameters(problem, dtype, tolerance: float, sampler: str) -> None:
    """As the oracle, to a few roundings of the parameters; restored to their bits; gradients of their dtype."""
    gradients = []
    for kind in (tsam, ReferenceTSAM):
        task = problem(dtype=dtype)
        copies = task.copies()
        optimizer = kind(task.parameters, lr=0.1, sampler=sampler, rho=0.5, tilt=2.0, seed=3, num_samples=3)
        for _ in range(2):  # the second time into buffers that exist
            optimizer.estimate_gradient(task.closure(optimizer))
            assert task.holds(copies)
        assert all(p.grad.dtype == dtype for p in task.parameters)
        gradients.append(task.gradient().float())
        optimizer.base_optimizer.step()
        assert all(p.dtype == dtype for p in task.parameters)
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance * scale)


def test_the_mean_of_low_precision_gradients_is_kept_wide() -> None:
    """What each gradient adds is below half a unit of bfloat16 in the mean: it must not get lost."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    options = {"rho": 0.0, "sampler": "noise", "tilt": 0.0, "num_samples": 128}
    optimizer = tsam([weight], lr=0.1, **options)
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
    for kind in (tsam, ReferenceTSAM):
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.tensor(0.5, dtype=torch.float64)),
            nn.Parameter(torch.empty(0, 3)),
            nn.Parameter(torch.randn(1)),
            nn.Parameter(torch.randn(3, 1, 2).transpose(0, 2)),
            nn.Parameter(torch.randn(65, dtype=torch.bfloat16)),
            nn.Parameter(torch.randn(1030)),
        ]
        optimizer = kind(params, lr=0.01, rho=0.5, tilt=1.0, seed=3, num_samples=3)

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
    optimizer = tsam(task.parameters, lr=0.1, adaptive=True, rho=2.0)

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
    optimizer, twin = (tsam(t.parameters, lr=0.1, momentum=0.9, seed=2) for t in (ours, theirs))
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


@pytest.mark.parametrize("bucket", ["one per parameter", "one for all"])
@pytest.mark.parametrize("sampler", ["ascent", "noise"])
def test_gradient_tensors_that_the_closure_uses_again(problem, sampler: str, bucket: str) -> None:
    """As a reducer does: each pass leaves its gradients in views of the same buckets."""
    estimates = []
    for reuse in (False, True):
        task = problem()
        sizes = [p.numel() for p in task.parameters]
        chunks = list(torch.zeros(sum(sizes), dtype=torch.float64).split(sizes))
        if bucket == "one per parameter":
            chunks = [chunk.clone() for chunk in chunks]
        owned = [chunk.view_as(p) for chunk, p in zip(chunks, task.parameters, strict=True)]
        optimizer = tsam(task.parameters, lr=0.1, sampler=sampler, rho=0.5, tilt=3.0, seed=2)

        def closure(task=task, owned=owned, reuse=reuse) -> Tensor:
            loss = task.loss()
            gradients = torch.autograd.grad(loss, task.parameters)
            for p, g, memory in zip(task.parameters, gradients, owned, strict=True):
                p.grad = memory.copy_(g) if reuse else g.clone()
            return loss

        optimizer.estimate_gradient(closure)
        estimates.append(task.gradient())
    assert torch.equal(*estimates)


def test_a_closure_that_writes_into_the_buffer_that_was_there(problem) -> None:
    """The buffer that p.grad was before the step is also where each pass leaves its gradient."""
    estimates = []
    for reuse in (False, True):
        task = problem()
        held = [torch.zeros_like(p, requires_grad=False) for p in task.parameters]
        for p, buffer in zip(task.parameters, held, strict=True):
            p.grad = buffer if reuse else None
        optimizer = tsam(task.parameters, lr=0.1, rho=0.5, tilt=3.0, seed=2)

        def closure(task=task, held=held, reuse=reuse) -> Tensor:
            loss = task.loss()
            gradients = torch.autograd.grad(loss, task.parameters)
            for p, g, buffer in zip(task.parameters, gradients, held, strict=True):
                p.grad = buffer.copy_(g) if reuse else g
            return loss

        optimizer.estimate_gradient(closure)
        estimates.append(task.gradient())
        assert not reuse or all(p.grad is b for p, b in zip(task.parameters, held, strict=True))
    assert torch.equal(*estimates)


def test_parameters_that_change_dtype_between_steps(problem) -> None:
    """net.double() replaces the data behind each parameter; what was kept for the old ones is not used."""
    ours, theirs = problem(dtype=torch.float32), problem(dtype=torch.float32)
    optimizer = tsam(ours.parameters, lr=0.1, rho=0.5, seed=2)
    oracle = ReferenceTSAM(theirs.parameters, lr=0.1, rho=0.5, seed=2, num_samples=3)
    for dtype in (torch.float32, torch.float64, torch.float32):
        for task in (ours, theirs):
            task.net.to(dtype)
            task.x = task.x.to(dtype)
        ours.train(optimizer, 2)
        theirs.train(oracle, 2)
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-5, atol=1e-5)
    assert ours.flat().dtype == torch.float32
