"""What is known of a server: an object of its own, which the command line, the exports and the cards ask.

Nothing here imports torch, since the command line's help lists the servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from rankwise.export.reader import AdapterFiles

SERVERS: dict[str, Server] = {}
"""Every server by its name."""


class Problem(NamedTuple):
    """A rule that a folder breaks."""

    rule: str
    sentence: str


@dataclass(frozen=True)
class Rule:
    """Something that a server refuses, or accepts and then computes otherwise."""

    name: str
    find: Callable[[AdapterFiles], Iterable[str]]
    """A sentence for each place in the files that breaks the rule."""


def rule(name: str) -> Callable[[Callable[[AdapterFiles], Iterator[str]]], Rule]:
    """Function decorator: makes a rule of what finds the places that break it."""
    return lambda find: Rule(name, find)


class Server:
    """A program that loads LoRA adapters.

    A subclass that states `name`, `title` and `start_command` is registered. It then describes a server that loads
    PEFT's folders, has no limit on ranks and no rules; whatever differs is overridden.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """The name that the server gives itself."""
    start_command: ClassVar[str]
    """What loads an adapter, with {folder} for where it lies and {rank} for the rank limit."""
    rules: ClassVar[tuple[Rule, ...]] = ()
    has_rank_limit: ClassVar[bool] = False
    """Whether the server must be told, when it starts, the largest rank it will meet."""
    rank_limits: ClassVar[tuple[int, ...]] = ()
    """The values that this limit may have; empty if any."""
    loads_peft_folders: ClassVar[bool] = True
    """Whether it loads an adapter as PEFT writes it; otherwise it loads diffusers' file."""
    layouts: ClassVar[tuple[str, ...]] = ("uniform", "compact")
    """The layouts of an export that it loads."""
    written_for: ClassVar[str] = ""
    """What an export for it does besides, for the documentation."""
    hub_tag: ClassVar[str] = "peft"
    """The library that a model card names for an adapter written for this server."""
    load_code: ClassVar[str] = (
        "from peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "{folder}")  # stock PEFT; rankwise is not needed'
    )
    """The code that a model card shows for such an adapter, with {folder} for its folder."""

    def __init_subclass__(cls) -> None:
        SERVERS[cls.name] = cls()

    def rank_limit(self, rank: int) -> int:
        """The smallest rank limit that admits an adapter whose largest rank is `rank`; `rank` where none does."""
        return next((limit for limit in self.rank_limits if limit >= rank), rank)

    def modules_wanted_beside(self, names: set[str]) -> list[str]:
        """The modules that must have updates too, if need be of zero, where modules called `names` have them."""
        return []

    def rewrite(self, folder: Path, base_class: str) -> None:
        """Turn the PEFT adapter in `folder` into what this server loads.

        Args:
            folder: the adapter as PEFT writes it; changed in place.
            base_class: the name of the base model's class.

        Raises:
            RankwiseError: the server loads no adapter of such a base model.
        """

    def problems(self, files: AdapterFiles) -> list[Problem]:
        """Every place in an adapter's files that breaks one of this server's rules."""
        return [Problem(rule.name, sentence) for rule in self.rules for sentence in rule.find(files)]
