"""Loading parts of a model's weights, by Transformers' own conversion rules.

So a checkpoint may have all names and shapes that ``from_pretrained`` knows.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.experts.names import layer_number

_PRECISE = torch.float32
_PREFIXES = ("", "language_model.")
"""A multimodal model's language model may be stored alone, as vLLM reads it."""


class WeightLoader:
    """Loads tensors of a checkpoint into a model whose parameters are on the meta device.

    Args:
        groups: the routed experts, whose tensors are not to be loaded.
        device, dtype: of what is loaded.

    Attributes:
        dtype_plan: parameters, by part of their names, that have another dtype.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Any,
        groups: list[ExpertGroup],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._device = device
        self._dtype = dtype
        # What must stay float32 beside bf16, in engines too: routers would choose other experts.
        self.dtype_plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
        if dtype.itemsize < _PRECISE.itemsize:
            self.dtype_plan |= {"e_score_correction_bias": _PRECISE}
        # Each use of these objects leaves traces in them.
        self._rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        self._parameters = model.state_dict()
        self._prefix = next((p for p in _PREFIXES if groups and self._named(p, groups[0])), "")
        self._stored = self._by_parameter(checkpoint.tensors.keys() - tensor_names_of(groups))

    def parameter_of(self, name: str) -> str:
        """Return the model's parameter that a stored tensor becomes, or goes into.

        If it becomes several parameters, the first of them; if none, an empty string.
        """
        return self._parameter(self._prefix + name)

    def module_of(self, group: ExpertGroup) -> str:
        """Return the path of the module that a group of experts is in the model; an empty string if
        there is none."""
        if path := self._named(self._prefix, group):
            return path
        # Written experts may have names that no rule of their class has. Then their layer tells, if
        # it has one such module.
        layer = layer_number(group.prefix)
        paths = {path for path, _ in self._of_experts() if layer_number(path) == layer}
        paths = {path for path in paths if path.endswith(".experts")}
        return paths.pop() if len(paths) == 1 and layer is not None else ""

    def is_stored(self, parameter: str) -> bool:
        """Whether the checkpoint has a tensor for one of the model's parameters."""
        return parameter in self._stored

    def load(self, path: str, but: str = "\0") -> None:
        """Load the parameters whose names begin with ``path``, and do not begin with ``but``."""
        self.assign(
            {
                name: self._checkpoint.load(name)
                for parameter, names in self._stored.items()
                if parameter.startswith(path) and not parameter.startswith(but)
                for name in names
            }
        )

    def assign(self, tensors: dict[str, torch.Tensor]) -> None:
        """Make stored tensors, by their names in the checkpoint, parameters of the model."""
        state = {self._prefix + name: tensor for name, tensor in tensors.items()}
        config = LoadStateDictConfig(
            weight_mapping=copy.deepcopy(self._rules),
            device_map={"": self._device},
            dtype=self._dtype,
            dtype_plan=self.dtype_plan,
        )
        with _no_progress_bars():
            convert_and_load_state_dict_in_model(self._model, state, config)
        self._model.requires_grad_(False)

    def check_loaded(self, module: torch.nn.Module, path: str) -> None:
        """See that all of ``module``, which is at ``path``, has weights.

        Raises:
            QuantizeError: naming a parameter without weights.
        """
        for name, tensor in module.state_dict().items():
            if tensor.device.type == "meta":
                raise QuantizeError(
                    f"{self._checkpoint.folder}: {path}{name} is not there, though the model's "
                    f"class, {type(self._model).__name__}, has it; calibration cannot run the model"
                )

    def _by_parameter(self, names: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names):
            if parameter := self.parameter_of(name):
                found[parameter].append(name)
        return found

    def _named(self, prefix: str, group: ExpertGroup) -> str:
        """The module that a group's names lead to: those that it has, or those of its module."""
        ends = sorted({end for _, end in self._of_experts()})
        for name in (group.tensor_names[0], *(f"{group.prefix}.{end}" for end in ends)):
            if found := self._parameter(prefix + name):
                return found.rpartition(".")[0]
        return ""

    def _of_experts(self) -> list[tuple[str, str]]:
        """Modules of experts and the names of their parameters."""
        found = [name.rpartition(".") for name in self._parameters if ".experts." in name]
        return [(path, end) for path, _, end in found]

    def _parameter(self, name: str) -> str:
        prefix = self._model.base_model_prefix
        parameter, _ = rename_source_key(
            name, self._renamings, self._converters, prefix, self._parameters
        )
        if parameter in self._parameters:
            return str(parameter)
        return name if name in self._parameters else ""


def drop_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Move the parameters of ``module`` to the meta device, and return it.

    Buffers stay: not all of them can be loaded again (rotary frequencies, for example), and they
    are small.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.to("meta"), False)
    return module


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without Transformers' progress bars, of which there would be one for each layer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
