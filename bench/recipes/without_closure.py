"""No closure: the loop body is written out, and runs once per gradient."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = torch.nn.Linear(64, 10)
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=0.5, num_samples=3, radius=1.0, tilt=20.0, seed=0)

losses = []
for _ in range(20):
    optimizer.zero_grad()
    for sample in optimizer.samples():
        with sample:
            loss = cross_entropy(model(x), y)
            loss.backward()
            sample.record(loss)
    optimizer.apply()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
