"""Lightning, manual: bfloat16, microbatches collected for one step(closure), and a clip of the aggregate.

The step goes through Lightning's optimizer, which counts it; so the clip hangs on the base optimizer.
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
        self.automatic_optimization = False
        self.net, self.parts, self.losses = torch.nn.Linear(64, 10), [], []

    def training_step(self, batch, index):
        self.parts.append(batch)
        if len(self.parts) < 4:
            return

        def closure():
            total = 0.0
            for x, y in self.parts:
                loss = cross_entropy(self.net(x), y) / len(self.parts)
                self.manual_backward(loss)
                total += loss.detach()
            return total

        self.losses.append(self.optimizers().step(closure).item())
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
    trainer = lightning.Trainer(accelerator="cpu", precision="bf16-mixed", max_epochs=6, **QUIET)
    trainer.fit(model, DataLoader(digits, batch_size=112))
    losses = model.losses
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {trainer.global_step} steps")
