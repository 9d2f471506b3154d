# Written by hand; a test compares each signature with the docstring in _C and with the op's schema.
from torch import Tensor

__isa__: str  # instruction set of the CPU kernels: baseline, avx2 or avx512
__noises__: tuple[tuple[str, bool], ...]  # kinds of noise by number, and whether each needs the norm of a whole draw

def tilted_loss(losses: Tensor, tilt: float) -> Tensor: ...
def tilted_weights(losses: Tensor, tilt: float) -> Tensor: ...
def tilted_reduce(losses: Tensor, values: Tensor, tilt: float) -> Tensor: ...
def leapfrog(
    position: Tensor, momentum: Tensor, grad_log_density: Tensor, step_size: Tensor, inverse_mass: Tensor
) -> tuple[Tensor, Tensor]: ...
def kick(momentum: Tensor, grad_log_density: Tensor, a: Tensor) -> Tensor: ...
def leapfrog_(
    position: Tensor, momentum: Tensor, grad_log_density: Tensor, step_size: Tensor, inverse_mass: Tensor
) -> None: ...
def kick_(momentum: Tensor, grad_log_density: Tensor, a: Tensor) -> None: ...
def perturb(x: Tensor, radius: Tensor, seed: int, draw: int, base: int, kind: int) -> Tensor: ...
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
    rounding: int = -1,
    stage: int = -1,
) -> None: ...
def grad_norm_(
    grads: list[Tensor], origin: list[Tensor], state: Tensor, adaptive: list[bool], row: int, stage: int = -1
) -> None: ...
def ascend_(
    position: list[Tensor],
    saved: list[Tensor],
    grads: list[Tensor],
    state: Tensor,
    rho: list[float],
    adaptive: list[bool],
    save: bool,
    base: list[int] = [],
    seed: int = 0,
    step: int = 0,
    rounding: int = -1,
) -> None: ...
def norm_ascend_(
    position: list[Tensor],
    saved: list[Tensor],
    grads: list[Tensor],
    state: Tensor,
    rho: list[float],
    adaptive: list[bool],
    save: bool,
    row: int,
    base: list[int] = [],
    seed: int = 0,
    step: int = 0,
    rounding: int = -1,
    stage: int = -1,
) -> None: ...
def displacement_(
    position: list[Tensor],
    saved: list[Tensor],
    grads: list[Tensor],
    sums: Tensor,
    rho: list[float],
    adaptive: list[bool],
) -> None: ...
def tilt_begin_(state: Tensor, tilt: Tensor) -> None: ...
def tilt_update_(state: Tensor, loss: Tensor, log_size: float, row: int, skip_nonfinite: bool, last: bool) -> None: ...
def accumulate_(accumulator: list[Tensor], grads: list[Tensor], state: Tensor) -> None: ...
def accumulate_perturb_(
    accumulator: list[Tensor],
    grads: list[Tensor],
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
    rounding: int = -1,
    stage: int = -1,
) -> None: ...
def take_direction_(plain: list[Tensor], tilted: list[Tensor], direction: Tensor, stage: int = -1) -> None: ...
def add_direction_(grads: list[Tensor], carried: list[Tensor], direction: Tensor, stage: int = -1) -> None: ...
def restore_(position: list[Tensor], saved: list[Tensor]) -> None: ...
def hmc_place_(
    position: list[Tensor],
    saved: list[Tensor],
    x0: list[Tensor],
    x1: list[Tensor],
    x2: list[Tensor],
    chain: Tensor,
    state: Tensor,
    rho: list[float],
    adaptive: list[bool],
    base: list[int],
    seed: int,
    step: int,
    dimension: int,
    prior: int,
    draw: bool,
    rounding: int = -1,
    stage: int = -1,
) -> None: ...
def hmc_begin_(
    saved: list[Tensor],
    grads: list[Tensor],
    chain: Tensor,
    state: Tensor,
    loss: Tensor,
    tilt: Tensor,
    delta: Tensor,
    automatic: bool,
    rho: list[float],
    adaptive: list[bool],
    dimension: int,
    prior: int,
    stage: int = -1,
) -> None: ...
def hmc_leapfrog_(
    position: list[Tensor],
    saved: list[Tensor],
    momentum: list[Tensor],
    x0: list[Tensor],
    x1: list[Tensor],
    x2: list[Tensor],
    grads: list[Tensor],
    chain: Tensor,
    rho: list[float],
    adaptive: list[bool],
    base: list[int],
    seed: int,
    step: int,
    trajectory: int,
    dimension: int,
    prior: int,
    kick: float,
    drift: float,
    first: bool,
    measure: bool,
    rounding: int = -1,
    stage: int = -1,
) -> None: ...
def hmc_end_(
    saved: list[Tensor],
    momentum: list[Tensor],
    grads: list[Tensor],
    chain: Tensor,
    state: Tensor,
    loss: Tensor,
    rho: list[float],
    adaptive: list[bool],
    seed: int,
    step: int,
    trajectory: int,
    dimension: int,
    prior: int,
    kick: float,
    row: int,
    metropolis: bool,
    skip_nonfinite: bool,
    last: bool,
    stage: int = -1,
) -> None: ...
def hmc_recycle_(
    chain: Tensor,
    state: Tensor,
    loss: Tensor,
    share: float,
    row: int,
    part: int,
    metropolis: bool,
    skip_nonfinite: bool,
    last: bool,
) -> None: ...
def hmc_carry_(
    accumulator: list[Tensor],
    carried: list[Tensor],
    grads: list[Tensor],
    chain: Tensor,
    state: Tensor,
    count: bool,
) -> None: ...
def hmc_adapt_(chain: Tensor, highest: float) -> None: ...
