"""The model card beside every adapter that is written: what it is, what it is of, and how to load it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from rankwise.export.servers import Server

CARD = "README.md"


def write_card(
    folder: Path,
    name: str,
    base: str | None,
    title: str,
    facts: Mapping[str, str | None],
    *,
    more: str = "",
    load: str = Server.load_code,
    library: str = Server.hub_tag,
) -> None:
    """Write the README.md of an adapter.

    Args:
        folder: where its files are now.
        name: the folder's name once it is in its place.
        base: the base model.
        title: the heading.
        facts: a table; rows of None are left out.
        more: text behind the table.
        load: code that loads it, with {folder} for `name`.
        library: what loads it, for model hubs.
    """
    front = ModelCardData(base_model=base or None, library_name=library, tags=["lora", "rankwise"]).to_yaml()
    rows = {"Base model": f"`{base}`" if base else "not recorded", **facts}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    code = f"```python\n{load.format(folder=name)}\n```"
    text = f"---\n{front}\n---\n\n# {title}\n\n| | |\n| --- | --- |\n{table}\n\n{more}\n## Load it\n\n{code}\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def spread(ranks: Mapping[str, int]) -> str:
    """Ranks of many modules in a few words.

    >>> spread({"q": 2, "v": 6})
    '2 to 6, mean 4.0, over 2 modules'
    """
    values = list(ranks.values())
    return f"{min(values)} to {max(values)}, mean {statistics.fmean(values):.1f}, over {len(values)} modules"
