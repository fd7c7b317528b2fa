"""Where a checkpoint comes from: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from quantize.errors import QuantizeError

_DOWNLOADED = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "*.md"),
]
"""What is fetched from the hub. Python files are copied, and run only with the user's trust."""


def resolve(source: str) -> Path:
    """The folder of ``source``: a folder as it is, a hub id downloaded (or found in the cache)."""
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
    ) as error:  # the hub's own, OSErrors, and those of whichever HTTP library it uses
        raise QuantizeError(
            f"{source} is not a folder here, and downloading it from the hub failed: "
            + " ".join(str(error).split())
        ) from error
