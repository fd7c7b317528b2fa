"""What calibration needs, said before it starts: arithmetic on sizes; no tensor is read."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.filesize import decimal

from quantize.calibration.calibrate import precision
from quantize.calibration.forward import TOKENS_PER_RUN
from quantize.calibration.proof import PRECISION, SMALL_MODEL, number_of_texts
from quantize.calibration.reference import WHOLE_LAYER
from quantize.calibration.routing import CHUNK
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import tensor_names_of
from quantize.experts.names import layer_number
from quantize.nvfp4.rounding import METHODS

if TYPE_CHECKING:
    from quantize.run.plan import Plan


class Budget(NamedTuple):
    """What calibration needs, in bytes.

    Attributes:
        memory: on the device: a layer without its experts, one expert with its second moments, and
            a run's activations; or what the proof (``quantize.calibration.proof``) takes. Beside
            it, the system keeps as much of its files in memory as there is room for.
        states: on disk, hidden states: of one layer; with gradients, of all layers.
    """

    memory: int
    states: int

    def __str__(self) -> str:
        return (
            f"about {decimal(self.memory)} of memory; {decimal(self.states)} of hidden states on "
            "disk until the run is complete"
        )


def needed(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> Budget:
    """Return what a plan with calibration needs on ``device``."""
    settings = plan.options.calibration
    assert settings is not None
    method = METHODS[settings.method] if settings.method is not None else None
    length = settings.sequence_length
    total = settings.num_samples * length
    width = precision(device).itemsize
    experts = tensor_names_of(plan.found)
    decoder = plan.found[0].prefix.partition("layers.")[0]
    layers: dict[int | None, int] = defaultdict(int)
    for name, info in checkpoint.tensors.items():
        if name.startswith(decoder) and name not in experts:
            layers[layer_number(name)] += math.prod(info.shape)
    beside = layers.pop(None, 0)
    largest = max(layers.values(), default=0)
    hidden = max(group.hidden for group in plan.found)
    inner = max(group.intermediate for group in plan.found)
    model = _hidden_of_model(checkpoint, hidden)
    wide = state_size(checkpoint, hidden)
    # One expert: its weights, in float32 and quantized too; and what rounding gate and up takes.
    expert = hidden * inner * 3 * width
    expert *= 2 if device.type == "cuda" else 1  # the next one's weights, too (`read_ahead`)
    if method is not None:
        expert += hidden * inner * (3 * 12 + 2 * method.weight_bytes)
        expert += max(hidden, inner) ** 2 * method.hessian_bytes
    # Attention's scores and a few copies of what layers pass on; on the way back, all steps of it.
    tokens = max(TOKENS_PER_RUN, length)
    run = tokens * (wide * 16 + inner * 8) * width
    chunk = CHUNK * 3 * (hidden + 2 * inner) * 4
    memory = (largest + beside) * width + expert + run + chunk
    last = max(group.layer for group in plan.found)
    # The proof: a layer in float32 with its experts, whole or one of them, while they are loaded;
    # what each layer returns and its experts are given.
    compared = number_of_texts(length) * length
    together = max(group.parameters for group in plan.found) * PRECISION.itemsize
    alone = 3 * hidden * inner * PRECISION.itemsize
    proof = (largest + beside + compared * (wide * 16 + inner * 8)) * PRECISION.itemsize
    proof += chunk + 3 * (together if together <= WHOLE_LAYER else alone)
    proof_states = compared * wide * PRECISION.itemsize * (2 * (last + 1) + 4)
    if method is None or not method.needs_output_hessian:
        states = max(total * wide * (3 * width + 4), proof_states)
        return Budget(max(memory, proof), states)
    memory += max(2 * inner, hidden) ** 2 * method.output_hessian_bytes + 2 * run + chunk
    # One text at the model's end: logits, probabilities and gradients, with the head's weights.
    vocabulary = max(
        (info.shape[0] for name, info in checkpoint.tensors.items()
         if name.startswith(decoder) and layer_number(name) is None and len(info.shape) == 2),
        default=0,
    )  # fmt: skip
    after = [size for number, size in layers.items() if number is not None and number > last]
    end = (beside + vocabulary * model + sum(after)) * width + length * vocabulary * 16
    end += len(after) * length * (wide * 16 + inner * 8) * width
    kept = last - min(group.layer for group in plan.groups) + 2
    states = total * wide * ((kept + 1) * width + 5 * 4)
    if checkpoint.nbytes <= SMALL_MODEL:
        proof += vocabulary * (model + 2 * compared) * PRECISION.itemsize
    states = max(states, proof_states)
    return Budget(max(memory, end, proof), states)


STREAMS = ("hc_mult", "hc_count")
"""Keys of configs that say how many hidden states hyper-connections have (arXiv 2409.19606):
DeepSeek-V4's and its relatives', Qwen4's."""


def state_size(checkpoint: Checkpoint, hidden: int) -> int:
    """Return how many numbers a layer passes on for each token: the model's hidden size, or a
    multiple of it with hyper-connections.

    Args:
        hidden: the experts' hidden size, which may be another than the model's (Muse Spark).
    """
    config = checkpoint.text_config()
    found = [config[key] for key in STREAMS if isinstance(config.get(key), int)]
    return _hidden_of_model(checkpoint, hidden) * max([1, *found])


def _hidden_of_model(checkpoint: Checkpoint, hidden: int) -> int:
    size = checkpoint.text_config().get("hidden_size")
    return size if isinstance(size, int) else hidden
