"""Calibration samples: tokens of equal length, cut from documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from quantize.calibration.documents import Piece
from quantize.calibration.mixing import Mixture, Rows, Text, spread
from quantize.calibration.sources import Tree, open_source
from quantize.errors import QuantizeError, first_line
from quantize.run.options import MIN_TOKENS

AHEAD = 10
"""Of a text, so many times as much is read as is needed, and rows are from all of that; the rest of
a large file is not read."""


def load_samples(
    sources: Sequence[str | Path] | str | Path,
    tokenizer_folder: Path,
    num_samples: int,
    sequence_length: int,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> torch.Tensor:
    """Return tokens of texts, int64 ``[num_samples, sequence_length]``; fewer samples if there is
    too little text, or one shorter sample.

    Each source gives as many samples as any other, if it has them, and so does each file or folder
    in a folder (``quantize.calibration.mixing``). Within a file documents follow each other, each
    with the special tokens that the tokenizer puts around a text. The same files give the same
    samples.

    Args:
        sources: one or several, see ``quantize.calibration.sources.open_source``.
        tokenizer_folder: holds the checkpoint's tokenizer.
        say: is told if there is too little text.

    Raises:
        QuantizeError: if there is next to no text (the error says how much there is), or if text or
            tokenizer cannot be read.
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
    names = [str(s) for s in ([sources] if isinstance(sources, str | Path) else sources)]
    tree: Tree = [open_source(name, tokenizer) for name in names]
    ahead = -(-AHEAD * num_samples // max(1, _count(tree)))
    mixed = _mixture(tree, tokenizer, num_samples, sequence_length, ahead)
    rows: list[list[int]] = []
    while len(rows) < num_samples and len(row := mixed.row()) == sequence_length:
        rows.append(row)
    if len(rows) < num_samples:
        rows = rows or [row]
        where = ", ".join(names)
        if len(rows[0]) < min(MIN_TOKENS, sequence_length):
            raise QuantizeError(
                f"{where}: {len(row)} token{'s' * (len(row) != 1)}, and fewer than "
                f"{min(MIN_TOKENS, sequence_length)} say nothing; give more text"
            )
        say(
            f"Warning: {where}: too little text. {len(rows)} row{'s' * (len(rows) > 1)} of "
            f"{len(rows[0])} tokens are used instead of {num_samples} of {sequence_length}."
        )
    return torch.tensor(rows)


def digest_of(samples: torch.Tensor) -> str:
    """Return a digest that is equal only for equal tokens, int64
    ``[num_samples, sequence_length]``."""
    return hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()


def _count(tree: Tree) -> int:
    return sum(map(_count, tree)) if isinstance(tree, list) else 1


def _mixture(tree: Tree, tokenizer: Any, rows: int, length: int, ahead: int) -> Rows:
    if not isinstance(tree, list):
        return Text(_tokens(tree, tokenizer), length, ahead)
    # Of more files than rows, those that are read are from all of them.
    parts = spread(tree) if len(tree) > rows else tree
    return Mixture((_mixture(part, tokenizer, rows, length, ahead) for part in parts), length)


def _tokens(pieces: Iterator[Piece], tokenizer: Any) -> Iterator[list[int]]:
    """Yield the pieces' tokens, with the special tokens that the tokenizer puts around a text."""
    before, after = _around(tokenizer)
    for piece in pieces:
        # Half a character, as JSON can hold it, would be an error.
        text = piece.text.encode("utf-8", "replace").decode("utf-8")
        if piece.begins and not piece.templated:
            yield before
        yield tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if piece.ends and not piece.templated:
            yield after


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after a text."""
    word = "a"
    bare = tokenizer.encode(word, add_special_tokens=False)
    whole = tokenizer.encode(word)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise QuantizeError(
        f"{tokenizer.name_or_path}: {type(tokenizer).__name__} makes other tokens of a text with "
        "special tokens around it than without; calibration does not know such tokenizers"
    )
