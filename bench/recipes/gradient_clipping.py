"""Gradient clipping: the estimate first, then the clip, then the base optimizer's step."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = torch.nn.Linear(64, 10)
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=1.0, num_samples=3, radius=1.0, tilt=20.0, seed=0)


def closure():
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss


losses = []
for _ in range(20):
    optimizer.zero_grad()
    losses.append(optimizer.estimate_gradient(closure).item())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.2)
    optimizer.apply()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, last norm before the clip {norm:.3f}")
