"""The command ``nvfp4-moe``: commands, options, output."""


def main() -> None:
    """Entry point of the console script, and of ``python -m quantize``."""
    from quantize.cli.app import app

    app()
