"""bfloat16 with autocast. The context belongs inside the closure: it keeps the weights that it has converted until it
ends, so one context around the whole step would give every pass the unperturbed weights.
"""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32, device=device), torch.tensor(labels, device=device)
model = torch.nn.Linear(64, 10, device=device)
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=0.5, num_samples=3, radius=1.0, tilt=20.0, seed=0)


def closure():
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = cross_entropy(model(x), y)
    loss.backward()
    return loss


losses = []
for _ in range(20):
    optimizer.zero_grad()
    losses.append(optimizer.step(closure).item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
