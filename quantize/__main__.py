"""``python -m quantize``: the command ``nvfp4-moe``, and its ``quantize`` in short.

``python -m quantize COMMAND ...`` is ``nvfp4-moe COMMAND ...``. Anything else is what ``quantize``
takes: ``python -m quantize SRC DST ...`` is ``nvfp4-moe quantize SRC DST ...``, also with options
first. A folder that is called like a command is written with its path:
``python -m quantize ./inspect DST``.
"""

from __future__ import annotations

import sys

from quantize.cli.signals import end_at_once

_OPTIONS = {"--help", "--version", "--install-completion", "--show-completion"}
"""Of the command itself; all other options are those of ``quantize``."""


def main() -> None:
    """Run the command with the arguments of this process."""
    end_at_once()
    from quantize.cli.app import app

    words = sys.argv[1:]
    own = {info.callback.__name__ for info in app.registered_commands if info.callback} | _OPTIONS
    if words and words[0] not in own:
        words = ["quantize", *words]
    app(words)


if __name__ == "__main__":
    main()
