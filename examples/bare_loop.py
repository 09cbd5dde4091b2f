"""AdaLoRA in a bare PyTorch loop: nothing but `total_step`, which such a loop cannot know, is added.

python examples/bare_loop.py --steps 60
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model

import rankwise


def main(steps: int) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
    model = get_peft_model(net, rankwise.AdaLoraConfig(r=4, total_step=steps, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    x = torch.randn(256, 32)
    target = x @ torch.randn(32, 3) @ torch.randn(3, 32)
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(f"loss {loss.item():.2f}", rankwise.status(model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
