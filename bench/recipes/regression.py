"""Regression: a net on scikit-learn's diabetes data, where a tilt makes the worse perturbations weigh more."""

import torch
from sklearn.datasets import load_diabetes
from torch.nn.functional import mse_loss

from tsam_ext import TSAM

torch.manual_seed(0)
inputs, targets = load_diabetes(return_X_y=True)
x, y = torch.tensor(inputs * 20, dtype=torch.float32), torch.tensor(targets / 80, dtype=torch.float32)
model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1), torch.nn.Flatten(0))
optimizer = TSAM(
    model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, rho=0.1, num_samples=3, radius=1.0, tilt=5.0, seed=0
)


def closure():
    loss = mse_loss(model(x), y)
    loss.backward()
    return loss


losses = []
for _ in range(40):
    losses.append(optimizer.step(closure).item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {optimizer.diagnostics.ess:.2f} of 3 samples count")
