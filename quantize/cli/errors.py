"""What a user sees when something goes wrong: one line, and an exit code.

Exit codes: 0 for success, 1 for an error (or problems that ``verify`` found), 2 for wrong usage
or what would take too much, 130 when interrupted. A command whose 1 is a verdict has 2 for errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import typer

from quantize.checkpoint.disk import told
from quantize.cli.output import complain, speaking
from quantize.cli.signals import INTERRUPTED, interrupting
from quantize.errors import QuantizeError, TooMuchError, first_line

TRACEBACK = "NVFP4_MOE_TRACEBACK"
"""Environment variable: if it is set, unexpected errors end the command with their traceback."""


class UsageError(QuantizeError):
    """Options that can never be right, whatever source and target are."""


@contextmanager
def reporting_errors(
    advice: str = "nothing was changed",
    quiet: bool = False,
    log_file: Path | None = None,
    apart: Iterable[Path] = (),
    failed: int = 1,
) -> Iterator[None]:
    """Within, an exception becomes a line on standard error and an exit code, and so do Ctrl-C and
    SIGTERM.

    Args:
        advice: what to tell a user who interrupts the command.
        quiet, log_file, apart: see ``quantize.cli.output.speaking``.
        failed: the exit code of an error, for a command whose 1 says something else.
    """
    with ExitStack() as stack, _reporting(advice, failed), interrupting():
        stack.enter_context(speaking(quiet, log_file, apart))
        yield


@contextmanager
def _reporting(advice: str, failed: int) -> Iterator[None]:
    try:
        yield
    except QuantizeError as error:
        complain("error", str(error))
        sys.exit(2 if isinstance(error, UsageError | TooMuchError) else failed)
    except KeyboardInterrupt:
        complain("interrupted", advice)
        sys.exit(INTERRUPTED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain("error", f"{where}{told(error, 'try again')}")
        sys.exit(failed)
    except typer.Exit:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            complain(
                "error",
                f"not enough memory ({first_line(error)}); choose another GPU with --device, or "
                "--device cpu, or fewer --threads",
            )
            sys.exit(failed)
        if os.environ.get(TRACEBACK):
            raise
        # PyTorch and other libraries raise it for all that goes wrong, but Python for its own.
        ours = RecursionError | NotImplementedError
        if isinstance(error, RuntimeError) and not isinstance(error, ours):
            complain(
                "error",
                f"a library failed ({type(error).__name__}: {first_line(error)}); "
                f"{TRACEBACK}=1 shows where",
            )
            sys.exit(failed)
        complain(
            "error",
            f"unexpected {type(error).__name__}: {first_line(error)}. This is a bug of nvfp4-moe; "
            f"please report it, with what {TRACEBACK}=1 shows",
        )
        sys.exit(failed)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: the machine's or, if PyTorch is loaded at all, a GPU's."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    # PyTorch says so of the machine's memory, and of files that it cannot map.
    words = ("can't allocate memory", "Cannot allocate memory", "unable to mmap")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in words)
