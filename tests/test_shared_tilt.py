"""The weights of samples that ranks share, and the numbers by which ranks know that they are at one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsam_ext import _ops, exchange
from tsam_ext.agreement import fingerprint
from tsam_ext.engine.ranks import Ranks
from tsam_ext.engine.state import HEADER, Slot, new_state
from tsam_ext.exchange import STRIDE, Exchange, OtherRankError
from tsam_ext.shared_tilt import join_states

TILTS = st.sampled_from([0.0, 3.0, -20.0, 300.0, math.inf, -math.inf])
LOSSES = st.lists(st.floats(-5.0, 5.0) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=9)


def streamed(tilt: float, losses: Sequence[float], counted: Sequence[int], *, skips: bool, closes: bool) -> Tensor:
    """The state after the samples ``counted`` of ``losses``."""
    state = new_state(len(losses))
    _ops.tilt_begin_(state, torch.tensor(tilt, dtype=torch.float64))
    for j in counted:
        loss = torch.tensor(losses[j], dtype=torch.float64)
        _ops.tilt_update_(state, loss, 0.0, j, skips, closes and j == counted[-1])
    return state


@given(tilt=TILTS, losses=LOSSES, ranks=st.integers(1, 4), skips=st.booleans())
@settings(deadline=None, max_examples=300)
def test_states_of_ranks_join_to_that_of_one_process(tilt: float, losses: list[float], ranks: int, skips: bool) -> None:
    serial = streamed(tilt, losses, range(len(losses)), skips=skips, closes=True)
    each = [streamed(tilt, losses, range(rank, len(losses), ranks), skips=skips, closes=False) for rank in range(ranks)]
    joined, shares = join_states(torch.stack(each), 1)
    torch.testing.assert_close(joined[HEADER:], serial[HEADER:], rtol=0.0, atol=0.0, equal_nan=True)
    assert float(joined[Slot.NONFINITE]) == float(serial[Slot.NONFINITE])
    weights = _ops.tilt_summary(joined, len(losses))
    torch.testing.assert_close(weights, _ops.tilt_summary(serial, len(losses)), rtol=1e-11, atol=1e-13, equal_nan=True)
    total, squares = serial[Slot.SUM], serial[Slot.SUM_SQUARES]
    if bool(total.isnan()):
        assert bool(joined[Slot.SUM].isnan()) and bool(shares.isnan().all())
        return
    # Each rank's share is the sum of its samples' weights; the effective sample size is the same number.
    expected = [weights[rank : len(losses) : ranks].sum() for rank in range(ranks)]
    torch.testing.assert_close(shares, torch.stack(expected), rtol=1e-11, atol=1e-13)
    ess = joined[Slot.SUM] ** 2 / joined[Slot.SUM_SQUARES]
    torch.testing.assert_close(ess, total**2 / squares, rtol=1e-11, atol=0.0)


def test_a_tilt_of_its_own_weighs_each_rank_by_its_own_losses() -> None:
    """As with HMC(delta="auto"), where t − δ differs: e_r = max_r + (t − δ)_r (first_r − first)."""
    first = streamed(2.0, [1.0, 0.0, 1.5], [0, 2], skips=False, closes=False)
    second = streamed(5.0, [0.0, 1.2, 0.0], [1], skips=False, closes=False)
    _, shares = join_states(torch.stack([first, second]), 1)
    exponents = torch.tensor([0.0, 2.0 * 0.5, 5.0 * 0.2], dtype=torch.float64)
    weights = exponents.softmax(0)
    torch.testing.assert_close(shares, torch.stack([weights[0] + weights[1], weights[2]]))


class Crowd:
    """Stands for the ranks of a group: a sum over them is what the others' vectors add."""

    def __init__(self, others: list[list[float]]) -> None:
        self.others, self.size = others, len(others) + 1

    def sum_(self, vector: Tensor) -> Tensor:
        for other in self.others:
            vector += torch.tensor(other, dtype=torch.float64)
        return vector


def met(steps: int, passes: int, others: list[tuple[int, int]], size: int | None = None) -> Any:
    """Whether a rank at (steps, passes) meets others; each of them may stand for many."""
    count = len(others) + 1 if size is None else size
    modulus = 1 << (16 if count <= 1024 else 12)
    numbers = [float((a * STRIDE + b) % modulus) for a, b in others]
    weight = (count - 1) // len(others)
    crowd = Crowd([[weight * v for v in (0.0, 1.0, 0.0, 0.0, k, k * k)] for k in numbers])
    crowd.size = count
    exchange = Exchange(cast(Ranks, crowd))
    for _ in range(steps):
        exchange.begin()
    exchange._pass = passes
    try:
        exchange.meet(torch.tensor(1.0), torch.device("cpu"))
    except OtherRankError as error:
        return str(error)
    return True


@given(st.integers(1, 70), st.integers(0, 40), st.integers(1, 70), st.integers(0, 40), st.integers(1, 5))
@settings(deadline=None)
def test_ranks_at_different_passes_never_meet(steps: int, passes: int, other: int, theirs: int, others: int) -> None:
    same = (steps, passes) == (other, theirs)
    result = met(steps, passes, [(steps, passes)] * (others - 1) + [(other, theirs)])
    assert result is True if same else "at different passes" in result


@pytest.mark.parametrize("size", [1024, 1025, 16384])
def test_the_test_is_exact_for_many_ranks(size: int) -> None:
    assert met(64, 39, [(64, 39)], size) is True
    assert "at different passes" in met(64, 39, [(64, 38)], size)


@pytest.mark.parametrize("change", [lambda x: x.flip(0), lambda x: x + 1e-3, lambda x: x[:, [1, 0, 2]], lambda x: -x])
def test_a_fingerprint_sees_other_rows_and_another_order(change: Any) -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fingerprint(rows), fingerprint(rows.clone()))
    assert not torch.equal(fingerprint(rows), fingerprint(change(rows)))


class Arrival:
    """Stands for an event of a GPU, which has come or not."""

    come = False

    def query(self) -> bool:
        return self.come


def test_on_a_gpu_numbers_are_looked_at_once_they_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals: list[Arrival] = []

    def sent(vector: Tensor) -> tuple[Arrival, Tensor]:
        arrivals.append(Arrival())
        return arrivals[-1], vector.clone()

    monkeypatch.setattr(exchange, "reading_waits", lambda home: True)
    monkeypatch.setattr(exchange, "sent", sent)
    k = float(STRIDE)
    crowd = Crowd([[0.0, 1.0, 1.0, 0.0, k, k * k]])  # the other rank has failed
    ours = Exchange(cast(Ranks, crowd))
    ours.begin()
    loss = ours.meet(torch.tensor(4.0), torch.device("cpu"))
    assert float(loss) == 2.0  # nothing was looked at, and nothing waits
    crowd.others = [[0.0, 1.0, 0.0, 0.0, k + 1, (k + 1) ** 2]]
    ours.meet(torch.tensor(4.0), torch.device("cpu"))
    arrivals[0].come = True
    with pytest.raises(OtherRankError, match="1 of 2 ranks raised"):
        ours.begin()
    ours.begin()  # what has been looked at is not looked at again
