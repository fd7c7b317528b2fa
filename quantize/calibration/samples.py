"""Calibration samples: tokens of equal length, cut from documents."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import AutoTokenizer

from quantize.calibration.documents import documents
from quantize.errors import QuantizeError, first_line


def load_samples(
    source: Path,
    tokenizer_folder: Path,
    num_samples: int,
    sequence_length: int,
    trust_remote_code: bool = False,
) -> torch.Tensor:
    """Return tokens of the text in ``source``, int64 ``[num_samples, sequence_length]``.

    Documents follow each other, and each begins with the tokenizer's start token if it has one.
    Samples are cut from the whole at equal distances, so a few samples of a large file are still
    from all of it.

    Args:
        source: see ``quantize.calibration.documents.documents``.
        tokenizer_folder: holds the checkpoint's tokenizer.

    Raises:
        QuantizeError: if there is too little text (the error says how much there is), or if text or
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
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens: list[int] = []
    # Ten times as much as is needed, to choose from; the rest of a large file is not read.
    for document in documents(source, tokenizer):
        # Half a character, as JSON can hold it, would be an error.
        document = document.encode("utf-8", "replace").decode("utf-8")
        found = tokenizer.encode(document, add_special_tokens=False, verbose=False)
        tokens += found if found[:1] == start else start + found  # chat templates may begin with it
        if len(tokens) >= 10 * num_samples * sequence_length:
            break
    whole = len(tokens) // sequence_length
    if whole < num_samples:
        raise QuantizeError(
            f"{source}: {len(tokens)} tokens, {num_samples} rows of {sequence_length} need "
            f"{num_samples * sequence_length}; give more text, or fewer or shorter rows"
        )
    starts = [number * whole // num_samples * sequence_length for number in range(num_samples)]
    return torch.tensor([tokens[start : start + sequence_length] for start in starts])


def digest_of(samples: torch.Tensor) -> str:
    """Return a digest that is equal only for equal tokens, int64
    ``[num_samples, sequence_length]``."""
    return hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()
