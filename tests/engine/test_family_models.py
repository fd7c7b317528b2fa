"""The models that ``every_family`` serves, without any engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

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
