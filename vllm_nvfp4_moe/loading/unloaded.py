"""Quantized experts that vLLM's own methods run, beside ours: refused if something was not loaded.

vLLM's classes pass over names that they do not know, without a word, and its methods make
parameters of memory that is not initialised, or of ones. MiniMax-M3's class, for one, drops the
scales of experts in FP8 (``quirks.MINIMAX_M3_SCALES``), and the text is then noise.

So the first numbers of each expert's matrices and scales are marked when the parameters are made,
before anything is loaded. A mark that is still there when vLLM processes the weights says that
nothing was. That is true however a class loads: through loaders, or around them. Our own layers
count what comes (``loading.checks``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config

from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.loading import minimax_m3
from vllm_nvfp4_moe.loading.plain import FROM_FILES
from vllm_nvfp4_moe.loading.stored import Stored

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_LOADED = (
    "weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2",
    "weight_global_scale",
)  # fmt: skip
"""What checkpoints have of every quantized expert, by the ends of vLLM's names of parameters."""
_INPUTS = ("input_scale", "input_global_scale")
"""What those have whose headers say so, though experts that calibration did not see may lack it;
vLLM's ones are then what is meant."""
_MARK = bytes((255, 0, 165, 90) * 4)
"""For integers. As E8M0, the exponents of MXFP8 and MXFP4, the first byte is NaN."""


def guard(method: Any, prefix: str, stored: Stored) -> None:
    """Have ``method``, a quantized one of vLLM's that is for one layer, refuse it if a parameter,
    or one expert's part of it, was not loaded; or if there is none for the checkpoint's biases.

    Args:
        prefix: the layer's module path, as ``stored`` has it.
        stored: the checkpoint's headers.
    """
    if get_current_vllm_config().load_config.load_format not in FROM_FILES:
        return
    create = method.create_weights
    marked = _look_for_marks(method, prefix, stored)

    def create_weights(layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        create(layer, *args, **kwargs)
        if not hasattr(layer, "w13_bias") and (bias := stored.bias(prefix)):
            raise RefusedError(
                f"{layer.layer_name}: the checkpoint has {bias}, and vLLM's "
                f"{type(method).__name__} would leave its experts' biases out. Quantize the "
                "original again with: nvfp4-moe quantize SOURCE TARGET"
            )
        minimax_m3.load_scales(layer)
        marked.update(_mark_all(layer, prefix, stored))

    method.create_weights = create_weights


def guard_built(layer: RoutedExperts, prefix: str, stored: Stored) -> None:
    """As :func:`guard`, of a layer whose class has chosen its method without asking, and which has
    its parameters."""
    marked = _look_for_marks(layer.quant_method, prefix, stored)
    marked.update(_mark_all(layer, prefix, stored))


def _look_for_marks(method: Any, prefix: str, stored: Stored) -> set[str]:
    """Have ``method`` look for marks before it processes weights. Returns the set of the names of
    parameters that have them, which is to be filled."""
    process = method.process_weights_after_loading
    marked: set[str] = set()

    def process_weights_after_loading(layer: RoutedExperts) -> None:
        # Once: a reload writes over what was loaded, and vLLM may exchange methods.
        method.__dict__.pop("process_weights_after_loading", None)
        _check(layer, prefix, stored, marked)
        process(layer)

    method.process_weights_after_loading = process_weights_after_loading
    return marked


def _mark_all(layer: RoutedExperts, prefix: str, stored: Stored) -> Iterator[str]:
    """Mark what is to be loaded, and name it."""
    for name, _, _, head in _heads(layer, prefix, stored):
        head.copy_(_mark(head))
        yield name


def _check(layer: RoutedExperts, prefix: str, stored: Stored, marked: set[str]) -> None:
    """Raise RefusedError if a mark is left."""
    for name, shard, experts, head in _heads(layer, prefix, stored):
        if name not in marked:
            continue
        left = (_bytes(head) == _bytes(_mark(head))).all(-1)
        if name.endswith(_INPUTS) and not left.all():
            head[left] = 1.0  # as vLLM has made it
            continue
        if not left.any():
            continue
        lacking = left.nonzero().flatten().tolist()
        raise RefusedError(
            f"{layer.layer_name}: nothing was loaded into {name} for {len(lacking)} of its "
            f"{experts} experts here (the first is {lacking[0]}, {shard}): the checkpoint lacks "
            "it, or vLLM's class for the model passes over the name that it has there, and the "
            "text would be noise. Complete the download, try another --model-impl, or quantize the "
            "original again with: nvfp4-moe quantize SOURCE TARGET"
        )


def _heads(
    layer: RoutedExperts, prefix: str, stored: Stored
) -> Iterator[tuple[str, str, int, torch.Tensor]]:
    """The first elements of each expert's part of each parameter that must be loaded: its name, the
    matrix, how many experts it has, and a view ``[experts, elements]``.

    What pads a part comes behind them, and a mark must not stay there: of floats and exponents,
    where it is NaN, the first alone is marked; of other integers as many as :data:`_MARK` has.
    """
    parameters = dict(layer.named_parameters(recurse=False))
    for prefix_, shards in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        count = len(shards) if prefix_ == "w2" else layer.moe_config.w13_num_shards
        for suffix in (*_LOADED, *(s for s in _INPUTS if stored.has(prefix, s))):
            parameter = parameters.get(name := f"{prefix_}_{suffix}")
            if parameter is None or parameter.is_meta:
                continue
            alone = parameter.is_floating_point() or "scale" in suffix
            long = 1 if alone else len(_MARK)
            for shard, row in zip(shards, _parts(parameter, count), strict=False):
                yield name, shard, len(parameter), row[:, :long]


def _parts(parameter: torch.nn.Parameter, count: int) -> list[torch.Tensor]:
    """Of each of ``count`` matrices that lie one after another, its first row, ``[experts,
    elements]``; of one number for a matrix that number.

    Args:
        parameter: ``[experts]``, ``[experts, matrices]``, ``[experts, rows]`` or ``[experts, rows,
            columns]``; with the last two exchanged if vLLM has marked it as transposed. A row may
            have more dimensions, as blocks of GGML's formats have.
    """
    data = parameter.data
    if data.ndim == 1:
        return [data[:, None]]
    along = 2 if data.ndim == 3 and getattr(parameter, "is_transposed", False) else 1
    if data.shape[along] % count:
        count = 1
    found = []
    for part in data.chunk(count, along):
        found.append(part[:, 0].flatten(1) if part.ndim >= 3 else part)
    return found


def _mark(head: torch.Tensor) -> torch.Tensor:
    """What is written to one expert's ``head``: NaN, where there is one."""
    if head.dtype.is_floating_point:
        nan = torch.full(head.shape[-1:], torch.nan, dtype=torch.float32, device=head.device)
        return nan.to(head.dtype)
    data = torch.frombuffer(bytearray(_MARK * head.dtype.itemsize), dtype=head.dtype)
    return data[: head.shape[-1]].to(head.device)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
