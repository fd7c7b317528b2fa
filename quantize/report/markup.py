"""Text and numbers as HTML. Names come from checkpoints, and anyone can publish one."""

from __future__ import annotations

import html
import math

from rich.filesize import decimal


def text(value: str) -> str:
    """``value`` escaped for content and quoted attributes, and encodable whatever it holds."""
    return html.escape(value.encode("utf-8", "replace").decode())


def number(error: float) -> str:
    """A relative error, to four digits; NaN and 0 in words."""
    if math.isnan(error):
        return "all zero"
    return f"{error:#.4g}" if error else "0 (exact)"


def size(nbytes: int) -> str:
    """Bytes in decimal units, as the command prints them."""
    return decimal(nbytes)


def plural(count: int, noun: str) -> str:
    """``1 expert``, ``1,024 experts``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def table(caption: str, heads: list[str], rows: list[str], kind: str = "") -> str:
    """A table of ready ``rows``; ``caption`` and ``heads`` are escaped here."""
    head = "".join(f"<th>{text(name)}</th>" for name in heads)
    return (
        f'<div class="scroll"><table class="{kind}"><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
