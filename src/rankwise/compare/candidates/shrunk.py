"""Plain LoRA at a large rank, shrunk to the budget's size once it is trained: what needs no rank-adaptive method."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from rankwise.compare.candidates.adapter import AdapterCandidate
from rankwise.compare.candidates.base import Measured
from rankwise.compare.spec import Entry, Spec
from rankwise.compare.together import as_first, is_first
from rankwise.errors import ArgumentError
from rankwise.export.lora import export_lora
from rankwise.export.reader import read_lora
from rankwise.export.shrink import shrink_adapter

SHRUNK = "shrunk"
LARGER = 8
"""How many times the budget's rank is trained, unless the entry gives r."""


class ShrunkCandidate(AdapterCandidate):
    """LoRA at a large rank, cut to as many numbers as LoRA has at the budget's rank, and scored after the cut.

    Ranks go where they lose least: the cut minimises Σ ‖ΔW' − ΔW‖_F² over all modules (`rankwise.shrink_adapter`).
    """

    budget_rank: int
    """The rank whose size the shrunk adapter must not exceed."""

    @classmethod
    def of(cls, spec: Spec, entry: Entry) -> ShrunkCandidate:
        """The candidate of a SPEC's entry, which may have every field of LoRA.

        Raises:
            ArgumentError: LoRA has no such field, or a value breaks its rule.
        """
        fields = {"r": LARGER * spec.budget.r} | entry.fields
        if isinstance(fields["r"], int) and fields["r"] <= spec.budget.r:
            rule = f"be larger than budget.r, {spec.budget.r}, to which it is cut"
            raise ArgumentError(f"{SHRUNK}.r", rule, fields["r"])
        candidate = super().of(spec, Entry.model_validate({"name": "lora"} | fields))
        assert isinstance(candidate, cls)
        candidate.name = SHRUNK
        candidate.fields = candidate.fields | {"r": fields["r"]}
        candidate.budget_rank = spec.budget.r
        return candidate

    def finish(self, model: Any, output: Path, key: str, command: str) -> nn.Module:
        """Save the large adapter, write the shrunk one as the export, and put that into the model in its place."""
        export = output / "exports" / key
        if is_first():
            self.save_adapter(model, output, key, command)
            with tempfile.TemporaryDirectory() as folder:
                large = Path(folder) / "large"
                export_lora(model, large, command=command)
                updates = read_lora(large).updates.values()
                numbers_of_rank_1 = sum(len(update.B) + update.A.shape[1] for update in updates)
                shrink_adapter(large, export, budget=self.budget_rank * numbers_of_rank_1, overwrite=True)
        # Every process waits here for the file that the first one has written.
        place = as_first(str(export))
        self._initial = sum(parameter.numel() for parameter in self.own_parameters(model))
        self._shrunk = read_lora(Path(place)).updates
        self._modules = list(self.ranks(model))
        return PeftModel.from_pretrained(model.unload(), place)

    def measure(self, model: nn.Module) -> Measured:
        """Sizes, ranks and spectra of the shrunk adapter; modules that lost their whole update have rank 0."""
        ranks = {name: 0 for name in self._modules} | {name: update.r for name, update in self._shrunk.items()}
        size = sum(update.B.numel() + update.A.numel() for update in self._shrunk.values())
        return Measured(
            parameters={"initial": self._initial, "final": size, "exported": size},
            ranks=ranks,
            exported_ranks=ranks,
            singular_values={name: update.singular_values().tolist() for name, update in self._shrunk.items()},
        )

    def save(self, model: Any, output: Path, key: str, command: str) -> str:
        """The folder that `finish` has written."""
        return str(Path("exports") / key)
