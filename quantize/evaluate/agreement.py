"""Whether two checkpoints are versions of one model, so that it makes sense to compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from quantize.calibration.samples import digest_of, load_samples
from quantize.checkpoint.descriptions import without_descriptions
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.evaluate.side import Side, in_own_words
from quantize.experts.gates import KEY

LENGTH = 2048
"""Tokens of a row by default."""

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_OF_WRITING = {KEY, "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
"""Keys of configs that say nothing of what a model computes."""


def check_same_model(source: Side, target: Side) -> None:
    """See that layers, experts, sizes and vocabulary are the same.

    Raises:
        QuantizeError: naming the first that is not.
    """
    ours, theirs = _measures(source), _measures(target)
    for (what, ours_is), (_, theirs_is) in zip(ours, theirs, strict=False):
        if ours_is != theirs_is:
            raise QuantizeError(
                f"{target.folder}: {what}: {theirs_is}, and {ours_is} in {source.folder}; evaluate "
                "compares two versions of one model: give the one that it was made of"
            )


def _measures(side: Side) -> list[tuple[str, Any]]:
    config = side.model.model.config.get_text_config()
    sites = [
        (f"experts of layer {s.layer}", (s.group.num_experts, s.group.hidden, s.group.intermediate))
        for s in side.model.sites
    ]
    return [
        ("layers", len(side.model.layers)),
        ("vocabulary", config.vocab_size),
        ("hidden size", getattr(config, "hidden_size", None)),
        ("layers with experts", sorted({site.layer for site in side.model.sites})),
        *sorted(sites),
    ]


def differences(source: Side, target: Side) -> Iterator[str]:
    """A note about what the two configs say differently of what the model computes."""
    ours, theirs = (
        without_descriptions(side.checkpoint.text_config()) for side in (source, target)
    )
    names = sorted(
        key
        for key in (ours.keys() | theirs.keys()) - _OF_WRITING
        if ours.get(key) != theirs.get(key)
    )
    if names:
        yield (
            f"Warning: the two config.json differ in {', '.join(names[:8])}"
            f"{f' and {len(names) - 8} more' * (len(names) > 8)}; what that changes counts as loss."
        )


def tokens_of(
    text: Path,
    source: Checkpoint,
    target: Checkpoint,
    samples: int,
    length: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> torch.Tensor:
    """Tokens of the text, int64 ``[samples, length]``, by the source's tokenizer.

    Args:
        length: by default ``LENGTH``, or as many as the model takes.
        say: is told if there is too little text.

    Raises:
        QuantizeError: if the target's tokenizer makes other tokens, the model takes fewer in a row,
            or see ``quantize.calibration.samples.load_samples``.
    """
    folders = source.folder, target.folder
    shape = samples, _length(source, length)
    with in_own_words():
        tokens = load_samples(text, folders[0], *shape, trust_remote_code, say)
    if any((folders[1] / name).exists() for name in _TOKENIZER):
        with in_own_words():
            others = load_samples(text, folders[1], *shape, trust_remote_code)
        if digest_of(tokens) != digest_of(others):
            raise QuantizeError(
                f"{folders[1]}: its tokenizer makes other tokens of {text} than that in "
                f"{folders[0]}; copy the original's tokenizer files there, or give the model that "
                "it was made of"
            )
    return tokens


def _length(checkpoint: Checkpoint, wanted: int | None) -> int:
    """Tokens of a row: what is wanted, or as many as are usual and the model takes.

    Raises:
        QuantizeError: if the model takes fewer than are wanted.
    """
    most = checkpoint.text_config().get("max_position_embeddings")
    if not isinstance(most, int) or most < 2:
        return wanted or LENGTH
    if wanted is not None and wanted > most:
        raise QuantizeError(
            f"--length {wanted}: {checkpoint.folder / 'config.json'} says that the model takes "
            f"{most} tokens (max_position_embeddings); give a shorter length"
        )
    return wanted or min(LENGTH, most)
