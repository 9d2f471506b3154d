"""What is done with gradients that are not quite like their parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tsam_ext import TSAM, reference


def layouts(kind: str) -> nn.Parameter:
    data = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    return nn.Parameter(data if kind == "contiguous" else data.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_a_gradient_in_another_layout_is_brought_to_its_parameter_s(kind: str) -> None:
    results = []
    for turned in (False, True):
        torch.manual_seed(0)
        parameter, beside = layouts(kind), nn.Parameter(torch.randn(3, dtype=torch.float64))
        optimizer = TSAM([parameter, beside], lr=0.1, seed=1, rho=0.5, num_samples=3)

        def closure(parameter=parameter, beside=beside, turned=turned) -> Tensor:
            loss = (parameter.pow(3).sum(1).sum() + beside.pow(2).sum()).sin()
            loss.backward()
            if turned:
                gradient = torch.empty_strided(parameter.shape, (1, 4, 12, 24), dtype=torch.float64)
                parameter.grad = gradient.copy_(parameter.grad)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        results.append(parameter.detach().clone(memory_format=torch.contiguous_format))
    assert torch.equal(*results)


def test_strides_of_a_dimension_of_one_element_do_not_matter() -> None:
    """As a 1 x 1 convolution's gradient has them: the gradient is taken as it is, and adopted."""
    parameter = nn.Parameter(torch.ones(4, 3, 1, 1))
    optimizer = TSAM([parameter], lr=0.1, seed=1, rho=0.5, sampler="noise", num_samples=2)
    seen: list[int] = []

    def closure() -> Tensor:
        parameter.grad = torch.empty_strided((4, 3, 1, 1), (3, 1, 3, 3)).fill_(1.0)
        seen.append(parameter.grad.data_ptr())
        return torch.zeros(())

    optimizer.estimate_gradient(closure)
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.ones(4, 3, 1, 1))
    assert parameter.grad.data_ptr() == seen[0]


def test_the_reference_agrees_where_a_parameter_gets_no_gradient_at_first() -> None:
    """All that moves has been saved, and not all of it has a gradient; with no noise nothing is saved at first."""
    for radius in (0.0, 0.5):
        results = []
        for kind in (TSAM, reference.ReferenceTSAM):
            torch.manual_seed(0)
            parameters = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (5, 3, 4)]
            optimizer = kind(parameters, lr=0.1, seed=1, rho=0.5, radius=radius, num_samples=3)
            calls: list[int] = []

            def closure(parameters=parameters, calls=calls) -> Tensor:
                calls.append(0)
                chosen = parameters[1:] if len(calls) in (1, 4) else parameters
                loss = torch.cat(list(chosen)).sin().sum()
                loss.backward()
                return loss

            for _ in range(2):
                optimizer.step(closure)
            results.append(torch.cat([p.detach() for p in parameters]))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
