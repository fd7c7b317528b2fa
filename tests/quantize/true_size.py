"""A MiniMax-M3 of true size as the hub publishes it, of files that are holes but for their headers.

Shapes are those of docs/operators/minimax-m3.md, without the vision tower and the index of sparse
attention.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from tests.hub_layout import published_config

HIDDEN, INNER, DENSE, LAYERS, EXPERTS, VOCABULARY = 6144, 3072, 12288, 60, 128, 200_064
HEADS, KV_HEADS, HEAD = 64, 4, 128
FIRST = 3
"""The first layer with experts."""

_FILE = 5 * 10**9
_BYTES = {"BF16": 2, "F32": 4}
Tensor = tuple[str, str, tuple[int, ...]]


def tensors() -> Iterator[Tensor]:
    """Name, dtype and shape of each."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{prefix}.self_attn.{name}_proj.weight", "BF16", (rows * HEAD, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", "BF16", (HIDDEN, HEADS * HEAD)
        for name in ("q_norm", "k_norm"):
            yield f"{prefix}.self_attn.{name}.weight", "BF16", (HEAD,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", "BF16", (HIDDEN,)
        if layer < FIRST:
            yield from _mlp(f"{prefix}.mlp", DENSE)
            continue
        moe = f"{prefix}.block_sparse_moe"
        yield f"{moe}.gate.weight", "F32", (EXPERTS, HIDDEN)
        yield f"{moe}.e_score_correction_bias", "F32", (EXPERTS,)
        for expert in range(EXPERTS):
            for name in ("w1", "w2", "w3"):
                shape = (HIDDEN, INNER) if name == "w2" else (INNER, HIDDEN)
                yield f"{moe}.experts.{expert}.{name}.weight", "BF16", shape
        yield from _mlp(f"{moe}.shared_experts", INNER)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)


def _mlp(prefix: str, inner: int) -> Iterator[Tensor]:
    for name in ("gate_proj", "up_proj"):
        yield f"{prefix}.{name}.weight", "BF16", (inner, HIDDEN)
    yield f"{prefix}.down_proj.weight", "BF16", (HIDDEN, inner)


def minimax_m3(folder: Path) -> Path:
    """Write it to ``folder``, which is returned, with tensors in the order of their names: layer
    10 comes before layer 2."""
    folder.mkdir()
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in sorted(tensors()):
        nbytes = _nbytes(tensor)
        if files[-1] and size + nbytes > _FILE:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += nbytes
    weight_map = {}
    for number, inside in enumerate(files, 1):
        file = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, end = {}, 0
        for tensor in inside:
            name, dtype, shape = tensor
            begin, end = end, end + _nbytes(tensor)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file.name
        encoded = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(8 + len(encoded) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config()))
    return folder


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor[2]) * _BYTES[tensor[1]]


def _config() -> dict[str, object]:
    return published_config(
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "dense_intermediate_size": DENSE,
            "shared_intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD,
            "max_position_embeddings": 524_288,
            "rms_norm_eps": 1e-6,
            "rotary_dim": 64,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 4,
            "routed_scaling_factor": 2.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "mlp_layer_types": ["dense"] * FIRST + ["sparse"] * (LAYERS - FIRST),
            "rope_parameters": {"rope_theta": 5e6},
        }
    )
