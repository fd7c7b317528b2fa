"""Options that say how SRC is read from the hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from quantize.cli.errors import UsageError
from quantize.errors import QuantizeError

RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="COMMIT",
        help="The branch, tag or commit (40 digits) of SRC on the hub, e.g. --revision refs/pr/3; "
        "by default its main branch.",
    ),
]

StreamOption = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Download a few files of SRC at a time, and remove each when it is quantized: for a "
        "disk that has no room for SRC, e.g. --stream --resume.",
    ),
]


def check_stream(stream: bool, text: bool, ray: str | None) -> None:
    """Refuse what reads a model otherwise than once, file after file.

    Raises:
        UsageError: if ``--stream`` is given with it.
    """
    if stream and text:
        raise UsageError(
            "--stream reads each file of SRC once, and --calibrate and --input-scales run the "
            "whole model several times; leave --stream out, or quantize without a text"
        )
    if stream and ray:
        raise UsageError(
            "--stream downloads to this machine, and --ray reads SRC on all; leave one out"
        )


def revision_for(source: str, target: Path, stated: str | None) -> str | None:
    """The commit of SRC that DST is compared with: the stated one, or that which DST was made of.

    None: the newest one, or SRC is a folder.
    """
    if stated is not None or source.count("/") != 1 or Path(source).expanduser().exists():
        return stated
    from quantize.checkpoint.json_files import read_json
    from quantize.experts.gates import KEY
    from quantize.run.made import FIELD

    with suppress(QuantizeError, LookupError, AttributeError, TypeError):
        name, _, commit = read_json(target / "config.json")[KEY][FIELD]["revision"].partition("@")
        return commit or None if name == source else None
    return None
