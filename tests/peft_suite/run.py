"""Runs PEFT's contract suite, `test_custom_models.py` of the installed PEFT's source distribution, on rankwise.

Nothing of PEFT's tests is edited but its case tables: see `cases.py`. Usage and what is covered: README.md beside
this file.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT's custom models are built in the test file

import pytest

from cases import CLASSES, DECORATORS, DERIVED, LEFT_OUT, TABLES
from rankwise.adapters import linear

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SUITE = "test_custom_models.py"
HELPERS = ("testing_common.py", "testing_utils.py")
OUTCOMES = ("passed", "failed", "skipped", "left out")


class SuiteError(Exception):
    """The suite cannot be run: its source is missing or has another shape than expected."""


# --- the source distribution --------------------------------------------------------------------------------------


def fetched(peft: str) -> Path:
    """The source distribution of this version, from the cache or from the package index."""
    folder = ROOT / ".cache" / f"peft-{peft}"
    archive = folder / f"peft-{peft}.tar.gz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, f"peft=={peft}"], check=False)
        if done.returncode or not archive.exists():
            raise SuiteError(f"pip download did not leave {archive.name}; fetch it elsewhere and pass --sdist")
    return archive


def unpack(sdist: Path, peft: str, target: Path) -> None:
    """Copy the tests of an archive, or of an unpacked one, to `target`."""
    if not sdist.exists():
        raise SuiteError(f"--sdist: {sdist} does not exist")
    source = sdist
    if sdist.is_file():
        with tarfile.open(sdist) as archive:
            archive.extractall(target.parent / "sdist", filter="data")
        source = next((target.parent / "sdist").iterdir())
    if source.name != f"peft-{peft}":
        raise SuiteError(f"the source distribution is {source.name} and the installed version is peft-{peft}")
    missing = [name for name in (SUITE, *HELPERS) if not (source / "tests" / name).exists()]
    if missing:
        raise SuiteError(f"{source.name} has no tests/{missing[0]}")
    shutil.copytree(source / "tests", target)
    (target / "__init__.py").touch()


# --- the case tables ----------------------------------------------------------------------------------------------


def rewritten(source: str) -> str:
    """PEFT's test file with its case tables replaced by names of `cases.py`.

    Raises:
        SuiteError: a table is not where it was.
    """
    tree = ast.parse(source)
    edits = [*_module_tables(tree), *_decorator_tables(tree)]
    lines = source.splitlines(keepends=True)
    for node, replacement in sorted(edits, key=lambda edit: edit[0].lineno, reverse=True):
        _replace(lines, node, replacement)
    first = next((node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)), None)
    if first is None:
        raise SuiteError(f"{SUITE} imports nothing")
    lines.insert(first.lineno - 1, "import rankwise\nfrom . import rankwise_cases\n")
    return "".join(lines)


def _module_tables(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """The lists of the tables at module level, with their replacements."""
    found: dict[str, list[ast.expr]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    for name in TABLES:
        values = found.get(name, [])
        if len(values) != 1 or not isinstance(values[0], ast.List):
            raise SuiteError(f"{SUITE} no longer has one list {name}")
        yield values[0], f"rankwise_cases.TABLES[{name!r}]"
    for name, origin in DERIVED.items():
        values = found.get(name, [])
        if len(values) != 1 or not _mentions(values[0], origin):
            raise SuiteError(f"{SUITE} no longer computes {name} from {origin}")


def _decorator_tables(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """The lists of the tables in decorators, with their replacements."""
    tests = {
        test.name: test
        for group in tree.body
        if isinstance(group, ast.ClassDef)
        for test in group.body
        if isinstance(test, ast.FunctionDef)
    }
    for name, (argument, replacement) in DECORATORS.items():
        decorators = tests[name].decorator_list if name in tests else []
        lists = [
            call.args[1]
            for call in decorators
            if isinstance(call, ast.Call)
            and ast.unparse(call.func) == "pytest.mark.parametrize"
            and len(call.args) == 2
            and isinstance(call.args[0], ast.Constant)
            and call.args[0].value == argument
            and isinstance(call.args[1], ast.List)
        ]
        if len(lists) != 1:
            raise SuiteError(f"{SUITE} no longer has {name} with one list of {argument}")
        yield lists[0], f"rankwise_cases.{replacement}"


def _mentions(node: ast.expr, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))


def _replace(lines: list[str], node: ast.expr, replacement: str) -> None:
    """Put `replacement` in place of the node's text. Columns count bytes."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    before = lines[node.lineno - 1].encode()[: node.col_offset].decode()
    after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
    lines[node.lineno - 1 : node.end_lineno] = [before + replacement + after]


# --- the run ------------------------------------------------------------------------------------------------------


class Tally:
    """A pytest plugin: runs what the tables parametrise, and counts outcomes per config class."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {config.__name__: Counter() for config in CLASSES}
        self.not_ours = 0
        self._classes: dict[str, str] = {}
        self._outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests that receive a config class, or a config, of rankwise, less what `LEFT_OUT` names."""
        kept, dropped, unused = [], [], set(LEFT_OUT)
        for item in items:
            owner = _config_class(item)
            case = (getattr(item, "originalname", ""), _parameters(item).get("test_name", ""))
            if owner is None:
                self.not_ours += 1
                dropped.append(item)
            elif case in LEFT_OUT:
                unused.discard(case)
                self.counts[owner]["left out"] += 1
                dropped.append(item)
            else:
                self._classes[item.nodeid] = owner
                kept.append(item)
        if unused:
            raise pytest.UsageError(f"LEFT_OUT names what the suite does not have: {sorted(unused)}")
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept

    def pytest_collection_finish(self) -> None:
        """Tell PEFT's helper that no model of the tables is to be looked for on a hub."""
        accesses = sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES
        accesses.update({row[1]: 1 for row in TABLES["TEST_CASES"]})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Compute a test of FSDP in one order of sums throughout.

        These tests hold outputs under FSDP against outputs of a model of its own to 1e-5. Under FSDP a base weight is
        a view of what is trained, so layer and update are summed one after the other; without FSDP as one product. In
        float32 the two round differently, by up to 1.5e-5, which says nothing about what was saved and loaded.
        """
        one_after_the_other = mock.patch.object(linear, "plain_weights", return_value=None)
        in_fsdp = getattr(item, "cls", None) is not None and item.cls.__name__ == "TestPeftFsdpStateDict"
        with one_after_the_other if in_fsdp else nullcontext():
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test failed if any of its phases did."""
        worst = "failed" if report.failed else self._outcomes.get(report.nodeid)
        if worst != "failed" and (report.skipped or report.when == "call"):
            worst = report.outcome
        if worst:
            self._outcomes[report.nodeid] = worst

    def table(self) -> str:
        """The counts per class and in total."""
        for test, outcome in self._outcomes.items():
            self.counts[self._classes[test]][outcome] += 1
        self._outcomes.clear()
        total: Counter[str] = sum(self.counts.values(), Counter())
        rows = [*self.counts.items(), ("total", total)]
        head = f"{'config class':<16}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES)
        body = [f"{name:<16}" + "".join(f"{count[outcome]:>10}" for outcome in OUTCOMES) for name, count in rows]
        reasons = [f"left out: {test}, {case}: {reason}" for (test, case), reason in LEFT_OUT.items()]
        return "\n".join([head, *body, *reasons, f"PEFT's tests of its own classes, not run: {self.not_ours}"])


def _parameters(item: pytest.Item) -> dict[str, object]:
    call = getattr(item, "callspec", None)
    return dict(call.params) if call is not None else {}


def _config_class(item: pytest.Item) -> str | None:
    """The name of the rankwise class that the test is parametrised with."""
    for value in _parameters(item).values():
        config = value if isinstance(value, type) else type(value)
        if config in CLASSES:
            return config.__name__
    return None


def stand_in_for_diffusers() -> None:
    """PEFT's helpers import one class of diffusers, only to ask whether a model is one: an empty one will do."""
    if importlib.util.find_spec("diffusers") is None:
        module = ModuleType("diffusers")
        module.__spec__ = ModuleSpec("diffusers", None)
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = module


@contextmanager
def prepared(sdist: Path | None) -> Iterator[Path]:
    """A temporary folder with PEFT's tests, the tables replaced."""
    peft = version("peft")
    with tempfile.TemporaryDirectory(prefix="peft_suite_") as name:
        folder = Path(name)
        unpack(sdist or fetched(peft), peft, folder / "tests")
        suite = folder / "tests" / SUITE
        suite.write_text(rewritten(suite.read_text(encoding="utf-8")), encoding="utf-8")
        shutil.copy(HERE / "cases.py", folder / "tests" / "rankwise_cases.py")
        (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    regression: a marker of PEFT's suite\n")
        yield folder


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; 0 if every test passed or was skipped by PEFT itself."""
    parser = argparse.ArgumentParser(
        description="PEFT's contract suite on rankwise's config classes.",
        epilog="Further options go to pytest, as in: run.py -k 'test_safe_merge and Sora' -x",
    )
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution, packed or unpacked; else downloaded")
    options, rest = parser.parse_known_args(arguments)
    tally = Tally()
    try:
        with prepared(options.sdist.resolve() if options.sdist else None) as folder:
            stand_in_for_diffusers()
            fixed = ["-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "-p", "no:cacheprovider", "-q"]
            code = pytest.main([*fixed, "--tb=short", "-W", "ignore", *rest, str(folder / "tests" / SUITE)], [tally])
    except SuiteError as error:
        print(f"peft_suite: {error}", file=sys.stderr)
        return 2
    print(f"\nPEFT {version('peft')}\n{tally.table()}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
