"""What each server takes: one rule a trap, for those it refuses and those it accepts and then computes otherwise.

A rule reads the files as they lie in the folder and says, in one sentence, what the server would make of them. The
rules were found by loading such adapters into vLLM 0.32, llama.cpp, SGLang 0.5.23 and diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from rankwise.checks import require_choice
from rankwise.errors import AdapterFileError
from rankwise.export.plain import NAME
from rankwise.export.shipped import Shipped, read_shipped
from rankwise.export.source import forms_of, opened_base

SERVERS = ("vllm", "sglang", "llama.cpp", "diffusers", "peft")
EVERY = frozenset(SERVERS)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's max_lora_rank may be."""
TOGETHER = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Modules that SGLang keeps in one buffer."""


class Problem(NamedTuple):
    """A rule that a folder breaks."""

    rule: str
    sentence: str


@dataclass(frozen=True)
class CheckReport:
    """What a server would make of an adapter."""

    server: str
    problems: list[Problem]
    max_lora_rank: int
    """What the server must be started with, where it has such a limit."""
    base_seen: bool
    """Whether module names and widths could be compared with the base model's."""


class Rule(NamedTuple):
    """A trap: which servers have it, and what finds it."""

    name: str
    servers: frozenset[str]
    find: Callable[[Shipped], Iterator[str]]


RULES: list[Rule] = []


def check_export(folder: str | Path, server: str, *, base: str | Path | nn.Module | None = None) -> CheckReport:
    """Whether a server would load a LoRA adapter and compute what stock PEFT computes.

    Args:
        folder: any adapter, ours or not.
        server: "vllm", "sglang", "llama.cpp", "diffusers" or "peft".
        base: the base model, or where it is; by default where the adapter's config says. Without one that opens,
            module names and widths are not checked, and the report says so.

    Raises:
        ArgumentError: the server is not known.
        AdapterFileError: the folder holds no adapter that can be read at all.

    Example:
        >>> import tempfile, torch, rankwise
        >>> from peft import get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5))
        >>> model = get_peft_model(net, rankwise.LoraConfig(r=2, target_modules=["0"], init_weights=False))
        >>> folder = tempfile.mkdtemp() + "/lora"
        >>> _ = rankwise.export_lora(model, folder)
        >>> rankwise.check_export(folder, "vllm", base=net).problems
        []
    """
    require_choice("server", server, SERVERS)
    shipped = read_shipped(Path(folder))
    shipped.base = _base(shipped, base)
    limit = lora_rank(server, shipped.largest_rank)
    return CheckReport(server, problems_of(shipped, server), limit, shipped.base is not None)


def problems_of(shipped: Shipped, server: str) -> list[Problem]:
    """Every rule of a server that the files break."""
    found = [(rule.name, rule.find(shipped)) for rule in RULES if server in rule.servers]
    return [Problem(name, sentence) for name, sentences in found for sentence in sentences]


def lora_rank(server: str, rank: int) -> int:
    """The rank limit to start a server with, so that it takes an adapter of `rank`."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), rank) if server == "vllm" else rank


def _base(shipped: Shipped, base: str | Path | nn.Module | None) -> dict[str, tuple[int, int]] | None:
    try:
        forms, _ = forms_of(opened_base(base, shipped.config, shipped.folder))
    except AdapterFileError:
        if base is not None:
            raise
        return None
    return {name: form.shape for name, form in forms.items()}


def rule(name: str, *servers: str) -> Callable[[Callable[[Shipped], Iterator[str]]], None]:
    """Make a rule of a function; of every server's if none is named."""

    def add(find: Callable[[Shipped], Iterator[str]]) -> None:
        RULES.append(Rule(name, frozenset(servers) or EVERY, find))

    return add


# --- the files themselves -------------------------------------------------------------------------------------------


@rule("empty")
def _(shipped: Shipped) -> Iterator[str]:
    if not shipped.modules:
        yield "it holds no tensor of a LoRA adapter, so the base model would be served"


@rule("type")
def _(shipped: Shipped) -> Iterator[str]:
    kind = shipped.config.get("peft_type", "LORA" if shipped.is_diffusers else None)
    if kind != "LORA":
        yield f"peft_type is {kind!r}: it would be read as a plain LoRA (export it, or convert it first)"


@rule("half")
def _(shipped: Shipped) -> Iterator[str]:
    for name, parts in shipped.modules.items():
        if len(parts) < 2:
            yield f"{name!r} has only its {next(iter(parts))}"


@rule("rank zero")
def _(shipped: Shipped) -> Iterator[str]:
    for name, parts in shipped.modules.items():
        if any(0 in tensor.shape for tensor in parts.values()):
            yield f"{name!r} has a tensor without entries"
    for name, rank in (shipped.config.get("rank_pattern") or {}).items():
        if not isinstance(rank, int) or rank < 1:
            yield f"rank_pattern gives {name!r} rank {rank!r}"


@rule("shape")
def _(shipped: Shipped) -> Iterator[str]:
    for name, parts in shipped.modules.items():
        for part, tensor in parts.items():
            if tensor.dim() not in (2, 4):
                yield f"{part} of {name!r} is no matrix: its shape is {tuple(tensor.shape)}"


@rule("rank of the config")
def _(shipped: Shipped) -> Iterator[str]:
    for name, parts in shipped.whole.items():
        ranks = {parts["A"].shape[0], parts["B"].shape[1]}
        if ranks != {shipped.rank(name)}:
            yield f"{name!r} should have rank {shipped.rank(name)} by the config; its tensors have {sorted(ranks)}"


@rule("not finite")
def _(shipped: Shipped) -> Iterator[str]:
    for key in shipped.not_finite():
        yield f"{key!r} holds NaN or infinity, which would spoil other adapters' answers too"


@rule("dtype")
def _(shipped: Shipped) -> Iterator[str]:
    for key, tensor in shipped.tensors.items():
        if not tensor.dtype.is_floating_point:
            yield f"{key!r} is of {tensor.dtype}"


@rule("prefix")
def _(shipped: Shipped) -> Iterator[str]:
    prefix = "unet. or transformer." if shipped.is_diffusers else "base_model.model."
    if shipped.without_prefix:
        yield f"{shipped.without_prefix[0]!r} lacks the prefix {prefix}, so it would match nothing"


@rule("diffusers' file", "vllm", "sglang", "llama.cpp", "peft")
def _(shipped: Shipped) -> Iterator[str]:
    if shipped.is_diffusers:
        yield "it is in diffusers' form, without a config of its own"


@rule("target modules", "vllm", "sglang", "llama.cpp", "peft")
def _(shipped: Shipped) -> Iterator[str]:
    config = shipped.lora_config
    if config is None or not config.target_modules:
        yield "the config is none that PEFT's LoRA can read"
        return
    for name in shipped.modules:
        if not check_target_module_exists(config, name):
            yield f"{name!r} has tensors and is none of the config's target_modules: some loaders would leave it out"


# --- the base model -------------------------------------------------------------------------------------------------


@rule("unknown module")
def _(shipped: Shipped) -> Iterator[str]:
    for name in shipped.modules:
        if shipped.base is not None and name not in shipped.base:
            yield f"the base model has no module {name!r}, so its update would be left out"


@rule("width")
def _(shipped: Shipped) -> Iterator[str]:
    for name, parts in shipped.whole.items():
        wanted = (shipped.base or {}).get(name)
        found = (parts["B"].shape[0], parts["A"].shape[1:].numel())
        if wanted not in (None, found):
            yield f"{name!r} is {wanted} in the base model and {found} in the adapter"


@rule("base model named", "llama.cpp")
def _(shipped: Shipped) -> Iterator[str]:
    if not shipped.config.get("base_model_name_or_path"):
        yield "base_model_name_or_path is not set, and the converter asks for it (or for --base)"


# --- what only PEFT understands -------------------------------------------------------------------------------------


@rule("DoRA", "vllm", "sglang", "llama.cpp")
def _(shipped: Shipped) -> Iterator[str]:
    if shipped.config.get("use_dora") or any("lora_magnitude" in key for key in shipped.tensors):
        yield "it is a DoRA adapter, whose magnitudes would be refused or left out"


@rule("bias", "vllm", "sglang", "llama.cpp")
def _(shipped: Shipped) -> Iterator[str]:
    for key in ("bias", "lora_bias"):
        value = shipped.config.get(key)
        if value not in (None, False, "none"):
            yield f"{key} is {value!r}: trained biases are not served"


@rule("changed base", "vllm", "sglang", "llama.cpp")
def _(shipped: Shipped) -> Iterator[str]:
    start = shipped.config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().split("_")[0] in ("pissa", "olora", "corda", "loftq", "lora"):
        yield f"init_lora_weights is {start!r}: the update is meant for a changed base model"


@rule("other kinds", "vllm", "sglang", "llama.cpp")
def _(shipped: Shipped) -> Iterator[str]:
    for key in ("alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "trainable_token_indices"):
        if shipped.config.get(key):
            yield f"{key} is set, which no server computes"


@rule("modules trained in full", "vllm")
def _(shipped: Shipped) -> Iterator[str]:
    for name in shipped.config.get("modules_to_save") or ():
        if name not in ("classifier", "score"):
            yield f"modules_to_save names {name!r}; vLLM takes classifier and score only"


@rule("modules trained in full", "sglang", "llama.cpp", "diffusers")
def _(shipped: Shipped) -> Iterator[str]:
    if shipped.config.get("modules_to_save"):
        yield f"modules_to_save names {shipped.config['modules_to_save']}, which it does not load"


@rule("foreign tensors", "vllm", "sglang", "llama.cpp", "diffusers")
def _(shipped: Shipped) -> Iterator[str]:
    in_full = tuple(shipped.config.get("modules_to_save") or ())
    for key in shipped.others:
        frozen = ".base_layer." in key  # PEFT saves it beside an adapted embedding; servers pass it by
        if not frozen and not any(f".{name}." in f".{key}" for name in in_full):
            yield f"{key!r} is no tensor of a LoRA adapter"


# --- scales and ranks -----------------------------------------------------------------------------------------------


@rule("rank limit", "vllm")
def _(shipped: Shipped) -> Iterator[str]:
    if shipped.largest_rank > VLLM_RANKS[-1]:
        yield f"rank {shipped.largest_rank} is above {VLLM_RANKS[-1]}, the most vLLM can be started with"


@rule("rsLoRA", "sglang", "llama.cpp")
def _(shipped: Shipped) -> Iterator[str]:
    if shipped.config.get("use_rslora"):
        yield "use_rslora is set and would be ignored: the update would be scaled by lora_alpha / r"


@rule("alpha per module", "sglang", "llama.cpp")
def _(shipped: Shipped) -> Iterator[str]:
    if shipped.config.get("alpha_pattern"):
        yield "alpha_pattern is set and would be ignored: those updates would have another scale"


@rule("rank per module", "sglang")
def _(shipped: Shipped) -> Iterator[str]:
    if shipped.config.get("rank_pattern"):
        yield "rank_pattern is set, and it reads r alone: export the uniform layout"


# --- SGLang's buffers -----------------------------------------------------------------------------------------------


@rule("convolution", "vllm", "sglang", "llama.cpp")
def _(shipped: Shipped) -> Iterator[str]:
    for name, parts in shipped.whole.items():
        if parts["A"].dim() == 4:
            yield f"{name!r} is a convolution, which it does not adapt"


@rule("added tokens", "sglang")
def _(shipped: Shipped) -> Iterator[str]:
    if (shipped.folder / "added_tokens.json").exists():
        yield "added_tokens.json lies beside it, and adapters with tokens of their own are refused"


@rule("regular expression", "sglang")
def _(shipped: Shipped) -> Iterator[str]:
    targets = shipped.config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        yield f"target_modules is the expression {targets!r}; it takes a list of names"


@rule("modules kept together", "sglang")
def _(shipped: Shipped) -> Iterator[str]:
    for parent, names in shipped.siblings().items():
        for name in missing_beside(names):
            yield f"{parent!r} adapts {', '.join(sorted(names))} and not {name}, which it keeps in one buffer with them"


def missing_beside(names: set[str]) -> list[str]:
    """Modules that SGLang wants beside `names` of one parent: q with k or v, v with q, gate with up."""
    missing = []
    if names & {"k_proj", "v_proj"} and "q_proj" not in names:
        missing.append("q_proj")
    if names & {"q_proj", "k_proj"} and "v_proj" not in names:
        missing.append("v_proj")
    if "up_proj" in names and "gate_proj" not in names:
        missing.append("gate_proj")
    return missing


# --- diffusers ------------------------------------------------------------------------------------------------------


@rule("diffusers' names", "diffusers")
def _(shipped: Shipped) -> Iterator[str]:
    if not shipped.is_diffusers:
        yield "a PEFT folder would be loaded without effect: its keys must begin with unet. or transformer."


@rule("diffusers' scale", "diffusers")
def _(shipped: Shipped) -> Iterator[str]:
    if not shipped.is_diffusers or shipped.has_metadata:
        return
    for name in shipped.whole:
        if shipped.scale(name) != 1:
            yield f"{name!r} has scale {shipped.scale(name):g}, and without lora_adapter_metadata 1 is taken"
            return


# --- names ----------------------------------------------------------------------------------------------------------


@rule("odd names")
def _(shipped: Shipped) -> Iterator[str]:
    for name in shipped.modules:
        if not NAME.fullmatch(name):
            yield f"{name!r} is no name of a module"
