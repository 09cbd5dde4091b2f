"""Stock PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rankwise.export.lora_config import alpha_of
from rankwise.export.servers import rules
from rankwise.export.servers.base import Problem, Server, rule

if TYPE_CHECKING:
    from rankwise.export.reader import AdapterFiles

SETTLED_BY_LOADING = {
    found.name
    for found in (
        rules.no_matrix,
        rules.another_rank_than_the_configs,
        rules.no_prefix,
        rules.tensors_outside_the_target_modules,
        rules.unknown_module,
        rules.another_width,
    )
}
"""Rules about names and shapes, which PEFT itself answers where the base model opens: it knows older names of modules,
experts that were fused later, and every kind of layer."""


VOCABULARY = "vocabulary"
"""The rule about base models whose vocabulary must grow first."""


@rule(VOCABULARY)
def another_vocabulary(files: AdapterFiles) -> Iterator[str]:
    """PEFT loads embeddings of the model's own size alone."""
    if files.base is not None and files.base.vocabulary is not None:
        before, after = files.base.vocabulary
        yield (
            f"the base model has {before} tokens and the adapter {after}: resize_token_embeddings({after}) must be "
            "called before it is loaded"
        )


@rule("stray alpha")
def alpha_unlike_the_configs(files: AdapterFiles) -> Iterator[str]:
    """PEFT takes scales from the config alone."""
    for name, alpha in files.alphas.items():
        by_config = alpha_of(files.config, name)
        if alpha != by_config:
            yield f"{name + '.alpha'!r} is {alpha:g}, and PEFT scales by the config's lora_alpha, {by_config}"


class PEFT(Server):
    """Loads its own folders, of any layout and kind."""

    name = "peft"
    title = "PEFT"
    start_command = 'PeftModel.from_pretrained(base, "{folder}")'
    rules = (*rules.OF_PEFT_FOLDERS, another_vocabulary, alpha_unlike_the_configs)

    def problems(self, files: AdapterFiles) -> list[Problem]:
        """What breaks a rule; where the base model opens, PEFT's own loading decides on names and shapes."""
        found = super().problems(files)
        left_out = None if files.base is None else files.base.left_out_by_peft(files.folder)
        if left_out is None:
            return found
        if not left_out:
            return [problem for problem in found if problem.rule not in SETTLED_BY_LOADING]
        is_explained = any(problem.rule in SETTLED_BY_LOADING for problem in found)
        return found if is_explained else [*found, *(Problem("loading", sentence) for sentence in left_out)]
