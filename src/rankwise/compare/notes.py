"""What can be concluded from a comparison, and what cannot."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.compare.spec import FLOORS
from rankwise.compare.summary import REFERENCES, SEEDS_TO_CLAIM, Paired, Row


def notes(rows: Sequence[Row]) -> list[str]:
    """Sentences that have to stand beside the table: what it does not show, and which of its rows mean nothing."""
    found = [_floor_note(row) for row in rows if row.above_floor is False]
    found += [_unlearnt_note(row) for row in rows if row.unlearnt]
    found += [_improving_note(row) for row in rows if row.still_improving]
    found += [_edge_note(row) for row in rows if row.rate_at_edge]
    found += _searched_note(rows)
    found += _untuned_note(rows)
    found += _seeds_note(min(row.seeds for row in rows))
    found += _reference_note(rows)
    found += [_paired_note(row, row.versus_reference) for row in rows if row.versus_reference is not None]
    found += [f"{row.label}: steps skipped over all seeds: {row.steps_skipped}" for row in rows if row.steps_skipped]
    return found


def _floor_note(row: Row) -> str:
    floor = FLOORS[row.floor or ""]
    return f"{row.label} is not better than the floor, {floor}: its adapter has added nothing"


def _unlearnt_note(row: Row) -> str:
    seeds = "" if row.seeds == 1 else f" in {row.unlearnt} of {row.seeds} seeds"
    return f"{row.label} has not learnt anything at this rate ({row.learning_rate:g}): its loss did not fall{seeds}"


def _improving_note(row: Row) -> str:
    seeds = "" if row.seeds == 1 else f" in {row.still_improving} of {row.seeds} seeds"
    return f"{row.label} was still improving on the validation split when it ended{seeds}: more steps may help"


def _edge_note(row: Row) -> str:
    rate = f"{row.learning_rate:g}"
    return f"{row.label} was best at {rate}, the edge of its list of learning rates: a wider list may find a better one"


def _searched_note(rows: Sequence[Row]) -> list[str]:
    """Which rate the search took for each candidate."""
    rates = ", ".join(f"{row.label} {row.learning_rate:g}" for row in rows if row.rate_searched)
    return [f"learning rates chosen on validation data: {rates}"] if rates else []


def _untuned_note(rows: Sequence[Row]) -> list[str]:
    """Which candidates had one rate only, be it given or the suggested one."""
    untuned = [row for row in rows if not row.is_floor and not row.rate_searched]
    if not untuned:
        return []
    rates = ", ".join(f"{row.label} {row.learning_rate:g}" for row in untuned)
    return [f"learning rates not searched on this data, at others the order may differ: {rates}"]


def _seeds_note(seeds: int) -> list[str]:
    """How far the fewest seeds of a row carry."""
    if seeds == 1:
        return ["one seed: a first impression, not a ranking"]
    if seeds < SEEDS_TO_CLAIM:
        return [f"{seeds} seeds: fewer than {SEEDS_TO_CLAIM} show differences, and prove none"]
    return []


def _reference_note(rows: Sequence[Row]) -> list[str]:
    """Without a reference there is nothing to be better than."""
    compared = [row for row in rows if not row.is_floor]
    if len(compared) < 2 or rows[0].reference is not None:
        return []
    return [f"nothing was run to compare with ({REFERENCES[0]}, or the SPEC's `reference`): no differences are told"]


def _paired_note(row: Row, paired: Paired) -> str:
    lowest, highest = paired.interval
    # Of fewer seeds than that, the bootstrap's interval is the range, which covers less than 95 %.
    kind = "95 % interval " if paired.seeds >= SEEDS_TO_CLAIM else "from "
    told = (
        f"{row.label} against {row.reference} on {paired.seeds} common seeds: "
        f"median difference {paired.median_difference:+z.3f} ({kind}{lowest:+z.3f} to {highest:+z.3f}), "
        f"better on {paired.wins}"
    )
    if paired.p_value is None:
        return told
    told += f", Wilcoxon p = {paired.p_value:.2g}"
    if not paired.is_apart:
        return f"{told}: not told apart"
    # Of a loss, less is better.
    is_better = (paired.median_difference > 0) != row.lower_is_better
    return f"{told}: {'better' if is_better else 'worse'} here"
