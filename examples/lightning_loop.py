"""SaLoRA under PyTorch Lightning: `total_step` is what its Trainer does not tell an optimiser.

python examples/lightning_loop.py --steps 60
"""

from __future__ import annotations

import argparse
import tempfile

import lightning
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader, TensorDataset

import rankwise


class Regression(lightning.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
        self.model = get_peft_model(net, rankwise.SaloraConfig(r=4, total_step=steps, target_modules=["0", "2"]))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, target = batch
        return torch.nn.functional.mse_loss(self.model(x), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)


def main(steps: int) -> None:
    torch.manual_seed(0)
    module = Regression(steps)
    x = torch.randn(16 * steps, 32)
    target = x @ torch.randn(32, 3) @ torch.randn(3, 32)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=steps, default_root_dir=tempfile.mkdtemp(), **quiet)
    trainer.fit(module, DataLoader(TensorDataset(x, target), batch_size=16))
    print(rankwise.status(module.model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
