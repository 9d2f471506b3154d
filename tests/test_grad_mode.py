"""What runs as under ``torch.no_grad()``, at a lower price."""

from __future__ import annotations

import pytest
import torch

from tsam_ext.engine.grad_mode import without_grad


@without_grad
def mode(fails: bool = False) -> bool:
    if fails:
        raise ValueError("as asked")
    return torch.is_grad_enabled()


@pytest.mark.parametrize("outside", [True, False])
def test_gradients_are_off_inside_alone(outside: bool) -> None:
    with torch.set_grad_enabled(outside):
        assert not mode()
        assert torch.is_grad_enabled() is outside


@pytest.mark.parametrize("outside", [True, False])
def test_the_mode_is_as_before_after_an_exception(outside: bool) -> None:
    with torch.set_grad_enabled(outside):
        with pytest.raises(ValueError, match="as asked"):
            mode(fails=True)
        assert torch.is_grad_enabled() is outside
