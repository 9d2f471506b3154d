"""What an installed tsam_ext has to do on any Python and torch: be imported, step once per sampler, give the formula.

Run by .ci/run, outside the checkout's tests, with torch alone beside it. Prints one line; an assertion fails otherwise.
"""

import math
import sys

import torch

import tsam_ext

x = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
for sampler in ("ascent", "noise", "hmc"):
    layer = torch.nn.Linear(3, 2)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = tsam_ext.TSAM(
        layer.parameters(), torch.optim.SGD, lr=0.1, rho=0.1, num_samples=3, sampler=sampler, seed=1
    )

    def closure(layer: torch.nn.Linear = layer) -> torch.Tensor:
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    for old, new in zip(before, layer.parameters(), strict=True):
        assert bool(new.isfinite().all()) and not torch.equal(old, new), sampler

value = tsam_ext.tilted_loss(torch.tensor([0.0, 1.0], dtype=torch.float64), 2.0).item()
assert abs(value - 0.5 * math.log((1 + math.exp(2.0)) / 2)) < 1e-12, value
versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, tsam_ext {tsam_ext.__version__}"
print(f"{versions}: imports and steps, {tsam_ext.__file__}")
