"""Sources that are quantized already: decoded bit for bit, whatever files they lie in; or refused.

The judge is float64 arithmetic on the formats' definitions (``published.py``) and, where they can
be called on CPUs, the dequantizers of Transformers and compressed-tensors.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8 import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.sources.find import find_stored_weights
from quantize.checkpoint.sources.refusals import check_config
from quantize.checkpoint.sources.stored_weight import StoredWeight
from quantize.errors import QuantizeError
from tests.quantize import published as pub
from tests.quantize.checkpoints import save
from tests.quantize.published import PUBLISHED, config_of
from tests.quantize.published_integers import integers
from tests.quantize.stored_formats import (
    E4M3,
    E8M0,
    EXPERTS,
    Published,
    assert_same,
    compressed_tensors_group,
    e2m1_pairs,
    e4m3,
    fp8,
    mx,
    random_bytes,
    tensor,
)

PLAIN = {"model.norm.weight": torch.arange(6.0).bfloat16()}


def write(folder: Path, published: Published, **more: Any) -> Path:
    return save(folder, published.stored | PLAIN, config_of(published), **more)


@pytest.mark.parametrize("publish", PUBLISHED)
def test_published(publish: Callable[[], Published], tmp_path: Path) -> None:
    """Through a checkpoint: one tensor of floats by its usual name, each of its experts alike."""
    published = publish()
    with Checkpoint(write(tmp_path, published)) as checkpoint:
        check_config(checkpoint.config, "config.json")
        assert checkpoint.formats == {published.format}
        assert set(checkpoint.tensors) == {*published.weights, *PLAIN}
        [(name, expected)] = published.weights.items()
        assert set(checkpoint.parts(name)) == set(published.stored)
        sizes = [t.numel() * t.element_size() for t in published.stored.values()]
        assert checkpoint.stored_bytes(name) == sum(sizes)
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == ("BF16", expected.shape)
        assert_same(checkpoint.load(name), expected)
        if expected.ndim == 3:
            for expert in range(EXPERTS):
                assert_same(checkpoint.load_expert(name, expert), expected[expert])
        assert torch.equal(checkpoint.load("model.norm.weight"), PLAIN["model.norm.weight"])


@pytest.mark.parametrize("publish", PUBLISHED)
def test_into_given_memory(publish: Callable[[], Published]) -> None:
    published = publish()
    [(name, expected)] = published.weights.items()
    stored_weight = find(published)[name]
    memory = torch.full((expected.size,), torch.nan)
    decoded = stored_weight.decode(
        *(published.stored[part] for part in stored_weight.parts), out=memory
    )
    assert decoded.data_ptr() == memory.data_ptr()
    assert_same(decoded, expected)


def test_nested_config(tmp_path: Path) -> None:
    """A multimodal model's own quantization_config counts, block size and all."""
    published = pub.deepseek_v41_dense()
    save(tmp_path, published.stored, config_of(published, nested=True))
    with Checkpoint(tmp_path) as checkpoint:
        [(name, expected)] = published.weights.items()
        assert_same(checkpoint.load(name), expected)


def find(published: Published) -> dict[str, StoredWeight]:
    """Without files: what is looked at is names, dtypes and shapes."""
    return find_stored_weights(headers(published.stored), config_of(published))


class Header(NamedTuple):
    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


SAFETENSORS_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8",
    torch.int8: "I8", torch.int32: "I32", E4M3: "F8_E4M3", E8M0: "F8_E8M0",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
}  # fmt: skip


def headers(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    file = Path("model-00001-of-00002.safetensors")
    return {
        name: Header(name, file, SAFETENSORS_NAMES[t.dtype], tuple(t.shape))
        for name, t in tensors.items()
    }


# Every code, every scale, every size.


def test_mxfp8_every_code_and_scale() -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scale = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 8))
    stored = {"a.weight": tensor(codes, E4M3), "a.weight_scale_inv": tensor(scale)}
    published = mx(stored, None, "a.weight", e4m3(codes), scale, "mxfp8")
    expected = published.weights["a.weight"]
    decoded = find(published)["a.weight"].decode(*stored.values())
    assert_same(decoded, expected)
    assert decoded[255].isnan().all()  # a NaN scale is for the caller to see
    assert decoded[127, 0x7F].isnan()
    assert decoded[127, 1] == 2.0**-9


def test_mxfp4_every_code_and_scale() -> None:
    packed = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scale = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 16))
    stored = {"a.weight_packed": tensor(packed), "a.weight_scale": tensor(scale)}
    published = mx(stored, None, "a.weight", e2m1_pairs(packed), scale, "mxfp4")
    decoded = find(published)["a.weight"].decode(*stored.values())
    assert_same(decoded, published.weights["a.weight"])
    assert decoded[255].isnan().all()
    assert decoded[127, 2 * 0x3A : 2 * 0x3A + 2].tolist() == [-1.0, 1.5]  # low nibble, high one


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    block=st.tuples(*[st.sampled_from([1, 3, 32, 64, 128, 200])] * 2),
    experts=st.sampled_from([None, 1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_fp8_every_size(
    shape: tuple[int, int], block: tuple[int, int], experts: int | None, dtype: torch.dtype
) -> None:
    lead = () if experts is None else (experts,)
    grid = (*lead, -(-shape[0] // block[0]), -(-shape[1] // block[1]))
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    published = fp8("a", "a_scale_inv", (*lead, *shape), grid, block, config, dtype)
    stored_weight = find(published)["a"]
    assert_same(stored_weight.decode(*published.stored.values()), published.weights["a"])
    for expert in range(experts or 0):
        parts = [part[expert] for part in published.stored.values()]
        assert_same(stored_weight.decode(*parts), published.weights["a"][expert])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_scale_reaches_the_caller(bad: float) -> None:
    stored = {"a.weight": torch.ones(4, 4).to(E4M3), "a.weight_scale_inv": torch.full((1, 1), bad)}
    stored_weight = find_stored_weights(headers(stored), {})["a.weight"]
    assert not stored_weight.decode(*stored.values()).isfinite().any()


# Against other implementations.


@pytest.mark.parametrize(
    "publish",
    [
        pub.transformers_fp8_gate_up,
        pub.expert_tensor,
        pub.minimax_m3,
        pub.stacked_mxfp8,
        pub.deepseek_v41_dense,
        pub.deepseek_v4_experts,
        pub.transformers_fp4_experts,
    ],
)
def test_as_transformers_fp8(publish: Callable[[], Published]) -> None:
    """Transformers has these under one roof; it takes blocks from the shapes alone."""
    published = publish()
    [(name, stored_weight)] = find(published).items()
    codes, scale = (published.stored[part] for part in stored_weight.parts)
    if scale.dtype == torch.uint8:  # as bytes, they do not know the code for NaN
        scale = scale.clamp(max=254)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    assert_same(stored_weight.decode(codes, scale), expected.numpy())
    assert stored_weight.name == name


def test_as_transformers_gpt_oss() -> None:
    published = pub.gpt_oss()
    [stored_weight] = find(published).values()
    blocks, _ = published.stored.values()
    scale = tensor(random_bytes(EXPERTS, 10, 3, high=255))  # they do not know the code for NaN
    expected = convert_moe_packed_tensors(blocks, scale, dtype=torch.float32)
    assert_same(stored_weight.decode(blocks, scale), expected.contiguous().numpy())


def test_as_compressed_tensors_nvfp4() -> None:
    """They divide by the global scale: in float32, one unit in the last place from a product."""
    published = pub.compressed_tensors_nvfp4()
    [(name, expected)] = published.weights.items()
    tensors = {n.removeprefix(name[:-6]): t for n, t in published.stored.items()}
    scheme = preset_name_to_scheme("NVFP4", ["Linear"])
    theirs = NVFP4PackedCompressor.decompress(tensors, scheme)["weight"].float()
    assert torch.allclose(torch.from_numpy(expected), theirs, rtol=2**-7, atol=0)  # in bfloat16
    assert theirs.abs().max() > 0


def test_as_compressed_tensors() -> None:
    """They compute in bfloat16, exact where it does not overflow."""
    scale = tensor(random_bytes(10, 3, low=50, high=200))
    for publish, compressor in (
        (pub.compressed_tensors_mxfp4, MXFP4PackedCompressor),
        (pub.compressed_tensors_mxfp8, MXFP8QuantizationCompressor),
    ):
        published = publish()
        [stored_weight] = find(published).values()
        codes = published.stored[stored_weight.parts[0]][:10]
        key = stored_weight.parts[0].rpartition(".")[2]
        theirs = compressor.decompress({key: codes, "weight_scale": scale}, None)["weight"]
        assert_same(stored_weight.decode(codes, scale), theirs.float().numpy())


@pytest.mark.parametrize(
    "publish",
    [
        pub.kimi_k2_thinking,
        pub.int4_asymmetric,
        pub.int4_reordered,
        pub.int4_row,
        pub.int4_padded,
        pub.int8_packed,
    ],
)
def test_as_compressed_tensors_integers(publish: Callable[[], Published]) -> None:
    """Their own decompressor. It computes in the scale's dtype, so it gets float32 scales."""
    published = publish()
    [(name, stored_weight)] = find(published).items()
    groups = published.quantization["config_groups"]  # type: ignore[index]
    scheme = QuantizationScheme(targets=["Linear"], weights=groups["group_0"]["weights"])
    module = name.removesuffix("weight")
    tensors = {n.removeprefix(module): t for n, t in published.stored.items()}
    tensors["weight_scale"] = tensors["weight_scale"].float()
    theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    ours = stored_weight.decode(*(published.stored[part] for part in stored_weight.parts))
    assert_same(ours, theirs.float().numpy())


def test_integers_of_several_widths() -> None:
    """Which of the config's groups a weight belongs to is told by its shapes, or else its name."""
    wide, narrow = integers("a.q_proj", (20, 64), 0, bits=8), pub.int4_row()
    third = pub.kimi_k2_thinking()
    parts = [p.quantization["config_groups"]["group_0"] for p in (wide, narrow, third)]  # type: ignore[index]
    for group, targets in zip(parts, (["re:.*q_proj"], ["a.down_proj"], ["Linear"]), strict=True):
        group["targets"] = targets
    groups = {f"group_{number}": group for number, group in enumerate(parts)}
    quantization = {"format": "pack-quantized", "config_groups": groups}
    stored = wide.stored | narrow.stored | third.stored
    found = find_stored_weights(headers(stored), config(quantization))
    for published in (wide, narrow, third):
        [(name, expected)] = published.weights.items()
        parts_of = (published.stored[part] for part in found[name].parts)
        assert_same(found[name].decode(*parts_of), expected)
    parts[0]["targets"] = ["Linear"]
    parts[1]["targets"] = ["Linear"]
    with pytest.raises(QuantizeError, match=r"a.q_proj.weight_packed .* may be any of what config"):
        find_stored_weights(headers(stored), config(quantization))


def test_damaged_integers() -> None:
    """What only the tensors' values tell is an error that names the tensor, when it is read."""
    published = pub.int4_reordered()
    [stored_weight] = find(published).values()
    for part, value, message in (
        ("weight_shape", torch.tensor([300, 95]), r"down_proj.weight_packed: its weight_shape is "),
        ("weight_g_idx", torch.full((96,), 3).int(), "weight_g_idx has groups 3 to 3, but there"),
    ):
        stored = published.stored | {f"a.down_proj.{part}": value}
        with pytest.raises(QuantizeError, match=message):
            stored_weight.decode(*(stored[part] for part in stored_weight.parts))
    # Groups that nobody chose are neighbours.
    stored = published.stored | {"a.down_proj.weight_g_idx": torch.full((96,), -1).int()}
    unordered = stored_weight.decode(*(stored[part] for part in stored_weight.parts))
    del stored["a.down_proj.weight_g_idx"]
    [plain] = find(published._replace(stored=stored)).values()
    assert torch.equal(unordered, plain.decode(*(stored[part] for part in plain.parts)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "a.down_proj.weight_scale is missing"),
        ({"weight_scale": torch.ones(20, 5)}, r"\[20, 5\] are none of what config.json describes"),
        ({"weight_scale": torch.ones(20, 3).int()}, "a.down_proj.weight_scale has dtype I32"),
        ({"weight_zero_point": None}, "a.down_proj.weight_zero_point is missing, though"),
        ({"weight_zero_point": torch.ones(20, 3).int()}, r"expected I8 or I32 \[3, 3\]"),
        ({"weight_packed": None}, "belongs to packed integers, and config.json describes none"),
    ],
)
def test_incomplete_integers(change: dict[str, torch.Tensor | None], message: str) -> None:
    published = integers("a.down_proj", (20, 96), 32, zero="packed")
    stored = published.stored | {f"a.down_proj.{part}": t for part, t in change.items()}
    present = {name: t for name, t in stored.items() if t is not None}
    with pytest.raises(QuantizeError, match=message):
        find(published._replace(stored=present))


def test_integers_that_no_config_describes() -> None:
    published = pub.kimi_k2_thinking()
    with pytest.raises(QuantizeError, match="weight_packed belongs to packed integers, and config"):
        find_stored_weights(headers(published.stored), {})


# Files and dtypes.


def arrangements(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    numbers = itertools.count()
    yield "one file", {}
    yield "index", {"shard_of": lambda name: len(name) % 2}
    files: dict[str, int] = {}
    yield "a file a tensor", {"shard_of": lambda name: files.setdefault(name, next(numbers))}


def without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_sources(dtype: torch.dtype, index: bool, tmp_path: Path) -> None:
    """The same tensors from every dtype and arrangement of files, with an index or without."""
    shapes = {"experts.gate_up_proj": (EXPERTS, 8, 4), "experts.down_proj": (EXPERTS, 4, 4)}
    shapes |= {f"experts.{e}.w1.weight": (4, 4) for e in range(3)}
    rng = np.random.default_rng(0)
    whole = {n: torch.from_numpy(rng.integers(-99, 99, s) / 64) for n, s in shapes.items()}
    for number, (_, arrangement) in enumerate(arrangements(len(whole))):
        folder = tmp_path / str(number)
        save(folder, {n: t.to(dtype) for n, t in whole.items()}, {}, **arrangement)
        if not index:
            without_index(folder)
        with Checkpoint(folder) as checkpoint:
            assert {n: i.shape for n, i in checkpoint.tensors.items()} == shapes
            assert checkpoint.formats == set()
            for name, expected in whole.items():
                assert checkpoint.load(name).dtype == dtype
                assert torch.equal(checkpoint.load(name).double(), expected)
            name = "experts.gate_up_proj"
            assert torch.equal(checkpoint.load_expert(name, 1).double(), whole[name][1])


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("publish", [pub.transformers_fp8_gate_up, pub.minimax_m3, pub.gpt_oss])
def test_arrangements(publish: Callable[[], Published], index: bool, tmp_path: Path) -> None:
    """Codes and scales may lie in different files."""
    published = publish()
    [(name, expected)] = published.weights.items()
    for number, (_, arrangement) in enumerate(arrangements(len(published.stored))):
        folder = write(tmp_path / str(number), published, **arrangement)
        if not index:
            without_index(folder)
        with Checkpoint(folder) as checkpoint:
            assert set(checkpoint.tensors) == {name, *PLAIN}
            assert_same(checkpoint.load(name), expected)


# Refusals.


def config(quantization: Any) -> dict[str, Any]:
    return {"quantization_config": quantization}


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_algo": "NVFP4"},
        {"quant_method": "modelopt", "quantization": {"quant_algo": "W4A16_NVFP4"}},
        {
            "quant_method": "modelopt_mixed",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"a": {"quant_algo": "MXFP8"}, "b": {"quant_algo": "NVFP4"}},
        },
        compressed_tensors_group("nvfp4-pack-quantized", {"num_bits": 4}, "mixed-precision"),
    ],
)
def test_nvfp4_is_let_through(quantization: dict[str, Any]) -> None:
    for placed in (config(quantization), {"text_config": config(quantization)}):
        check_config(placed, "here")


@pytest.mark.parametrize("name", ["a.weight_scale_2", "a.weight_global_scale", "a.pre_quant_scale"])
def test_parts_of_nvfp4_alone(name: str) -> None:
    """Also where the config says nothing, or another thing."""
    stored = {"a.weight": torch.zeros(32, 32).byte(), name: torch.ones(1)}
    message = "changes what a weight's inputs" if "pre" in name else "is there without the weight"
    for said in ({}, config({"quant_method": "fp8"})):
        with pytest.raises(QuantizeError, match=f"{name} {message}"):
            find_stored_weights(headers(stored), said)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}, "int4_awq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "nvfp4_awq"),
        (compressed_tensors_group("pack-quantized", {"num_bits": 3, "type": "int"}), "int3"),
        (compressed_tensors_group("marlin-24", {"num_bits": 4, "type": "int"}), "int4"),
        (compressed_tensors_group("naive-quantized", {"num_bits": 8, "type": "int"}), "int8"),
        (compressed_tensors_group("marlin-24"), "marlin-24"),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp4"}},
                "layer_quant_config": {"*self_attn*": {"weight": {"dtype": "int8"}}},
            },
            "int8",
        ),
        ({"bits": 4}, "unnamed"),
        ("fp8-ish", "fp8-ish"),
    ],
)
def test_other_methods_are_refused(quantization: Any, named: str) -> None:
    with pytest.raises(QuantizeError, match=rf"^here: .*already quantized \(.*{named}.*start from"):
        check_config(config(quantization), "here")


@pytest.mark.parametrize("quantization", [None, {"quant_method": "modelopt", "quant_algo": None}])
def test_unquantized_is_let_through(quantization: Any) -> None:
    check_config({}, "here")
    check_config(config(quantization), "here")


CODES = torch.ones(64, 64).to(E4M3)
BYTES = torch.ones(64, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"a.weight_scale_inv": torch.ones(1, 1)}, "a.weight_scale_inv is there without"),
        (
            {"a.weight_packed": BYTES, "a.weight_scale": torch.ones(64, 4).to(E4M3)},
            "a.weight_scale is there without",
        ),
        (
            {"a.weight": BYTES, "a.weight_scale": torch.ones(64, 3).to(E4M3)}
            | {"a.weight_scale_2": torch.ones(())},
            r"a.weight \[64, 32\] and a.weight_scale \[64, 3\] do not fit together: NVFP4 has two",
        ),
        (
            {"a.weight": BYTES, "a.weight_scale": torch.ones(64, 4).to(E4M3)}
            | {"a.weight_scale_2": torch.ones(2)},
            r"a.weight_scale_2 is F32 \[2\]; expected F32, one number$",
        ),
        (
            {"a.weight": CODES.bfloat16(), "a.weight_scale_inv": torch.ones(1, 1)},
            "a.weight_scale_inv is there without",
        ),
        ({"a.scale": torch.ones(2, 2).to(E8M0)}, "a.scale is there without"),
        ({"a.gate_up_proj_blocks": BYTES.view(1, 64, 2, 16)}, "_blocks is there without"),
        ({"a.gate_up_proj_scales": BYTES.view(1, 64, 32)}, "_scales is there without"),
        (
            {"a.weight": CODES, "a.weight_scale_inv": torch.ones(2, 1)},
            r"a.weight_scale_inv has shape \[2, 1\]; a.weight \[64, 64\] needs \[1, 1\] \(blocks "
            "of 128 x 128",
        ),
        (
            {"a.weight": CODES, "a.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)},
            "a.weight_scale_inv has dtype I32",
        ),
        ({"a.weight": CODES[0], "a.weight_scale": torch.ones(1)}, "expected a matrix"),
        (
            {"a": CODES[None].expand(2, 64, 64), "a_scale": torch.ones(1)},
            r"a_scale has shape \[1\]",
        ),
        (
            {"a.weight_packed": BYTES, "a.weight_scale": torch.ones(64, 3).byte()},
            r"a.weight_packed \[64, 32\] and a.weight_scale \[64, 3\] do not fit",
        ),
        (
            {"a_blocks": BYTES.view(64, 2, 16), "a_scales": torch.ones(64, 1).byte()},
            r"\[64, 1, 16\] was expected",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": torch.ones(()), "a.weight_packed": BYTES}
            | {"a.weight_scale": torch.ones(64, 2).byte()},
            "a.weight_packed and a.weight_scale are a.weight, of which there is another",
        ),
        (
            {"a_blocks": BYTES.view(64, 2, 16), "a_scales": torch.ones(64, 2).byte()}
            | {"a": torch.ones(64, 64)},
            "a_blocks and a_scales are a, of which there is another",
        ),
    ],
)
def test_incomplete_checkpoints(stored: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        find_stored_weights(headers(stored), {})


@pytest.mark.parametrize("size", [128, [128], [128, 0], [128, 1.5], ["128", "128"], [True, True]])
def test_bad_block_size(size: Any) -> None:
    stored = headers({"a.weight": CODES, "a.weight_scale_inv": torch.ones(1, 1)})
    with pytest.raises(QuantizeError, match=r"weight_block_size is .*two positive integers"):
        find_stored_weights(stored, config({"weight_block_size": size}))


def test_what_is_not_a_source_format_stays() -> None:
    """Scales of other things and integers are left alone."""
    stored = {
        "attn.k_proj.k_scale": torch.ones(()),
        "c.weight": BYTES.view(torch.int8),
        "c.weight_scale": torch.ones(64, 1),
        "d.qweight": torch.ones(4, 4, dtype=torch.int32),
        "d.scales": torch.ones(4, 4).half(),
    }
    assert find_stored_weights(headers(stored), {}) == {}
