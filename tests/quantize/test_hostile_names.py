"""Names, shapes and config values that nobody sane writes: refused, each by its name."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts import identify, model
from quantize.experts.find import find
from quantize.experts.gates import Gate, Gates, from_contract
from tests.conftest import ROOT
from tests.quantize.checkpoints import ONE_THREAD

Folders = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]

E = "model.layers.0.mlp.experts"


def opened(folder: Path, tensors: Tensors, **config: Any) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def refusal(folder: Path, tensors: Tensors, **config: Any) -> str:
    with pytest.raises(QuantizeError) as caught:
        find(opened(folder, tensors, **config))
    return str(caught.value)


def stacked(experts: int = 4, hidden: int = 32, intermediate: int = 16) -> Tensors:
    return {
        f"{E}.gate_up_proj": torch.ones(experts, 2 * intermediate, hidden),
        f"{E}.down_proj": torch.ones(experts, hidden, intermediate),
    }


def single(number: str = "0") -> Tensors:
    shapes = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    return {f"{E}.{number}.{kind}.weight": torch.ones(shape) for kind, shape in shapes.items()}


def test_a_stack_under_two_names(tmp_path: Path) -> None:
    again = {f"{E}.gate_up_proj.weight": torch.ones(4, 32, 32)}
    message = refusal(tmp_path, stacked() | again)
    assert f"{E}.gate_up_proj and" in message or f"and {E}.gate_up_proj are" in message
    assert f"{E}.gate_up_proj.weight" in message


def test_gate_and_up_both_joined_and_apart(tmp_path: Path) -> None:
    message = refusal(tmp_path, stacked() | {f"{E}.up_proj": torch.ones(4, 16, 32)})
    assert f"{E}.gate_up_proj and {E}.up_proj are" in message


def test_experts_that_are_both_stacked_and_single(tmp_path: Path) -> None:
    message = refusal(tmp_path, stacked() | single())
    assert "two ways to store the same experts" in message
    assert f"{E}.0." in message


def test_an_expert_under_two_numbers(tmp_path: Path) -> None:
    message = refusal(tmp_path, single("0") | single("00"))
    assert f"{E}.0." in message
    assert f"{E}.00." in message


@pytest.mark.parametrize("number", ["3", [3], 3.0, -1])
@pytest.mark.parametrize("tensors", [stacked(), single()], ids=["stacked", "single"])
def test_a_number_of_zero_experts_that_is_none(
    tensors: Tensors, number: Any, tmp_path: Path
) -> None:
    assert "zero_expert_num" in refusal(tmp_path, tensors, zero_expert_num=number)


@pytest.mark.parametrize("shape", [(), (32,), (4, 32)], ids=str)
@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_a_stack_of_too_few_dimensions(kind: str, shape: Any, tmp_path: Path) -> None:
    message = refusal(tmp_path, stacked() | {f"{E}.{kind}": torch.ones(shape)})
    assert f"{E}.{kind} has shape {list(shape)}" in message


@pytest.mark.parametrize("prefix", ["model.layers.0.odd_linear.experts", E])
def test_scalars_where_experts_should_be(prefix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}.{kind}": torch.ones(()) for kind in ("gate_up_proj", "down_proj")}
    assert f"{prefix}.gate_up_proj has shape []" in refusal(tmp_path, tensors)


@pytest.mark.parametrize("sizes", [(0, 32, 16), (4, 0, 16), (4, 32, 0)], ids=str)
def test_a_stack_without_elements(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    message = refusal(tmp_path, stacked(*sizes))
    assert f"{E}.gate_up_proj" in message
    assert "nothing to quantize" in message


def test_half_of_a_flat_layout(tmp_path: Path) -> None:
    """DBRX's down with another model's gate and up."""
    tensors = {f"{E}.gate_up_proj": torch.ones(64, 32), f"{E}.mlp.w2": torch.ones(64, 32)}
    message = refusal(tmp_path, tensors, ffn_config={"moe_num_experts": 4})
    assert f"{E}.gate_up_proj" in message


@pytest.mark.parametrize("number", ["9" * 5000, "²", "٣"], ids=["long", "power", "arabic"])
def test_a_layer_that_is_no_number(number: str) -> None:
    gate = Gate("silu")
    assert Gates(gate, {3: Gate("gelu")}).of(f"model.layers.{number}.mlp.experts") == gate
    with pytest.raises(QuantizeError, match="layer number"):
        from_contract({"version": 2, "gate": {"form": "silu"}, "layers": {number: {}}})


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.ones(()).to(torch.float8_e4m3fn), torch.ones((), dtype=torch.uint8)),
        (torch.ones(4, 0).to(torch.float8_e4m3fn), torch.ones(4, 0, dtype=torch.uint8)),
        (torch.ones(0, 16, dtype=torch.uint8), torch.ones(0, 1, dtype=torch.uint8)),
        (torch.ones(4, 0, dtype=torch.uint8), torch.ones(4, 0, dtype=torch.uint8)),
        (torch.ones((), dtype=torch.uint8), torch.ones((), dtype=torch.uint8)),
    ],
    ids=["fp8-scalar", "fp8-empty", "fp4-no-rows", "fp4-no-columns", "fp4-scalar"],
)
def test_encoded_weights_without_elements(
    weight: torch.Tensor, scale: torch.Tensor, tmp_path: Path
) -> None:
    tensors = {"a.weight": weight, "a.weight_scale": scale}
    with pytest.raises(QuantizeError, match=r"a\.weight "):
        opened(tmp_path, tensors, quantization_config={"quant_method": "fp8"})


# -- what a config may not do ----------------------------------------------------------------------


KERNEL = "somebody/kernel"


def test_a_config_cannot_choose_kernels_or_reach_the_hub(
    saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((saved("qwen3_moe") / "config.json").read_text())
    for key in ("attn", "_attn", "experts", "_experts"):
        config[f"{key}_implementation"] = KERNEL
    config["_attn_implementation_internal"] = KERNEL
    config["nested"] = [{"_attn_implementation": KERNEL}]
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen: list[Any] = []
    classes = model.model_classes

    def recorded(config: Any, trust_remote_code: bool) -> Any:
        seen.extend((huggingface_hub.is_offline_mode(), str(config), config._attn_implementation))
        return classes(config, trust_remote_code)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model, "model_classes", recorded)
    assert identify.identify(tmp_path) == Gates.uniform(Gate("silu"))
    offline, text, attention = seen
    assert offline
    assert KERNEL not in text
    assert attention is None
    assert not huggingface_hub.is_offline_mode()


def test_a_config_object_cannot_choose_kernels(
    saved: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM passes them: already read, whatever is in them."""
    monkeypatch.setattr(identify, "_alone", lambda config: [])  # the model itself must be built
    own = transformers.Qwen3MoeConfig.from_pretrained(saved("qwen3_moe"))
    own._attn_implementation = KERNEL
    assert identify.identify_config(own) == Gates.uniform(Gate("silu"))
    assert own._attn_implementation == KERNEL


# -- where nothing can be written ------------------------------------------------------------------

READ_ONLY = """
import torch
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []  # what is left where no folder is writable, root or not
from quantize.nvfp4.kernels.numba_cpu import NumbaKernel
print(float(NumbaKernel().amax(torch.full((2, 16), 3.0))))
"""


def test_the_kernel_without_a_folder_for_its_cache() -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY], env=ONE_THREAD, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "3.0\n", done.stderr
