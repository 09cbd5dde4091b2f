"""What a comparison was asked for, in a file beside its results.

A folder may hold results of several SPECs: of one that was edited, or of files that were put together. Only this file
tells which of them belong to one comparison, and at which learning rates it looked, those included that failed.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rankwise.compare.plan import Plan
from rankwise.errors import DataError
from rankwise.files import write_whole

FILE = "comparison.json"


class Asked(BaseModel):
    """The runs, the learning rates and the reference of a SPEC."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: tuple[str, ...]
    """The names of all result files that the comparison may have, without `.json`."""
    rates: dict[str, tuple[float, ...]]
    """For each label, the learning rates that were to be tried."""
    reference: str | None
    """The label that the SPEC compares all others with; None for plain LoRA, where it was run."""

    @classmethod
    def of(cls, plan: Plan) -> Asked:
        """What a plan asks for."""
        return cls(
            runs=tuple(run.key for choice in plan.choices for run in choice.runs),
            rates={choice.label: tuple(sorted({run.learning_rate for run in choice.runs})) for choice in plan.choices},
            reference=plan.spec.reference,
        )


def write_asked(asked: Asked, output: Path) -> None:
    """Write the file into the output folder of a comparison."""
    write_whole(output / FILE, json.dumps(asked.model_dump(), indent=1) + "\n")


def read_asked(output: Path) -> Asked | None:
    """What was asked for in this folder; None where there is no such file, as where results were put together by hand.

    Raises:
        DataError: the file is not what `write_asked` writes.
    """
    path = output / FILE
    if not path.is_file():
        return None
    try:
        return Asked.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise DataError(f"{path} is not whole: {error.errors()[0]['msg']}") from error
