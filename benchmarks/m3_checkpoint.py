"""Write a MiniMax-M3 of random weights that vLLM serves: the published layout, true expert sizes.

    python -m benchmarks.m3_checkpoint DST [--layers 5] [--heads 64] [--bf16] [--tokenizer NANO]

A layer is 128 experts of 6144 x 3072: 4.08 GB in NVFP4, 14.5 GB in bf16; five quantized layers are
19 GiB of experts. All layers are sparse; vocabulary, heads and context are small unless asked
otherwise. Nothing is quantized here: names, shapes and config are what this package's quantizer
plans for such a source, the numbers are random, and each is one that a checkpoint could hold:

* 4-bit codes: random bytes;
* block scales: E4M3 of 64 to 240;
* global scales: such that weights have the standard deviation ``STD``;
* bf16: random signs and mantissas, magnitudes from 2**-7 to 2**-5, that is about ``STD`` too.

Threads write a file each; 20 GB take a few seconds in ``/dev/shm``. ``config.json`` comes last.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.m3_slice import Slice
from quantize.checkpoint.json_files import INDEX
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY, to_contract
from quantize.run.files import write_json
from quantize.run.made import FIELD, record_of
from quantize.run.options import Options
from quantize.run.plan import plan
from quantize.run.shards import header

STD = 0.02
FILE_SIZE = 10**9

_E2M1_RMS = math.sqrt((0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8)
_SCALES = np.array([2.0 ** (b // 8 - 7) * (1 + b % 8 / 8) for b in range(0x68, 0x78)])
GLOBAL_SCALE = STD / (_E2M1_RMS * math.sqrt(float((_SCALES**2).mean())))
"""Of every quantized weight; gate and up share it by construction."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Model(Slice):
    """A whole text model around a ``Slice``'s layers, in the published layout.

    Attributes:
        heads, kv_heads: of attention, 128 wide each; MiniMax-M3 has 64 and 4.
        vocabulary: tokens; m3-nano's, so that its tokenizer fits.
    """

    layers: int = 5
    experts: int = 128
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 4096
    context: int = 32768

    def config(self) -> dict[str, Any]:
        """As MiniMax publishes it, with full attention in every layer."""
        outer = super().config()
        zeros = [0] * self.layers
        outer["text_config"] |= {
            "vocab_size": self.vocabulary,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "use_gemma_norm": True,
            "use_qk_norm": True,
            "qk_norm_type": "per_head",
            "num_mtp_modules": 0,
            "rope_theta": 5000000.0,
            "partial_rotary_factor": 0.5,
            "sparse_attention_config": {
                "use_sparse_attention": True,
                "sparse_index_dim": 128,
                "sparse_num_index_heads": self.kv_heads,
                "sparse_topk_blocks": 16,
                "sparse_block_size": 128,
                "sparse_score_type": "max",
                "sparse_init_block": 0,
                "sparse_local_block": 1,
                "sparse_attention_freq": zeros,
                "sparse_disable_index_value": zeros,
            },
        }
        return outer

    def tensors(self) -> Iterator[TensorInfo]:
        """Every tensor of the bf16 model."""
        yield TensorInfo("model.embed_tokens.weight", "BF16", (self.vocabulary, self.hidden))
        query, key = self.heads * 128, self.kv_heads * 128
        for layer in range(self.layers):
            base = f"model.layers.{layer}"
            for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
                yield TensorInfo(f"{base}.self_attn.{name}.weight", "BF16", (rows, self.hidden))
            yield TensorInfo(f"{base}.self_attn.o_proj.weight", "BF16", (self.hidden, query))
            yield TensorInfo(f"{base}.self_attn.q_norm.weight", "BF16", (128,))
            yield TensorInfo(f"{base}.self_attn.k_norm.weight", "BF16", (128,))
            shared = f"{base}.block_sparse_moe.shared_experts"
            for name in ("gate_proj", "up_proj"):
                wide = (self.intermediate, self.hidden)
                yield TensorInfo(f"{shared}.{name}.weight", "BF16", wide)
            tall = (self.hidden, self.intermediate)
            yield TensorInfo(f"{shared}.down_proj.weight", "BF16", tall)
        yield from super().tensors()
        yield TensorInfo("model.norm.weight", "BF16", (self.hidden,))
        yield TensorInfo("lm_head.weight", "BF16", (self.vocabulary, self.hidden))

    @property
    def quantized_layer_bytes(self) -> int:
        """Codes and block scales of one layer's experts: 4.5 bits a weight."""
        return self.experts * 3 * self.hidden * self.intermediate * 9 // 16


def write(
    folder: Path,
    layers: int = 5,
    quantized: bool = True,
    *,
    layout: str = "modelopt",
    tokenizer: Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    **sizes: int,
) -> Model:
    """Write a checkpoint into ``folder``, replacing one there.

    Args:
        quantized: NVFP4 experts in ``layout``; else all in bf16.
        tokenizer: a folder whose tokenizer files are copied, m3-nano's for example; without one the
            engine needs ``skip_tokenizer_init``.
        threads: by default as many as cores, at most 16.
        sizes: fields of ``Model`` other than ``layers``.

    Returns:
        what was written.

    Raises:
        QuantizeError: if the disk has no room for it.
    """
    model = Model(layers=layers, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "config.json", folder / INDEX, *folder.glob("*.safetensors")):
        old.unlink(missing_ok=True)
    files, config, extra = _planned(model, layout) if quantized else _plain(model)
    total = sum(out.nbytes for outputs in files for out in outputs)
    if (free := shutil.disk_usage(folder).free) < total + 10**8:
        raise QuantizeError(f"{folder}: {total / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")
    count = len(files)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

    def one(number: int) -> None:
        _write_file(folder / names[number], files[number], np.random.SFC64([seed, number]))

    with ThreadPoolExecutor(threads or min(16, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(one, range(count)))
    weight_map = {
        out.name: name for name, outputs in zip(names, files, strict=True) for out in outputs
    }
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if tokenizer is not None:
        for name in TOKENIZER:
            shutil.copyfile(tokenizer / name, folder / name)
    for name, value in (extra | {"config.json": config}).items():
        write_json(folder / name, value)
    return model


Files = list[list[TensorInfo]]


def _plain(model: Model) -> tuple[Files, dict[str, Any], dict[str, Any]]:
    files: Files = [[]]
    for out in model.tensors():
        if files[-1] and sum(other.nbytes for other in files[-1]) + out.nbytes > FILE_SIZE:
            files.append([])
        files[-1].append(out)
    return files, model.config(), {}


def _planned(model: Model, layout: str) -> tuple[Files, dict[str, Any], dict[str, Any]]:
    """What the quantizer would make of the model; it looks at headers only, so a hole will do."""
    with tempfile.TemporaryDirectory() as temporary:
        hollow = Path(temporary)
        write_json(hollow / "config.json", model.config())
        tensors = list(model.tensors())
        first = header(tensors)
        with (hollow / "model.safetensors").open("wb") as file:
            file.write(first)
            file.truncate(len(first) + sum(out.nbytes for out in tensors))
        with Checkpoint(hollow) as source:
            steps = plan(source, Options(layout=layout, max_shard_size=FILE_SIZE))
    files = [steps.outputs(i) for i in range(len(steps.shards))]
    config = model.config() | {
        KEY: to_contract(steps.gates.concatenated()) | {FIELD: record_of(steps.options)},
        "quantization_config": steps.layout.quantization_config(steps.ignore, steps.beside),
    }
    return files, config, steps.layout.extra_files(steps.ignore, steps.beside)


def _write_file(path: Path, outputs: Sequence[TensorInfo], bits: np.random.SFC64) -> None:
    generator = np.random.Generator(bits)
    with path.open("wb", buffering=0) as file:
        file.write(header(outputs))
        for out in outputs:
            data = memoryview(_random(out, generator)).cast("B")
            while data:  # one call writes 2 GiB at most
                data = data[file.write(data) :]


def _random(out: TensorInfo, generator: np.random.Generator) -> np.ndarray:
    """The bytes of one tensor, see the module's docstring."""
    numbers = math.prod(out.shape)
    if out.dtype == "F32":
        suffix = out.name.rpartition(".")[2]
        constant = {
            "weight_scale_2": GLOBAL_SCALE,
            "weight_global_scale": 1 / GLOBAL_SCALE,
            "input_scale": 1.0,
            "input_global_scale": 1.0,
        }.get(suffix)
        if constant is not None:
            return np.full(numbers, constant, np.float32)
        return generator.standard_normal(numbers, np.float32) * np.float32(STD)
    words = generator.integers(0, 2**64, -(-out.nbytes // 8), np.uint64)
    if out.dtype == "F8_E4M3":
        words &= np.uint64(0x0F0F0F0F0F0F0F0F)
        words += np.uint64(0x6868686868686868)
    elif out.dtype == "BF16":
        words &= np.uint64(0x80FF80FF80FF80FF)
        words |= np.uint64(0x3C003C003C003C00)
    elif out.dtype != "U8":
        raise AssertionError(out)
    return words.view(np.uint8)[: out.nbytes]


def main() -> None:
    """Parse the arguments and write the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8, help="of attention; MiniMax-M3 has 64")
    parser.add_argument("--bf16", action="store_true", help="not quantized")
    parser.add_argument("--layout", default="modelopt")
    parser.add_argument("--tokenizer", type=Path, help="folder to copy a tokenizer from")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        write(
            args.target, args.layers, not args.bf16, layout=args.layout, tokenizer=args.tokenizer,
            experts=args.experts, heads=args.heads,
        )  # fmt: skip
    except QuantizeError as error:
        raise SystemExit(str(error)) from None
    size = sum(file.stat().st_size for file in args.target.iterdir())
    print(f"{args.target}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
