"""The figures that set one adapter beside another."""

from __future__ import annotations

from rankwise.errors import DataError
from rankwise.inspection.answer import QUESTIONS, Answer, map_of_modules, median, rows_of
from rankwise.inspection.found import Found
from rankwise.pages.places import printable
from rankwise.pages.style import Plot
from rankwise.spectral import subspace_alignment, update_cosine

AGAINST = QUESTIONS[5]


def answers_against(found: Found, other: Found) -> list[Answer]:
    """What two adapters of one base model have in common, module by module.

    Raises:
        DataError: no module is adapted by both with one shape.
    """
    mine, theirs = found.record.modules, other.record.modules
    common = [name for name in mine if name in theirs and mine[name].shape == theirs[name].shape]
    if not common:
        raise DataError(f"{found.folder} and {other.folder} adapt no module in common")
    return [_cosines(found, other, common), _alignments(found, other, common), _sizes(found, other, common)]


def _cosines(found: Found, other: Found, common: list[str]) -> Answer:
    cosines = {name: float(update_cosine(found.exported[name], other.exported[name])) for name in common}
    figure = map_of_modules(cosines, f"Cosine between the updates of {_names(found, other)}", form=".2f", top=1.0)
    nearest = max(cosines, key=lambda name: cosines[name])
    alone = len(found.record.modules) + len(other.record.modules) - 2 * len(common)
    apart = f" {alone} modules are adapted by one of them only." if alone else ""
    sentence = (
        f"Over the {len(common)} modules that both adapt, the median cosine ⟨ΔW, ΔW'⟩/(‖ΔW‖·‖ΔW'‖) is "
        f"{median(list(cosines.values())):.2f} (1: the same direction, 0: unrelated); the most alike is "
        f"{printable(nearest)} ({cosines[nearest]:.2f}).{apart}"
    )
    plot = Plot("Direction of the updates", sentence, figure)
    return Answer(AGAINST, "against-cosine", plot, ("module", "cosine"), rows_of(cosines))


def _alignments(found: Found, other: Found, common: list[str]) -> Answer:
    aligned: dict[str, float] = {}
    by_chance: list[float] = []
    for name in common:
        mine, theirs = found.measured.directions[name], other.measured.directions[name]
        if not mine.U.shape[1] or not theirs.U.shape[1]:
            aligned[name] = 0.0
            continue
        left, right = subspace_alignment(mine.U, theirs.U), subspace_alignment(mine.V, theirs.V)
        aligned[name] = float(left + right) / 2
        larger = max(mine.U.shape[1], theirs.U.shape[1])
        by_chance.append((larger / mine.U.shape[0] + larger / mine.V.shape[0]) / 2)
    figure = map_of_modules(aligned, "Alignment of the leading directions", form=".2f", top=1.0)
    sentence = (
        f"The leading directions of the two share {median(list(aligned.values())):.2f} of their subspaces in the "
        f"median module (1: the same subspace); two random ones would share {median(by_chance):.3f}."
    )
    plot = Plot("Subspaces of the updates", sentence, figure)
    return Answer(AGAINST, "against-alignment", plot, ("module", "alignment"), rows_of(aligned))


def _sizes(found: Found, other: Found, common: list[str]) -> Answer:
    sizes = {name: found.record.modules[name].norm for name in common}
    others = {name: other.record.modules[name].norm for name in common}
    total, total_other = (sum(norm**2 for norm in norms.values()) ** 0.5 for norms in (sizes, others))
    ranks, ranks_other = (sum(each.record.modules[name].kept for name in common) for each in (found, other))
    sentence = (
        f"{printable(found.folder.name)} has ‖ΔW‖ = {total:.3g} with {ranks} ranks, {printable(other.folder.name)} "
        f"{total_other:.3g} with {ranks_other}, over the modules in common."
    )
    plot = Plot("Sizes of the two", sentence, None)
    return Answer(AGAINST, "against-sizes", plot, ("module", "norm", "norm_of_other"), rows_of(sizes, others))


def _names(found: Found, other: Found) -> str:
    return f"{printable(found.folder.name)} and {printable(other.folder.name)}"
