"""Accelerate: microbatches collected until gradients are synchronized, then the estimate, the clip and the step.

prepare() wraps the optimizer; TSAM itself is ``optimizer.optimizer``.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32)[:1792], torch.tensor(labels)[:1792])
accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
model = torch.nn.Linear(64, 10)
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=1.0, num_samples=3, radius=1.0, tilt=20.0, seed=0)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(digits, batch_size=112))


def closure():
    total = 0.0
    for x, y in parts:
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)  # divides by gradient_accumulation_steps
        total += loss.detach() / len(parts)
    return total


losses, parts = [], []
for _ in range(6):
    for batch in loader:
        with accelerator.accumulate(model):
            parts.append(batch)
            if accelerator.sync_gradients:
                losses.append(optimizer.optimizer.estimate_gradient(closure).item())
                accelerator.clip_grad_norm_(model.parameters(), 0.2)
                optimizer.step()
                parts.clear()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
