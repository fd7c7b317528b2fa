"""The routed experts of an NVFP4 folder as plain floats, read from its files and nothing else.

Names are those that this package, ModelOpt and llm-compressor write, one expert's projections each:
``….layers.N.….experts.E.gate_proj|up_proj|down_proj|w1|w3|w2`` with a layout's four suffixes. What
the numbers mean is ``quantize.nvfp4.format``'s and the layout's. A folder whose weights alone are
quantized (``W4A16_NVFP4``, llm-compressor's ``NVFP4A16``) has no input scales.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY, Gates, from_contract
from quantize.experts.names import PROJECTIONS
from quantize.layouts import detect
from quantize.layouts.layout import Layout
from quantize.nvfp4.format import NvFp4

_KINDS = {name: kind for names in PROJECTIONS for kind, name in enumerate(names)}
_WEIGHT = re.compile(
    r"(?P<module>.*\blayers\.(?P<layer>[0-9]{1,9})\..*\bexperts\.(?P<expert>[0-9]{1,9})\."
    rf"(?P<projection>{'|'.join(_KINDS)}))\."
)


class Experts(NamedTuple):
    """One layer's routed experts.

    Attributes:
        gate_up: ``[experts, 2 * intermediate, hidden]``, all of gate's rows, then up's.
        down: ``[experts, hidden, intermediate]``.
        input_scales: float32 ``[2, experts]``, as they multiply, of what goes into gate and up (the
            larger of the two, as vLLM takes it) and into down; None if activations stay as they
            are.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    input_scales: torch.Tensor | None


def read(
    folder: Path, floats: Callable[[NvFp4], torch.Tensor] = NvFp4.dequantize
) -> tuple[dict[int, Experts], Gates | None]:
    """Float32 experts by layer number, and the gate contract if ``config.json`` has one.

    Args:
        floats: what a kernel makes of a weight, if not what it means.

    Raises:
        QuantizeError: if the folder is not NVFP4 in a known layout, or experts are incomplete.
    """
    with Checkpoint(folder, decode=False) as checkpoint:
        config = checkpoint.config
        layout = detect(config.get("quantization_config") or {})
        if layout is None:
            raise QuantizeError(f"{folder} is not NVFP4 in a layout known here")
        modules: dict[int, dict[tuple[int, int], str]] = defaultdict(dict)
        for name in checkpoint.stored:
            match = _WEIGHT.match(name)
            if match and name == f"{match['module']}.{layout.suffixes[0]}":
                key = int(match["expert"]), _KINDS[match["projection"]]
                modules[int(match["layer"])][key] = match["module"]
        layers = {
            number: _layer(checkpoint, layout, found, floats)
            for number, found in sorted(modules.items())
        }
    if not layers:
        raise QuantizeError(f"{folder} holds no routed experts in NVFP4")
    where = str(folder / "config.json")
    return layers, from_contract(config[KEY], where) if KEY in config else None


def _layer(
    checkpoint: Checkpoint,
    layout: Layout,
    modules: dict[tuple[int, int], str],
    floats: Callable[[NvFp4], torch.Tensor],
) -> Experts:
    count = 1 + max(expert for expert, _ in modules)
    parts: list[list[torch.Tensor]] = [[], [], []]
    scales: list[list[torch.Tensor]] = [[], [], []]
    for expert in range(count):
        for kind in range(3):
            if (expert, kind) not in modules:
                example = next(iter(modules.values()))
                raise QuantizeError(
                    f"{checkpoint.folder}: expert {expert} beside {example} is incomplete"
                )
            weight, scale = _weight(checkpoint, layout, modules[expert, kind])
            parts[kind].append(floats(weight))
            if scale is not None:
                scales[kind].append(scale)
    gate, up, down = (torch.stack(part) for part in parts)
    inputs = None
    if all(len(part) == count for part in scales):
        of_gate, of_up, of_down = (torch.stack(part) for part in scales)
        inputs = torch.stack((torch.maximum(of_gate, of_up), of_down))
    return Experts(torch.cat((gate, up), dim=1), down, inputs)


def _weight(
    checkpoint: Checkpoint, layout: Layout, module: str
) -> tuple[NvFp4, torch.Tensor | None]:
    names = [f"{module}.{suffix}" for suffix in layout.suffixes]
    missing = [name for name in names[:3] if name not in checkpoint.stored]
    if missing:
        raise QuantizeError(f"{checkpoint.folder}: {missing[0]} is missing")
    tensors = {
        suffix: checkpoint.load(name)
        for suffix, name in zip(layout.suffixes, names, strict=True)
        if name in checkpoint.stored
    }
    weight, scale = layout.restore(tensors)
    return weight, None if scale is None else scale.float()
