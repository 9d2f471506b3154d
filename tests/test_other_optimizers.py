"""Parameters of the model that another optimizer holds: halves of a net, sparse embeddings, complex ones.

The law: they get the weighted mean of the passes' gradients, added to p.grad as a backward pass would add it; after an
exception p.grad is what it was; they are not perturbed.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from flat_options import WAYS, tsam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SAMPLERS = WAYS | {"split": {"batch": "split"}}


class Halves(nn.Module):
    """A backbone that TSAM holds, a head that another optimizer holds, an embedding with sparse gradients."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rows = nn.Embedding(7, 4, sparse=True, dtype=dtype)
        self.body = nn.Linear(4, 5, dtype=dtype)
        self.head = nn.Linear(5, 2, dtype=dtype)
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex128))
        self.index, self.y = torch.tensor([0, 2, 2, 5, 6, 1]), torch.randint(0, 2, (6,))

    def loss(self, index: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        index, y = (self.index if index is None else index), (self.y if y is None else y)
        out = self.head(torch.tanh(self.body(self.rows(index))))
        return cross_entropy((out * self.phase).abs(), y)


def dense(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient.clone()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_another_optimizer_s_parameters_get_the_weighted_mean(name: str, before: bool) -> None:
    net = Halves()
    others = [net.rows.weight, net.head.weight, net.head.bias, net.phase]
    optimizer = tsam(net.body.parameters(), lr=0.1, rho=0.5, tilt=3.0, model=net, **SAMPLERS[name])
    if before:
        net.loss().backward()
        optimizer.zero_grad()
    was = [dense(p) if before else torch.zeros_like(p) for p in others]
    objects = [p.grad for p in others]
    values, bits = [p.detach().clone() for p in others], []
    seen: list[tuple[list[Tensor], float]] = []

    def closure() -> Tensor:
        bits.append(all(map(torch.equal, others, values)))
        loss = net.loss(*optimizer.part(net.index, net.y))
        loss.backward()
        seen.append(([dense(p) for p in others], float(loss)))
        return loss

    optimizer.step(closure)
    assert all(bits), "they are not perturbed"
    diagnostics = optimizer.diagnostics
    weights, losses = diagnostics.weights.tolist(), diagnostics.losses.tolist()
    # Which pass each counted state came from: by its loss (hmc counts a state again after a rejection).
    of_state = [next(g for g, value in reversed(seen) if value == loss) for loss in losses]
    for i, parameter in enumerate(others):
        mean = sum(w * g[i] for w, g in zip(weights, of_state, strict=True))
        torch.testing.assert_close(dense(parameter), was[i] + mean, rtol=1e-12, atol=1e-14)
    assert net.rows.weight.grad is not None and net.rows.weight.grad.is_sparse
    if before:
        assert all(p.grad is o for p, o in zip(others[1:], objects[1:], strict=True))
    torch.optim.SparseAdam([net.rows.weight], lr=0.1).step()


@pytest.mark.parametrize("at", [1, 3])
def test_another_optimizer_s_gradients_return_after_an_exception(at: int) -> None:
    net = Halves()
    others = [net.rows.weight, net.head.weight, net.head.bias, net.phase]
    optimizer = tsam(net.body.parameters(), lr=0.1, model=net)
    net.loss().backward()
    optimizer.zero_grad()
    was, calls = [dense(p) for p in others], []

    def closure() -> Tensor:
        calls.append(1)
        loss = net.loss()
        loss.backward()
        if len(calls) == at:
            raise KeyError
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert all(torch.equal(dense(p), g) for p, g in zip(others, was, strict=True))


def test_two_halves_with_two_optimizers_train_as_by_hand() -> None:
    """SAM on the body and plain SGD on the head, whose gradient is the one at the perturbed body."""
    net, hand = Halves(), Halves()
    sam = tsam(net.body.parameters(), lr=0.1, rho=0.3, model=net, **SAMPLERS["sam"])
    rest = [p for p in net.parameters() if not any(p is q for q in net.body.parameters())]
    sgd = torch.optim.SGD(rest, lr=0.2)
    for _ in range(3):
        sgd.zero_grad()

        def closure() -> Tensor:
            loss = net.loss()
            loss.backward()
            return loss

        sam.step(closure)
        sgd.step()

        body = list(hand.body.parameters())
        other = [hand.rows.weight, hand.head.weight, hand.head.bias, hand.phase]
        hand.zero_grad()
        hand.loss().backward()
        ascent = [p.grad.clone() for p in body]
        norm = sum(g.square().sum() for g in ascent).sqrt()
        hand.zero_grad()
        with torch.no_grad():
            moved = [(p, p.clone(), p.add_(0.3 * g / norm)) for p, g in zip(body, ascent, strict=True)]
        hand.loss().backward()
        with torch.no_grad():
            for p, start, _ in moved:
                p.copy_(start - 0.1 * p.grad)
            for p in other:
                p -= 0.2 * dense(p)
    for ours, theirs in zip(net.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_the_two_step_form_says_that_others_get_two_gradients() -> None:
    net = Halves()
    optimizer = tsam(net.body.parameters(), lr=0.1, model=net, **SAMPLERS["sam"])
    net.loss().backward()
    with pytest.warns(UserWarning, match="the second pass adds to it"):
        optimizer.first_step(zero_grad=True)
    net.loss().backward()
    optimizer.second_step()


def test_without_the_model_the_sum_of_all_passes_is_said() -> None:
    net = Halves()
    optimizer = tsam(net.body.parameters(), lr=0.1)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = net, net.head

        def forward(self) -> Tensor:
            return self.net.loss()

    whole = Whole()

    def closure() -> Tensor:
        loss = whole()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"does not hold got a gradient in each pass.*model="):
        optimizer.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
