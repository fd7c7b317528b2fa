"""Write a slice of a MiniMax-M3 at its true expert sizes: config and MoE layers of random weights.

    python -m benchmarks.m3_slice DST [--layers 1] [--experts 16] [--fused] [--file-size 1GB]

A layer of 16 experts is 1.8 GB (hidden 6144, intermediate 3072, bf16), eleven are 20 GB. The layout
is the published one (``block_sparse_moe.experts.E.w1|w3|w2.weight``, which is also what
llm-compressor can read from any file), or with ``--fused`` Transformers' (``mlp.experts`` stacked).
Beside the experts there are router and norms; attention and embeddings are left out, so this is
something to quantize and nothing to run.

All weights are fresh normal numbers, so no two experts are alike. Memory holds one matrix of one
expert: stacked tensors of 1.2 GB are written piece by piece, which ``quantize.run.shards`` has no
need to do. ``config.json`` comes last: where it is, the slice is complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quantize.checkpoint.json_files import INDEX
from quantize.checkpoint.tensors import TensorInfo
from quantize.cli.options import parse_size
from quantize.errors import QuantizeError
from quantize.run.files import write_json

STD = 0.02


@dataclass(frozen=True)
class Slice:
    """What to write: ``layers`` MoE layers, by default of MiniMax-M3's sizes."""

    layers: int = 1
    experts: int = 16
    hidden: int = 6144
    intermediate: int = 3072
    fused: bool = False

    def config(self) -> dict[str, Any]:
        """``config.json``, as either layout comes with it: nested and published, or plain."""
        text: dict[str, Any] = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "dense_intermediate_size": 4 * self.intermediate,
            "shared_intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_local_experts": self.experts,
            "num_experts_per_tok": min(4, self.experts),
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "rotary_dim": 64,
            "vocab_size": 200064,
            "max_position_embeddings": 524288,
            "rms_norm_eps": 1e-6,
            "routed_scaling_factor": 2.0,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
        }
        if self.fused:
            return {
                "architectures": ["MiniMaxM3VLForCausalLM"],
                "model_type": "minimax_m3_vl_text",
                "dtype": "bfloat16",
                **text,
                "mlp_layer_types": ["sparse"] * self.layers,
            }
        published = {
            "hidden_act": "swigluoai",
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "n_shared_experts": 1,
            "moe_layer_freq": [1] * self.layers,
        }
        return {
            "architectures": ["MiniMaxM3SparseForCausalLM"],
            "model_type": "minimax_m3_vl",
            "dtype": "bfloat16",
            "text_config": text | published,
        }

    def tensors(self) -> Iterator[TensorInfo]:
        """Every tensor, in the order of the files."""
        wide, tall = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        for layer in range(self.layers):
            base = f"model.layers.{layer}"
            yield TensorInfo(f"{base}.input_layernorm.weight", "BF16", (self.hidden,))
            yield TensorInfo(f"{base}.post_attention_layernorm.weight", "BF16", (self.hidden,))
            if self.fused:
                moe = f"{base}.mlp"
                yield TensorInfo(f"{moe}.gate.weight", "BF16", (self.experts, self.hidden))
                yield TensorInfo(f"{moe}.gate.e_score_correction_bias", "F32", (self.experts,))
                stacked = (self.experts, 2 * self.intermediate, self.hidden)
                yield TensorInfo(f"{moe}.experts.gate_up_proj", "BF16", stacked)
                yield TensorInfo(f"{moe}.experts.down_proj", "BF16", (self.experts, *tall))
                continue
            moe = f"{base}.block_sparse_moe"
            yield TensorInfo(f"{moe}.gate.weight", "F32", (self.experts, self.hidden))
            yield TensorInfo(f"{moe}.e_score_correction_bias", "F32", (self.experts,))
            for expert in range(self.experts):
                for name, shape in (("w1", wide), ("w2", tall), ("w3", wide)):
                    yield TensorInfo(f"{moe}.experts.{expert}.{name}.weight", "BF16", shape)


def write(target: Path, what: Slice, file_size: int = 10**9, seed: int = 0) -> int:
    """Write ``what`` into the folder ``target``, replacing a slice there; returns its bytes.

    Args:
        file_size: bytes; a file exceeds it only where a single tensor does.

    Raises:
        QuantizeError: if the disk has no room for it.
    """
    files: list[list[TensorInfo]] = [[]]
    for out in what.tensors():
        if files[-1] and sum(other.nbytes for other in files[-1]) + out.nbytes > file_size:
            files.append([])
        files[-1].append(out)
    total = sum(out.nbytes for outputs in files for out in outputs)
    target.mkdir(parents=True, exist_ok=True)
    for old in (target / "config.json", target / INDEX, *target.glob("*.safetensors")):
        old.unlink(missing_ok=True)
    if (free := shutil.disk_usage(target).free) < total + 10**8:
        raise QuantizeError(f"{target}: {total / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")

    generator = torch.Generator().manual_seed(seed)
    piece = what.hidden * what.intermediate
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name, outputs in zip(names, files, strict=True):
        with (target / name).open("wb") as file:
            _write_header(file, outputs)
            for out in outputs:
                _write_normal(file, out, piece, generator)
    if len(files) > 1:
        pairs = zip(names, files, strict=True)
        weight_map = {out.name: name for name, outputs in pairs for out in outputs}
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(target / "config.json", what.config())
    return total


def _write_header(file: BinaryIO, outputs: list[TensorInfo]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for out in outputs:
        offsets = [start, start + out.nbytes]
        header[out.name] = {"dtype": out.dtype, "shape": out.shape, "data_offsets": offsets}
        start = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)


def _write_normal(file: BinaryIO, out: TensorInfo, piece: int, generator: torch.Generator) -> None:
    """Normal numbers for ``out``, ``piece`` of them at a time."""
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[out.dtype]
    left = out.nbytes // dtype.itemsize
    while left:
        values = torch.empty(min(left, piece)).normal_(0.0, STD, generator=generator)
        file.write(values.to(dtype).view(torch.uint8).numpy().data)
        left -= len(values)


def main() -> None:
    """Parse the arguments and write the slice."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument(
        "--fused", action="store_true", help="Transformers' layout: experts stacked"
    )
    parser.add_argument("--file-size", default="1GB", help="largest file")
    args = parser.parse_args()
    what = Slice(args.layers, args.experts, fused=args.fused)
    try:
        total = write(args.target, what, parse_size(args.file_size))
    except QuantizeError as error:
        raise SystemExit(str(error)) from None
    print(f"{args.target}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
