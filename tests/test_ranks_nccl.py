"""Several GPUs under NCCL: as on the CPU, one process per GPU, and nothing in a step waits for a device.

The code is that of gloo, with tensors on GPUs (test_ranks_ddp.py, test_ranks_shards.py). Needs two GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rank_pool import Pool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tsam_ext import TSAM

pytestmark = pytest.mark.cuda
SIZE = 2


@pytest.fixture(scope="module")
def gpus() -> Iterator[Pool]:
    if torch.cuda.device_count() < SIZE:
        pytest.skip(f"not run: {torch.cuda.device_count()} CUDA devices here, {SIZE} are needed")
    made = Pool(SIZE, backend="nccl")
    yield made
    made.close()


def train(rank: int, size: int, device: str, wrapper: str, options: dict[str, Any], steps: int) -> Tensor:
    """The parameters after the steps; the last two run while a wait for the device is an error."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double().to(device)
    x, y = torch.randn(8, 16).double(), torch.randn(8, 4).double()
    if size > 1 and wrapper == "ddp":
        model = DistributedDataParallel(model, device_ids=[rank])
    elif size > 1:
        for layer in (model[0], model[2], model):
            fully_shard(layer)
    if options.get("sync") != "samples":
        x, y = x[rank * 8 // size :][: 8 // size], y[rank * 8 // size :][: 8 // size]
    x, y = x.to(device), y.to(device)
    told: dict[str, Any] = {"num_samples": 3, "rho": 0.1, "tilt": 20.0, "seed": 3, "model": model, **options}
    opt = TSAM(model.parameters(), torch.optim.SGD, lr=0.05, **told)

    def closure() -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for step in range(steps):
        if device != "cpu" and step == steps - 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        opt.step(closure)
        opt.zero_grad()
    if device != "cpu":
        torch.cuda.set_sync_debug_mode("default")
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1).cpu() for p in whole])


def on_gpu(rank: int, wrapper: str, options: dict[str, Any]) -> Tensor:
    return train(rank, SIZE, f"cuda:{rank}", wrapper, options, 5)


@pytest.mark.parametrize(
    ("wrapper", "options"),
    [
        ("ddp", {}),
        ("ddp", {"sampler": "noise", "reduction": "manual"}),
        ("ddp", {"sampler": "hmc"}),
        ("ddp", {"sync": "samples"}),
        ("fsdp2", {}),
        ("fsdp2", {"sampler": "hmc"}),
    ],
)
def test_gpus_train_as_one_process(gpus: Pool, wrapper: str, options: dict[str, Any]) -> None:
    plain = {key: value for key, value in options.items() if key in ("sampler", "num_samples")}
    expected = train(0, 1, "cpu", wrapper, plain, 5)
    ours, others = gpus.run(on_gpu, wrapper, options)
    assert torch.equal(ours, others)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
