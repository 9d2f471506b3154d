"""The emulated CUDA ops against the CPU ops, in processes of their own: random lists, and whole training runs.

Noise and elementwise results have the same bits; what depends on a sum agrees to rounding of the storage type. Run by
``python tests/simt/run.py``, which builds the emulated package.
"""

from __future__ import annotations

import os

import pytest
import torch
from back_ends import Results, agree, results

from tsam_ext import _C
from tsam_ext.engine.state import CHAIN_SLOTS, new_state

pytestmark = pytest.mark.emulated
# Each order runs the fourth lists, of a few large and small tensors, for the comparison of orders.
JOBS = {
    "forward": ("ops:0", "ops:4", "train:noise", "train:ascent", "train:hmc"),
    "reversed": ("ops:2", "ops:4"),
    "random": ("ops:1", "ops:3", "ops:4"),
}


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Results:
    jobs = sorted({job for jobs in JOBS.values() for job in jobs})
    path, found = results(tmp_path_factory.mktemp("cpu"), jobs, PYTHONPATH=os.environ["TSAM_CPU_PYTHONPATH"])
    assert path != _C.__file__
    return found


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    found = {}
    for order, jobs in JOBS.items():
        folder = tmp_path_factory.mktemp(order)
        path, found[order] = results(folder, jobs, TSAM_SIMT_ORDER=order, TSAM_SIMT_SEED="5")
        assert path == _C.__file__
    return found


CASES = [(order, job) for order, jobs in JOBS.items() for job in jobs]


@pytest.mark.parametrize(("order", "job"), CASES)
def test_random_lists_and_training_agree(emulated: dict[str, Results], cpu: Results, order: str, job: str) -> None:
    agree(emulated[order][job], cpu[job], training=job.startswith("train"))


def test_every_order_gives_the_same_bits(emulated: dict[str, Results]) -> None:
    first, *others = (found["ops:4"] for found in emulated.values())
    for other in others:
        for name in first:
            for got, expected in zip(other[name], first[name], strict=True):
                torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0, equal_nan=True)


def test_adopting_a_second_sample_is_nan() -> None:
    """The device cannot refuse it (host_only in test_list_ops.py), and must not be silent."""
    x, state = [torch.zeros(4)], new_state(2, torch.device("cpu"))
    _C.tilt_begin_(state, torch.tensor(0.0))
    for row in range(2):
        _C.tilt_update_(state, torch.tensor(1.0), 0.0, row, False, False)
    _C.accumulate_(x, [], state)
    assert x[0].isnan().all()
    mean, carried = [torch.ones(4)], [torch.ones(4)]
    _C.hmc_carry_(mean, carried, [], torch.zeros(CHAIN_SLOTS, dtype=torch.float64), state, True)
    assert mean[0].isnan().all() and carried[0].eq(1).all()


@pytest.mark.parametrize("adopted", [True, False])
def test_accumulating_before_a_step_has_begun_is_nan(adopted: bool) -> None:
    """The CPU refuses it."""
    x = [torch.zeros(5), torch.zeros(3, dtype=torch.float64)]
    _C.accumulate_(x, [] if adopted else [torch.ones_like(p) for p in x], new_state(1, torch.device("cpu")))
    assert all(p.isnan().all() for p in x)
