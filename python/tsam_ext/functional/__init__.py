"""The ops as functions: checked, documented, and differentiable where that makes sense.

Differentiable, out of place: tilted_loss, tilted_weights, tilted_reduce, leapfrog, kick (first and second order), and
perturb; all in forward and reverse mode, under vmap and torch.compile(fullgraph=True). Inside a compiled function
torch.func works as far as Dynamo lets it: grad does, vmap runs one row after another, vmap of grad and forward mode are
refused.
In place, without derivatives: leapfrog_ and kick_, for samplers that own their memory.
In place over lists of tensors, without derivatives (names end in _): what TSAM is made of.
"""

from tsam_ext.engine.state import Slot, new_state

from .dynamics import kick, leapfrog, perturb
from .in_place import accumulate_, ascend_, grad_norm_, perturb_, restore_, tilt_begin_, tilt_update_
from .moves import kick_, leapfrog_
from .tilted import tilted_loss, tilted_reduce, tilted_weights

__all__ = [
    "Slot",
    "accumulate_",
    "ascend_",
    "grad_norm_",
    "kick",
    "kick_",
    "leapfrog",
    "leapfrog_",
    "new_state",
    "perturb",
    "perturb_",
    "restore_",
    "tilt_begin_",
    "tilt_update_",
    "tilted_loss",
    "tilted_reduce",
    "tilted_weights",
]
