"""Reading one file of documents, or one data set: its texts, one after the other."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from quantize.errors import QuantizeError, first_line

FIELDS = ("text", "content", "messages", "prompt")
"""Where the text of a JSON object or a data set's row is, in order of preference."""

SUFFIXES = (".txt", ".md", ".py", ".json", ".jsonl", ".parquet")
"""Of files that are read in a folder; all but Parquet with ``.gz`` too."""

EXTRA = "pip install 'vllm-nvfp4-moe[datasets]'"

_PIECE = 2**20
"""Bytes of a text file that are read at a time."""


class Piece(NamedTuple):
    """A document, or a part of a long one.

    Attributes:
        text: of it.
        templated: a chat template made the text, with all special tokens that there are to be.
        begins, ends: the document begins with this piece, and ends with it.
    """

    text: str
    templated: bool = False
    begins: bool = True
    ends: bool = True


def documents(file: Path, tokenizer: Any = None) -> Iterator[Piece]:
    """Yield the texts in ``file``, without empty ones.

    Args:
        file: a ``.json`` file with a list of strings or objects, or with such a list as ``data``; a
            ``.jsonl`` file with one of these on each line; a ``.parquet`` file; a folder that is a
            data set as ``datasets`` saves it; or else a text. Text and JSON may be gzipped
            (``.gz``). Objects and rows have one of ``FIELDS``.
        tokenizer: has the chat template for ``messages``.

    Raises:
        QuantizeError: naming the file, and line, entry or row, that cannot be read.
    """
    kind = kind_of(file)
    if file.is_dir():
        return rows(_saved(file), file, tokenizer)
    if kind == ".jsonl":
        return _json_lines(file, tokenizer)
    if kind == ".json":
        return _json(file, tokenizer)
    if kind == ".parquet":
        return rows(_parquet(file), file, tokenizer)
    return _text_file(file)


def kind_of(file: Path) -> str:
    """A file's suffix, in lower case and without ``.gz``."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def rows(found: Iterable[Any], where: object, tokenizer: Any) -> Iterator[Piece]:
    """Yield the texts of a data set's rows.

    Raises:
        QuantizeError: naming ``where`` and the row, if it cannot be read or has no text.
    """
    number = 0
    try:
        for number, row in enumerate(found):
            yield from _pieces(row, f"{where}, row {number}", tokenizer)
    except QuantizeError:
        raise
    except Exception as error:  # PyArrow and datasets raise many kinds
        raise QuantizeError(
            f"{where}: cannot be read as a data set, at or after row {number}: {first_line(error)}"
        ) from error


def needed(module: str, source: object) -> Any:
    """Import a module that not every installation has.

    Raises:
        QuantizeError: if it is not there; it says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise QuantizeError(f"{source}: reading it needs `{EXTRA}`") from error


def _opened(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if file.name.lower().endswith(".gz") else file.open("rb")


_UNREADABLE = (OSError, EOFError, zlib.error, ValueError, RecursionError)
"""What reading, unzipping, decoding and parsing raise."""


def _text_file(file: Path) -> Iterator[Piece]:
    """Yield pieces that end with a line, so that the rest of a large file need not be read."""
    begins, text = True, ""
    try:
        with _opened(file) as lines:
            while read := lines.readlines(_PIECE):
                if text:
                    yield Piece(text, begins=begins, ends=False)
                    begins = False
                text = b"".join(read).decode("utf-8-sig" if begins and not text else "utf-8")
    except _UNREADABLE as error:
        raise QuantizeError(f"{file}: cannot be read as text: {error}") from error
    if not begins or text.strip():
        yield Piece(text, begins=begins)


def _json_lines(file: Path, tokenizer: Any) -> Iterator[Piece]:
    number = 0
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _pieces(json.loads(line), f"{file}, line {number}", tokenizer)
    except _UNREADABLE as error:
        # Parsing says where on a line it stopped; reading stops at the line after the last.
        at = number if isinstance(error, ValueError | RecursionError) else number + 1
        raise QuantizeError(f"{file}, line {at}: cannot be read as JSON: {error}") from error


def _json(file: Path, tokenizer: Any) -> Iterator[Piece]:
    try:
        with _opened(file) as whole:
            value = json.loads(whole.read())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many files of JSON lines are called .json
            yield from _json_lines(file, tokenizer)
            return
        raise QuantizeError(
            f"{file}, line {error.lineno}: cannot be read as JSON: {error}"
        ) from error
    except _UNREADABLE as error:
        raise QuantizeError(f"{file}: cannot be read as JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("data", [value])
    if not isinstance(value, list):
        raise QuantizeError(
            f"{file}: is neither a list of texts, nor an object with such a list as `data`"
        )
    for number, entry in enumerate(value, 1):
        yield from _pieces(entry, f"{file}, entry {number}", tokenizer)


def _saved(folder: Path) -> Iterator[Any]:
    datasets = needed("datasets", folder)
    yield from datasets.load_from_disk(str(folder))


def _parquet(file: Path) -> Iterator[Any]:
    parquet = needed("pyarrow.parquet", file)
    with parquet.ParquetFile(file) as opened:
        there = [name for name in (*FIELDS, "tools") if name in opened.schema_arrow.names]
        for batch in opened.iter_batches(batch_size=64, columns=there or None):
            yield from batch.to_pylist()


def _pieces(row: Any, where: str, tokenizer: Any) -> Iterator[Piece]:
    """Yield the text of one JSON value or data set's row, which is at ``where``, if it is not
    empty."""
    found = row if isinstance(row, dict) else {"text": row}
    for field in FIELDS:
        value = found.get(field)
        if isinstance(value, str):
            if value.strip():
                yield Piece(value)
            return
        if field == "messages" and isinstance(value, list):
            yield Piece(_templated(value, found.get("tools"), where, tokenizer), templated=True)
            return
    there = f", only {', '.join(map(str, [*row][:8]))}" if isinstance(row, dict) and row else ""
    raise QuantizeError(
        f"{where}: has none of the fields {', '.join(FIELDS)} with text in it{there}; call the one "
        f"with the text {FIELDS[0]}"
    )


def _templated(messages: list[Any], tools: Any, where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise QuantizeError(
            f"{where}: has messages, and the model's tokenizer has no chat template; copy the "
            "original's chat_template.jinja beside it, or give plain text"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False))
    except Exception as error:  # a template may raise anything
        raise QuantizeError(
            f"{where}: its messages do not fit the tokenizer's chat template ({first_line(error)})"
        ) from error
