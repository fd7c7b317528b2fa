"""Whether two versions of this package write the same checkpoints, byte for byte.

    python -m benchmarks.same_bytes BEFORE AFTER --model ../shared/models/m3-nano

``BEFORE`` and ``AFTER`` are checkouts. Each quantizes the same sources with the same options:
m3-nano, m3-nano with some layers' experts in FP8 and some in MXFP8, a tiny random Qwen3-MoE (one
tensor per expert), and a tiny random GPT-OSS in bfloat16 and in MXFP4; in both layouts, with each
scale rule, and with each rounding. All files but the report's are compared. The exit code is 1 if
any differs or only one side has it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LAYOUTS = ("modelopt", "compressed-tensors")
REPORT = "nvfp4_moe_report"
_RUN = "from quantize.cli import main; main()"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="the folder of m3-nano")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    different = compared = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        text = work / "text.txt"
        text.write_text(Path(argparse.__file__).read_text(encoding="utf-8"))
        sources = make_sources(options.model.resolve(), work)
        for name, source, words in cases(sources, text):
            if options.only not in name:
                continue
            before, after = (
                quantize(tree.resolve(), source, work / "out", words)
                for tree in (options.before, options.after)
            )
            compared += len(before)
            wrong = sorted(file for file in before | after if before.get(file) != after.get(file))
            different += len(wrong)
            print(
                f"{name:48} {len(before):3} files",
                "DIFFERENT: " + ", ".join(wrong) if wrong else "same",
                flush=True,
            )
    print(f"{compared} files compared, {different} different")
    return int(different > 0 or not compared)


def cases(sources: dict[str, Path], text: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Each case's name, source, and options."""
    for name, source in sources.items():
        for layout in LAYOUTS:
            for rule in ("max", "mse", "four-six"):
                words = ["--layout", layout, "--scales", rule, "--max-shard-size", "9MB"]
                yield f"{name} {layout} {rule}", source, words
    small = ["--calibration-rows", "4", "--calibration-length", "128"]
    for name in ("m3-nano", "mixed"):
        for layout, rounding in zip(
            (*LAYOUTS, "modelopt"), ("descent", "two-sided", "gptq"), strict=True
        ):
            words = ["--layout", layout, "--rounding", rounding, "--calibrate", str(text), *small]
            yield f"{name} {layout} {rounding}", sources[name], words
    words = ["--all-linears", "--exclude", "*.layers.3.*"]
    yield "m3-nano modelopt all linears but layer 3", sources["m3-nano"], words


def quantize(tree: Path, source: Path, target: Path, words: list[str]) -> dict[str, str]:
    """Digests of what the checkout ``tree`` writes, by file."""
    shutil.rmtree(target, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _RUN, "quantize", str(source), str(target), *words]
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(command)}\n{done.stderr}")
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in target.iterdir()
        if file.is_file() and not file.name.startswith(REPORT)
    }


def make_sources(m3_nano: Path, work: Path) -> dict[str, Path]:
    """The checkpoints that are quantized, by name."""
    sources = {"m3-nano": m3_nano, "mixed": work / "mixed"}
    _mixed(m3_nano, sources["mixed"])
    from tests.quantize import checkpoints

    model = checkpoints.build("gpt_oss", intermediate_size=64, hidden_size=64)
    sources["qwen3-moe"] = work / "qwen3-moe"
    checkpoints.build("qwen3_moe").save_pretrained(sources["qwen3-moe"])
    for name in ("gpt-oss", "gpt-oss-mxfp4"):
        sources[name] = work / name
        model.save_pretrained(sources[name])
    _to_mxfp4(sources["gpt-oss-mxfp4"])
    return sources


def _mixed(m3_nano: Path, target: Path) -> None:
    """m3-nano with the experts of layers 1 and 2 in FP8, of layer 3 in MXFP8, all else bf16."""
    shutil.copytree(m3_nano, target)
    tensors = load_file(m3_nano / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        layer = int(name.split(".layers.")[1].split(".")[0])
        if layer > 3:
            continue
        store = _fp8 if layer < 3 else _mxfp8
        halves = 2 if name.endswith("gate_up_proj") else 1  # each is cut into blocks on its own
        parts = [store(part) for expert in tensors[name] for part in expert.chunk(halves)]
        codes, scales = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        experts = len(tensors[name])
        tensors[name] = codes.unflatten(0, (experts, -1))
        tensors[f"{name}_scale_inv"] = scales.unflatten(0, (experts, -1))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _edit_config(target, {"quant_method": "fp8", "weight_block_size": [128, 128]})


def _fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 ``[out, in]`` and float32 scales of blocks of 128 by 128."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    codes, scales = torch.empty(weight.shape), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = weight[block].float().abs().amax() / 448
            codes[block] = weight[block].float() / scales[i, j]
    return codes.to(torch.float8_e4m3fn), scales


def _mxfp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 ``[out, in]`` and E8M0 bytes ``[out, in / 32]``."""
    blocks = weight.float().unflatten(1, (-1, 32))
    exponent = (blocks.abs().amax(-1) / 448).log2().ceil().clamp(-127, 127)
    codes = (blocks / exponent.exp2().unsqueeze(-1)).flatten(1).to(torch.float8_e4m3fn)
    return codes, (exponent + 127).to(torch.uint8)


def _to_mxfp4(folder: Path) -> None:
    """GPT-OSS's experts in place as it is published: blocks of bytes, and their scales."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // 32
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), dtype=torch.uint8, generator=generator
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 124, shape, dtype=torch.uint8, generator=generator
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _edit_config(folder, {"quant_method": "mxfp4"})


def _edit_config(folder: Path, quantization: dict[str, Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"quantization_config": quantization}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
