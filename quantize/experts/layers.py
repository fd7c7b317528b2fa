"""Whether a checkpoint has as many layers of experts as its config can mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.experts.names import layer_number
from quantize.experts.stated import number_of_layers

_LAYERS = re.compile(r"num_(hidden_|decoder_)?layers|n_layers?")
_DRAFTING = re.compile(r"num_nextn_predict_layers|(num_mtp|mtp_num_hidden|num_mtp_hidden)_layers")
_OTHER_TOWERS = re.compile(r"vision|visual|image|video|audio|speech_encoder")


def check_layer_count(config: dict[str, Any], groups: Sequence[ExpertGroup], where: str) -> None:
    """Compare the layers that have experts with the decoder layers of the config.

    Files of two copies of one model, whose tensors have other names, would pass as one model.

    Args:
        config: the whole ``config.json``; a decoder's part may be nested.
        where: the file, for the message.

    Raises:
        QuantizeError: if there are more. A config that does not say how many there are passes.
    """
    layers = {
        (group.prefix.partition("layers.")[0], layer_number(group.prefix)) for group in groups
    }
    stated = _stated(config)
    if stated and len(layers) > stated:
        stems = sorted({f"{stem}layers" for stem, _ in layers})
        raise QuantizeError(
            f"{where}: the model has {stated} layers, but there are {len(layers)} layers of "
            f"experts ({', '.join(stems)}); the files of two copies of the model may be mixed: "
            "move one of them to another folder"
        )


def _stated(config: dict[str, Any]) -> int:
    """The decoder layers of all decoders in a config, with those for drafting; 0 if not stated."""
    counts = {key: value for key, value in config.items() if type(value) is int and value > 0}
    layers = max((n for key, n in counts.items() if _LAYERS.fullmatch(key)), default=0)
    layers = max(layers, number_of_layers(config) or 0)
    drafting = max((n for key, n in counts.items() if _DRAFTING.fullmatch(key)), default=0)
    return (
        layers
        + drafting
        + sum(
            _stated(value)
            for key, value in config.items()
            if isinstance(value, dict) and not _OTHER_TOWERS.search(key)
        )
    )
