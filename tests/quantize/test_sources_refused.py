"""Sources that are quantized otherwise, or that lack a part: refused, and what is let through."""

from typing import Any

import pytest
import torch

from quantize.checkpoint.sources.find import find_stored_weights
from quantize.checkpoint.sources.refusals import check_config
from quantize.errors import QuantizeError
from tests.quantize.source_headers import config, headers
from tests.quantize.stored_formats import E4M3, E8M0, compressed_tensors_group


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
