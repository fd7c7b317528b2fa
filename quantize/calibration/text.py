"""Calibration text: files to rows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from quantize.errors import QuantizeError, first_line

FIELDS = ("text", "content", "prompt", "messages")
"""Of a JSON line, in order of preference: where its text is."""
_PIECE = 2**20
"""Characters of a text file that are read at a time."""

_SUFFIXES = (".jsonl", ".txt", ".md", ".py", ".parquet")


def load_rows(
    source: Path, tokenizer_folder: Path, rows: int, length: int, trust_remote_code: bool = False
) -> torch.Tensor:
    """Tokens of the text in ``source``, int64 ``[rows, length]``.

    Documents follow each other, each after the tokenizer's start token if it has one; rows are cut
    from the whole in equal distances, so that few rows of a large file are still from all of it.

    Args:
        source: a text file, a ``.jsonl`` file with one of ``FIELDS`` a line, or a folder: a dataset
            as ``datasets`` saves it, or one of such files.
        tokenizer_folder: the checkpoint's.

    Raises:
        QuantizeError: if there is too little text (saying how much there is), or none that can be
            read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # Transformers raises many kinds here
        raise QuantizeError(
            f"{tokenizer_folder}: no tokenizer could be loaded ({first_line(error)}), and "
            "calibration needs one; copy the original's tokenizer files there"
        ) from error
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens: list[int] = []
    # Ten times as much as is needed, to choose from; the rest of a large file is not read.
    for document in documents(source, tokenizer):
        # Half a character, as JSON can hold it, would be an error.
        document = document.encode("utf-8", "replace").decode("utf-8")
        found = tokenizer.encode(document, add_special_tokens=False, verbose=False)
        tokens += found if found[:1] == start else start + found  # chat templates may begin with it
        if len(tokens) >= 10 * rows * length:
            break
    whole = len(tokens) // length
    if whole < rows:
        raise QuantizeError(
            f"{source}: {len(tokens)} tokens, {rows} rows of {length} need {rows * length}; give "
            "more text, or fewer or shorter rows"
        )
    chosen = [number * whole // rows for number in range(rows)]
    return torch.tensor([tokens[i * length : (i + 1) * length] for i in chosen])


def documents(source: Path, tokenizer: Any = None) -> Iterator[str]:
    """The texts in ``source``, see :func:`load_rows`.

    Args:
        tokenizer: with a chat template, for lines that hold ``messages``.

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


def _text_file(file: Path) -> Iterator[str]:
    """In pieces that end with a line, so that the rest of a large one need not be read."""
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
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        yield from _dataset(folder, tokenizer)
        return
    files = sorted(file for file in folder.rglob("*") if file.suffix in _SUFFIXES)
    if not files:
        raise QuantizeError(f"{folder}: holds no {', '.join(_SUFFIXES)} files and no dataset")
    for file in files:
        yield from (
            _parquet(file, tokenizer) if file.suffix == ".parquet" else documents(file, tokenizer)
        )


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
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise QuantizeError(f"{source}: reading it needs `pip install {package}`") from error


def _text(row: Any, where: str, tokenizer: Any) -> str:
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


def digest_of(tokens: torch.Tensor) -> str:
    """Equal only for equal tokens, int64 ``[rows, length]``."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
