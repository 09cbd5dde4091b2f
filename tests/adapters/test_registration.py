"""rankwise registers with PEFT from outside, whichever is imported first, and is light until it is used."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from peft import PeftConfig, mapping

import rankwise
from rankwise.adapters import register
from rankwise.adapters.configs import CONFIGS, MethodType, peft_type

MODULES = ("compare", "completion", "errors", "spectral")


def run(code: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_rankwise_loads_nothing_heavy() -> None:
    code = (
        "import rankwise, sys; print([m for m in ('torch', 'peft', 'transformers', 'accelerate') if m in sys.modules])"
    )
    assert run(code) == "[]\n"


@pytest.mark.parametrize(
    "first",
    [
        "import peft, rankwise",
        "import rankwise.adapters.configs",
        # Each in a process that imports everything anew.
        pytest.param("import rankwise, peft", marks=pytest.mark.slow),
        pytest.param("import transformers.trainer, rankwise, peft", marks=pytest.mark.slow),
        pytest.param("from rankwise import SoraConfig", marks=pytest.mark.slow),
        pytest.param("import rankwise.training.hooks", marks=pytest.mark.slow),
    ],
)
def test_any_order_of_imports_registers(first: str) -> None:
    code = f"""
        {first}
        from peft import mapping
        from transformers.trainer import DEFAULT_CALLBACKS
        names = [callback.__name__ for callback in DEFAULT_CALLBACKS]
        print('RANKWISE_SORA' in mapping.PEFT_TYPE_TO_TUNER_MAPPING, names.count('RankwiseCallback'))
    """
    assert run(code) == "True 1\n"


def test_registering_twice_changes_nothing() -> None:
    before = dict(mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    register.register()
    assert before == mapping.PEFT_TYPE_TO_CONFIG_MAPPING


def test_a_peft_whose_registries_changed_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mapping, "PEFT_TYPE_TO_PREFIX_MAPPING")
    with pytest.raises(ImportError, match=r"rankwise needs peft 0\.21"):
        register.register()


def test_type_strings_are_namespaced_and_look_like_an_enum() -> None:
    kinds = [peft_type(config) for config in CONFIGS.values()]
    assert len(set(kinds)) == len(CONFIGS)
    for kind in kinds:
        assert isinstance(kind, MethodType)
        assert kind.value == kind.name == str.__str__(kind)
        assert kind.startswith("RANKWISE_")
        assert str(kind) == f"PeftType.{kind.value}"
        assert hash(kind) == hash(kind.value)


def test_public_names() -> None:
    names = {"Factors", "Status", "factors", "finalize", "ranks", "status"}
    names |= {
        "check_export",
        "export_lora",
        "fix_adapter",
        "import_lora",
        "merge_adapters",
        "shrink_adapter",
        "loraplus_groups",
        "Recorder",
        "SpectraCallback",
        "LightningSpectra",
    }
    assert set(rankwise.__all__) == names
    configs = {config.__name__ for config in CONFIGS.values()}
    assert set(dir(rankwise)) == names | configs | set(MODULES) | {"__version__"}
    assert all(getattr(rankwise, name) is not None for name in dir(rankwise))
    with pytest.raises(AttributeError, match="no attribute 'NoSuchConfig'"):
        rankwise.NoSuchConfig  # noqa: B018
    assert all(issubclass(config, PeftConfig) for config in CONFIGS.values())


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_is_imported_when_it_is_first_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(rankwise, name, raising=False)  # as after a bare `import rankwise`
    module = getattr(rankwise, name)
    assert module.__name__ == f"rankwise.{name}"
    assert all(getattr(module, public) is not None for public in getattr(module, "__all__", ()))


def test_public_modules_after_a_bare_import() -> None:
    code = """
        import rankwise
        print(rankwise.compare.read_spec.__name__, rankwise.completion.DeepMatrixCompletion.__name__)
        print(rankwise.errors.RankwiseError.__name__, rankwise.spectral.spectra.__name__)
        print(sorted(set(rankwise.compare.__all__) - set(dir(rankwise.compare))))
    """
    assert run(code) == "read_spec DeepMatrixCompletion\nRankwiseError spectra\n[]\n"
