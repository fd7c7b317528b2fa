"""GPT-OSS as llm-compressor linearizes it: each expert's gate, up and down in tensors of their own.

Biases are beside them. In bfloat16 it is quantized to what the published form gives; in NVFP4 it is
converted.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantize.checkpoint.reader import Checkpoint
from quantize.verify import verify
from tests.quantize.checkpoints import EXPERTS, build, convert, save
from tests.quantize.nvfp4_sources import QUANTIZATION, SUFFIXES, stored
from tests.quantize.published_nvfp4 import nvfp4

Tensors = dict[str, torch.Tensor]


def linearized(tensors: Tensors) -> Tensors:
    """``[in, out]`` becomes ``[out, in]``; gate and up, whose columns alternate, come apart."""
    found = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".experts"):
            found[name] = tensor
            continue
        what = "bias" if kind.endswith("_bias") else "weight"
        for expert, one in enumerate(tensor):
            rows = one if what == "bias" else one.T
            parts = {"down_proj": rows}
            if kind.startswith("gate_up"):
                parts = {"gate_proj": rows[0::2], "up_proj": rows[1::2]}
            for part, value in parts.items():
                found[f"{prefix}.{expert}.{part}.{what}"] = value.contiguous()
    return found


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (left[name], right[name])))
        for name in left
    )


def problems(source: Path, target: Path) -> list[str]:
    with Checkpoint(source) as ours, Checkpoint(target, decode=False) as theirs:
        return verify(ours, theirs).problems


def test_as_the_published_form(tmp_path: Path) -> None:
    model = build("gpt_oss")
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    tensors = dict(model.state_dict())
    save(tmp_path / "published", tensors, config)
    save(tmp_path / "linearized", linearized(tensors), config)
    for name in ("published", "linearized"):
        convert(tmp_path / name, tmp_path / f"{name}-nvfp4")
    ours, theirs = (tmp_path / f"{name}-nvfp4" for name in ("linearized", "published"))
    assert same(load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors"))
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    assert problems(tmp_path / "linearized", ours) == []


@pytest.mark.parametrize("to", SUFFIXES)
def test_in_nvfp4(to: str, tmp_path: Path) -> None:
    model = build("gpt_oss")
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    layouts = (first := "compressed-tensors", to)
    forms: list[Tensors] = [{}, {}]
    for name, tensor in linearized(dict(model.state_dict())).items():
        module, _, what = name.rpartition(".")
        for form, layout in zip(forms, layouts, strict=True):
            if what == "weight" and ".experts." in module:
                made = nvfp4(tuple(tensor.shape), divisor=True, seed=len(module) % EXPERTS)
                form |= stored(layout, module, made, 0.25)
            else:
                form[name] = tensor
    source = save(
        tmp_path / "source", forms[0], config | {"quantization_config": QUANTIZATION[first]}
    )
    convert(source, tmp_path / "target", layout=to)
    assert same(load_file(tmp_path / "target" / "model.safetensors"), forms[1])
    assert problems(source, tmp_path / "target") == []
