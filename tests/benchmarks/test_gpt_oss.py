"""The benchmark with a small GPT-OSS: its MXFP4, and that figures are of the folders' tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.gpt_oss import dense_experts, from_nvfp4, original, to_mxfp4, write_mxfp4
from tests.quantize import checkpoints
from tests.quantize.reference import E2M1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss") / "bf16"
    config = checkpoints.gpt_oss(hidden_size=64, intermediate_size=32)
    checkpoints.random_model(config).save_pretrained(folder)
    return folder


def test_rounding_to_mxfp4() -> None:
    """Of all values that a block's scale offers, each is the nearest; 6 is reached or passed."""
    weight = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[0, :32, 0] = 0
    blocks, scales = to_mxfp4(weight)
    assert blocks.shape == (2, 5, 2, 16) and scales.shape == (2, 5, 2)
    values = torch.from_numpy(E2M1).double()
    for expert in range(2):
        for out in range(5):
            for block in range(2):
                own = weight[expert, 32 * block : 32 * block + 32, out].double()
                step = 2.0 ** (int(scales[expert, out, block]) - 127)
                packed = blocks[expert, out, block].long()
                found = values[torch.stack((packed & 15, packed >> 4), -1).flatten()] * step
                every = (own[:, None] - values * step).abs().amin(1)
                assert torch.allclose((found - own).abs(), every, rtol=0, atol=1e-12)
                largest = own.abs().max().item()
                assert largest == 0 or 4 * step <= largest < 8 * step  # OCP MX 1.0, 6.3


def test_transformers_reads_it(source: Path, tmp_path: Path) -> None:
    write_mxfp4(source, tmp_path / "mxfp4")
    before, after = (original(folder).state_dict() for folder in (source, tmp_path / "mxfp4"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        error = (after[name] - tensor).norm() / tensor.norm()
        experts = name.endswith(("gate_up_proj", "down_proj"))
        assert 0.05 < error < 0.2 if experts else error == 0, name


def test_what_is_measured_is_the_folder(source: Path, tmp_path: Path) -> None:
    """A bias of the folder that is changed changes the model; weights are near the source's."""
    checkpoints.convert(source, tmp_path / "out")
    model = from_nvfp4(tmp_path / "out", source)
    want = original(source).state_dict()
    for name, tensor in model.state_dict().items():
        error = float((tensor - want[name]).norm() / want[name].norm())
        assert 0.05 < error < 0.2 if name.endswith(("gate_up_proj", "down_proj")) else error == 0
    from safetensors.torch import load_file, save_file

    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.up_proj.bias"][3] = 5
    save_file(tensors, file, {"format": "pt"})
    changed = from_nvfp4(tmp_path / "out", source).state_dict()
    bias = changed["model.layers.1.mlp.experts.gate_up_proj_bias"]
    assert bias[2, 7] == 5
    bias[2, 7] = want["model.layers.1.mlp.experts.gate_up_proj_bias"][2, 7]
    assert torch.equal(bias, want["model.layers.1.mlp.experts.gate_up_proj_bias"])


def test_training_computes_the_classs_sum(source: Path) -> None:
    model = transformers.GptOssForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.set_experts_implementation("eager")
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [3, 0], [1, 2]])
    weights = torch.softmax(torch.randn(6, 2), -1)
    with torch.no_grad():
        torch.testing.assert_close(
            dense_experts(experts, x, ids, weights), experts(x, ids, weights), rtol=1e-5, atol=1e-6
        )
