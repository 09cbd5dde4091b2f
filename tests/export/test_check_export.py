"""Every trap of every server, one row each: what it refuses, and what it accepts and computes otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import rankwise
from conftest import tiny_llama
from rankwise.adapters.configs import CONFIGS
from rankwise.cli.main import app
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.export.pipeline_files import DIFFUSERS
from rankwise.export.servers import SERVERS
from rankwise.export.servers.sglang import missing_beside

Config, Tensors = dict[str, Any], dict[str, Tensor]
PREFIX = "base_model.model.model.layers.0.self_attn."
Q = f"{PREFIX}q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def written(folder: Path, base: Path, name: str = "lora", server: str | None = None, **fields: Any) -> Path:
    torch.manual_seed(0)
    model = tiny_llama()
    model.config._name_or_path = model.name_or_path = str(base)
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_weights": False} | fields
    layout = fields.pop("layout", "uniform")
    adapted = get_peft_model(model, CONFIGS[name](**fields))
    rankwise.export_lora(adapted, folder, server=server, layout=layout)
    return folder


def edited(folder: Path, change: Callable[[Config, Tensors], Any]) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def set_to(**values: Any) -> Callable[[Config, Tensors], Any]:
    return lambda config, _: config.update(values)


def renamed(old: str, new: str) -> Callable[[Config, Tensors], Any]:
    def change(_: Config, tensors: Tensors) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def dropped(part: str) -> Callable[[Config, Tensors], Any]:
    def change(_: Config, tensors: Tensors) -> None:
        for key in [key for key in tensors if part in key]:
            del tensors[key]

    return change


def tensor(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Config, Tensors], Any]:
    return lambda _, tensors: tensors.update({key: change(tensors[key]).contiguous()})


def without_targets(name: str) -> Callable[[Config, Tensors], Any]:
    return lambda config, _: config.update(target_modules=[t for t in config["target_modules"] if t != name])


ALL, PLAIN = set(SERVERS) - {"diffusers"}, {"vllm", "sglang", "llama.cpp"}
TRAPS: dict[str, tuple[str, set[str], Callable[[Config, Tensors], Any]]] = {
    "no tensors": ("empty", ALL, lambda _, tensors: tensors.clear()),
    "AdaLoRA's file": ("type", ALL, set_to(peft_type="ADALORA")),
    "no B": ("half", ALL, dropped(f"{Q}.lora_B")),
    "a tensor of rank 0": ("rank zero", ALL, tensor(f"{Q}.lora_A.weight", lambda t: t[:0])),
    "rank 0 in rank_pattern": ("rank zero", ALL, set_to(rank_pattern={"q_proj": 0})),
    "a vector for a matrix": ("shape", ALL, tensor(f"{Q}.lora_A.weight", lambda t: t.flatten())),
    "another rank than the config's": ("rank of the config", ALL, tensor(f"{Q}.lora_A.weight", lambda t: t[:2])),
    "NaN": ("not finite", ALL, tensor(f"{Q}.lora_B.weight", lambda t: t * torch.nan)),
    "infinity": ("not finite", ALL, tensor(f"{Q}.lora_A.weight", lambda t: t / 0)),
    "integers": ("dtype", ALL, tensor(f"{Q}.lora_A.weight", lambda t: t.long())),
    "no prefix": ("prefix", ALL, renamed("base_model.model.", "")),
    "tensors outside target_modules": ("target modules", ALL, without_targets("q_proj")),
    "a config PEFT cannot read": ("target modules", ALL, set_to(target_modules=None)),
    "an unknown module": ("unknown module", ALL, renamed("q_proj", "query")),
    "an unknown layer": ("unknown module", ALL, renamed("layers.0.", "layers.9.")),
    "a wrong input width": ("width", ALL, tensor(f"{Q}.lora_A.weight", lambda t: t[:, :8])),
    "a wrong output width": ("width", ALL, tensor(f"{Q}.lora_B.weight", lambda t: t[:8])),
    "no base model": ("base model named", {"llama.cpp"}, set_to(base_model_name_or_path=None)),
    "DoRA": ("DoRA", PLAIN, set_to(use_dora=True)),
    "DoRA's magnitudes": (
        "DoRA",
        PLAIN,
        lambda _, t: t.update({f"{Q}.lora_magnitude_vector.weight": torch.ones(4)}),
    ),
    "biases": ("bias", PLAIN, set_to(bias="all")),
    "LoRA biases": ("bias", PLAIN, set_to(lora_bias=True)),
    "PiSSA": ("changed base", PLAIN, set_to(init_lora_weights="pissa_niter_4")),
    "OLoRA": ("changed base", PLAIN, set_to(init_lora_weights="olora")),
    "activated LoRA": ("other kinds", PLAIN, set_to(alora_invocation_tokens=[1, 2])),
    "repeated layers": ("other kinds", PLAIN, set_to(layer_replication=[[0, 1]])),
    "a head other than a classifier": ("modules trained in full", PLAIN, set_to(modules_to_save=["lm_head"])),
    "a classifier": ("modules trained in full", {"sglang", "llama.cpp"}, set_to(modules_to_save=["classifier"])),
    "a foreign tensor": ("foreign tensors", PLAIN, lambda _, t: t.update({f"{Q}.vera_d": torch.ones(4)})),
    "rsLoRA": ("rsLoRA", {"sglang", "llama.cpp"}, set_to(use_rslora=True)),
    "alpha_pattern": ("alpha per module", {"sglang", "llama.cpp"}, set_to(alpha_pattern={"q_proj": 8})),
    "rank_pattern": ("rank per module", {"sglang"}, set_to(rank_pattern={"nothing": 4})),
    "a convolution": (
        "convolution",
        PLAIN,
        lambda _, t: t.update({key: value[..., None, None] for key, value in t.items() if Q in key}),
    ),
    "fused experts": ("fused experts", PLAIN, set_to(target_parameters=["mlp.experts"])),
    "a scale beside the tensors": ("stray alpha", ALL, lambda _, t: t.update({f"{Q}.alpha": torch.tensor(3.0)})),
    "a compiled model": ("wrappers' names", ALL, renamed("base_model.", "_orig_mod.base_model.")),
    "keys of an adapter by its name": ("an adapter's name", PLAIN, renamed(".weight", ".default.weight")),
    "a tensor under two names": (
        "two names",
        ALL,
        lambda _, t: t.update({f"{Q}.lora_A.default.weight": t[f"{Q}.lora_A.weight"].clone()}),
    ),
    "an expression": ("regular expression", {"sglang"}, set_to(target_modules=r".*\.(\w+_proj)")),
    "q without v": ("modules kept together", {"sglang"}, dropped("v_proj")),
    "k and v without q": ("modules kept together", {"sglang"}, dropped("q_proj")),
    "up without gate": ("modules kept together", {"sglang"}, dropped("gate_proj")),
    "a vision tower beside the language model": (
        "one place for two modules",
        {"sglang"},
        lambda _, t: t.update({key.replace(".layers.", ".tower.layers."): tensor + 1 for key, tensor in t.items()}),
    ),
    "a path for a name": ("odd names", ALL, renamed("q_proj", "../../q_proj")),
}


@pytest.mark.parametrize("trap", list(TRAPS))
def test_a_trap_is_found_by_its_rule_and_for_its_servers_only(trap: str, base: Path, tmp_path: Path) -> None:
    rule, servers, change = TRAPS[trap]
    edited(written(tmp_path / "lora", base), change)
    for server in ALL:
        found = {problem.rule for problem in rankwise.check_export(tmp_path / "lora", server, base=base).problems}
        assert (rule in found) == (server in servers), (server, found)


def test_tokens_of_its_own(base: Path, tmp_path: Path) -> None:
    written(tmp_path / "lora", base)
    (tmp_path / "lora" / "added_tokens.json").write_text("{}")
    assert [p.rule for p in rankwise.check_export(tmp_path / "lora", "sglang", base=base).problems] == ["added tokens"]
    assert rankwise.check_export(tmp_path / "lora", "vllm", base=base).problems == []


def test_a_rank_that_vllm_cannot_be_started_with(base: Path, tmp_path: Path) -> None:
    written(tmp_path / "lora", base)
    edited(tmp_path / "lora", set_to(rank_pattern={"nothing": 513}))
    report = rankwise.check_export(tmp_path / "lora", "vllm", base=base)
    assert [problem.rule for problem in report.problems] == ["rank limit"]


def test_every_rule_has_a_trap() -> None:
    tested = {rule for rule, _, _ in TRAPS.values()} | {"rank limit", "diffusers' names", "diffusers' file"}
    tested |= {"added tokens", "class of the base model", "converted names", "component without a config"}
    tested |= {"scales told twice", "alphas of attention", "blocks by two numberings", "vocabulary"}
    assert {rule.name for server in SERVERS.values() for rule in server.rules} == tested


def test_every_server_but_peft_has_a_program_of_make_test_servers() -> None:
    files = {type(server).__module__.rpartition(".")[2] for name, server in SERVERS.items() if name != "peft"}
    programs = Path(__file__).parents[1] / "servers"
    assert files == {file.stem.removeprefix("with_") for file in programs.glob("with_*.py")}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_exports_of_all_methods_break_no_rule(name: str, base: Path, tmp_path: Path) -> None:
    fields = {"total_step": 10} if name in ("adalora", "salora") else {}
    for layout, servers in (("uniform", ALL), ("compact", ALL - {"sglang"})):
        written(tmp_path / layout, base, name, layout=layout, **fields)
        for server in servers:
            report = rankwise.check_export(tmp_path / layout, server)
            assert report.base_seen
            assert report.problems == []


def test_ranks_to_start_servers_with(base: Path, tmp_path: Path) -> None:
    written(tmp_path / "lora", base, r=12)
    limits = {server: rankwise.check_export(tmp_path / "lora", server).max_lora_rank for server in ALL}
    assert limits == {"vllm": 16, "sglang": 12, "llama.cpp": 12, "peft": 12}


@pytest.mark.parametrize(
    ("targets", "written_too"),
    [
        (["q_proj"], {"v_proj"}),
        (["k_proj"], {"q_proj", "v_proj"}),
        (["up_proj"], {"gate_proj"}),
        (["down_proj"], set()),
    ],
)
def test_sglang_gets_the_modules_it_keeps_together(
    targets: list[str], written_too: set[str], base: Path, tmp_path: Path
) -> None:
    folder = written(tmp_path / "lora", base, server="sglang", target_modules=targets)
    names = {key.split(".")[-3] for key in load_file(folder / "adapter_model.safetensors")}
    assert names == {*targets} | written_too
    assert rankwise.check_export(folder, "sglang").problems == []
    assert set(missing_beside({*targets})) == written_too


def test_what_a_server_cannot_take_is_refused_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"sglang would not serve this adapter as it is: rank_pattern is set"):
        written(tmp_path / "lora", base, "sora", server="sglang", layout="compact", rank_pattern={"q_proj": 2})
    with pytest.raises(RankwiseError, match=r"llama.cpp would not serve this adapter as it is: modules_to_save"):
        written(tmp_path / "lora", base, server="llama.cpp", modules_to_save=["lm_head"])
    assert list(tmp_path.iterdir()) == []


class TinyUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)


def test_diffusers_gets_one_file_under_its_names_with_the_config_in_its_header(tmp_path: Path) -> None:
    config = rankwise.SoraConfig(r=4, target_modules=["to_q"], init_weights=False)
    model = get_peft_model(TinyUNet(), config)
    rankwise.export_lora(model, tmp_path / "lora", server="diffusers")
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {DIFFUSERS, "README.md"}
    tensors = load_file(tmp_path / "lora" / DIFFUSERS)
    assert set(tensors) == {"unet.to_q.lora_A.weight", "unet.to_q.lora_B.weight"}
    update = rankwise.factors(model)["to_q"].delta()
    torch.testing.assert_close(tensors["unet.to_q.lora_B.weight"] @ tensors["unet.to_q.lora_A.weight"], update)
    assert rankwise.check_export(tmp_path / "lora", "diffusers", base=TinyUNet()).problems == []
    rankwise.export_lora(model, tmp_path / "plain")
    rules = {problem.rule for problem in rankwise.check_export(tmp_path / "plain", "diffusers").problems}
    assert rules == {"diffusers' names"}
    save_file(tensors | {"unet.to_q.alpha": torch.tensor(4.0)}, tmp_path / "lora" / DIFFUSERS)
    assert {p.rule for p in rankwise.check_export(tmp_path / "lora", "diffusers").problems} == {"stray alpha"}
    save_file({key.replace("unet.", ""): t for key, t in tensors.items()}, tmp_path / "lora" / DIFFUSERS)
    assert {p.rule for p in rankwise.check_export(tmp_path / "lora", "diffusers").problems} == {"prefix"}
    assert "diffusers' file" in {p.rule for p in rankwise.check_export(tmp_path / "lora", "vllm").problems}


def test_the_commands(base: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    model.load_state_dict(type(model).from_pretrained(base).state_dict())
    model.config._name_or_path = model.name_or_path = str(base)
    config = rankwise.SoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    arguments = ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--for", "vllm"]
    done = CliRunner().invoke(app, [*arguments, "--check", str(base)])
    assert done.exit_code == 0, done.output
    assert "--max-lora-rank 8" in done.output
    assert "logits" in done.output
    assert "sora: " in (tmp_path / "out" / "README.md").read_text()
    done = CliRunner().invoke(app, ["check-export", str(tmp_path / "out"), "--for", "vllm,sglang"])
    assert done.exit_code == 1
    assert "vllm       takes it, started with max_lora_rank 8" in done.output
    assert "modules kept together" in done.output
    assert CliRunner().invoke(app, ["check-export", str(tmp_path / "out"), "--for", "vllm"]).exit_code == 0


def test_errors(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`server` must be one of diffusers, llama\.cpp, peft, sglang, vllm"):
        rankwise.check_export(tmp_path, "triton")
    with pytest.raises(AdapterFileError, match="is missing"):
        rankwise.check_export(tmp_path, "vllm")
    written(tmp_path / "lora", base)
    with pytest.raises(AdapterFileError, match=r"the base model 'nowhere/at/all' of .* does not open"):
        rankwise.check_export(tmp_path / "lora", "vllm", base="nowhere/at/all")
