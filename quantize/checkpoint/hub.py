"""Finding a checkpoint's folder: it is on disk, or is downloaded from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from quantize.errors import QuantizeError

_DOWNLOADED = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "*.md"),
]
"""Patterns of the files that are downloaded. Python files are among them, so that they are copied
to the target; they run only with ``--trust-remote-code``."""


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
        return Path(
            snapshot_download(
                source,
                allow_patterns=_DOWNLOADED,
                ignore_patterns=["*/*"],  # only the top level is read
            )
        )
    except (
        Exception
    ) as error:  # the hub's errors, OSError, and the errors of the HTTP library that it uses
        raise QuantizeError(
            f"{source} is not a folder here, and downloading it from the hub failed: "
            + " ".join(str(error).split())
        ) from error
