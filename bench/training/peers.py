"""Other optimizers of SAM's family: pytorch_optimizer's where it has them, else a few lines here.

A peer makes an optimizer and takes one step of it with a closure that makes the loss and its gradients. Each holds one
batch for all passes of a step, as TSAM does. ASAM (Kwon et al., ICML 2021), LookSAM (Liu et al., CVPR 2022), WSAM (Yue
et al., KDD 2023) and Friendly-SAM (Li et al., CVPR 2024) are the library's; MomentumSAM (Becker et al., 2024, arXiv
2401.12033) moves along the momentum instead of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

Closure = Callable[[], Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """How an optimizer of this kind is made, and one step of it: zero_grad, passes, update; returns the loss."""

    optimizer: Callable[[nn.Module, Options], Optimizer]
    step: Callable[[Any, Closure], Tensor]


def _two_passes(optimizer: Any, closure: Closure) -> Tensor:
    optimizer.zero_grad()
    loss = closure()
    optimizer.first_step(zero_grad=True)
    closure()
    optimizer.second_step()
    return loss.detach()


def _look(optimizer: Any, closure: Closure) -> Tensor:
    """The second pass on each k-th step alone: that is what LookSAM saves."""
    optimizer.zero_grad()
    loss = closure()
    if optimizer.get_step() % optimizer.k == 0:
        optimizer.first_step(zero_grad=True)
        closure()
    optimizer.second_step()
    return loss.detach()


def _library(name: str, **fixed: Any) -> Callable[[nn.Module, Options], Optimizer]:
    def make(model: nn.Module, options: Options) -> Optimizer:
        import pytorch_optimizer  # here, so that commands that do not train go without

        made: Optimizer = getattr(pytorch_optimizer, name)(model.parameters(), SGD, **fixed, **options)
        return made

    return make


def _wsam(model: nn.Module, options: Options) -> Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.WSAM(model, model.parameters(), SGD, **options)


class MomentumSAM(SGD):
    """SGD with momentum whose gradient is taken at θ − rho m / ‖m‖, m the momentum buffer, as its authors' code does.

    The buffer sums gradients, so the step to there is the one that SGD is about to take, at another length. In the
    first step there is none, and θ is not moved.
    """

    def __init__(self, params: Any, rho: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.rho = rho

    @torch.no_grad()
    def take(self, closure: Closure) -> Tensor:
        """One step of one gradient."""
        self.zero_grad()
        moved = [(p, self.state[p]["momentum_buffer"]) for g in self.param_groups for p in g["params"]
                 if self.state[p].get("momentum_buffer") is not None]  # fmt: skip
        before = [p.clone() for p, _ in moved]
        if moved:
            norm = torch.stack([m.norm() for _, m in moved]).norm()
            for p, m in moved:
                p.sub_(m * (self.rho / norm.clamp(min=1e-12)))
        with torch.enable_grad():
            loss = closure()
        for (p, _), old in zip(moved, before, strict=True):
            p.copy_(old)
        self.step()
        return loss.detach()


def _take(optimizer: Any, closure: Closure) -> Tensor:
    loss: Tensor = optimizer.take(closure)
    return loss


PEERS: dict[str, Peer] = {
    "sam": Peer(_library("SAM"), _two_passes),
    "asam": Peer(_library("SAM", adaptive=True), _two_passes),
    "looksam": Peer(_library("LookSAM"), _look),
    "wsam": Peer(_wsam, _two_passes),
    "friendly-sam": Peer(_library("FriendlySAM"), _two_passes),
    "momentum-sam": Peer(lambda model, options: MomentumSAM(model.parameters(), **options), _take),
}
