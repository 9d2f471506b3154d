"""Parameters sharded by rows over ranks (FSDP2, DTensors): as one process on all rows, and what cannot be.

Ranks are processes under gloo (rank_pool.py).
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from rank_pool import pool
from shard_training import CASES, net, rows, sharded, train, tsam, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from bench.many_gpus import METHODS
from tsam_ext import TSAM, Noise
from tsam_ext.engine.ranks import Ranks

# Of sums in another order through reflections (the ball), or none.
TOLERANCE = {name: 1e-9 if name == "hmc ball" else 1e-12 for name in CASES}


def like_one_process(rank: int, size: int, names: list[str], reshards: bool, mesh: bool) -> list[Any]:
    names_of_dimensions = ("replicate", "shard")
    extra = {"mesh": init_device_mesh("cpu", (2, size // 2), mesh_dim_names=names_of_dimensions)} if mesh else {}
    results = []
    for name in names:
        model = sharded(size, reshard_after_forward=reshards, **extra)
        results.append(train(model, tsam(model, **CASES[name]), rank, size, steps=5, stale=True))
    return results


@pytest.mark.parametrize(
    ("size", "reshards", "mesh"), [(2, True, False), (3, False, False), (4, False, False), (4, True, True)]
)
def test_fully_sharded_training_is_one_process_on_all_rows(size: int, reshards: bool, mesh: bool) -> None:
    names = list(CASES) if size == 2 else ["ascent", "noise", "sphere", "hmc"]
    results = pool(size).run(like_one_process, size, names, reshards, mesh)
    for i, name in enumerate(names):
        model = net()
        expected, losses = train(model, tsam(model, **CASES[name]), 0, 1, steps=5, stale=True)
        for ours, seen in (result[i] for result in results):
            assert float((ours - expected).norm() / expected.norm()) < TOLERANCE[name], name
            assert torch.equal(ours, results[0][i][0])
            torch.testing.assert_close(torch.tensor(seen), torch.tensor(losses), rtol=TOLERANCE[name], atol=0.0)


def long_run(rank: int, case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    model = sharded(2)
    opt = tsam(model, num_samples=2, **case)
    parameters, _ = train(model, opt, rank, 2, steps=200)
    return parameters, opt.diagnostics.losses


@pytest.mark.parametrize("name", ["ascent", "hmc"])
def test_ranks_hold_the_same_bits_after_200_steps(name: str) -> None:
    (ours, losses), (others, their_losses) = pool(2).run(long_run, CASES[name])
    assert torch.equal(ours, others) and torch.equal(losses, their_losses) and bool(ours.isfinite().all())


def counted(rank: int, case: dict[str, Any]) -> int:
    """Small collectives of one step, the first having compared the ranks."""
    model = sharded(2)
    opt = tsam(model, **case)
    train(model, opt, rank, 2, steps=1)
    calls = []

    def noted(method: Any) -> Any:
        def call(self: Ranks, tensor: Tensor) -> Any:
            calls.append(tensor.numel())
            return method(self, tensor)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("sum_", "start_sum", "gathered", "follow_first_"):
            patch.setattr(Ranks, name, noted(getattr(Ranks, name)))
        train(model, opt, rank, 2, steps=1)
    assert max(calls) < 200  # none is of the size of the parameters
    return len(calls)


def test_small_collectives_are_one_per_loss_norm_and_decision() -> None:
    s = 3
    for case, losses, sums, modelled in (
        ({"sampler": "noise"}, s, 0, "noise tail"),
        ({}, 2 * s, s, "ascent tail"),
        ({"sampler": Noise(noise="sphere")}, s, s, None),
        # per trajectory the kick's products, the last kick's, and the decision
        ({"sampler": "hmc"}, 1 + s, 3 * s, "hmc"),
    ):
        assert pool(2).run(counted, case) == [losses + sums] * 2
        if modelled is not None:  # of python -m bench many-gpus
            counts = (METHODS[modelled].small, METHODS[modelled].sharded)
            assert sum(count(s=s, steps=1) for count in counts if count is not None) == losses + sums


def live_bytes() -> int:
    """Of all tensors that Python knows and that are not frozen, each storage once."""
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter) and found.layout is torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory(rank: int, case: dict[str, Any] | None, num_samples: int) -> int:
    """The most that is alive at the end of a pass, with TSAM or, without a case, its base alone.

    The least of three steps after a first, as buffers of torch's own collectives may live on for a while.
    """
    gc.collect()
    gc.freeze()  # what is here already is not looked at
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    for layer in (*model, model):
        fully_shard(layer)
    opt: Any = torch.optim.SGD(model.parameters(), lr=0.02)
    if case is not None:
        opt = tsam(model, torch.optim.SGD, num_samples=num_samples, **case)
    x, most = torch.randn(2, 256), 0

    def closure() -> Tensor:
        nonlocal most
        loss = model(x).square().mean()
        loss.backward()
        gc.collect()
        most = max(most, live_bytes())
        return loss

    steps = []
    for _ in range(4):
        most = 0
        opt.step(closure)
        opt.zero_grad()
        steps.append(most)
    gc.unfreeze()
    return min(steps[1:])


def test_a_step_takes_two_more_shards_whatever_the_samples() -> None:
    shard = 2 * 256 * 256 * 4 // 2
    plain = max(pool(2).run(memory, None, 1))
    for num_samples in (2, 6):
        assert 1.9 * shard < max(pool(2).run(memory, {}, num_samples)) - plain < 2.1 * shard
        assert 6.9 * shard < max(pool(2).run(memory, {"sampler": "hmc"}, num_samples)) - plain < 7.1 * shard


def mixed(rank: int, size: int) -> list[Any]:
    """bfloat16 compute, float32 reduction, and a clip of the aggregate."""
    torch.manual_seed(0)
    model = net().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mp_policy=policy)
    opt, (x, y) = tsam(model), rows(rank, size, torch.float32)
    norms = []
    for _ in range(10):

        def closure() -> Tensor:
            loss = (model(x.bfloat16()).float() - y).square().mean()
            loss.backward()
            return loss

        opt.estimate_gradient(closure)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor()))
        opt.apply()
    return [whole(model), norms]


def test_mixed_precision_and_clipping_leave_ranks_alike() -> None:
    (ours, norms), (others, their_norms) = pool(2).run(mixed, 2)
    assert torch.equal(ours, others) and norms == their_norms and bool(ours.isfinite().all())


def overflown(rank: int) -> tuple[bool, Tensor]:
    """Scaled gradients of which one shard overflows in one pass: whether all of p.grad says so, and the acceptance."""
    model, scale, passes = sharded(2), 1024.0, 0
    opt = tsam(model, torch.optim.SGD, sampler="hmc", scaler=torch.tensor(scale))
    x, y = rows(rank, 2)

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        loss = (model(x) - y).square().mean()
        (loss * scale).backward()
        if rank == 1 and passes == 2:
            model[0].weight.grad.to_local().fill_(torch.inf)  # type: ignore[union-attr, operator]
        return loss

    opt.estimate_gradient(closure)
    lost = all(bool(p.grad.to_local().isnan().all()) for p in model.parameters())  # type: ignore[union-attr]
    return lost, opt.diagnostics.acceptance_rate


def test_an_overflow_in_one_shard_is_one_for_all() -> None:
    (lost, rate), (also_lost, same_rate) = pool(2).run(overflown)
    assert lost and also_lost and float(rate) == float(same_rate) < 1.0


def after_an_exception(rank: int) -> tuple[Any, ...]:
    model = sharded(2)
    opt, clean_model = tsam(model), sharded(2)
    clean = tsam(clean_model)
    train(model, opt, rank, 2, steps=1)
    train(clean_model, clean, rank, 2, steps=1)
    before, (x, y) = whole(model), rows(rank, 2)

    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    def breaks(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if passes == 3:  # between the layers' backward passes
            output.register_hook(lambda gradient: 1 / 0)

    handle = model[1].register_forward_hook(breaks)
    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    handle.remove()
    restored = torch.equal(before, whole(model))
    opt.zero_grad()
    return restored, train(model, opt, rank, 2, steps=1)[0], train(clean_model, clean, rank, 2, steps=1)[0]


@pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="this torch's fully_shard cannot begin anew after an exception"
)
def test_after_an_exception_in_a_backward_pass_the_next_step_is_as_if_it_had_not_been() -> None:
    for restored, ours, clean in pool(2).run(after_an_exception):
        assert restored and torch.equal(ours, clean)


def refusals(rank: int) -> list[str]:
    said = []
    mesh = init_device_mesh("cpu", (2,))
    tall = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    flat = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    model = sharded(2)
    model_parameters = list(model.parameters())

    def step(opt: TSAM) -> None:
        train(model, opt, rank, 2, steps=1)

    for make in (
        lambda: TSAM([tall], lr=0.1),
        lambda: TSAM([flat, nn.Parameter(torch.ones(2))], lr=0.1),
        lambda: step(tsam(model, model=None)),
        lambda: step(tsam(model, sync="local")),
        lambda: step(tsam(model, sync="samples")),
        lambda: step(tsam(model, reduction="manual", weigh_rows=True)),
    ):
        before = whole(model)
        try:
            make()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
        else:
            said.append("nothing")
        assert torch.equal(before, whole(model))
        assert all(p is q for p, q in zip(model.parameters(), model_parameters, strict=True))
    return said


def test_what_has_no_meaning_for_shards_is_refused_by_name() -> None:
    ours, others = pool(2).run(refusals)
    assert ours == others
    for said, expected in zip(
        ours,
        (
            "params'][0]: got a DTensor with placements",
            "params'][1]: got a tensor that every rank holds, beside",
            "model: got None, expected the module",
            "sync: got 'local', expected 'global'",
            "sync: got 'samples', expected 'global'",
            "weigh_rows: got True, expected False",
        ),
        strict=True,
    ):
        assert expected in said


def tensor_parallel(rank: int, size: int) -> Tensor:
    """One layer whose rows are sharded without fully_shard, the bias too; a replicated input."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    opt, (x, y) = tsam(layer), rows(0, 1)
    if size > 1:
        x = distribute_tensor(x, mesh, [Replicate()])

    def closure() -> Tensor:
        out: Any = layer(x)
        loss = ((out.full_tensor() if size > 1 else out) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        opt.step(closure)
        opt.zero_grad()
    return whole(layer)


def test_rows_sharded_by_tensor_parallelism_likewise() -> None:
    expected = tensor_parallel(0, 1)
    for ours in pool(2).run(tensor_parallel, 2):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0.0)
