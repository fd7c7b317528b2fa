"""NVFP4 sources in both layouts, of random bits made by numpy, and what must come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.quantize.checkpoints import EXPERTS, HIDDEN, build, save
from tests.quantize.published_nvfp4 import Nvfp4, nvfp4
from tests.quantize.stored_formats import E4M3, compressed_tensors_group, tensor

INTER = 48
SHAPES = {"gate_proj": (INTER, HIDDEN), "up_proj": (INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
INPUT = {"gate_proj": 0.25, "up_proj": 0.25, "down_proj": 1 / 3}
Tensors = dict[str, torch.Tensor]

SUFFIXES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed-tensors": (
        "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale",
    ),
}  # fmt: skip
QUANTIZATION = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "compressed-tensors": compressed_tensors_group("nvfp4-pack-quantized", {"num_bits": 4}),
}


def stored(layout: str, module: str, made: Nvfp4, input_scale: float | None) -> Tensors:
    """A weight in one of the two layouts."""
    codes, blocks, factor, inputs = (f"{module}.{end}" for end in SUFFIXES[layout])
    found = {codes: tensor(made.codes), blocks: tensor(made.blocks, E4M3)}
    numbers = {factor: made.factor, inputs: input_scale}
    for name, number in numbers.items():
        if number is not None and layout == "modelopt":
            found[name] = torch.tensor(number, dtype=torch.float32)
        elif number is not None:
            found[name] = torch.from_numpy(np.float32(1) / np.float32([number]).reshape(1))
    return found


class Source:
    """A Qwen3-MoE whose experts, and ``linears``, are NVFP4.

    Attributes:
        made: what they are, by module path.
        plain: all other tensors.
        config: of the model, without its quantization.
    """

    def __init__(self, linears: tuple[str, ...] = ()) -> None:
        model = build("qwen3_moe", moe_intermediate_size=INTER)
        self.config: dict[str, Any] = model.config.to_dict() | {
            "architectures": [type(model).__name__]
        }
        self.plain = {n: t for n, t in model.state_dict().items() if ".experts." not in n}
        self.made: dict[str, Nvfp4] = {}
        for layer in range(2):
            for expert in range(EXPERTS):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}"
                pair = nvfp4((2 * INTER, HIDDEN), divisor=True, seed=EXPERTS * layer + expert)
                for part, name in enumerate(("gate_proj", "up_proj")):
                    rows = slice(part * INTER, (part + 1) * INTER)
                    cut = (pair.codes[rows], pair.blocks[rows], pair.factor, pair.weight[rows])
                    self.made[f"{prefix}.{name}"] = Nvfp4(*cut)
                down = nvfp4((HIDDEN, INTER), divisor=True, seed=EXPERTS * layer + expert)
                self.made[f"{prefix}.down_proj"] = down
        for module in linears:
            shape = self.plain.pop(f"{module}.weight").shape
            self.made[module] = nvfp4(tuple(shape), divisor=True)

    def tensors(self, layout: str, activations: bool = True) -> Tensors:
        """Each weight with tensors of its own."""
        found = dict(self.plain)
        for module, made in self.made.items():
            scale = INPUT.get(module.rpartition(".")[2], 0.5) if activations else None
            found |= stored(layout, module, made, scale)
        return found

    def stacked(self, way: str) -> Tensors:
        """Experts in one tensor a layer; all of a stack have the first one's factor."""
        found = dict(self.plain)
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts"
            for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj",) * 2):
                parts = (parts,) if isinstance(parts, str) else parts
                modules = [[f"{prefix}.{e}.{part}" for part in parts] for e in range(EXPERTS)]
                first = self.made[modules[0][0]].factor
                codes, blocks = (
                    np.stack([np.concatenate([field(self.made[m]) for m in ms]) for ms in modules])
                    for field in (lambda m: m.codes, lambda m: m.blocks)
                )
                for module in (m for ms in modules for m in ms):
                    self.made[module] = self.made[module]._replace(factor=first)
                scale = INPUT[parts[0]]
                stack = f"{prefix}.{name}"
                if way == "flat":
                    whole = Nvfp4(
                        codes.reshape(-1, codes.shape[-1]), blocks.reshape(-1, blocks.shape[-1]),
                        first, first,
                    )  # fmt: skip
                    found |= stored("compressed-tensors", stack, whole, scale)
                    continue
                turn = (lambda x: x.swapaxes(1, 2)) if way == "turned" else (lambda x: x)
                found |= {
                    stack: tensor(turn(codes)),
                    f"{stack}_weight_scale": tensor(turn(blocks)).view(E4M3),
                    f"{stack}_weight_scale_2": torch.tensor(first),
                    f"{stack}_input_scale": torch.tensor(scale),
                }
        return found

    def save(self, folder: Path, layout: str, tensors: Tensors) -> Path:
        return save(folder, tensors, self.config | {"quantization_config": QUANTIZATION[layout]})

    def check(self, written: Tensors, layout: str, inputs: bool) -> None:
        """That ``written`` has all of ``made``, as numpy has it, and the plain tensors."""
        expected = dict(self.plain)
        for module, made in self.made.items():
            scale = INPUT.get(module.rpartition(".")[2], 0.5) if inputs else None
            expected |= stored(layout, module, made, scale)
        assert written.keys() == expected.keys()
        for name, wanted in expected.items():
            assert written[name].dtype == wanted.dtype
            assert written[name].shape == wanted.shape
            same = (t.contiguous().reshape(-1).view(torch.uint8) for t in (written[name], wanted))
            assert torch.equal(*same), name
