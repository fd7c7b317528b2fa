"""Which commit of a model on the hub SRC is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from quantize.errors import QuantizeError

RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="COMMIT",
        help="The branch, tag or commit of SRC on the hub, e.g. --revision refs/pr/3; by default "
        "its main branch.",
    ),
]


def revision_for(source: str, target: Path, stated: str | None) -> str | None:
    """The commit of SRC that DST is compared with: the stated one, or that which DST was made of.

    None: the newest one, or SRC is a folder.
    """
    if stated is not None or Path(source).expanduser().exists():
        return stated
    from quantize.checkpoint.json_files import read_json
    from quantize.experts.gates import KEY
    from quantize.run.made import FIELD

    with suppress(QuantizeError, LookupError, AttributeError, TypeError):
        name, _, commit = read_json(target / "config.json")[KEY][FIELD]["revision"].partition("@")
        return commit or None if name == source else None
    return None
