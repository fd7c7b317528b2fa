"""The gate contract: which activation a checkpoint's experts apply between their two GEMMs.

``nvfp4-moe quantize`` writes the contract into ``config.json`` under the key ``nvfp4_moe``, which
other readers ignore. The vLLM plugin applies the gate that the contract names, even if vLLM's own
layer for the model would apply another::

    {"nvfp4_moe": {"version": 1, "gate": {"form": "swiglu_oai", "alpha": 1.702, "beta": 1.0,
                                          "limit": 7.0, "interleaved": false}}}

If layers differ, the contract has version 2: ``gate`` is the gate of most layers, and ``layers``
maps the number of each other layer to its gate. Version 3 is the same, with ``layers`` or without,
where gates say ``post_norm``: engines that know no such norm then refuse the checkpoint. ``made``
beside it is no part of the contract (see
``quantize.run.made``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantize.errors import QuantizeError
from quantize.experts.drafting import is_drafting
from quantize.experts.gates.gate import Gate

KEY = "nvfp4_moe"

_VERSIONS = (1, 2, 3)
_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,9})(?:\.|$)")


@dataclass(frozen=True)
class Gates:
    """The gates of a model's routed experts.

    Attributes:
        default: the gate of every layer that is not in ``layers``.
        layers: the gates that differ from ``default``, by layer number.
        of_class: the layers that have experts where the model's class is built from the config;
            None if that is not known.
    """

    default: Gate
    layers: Mapping[int, Gate] = field(default_factory=dict)
    of_class: frozenset[int] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        different = {n: gate for n, gate in sorted(self.layers.items()) if gate != self.default}
        object.__setattr__(self, "layers", different)

    @classmethod
    def uniform(cls, gate: Gate) -> Gates:
        """One gate for all layers."""
        return cls(gate)

    @classmethod
    def of_layers(cls, gates: Mapping[int, Gate]) -> Gates:
        """From the gate of each layer, by its number (-1: it has none). The most frequent one
        becomes the default."""
        numbered = None if -1 in gates else frozenset(gates)
        return cls(Counter(gates.values()).most_common(1)[0][0], gates, numbered)

    def of(self, prefix: str) -> Gate:
        """The gate of the experts at a module path such as ``model.layers.3.mlp.experts``."""
        number = first_number(prefix)
        return self.default if number is None else self.layers.get(number, self.default)

    def concatenated(self) -> Gates:
        """The same gates for tensors that hold all of gate, then all of up (not interleaved)."""
        layers = {number: gate.concatenated() for number, gate in self.layers.items()}
        return Gates(self.default.concatenated(), layers)

    def __str__(self) -> str:
        by_gate: dict[Gate, list[int]] = {}
        for number, gate in self.layers.items():
            by_gate.setdefault(gate, []).append(number)
        return "".join(
            [str(self.default)]
            + [
                f"; in layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}: {gate}"
                for gate, numbers in by_gate.items()
            ]
        )


def first_number(path: str) -> int | None:
    """The layer's number in the contract: the first number in a module path.

    None if there is none, or if it counts multi-token-prediction layers alone, as in ``mtp.0``.
    """
    found = _NUMBER.search(path)
    return int(found[1]) if found and not is_drafting(path[: found.start()], {}) else None


def to_contract(gates: Gates) -> dict[str, Any]:
    """The value of ``config.json``'s ``nvfp4_moe`` key."""
    every = [gates.default, *gates.layers.values()]
    version = 3 if any(gate.post_norm for gate in every) else 2 if gates.layers else 1
    layers = {str(number): gate.fields() for number, gate in gates.layers.items()}
    contract = {"version": version, "gate": gates.default.fields()}
    return contract | {"layers": layers} if layers else contract


def from_contract(value: Any, where: str = "config.json") -> Gates:
    """The gates in a contract.

    Args:
        value: the value of ``config.json``'s ``nvfp4_moe`` key.
        where: the file, for messages.

    Raises:
        QuantizeError: if ``value`` is malformed, or has a version or form that is unknown here.
    """
    try:
        version = value["version"]
        if version not in _VERSIONS or isinstance(version, bool):
            raise QuantizeError(
                f"{where}: {KEY}.version is {version!r}, this package knows "
                f"{', '.join(map(str, _VERSIONS))}; update vllm-nvfp4-moe"
            )
        if version < 3 and ("layers" in value) != (version == 2):
            raise QuantizeError("'layers' belongs to versions 2 and 3, and only to them")
        layers = {_layer(key): Gate(**gate) for key, gate in value.get("layers", {}).items()}
        gate = Gate(**dict(value["gate"]))
        if version < 3 and any(each.post_norm for each in (gate, *layers.values())):
            raise QuantizeError("'post_norm' belongs to version 3, and only to it")
        return Gates(gate, layers)
    except QuantizeError as error:
        raise QuantizeError(f"{where}: {KEY}: {error}") from None
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise QuantizeError(f"{where}: {KEY} is not a gate contract: {error!r}") from error


def _layer(key: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", key):
        raise ValueError(f"layer number {key!r}")
    return int(key)
