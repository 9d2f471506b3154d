"""Lightning, automatic: bfloat16, microbatches, and a clip of the aggregate.

Lightning hands its closure to step(). So the last microbatch's training_step runs once per gradient, and each time runs
the earlier microbatches first. Trainer(gradient_clip_val=...) would clip each pass; here the base optimizer clips what
it steps with.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tsam_ext import TSAM

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.parts, self.losses = torch.nn.Linear(64, 10), [], []

    def on_train_batch_start(self, batch, index):
        self.parts.append(batch)

    def training_step(self, batch, index):
        if len(self.parts) < self.trainer.accumulate_grad_batches:
            return None  # nothing is run at the unperturbed weights
        total = 0.0
        for x, y in self.parts[:-1]:
            loss = cross_entropy(self.net(x), y)
            (loss / len(self.parts)).backward()
            total += loss.detach()
        x, y = self.parts[-1]
        return cross_entropy(self.net(x), y) + total  # Lightning divides by their number, and goes backward

    def on_train_batch_end(self, outputs, batch, index):
        if len(self.parts) == self.trainer.accumulate_grad_batches:
            self.losses.append(outputs["loss"].item())
            self.parts.clear()

    def configure_optimizers(self):
        optimizer = TSAM(self.parameters(), torch.optim.SGD, lr=1.0, num_samples=3, radius=1.0, tilt=20.0, seed=0)
        optimizer.base_optimizer.register_step_pre_hook(self.clip)
        return optimizer

    def clip(self, *_):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.2)


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32)[:1792], torch.tensor(labels)[:1792])
    model = Digits()
    trainer = lightning.Trainer(
        accelerator="cpu", precision="bf16-mixed", accumulate_grad_batches=4, max_epochs=6, **QUIET
    )
    trainer.fit(model, DataLoader(digits, batch_size=112))
    losses = model.losses
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {trainer.global_step} steps")
