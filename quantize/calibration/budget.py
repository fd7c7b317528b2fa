"""What calibration needs, said before it starts: arithmetic on sizes, nothing is read."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.filesize import decimal

from quantize.calibration.routing import CHUNK
from quantize.calibration.run import precision, staged_bytes
from quantize.calibration.walk import TOKENS
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import ExpertGroup, source_names
from quantize.experts.names import layer_number
from quantize.nvfp4.rounding import METHODS

if TYPE_CHECKING:
    from quantize.run.plan import Plan


class Budget(NamedTuple):
    """Bytes.

    Attributes:
        memory: on the device: a layer without its experts, one expert with its second moments and
            a run's activations. What the system keeps of files comes on top, as far as there is
            memory.
        states: on disk, hidden states: of one layer, or, with gradients, of all.
        staged: on disk, quantized experts.
    """

    memory: int
    states: int
    staged: int

    def __str__(self) -> str:
        return (
            f"about {decimal(self.memory)} of memory; {decimal(self.states)} of hidden states and "
            f"{decimal(self.staged)} of experts on the target's disk until the run is complete"
        )


def needed(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> Budget:
    """For a plan with calibration."""
    settings = plan.options.calibration
    assert settings is not None
    width = precision(device).itemsize
    experts = source_names(plan.found)
    decoder = plan.found[0].prefix.partition("layers.")[0]
    layers: dict[int | None, int] = defaultdict(int)
    for name, info in checkpoint.tensors.items():
        if name.startswith(decoder) and name not in experts:
            layers[layer_number(name)] += math.prod(info.shape)
    beside = layers.pop(None, 0)
    largest = max(layers.values(), default=0)
    hidden = max(group.hidden for group in plan.found)
    inner = max(group.intermediate for group in plan.found)
    wide = hidden * residual_streams(checkpoint)  # of what layers pass on
    back = METHODS[settings.method].needs_output
    # An expert: its weights, in float32 and quantized; what rounding keeps of gate and up; moments
    # with their factors in float64.
    expert = hidden * inner * (3 * (width + 12) + 2 * 24) + max(hidden, inner) ** 2 * 48
    # Attention's scores and a few copies of what layers pass on; on the way back, all steps of it.
    tokens = max(TOKENS, settings.length)
    run = tokens * (wide * 16 + inner * 8) * width * (3 if back else 1)
    chunk = CHUNK * 3 * (hidden + 2 * inner) * 4
    total = settings.rows * settings.length
    if not back:
        return Budget(
            (largest + beside) * width + expert + run + chunk,
            total * wide * (3 * width + 4),
            staged_bytes(plan),
        )
    # Moments of the gradients, with copies and factors; weights and errors in float32 once more.
    expert += 24 * (max(2 * inner, hidden) ** 2 + 2 * inner * hidden) + chunk
    # One text at the model's end: logits, probabilities and gradients, with the head's weights.
    vocabulary = max(
        (info.shape[0] for name, info in checkpoint.tensors.items()
         if name.startswith(decoder) and layer_number(name) is None and len(info.shape) == 2),
        default=0,
    )  # fmt: skip
    last = max(map(_layer_of, plan.found))
    after = [size for number, size in layers.items() if number is not None and number > last]
    end = (beside + vocabulary * hidden + sum(after)) * width + settings.length * vocabulary * 16
    end += len(after) * settings.length * (wide * 16 + inner * 8) * width
    kept = last - min(map(_layer_of, plan.groups)) + 2
    return Budget(
        max((largest + beside) * width + expert + run + chunk, end),
        total * wide * ((kept + 1) * width + 5 * 4),
        staged_bytes(plan),
    )


STREAMS = ("hc_mult", "hc_count")
"""Where configs say how many hidden states hyper-connections have (arXiv 2409.19606): DeepSeek-V4's
and its relatives', Qwen4's."""


def residual_streams(checkpoint: Checkpoint) -> int:
    """How many hidden states a layer passes on for each token: one without hyper-connections."""
    config = checkpoint.text_config()
    found = [config[key] for key in STREAMS if isinstance(config.get(key), int)]
    return max([1, *found])


def _layer_of(group: ExpertGroup) -> int:
    return layer_number(group.prefix) or 0
