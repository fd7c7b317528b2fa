"""The command itself: what it is called, which commands it has, and ``--version``."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated

import typer

from quantize.cli.evaluate_command import evaluate
from quantize.cli.inspect_command import inspect
from quantize.cli.nothing_empty import NothingEmpty
from quantize.cli.quantize_command import quantize
from quantize.cli.verify_command import verify
from quantize.run.version import package_version

app = typer.Typer(
    name="nvfp4-moe",
    help="Quantize the routed experts of mixture-of-experts checkpoints to NVFP4.",
    epilog="nvfp4-moe COMMAND --help explains a command. After nvfp4-moe --install-completion, "
    "the tab key completes commands, options and their values.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _command, _example in (
    (quantize, "quantize MiniMaxAI/MiniMax-M3 m3-nvfp4 --scales mse --resume"),
    (inspect, "inspect MiniMaxAI/MiniMax-M3 --json"),
    (verify, "verify MiniMaxAI/MiniMax-M3 m3-nvfp4 --json"),
    (evaluate, "evaluate MiniMaxAI/MiniMax-M3 m3-nvfp4 --text wiki.txt"),
):
    app.command(cls=NothingEmpty, epilog=f"Example: nvfp4-moe {_example}")(_command)
for _point in entry_points(group="nvfp4_moe.commands"):
    # Of packages that know this one. Like the modules here, theirs import nothing large.
    app.command(cls=NothingEmpty, name=_point.name)(_point.load())


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nvfp4-moe {package_version()}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the command itself; its help is the application's."""
