"""A command that takes no empty words: ``nvfp4-moe quantize "$SRC" "$DST"`` with a variable that is
not set would otherwise read, or fill, the folder that the user happens to be in."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand


class NothingEmpty(TyperCommand):
    """See the module."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # A flag has no value: what follows it is an argument.
        options = [p for p in self.get_params(ctx) if not getattr(p, "is_flag", True)]
        valued = {name for option in options for name in option.opts}
        for before, word in zip(["", *args], args, strict=False):
            option = re.fullmatch(r"(--[\w-]+)=?", word if word.strip() else before)
            option = option if option and option[1] in valued else None
            if not word.strip() or (word.endswith("=") and option):
                whose = f"the value of {option[1]}" if option else "an argument"
                raise typer.BadParameter(
                    f"{whose} is empty; leave it out, or is a variable of the shell not set?", ctx
                )
        return super().parse_args(ctx, args)
