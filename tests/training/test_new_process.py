"""Saved in one process, loaded and trained on in another: the same function, and the same bits at the end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from cases import CASES
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS

TESTS = Path(__file__).parents[1]
CHILD = """
    import sys, torch
    sys.path[:0] = [sys.argv[2], sys.argv[2] + "/methods"]
    import rankwise  # before PEFT, as a user's script has it
    from pathlib import Path
    from cases import CASES
    from conftest import tiny_bert
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    batch = load_file(sys.argv[1] + "/batch.safetensors")
    for name, case in CASES.items():
        folder = Path(sys.argv[1]) / name
        model = PeftModel.from_pretrained(tiny_bert(), str(folder), is_trainable=True)
        for unsaved in {"score_batch", "init_batch"} & case.alone.keys():  # a function is not saved with a config
            setattr(model.peft_config["default"], unsaved, case.alone[unsaved])
        with torch.no_grad():
            logits = model.eval()(input_ids=batch["input_ids"]).logits
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = {key: t.clone() for key, t in model.state_dict().items() if "rankwise" in key}
        save_file(kept | {"logits": logits}, folder / "found.safetensors")
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """What nine steps come to without a break; saved after six of them, and gone on with in a new process."""
    folder = tmp_path_factory.mktemp("processes")
    tokens = torch.arange(48).view(4, 12) % 90
    batch = {"input_ids": tokens, "labels": tokens[:, 0] % 3}
    save_file(batch, folder / "batch.safetensors")
    expected: dict[str, dict[str, Tensor]] = {}
    for name, case in CASES.items():
        torch.manual_seed(2)
        config = CONFIGS[name](r=4, target_modules="all-linear", task_type="SEQ_CLS", **case.alone)
        model = get_peft_model(tiny_bert(), config).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(9):
            if step == 6:
                model.save_pretrained(str(folder / name))
                with torch.no_grad():
                    expected[name] = {"logits": model.eval()(input_ids=batch["input_ids"]).logits}
                model.train()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        expected[name] |= {key: t.clone() for key, t in model.state_dict().items() if "rankwise" in key}
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, expected


@pytest.mark.parametrize("name", list(CASES))
def test_a_new_process_goes_on_with_the_same_bits(name: str, whole: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    folder, expected = whole
    found = load_file(folder / name / "found.safetensors")
    assert found.keys() == expected[name].keys()
    assert all(torch.equal(t, expected[name][key]) for key, t in found.items())
