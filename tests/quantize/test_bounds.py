"""Counts and sizes of a config that cannot be true, anywhere in it: one error, at once."""

from __future__ import annotations

import copy
import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from quantize.checkpoint import bounds
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts import model as models
from quantize.experts.identify import identify_config
from tests.quantize import checkpoints, families
from tests.quantize.test_descriptions import places

COUNTS = ["num_hidden_layers", "depth", "n_layer", "n_layers", "num_experts", "encoder_layers"]
COUNTS += ["num_attention_heads", "n_routed_experts", "depths", "num_key_value_heads"]
SIZES = ["vocab_size", "hidden_size", "moe_intermediate_size", "head_dim", "d_model"]
LARGE = [50_000, 10**9, 10**30]
WRONG = [-7, 32.0, 1e9, float("nan"), float("inf"), -(10**9)]

TENSORS = [TensorInfo("model.layers.3.mlp.experts.63.w1.weight", "BF16", (128, 64))]
FILE = Path("config.json")


def nested() -> dict[str, Any]:
    """A large config with parts: Qwen3-Omni's, of a tiny model."""
    config: dict[str, Any] = json.loads(families.config("qwen3_omni_moe").to_json_string())
    return config


NESTED = nested()


@settings(max_examples=300)
@given(st.data())
def test_wherever_it_is(data: st.DataObject) -> None:
    bounds.check_counts(FILE, NESTED, TENSORS)
    config = copy.deepcopy(NESTED)
    place = data.draw(st.sampled_from(places(config)))
    deep = data.draw(st.integers(0, 3))
    for _ in range(deep):
        place["more"] = {}
        place = place["more"]
    key = data.draw(st.sampled_from(COUNTS + SIZES))
    value = data.draw(st.sampled_from([*(LARGE if key in COUNTS else LARGE[1:]), *WRONG]))
    place[key] = data.draw(st.sampled_from([value, [2, value]]))
    started = time.monotonic()
    with pytest.raises(QuantizeError, match=rf"^config.json: (?:[^ ]*\.)?{key}(?:\[1\])? is "):
        bounds.check_counts(FILE, config, TENSORS)
    assert time.monotonic() - started < 1


def test_every_default_config_of_transformers() -> None:
    """The bounds refuse no model that there is."""
    checked = 0
    embedding = TensorInfo("x", "BF16", (2**18, 64))  # Doge has 16384 experts
    for name in CONFIG_MAPPING_NAMES.values():
        try:
            config = json.loads(getattr(transformers, name)().to_json_string(use_diff=False))
        except Exception:  # cannot be made without arguments
            continue
        bounds.check_counts(FILE, config, [embedding])
        checked += 1
    assert checked > 500


@pytest.mark.parametrize(
    "path",
    [
        ("thinker_config", "text_config", "num_hidden_layers"),
        ("talker_config", "code_predictor_config", "num_hidden_layers"),
        ("thinker_config", "vision_config", "depth"),
        ("thinker_config", "audio_config", "encoder_layers"),
        ("code2wav_config", "num_hidden_layers"),
    ],
)
@pytest.mark.parametrize("count", [50_000, 10**9])
def test_a_checkpoint_is_refused_at_once(path: tuple[str, ...], count: int, tmp_path: Path) -> None:
    config = copy.deepcopy(NESTED)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = count
    tensors = {"thinker.model.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 96, 32)}
    source = checkpoints.save(tmp_path / "source", tensors, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(QuantizeError, match=rf"{'.'.join(path)} is {count}"):
        checkpoints.convert(source, tmp_path / "out")
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert not (tmp_path / "out").exists()


def test_a_number_of_any_name_that_makes_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building counts modules, whatever the config calls what multiplies them."""
    config = checkpoints.mixtral(num_hidden_layers=50)
    assert identify_config(config)
    monkeypatch.setattr(models, "_MAX_MODULES", 200)
    with pytest.raises(QuantizeError, match="a model of more than 200 modules"):
        identify_config(config)
    assert not torch.nn.modules.module._global_module_registration_hooks
