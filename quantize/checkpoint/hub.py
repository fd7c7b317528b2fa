"""Finding a checkpoint's folder: it is on disk, or is downloaded from the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from quantize.checkpoint.companions import (
    IN_FOLDERS,
    MODULES,
    NEVER,
    PATTERNS,
    configs,
    folders_named,
)
from quantize.errors import QuantizeError

_WEIGHTS = "*.safetensors"
_NOT_THE_MODEL = ["consolidated*", "adapter_*"]
"""Weights in Mistral's own format beside the same in the hub's, and adapters."""


def resolve(source: str) -> Path:
    """The folder that holds the checkpoint ``source``.

    Args:
        source: a folder, which is returned as it is, or a hub id such as ``org/name``, which is
            downloaded unless it is in the hub's cache.

    Raises:
        QuantizeError: if ``source`` is neither, or if the download fails.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise QuantizeError(f"{source} is neither a folder nor a hub id such as org/name")
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a folder

    try:
        return _download(source, snapshot_download)
    except (
        Exception
    ) as error:  # the hub's errors, OSError, and the errors of the HTTP library that it uses
        raise QuantizeError(
            f"{source} is not a folder here, and downloading it from the hub failed: "
            + " ".join(str(error).split())
        ) from error


def _download(name: str, download: Callable[..., str]) -> Path:
    """What belongs to the checkpoint: its top level, then the folders that its configs name.

    Python files are among it, so that they are copied to the target; they run only with
    ``--trust-remote-code``.
    """
    top = [_WEIGHTS, "config.json", "*.index.json", *PATTERNS, MODULES]
    # In the hub's patterns, * goes into folders too.
    never = [pattern for pattern in NEVER if pattern not in (_WEIGHTS, "*.index.json")]
    folder = Path(
        download(name, allow_patterns=top, ignore_patterns=["*/*", *never, *_NOT_THE_MODEL])
    )
    inside = [f"{part}/{end}" for part in folders_named(configs(folder)) for end in IN_FOLDERS]
    # Under the same revision, should another one have been published meanwhile.
    return Path(
        download(name, revision=folder.name, allow_patterns=inside, ignore_patterns=list(NEVER))
    )


def revision_of(folder: Path) -> str | None:
    """The commit on the hub that a checkpoint in ``folder`` was downloaded from, if that is known.

    Returns:
        ``ORG/NAME@COMMIT`` of a folder in the hub's cache; ``COMMIT`` of one that the hub's client
        has filled (``hf download --local-dir``); else None.
    """
    cached = folder.absolute()
    repository = cached.parent.parent.name
    if cached.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{cached.name}"
    notes = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    try:
        commit = notes.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, ValueError):
        return None
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None
