"""Parameters and modules whose gradients no optimizer sees, and groups that are none: refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from tsam_ext import TSAM


def parameter(**marks: Any) -> nn.Parameter:
    made = nn.Parameter(torch.ones(2))
    for name, value in marks.items():
        setattr(made, name, value)
    return made


def module(name: str, package: str) -> nn.Module:
    made: nn.Module = type(name, (nn.Module,), {"__module__": package})()
    return made


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (parameter(ds_id=3), r"params'\]\[0\]: got a parameter that DeepSpeed manages, expected one whose gradient"),
        (parameter(main_grad=torch.ones(2)), r"got a parameter that Megatron manages"),
        (parameter(_fsdp_flattened=True), r"got a parameter that FullyShardedDataParallel \(FSDP1\) manages"),
        (
            type("FlatParameter", (nn.Parameter,), {})(torch.ones(2)),
            r"got a parameter that FullyShardedDataParallel \(FSDP1\) manages",
        ),
        (
            nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2))),
            r"got a TwoTensor, which holds other tensors, expected a tensor with memory of its own, or a DTensor",
        ),
    ],
)
def test_parameters_with_hidden_gradients_or_memory_are_refused_by_name(given: nn.Parameter, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TSAM([given], lr=0.1)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (module("FullyShardedDataParallel", "torch.distributed.fsdp"), r"expected torch.distributed.fsdp.fully_shard"),
        (module("DeepSpeedEngine", "deepspeed.runtime.engine"), "expected DistributedDataParallel, or"),
        (module("DistributedDataParallel", "megatron.core.distributed"), "expected torch's DistributedDataParallel"),
    ],
)
def test_modules_that_hide_gradients_are_refused_by_name(found: nn.Module, said: str) -> None:
    inner = nn.Linear(2, 1)
    inner.add_module("wrapped", found)
    with pytest.raises(ValueError, match=rf"TSAM: model: got a .*{type(found).__name__}, {said}"):
        TSAM(inner.parameters(), lr=0.1, model=inner)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"process_group": 3}, "process_group: got 3, expected 'auto', None or a torch.distributed.ProcessGroup"),
        ({"sync": "all"}, "sync: got 'all', expected 'global' or 'local' or 'samples'"),
        ({"reduction": "late"}, "reduction: got 'late', expected 'tail' or 'manual'"),
        ({"weigh_rows": True}, r"weigh_rows: got True with sync='global' and reduction='tail', expected sync='global'"),
        (
            {"weigh_rows": True, "reduction": "manual", "batch": "split", "num_samples": 3},
            "weigh_rows: got True with batch='split', expected batch='whole'",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        TSAM([nn.Parameter(torch.ones(2))], lr=0.1, **options)
