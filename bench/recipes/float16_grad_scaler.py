"""float16 with a gradient scaler: scaled microbatches in the closure, then unscale, clip, step.

Not with sampler="hmc", whose gradients must be those of the loss. A step with an infinite gradient is skipped, and the
scale is halved.
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
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=1.0, num_samples=3, radius=1.0, tilt=20.0, seed=0)
scaler = torch.amp.GradScaler(device, init_scale=2.0**10)


def closure():
    total = 0.0
    for part_x, part_y in zip(x.split(512), y.split(512), strict=True):
        with torch.autocast(device, dtype=torch.float16):
            loss = cross_entropy(model(part_x), part_y, reduction="sum") / len(x)
        scaler.scale(loss).backward()
        total += loss.detach()
    return total  # unscaled: it weighs the samples


losses = []
for _ in range(20):
    optimizer.zero_grad()
    losses.append(optimizer.estimate_gradient(closure).item())
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.2)
    scaler.step(optimizer)  # optimizer.apply(), unless a gradient is infinite
    scaler.update()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, scale {scaler.get_scale():g}")
