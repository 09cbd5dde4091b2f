"""SoRA in an Accelerate loop with gradient accumulation, saved and resumed half-way.

python examples/accelerate_loop.py --steps 60
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader, TensorDataset

import rankwise


def main(steps: int) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
    model = get_peft_model(net, rankwise.SoraConfig(r=8, sparse_weight=2.0, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    x = torch.randn(2 * 16 * steps, 32)
    target = x @ torch.randn(32, 3) @ torch.randn(3, 32)
    loader = DataLoader(TensorDataset(x, target), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    folder = tempfile.mkdtemp()
    for i, (inputs, wanted) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(inputs), wanted)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if i + 1 == steps:  # half of the micro-batches
            accelerator.save_state(folder)
            accelerator.load_state(folder)

    print(f"loss {loss.item():.2f}", rankwise.status(accelerator.unwrap_model(model)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
