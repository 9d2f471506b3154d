"""Plain SAM, which is what the defaults are: one sample and no noise. Two gradients per step."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = torch.nn.Linear(64, 10)
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=0.5, rho=0.05)


def closure():
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss


losses = []
for _ in range(20):
    optimizer.zero_grad()
    losses.append(optimizer.step(closure).item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
