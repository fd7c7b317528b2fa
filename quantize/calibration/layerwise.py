"""A model that has the weights of one decoder layer at a time, and runs that layer on text.

Each run calls the model's own ``forward``, so every layer gets just the masks, positions and other
arguments that its class makes. The embedding stays, because some layers use it again. Stand-ins
take the place of the layers before the current one: they return the current layer's input. The run
ends with what the current layer returns. A stand-in also takes the place of the layer's routed
experts, which are never loaded here: it records their arguments, and later returns what was
computed for them one expert at a time (``quantize.calibration.forward``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantize.calibration.empty_model import empty_model
from quantize.calibration.loading import WeightLoader, drop_weights
from quantize.calibration.stand_ins import (
    CaptureLayer,
    LayerInput,
    ReplayExperts,
    ReplayLayer,
    StopForward,
)
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError, first_line
from quantize.experts.group import ExpertGroup

States = tuple[torch.Tensor, ...]
"""What a layer returns and the next one is given: all of it that is not None. Each tensor has the
texts in its first dimension."""


class ExpertSite(NamedTuple):
    """Where a group of experts is in the model: the number of its layer, and its module path."""

    layer: int
    path: str
    group: ExpertGroup


class LayerwiseModel:
    """See the module's docstring.

    Args:
        groups: the routed experts, which are not to be loaded.
        dtype: to compute in.

    Attributes:
        checkpoint, folder: where its weights are.
        device, dtype: as given.
        model: Transformers' model.
        layers: its decoder layers; layers_path: where they are.
        sites: where the groups of experts are.
        last: the number of the last layer that has experts.
        loader: loads the model's weights.
        return_forms: what each layer returns, by its number: None for a tensor; for a tuple, which
            of its elements are not None. A run that goes on with an earlier run's states needs
            that run's forms.

    Raises:
        QuantizeError: if Transformers does not know the model, or its experts do not take
            ``(hidden_states, expert numbers, weights)``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: list[ExpertGroup],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder
        self.device = device
        self.dtype = dtype
        self.model: Any = empty_model(checkpoint, dtype, trust_remote_code)
        self.loader = WeightLoader(checkpoint, self.model, groups, device, dtype)
        self.layers_path, self.sites = self._find_experts(groups)
        self.layers: Any = self.model.get_submodule(self.layers_path)
        self.last = max(site.layer for site in self.sites)
        self.return_forms: dict[int, list[bool] | None] = {}
        self._input = LayerInput()
        above = self.layers_path.rpartition(".")[0]
        self._decoder: Any = self.model.get_submodule(above)
        self._load_beside()
        for path, module in self._decoder.named_modules():  # rotary frequencies, for example
            if not f"{path}.".startswith("layers."):
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.device.type != "meta":
                        module._buffers[name] = buffer.to(device)

    def layer_of(self, group: ExpertGroup) -> int:
        """Return the number of the layer that the experts are in."""
        return next(site.layer for site in self.sites if site.group == group)

    @contextmanager
    def loaded(self, layer: int) -> Iterator[list[ReplayExperts]]:
        """Load a layer: within the context it has weights, and :meth:`run` runs it.

        Yields:
            the stand-ins of its experts.
        """
        path = f"{self.layers_path}.{layer}."
        current = self._original(layer)
        self.loader.load(path)
        self.replay_before(layer)
        places = []
        for site in self.sites:
            if site.layer == layer:
                parent, _, name = site.path.rpartition(".")
                owner = self.model.get_submodule(parent)
                places.append((owner, name, ReplayExperts(getattr(owner, name), site.group)))
        for place in places:
            setattr(*place)
        self.loader.check_loaded(current, path)
        self.layers[layer] = self._current = CaptureLayer(current.to(self.device))
        try:
            yield [stand_in for _, _, stand_in in places]
        finally:
            for owner, name, stand_in in places:
                setattr(owner, name, stand_in.original)
            self.layers[layer] = ReplayLayer(drop_weights(current), self._input)

    def run(self, tokens: torch.Tensor, states: States | None) -> States | None:
        """Run the current layer once.

        Args:
            tokens: int64 ``[texts, sequence_length]``.
            states: what the layer before it returned for them; None for the first layer.

        Returns:
            what the layer returns, tensors ``[texts, ...]``; None if the run ended in its experts.

        Raises:
            QuantizeError: if the model's code fails, or a layer returns something else.
        """
        if states is not None:
            self.set_input(states)
        self._current.returned = None
        with suppress(StopForward):
            self.call(tokens)
        returned = self._current.returned
        if returned is None:
            return None
        whole = returned if isinstance(returned, tuple) else (returned,)
        form = None if whole is not returned else [part is not None for part in returned]
        self.return_forms[self._number] = form
        found = [part for part in whole if part is not None]
        for part in found:
            if not isinstance(part, torch.Tensor) or len(part) != len(tokens):
                raise QuantizeError(
                    f"{self.folder}: layers of {type(self.model).__name__} return "
                    f"{type(part).__name__}; calibration knows tensors with a row for each text; "
                    "leave --calibrate out"
                )
        return tuple(found)

    def release(self) -> None:
        """Drop what the last run was given and returned, and its graph with it."""
        self._input.value = self._current.returned = None

    def replay_before(self, layer: int) -> None:
        """Make ``layer`` the current one: those before it return its input from now on."""
        self._number = layer
        for number in range(layer):
            if not isinstance(self.layers[number], ReplayLayer):
                self.layers[number] = ReplayLayer(self.layers[number], self._input)

    def set_input(self, states: States) -> None:
        """Set the current layer's input, in the form that the layer before it returned it in."""
        self._input.value = self.in_form(self._number - 1, states)

    def in_form(self, layer: int, states: States) -> Any:
        """Return ``states`` in the form in which ``layer``, which has run, returns its own."""
        parts = iter(part.to(self.device) for part in states)
        form = self.return_forms[layer]
        if form is None:
            return next(parts)
        return tuple(next(parts) if there else None for there in form)

    def call(
        self, tokens: torch.Tensor, part: Callable[[Any], Any] = lambda all_: all_, **more: Any
    ) -> Any:
        """Call the model, and return ``part`` of its output.

        Args:
            more: arguments of its ``forward``.

        Raises:
            QuantizeError: if its code fails.
        """
        return part(call(self.model, tokens.to(self.device), self.folder, **more))

    def _load_beside(self) -> None:
        """Load embeddings and whatever else the decoder has besides its layers."""
        above = self.layers_path.rpartition(".")[0]
        self.loader.load(f"{above}.", but=f"{self.layers_path}.")

    def _original(self, layer: int) -> torch.nn.Module:
        """Put the model's own layer where it belongs, and return it."""
        found = self.layers[layer]
        if isinstance(found, ReplayLayer):
            found = self.layers[layer] = found.original
        return found

    def _find_experts(self, groups: list[ExpertGroup]) -> tuple[str, list[ExpertSite]]:
        """Find the module path of the list of layers, and the experts."""
        layers, sites = "", []
        for group in groups:
            path = self.loader.module_of(group)
            try:
                module = self.model.get_submodule(path)
                list_path, number = re.findall(r"(.*?\.?layers)\.([0-9]+)\.", f"{path}.")[0]
            except (AttributeError, IndexError):
                raise QuantizeError(
                    f"{group.prefix}: not found in Transformers' {type(self.model).__name__}; "
                    "calibration runs that model; leave --calibrate out"
                ) from None
            arguments = [
                p.name for p in inspect.signature(module.forward).parameters.values()
                if p.kind == p.POSITIONAL_OR_KEYWORD
            ]  # fmt: skip
            if len(arguments) != 3:
                raise QuantizeError(
                    f"{group.prefix}: {type(module).__name__} takes {', '.join(arguments)}; "
                    "calibration knows experts that take hidden states, expert numbers and "
                    "weights; leave --calibrate out"
                )
            layers = layers or list_path
            sites.append(ExpertSite(int(number), path, group))
        return layers, sites


def call(model: Any, tokens: torch.Tensor, folder: Path, **more: Any) -> Any:
    """Call Transformers' model of the checkpoint in ``folder`` on texts, and return its output.

    Args:
        more: further arguments of its ``forward``.

    Raises:
        QuantizeError: if the model's code fails.
    """
    try:
        return model(input_ids=tokens, use_cache=False, **more)
    except (StopForward, QuantizeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any code may be in there
        raise QuantizeError(
            f"{folder}: Transformers' {type(model).__name__} fails on "
            f"text ({type(error).__name__}: {first_line(error)}), and calibration runs it; "
            "leave --calibrate out"
        ) from error
