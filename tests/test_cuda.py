"""On a GPU: the same bits and results as on the CPU, no sync, graphs, memory. Elsewhere: whom the kernels refuse.

The first part needs a CUDA device and says so where it is skipped; every kernel in it also runs under the host
emulation (test_emulated.py), which sees neither memory ordering nor the driver.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from back_ends import Results, agree, results
from flat_options import tsam
from torch import Tensor, nn

from tsam_ext import _C, _cuda, hmc
from tsam_ext.base import check_parameters
from tsam_ext.functional import new_state

gpu = pytest.mark.cuda
JOBS = [*(f"ops:{seed}" for seed in range(5)), "train:noise", "train:ascent", "train:hmc"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    return tuple(
        results(tmp_path_factory.mktemp(device), JOBS, TSAM_LISTS_DEVICE=device)[1] for device in ("cuda", "cpu")
    )  # type: ignore[return-value]


@gpu
@pytest.mark.parametrize("job", JOBS)
def test_a_gpu_gives_what_the_cpu_gives(both: tuple[Results, Results], job: str) -> None:
    agree(both[0][job], both[1][job], training=job.startswith("train"))


def training(sampler: str, **options: Any) -> tuple[tsam, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()
    x, y = torch.randn(64, 32, device="cuda"), torch.randint(0, 10, (64,), device="cuda")
    optimizer = tsam(net.parameters(), lr=0.1, rho=0.1, seed=1, sampler=sampler, **options)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return optimizer, closure


@gpu
@pytest.mark.parametrize("sampler", ["noise", "ascent", "hmc"])
def test_an_estimate_does_not_wait_for_the_gpu(sampler: str) -> None:
    optimizer, closure = training(sampler)
    optimizer.step(closure)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.estimate_gradient(closure)
        optimizer.apply()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Spanning(nn.Module):
    """A net with a layer on each of two devices."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 256, dtype=torch.float64).to(first)
        self.second = nn.Linear(256, 10, dtype=torch.float64).to(second)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.first.weight.device)))
        return self.second(hidden.to(self.second.weight.device))


@gpu
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
@pytest.mark.parametrize("prior", ["noise", "ascent", "hmc gaussian", "hmc ball"])
def test_a_net_on_two_devices_trains_as_on_one(prior: str, other: str) -> None:
    if other == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("not run: one GPU here")
    x, y = torch.randn(64, 32, dtype=torch.float64), torch.randint(0, 10, (64,))
    sampler, _, kind = prior.partition(" ")
    options = {"prior": kind, "num_leapfrog_steps": 2, "delta": 30.0} if kind else {"noise": "sphere"}

    def trained(first: str, second: str) -> list[Tensor]:
        net = Spanning(first, second)
        optimizer = tsam(net.parameters(), lr=0.1, rho=0.1, seed=1, sampler=sampler, **options)

        def closure() -> Tensor:
            out = net(x)
            loss = nn.functional.cross_entropy(out, y.to(out.device))
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        return [p.detach().cpu() for p in net.parameters()]

    for got, want in zip(trained("cuda:0", other), trained("cpu", "cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@gpu
def test_the_ops_can_be_captured_and_replayed() -> None:
    """Draw, norm, ascend, weigh, restore in one graph: a replay does what the calls do."""
    x = [torch.randn(n, device="cuda") for n in (5, 4096, 300_001)]
    grads, saved = [torch.randn_like(t) for t in x], [torch.empty_like(t) for t in x]
    total, state = [torch.zeros_like(t) for t in x], new_state(1, "cuda")
    loss, tilt, n, base = torch.ones((), device="cuda"), torch.ones((), device="cuda"), len(x), [0, 8, 4104]

    def calls() -> None:
        _C.tilt_begin_(state, tilt)
        _C.perturb_(x, saved, state, [0.5] * n, [False] * n, base, 3, 1, 0, 0, 304_102, False, True)
        _C.grad_norm_(grads, saved, state, [False] * n, 0)
        _C.ascend_(x, saved, grads, state, [0.1] * n, [False] * n, False)
        _C.tilt_update_(state, loss, 0.0, 0, False, True)
        _C.accumulate_(total, grads, state)

    start = [t.clone() for t in x]
    calls()
    expected = [t.clone() for t in (*x, *saved, *total, state)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    for t, s in zip(x, start, strict=True):
        t.copy_(s)
    graph.replay()
    for got, want in zip((*x, *saved, *total, state), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@gpu
@pytest.mark.parametrize("sampler", ["noise", "ascent", "hmc"])
def test_each_replay_of_a_captured_step_is_the_next_step(sampler: str) -> None:
    def run(graphed: bool) -> tuple[list[Tensor], int]:
        optimizer, closure = training(sampler, same_masks=False, capturable=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # loads kernels, makes the copies, starts the chain
            for _ in range(3):
                optimizer.step(closure)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if graphed:
            with torch.cuda.graph(graph):
                optimizer.step(closure)
        for _ in range(3):
            graph.replay() if graphed else optimizer.step(closure)
        step = optimizer.state_dict()["param_groups"][0]["tsam_step"]
        return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]], step

    (replayed, steps), (stepped, counted) = run(True), run(False)
    assert steps == counted == 6
    for got, want in zip(replayed, stepped, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@gpu
@pytest.mark.parametrize("num_samples", [2, 8])
def test_memory_does_not_grow_with_the_samples(num_samples: int) -> None:
    parameter = nn.Parameter(torch.randn(1 << 22, device="cuda"))
    optimizer = tsam([parameter], lr=0.0, num_samples=num_samples)

    def closure() -> Tensor:
        parameter.grad = torch.ones_like(parameter)
        return torch.zeros((), device="cuda")

    optimizer.estimate_gradient(closure)
    parameter.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.estimate_gradient(closure)
    extra = (torch.cuda.max_memory_allocated() - before) / (4 * parameter.numel())
    assert extra == pytest.approx(2.0, abs=0.05)  # a mean and a gradient; the copy is there already


@gpu
def test_more_than_two_to_the_31_elements() -> None:
    n = (1 << 31) + 12_345
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * n:
        pytest.skip(f"{free >> 30} GiB free, {5 * n >> 30} needed")
    x, saved = torch.zeros(n, dtype=torch.bfloat16, device="cuda"), torch.empty(n, dtype=torch.bfloat16, device="cuda")
    _C.perturb_([x], [saved], new_state(0, "cuda"), [1.0], [False], [0], 1, 0, 0, 0, 1, False, True)
    tail = torch.zeros(12_345, dtype=torch.bfloat16)
    _C.perturb_([tail], [torch.empty_like(tail)], new_state(0), [1.0], [False], [1 << 31], 1, 0, 0, 0, 1, False, True)
    assert torch.equal(x[1 << 31 :].cpu(), tail)


class Placed:
    """What check_parameters looks at of a parameter, on a device that need not be there."""

    layout, dtype, requires_grad = torch.strided, torch.float32, True

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def numel(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.empty(0), name)


def named(*devices: str) -> Any:
    return ((f"p{i}", Placed(device)) for i, device in enumerate(devices))


def test_parameters_without_kernels_are_refused_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "cause", "the driver is asleep")
    check_parameters(named("cpu", "cpu"))
    with pytest.raises(ValueError, match=r"p1: got a tensor on cuda:0, .*run on \(the driver is asleep\)"):
        check_parameters(named("cpu", "cuda:0"))
    with pytest.raises(ValueError, match=r"p0: got a tensor on xpu:0, .*for cpu and cuda tensors"):
        check_parameters(named("xpu:0"))


@pytest.mark.parametrize(("capability", "old"), [((7, 0), True), ((7, 2), True), ((7, 5), False), ((12, 0), False)])
def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, capability: Any, old: bool) -> None:
    monkeypatch.setattr(_cuda, "cause", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    if old:
        major, minor = capability
        with pytest.raises(ValueError, match=rf"p0: .*its compute capability is {major}\.{minor}, .* 7\.5 or newer"):
            check_parameters(named("cuda:1"))
    else:
        check_parameters(named("cuda:1"))
    assert set(asked) == {torch.device("cuda:1")}


def test_the_oldest_gpu_is_the_first_that_the_build_names() -> None:
    text = (Path(__file__).parents[1] / "cmake" / "cuda.cmake").read_text()
    major, minor = _cuda.OLDEST_GPU
    assert re.search(r'TSAM_CUDA_ARCHITECTURES "(\d+)', text)[1] == f"{major}{minor}"  # type: ignore[index]


def test_parameters_may_lie_on_several_devices_that_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "cause", None)
    check_parameters(named("cuda:0", "cuda:1", "cpu"))
    with pytest.raises(ValueError, match="p1: got a tensor on mps:0, expected one that kernels run on"):
        check_parameters(named("cuda:0", "mps:0"))
    monkeypatch.setattr(_cuda, "cause", "there is a cause")
    with pytest.raises(ValueError, match=r"p1: got a tensor on cuda:0, expected one .*there is a cause"):
        check_parameters(named("cpu", "cuda:0"))


def test_positions_lie_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmc, "why_not", lambda device: None)  # as if there were kernels for it
    with pytest.raises(
        ValueError, match=r"position\[1\]: got a tensor on meta, expected one on cpu, as position\[0\] is"
    ):
        hmc.sample(lambda x: x[0].sum(), [torch.zeros(2), torch.zeros(2, device="meta")])
