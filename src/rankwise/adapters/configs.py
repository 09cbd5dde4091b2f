"""The config classes: PEFT's fields and a method's hyper-parameters in one dataclass.

One class line per method. A config *is* its method (`SoraConfig` is a `Sora`), so that whatever holds the config can
ask it for the maths.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import LoraConfig as PeftLora
from peft import PeftConfig
from peft.utils.other import get_pattern_key

from rankwise.checks import require_bool, require_number
from rankwise.errors import AdapterFileError, ArgumentError
from rankwise.methods import adalora, alora, deep, lora, nblora, nnm, salora, sora, sorsa
from rankwise.methods.base import Method
from rankwise.methods.stack import Size

FORMAT = 2
"""Version of the saved form. An adapter of a later format is refused, not guessed at.

1: the first. 2: holds which ranks are closed, and the peak learning rates that were seen."""
READABLE = (1, FORMAT)
"""The versions that are read."""


PEFT_FIELDS = {each.name for each in fields(PeftLora)}
"""What PEFT's LoRA can be told."""


class MethodType(str):
    """A `peft_type` from outside PEFT's enum: the string, with the attributes PEFT and transformers ask an enum for."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The string itself."""
        return str.__str__(self)

    @property
    def name(self) -> str:
        """The string itself."""
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


@dataclass
class AdapterConfig(Method, PeftConfig):
    """Fields that all methods share, named as in PEFT's `LoraConfig`.

    Raises:
        ArgumentError: when made, for the first field that breaks its rule.
        AdapterFileError: when read from a file of an unknown format.
    """

    lora_alpha: float | None = field(default=None, metadata={"help": "the update's scale is lora_alpha / r; None: r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the input of the update"})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": 'module names, a regular expression, or "all-linear"'}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "names to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layer indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the layers' ModuleList"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained in full beside"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "rows of an embedding trained in full beside, by PEFT"}
    )
    bias: str = field(default="none", metadata={"help": '"none", "all" or "lora_only"'})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "name or pattern → starting rank"})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "name or pattern → lora_alpha"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / √r"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "accepted for stock scripts; found from the layer"})
    init_weights: bool = field(default=True, metadata={"help": "False: a random non-zero start, for tests"})
    init_lora_weights: bool | None = field(default=None, metadata={"help": "PEFT's older spelling of init_weights"})
    rankwise_format: int | None = field(default=None, metadata={"help": "version of the saved form; set on saving"})

    summary: ClassVar[str] = ""

    def __new__(cls, *_: Any, **given: Any) -> AdapterConfig:
        """Refuse what only PEFT's LoRA has in a sentence: scripts written for it bring such fields along."""
        known = {each.name for each in fields(cls)}
        for name, value in given.items():
            if name in PEFT_FIELDS - known:
                rule = f"be left out of {cls.__name__}: it belongs to PEFT's own LoRA"
                raise ArgumentError(name, rule, value)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self)  # type: ignore[assignment]  PEFT's enum is closed; see MethodType
        self.from_file = self.rankwise_format is not None
        self._check_format()
        self._read_spellings()
        self._check_shared()
        self.check()

    def _check_format(self) -> None:
        self.rankwise_format = FORMAT if self.rankwise_format is None else self.rankwise_format
        if self.rankwise_format not in READABLE:
            raise AdapterFileError(
                f"the adapter was saved in format {self.rankwise_format!r} and this rankwise reads formats 1 to "
                f"{FORMAT}"
            )

    def _read_spellings(self) -> None:
        if self.init_lora_weights is not None:
            if not isinstance(self.init_lora_weights, bool):
                raise ArgumentError(
                    "init_lora_weights", "be True or False: the method sets its own start", self.init_lora_weights
                )
            self.init_weights, self.init_lora_weights = self.init_lora_weights, None
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if not isinstance(names, str | list | set | tuple | None):
                raise ArgumentError(name, "be module names or a regular expression", names)
            if isinstance(names, list | tuple):
                setattr(self, name, set(names))
        if not self.scaled and not self.from_file and (self.lora_alpha is not None or self.use_rslora):
            warnings.warn(
                f"{type(self).__name__} has no lora_alpha / r scale: lora_alpha and use_rslora are ignored",
                stacklevel=4,
            )

    def _check_shared(self) -> None:
        if self.lora_alpha is not None:
            require_number("lora_alpha", self.lora_alpha, least=1e-30)
        require_number("lora_dropout", self.lora_dropout, below=1.0)
        for name in ("use_rslora", "fan_in_fan_out", "init_weights"):
            require_bool(name, getattr(self, name))
        if self.bias not in ("none", "all", "lora_only"):
            raise ArgumentError("bias", 'be "none", "all" or "lora_only"', self.bias)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ArgumentError(
                "layers_to_transform", "be left out when target_modules is a string", self.layers_to_transform
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ArgumentError("layers_pattern", "come with layers_to_transform", self.layers_pattern)
        self._check_patterns()

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise ArgumentError(name, "map names or patterns to numbers", getattr(self, name))
        for pattern, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ArgumentError(
                    f"rank_pattern[{pattern!r}]", "be a whole number ≥ 1 (leave modules out with exclude_modules)", rank
                )
        for pattern, alpha in self.alpha_pattern.items():
            require_number(f"alpha_pattern[{pattern!r}]", alpha, least=1e-30)

    def rank_of(self, module: str) -> int:
        """The rank a module starts with, by its name in the base model."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.start_rank)

    def size_of(self, module: str, out: int, into: int) -> Size:
        """The size of a module's adapter, the rank clamped to the layer's own."""
        r = min(self.rank_of(module), out, into)
        return Size(out, into, min(self.capacity(r), out, into), r)

    def scale_of(self, module: str) -> float:
        """A module's lora_alpha / r (or / √r), with lora_alpha = r where none is given; 1 for a method without it."""
        r = self.rank_of(module)
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), module), self.lora_alpha or r)
        return alpha / (r**0.5 if self.use_rslora else r) if self.scaled else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The config as it is saved: plain JSON values."""
        bare = copy.copy(self)  # what only this process can hold (a batch, a function) is not saved
        for entry in fields(self):
            if entry.metadata.get("saved") is False:
                setattr(bare, entry.name, None)
        plain = PeftConfig.to_dict(bare)
        plain["peft_type"] = self.peft_type.value  # type: ignore[union-attr]
        plain["rankwise_format"] = FORMAT
        return plain


def peft_type(config: type[Method] | Method) -> MethodType:
    """The namespaced type string of a config: RANKWISE_SORA."""
    return MethodType(f"RANKWISE_{config.method.upper()}")


# One class line per method. The decorator makes editors, type checkers and pickle know the fields.


@dataclass
class LoraConfig(AdapterConfig, lora.Lora):
    """LoRA, the baseline; drop-in for `peft.LoraConfig`."""


@dataclass
class NnmLoraConfig(AdapterConfig, nnm.Nnm):
    """NNM-LoRA: LoRA with the nuclear norm of A maximised."""


@dataclass
class AdaLoraConfig(AdapterConfig, adalora.AdaLora):
    """AdaLoRA: one budget of ranks shared over all modules. `r` means target_r; init_r is ⌈1.5 r⌉ unless given."""


@dataclass
class SoraConfig(AdapterConfig, sora.Sora):
    """SoRA: gates closed to exactly 0 by a proximal step."""


@dataclass
class AloraConfig(AdapterConfig, alora.Alora):
    """ALoRA, allocating LoRA: rounds of ablation move ranks between modules."""


@dataclass
class SaloraConfig(AdapterConfig, salora.Salora):
    """SaLoRA, structure-aware LoRA: random gates under a density constraint."""


@dataclass
class SorsaConfig(AdapterConfig, sorsa.Sorsa):
    """SORSA: trains the principal singular triplets of the base weight, held as an offset."""


@dataclass
class NbLoraConfig(AdapterConfig, nblora.NbLora):
    """NB-LoRA: an update whose singular values are bounded by construction."""


@dataclass
class DeepLoraConfig(AdapterConfig, deep.Deep):
    """Deep LoRA: a deep product of square factors in a subspace told by the first gradient."""


CONFIGS: dict[str, type[AdapterConfig]] = {
    config.method: config
    for config in list(globals().values())
    if isinstance(config, type) and issubclass(config, AdapterConfig) and config is not AdapterConfig
}
"""Every config class by its method's name."""
