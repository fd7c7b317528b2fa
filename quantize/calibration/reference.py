"""Transformers' own model of a checkpoint, run in one go: calibration's passes must agree with it.

No stand-in is in this model. One call of its ``forward`` goes through all layers, with its own
embeddings, masks and positions; hooks load each layer's weights before it runs, and drop them after
it. A layer's experts are loaded as a whole if they are small. Otherwise their class's own
``forward`` runs once for each expert, over that expert's tokens. All weights, those of experts
included, become parameters by Transformers' own conversion rules.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from quantize.calibration.empty_model import empty_model
from quantize.calibration.layerwise import ExpertSite, LayerwiseModel, call
from quantize.calibration.loading import WeightLoader, drop_weights
from quantize.calibration.stand_ins import StopForward
from quantize.calibration.store import Store
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import ExpertGroup

WHOLE_LAYER = 5e8
"""Experts of a layer with at most so many bytes are loaded together."""


class Reference:
    """See the module's docstring.

    Args:
        layerwise: the model that is to be compared with this one; says where layers and experts
            are, and the device and dtype to compute in.
        store: where states are kept.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layerwise: LayerwiseModel,
        store: Store,
        trust_remote_code: bool = False,
    ) -> None:
        groups = [site.group for site in layerwise.sites]
        self._checkpoint = checkpoint
        self._store = store
        self._device, self._dtype = layerwise.device, layerwise.dtype
        self._path, self._sites = layerwise.layers_path, layerwise.sites
        self.model: Any = empty_model(checkpoint, layerwise.dtype, trust_remote_code)
        self._loader = WeightLoader(checkpoint, self.model, groups, self._device, self._dtype)
        self._layers: Any = self.model.get_submodule(self._path)

    def run(self, tokens: torch.Tensor, last: int, logits: bool = False) -> torch.Tensor | None:
        """Run the model, and store what each layer returns and what its experts are given.

        Args:
            tokens: int64 ``[texts, sequence_length]``.
            last: the run ends after this layer, unless ``logits`` are wanted.

        Returns:
            the logits, ``[texts, sequence_length, vocabulary]``, if they are wanted.

        Raises:
            QuantizeError: if the model's code fails, or weights are not there.
        """
        self._loader.load(f"{self._path.rpartition('.')[0]}.", but=f"{self._path}.")
        if logits:
            head = self.model.get_output_embeddings()
            for name, module in self.model.named_modules():
                if module is head:
                    self._loader.load(f"{name}.")
            self.model.tie_weights()
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(f"{self._path}."):
                _move_buffers(module, self._device)
        with torch.no_grad(), self._hooks(last, not logits), suppress(StopForward):
            output = call(self.model, tokens.to(self._device), self._checkpoint.folder)
            found: torch.Tensor = output.logits
            return found
        return None

    @contextmanager
    def _hooks(self, last: int, stop: bool) -> Iterator[None]:
        hooks = []
        for number, layer in enumerate(self._layers):
            hooks += [
                layer.register_forward_pre_hook(partial(self._before_layer, number)),
                layer.register_forward_hook(partial(self._after_layer, number, last, stop)),
            ]
        for site in self._sites:
            module = self.model.get_submodule(site.path)
            if (config := getattr(module, "config", None)) is not None:
                config._experts_implementation = "eager"  # the class's own forward
            keep = partial(self._before_experts, site)
            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
            if not _is_small(site.group, self._dtype):
                module.forward = partial(self._one_by_one, site, module)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before_layer(self, number: int, layer: torch.nn.Module, _: Any) -> None:
        self._loader.load(f"{self._path}.{number}.")
        for part in layer.modules():
            _move_buffers(part, self._device)
        for site in self._sites:
            if site.layer == number and _is_small(site.group, self._dtype):
                names = [n for e in range(site.group.num_experts) for n in site.group.tensors_of(e)]
                self._loader.assign({name: self._load(name) for name in dict.fromkeys(names)})
                self._loader.check_loaded(self.model.get_submodule(site.path), f"{site.path}.")

    def _after_layer(
        self, number: int, last: int, stop: bool, layer: torch.nn.Module, _: Any, returned: Any
    ) -> None:
        parts = returned if isinstance(returned, tuple) else (returned,)
        if number <= last:
            self._keep(outputs_name(number), *(p for p in parts if isinstance(p, torch.Tensor)))
        drop_weights(layer)
        if stop and number == last:
            raise StopForward

    def _before_experts(self, site: ExpertSite, module: Any, args: Any, kwargs: Any) -> None:
        x = next(iter(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values()))
        self._keep(inputs_name(site.layer, site.group), x.flatten(0, -2))

    def _keep(self, name: str, *tensors: torch.Tensor) -> None:
        for i, tensor in enumerate(tensors):
            place = self._store.new(f"{name}.{i:03d}", tuple(tensor.shape), tensor.dtype)
            place.copy_(tensor)

    def _one_by_one(
        self,
        site: ExpertSite,
        module: Any,
        hidden_states: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Take the place of the experts' ``forward``: call it for one expert after another."""
        x = hidden_states.flatten(0, -2)
        flat_ids, flat_weights = (part.reshape(len(x), -1) for part in (ids, weights))
        output = torch.zeros_like(x)
        ahead = (1,) * (hidden_states.ndim - 2)
        for expert in flat_ids.unique().tolist():
            self._load_alone(site, module, expert)
            tokens, slots = torch.where(flat_ids == expert)
            own = type(module).forward(
                module,
                x[tokens].view(*ahead, len(tokens), -1),
                flat_ids[tokens, slots].view(-1, 1),
                flat_weights[tokens, slots].view(-1, 1),
            )
            output.index_add_(0, tokens, own.reshape(len(tokens), -1).to(output.dtype))
        return output.view(hidden_states.shape)

    def _load_alone(self, site: ExpertSite, module: Any, expert: int) -> None:
        """Load one expert; the parameters have it in the place of every expert, and take no more
        memory than it does."""
        group = site.group
        tensors = {name: self._load(name, group, expert) for name in group.tensors_of(expert)}
        own = {self._loader.parameter_of(name).rpartition(".")[2] for name in tensors}
        for name in own:
            shape = (1, *module._parameters[name].shape[1:])
            empty = torch.empty(shape, device="meta", dtype=self._dtype)
            module._parameters[name] = torch.nn.Parameter(empty, False)
        self._loader.assign(tensors)
        self._loader.check_loaded(module, f"{site.path}.")
        for name in own:
            one = module._parameters[name]
            whole = one.expand(group.num_experts, *one.shape[1:])
            module._parameters[name] = torch.nn.Parameter(whole, False)

    def _load(
        self, name: str, group: ExpertGroup | None = None, expert: int | None = None
    ) -> torch.Tensor:
        """Read a tensor of experts as an unquantized checkpoint has it; if it holds several
        experts, only ``expert``, with a first dimension of 1."""
        if group is None or expert is None or not group.fused:
            tensor = self._checkpoint.load(name)
        else:
            experts = group.num_experts if group.flat else None
            tensor = self._checkpoint.load_expert(name, expert, experts).unsqueeze(0)
        return tensor


def outputs_name(layer: int) -> str:
    """Return the prefix of the files of what a layer returns."""
    return f"reference-{layer:05d}"


def inputs_name(layer: int, group: ExpertGroup) -> str:
    """Return the prefix of the files of what a layer's experts are given."""
    return f"reference-experts-{layer:05d}-{group.first}"


def _is_small(group: ExpertGroup, dtype: torch.dtype) -> bool:
    return group.parameters * dtype.itemsize <= WHOLE_LAYER


def _move_buffers(module: torch.nn.Module, device: torch.device) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        if not buffer.is_meta:
            module._buffers[name] = buffer.to(device)
