"""The models that ``every_family`` serves, without any engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine import family_models
from tests.engine.every_family import all_families
from tests.quantize import families

DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
PARTS = ("text_config", "vision_config", "audio_config")


@pytest.mark.parametrize("family", all_families())
def test_transformers_takes_the_config(family: str) -> None:
    """Its class is built from the larger sizes, with as many layers as in the tiny model: lists of
    four go with a tower of four."""
    config = family_models.config_of(family)
    with torch.device("meta"):
        assert sum(p.numel() for p in families.of_config(config).parameters()) > 100_000
    tiny = families.config(family)
    parts = [name for name in families.SPECIAL.get(family, {}) if name in PARTS]
    for larger, small in [(config, tiny), *((getattr(config, p), getattr(tiny, p)) for p in parts)]:
        for name in DEPTHS:
            assert getattr(larger, name, None) == getattr(small, name, None)


def test_a_tokenizer_beside(tmp_path: Path) -> None:
    """It has a word for each token that a prompt has, and those of a processor elsewhere."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    family_models.put_beside(tmp_path, "PixtralImageProcessor", ("[IMG]", "[END]"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    used = {token for row in family_models.prompts() for token in row}
    words = tokenizer.convert_ids_to_tokens(sorted(used))
    assert tokenizer.encode(" ".join(words), add_special_tokens=False) == sorted(used)
    assert not used & set(tokenizer.convert_tokens_to_ids(["[IMG]", "[END]"]))
    assert len(tokenizer) == family_models.SIZES["vocab_size"]


def test_hy_v4s_names(tmp_path: Path) -> None:
    """They are those that vLLM's class reads (models/hy_v4/nvidia/hc.py, and the error of stock
    vLLM on what Transformers saves), and Transformers reads them, too, as the same model."""
    source = tmp_path / "source"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family_models, "log_probabilities", lambda model: [])
        family_models.make("hy_v4", tmp_path)
    for folder in (source, tmp_path / "nvfp4"):
        names = set(load_file(folder / "model.safetensors"))
        hyper = {name for name in names if ".hc_" in name}
        layers = [
            f"model.layers.{n}.hc_{part}_layer.hc_pre." for n in (0, 1) for part in ("attn", "mlp")
        ]
        assert hyper == {
            *(f"{layer}hc_{kind}" for layer in layers for kind in ("fn", "base", "scale")),
            *(f"model.hc_head.hc_head_{kind}" for kind in ("fn", "base", "scale")),
        }
    torch.manual_seed(1)
    model, told = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    again = tmp_path / "again"
    model.save_pretrained(again)
    first, second = (load_file(f / "model.safetensors") for f in (source, again))
    stored = sorted(t.float().sum().item() for t in first.values())
    assert sorted(t.float().sum().item() for t in second.values()) == stored
