"""`rankwise methods`."""

from __future__ import annotations

import json

import typer


def methods(
    as_json: bool = typer.Option(False, "--json", help="A list of {method, config, summary, fields} for programs."),
) -> None:
    """List the methods, their config classes, and every field with its default.

    Example: `rankwise methods --json`
    """
    from rankwise.methods import METHODS
    from rankwise.methods.catalogue import catalogue

    listed = catalogue()
    if as_json:
        typer.echo(json.dumps(listed, indent=2))
        return
    for method in listed:
        typer.echo(f"{method['method']:8} rankwise.{method['config']}: {method['summary']}")
        typer.echo(f"           suggested peak learning rate {METHODS[method['method']].suggested_rate:g}")
        for name, field in method["fields"].items():
            typer.echo(f"           {name} = {field['default']!r}: {field['help']}")
