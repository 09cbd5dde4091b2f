"""Where each module of a model stands in a figure: its kind is a row, its layer a column."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


def printable(text: str) -> str:
    """Without control characters, which neither HTML nor SVG may hold."""
    return "".join(character if character.isprintable() else " " for character in text)


@dataclass(frozen=True)
class Grid:
    """The rows and columns of a heat map, and each module's kind and layer."""

    places: dict[str, tuple[str, str]]
    kinds: list[str]
    layers: list[str]


def grid_of(names: Iterable[str]) -> Grid:
    """A place for every module: kinds in model order, layers by number and "-" last."""
    places = _places(names)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    numbers = sorted({int(layer) for _, layer in places.values() if layer != "-"})
    without = ["-"] if any(layer == "-" for _, layer in places.values()) else []
    return Grid(places, kinds, [*map(str, numbers), *without])


def _places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The kind and the layer of each module: its layer is the first integer in its path, "-" where there is none.

    >>> _places(["encoder.layer.3.attention.self.query", "pooler.dense"])
    {'encoder.layer.3.attention.self.query': ('attention.self.query', '3'), 'pooler.dense': ('pooler.dense', '-')}
    """
    split = {name: _split(name) for name in names}
    # An encoder and a decoder hold modules of one kind and layer; then the kind needs the path before the layer too.
    several_stacks = len({before for before, layer, _ in split.values() if layer != "-"}) > 1
    return {name: (_kind(*parts, several_stacks), parts[1]) for name, parts in split.items()}


def _split(name: str) -> tuple[str, str, str]:
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return name, "-", ""
    return ".".join(parts[:first]), str(int(parts[first])), ".".join(parts[first + 1 :])


def _kind(before: str, layer: str, after: str, several_stacks: bool) -> str:
    if layer == "-":
        return printable(before)
    parts = (before, "*", after) if several_stacks or not after else (after,)
    return printable(".".join(filter(None, parts)))
