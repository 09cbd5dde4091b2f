"""One finished run as a file.

A result file is strict JSON (no NaN) and is written whole or not at all, so that a crash leaves only runs that are
really done. `schema` is the JSON schema of such a file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import TypedDict

from rankwise.compare.sections import dotted
from rankwise.errors import DataError
from rankwise.files import write_whole

FORMAT = 4

END_LOSSES = 5
"""How many logged losses each end of a run's curve is judged by, where there are enough."""

Curve = list[tuple[int, float]]
"""Values by optimiser step: (step, value), where the value was finite."""


class Parameters(TypedDict):
    """Numbers of the adapter, the task head left out."""

    initial: int
    """What trained at the start."""
    final: int
    """What the method kept."""
    exported: int
    """What the plain LoRA holds, each module at its own rank."""


class Result(BaseModel):
    """One finished run: what was run, how well it did, and what it cost.

    A candidate without an adapter has no ranks, no singular values, no export and no starting scale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    format: Literal[4] = FORMAT
    """The version of this file's layout."""

    # --- what was run ---
    method: str
    """The name of the SPEC's entry."""
    label: str
    """What tables and figures call the entry."""
    seed: int
    """The seed of the run."""
    model: str
    """The pretrained model, as the SPEC names it."""
    task: str
    """The kind of task."""
    learning_rate: float
    """Peak learning rate of the adapter."""
    head_learning_rate: float
    """Peak learning rate of what is trained in full beside it."""
    steps: int
    """Optimiser steps."""
    batch_size: int
    """Examples of one optimiser step."""
    fields: dict[str, Any]
    """The method's own settings with their resolved values."""

    # --- how well it did ---
    metric: str
    """What `score` is."""
    lower_is_better: bool
    """Whether the metric is a loss."""
    score: float
    """The metric on the test split."""
    validation_score: float
    """The metric on the validation split."""
    extra_metrics: dict[str, float]
    """The task's other metrics on the test split."""
    train_tokens: int | None
    """Tokens that were trained on, padding left out; None where they were not counted: for images, and on
    accelerators, which counting would stop at every batch."""
    train_loss: Curve
    """Training loss as the Trainer logged it."""
    diverged: bool
    """Whether a logged training loss was not finite."""
    gradient_norm: Curve
    """Norm over everything that trains, before clipping."""
    validation_curve: Curve
    """The metric on the validation split, where it was measured on the way."""
    scored_step: int
    """The step whose weights were scored and saved."""
    forgetting: float | None
    """Loss per token on the SPEC's general text after training, less that before; None where there is no such text."""

    # --- what was learnt, by module name ---
    ranks: dict[str, int]
    """The rank that the method kept."""
    exported_ranks: dict[str, int]
    """The rank of the plain LoRA."""
    singular_values: dict[str, list[float]]
    """All singular values of the update, largest first."""
    mean_rank: float | None
    """The mean of `ranks`."""
    initial_mean_rank: float | None
    """The same before the first step."""
    starting_scale: float | None
    """lora_alpha / r at the start."""

    # --- what it cost ---
    parameters: Parameters
    """Numbers of the adapter."""
    head_parameters: int
    """Numbers that train in full beside the adapter."""
    seconds_per_step: float
    """Median over the steps, the first three left out."""
    seconds: float
    """The whole run, with loading and scoring."""
    steps_skipped: int
    """Optimiser steps that moved nothing, because of an overflow or of gradients that were not finite."""
    peak_memory: int | None
    """Bytes that an accelerator had allocated at most; None on a CPU."""

    # --- how it came about ---
    export: str | None
    """Folder of the plain LoRA, relative to the output folder."""
    data_digest: str
    """SHA-256 of the data as it was read, shortened: the same data has the same digest, wherever it lies."""
    git: str | None
    """Commit of the SPEC's folder, followed by `-dirty` where files were changed; None outside git."""
    versions: dict[str, str]
    """Versions of the libraries that have a hand in the numbers."""
    machine: str
    """Processor, cores and accelerator."""
    command: str
    """What was typed."""
    created: str
    """When the run finished, as ISO 8601 with the time zone."""

    @property
    def quality(self) -> float:
        """The score, turned so that higher is better."""
        return -self.score if self.lower_is_better else self.score

    @property
    def validation_quality(self) -> float:
        """The validation score, turned so that higher is better: what rates are chosen by."""
        return -self.validation_score if self.lower_is_better else self.validation_score

    @property
    def still_improving(self) -> bool:
        """Whether the last score on the validation split is better than every earlier one: more steps may help."""
        values = [value for _, value in self.validation_curve]
        if len(values) < 2:
            return False
        *earlier, last = values
        return last < min(earlier) if self.lower_is_better else last > max(earlier)

    @property
    def has_learnt(self) -> bool:
        """Whether the training loss stayed finite and ended below where it began.

        Both ends are means over a tenth of what was logged, and over five losses at least where there are ten: single
        batches differ by more than a short run moves them. One logged loss tells nothing, and counts as learnt.
        """
        if self.diverged:
            return False
        losses = [loss for _, loss in self.train_loss]
        if len(losses) < 2:
            return True
        window = max(len(losses) // 10, min(END_LOSSES, len(losses) // 2))
        return statistics.fmean(losses[-window:]) < statistics.fmean(losses[:window])


def schema() -> dict[str, Any]:
    """The JSON schema of a result file."""
    whole = Result.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "title": "A result of rankwise"}


def write_result(result: Result, path: str | Path) -> None:
    """Write one finished run as strict JSON, whole or not at all.

    Raises:
        DataError: the result holds a number that is not finite.
    """
    path = Path(path)
    try:
        text = json.dumps(result.model_dump(), indent=1, allow_nan=False)
    except ValueError as error:
        raise DataError(f"the result for {path.name} holds a number that is not finite") from error
    write_whole(path, text + "\n")


def read_results(folder: str | Path, keys: Iterable[str] | None = None) -> list[Result]:
    """The results in a folder, by label, then seed, then learning rate.

    Args:
        folder: where the result files are.
        keys: the names of the files to read, without `.json`; None for all.

    Raises:
        DataError: there is no such folder, or a file is not a whole result.
    """
    results = result_files(folder, keys).values()
    return sorted(results, key=lambda result: (result.label, result.seed, result.learning_rate))


def result_files(folder: str | Path, keys: Iterable[str] | None = None) -> dict[str, Result]:
    """The same by the names of the files, without `.json`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder of results at {folder}")
    if keys is None:
        keys = sorted(path.stem for path in folder.glob("*.json"))
    return {key: _read_result(folder / f"{key}.json") for key in keys}


def _read_result(path: Path) -> Result:
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise DataError(f"{path} is truncated or not strict JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a rankwise result: it holds no JSON object")
    found = content.get("format")
    if found != FORMAT:
        raise DataError(f"{path} is not a rankwise result: a result has format {FORMAT}; found {found!r}")
    try:
        # From the text, since JSON has no tuples: pydantic then takes lists in their place.
        return Result.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{path} is not a rankwise result: {_told(error)}") from error


def _told(error: ValidationError) -> str:
    """What pydantic found wrong first, as the end of a sentence."""
    complaint = error.errors()[0]
    place = dotted(complaint["loc"])
    if complaint["type"] == "missing":
        return f"a result needs `{place}`"
    rule = complaint["msg"].removeprefix("Input ")
    return f"`{place}` of a result {rule}; found {complaint['input']!r:.60}"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
