"""``python -m quantize SRC DST``: the same as ``nvfp4-moe quantize SRC DST``."""

import typer

from quantize.cli import quantize

if __name__ == "__main__":
    typer.run(quantize)
