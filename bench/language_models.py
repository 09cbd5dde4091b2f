"""SmolLM2-135M fine-tuned by one SPEC, killed on the way, resumed, and generated from in stock PEFT.

    python bench/language_models.py prepare RUNS --data FOLDER
    python bench/language_models.py run RUNS/gsm8k.toml --json bench/results/language_models/gsm8k.json
    python bench/language_models.py run RUNS/gsm8k.toml --packing --json …/gsm8k_packing.json
    rankwise compare RUNS/arc_easy.toml --out bench/results/language_models/arc_easy

`prepare` saves the model as a plain folder, draws the data and copies the SPECs of `bench/specs` beside them. `run`
trains a SPEC twice with `rankwise train`: once from end to end, once killed by SIGKILL at the first whole checkpoint
and started again. It says whether both end with the same bits, and prints what stock PEFT generates with the export.

FOLDER holds gsm8k, e2e, arc_easy and clinc150, each with gzip-compressed JSON Lines. A run takes about ten minutes on
one core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from harness import write
from models import SMOLLM2, smollm2, smollm2_folder
from transformers import AutoTokenizer

SPECS = Path(__file__).resolve().parent / "specs"
SPLITS = {
    # E2E comes without its training split: its validation split trains.
    "gsm8k": ("gsm8k", {"train": ("train", 400), "test": ("test", 40)}),
    "e2e": ("e2e", {"train": ("validation", 400), "test": ("test", 40)}),
    "arc_easy": ("arc_easy", {"train": ("train", 600), "test": ("test", 150)}),
    "everything": (
        "clinc150",
        {"train": ("train", None), "validation": ("validation", 1000), "test": ("test", 1500)},
    ),
}
"""For each SPEC, the data and its splits: the file that each comes from, and how many rows are drawn."""
GENERATED = 3
"""Test prompts that stock PEFT continues."""


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(folder: Path, data: Path) -> None:
    """The model, the data and the SPECs in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "smollm2")
    for name, (source, splits) in SPLITS.items():
        for split, (file, rows) in splits.items():
            lines = gzip.decompress((data / source / f"{file}.jsonl.gz").read_bytes()).decode().strip("\n").split("\n")
            drawn = lines if rows is None else random.Random(0).sample(lines, rows)
            (folder / f"{name}_{split}.jsonl").write_text("\n".join(drawn) + "\n", encoding="utf-8")
        shutil.copy(SPECS / f"{name}.toml", folder)


def save_model(folder: Path) -> None:
    """SmolLM2 as transformers saves a model that was never quantised."""
    if folder.exists():
        return
    model = smollm2()
    # transformers has dequantised the weights already; Trainer goes by these marks.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_folder(), gguf_file=SMOLLM2).save_pretrained(folder)


# --- run -------------------------------------------------------------------------------------------------------------


def run(spec: Path, packing: bool) -> dict[str, Any]:
    """One SPEC whole and killed, and what stock PEFT generates."""
    if packing:
        text = spec.read_text(encoding="utf-8")
        spec = spec.with_name(f"{spec.stem}_packing.toml")
        spec.write_text(text.replace("packing        = false", "packing        = true"), encoding="utf-8")
    whole, killed = (spec.parent / "runs" / f"{spec.stem}_{name}" for name in ("whole", "killed"))
    for output in (whole, killed):
        shutil.rmtree(output, ignore_errors=True)
    train(spec, whole)
    step = train_and_kill(spec, killed)
    train(spec, killed)
    (result,) = (json.loads(file.read_text()) for file in (whole / "results").glob("*.json"))
    kept = ("label", "score", "metric", "extra_metrics", "train_loss", "train_tokens", "seconds_per_step", "parameters")
    return {
        "spec": tomllib.loads(spec.read_text(encoding="utf-8")),
        **{name: result[name] for name in kept},
        "killed_at_step": step,
        "same_bits": {name: same_bits(whole / name, killed / name) for name in ("adapters", "exports")},
        "generated_by_stock_peft": generated(spec, whole),
        "versions": result["versions"],
    }


def train(spec: Path, output: Path) -> None:
    subprocess.run(command(spec, output), check=True)


def command(spec: Path, output: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("rankwise")), "train", str(spec), "--out", str(output)]


def train_and_kill(spec: Path, output: Path) -> int:
    """Start the run, and kill it at its first whole checkpoint; the checkpoint's step."""
    process = subprocess.Popen(command(spec, output))
    while process.poll() is None:
        for state in output.glob("checkpoints/*/checkpoint-*/trainer_state.json"):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return int(state.parent.name.rpartition("-")[2])
        time.sleep(0.2)
    raise SystemExit("the run ended before it could be killed: give it more steps")


def same_bits(left: Path, right: Path) -> dict[str, bool]:
    """Whether the tensors of two runs are the same files, byte by byte."""
    files = [file.relative_to(left) for file in sorted(left.rglob("*.safetensors"))]
    return {str(file): (left / file).read_bytes() == (right / file).read_bytes() for file in files}


def generated(spec: Path, output: Path) -> list[dict[str, str]]:
    """What the base with the export says to the first test prompts, in a process that has only PEFT."""
    (export,) = (output / "exports").iterdir()
    table = tomllib.loads(spec.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (spec.parent / table["data"]["test"]).read_text().split("\n")[:GENERATED]]
    template = table["data"]["prompt"]
    prompts = [template.format(**row) if "{" in template else row[template] for row in rows]
    asked = json.dumps({"base": str(spec.parent / "smollm2"), "export": str(export), "prompts": prompts})
    done = subprocess.run([sys.executable, "-c", STOCK_PEFT], input=asked, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


STOCK_PEFT = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

asked = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(asked["base"])
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(asked["base"]), asked["export"])
answers = []
for prompt in asked["prompts"]:
    chat = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**tokens, max_new_tokens=64, do_sample=False)[0, tokens["input_ids"].shape[1]:]
    answers.append({"prompt": prompt, "answer": tokenizer.decode(answer, skip_special_tokens=True)})
assert "rankwise" not in sys.modules
json.dump(answers, sys.stdout)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="save the model, draw the data, copy the SPECs")
    first.add_argument("folder", type=Path)
    first.add_argument("--data", type=Path, required=True, help="the folder with gsm8k, e2e, arc_easy and clinc150")
    second = commands.add_parser("run", help="train a SPEC whole and killed, and generate")
    second.add_argument("spec", type=Path)
    second.add_argument("--packing", action="store_true", help="fill every sequence with several examples")
    second.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the result goes")
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.folder, options.data)
    else:
        write(options.json, run(options.spec.resolve(), options.packing))


if __name__ == "__main__":
    main()
