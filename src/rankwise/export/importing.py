"""A plain LoRA goes on training under a method that adapts its ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from rankwise.adapters.configs import AdapterConfig
from rankwise.adapters.lookup import adapted_layers
from rankwise.errors import AdapterFileError, ArgumentError
from rankwise.export.adapter import Adapter
from rankwise.export.names_today import with_names_of
from rankwise.export.reader import read_lora


@torch.no_grad()
def import_lora(model: nn.Module, folder: str | Path, config: AdapterConfig, adapter: str = "default") -> PeftModel:
    """Go on training a plain LoRA under another method, from outputs that are the adapter's own.

    Args:
        model: the base model, or one that carries adapters already.
        folder: a plain LoRA adapter, as PEFT or `export_lora` writes it.
        config: of LoRA, NNM-LoRA, AdaLoRA, SoRA, ALoRA or SaLoRA. Its rank holds the adapter's largest or more; ranks
            beyond a module's own start at an update of zero. Without `target_modules`, the adapter's modules.
        adapter: its name in the model.

    Returns:
        The adapted model, whose updates equal the adapter's to rounding.

    Raises:
        ArgumentError: the method's form cannot hold a given update; the config has too little rank, or misses a module.
        AdapterFileError: the folder holds no whole plain LoRA.

    Example:
        >>> import tempfile, torch, rankwise
        >>> from peft import get_peft_model
        >>> folder = tempfile.mkdtemp() + "/lora"
        >>> plain = rankwise.LoraConfig(r=2, target_modules=["0"], init_weights=False)
        >>> trained = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), plain)
        >>> _ = rankwise.export_lora(trained, folder)
        >>> net, config = torch.nn.Sequential(torch.nn.Linear(6, 5)), rankwise.SoraConfig(r=4)
        >>> rankwise.ranks(rankwise.import_lora(net, folder, config))
        {'0': 4}
    """
    plain = read_lora(Path(folder))
    plain = with_names_of(model.get_base_model() if isinstance(model, PeftModel) else model, plain, Path(folder))
    config = _completed(config, plain)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
        model.set_adapter(adapter)
    else:
        model = get_peft_model(model, config, adapter_name=adapter)  # type: ignore[arg-type,assignment]
    layers = adapted_layers(model, adapter)
    unknown = sorted(plain.updates.keys() - layers.keys())
    if unknown:
        raise ArgumentError("target_modules", f"include every module of the adapter, {unknown[0]!r} for one", unknown)
    for name, layer in layers.items():
        tensors, update = layer.started(adapter), plain.updates.get(name)
        if update is None:
            continue
        if update.kept().r > tensors.size.started:
            raise ArgumentError("r", f"be at least the adapter's rank at {name!r}, {update.kept().r}", config.r)
        taken = config.take_up(tensors.size, update.kept(), layer.scaling[adapter], tensors.named())
        tensors.fill(taken)
    _load_others(model, plain.others, adapter)
    return model  # type: ignore[return-value]


def _completed(config: AdapterConfig, plain: Adapter) -> AdapterConfig:
    """The config with what it leaves open taken from the adapter."""
    config = copy.copy(config)
    if config.target_modules is None:
        config.target_modules = set(plain.updates)
    if config.modules_to_save is None and plain.config.get("modules_to_save"):
        config.modules_to_save = list(plain.config["modules_to_save"])
    config.task_type = config.task_type or plain.config.get("task_type")
    return config


def _load_others(model: nn.Module, others: dict[str, Tensor], adapter: str) -> None:
    if others:
        state = get_peft_model_state_dict(model, adapter_name=adapter)
        try:
            set_peft_model_state_dict(model, state | others, adapter_name=adapter)
        except RuntimeError as error:
            raise AdapterFileError(
                f"modules trained in full do not fit the model: {str(error).splitlines()[-1]}"
            ) from error
