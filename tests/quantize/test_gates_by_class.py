"""Which class's gate it is: code of the checkpoint's own, look-alikes, and names of classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import QuantizeError
from quantize.experts.gates import Gate, Gates
from quantize.experts.identify import identify
from tests.quantize import checkpoints

REMOTE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

open({marker!r}, "a").write("ran")


class OddConfig(PreTrainedConfig):
    model_type = "odd_moe"


class OddMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.moe_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.moe_size, bias=False)
        self.down_proj = nn.Linear(config.moe_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=3.0)
        up = self.up_proj(x).clamp(-3.0, 3.0)
        return self.down_proj((up + 0.5) * gate * torch.sigmoid(1.3 * gate))


class OddExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(4, 2 * config.moe_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(4, config.hidden_size, config.moe_size))

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for token, experts in enumerate(index.tolist()):
            for slot, expert in enumerate(experts):
                both = x[token] @ self.gate_up_proj[expert].T
                gate, up = both[0::2].clamp(max=3.0), both[1::2].clamp(-3.0, 3.0)
                act = (up + 0.5) * gate * torch.sigmoid(1.3 * gate)
                out[token] += act @ self.down_proj[expert].T * weights[token, slot]
        return out


class OddModel(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        make = OddExperts if config.stacked else lambda c: nn.ModuleList([OddMLP(c)] * 4)
        layer = lambda: nn.ModuleDict({{"mlp": nn.ModuleDict({{"experts": make(config)}})}})
        self.layers = nn.ModuleList([layer() for _ in range(2)])
        self.post_init()
"""


def remote_checkpoint(folder: Path, stacked: bool) -> Path:
    """A model that only its own code describes; that code leaves ``ran`` behind when it runs."""
    (folder / "odd.py").write_text(REMOTE.format(marker=str(folder / "ran")))
    config = {
        "model_type": "odd_moe",
        "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"},
        "hidden_size": 32,
        "moe_size": 48,
        "stacked": stacked,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("stacked", [True, False])
def test_code_of_the_checkpoint_runs_only_when_trusted(stacked: bool, tmp_path: Path) -> None:
    folder = remote_checkpoint(tmp_path, stacked)
    with pytest.raises(QuantizeError, match=r"does not know.*--trust-remote-code.*--gate"):
        identify(folder)
    assert not (folder / "ran").exists()
    gates = identify(folder, trust_remote_code=True)
    assert (folder / "ran").exists()
    assert gates == Gates.uniform(Gate("swiglu_oai", 1.3, 0.5, 3.0, interleaved=stacked))


def test_code_of_the_checkpoint_is_not_needed_for_a_known_model(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Published folders often still carry the code that Transformers has taken over since."""
    folder = remote_checkpoint(tmp_path, True)
    config = json.loads((saved("mixtral") / "config.json").read_text())
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    for trust in (False, True):
        assert identify(folder, trust) == Gates.uniform(Gate("silu"))
    assert not (folder / "ran").exists()


def look_alike(**changed: Any) -> dict[str, Any]:
    """A config of DeepSeek-V3's layers under a name that only the checkpoint's own code has."""
    config = checkpoints.deepseek_v3(hidden_act="gelu").to_dict()
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    return config | {"model_type": "kimi_k2", "auto_map": auto_map} | changed


DEEPSEEK = {"architectures": ["DeepseekV3ForCausalLM"]}
LOOK_ALIKES: dict[str, dict[str, Any]] = {
    "Kimi-K2": look_alike(**DEEPSEEK),
    "Kimi-K2.5": {
        "model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"],
        "text_config": look_alike(**DEEPSEEK),
    },
    "the language model of a model that only its own code knows": {
        "model_type": "odd_vl", "architectures": ["OddVLForConditionalGeneration"],
        "auto_map": {"AutoConfig": "odd.OddConfig"}, "text_config": look_alike(**DEEPSEEK),
    },
    "the same, by its type": {
        "model_type": "odd_vl", "text_config": look_alike(model_type="deepseek_v3"),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_models_that_architectures_name(case: str, tmp_path: Path) -> None:
    """By Transformers' class, and never by the checkpoint's code, which has another gate."""
    remote_checkpoint(tmp_path, True)
    (tmp_path / "config.json").write_text(json.dumps(LOOK_ALIKES[case]))
    assert identify(tmp_path) == Gates.uniform(Gate("gelu"))
    assert not (tmp_path / "ran").exists()


def test_its_own_code_does_not_run_even_if_trusted(tmp_path: Path) -> None:
    remote_checkpoint(tmp_path, True)
    (tmp_path / "config.json").write_text(json.dumps(look_alike(**DEEPSEEK)))
    assert identify(tmp_path, trust_remote_code=True) == Gates.uniform(Gate("gelu"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "architectures", [None, [], ["OddForCausalLM"], ["pipeline"], "DeepseekV3ForCausalLM", 5, [{}]]
)
def test_architectures_that_name_no_model(architectures: Any, tmp_path: Path) -> None:
    config = look_alike(architectures=architectures)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizeError, match=r"does not know this model.*A newer Transf.*--gate"):
        identify(tmp_path)
