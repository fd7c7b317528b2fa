"""What a user should know of a source before it is quantized, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quantize.checkpoint.descriptions import are_plain, descriptions
from quantize.checkpoint.kv_cache import kv_cache_of
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.sources.fp8_block import without_scale
from quantize.experts.parts import other_part
from quantize.run.options import Options

EXACT = "power-of-two"
"""The rule of scales that loses nothing of MXFP4."""


def left_over(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note about what the config says of quantization, if no tensor is quantized; else empty."""
    paths = [path for path, _ in descriptions(checkpoint.config)]
    if not paths or not are_plain(checkpoint.stored):
        return ()
    cache = kv_cache_of(checkpoint.folder, checkpoint.config, checkpoint.stored).key
    but = ", but for what it says of keys and values" if cache else ""
    return (
        f"{checkpoint.folder / 'config.json'}: {', '.join(paths)} is left over: no tensor is "
        f"quantized. It is dropped{but}.",
    )


def bare_fp8(checkpoint: Checkpoint) -> Iterator[str]:
    """A note about FP8 tensors without a scale. Experts that are quantized have none."""
    if bare := without_scale(checkpoint.tensors.values()):
        more = f" and {len(bare) - 1} more" * (len(bare) > 1)
        yield (
            f"Warning: {bare[0].file.name}: {bare[0].name}{more} {'are' if more else 'is'} FP8 "
            "without a scale. Copied as stored; engines take such values as they are, which is "
            "wrong if a scale was lost."
        )


def of_mxfp4(checkpoint: Checkpoint, options: Options) -> Iterator[str]:
    """A note that a rule of scales gives what the source has, if that is not the one taken."""
    calibrated = options.calibration is not None and options.calibration.method is not None
    if "mxfp4" in checkpoint.formats and options.scales != EXACT and not calibrated:
        yield f"SRC's experts are MXFP4: --scales {EXACT} gives exactly their weights."


def other_parts(checkpoint: Checkpoint, stays: Sequence[str]) -> Iterator[str]:
    """Notes about experts that are outside of the language model and are not asked for.

    Args:
        stays: module paths of all experts that are left out.
    """
    parts: dict[str, list[str]] = {}
    for prefix in stays:
        if part := other_part(prefix, checkpoint.config):
            parts.setdefault(part, []).append(prefix)
    for part, prefixes in parts.items():
        more = f" and {len(prefixes) - 1} more" * (len(prefixes) > 1)
        yield (
            f"Experts outside of the language model stay as they are: {prefixes[0]}{more}; "
            f"--include '*{part}*' asks for them."
        )
