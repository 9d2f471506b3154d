# Written by hand; a test compares each signature with the docstring in _C and with the op's schema.
from torch import Tensor

__isa__: str  # instruction set of the CPU kernels: baseline, avx2 or avx512

def tilted_loss(losses: Tensor, tilt: float) -> Tensor: ...
def tilted_weights(losses: Tensor, tilt: float) -> Tensor: ...
def tilted_reduce(losses: Tensor, values: Tensor, tilt: float) -> Tensor: ...
def tilt_summary(state: Tensor, num_samples: int) -> Tensor: ...
def perturb_(
    position: list[Tensor],
    saved: list[Tensor],
    state: Tensor,
    radius: list[float],
    adaptive: list[bool],
    base: list[int],
    seed: int,
    step: int,
    sample: int,
    noise: int,
    dimension: int,
    negate: bool,
    save: bool,
) -> None: ...
def grad_norm_(grads: list[Tensor], origin: list[Tensor], state: Tensor, adaptive: list[bool], row: int) -> None: ...
def ascend_(
    position: list[Tensor],
    saved: list[Tensor],
    grads: list[Tensor],
    state: Tensor,
    rho: list[float],
    adaptive: list[bool],
    save: bool,
) -> None: ...
def tilt_begin_(state: Tensor, tilt: Tensor) -> None: ...
def tilt_update_(state: Tensor, loss: Tensor, log_size: float, row: int, skip_nonfinite: bool, last: bool) -> None: ...
def accumulate_(accumulator: list[Tensor], grads: list[Tensor], state: Tensor) -> None: ...
def restore_(position: list[Tensor], saved: list[Tensor]) -> None: ...
