"""Establishing a model's gate from its Transformers class: by running it, never by its name.

The class's own gating code is driven with a grid of numbers and matched to the known forms, with
alpha, beta and limit read off the outputs. So a new model with a known gate needs no new code, and
a gate that is not exactly one of the forms is an error.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from quantize.errors import QuantizeError
from quantize.gates import FORMS, Gate
from quantize.gates.probe import FAR, Probe

_HELP = (
    "If you know the gate, pass it: --gate silu, or --gate "
    '\'{"form": "swiglu_oai", "alpha": 1.702, "beta": 1.0, "limit": 7.0}\''
)
# Around every kink and clamp that the forms have, and far outside.
_GRID = (-FAR, -33.0, -9.0, -7.5, -3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 6.5, 7.5, 10.5, 40.0, FAR)

_SIZES = {"intermediate_size", "ffn_dim"}
"""Constructor arguments of experts classes that cannot change the gate."""


def identify(source: Path | str) -> Gate:
    """The gate of the experts of the checkpoint ``source``, a folder or a hub id.

    Code from the checkpoint is never run: the class must be one of Transformers' own.

    Raises:
        QuantizeError: if the class is unknown, its gate is no known form, or the model has several
            kinds of experts with different gates.
    """
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source)
        # Not AutoConfig: in a process of vLLM's, it gives vLLM's own class for some models.
        config = getattr(transformers, CONFIG_MAPPING_NAMES[raw["model_type"]]).from_dict(raw)
    except Exception as error:  # Transformers raises many kinds here
        raise QuantizeError(
            f"{source}/config.json: Transformers does not know this model, so its gate is "
            f"unknown ({_first_line(error)}). {_HELP}"
        ) from error
    return identify_config(config)


def identify_config(config: PreTrainedConfig) -> Gate:
    """The gate of the model that ``config`` describes; raises as :func:`identify`."""
    text = config.get_text_config()
    gates: dict[Gate, str] = {}
    for cls in _experts_classes(text) or _experts_classes(config):
        gates.setdefault(_gate_of(cls, text), cls.__name__)
    if not gates:
        raise QuantizeError(
            f"model type {text.model_type!r}: its Transformers module has no '…Experts' class with "
            f"gating code, so the gate is unknown. {_HELP}"
        )
    if len(gates) > 1:
        found = "; ".join(f"{name}: {gate}" for gate, name in gates.items())
        raise QuantizeError(f"model type {text.model_type!r} has several gates ({found}). {_HELP}")
    return next(iter(gates))


def match(probe: Probe) -> Gate | None:
    """The known form, with its numbers, that equals ``probe`` over the whole grid; None if none."""
    points = torch.tensor(_GRID, dtype=torch.float64)
    gate, up = (axis.flatten() for axis in torch.meshgrid(points, points, indexing="ij"))
    truth = probe.function(gate, up)
    for name, form in FORMS.items():
        numbers = form.recover(probe)
        if numbers is None:
            continue
        candidate = Gate(name, **numbers)
        if torch.allclose(candidate.apply(gate, up), truth, rtol=1e-6, atol=1e-9):
            return candidate
    return None


def _experts_classes(config: PreTrainedConfig) -> list[type[torch.nn.Module]]:
    """Classes named ``*Experts`` with gating code, in the modeling module of ``config``'s class."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        model = mapping.get(type(config), None)
        if model is None:
            continue
        model = model[0] if isinstance(model, tuple | list) else model
        module = importlib.import_module(model.__module__)
        classes: list[tuple[str, Any]] = inspect.getmembers(module, inspect.isclass)
        return [
            cls
            for name, cls in classes
            if name.endswith("Experts")
            and cls.__module__ == module.__name__
            and hasattr(cls, "_apply_gate")
        ]
    return []


def _gate_of(cls: type[torch.nn.Module], config: PreTrainedConfig) -> Gate:
    where = f"{cls.__module__}.{cls.__name__}"
    extra = set(inspect.signature(cls).parameters) - {"config"} - _SIZES
    if extra:
        # Step-3.7 passes each layer its own limit: one gate for the whole model would be a guess.
        raise QuantizeError(
            f"{where} takes {', '.join(sorted(extra))} beside the config, so its gate may differ "
            "from layer to layer; not supported yet"
        )
    try:
        with torch.device("meta"):  # no memory, whatever the model's size
            experts: Any = cls(config)
    except Exception as error:
        raise QuantizeError(
            f"{where} cannot be built from the config alone ({_first_line(error)}). {_HELP}"
        ) from error
    if not getattr(experts, "has_gate", True):
        raise QuantizeError(f"{where} has no gate (up and down only); not supported yet")

    def stacked(gate: torch.Tensor, up: torch.Tensor, interleaved: bool) -> torch.Tensor:
        order = torch.stack((gate, up), dim=-1) if interleaved else torch.stack((gate, up))
        return experts._apply_gate(order.flatten().unsqueeze(0)).flatten()

    for interleaved in (False, True):
        probe = Probe(lambda g, u, i=interleaved: stacked(g, u, i))  # type: ignore[misc]
        try:
            found = match(probe)
        except Exception as error:
            raise QuantizeError(
                f"{where}: its gating code fails on plain numbers ({_first_line(error)}). {_HELP}"
            ) from error
        if found is not None:
            return Gate(found.form, found.alpha, found.beta, found.limit, interleaved)
    raise QuantizeError(f"{where}: its gate is none of {', '.join(FORMS)}. {_HELP}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
