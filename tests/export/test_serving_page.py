"""The tables of docs/serving.md are what the servers say of themselves and what the commands do.

`python tests/export/test_serving_page.py` rewrites them.
"""

from __future__ import annotations

from pathlib import Path

from rankwise.export.servers import SERVERS, Server

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its heading."""
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    rule = "| " + " | ".join([":---"] * len(rows[0])) + " |"
    return "\n".join([heading, rule, *others])


def servers_table() -> str:
    rows = [["server", "layouts", "rank limit", "load an adapter by", "an export for it also"]]
    for server in sorted(SERVERS.values(), key=lambda server: server.title.lower()):
        layouts = " and ".join(server.layouts)
        command = server.start_command.format(folder="FOLDER", rank="RANK")
        rows.append([server.title, layouts, rank_limit(server), f"`{command}`", server.written_for])
    return markdown(rows)


def rank_limit(server: Server) -> str:
    if not server.has_rank_limit:
        return "none"
    limits = ", ".join(str(limit) for limit in server.rank_limits)
    return f"the next of {limits}" if limits else "the adapter's rank"


def replaced(page: str, table: str) -> str:
    """The page with a table in the place of the one that has the same heading."""
    heading = table.partition("\n")[0]
    before, _, rest = page.partition(heading)
    after = rest[rest.index("\n\n") :]
    return before + table + after


def test_the_table_of_servers_is_what_they_say() -> None:
    assert servers_table() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), servers_table()), encoding="utf-8")
