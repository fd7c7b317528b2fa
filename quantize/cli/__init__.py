"""The command ``nvfp4-moe``: a file for each of its commands, and one each for what they share.

Nothing here imports PyTorch, Transformers or any other large library before a command does its
work: help, ``--version``, wrong usage and the completion of a shell answer at once
(``tests/quantize/test_startup.py``).
"""


def main() -> None:
    """Entry point of the console script."""
    from quantize.cli.signals import end_at_once

    end_at_once()
    from quantize.cli.app import app

    app()
