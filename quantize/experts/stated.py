"""What a config says of a layer's experts: how many there are, and their sizes.

Tensors alone do not tell ``[out, in]`` from ``[in, out]``, nor whether an expert is missing. The
config does. Its keys differ from model to model, and so does where it says what holds for one
layer alone: a list with an entry for each layer (Hunyuan-A13B), or ``block_configs`` (Puzzle).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.errors import QuantizeError
from quantize.experts.names import layer_number

_NUM_EXPERTS = (
    *("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    *("num_routed_experts", "num_moe_experts"),
)
_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk"),
    *("moe_top_k", "moe_k", "moe_router_topk", "top_k_experts", "num_selected_experts"),
)
_LATENT = ("moe_latent_size", "moe_hidden_size")
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_EXPERTS_OWN = (
    *("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"),
    *("expert_intermediate_size", "moe_ffn_dim"),
)
_INTERMEDIATE = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "d_ff")
_KINDS = (_NUM_EXPERTS, _PER_TOKEN, _LATENT, _HIDDEN, _EXPERTS_OWN, _INTERMEDIATE)

_BLOCKS = ("block_configs", "per_layer_config")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_LISTS_OF_LAYERS = ("layers_block_type", "layer_types", "block_configs")

Values = Mapping[str, tuple[int, ...]]
"""By key of the config, what its value may be; empty if the config does not say."""


@dataclass(frozen=True)
class Stated:
    """What a config says of the experts at one module path.

    Attributes:
        num_experts: number of experts.
        per_token: how many of them the router chooses for a token.
        hidden: number of inputs of gate and up.
        intermediate: number of outputs of gate and up.
    """

    num_experts: Values
    per_token: Values
    hidden: Values
    intermediate: Values

    def fits(self, hidden: int, intermediate: int) -> bool:
        """Whether sizes are those of the config, as far as it states them."""
        return _among(hidden, self.hidden) and _among(intermediate, self.intermediate)

    def __str__(self) -> str:
        said = {**self.num_experts, **self.hidden, **self.intermediate}
        return ", ".join(f"{key} = {' or '.join(map(str, v))}" for key, v in said.items())


def stated(config: dict[str, Any], prefix: str) -> Stated:
    """What ``config`` says of the experts at the module path ``prefix``.

    Args:
        config: the config of the language model, or of another part that the experts are in.

    Raises:
        QuantizeError: if a list is neither one of layers nor one of modalities.
    """
    nested = config.get("ffn_config")  # DBRX
    fields = {**config, **nested} if isinstance(nested, dict) else config
    number = layer_number(prefix)
    fields = _of_block(fields, number)
    layers = number_of_layers(config)
    values = {
        key: found
        for kind in _KINDS
        for key in kind
        if (found := _values(key, fields.get(key), number, layers, modalities(config)))
    }
    return Stated(
        {key: values[key] for key in _NUM_EXPERTS if key in values},
        {key: values[key] for key in _PER_TOKEN if key in values},
        _first(values, _LATENT, _HIDDEN),
        _first(values, _EXPERTS_OWN, _INTERMEDIATE),
    )


def number_of_layers(config: dict[str, Any]) -> int | None:
    """The number of layers that a language model's config states; None if it does not."""
    for key in _LAYERS:
        if _is_number(config.get(key)):
            return int(config[key])
    return next((len(v) for k in _LISTS_OF_LAYERS if isinstance(v := config.get(k), list)), None)


def least_number_of_layers(config: dict[str, Any]) -> int:
    """The least of the numbers of layers that a language model's config states; 0 if none.

    LongCat counts pairs of layers in one key, and layers in another.
    """
    said = [int(config[key]) for key in _LAYERS if _is_number(config.get(key))]
    return min(said, default=number_of_layers(config) or 0)


def modalities(config: dict[str, Any]) -> int:
    """How many sets of experts, of sizes of their own, share each list of experts.

    Ernie 4.5 VL has experts for text, followed by equally many of another size for images; its
    ``moe_intermediate_size`` has an entry for each. Otherwise there is one.
    """
    kind, sizes = str(config.get("model_type")), config.get("moe_intermediate_size")
    ernie = "ernie4_5" in kind and "vl" in kind
    return len(sizes) if ernie and isinstance(sizes, list) and sizes else 1


def _of_block(config: dict[str, Any], number: int | None) -> dict[str, Any]:
    """``config`` with what it says of one layer alone in place of what it says of all."""
    for key in _BLOCKS:
        blocks = config.get(key)
        block = None
        if isinstance(blocks, dict):
            block = blocks.get(str(number))
        elif isinstance(blocks, list) and number is not None and number < len(blocks):
            block = blocks[number]
        if isinstance(block, dict):
            inner = [v for k in ("ffn", "moe", "mlp") if isinstance(v := block.get(k), dict)]
            own = {k: v for part in (block, *inner) for k, v in part.items() if v is not None}
            # What a block says of one kind replaces all that is said of it elsewhere.
            replaced = {k for kind in _KINDS if not own.keys().isdisjoint(kind) for k in kind}
            return {k: v for k, v in config.items() if k not in replaced} | own
    return config


def _values(
    key: str, value: Any, number: int | None, layers: int | None, sets: int
) -> tuple[int, ...]:
    if _is_number(value):
        return (value,)
    if not isinstance(value, list) or not value or not all(map(_is_number, value)):
        return ()
    if sets > 1 or layers is None or number is None:
        return tuple(dict.fromkeys(value))
    if len(value) != layers:
        raise QuantizeError(
            f"config.json: {key} is a list of {len(value)}, but there are {layers} layers; "
            "expected one number, or one for each layer"
        )
    return (value[number],) if number < layers else tuple(dict.fromkeys(value))


def _first(values: dict[str, tuple[int, ...]], *kinds: Iterable[str]) -> Values:
    """The values of the first of ``kinds`` that has any."""
    found = ({key: values[key] for key in kind if key in values} for kind in kinds)
    return next((some for some in found if some), {})


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _among(size: int, values: Values) -> bool:
    return not values or any(size in allowed for allowed in values.values())
