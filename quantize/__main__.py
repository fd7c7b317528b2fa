"""``python -m quantize``: the command ``nvfp4-moe``, and its ``quantize`` in short.

``python -m quantize COMMAND ...`` is ``nvfp4-moe COMMAND ...``. Where the first word is neither a
command nor an option, it is a checkpoint: ``python -m quantize SRC DST ...`` is
``nvfp4-moe quantize SRC DST ...``. A folder that is called like a command is written with its
path: ``python -m quantize ./inspect DST``.
"""

from __future__ import annotations

import sys

from quantize.cli.app import app


def main() -> None:
    """Run the command with the arguments of this process."""
    words = sys.argv[1:]
    commands = {info.callback.__name__ for info in app.registered_commands if info.callback}
    if words and words[0] not in commands and not words[0].startswith("-"):
        words = ["quantize", *words]
    app(words)


if __name__ == "__main__":
    main()
