"""Which part of a config describes the language model."""

from __future__ import annotations

from typing import Any

LANGUAGE = (
    *("thinker_config", "text_config", "llm_config", "language_config"),
    *("language_model_config", "lm_config"),
)
"""Keys of the config of a language model, within the config of a model that has other parts too:
Qwen-Omni, most others, InternVL and Nemotron-VL, DeepSeek-VL."""


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's config within ``config``, at any depth; all of it if it has no parts.

    Args:
        config: the contents of a ``config.json``.
    """
    for key in LANGUAGE:
        if isinstance(nested := config.get(key), dict):
            return language_config(nested)
    return config
