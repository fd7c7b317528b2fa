"""Whether a checkpoint has the layers that its config says it has, and these have the experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from quantize.errors import QuantizeError
from quantize.experts.gates.contract import first_number
from quantize.experts.group import ExpertGroup
from quantize.experts.names import layer_number
from quantize.experts.stated import least_number_of_layers, number_of_layers

_LAYERS = re.compile(r"num_(hidden_|decoder_)?layers|n_layers?")
_DRAFTING = re.compile(r"num_nextn_predict_layers|(num_mtp|mtp_num_hidden|num_mtp_hidden)_layers")
_PLACE = re.compile(r"(?P<stem>(?:[^.]+\.)*?(?:layers|blocks|h))\.(?P<number>\d{1,9})\.")
_WHICH = re.compile(
    r"first_k_dense_replace|\w*dense_layers|mlp_only_layers|mlp_layer_types|layers_block_type"
    r"|decoder_sparse_step|moe_layers?(_\w+)?|interleave_moe_layer_step|\w*expert_layer_\w+"
    r"|hybrid_override_pattern|block_configs"
)
"""Keys that say which layers have experts."""
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


def check_layers_are_there(
    config: dict[str, Any], prefixes: Iterable[str], names: Iterable[str], where: str
) -> None:
    """See that each layer of the config has tensors: engines leave the others as memory was.

    Args:
        config: of the language model.
        prefixes: module paths of its experts, which tell what its layers are called.
        names: of all tensors.
        where: the file, for the message.

    Raises:
        QuantizeError: if a layer has none.
    """
    count = least_number_of_layers(config)
    there: dict[str, set[int]] = {
        m["stem"]: set() for p in prefixes if (m := _PLACE.match(f"{p}."))
    }
    for match in filter(None, map(_PLACE.match, names)):
        if (numbers := there.get(match["stem"])) is not None:
            numbers.add(int(match["number"]))
    for stem, numbers in there.items():
        for layer in range(count):
            if layer not in numbers and not _does_nothing(config, layer):
                raise QuantizeError(
                    f"{where}: the model has {count} layers, but there is no tensor of "
                    f"{stem}.{layer}; correct the number of layers, or complete the download"
                )


def check_layers_of_class(
    config: dict[str, Any], of_class: frozenset[int], prefixes: Iterable[str], where: str
) -> None:
    """See that experts are in the layers in which the model's class has them by its config.

    Args:
        config: of the language model.
        of_class: these layers' numbers.
        prefixes: module paths of the language model's experts.
        where: the file, for the message.

    Raises:
        QuantizeError: if they are not.
    """
    stored = {number for prefix in prefixes if (number := first_number(prefix)) is not None}
    if not stored or stored == of_class:
        return
    dense, sparse = sorted(stored - of_class), sorted(of_class - stored)
    what = (
        f"layer {dense[0]} has no experts by it ({what_chooses(config)}), but the checkpoint has "
        "tensors of them"
        if dense
        else f"layer {sparse[0]} has experts by it ({what_chooses(config)}), but the checkpoint "
        "has no tensors of them"
    )
    raise QuantizeError(f"{where}: {what}; correct the config, or download the checkpoint again")


def what_chooses(config: dict[str, Any]) -> str:
    """What a config says of which layers have experts, in words."""
    said: dict[str, Any] = {}
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        said |= {k: v for k, v in part.items() if _WHICH.fullmatch(str(k)) and v is not None}
    return ", ".join(f"{key} = {value}"[:100] for key, value in said.items()) or "in any key"


def _does_nothing(config: dict[str, Any], layer: int) -> bool:
    """Whether ``block_configs`` (Puzzle) says that there is nothing in a layer."""
    blocks = config.get("block_configs")
    block = blocks[layer] if isinstance(blocks, list) and layer < len(blocks) else None
    parts = [part for part in block.values() if part] if isinstance(block, dict) else []
    return bool(parts) and all(isinstance(part, dict) and part.get("no_op") for part in parts)


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
