"""What is measured on a trained model: curvature, sharpness and surfaces of its loss, over all rows of a loader.

    objective = tsam_ext.metrics.Objective(model, loader, loss_fn)
    tsam_ext.metrics.hessian_eigenvalues(objective, k=5).eigenvalues

Every metric leaves parameters, buffers, p.grad and torch's random generators as they were, after an exception too.
Several ranks, each with rows of its own, measure the loss of all rows, and get the same numbers.
"""

from .objective import Objective
from .sharpness import (
    SampleMean,
    TiltedObjective,
    ascent_sharpness,
    average_sharpness,
    tilted_objective,
)
from .spectrum import Spectrum, hessian_eigenvalues, hessian_trace
from .surfaces import Surface, surface

__all__ = [
    "Objective",
    "SampleMean",
    "Spectrum",
    "Surface",
    "TiltedObjective",
    "ascent_sharpness",
    "average_sharpness",
    "hessian_eigenvalues",
    "hessian_trace",
    "surface",
    "tilted_objective",
]
