"""Reading documents: texts from a file, a folder of files, or a dataset."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError, first_line

FIELDS = ("text", "content", "prompt", "messages")
"""Where the text of a JSON object or a dataset's row is, in order of preference."""

_PIECE = 2**20
"""Characters of a text file that are read at a time."""

_SUFFIXES = (".jsonl", ".txt", ".md", ".py", ".parquet")


def documents(source: Path, tokenizer: Any = None) -> Iterator[str]:
    """Yield the texts in ``source``.

    Args:
        source: a text file; a ``.jsonl`` file, each of whose lines is a string or has one of
            ``FIELDS``; a ``.parquet`` file with one of these columns; or a folder, which is a
            dataset as ``datasets`` saves it, or holds such files.
        tokenizer: has the chat template for ``messages``.

    Raises:
        QuantizeError: naming the file and line that cannot be read.
    """
    if source.is_dir():
        yield from _folder(source, tokenizer)
    elif source.suffix == ".jsonl":
        yield from _json_lines(source, tokenizer)
    elif source.suffix == ".parquet":
        yield from _parquet(source, tokenizer)
    else:
        yield from _text_file(source)


def check_there(source: Path) -> None:
    """See that there is something to read, without reading it.

    Raises:
        QuantizeError: if there is not.
    """
    if not source.exists():
        raise QuantizeError(f"{source}: there is no such file or folder; give a text that is there")
    if not os.access(source, os.R_OK):
        raise QuantizeError(f"{source}: you may not read it; change its permissions")
    if source.is_dir() and not _is_dataset(source):
        _files(source)


def _text_file(file: Path) -> Iterator[str]:
    """Yield pieces that end with a line, so that the rest of a large file need not be read."""
    try:
        with file.open(encoding="utf-8") as lines:
            while piece := lines.readlines(_PIECE):
                yield "".join(piece)
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(f"{file}: cannot be read as text: {error}") from error


def _json_lines(file: Path, tokenizer: Any) -> Iterator[str]:
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text(json.loads(line), f"{file}, line {number}", tokenizer)
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizeError(f"{file}, line {number}: cannot be read as JSON: {error}") from error


def _folder(folder: Path, tokenizer: Any) -> Iterator[str]:
    if _is_dataset(folder):
        yield from _dataset(folder, tokenizer)
        return
    for file in _files(folder):
        yield from (
            _parquet(file, tokenizer) if file.suffix == ".parquet" else documents(file, tokenizer)
        )


def _is_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in _SUFFIXES)
    if not files:
        raise QuantizeError(
            f"{folder}: holds no {', '.join(_SUFFIXES)} files and no dataset; give a text or such "
            "a folder"
        )
    return files


def _dataset(folder: Path, tokenizer: Any) -> Iterator[str]:
    datasets = _needed("datasets", folder)
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise QuantizeError(
            f"{folder}: cannot be read as a dataset: {first_line(error)}"
        ) from error
    parts = data.values() if isinstance(data, dict) else [data]
    for part in parts:
        for number, row in enumerate(part):
            yield _text(row, f"{folder}, row {number}", tokenizer)


def _parquet(file: Path, tokenizer: Any) -> Iterator[str]:
    parquet = _needed("pyarrow.parquet", file)
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield _text(row, f"{file}, row {number}", tokenizer)
                number += 1
    except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
        raise QuantizeError(f"{file}: cannot be read as Parquet: {first_line(error)}") from error


def _needed(module: str, source: Path) -> Any:
    """Import a module that not every installation has."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise QuantizeError(f"{source}: reading it needs `pip install {package}`") from error


def _text(row: Any, where: str, tokenizer: Any) -> str:
    """Return the text of one JSON value or dataset's row, which is at ``where``."""
    if isinstance(row, str):
        return row
    found = row if isinstance(row, dict) else {}
    for field in FIELDS:
        value = found.get(field)
        if isinstance(value, str):
            return value
        if field == "messages" and isinstance(value, list):
            try:
                return str(tokenizer.apply_chat_template(value, tokenize=False))
            except Exception as error:
                raise QuantizeError(
                    f"{where}: its messages do not fit the tokenizer's chat template "
                    f"({first_line(error)})"
                ) from error
    raise QuantizeError(f"{where}: has none of the fields {', '.join(FIELDS)}")
