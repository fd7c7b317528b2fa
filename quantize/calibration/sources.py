"""What ``--calibrate TEXT`` names: a file, a folder, or a data set on the hub."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from quantize.calibration.documents import (
    EXTRA,
    SUFFIXES,
    Piece,
    documents,
    kind_of,
    needed,
    rows,
)
from quantize.errors import QuantizeError

Tree: TypeAlias = "Iterator[Piece] | list[Tree]"
"""The documents of one file; or of several, which are to be mixed evenly."""

_Files: TypeAlias = "Path | list[_Files]"

_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?(?:/([\w.-]+))?")

_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files that are about a data set, and no part of it."""


def open_source(source: str, tokenizer: Any = None) -> Tree:
    """Return the documents of one source; nothing is read before it is asked for.

    Args:
        source: a file or folder, see :func:`quantize.calibration.documents.documents`; of a folder
            each entry is a part of its own, but for hidden ones and what cannot be text. Or a data
            set on the hub, ``ORG/NAME[:split][/config]``.
        tokenizer: has the chat template for ``messages``.

    Raises:
        QuantizeError: if there is nothing to read.
    """
    check_there(source)
    if (path := Path(source)).exists():
        return _opened(_files(path), tokenizer)
    match = _HUB.fullmatch(source)
    assert match is not None
    return hub_rows(match[1], match[2], match[3], tokenizer)


def check_there(source: str | Path) -> None:
    """See that there is something to read, without reading it or asking the hub.

    Raises:
        QuantizeError: if there is not.
    """
    path = Path(source)
    if not path.exists():
        if not _HUB.fullmatch(str(source)) or kind_of(path) in SUFFIXES:
            raise QuantizeError(
                f"{source}: there is no such file or folder; give a text that is there"
            )
        if importlib.util.find_spec("datasets") is None:
            raise QuantizeError(
                f"{source}: there is no such file or folder; if it is a data set on the hub, "
                f"reading it needs `{EXTRA}`"
            )
        return
    if not os.access(path, os.R_OK):
        raise QuantizeError(f"{source}: you may not read it; change its permissions")
    if _files(path) == []:
        raise QuantizeError(
            f"{source}: holds no {', '.join(SUFFIXES)} files and no data set; give a text or such "
            "a folder"
        )


def hub_rows(
    name: str, split: str | None, config: str | None, tokenizer: Any = None
) -> Iterator[Piece]:
    """Yield the texts of a data set on the hub.

    Rows are loaded as they are asked for; without a network, from what ``datasets`` has loaded
    before.

    Args:
        name: as ``datasets.load_dataset`` takes it.
        split: by default ``train``, or the first one if there is no ``train``.
        config: the name of one of its configurations, if it has several.

    Raises:
        QuantizeError: if it cannot be loaded, or a row has no text.
    """
    datasets = needed("datasets", name)
    try:
        offline = bool(datasets.config.HF_HUB_OFFLINE)
        found = datasets.load_dataset(name, config, streaming=not offline)
        there = list(found)
        chosen = split or ("train" if "train" in there else there[0])
        if chosen not in there:
            raise QuantizeError(f"{name}: has no split {chosen}, only {', '.join(there)}")
    except QuantizeError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300]  # several lines, if it needs a configuration
        raise QuantizeError(
            f"{name}: cannot be loaded as a data set ({why}); the form is ORG/NAME[:split][/config]"
        ) from error
    yield from rows(found[chosen], name, tokenizer)


def _files(path: Path) -> _Files:
    """The files to be read in ``path``, by folder."""
    if not path.is_dir() or ((path / "state.json").exists() and (path / _ABOUT[0]).exists()):
        return path  # datasets saves the two beside its rows
    parts: list[_Files] = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink() and (inner := _files(entry)):
                parts.append(inner)
        elif kind_of(entry) in SUFFIXES and entry.name not in _ABOUT:
            parts.append(entry)
    return parts


def _opened(files: _Files, tokenizer: Any) -> Tree:
    if isinstance(files, Path):
        return documents(files, tokenizer)
    return [_opened(file, tokenizer) for file in files]
