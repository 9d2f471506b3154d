"""One gradient estimate of a step: a base class that begins, completes and aborts, and one class per way to sample.

estimate.py: the base. step.py: what it is given, and what it leaves. item.py: the item of ``samples()``. parts.py:
split batches. perturbation.py: noise, ascent, and the plain gradient. hamiltonian.py: Hamiltonian Monte Carlo.
Invariant: whatever way a step ends, everything goes back.
"""

from .estimate import Estimate
from .hamiltonian import HamiltonianEstimate
from .item import Sample
from .parts import part_of
from .perturbation import PerturbationEstimate, PlainEstimate
from .step import Report, Step

__all__ = [
    "Estimate",
    "HamiltonianEstimate",
    "PerturbationEstimate",
    "PlainEstimate",
    "Report",
    "Sample",
    "Step",
    "part_of",
]
