"""What the commands print: tables, JSON and complaints.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

out = Console()
err = Console(stderr=True)


def plain(text: object) -> str:
    """``text`` as it is, for rich: no markup, and nothing that only a terminal would understand.

    Names come from checkpoints, and anyone can publish one.
    """
    return escape(
        "".join(
            c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
            for c in str(text)
        )
    )


def complain(kind: str, text: str) -> None:
    """Print a line such as ``error: ...`` on standard error; ``text`` may hold anything."""
    err.print(f"[red]{kind}:[/]", plain(text), soft_wrap=True, highlight=False)


def print_json(value: object) -> None:
    """Print ``value`` as JSON, without rich, which would wrap and colour it."""
    print(json.dumps(value, indent=2))


def table(title: str, first: str, *others: str) -> Table:
    """A table with names in the first column and figures in the others; nothing is cut off."""
    made = Table(title=plain(title))
    made.add_column(first, overflow="fold")
    for name in others:
        made.add_column(name, justify="right", overflow="fold")
    return made
