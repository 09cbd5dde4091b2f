"""PyTorch Lightning, automatic and manual optimisation: the bare loop's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_kill import Examples
from test_processes import adapted
from torch.utils.data import DataLoader
from transformers.utils import logging

import rankwise
from cases import CASES

lightning = pytest.importorskip("lightning", reason='in the "test" extra')
logging.set_verbosity_error()
STEPS = 12


def make_module(name: str, *, automatic: bool) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted(name, seed=0).train()
            self.automatic_optimization = automatic

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor | None:
            loss = self.model(**batch).loss
            if automatic:
                return loss
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.model)

    return Module()


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)


def loader() -> DataLoader[Any]:
    return DataLoader(Examples(), batch_size=4)


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_lightning_runs_as_a_bare_loop(name: str, automatic: bool, tmp_path: Path) -> None:
    bare = adapted(name, seed=0).train()
    optimizer = sgd(bare)
    for batch, _ in zip(loader(), range(STEPS), strict=False):
        bare(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    module = make_module(name, automatic=automatic)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader())
    told = rankwise.status(module.model)
    assert (told.step, told.rules_run, told.steps_skipped) == (STEPS, STEPS, 0)
    found = module.model.state_dict()
    for key, value in bare.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
