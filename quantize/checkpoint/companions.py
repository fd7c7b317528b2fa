"""The files beside the weights that belong to a checkpoint: tokenizer, templates, licences.

They are found by an allow-list. What else lies in a folder (other formats' weights, adapters,
archives, ``.env``) is nobody's business, and a target is what people publish.
"""

from __future__ import annotations

import stat
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from quantize.checkpoint.json_files import INDEX, read_json
from quantize.errors import QuantizeError

PATTERNS = (
    # Tokenizers of all kinds: fast ones, byte-level BPE, sentencepiece, tiktoken, Mistral's.
    *("tokenizer*", "*_tokenizer*.json", "tokenization_*.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab*.json", "vocab*.txt", "vocab*.bpe"),
    "merges*.txt",
    *("*.model", "*.tiktoken", "tekken.json", "normalizer.json", "bpe.codes"),
    *("chat_template*", "*.jinja"),
    *("generation_config*.json", "configuration.json"),
    *("*processor_config.json", "*feature_extractor*.json", "image_processor*.json"),
    *("LICENSE*", "LICENCE*", "License*", "license*", "COPYING*", "NOTICE*", "Notice*"),
    *("README*", "MODEL_CARD*", "MODEL_LICENSE*", "USE_POLICY*", "USAGE_POLICY*"),
    *("ACCEPTABLE_USE*", "THIRD_PARTY*", "ThirdParty*"),
)
"""Names of files that are copied."""

MODULES = "*.py"
"""Python modules are copied where a config names one (``auto_map``): they import each other."""

TEMPLATES = "additional_chat_templates"
"""A folder of templates that Transformers reads beside ``chat_template.jinja``."""

IN_FOLDERS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")
"""Names of files that are copied from a folder that a config names."""

NEVER = (
    *(".*", "*.index.json", "adapter_*", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"),
    *("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.zip", "*.tar*", "*.gz", "*.7z", "*.pem", "*.key"),
)
"""Names that are never copied, whatever else they match."""

_MAX_SIZE = 256 * 2**20
"""Most bytes of one such file. The largest known tokenizers have some tens of megabytes."""

_MAX_FOLDER = 1000
"""Most files of one folder that a config names."""


def belongs(name: str) -> bool:
    """Whether a file called ``name`` at a checkpoint's top level belongs to it, by its name."""
    return _matches(name, PATTERNS) and not _matches(name, NEVER)


def belongs_by_config(path: str) -> bool:
    """Whether a relative path may be that of a file that belongs because a config names it."""
    folder, _, name = path.rpartition("/")
    return _matches(name, IN_FOLDERS if folder else (MODULES,)) and not _matches(name, NEVER)


def companions(folder: Path) -> list[str]:
    """Relative paths, with ``/``, of the files beside the weights that belong to a checkpoint.

    ``config.json``, which a run rewrites, is not among them.

    Raises:
        QuantizeError: if one of them is a link that leads out of the checkpoint or nowhere, if it
            is too large, or if a folder has too many.
    """
    top = sorted(file.name for file in folder.iterdir())
    found = [name for name in top if belongs(name) and not (folder / name).is_dir()]
    read = configs(folder)
    if any(map(_has_modules, read)):
        found += [name for name in top if belongs_by_config(name)]
    for name in folders_named(read):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            # It does not look into folders that are links.
            files = (f for f in (folder / name).rglob("*") if not f.is_dir())
            inside = [file.relative_to(folder).as_posix() for file in islice(files, _MAX_FOLDER)]
            if next(files, None) is not None:
                raise QuantizeError(
                    f"{folder / name} has more than {_MAX_FOLDER} files, too many for a folder of "
                    "tokenizers or templates; move it away"
                )
            found += filter(belongs_by_config, inside)
    return [name for name in sorted(set(found)) if _is_sound(folder, name)]


def left_out(folder: Path, taken: list[str], weights: list[str]) -> list[str]:
    """Names at the top level of ``folder`` that a run neither copies nor reads nor rewrites."""
    known = {name.partition("/")[0] for name in taken} | set(weights)
    known |= {"config.json", INDEX, ".gitattributes", ".git", ".cache"}
    return sorted(
        f"{file.name}/" if file.is_dir() else file.name
        for file in folder.iterdir()
        if file.name not in known
    )


def configs(folder: Path) -> list[dict[str, Any]]:
    """The contents of ``config.json`` and of the small JSON files that belong to a checkpoint."""
    names = [file.name for file in sorted(folder.glob("*.json"))]
    return [_read_small(folder / n) for n in names if n == "config.json" or belongs(n)]


def folders_named(contents: list[dict[str, Any]]) -> list[str]:
    """Folders within the checkpoint that configs name by a path, and that of more templates.

    ``"tokenizer_file": "tokenizer/spm.model"`` names ``tokenizer``.
    """
    found = {TEMPLATES}
    level: list[Any] = list(contents)
    while level:
        value = level.pop()
        if isinstance(value, dict | list):
            level += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and "/" in value and len(value) < 200:
            path = PurePosixPath(value)
            parts = path.parts
            # With a suffix it is a path; ``org/name`` names something on the hub.
            plain = not path.is_absolute() and ".." not in parts and not parts[0].startswith(".")
            if plain and _matches(path.name, IN_FOLDERS):
                found.add(parts[0])
    return sorted(found)


def _read_small(file: Path) -> dict[str, Any]:
    """A config of the checkpoint as a dict; empty if it is none, or too large to be one."""
    try:
        if file.suffix == ".json" and file.stat().st_size < 2**20:
            return read_json(file)
    except (OSError, QuantizeError):
        pass
    return {}


def _has_modules(config: dict[str, Any]) -> bool:
    return "auto_map" in config or any(
        isinstance(value, dict) and "auto_map" in value for value in config.values()
    )


def _is_sound(folder: Path, name: str) -> bool:
    """Whether a file can be copied; False if it is neither a file nor a link."""
    file = folder / name
    if file.is_symlink():
        try:
            target = file.resolve(strict=True)
        except (OSError, RuntimeError):  # to nothing, or to itself
            raise QuantizeError(
                f"{file}: the link leads nowhere; download the checkpoint again"
            ) from None
        if not any(target.is_relative_to(place) for place in _places(folder)):
            raise QuantizeError(
                f"{file} is a link that leads out of the checkpoint, to {target}; put the file "
                "itself there, or remove the link"
            )
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        return False
    if found.st_size > _MAX_SIZE:
        raise QuantizeError(
            f"{file} has {found.st_size} bytes, too many for a file of its name; move it away"
        )
    return True


def _places(folder: Path) -> list[Path]:
    """Where links in ``folder`` may lead: into it, or in the hub's cache to the same model's
    files (``models--ORG--NAME/snapshots/REVISION`` has links to ``models--ORG--NAME/blobs``)."""
    home = folder.resolve()
    return [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
