"""Lightning over two processes: strategy="ddp", automatic optimization, and a clip of the aggregate.

Lightning starts the second process itself: python bench/recipes/lightning_ddp.py

It puts the model into DistributedDataParallel, which TSAM finds when its forward runs. It also gives each process its
own rows. The clip hangs on the base optimizer, as in the other recipes for Lightning.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tsam_ext import TSAM

DEVICES = 2
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        self.losses = []

    def training_step(self, batch, index):
        x, y = batch
        return cross_entropy(self.net(x), y)

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(self.all_gather(outputs["loss"]).mean().item())

    def on_train_end(self):
        weights = torch.nn.utils.parameters_to_vector(self.parameters()).detach()
        same = bool((self.all_gather(weights).reshape(DEVICES, -1) == weights).all())
        if self.trainer.is_global_zero:
            print(f"loss {self.losses[0]:.6f} -> {self.losses[-1]:.6f}, {DEVICES} ranks, same weights: {same}")

    def configure_optimizers(self):
        optimizer = TSAM(
            self.parameters(), torch.optim.SGD, lr=0.5, momentum=0.5, num_samples=3, radius=1.0, tilt=20.0, seed=0
        )
        optimizer.base_optimizer.register_step_pre_hook(self.clip)
        return optimizer

    def clip(self, *_):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32)[:1792], torch.tensor(labels)[:1792])
    trainer = lightning.Trainer(accelerator="cpu", strategy="ddp", devices=DEVICES, max_epochs=4, **QUIET)
    trainer.fit(Digits(), DataLoader(digits, batch_size=128 // DEVICES))
