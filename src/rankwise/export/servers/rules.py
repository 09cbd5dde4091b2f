"""Rules that several servers share: one a trap, whether the server refuses such files or silently computes otherwise.

A rule reads the files as they lie in the folder and says, in one sentence, what the server would make of them. The
rules were found by loading such adapters into vLLM 0.32, llama.cpp, SGLang 0.5.23 and diffusers 0.42. A rule of one
server alone stands in that server's file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rankwise.export.lora_config import MODULE_NAME
from rankwise.export.servers.base import rule

if TYPE_CHECKING:
    from rankwise.export.reader import AdapterFiles

STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora")
"""First words of the values of `init_lora_weights` whose updates are meant for a changed base model."""
EMBEDDINGS = ("embed_tokens", "lm_head")
"""The layers that PEFT's `save_embedding_layers` saves beside an adapter."""
OTHER_KINDS = (
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "trainable_token_indices",
)
"""Fields of PEFT's LoraConfig that only PEFT computes."""


# --- the files themselves -------------------------------------------------------------------------------------------


@rule("empty")
def no_tensors(files: AdapterFiles) -> Iterator[str]:
    """A loader finds nothing to apply."""
    if not files.modules:
        yield "it holds no tensor of a LoRA adapter, so the base model would be served"


@rule("type")
def another_kind_of_adapter(files: AdapterFiles) -> Iterator[str]:
    """Servers read every file as a LoRA, whatever made it."""
    kind = files.config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {kind!r}: it would be read as a plain LoRA (export it, or convert it first)"


@rule("half")
def half_an_update(files: AdapterFiles) -> Iterator[str]:
    """One factor without the other is no update."""
    for name, parts in files.modules.items():
        if len(parts) < 2:
            yield f"{name!r} has only its {next(iter(parts))}"


@rule("rank zero")
def rank_zero(files: AdapterFiles) -> Iterator[str]:
    """PEFT and vLLM refuse rank 0, and llama.cpp aborts on it."""
    for name, parts in files.modules.items():
        if any(0 in tensor.shape for tensor in parts.values()):
            yield f"{name!r} has a tensor without entries"
    for name, rank in (files.config.get("rank_pattern") or {}).items():
        if not isinstance(rank, int) or rank < 1:
            yield f"rank_pattern gives {name!r} rank {rank!r}"


@rule("shape")
def no_matrix(files: AdapterFiles) -> Iterator[str]:
    """Factors are matrices, or the kernels of convolutions."""
    for name, parts in files.modules.items():
        for part, tensor in parts.items():
            if not 2 <= tensor.dim() <= 5:
                yield f"{part} of {name!r} is no matrix: its shape is {tuple(tensor.shape)}"


@rule("rank of the config")
def another_rank_than_the_configs(files: AdapterFiles) -> Iterator[str]:
    """PEFT makes its layers by the config's rank, and loads no others."""
    for name, parts in files.whole.items():
        wanted = files.rank(name)
        found = {parts["A"].shape[0], parts["B"].shape[1]}
        if found != {wanted} and not files.is_of_parameters(name):
            yield f"{name!r} should have rank {wanted} by the config; its tensors have {sorted(found)}"


@rule("not finite")
def not_finite(files: AdapterFiles) -> Iterator[str]:
    """One adapter's NaN reaches requests to other adapters."""
    for key in files.not_finite():
        yield f"{key!r} holds NaN or infinity, which would spoil other adapters' answers too"


@rule("dtype")
def no_real_numbers(files: AdapterFiles) -> Iterator[str]:
    """Factors are real numbers."""
    for key, tensor in files.tensors.items():
        if not tensor.dtype.is_floating_point:
            yield f"{key!r} is of {tensor.dtype}"


@rule("prefix")
def no_prefix(files: AdapterFiles) -> Iterator[str]:
    """Loaders find modules by what follows the prefix."""
    if files.without_prefix:
        yield f"{files.without_prefix[0]!r} lacks the prefix base_model.model., so it would match nothing"


@rule("wrappers' names")
def wrappers_in_names(files: AdapterFiles) -> Iterator[str]:
    """Loaders look for the modules of a model that nothing is wrapped around."""
    if files.wrapped:
        yield f"{files.wrapped[0]!r} has a wrapper's name in it, so it would match nothing: `rankwise fix` removes it"


@rule("two names")
def tensors_named_twice(files: AdapterFiles) -> Iterator[str]:
    """Which of two tensors a loader takes depends on their order."""
    for first, second in files.twice:
        yield f"{first!r} and {second!r} are two names of one tensor"


@rule("odd names")
def odd_names(files: AdapterFiles) -> Iterator[str]:
    """A module's name that is a path may lead anywhere."""
    for name in files.modules:
        if not MODULE_NAME.fullmatch(name):
            yield f"{name!r} is no name of a module"


# --- the base model -------------------------------------------------------------------------------------------------


@rule("unknown module")
def unknown_module(files: AdapterFiles) -> Iterator[str]:
    """What matches no module of the base model is left out in silence."""
    for name in files.modules:
        if files.lacks(name):
            today = None if files.base is None else files.base.name_today(name)
            hint = f": it is {today!r} today, which `rankwise fix` writes" if today else ""
            yield f"the base model has no module {name!r}, so its update would be left out{hint}"


@rule("width")
def another_width(files: AdapterFiles) -> Iterator[str]:
    """The factors must fit the base model's weight."""
    for name, parts in files.whole.items():
        wanted = None if files.base is None else files.base.shapes.get(name)
        found = (parts["B"].shape[0], parts["A"].shape[1:].numel())
        if wanted not in (None, found):
            yield f"{name!r} is {wanted} in the base model and {found} in the adapter"


OF_EVERY_SERVER = (
    no_tensors,
    another_kind_of_adapter,
    half_an_update,
    rank_zero,
    no_matrix,
    another_rank_than_the_configs,
    not_finite,
    no_real_numbers,
    no_prefix,
    wrappers_in_names,
    tensors_named_twice,
    odd_names,
    unknown_module,
    another_width,
)


# --- PEFT's folders -------------------------------------------------------------------------------------------------


@rule("diffusers' file")
def file_of_diffusers(files: AdapterFiles) -> Iterator[str]:
    """Only diffusers loads such a file."""
    if files.is_of_pipeline:
        yield "it is in diffusers' form, without a config of its own"


@rule("target modules")
def tensors_outside_the_target_modules(files: AdapterFiles) -> Iterator[str]:
    """Some loaders take what the config names, and others what the file holds."""
    if not files.is_readable_by_peft:
        yield "the config is none that PEFT's LoRA can read"
        return
    for name in files.modules:
        if not files.is_target(name) and not files.is_of_parameters(name):
            yield f"{name!r} has tensors and is none of the config's target_modules: some loaders would leave it out"


OF_PEFT_FOLDERS = (*OF_EVERY_SERVER, file_of_diffusers, tensors_outside_the_target_modules)


# --- what only PEFT computes ----------------------------------------------------------------------------------------


@rule("DoRA")
def dora(files: AdapterFiles) -> Iterator[str]:
    """Servers have no magnitudes."""
    if files.config.get("use_dora") or any("lora_magnitude" in key for key in files.tensors):
        yield "it is a DoRA adapter, whose magnitudes would be refused or left out"


@rule("bias")
def trained_biases(files: AdapterFiles) -> Iterator[str]:
    """Servers have no biases beside an update."""
    for key in ("bias", "lora_bias"):
        value = files.config.get(key)
        if value not in (None, False, "none"):
            yield f"{key} is {value!r}: trained biases are not served"


@rule("changed base")
def update_of_a_changed_base(files: AdapterFiles) -> Iterator[str]:
    """Such a start changes the base model's weights, which a server does not."""
    start = files.config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().split("_")[0] in STARTS_THAT_CHANGE_THE_BASE:
        yield f"init_lora_weights is {start!r}: the update is meant for a changed base model"


@rule("other kinds")
def what_only_peft_computes(files: AdapterFiles) -> Iterator[str]:
    """PEFT's kinds of LoRA that are more than updates of modules."""
    for key in OTHER_KINDS:
        if files.config.get(key):
            yield f"{key} is set, which no server computes"


@rule("fused experts")
def updates_of_parameters(files: AdapterFiles) -> Iterator[str]:
    """How a server lays out fused experts depends on the model."""
    if files.config.get("target_parameters"):
        yield "target_parameters is set, and whether it computes updates of fused experts is not known here"


@rule("convolution")
def convolution(files: AdapterFiles) -> Iterator[str]:
    """Servers of language models adapt linear layers and embeddings."""
    for name, parts in files.whole.items():
        if parts["A"].dim() > 2:
            yield f"{name!r} is a convolution, which it does not adapt"


@rule("stray alpha")
def alpha_beside_the_tensors(files: AdapterFiles) -> Iterator[str]:
    """Files of kohya's and diffusers' hold scales as tensors, which readers of PEFT's folders do not know."""
    for name in files.alphas:
        yield f"{name + '.alpha'!r} is a scale beside the tensors, which it refuses: a PEFT folder has it in the config"


def foreign_keys(files: AdapterFiles) -> Iterator[str]:
    """The keys of tensors that neither are factors nor belong to a module of `modules_to_save`."""
    for key in files.others:
        # PEFT saves the frozen weight beside an adapted embedding, and servers pass it by.
        is_frozen = ".base_layer." in key
        is_trained_in_full = any(f".{name}." in f".{key}" for name in files.config.get("modules_to_save") or ())
        if not is_frozen and not is_trained_in_full:
            yield key


def is_saved_embedding(key: str) -> bool:
    """Whether a tensor is an embedding of the base model's, which PEFT saves where `save_embedding_layers` is set."""
    return key.endswith(tuple(f"{name}.weight" for name in EMBEDDINGS))


@rule("foreign tensors")
def foreign_tensors(files: AdapterFiles) -> Iterator[str]:
    """Servers refuse, or leave out, tensors that are no factors."""
    for key in foreign_keys(files):
        if is_saved_embedding(key):
            yield f"{key!r} is a weight of the base model, which it refuses: save with save_embedding_layers=False"
        else:
            yield f"{key!r} is no tensor of a LoRA adapter"


@rule("an adapter's name")
def adapter_named_in_keys(files: AdapterFiles) -> Iterator[str]:
    """PEFT alone reads keys of the adapter `default`."""
    if files.named:
        yield f"{files.named[0]!r} has an adapter's name in it, which it does not know: `rankwise fix` removes it"


OF_PLAIN_UPDATES = (
    *OF_PEFT_FOLDERS,
    adapter_named_in_keys,
    dora,
    trained_biases,
    update_of_a_changed_base,
    what_only_peft_computes,
    updates_of_parameters,
    convolution,
    alpha_beside_the_tensors,
)
"""Of the servers that compute nothing but updates of linear layers."""


# --- modules trained in full, scales and ranks ----------------------------------------------------------------------


@rule("modules trained in full")
def modules_trained_in_full(files: AdapterFiles) -> Iterator[str]:
    """Servers load updates, and no modules in their place."""
    if files.config.get("modules_to_save"):
        yield f"modules_to_save names {files.config['modules_to_save']}, which it does not load"


@rule("rsLoRA")
def rslora_scale(files: AdapterFiles) -> Iterator[str]:
    """Rank-stabilised LoRA scales by lora_alpha / √r."""
    if files.config.get("use_rslora"):
        yield "use_rslora is set and would be ignored: the update would be scaled by lora_alpha / r"


@rule("alpha per module")
def alpha_per_module(files: AdapterFiles) -> Iterator[str]:
    """Only the config's lora_alpha is read."""
    if files.config.get("alpha_pattern"):
        yield "alpha_pattern is set and would be ignored: those updates would have another scale"
