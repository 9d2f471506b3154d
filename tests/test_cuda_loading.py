"""Loading libtsam_cuda.so: what is said where it is missing or broken, or the driver too old; the rest goes on.

The library itself, where this build has one, loads only into a torch that is a CUDA build; no GPU is needed for that.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tsam_ext import _C, _cuda, _ops

BUILT = (Path(_C.__file__).parent / _cuda.LIBRARY).is_file()


def test_a_missing_library_has_a_cause(tmp_path: Path) -> None:
    assert "built without CUDA" in (_cuda.load(tmp_path) or "")


def test_a_broken_library_has_a_cause(tmp_path: Path) -> None:
    (tmp_path / _cuda.LIBRARY).write_text("no library")
    assert "cannot be loaded" in (_cuda.load(tmp_path) or "")


@pytest.mark.parametrize(
    ("runtime", "driver", "old"),
    [
        (13000, 0, False),
        (13000, 13000, False),
        (13010, 13000, False),
        (13000, 12080, True),
        (12080, 13000, False),
        (12080, 12040, False),
    ],
)  # fmt: skip
def test_a_driver_serves_every_runtime_of_its_major_version(runtime: int, driver: int, old: bool) -> None:
    cause = _cuda.too_old(runtime, driver)
    assert (cause is not None) is old
    if cause is not None:
        assert "13.0" in cause and "12.8" in cause


def test_the_ops_are_registered_where_torch_is_a_cuda_build() -> None:
    for name in _ops.NAMES:
        there = torch._C._dispatch_has_kernel_for_dispatch_key(f"tsam::{name}", "CUDA")
        assert there is (torch.version.cuda is not None), name
    if torch.version.cuda is not None and BUILT:
        assert _cuda.cause is None


def test_a_driver_without_large_parameters_is_too_old() -> None:
    assert "CUDA 12.4 or newer, and this machine's is for CUDA 12.2" in str(_cuda.too_old(12080, 12020))
