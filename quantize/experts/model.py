"""Building the Transformers model that a checkpoint's config describes, without its weights.

A checkpoint's own code runs only if the user allows it (``--trust-remote-code``) and Transformers
does not have the model. Within :func:`offline`, building a model sends no request to the hub.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedConfig, initialization
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)

from quantize.checkpoint.language import language_config
from quantize.errors import QuantizeError, first_line

_MODELS = (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING)
_NAMES: tuple[dict[str, Any], ...] = (
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")
_IMPLEMENTATION = re.compile(r"_?(?:attn|experts)_implementation(?:_internal)?")
"""Keys with which a config chooses kernels. A value may name any repository of the hub."""

_MAX_MODULES = 300_000
"""Most modules that a model may have. Kimi-K2, of 10^12 weights, has 120,000 in its own code, with
a module for each matrix of each expert. This bounds the time in which a model is built."""

Place = Callable[[], AbstractContextManager[Any]]


def config_of(source: Path | str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of the checkpoint ``source``, a folder or a hub id.

    If Transformers does not know the model, and its own code is not to run, this is the config of
    the language model in it, if Transformers knows that one.

    A config that Transformers does not know raises an error of Transformers, of any type.
    """
    raw, _ = PreTrainedConfig.get_config_dict(source)
    if trust_remote_code and is_foreign(raw):
        return AutoConfig.from_pretrained(source, trust_remote_code=True)
    if _known_type(raw) is None:
        raw = language_config(raw)
    known = _with_known_types(raw) | {"model_type": _known_type(raw) or raw.get("model_type")}
    # Not AutoConfig: in a process of vLLM it returns vLLM's own class for some models.
    cls = getattr(transformers, CONFIG_MAPPING_NAMES[known["model_type"]])
    with offline():
        config: PreTrainedConfig = cls.from_dict(_without_implementations(known))
    return config


def is_foreign(raw: dict[str, Any]) -> bool:
    """Whether Transformers lacks the model, by its ``model_type`` and by its ``architectures``, and
    the checkpoint has its own code for it.

    Args:
        raw: the contents of ``config.json``.
    """
    return _known_type(raw) is None and "auto_map" in raw


def _known_type(raw: dict[str, Any]) -> str | None:
    """The ``model_type`` by which Transformers knows the model; None if it does not.

    Kimi-K2's is ``kimi_k2``, which only its own code knows, but its ``architectures`` say
    ``DeepseekV3ForCausalLM``. Engines go by those, too.
    """
    if (own := raw.get("model_type")) in CONFIG_MAPPING_NAMES:
        return str(own)
    for name in raw.get("architectures") or ():
        if name in _architectures():
            return str(getattr(transformers, name).config_class.model_type)
    return None


@cache
def _architectures() -> frozenset[str]:
    """The names of the classes of Transformers that :func:`build` may build."""
    names: set[str] = set()
    for mapping in _NAMES:
        for found in mapping.values():
            names.update((found,) if isinstance(found, str) else found)
    return frozenset(names)


def _with_known_types(raw: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with each ``model_type`` as Transformers knows it, at any depth."""
    parts = {k: _with_known_types(v) if isinstance(v, dict) else v for k, v in raw.items()}
    known = _known_type(raw) if "model_type" in raw else None
    return parts | {"model_type": known} if known else parts


@contextmanager
def offline() -> Iterator[None]:
    """Within this context, nothing is requested from the hub.

    Some models would fetch parts from the hub when they are built.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class _EmptyOnMeta(TorchFunctionMode):
    """Puts what ``torch.empty`` makes on the meta device.

    Models allocate parameters with it, and systems may refuse tens of GB even for a moment.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within this context, models are built with parameters on the meta device.

    Their buffers have values and take memory.
    """
    register = torch.nn.Module.register_parameter

    def register_on_meta(
        module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None
    ) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


class TooLargeError(QuantizeError):
    """A model has more modules than any that is known."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Within this context, a model of more than ``_MAX_MODULES`` modules is an error."""
    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise TooLargeError(
                f"config.json describes a model of more than {_MAX_MODULES} modules; correct its "
                "numbers of layers and experts, or download the checkpoint again"
            )

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def build(
    config: PreTrainedConfig,
    trust_remote_code: bool = False,
    place: Place = lambda: torch.device("meta"),
    attention: str = "eager",
) -> torch.nn.Module:
    """Build the model of ``config``; only its language model if the whole cannot be built.

    Args:
        trust_remote_code: whether the checkpoint's own code may run.
        place: makes the context to build in; by default all tensors are on the meta device.
        attention: Transformers' ``attn_implementation``. It replaces the config's own choice, which
            may name a kernel on the hub.

    Raises:
        QuantizeError: if Transformers has no such model, or if the model's code fails.
    """
    errors: list[Exception] = []
    text = config.get_text_config()
    for part in (config,) if text is config else (config, text):
        for cls in model_classes(part, trust_remote_code):
            try:
                with place(), initialization.no_init_weights(), _bounded():
                    own = copy.deepcopy(part)
                    own._attn_implementation = attention
                    model: torch.nn.Module = cls(own)
                return model
            except TooLargeError:
                raise
            except Exception as error:  # the model's code may raise anything
                errors.append(error)
    if errors:
        raise QuantizeError(
            f"model type {config.model_type!r} cannot be built from its config "
            f"({first_line(errors[0])})"
        ) from errors[0]
    raise QuantizeError(
        f"model type {config.model_type!r}: Transformers has no model for {type(config).__name__}"
    )


def model_classes(config: PreTrainedConfig, trust_remote_code: bool) -> Iterator[Any]:
    """The classes that can build the model, the best one first."""
    for mapping in _MODELS:
        model = mapping.get(type(config), None)
        if model is not None:
            yield model[0] if isinstance(model, tuple | list) else model
            return
    auto_map = getattr(config, "auto_map", None) or {}
    for name in _AUTO_CLASSES:
        if trust_remote_code and name in auto_map:
            yield get_class_from_dynamic_module(auto_map[name], config.name_or_path)
            return


def _without_implementations(value: Any) -> Any:
    """A copy of ``value`` without the keys that match ``_IMPLEMENTATION``, at every depth."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not _IMPLEMENTATION.fullmatch(str(k))}
        return {key: _without_implementations(item) for key, item in kept.items()}
    return [_without_implementations(item) for item in value] if isinstance(value, list) else value
