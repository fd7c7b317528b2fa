"""Finding the gates of a model by running the code of its Transformers class.

The model is built on the meta device, where it takes no memory. The gating code of each layer then
runs on a grid of numbers. Its outputs give alpha, beta and limit, and are compared with the known
forms. The gate is never guessed from a name. So a new model with a known gate needs no new code. A
gate that is not exactly one of the known forms is an error.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, __version__

from quantize.errors import QuantizeError, first_line
from quantize.experts.gates import FORMS, Gate, Gates
from quantize.experts.gates.contract import first_number
from quantize.experts.gates.drive import (
    CannotDriveError,
    MoreThanProductError,
    check_product,
    drive,
    has_post_norm,
)
from quantize.experts.gates.probe import FAR, Probe
from quantize.experts.layers import what_chooses
from quantize.experts.model import (
    TooLargeError,
    build,
    config_of,
    is_foreign,
    model_classes,
    offline,
)
from quantize.experts.parts import other_part

_HELP = (
    "If you know the gate, pass it: --gate silu, or --gate "
    '\'{"form": "swiglu_oai", "alpha": 1.702, "beta": 1.0, "limit": 7.0}\''
)
_REMOTE = (
    "The checkpoint has Python code of its own; if you trust it, --trust-remote-code lets it be "
    "run to find the gate. "
)
# Values on both sides of every kink and clamp of the known forms, and far outside of them.
_GRID = (-FAR, -33.0, -9.0, -7.5, -3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 6.5, 7.5, 10.5, 40.0, FAR)


def identify(
    source: Path | str, trust_remote_code: bool = False, other_parts: bool = False
) -> Gates:
    """The gates of a checkpoint's experts.

    Args:
        source: a folder or a hub id.
        trust_remote_code: whether to run the checkpoint's own code if Transformers does not know
            the model.
        other_parts: whether experts of other parts than the language model count too
            (``quantize.experts.parts``).

    Raises:
        QuantizeError: if the model is unknown, if a gate has no known form, or if experts of one
            layer have different gates.
    """
    remote = ""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source)
        remote = _REMOTE if is_foreign(raw) and not trust_remote_code else ""
        config = config_of(source, trust_remote_code)
    except StrictDataclassError as error:  # a field of a class that Transformers knows
        said = " ".join(str(error).split())
        raise QuantizeError(
            f"{source}/config.json: Transformers cannot read it ({said}); correct that value"
        ) from error
    except Exception as error:  # Transformers raises many kinds here
        raise QuantizeError(
            f"{source}/config.json: Transformers does not know this model, so its gate is "
            f"unknown ({first_line(error)}). {remote}A newer Transformers than {__version__} may "
            f"know it. {_HELP}"
        ) from error
    return identify_config(config, trust_remote_code, other_parts)


def identify_config(
    config: PreTrainedConfig, trust_remote_code: bool = False, other_parts: bool = False
) -> Gates:
    """The gates of the model that ``config`` describes. Raises the errors of :func:`identify`."""
    with nullcontext() if trust_remote_code else offline():
        try:
            sites = list(_sites(build(config, trust_remote_code)))
        except TooLargeError:
            raise
        except QuantizeError as error:
            sites = _alone(config)
            if not sites:
                raise QuantizeError(f"{error}, so its gate is unknown. {_HELP}") from error
    raw = config.to_dict()
    if not other_parts:
        sites = [site for site in sites if other_part(site[0], raw) is None] or sites
    layers: dict[int, Gate] = {}
    first: dict[int, str] = {}
    for path, module in sites:
        try:
            gate = _gate_of(module)
        except NotImplementedError:
            continue  # not a layer's experts: JetMoE's attention is built of the same class
        number = first_number(path)
        number = -1 if number is None else number
        if layers.setdefault(number, gate) != gate:
            raise QuantizeError(
                f"model type {config.model_type!r} has several gates in one layer "
                f"({first[number]}: {layers[number]}; {path}: {gate}). {_HELP}"
            )
        first.setdefault(number, path)
    if not layers:
        if _has_experts_elsewhere(config):
            raise QuantizeError(
                f"config.json: no layer of the model has experts by it ({what_chooses(raw)}), but "
                "the checkpoint has tensors of experts; correct the config, or download the "
                "checkpoint again"
            )
        raise QuantizeError(
            f"model type {config.model_type!r}: its Transformers class has no '…Experts' module, "
            f"so the gate is unknown. {_HELP}"
        )
    return Gates.of_layers(layers)


def match(probe: Probe) -> Gate | None:
    """The known gate that equals ``probe`` at every point of the grid; None if there is none."""
    points = torch.tensor(_GRID, dtype=torch.float64)
    gate, up = (axis.flatten() for axis in torch.meshgrid(points, points, indexing="ij"))
    truth = probe.function(gate, up)
    for name, form in FORMS.items():
        numbers = form.recover(probe) if form.gated == probe.gated else None
        if numbers is None:
            continue
        candidate = Gate(name, **numbers)
        applied = candidate.apply(gate, up) if form.gated else candidate.apply(up)
        if torch.allclose(applied, truth, rtol=1e-6, atol=1e-9):
            return candidate
    return None


def _sites(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that hold a layer's routed experts, with their paths.

    For a list of experts, this is the first expert's module with the path of the list.
    """
    inside = ""
    for path, module in model.named_modules():
        named = path.rpartition(".")[2]
        listed = isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)
        experts = type(module).__name__.endswith("Experts") or (listed and named == "experts")
        if not experts or "shared" in named or (inside and path.startswith(inside)):
            continue
        if listed:
            inside = f"{path}."
            children = list(module.children())
            if children:
                yield path, children[0]
        elif [name for name, _ in module.named_parameters()] == ["weight"]:
            # JetMoE: this module is one of two GEMMs; the code between them is in its parent.
            parent = path.rpartition(".")[0]
            inside = f"{parent}."
            yield parent, model.get_submodule(parent)
        else:
            inside = f"{path}."
            yield path, module


def _alone(config: PreTrainedConfig) -> list[tuple[str, torch.nn.Module]]:
    """The experts classes of the model's file, with their names, each built without the model.

    This is for models that cannot be built here. A vision or audio tower may lack its library; or
    vLLM has loaded a model through its Transformers backend, after which the classes' constructors
    ask for vLLM's current config.

    The result is empty if a class takes other arguments than the config, since its gate may then
    differ from layer to layer.
    """
    text = config.get_text_config()
    found = [(name, cls) for name, cls in _classes(config) if hasattr(cls, "_apply_gate")]
    if any(set(inspect.signature(cls).parameters) != {"config"} for _, cls in found):
        return []
    try:
        with torch.device("meta"):
            return [(name, cls(copy.deepcopy(text))) for name, cls in found]
    except Exception:  # the caller then reports why the whole model could not be built
        return []


def _has_experts_elsewhere(config: PreTrainedConfig) -> bool:
    """Whether the model's file has a class of experts, though no layer is built with it."""
    return any(True for _ in _classes(config))


def _classes(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """The classes of experts in the model's file, with their names."""
    models = (*model_classes(config.get_text_config(), False), *model_classes(config, False))
    for file in {sys.modules[model.__module__] for model in models}:
        for name, cls in inspect.getmembers(file, inspect.isclass):
            if name.endswith("Experts"):
                yield name, cls


def _gate_of(module: torch.nn.Module) -> Gate:
    """The gate of a module that :func:`_sites` yields; raises QuantizeError if it is unknown."""
    where = f"{type(module).__module__}.{type(module).__name__}"
    try:
        driven = drive(module)
    except CannotDriveError as error:
        raise QuantizeError(
            f"{where}: its gating code cannot be driven: {error}. {_HELP}"
        ) from error

    def stacked(gate: torch.Tensor, up: torch.Tensor, interleaved: bool) -> torch.Tensor:
        if not driven.gated:
            return driven.run(up)
        order = torch.stack((gate, up), dim=-1) if interleaved else torch.stack((gate, up))
        return driven.run(order.flatten())

    for interleaved in (False, True) if driven.joined else (False,):
        probe = Probe(lambda g, u, i=interleaved: stacked(g, u, i), driven.gated)  # type: ignore[misc]
        try:
            found = match(probe)
        except Exception as error:
            raise QuantizeError(
                f"{where}: its gating code fails on plain numbers ({first_line(error)}). {_HELP}"
            ) from error
        if found is not None:
            gate = replace(found, interleaved=interleaved, post_norm=has_post_norm(module))
            _check_product(module, gate, where)
            return gate
    known = ", ".join(name for name, form in FORMS.items() if form.gated == driven.gated)
    what = "gate" if driven.gated else "activation (it has no gate)"
    raise QuantizeError(f"{where}: its {what} is none of {known}. {_HELP}")


def _check_product(module: torch.nn.Module, gate: Gate, where: str) -> None:
    """See that the experts are GEMM, ``gate``, GEMM; raises QuantizeError if they are not."""
    try:
        check_product(module, gate.apply_stacked if gate.gated else gate.apply)
    except CannotDriveError as error:
        raise QuantizeError(
            f"{where}: whether it is GEMM, gate, GEMM cannot be seen: {error}. {_HELP}"
        ) from error
    except MoreThanProductError as error:
        raise QuantizeError(
            f"{where}: its experts do more than GEMM, gate, GEMM: something happens {error} (a "
            "norm, a scale or a residual). Engines that compute experts by their gate would leave "
            "it out, and so would calibration; such experts are not supported"
        ) from error
