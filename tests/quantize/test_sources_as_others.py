"""Sources that are quantized already: decoded as by Transformers and compressed-tensors,
where their dequantizers can be called on CPUs."""

from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8 import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.quantize import published as pub
from tests.quantize.source_headers import find
from tests.quantize.stored_formats import EXPERTS, Published, assert_same, random_bytes, tensor


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
