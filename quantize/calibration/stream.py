"""A model of which one decoder layer at a time has weights, run over rows of tokens.

The model's own ``forward`` runs each time, so every layer gets just the masks, positions and
whatever else its class makes; layers before the current one are stand-ins that hand on what that
one is to be given, and the run ends with what it returns. The routed experts are never loaded: in
their place is :class:`Routed`, which takes down what they are given, and later gives back what
somebody else has computed, one expert at a time (``quantize.calibration.walk``).

Weights are read by Transformers' own conversion rules, so a checkpoint may have the names that
``from_pretrained`` knows.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
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
from quantize.errors import QuantizeError, first_line
from quantize.experts.group import ExpertGroup, source_names
from quantize.experts.model import build, config_of, offline, parameters_on_meta

Returned = tuple[torch.Tensor, ...]
"""What a layer returns, all of it that is not None."""

_PRECISE = torch.float32
_PREFIXES = ("", "language_model.")


class Finished(Exception):  # noqa: N818  (not an error: a run has what it was started for)
    """Ends a model's forward."""


class Instead(torch.nn.Module):
    """Stands for another module in a model, with that one's attributes."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


class Routed(Instead):
    """Stands for a layer's routed experts.

    Attributes:
        group: which they are.
        seen: what they were given, ``(x, ids, weights)``.
        replay: what they are to return; None: the run ends here.
    """

    def __init__(self, original: torch.nn.Module, group: ExpertGroup) -> None:
        super().__init__(original)
        self.group = group
        self.seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.replay: torch.Tensor | None = None

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        bound = inspect.signature(self.__dict__["original"].forward).bind(*args, **kwargs)
        x, ids, weights = bound.arguments.values()
        self.seen = x, ids, weights
        if self.replay is None:
            raise Finished
        return self.replay.view(x.shape).to(x.device, x.dtype)


class _Given(Instead):
    """A layer before the current one: returns the current one's input."""

    def __init__(self, original: torch.nn.Module, stream: Stream) -> None:
        super().__init__(original)
        self.__dict__["stream"] = stream

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.stream.given


class _NoEmbedding(Instead):
    """The embedding once the first layer has been run: nobody looks at what it returns."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.__dict__["original"].weight
        return torch.zeros(*ids.shape, weight.shape[1], device=ids.device, dtype=weight.dtype)


class _Last(Instead):
    """The current layer: nothing after it runs."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__(original)
        self.returned: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.returned = self.__dict__["original"](*args, **kwargs)
        raise Finished


class Stream:
    """See the module's docstring.

    Args:
        groups: the routed experts that are not to be loaded.
        dtype: to compute in.

    Attributes:
        device, dtype: as given.
        last: the last one that has experts.
        given: what the layer before the current one returned.
        forms: of what each layer returns, by its number: None for a tensor; of a tuple, which
            elements are not None. A run that goes on with another's states needs that one's.

    Raises:
        QuantizeError: if Transformers does not know the model, or its experts are not called as
            they must be: ``(hidden_states, expert numbers, weights)``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: list[ExpertGroup],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        where = checkpoint.folder / "config.json"
        try:
            config = config_of(checkpoint.folder, trust_remote_code)
            for part in (config, config.get_text_config()):
                # A config may ask for what training needs; stand-ins have no routers.
                if getattr(part, "output_router_logits", False):
                    part.output_router_logits = False
                if not getattr(part, "return_dict", True):
                    part.return_dict = True
        except Exception as error:  # Transformers raises many kinds here
            raise QuantizeError(
                f"{where}: calibration runs the model, and Transformers does not know it "
                f"({first_line(error)}); leave --calibrate out"
            ) from error

        def place() -> ExitStack:
            stack = ExitStack()
            stack.enter_context(parameters_on_meta())
            stack.enter_context(_default_dtype(dtype))
            return stack

        with nullcontext() if trust_remote_code else offline():
            try:  # the faster one, if the class has it
                self.model: Any = build(config, trust_remote_code, place, "sdpa")
            except QuantizeError:
                self.model = build(config, trust_remote_code, place)
        self.model.eval()
        # What must stay float32 beside bf16, in engines too: routers would choose other experts.
        self._dtypes = self.model._get_dtype_plan(dtype)
        if dtype.itemsize < _PRECISE.itemsize:
            self._dtypes |= {"e_score_correction_bias": _PRECISE}
        # By Transformers' rules; each use of them leaves traces in the objects.
        self._rules = get_model_conversion_mapping(self.model)
        self._renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        self._shapes = self.model.state_dict()
        # A multimodal model's language model may be stored alone, as vLLM reads it.
        self._prefix = next(
            (p for p in _PREFIXES if groups and self._target(p + groups[0].sources[0])), ""
        )
        self._owners = self._by_target(checkpoint.tensors.keys() - source_names(groups))
        self.layers_path, self._sites = self._find_experts(groups)
        self.layers: Any = self.model.get_submodule(self.layers_path)
        self.last = max(number for number, _, _ in self._sites)
        self.given: Any = None
        self.forms: dict[int, list[bool] | None] = {}
        above = self.layers_path.rpartition(".")[0]
        self._decoder: Any = self.model.get_submodule(above)
        self._load_beside()
        for path, module in self._decoder.named_modules():  # rotary frequencies, for example
            if not f"{path}.".startswith("layers."):
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.device.type != "meta":
                        module._buffers[name] = buffer.to(device)

    def layer_of(self, group: ExpertGroup) -> int:
        """The number of the layer that the experts are in."""
        return next(number for number, _, other in self._sites if other == group)

    @contextmanager
    def at(self, layer: int) -> Iterator[list[Routed]]:
        """Within, ``layer`` has its weights, and :meth:`run` runs it; yields its experts."""
        path = f"{self.layers_path}.{layer}."
        current = self._original(layer)
        self._load(path)
        self._give_before(layer)
        places = []
        for number, site, group in self._sites:
            if number == layer:
                parent, _, name = site.rpartition(".")
                owner = self.model.get_submodule(parent)
                places.append((owner, name, Routed(getattr(owner, name), group)))
        for place in places:
            setattr(*place)
        self._check_loaded(current, path)
        self.layers[layer] = last = _Last(current.to(self.device))
        self._last = last
        try:
            yield [stand_in for _, _, stand_in in places]
        finally:
            for owner, name, stand_in in places:
                setattr(owner, name, stand_in.__dict__["original"])
            self.layers[layer] = _Given(_without_weights(current), self)

    @contextmanager
    def end(self) -> Iterator[None]:
        """Within, what comes after the last layer with experts has its weights, and :meth:`logits`
        runs it; see :meth:`check_end`."""
        self._give_before(self.last + 1)
        parts = {f"{self.layers_path}.{n}.": self.layers[n] for n in self._after()}
        parts |= {f"{name}.": module for name, module in self._heads()}
        if any(name not in self._owners for name in self._head_parameters()):
            self._restore_embedding()  # it is the head, too
        for path in parts:
            self._load(path)
        if any(
            tensor.is_meta for _, head in self._heads() for tensor in head.state_dict().values()
        ):
            self.model.tie_weights()
        for path, module in parts.items():
            self._check_loaded(module, path)
            module.to(self.device)
        try:
            yield
        finally:
            for module in parts.values():
                _without_weights(module)

    def check_end(self) -> None:
        """See that :meth:`end` will find what it needs.

        Raises:
            QuantizeError: if the model's class makes no logits, the checkpoint has no weights for
                them, or a layer has two groups of experts.
        """
        heads = self._heads()
        if not heads:
            raise QuantizeError(
                f"{self._checkpoint.folder}: {type(self.model).__name__} makes no logits, and "
                "--rounding two-sided needs them; take another rounding"
            )
        tied = getattr(self.model.config.get_text_config(), "tie_word_embeddings", False)
        for name in () if tied else self._head_parameters():
            if name not in self._owners:
                raise QuantizeError(
                    f"{self._checkpoint.folder}: {name} is not there, and --rounding two-sided "
                    "needs the model's logits; take another rounding"
                )
        numbers = [number for number, _, _ in self._sites]
        for number, _, group in self._sites:
            if numbers.count(number) > 1:
                raise QuantizeError(
                    f"{group.prefix}: its layer has another group of experts, and --rounding "
                    "two-sided knows layers with one; take another rounding"
                )

    def logits(self, tokens: torch.Tensor, given: Returned) -> torch.Tensor:
        """The model's logits ``[rows, length, vocabulary]``, from what :meth:`run` takes, of the
        last layer with experts."""
        self._give(given)
        found: torch.Tensor = self._call(tokens, lambda output: output.logits)
        return found

    def run(self, tokens: torch.Tensor, given: Returned | None) -> Returned | None:
        """One run of the current layer.

        Args:
            tokens: int64 ``[rows, length]``.
            given: what the layer before returned for them; None for the first layer.

        Returns:
            what the layer returns, tensors ``[rows, ...]``; None if the run ended in its experts.

        Raises:
            QuantizeError: if the model's code fails, or a layer returns something else.
        """
        if given is not None:
            self._give(given)
        self._last.returned = None
        with suppress(Finished):
            self._call(tokens)
        returned = self._last.returned
        if returned is None:
            return None
        whole = returned if isinstance(returned, tuple) else (returned,)
        form = None if whole is not returned else [part is not None for part in returned]
        self.forms[self._number] = form
        found = [part for part in whole if part is not None]
        for part in found:
            if not isinstance(part, torch.Tensor) or len(part) != len(tokens):
                raise QuantizeError(
                    f"{self._checkpoint.folder}: layers of {type(self.model).__name__} return "
                    f"{type(part).__name__}; calibration knows tensors with a row for each text; "
                    "leave --calibrate out"
                )
        return tuple(found)

    def forget(self) -> None:
        """Drop what the last run was given and returned, and its graph with it."""
        self.given = self._last.returned = None

    def _give(self, given: Returned) -> None:
        parts = iter(part.to(self.device) for part in given)
        form = self.forms[self._number - 1]
        if form is None:
            self.given = next(parts)
        else:
            self.given = tuple(next(parts) if there else None for there in form)

    def _call(self, tokens: torch.Tensor, part: Callable[[Any], Any] = lambda all_: all_) -> Any:
        try:
            return part(self.model(input_ids=tokens.to(self.device), use_cache=False))
        except (Finished, QuantizeError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any code may be in there
            raise QuantizeError(
                f"{self._checkpoint.folder}: Transformers' {type(self.model).__name__} fails on "
                f"text ({type(error).__name__}: {first_line(error)}), and calibration runs it; "
                "leave --calibrate out"
            ) from error

    def _give_before(self, layer: int) -> None:
        """``layer`` is the current one: those before it hand on what it is to be given."""
        self._number = layer
        for number in range(layer):
            if not isinstance(self.layers[number], _Given):
                self.layers[number] = _Given(self.layers[number], self)
        if layer:
            self._drop_embedding()
        else:
            self._restore_embedding()

    def _original(self, layer: int) -> torch.nn.Module:
        """The model's own layer, where it belongs."""
        found = self.layers[layer]
        if isinstance(found, _Given):
            found = self.layers[layer] = found.__dict__["original"]
        return found

    def _heads(self) -> list[tuple[str, torch.nn.Module]]:
        """What makes logits, with its name; none or one."""
        head = self.model.get_output_embeddings()
        return [(name, part) for name, part in self.model.named_modules() if part is head]

    def _head_parameters(self) -> list[str]:
        return [f"{name}.{own}" for name, head in self._heads() for own in head.state_dict()]

    def _after(self) -> range:
        return range(self.last + 1, len(self.layers))

    def _load_beside(self) -> None:
        """Embeddings and whatever else the decoder has besides its layers."""
        above = self.layers_path.rpartition(".")[0]
        self._load(f"{above}.", but=f"{self.layers_path}.")

    def _drop_embedding(self) -> None:
        with suppress(NotImplementedError):  # then it stays
            embedding = self._decoder.get_input_embeddings()
            if not isinstance(embedding, _NoEmbedding):
                self._decoder.set_input_embeddings(_NoEmbedding(_without_weights(embedding)))

    def _restore_embedding(self) -> None:
        with suppress(NotImplementedError):
            embedding = self._decoder.get_input_embeddings()
            if isinstance(embedding, _NoEmbedding):
                self._decoder.set_input_embeddings(embedding.__dict__["original"])
                self._load_beside()

    def _by_target(self, names: Any) -> dict[str, list[str]]:
        """Tensors of the checkpoint by the model's parameter that they become, or go into."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names):
            if target := self._target(self._prefix + name):
                found[target].append(name)
        return found

    def _target(self, name: str) -> str:
        """The model's parameter that a tensor becomes, or the first of them; empty if none."""
        prefix = self.model.base_model_prefix
        target, _ = rename_source_key(name, self._renamings, self._converters, prefix, self._shapes)
        if target in self._shapes:
            return str(target)
        return name if name in self._shapes else ""

    def _find_experts(
        self, groups: list[ExpertGroup]
    ) -> tuple[str, list[tuple[int, str, ExpertGroup]]]:
        layers, sites = "", []
        for group in groups:
            site = self._target(self._prefix + group.sources[0]).rpartition(".")[0]
            try:
                module = self.model.get_submodule(site)
                list_path, number = re.findall(r"(.*?\.?layers)\.([0-9]+)\.", f"{site}.")[0]
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
            sites.append((int(number), site, group))
        return layers, sites

    def _load(self, path: str, but: str = "\0") -> None:
        """Give weights to the parameters whose names begin with ``path``, and not with ``but``."""
        state = {
            self._prefix + name: self._checkpoint.load(name)
            for target, names in self._owners.items()
            if target.startswith(path) and not target.startswith(but)
            for name in names
        }
        config = LoadStateDictConfig(
            weight_mapping=copy.deepcopy(self._rules),
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self._dtypes,
        )
        with _quiet():
            convert_and_load_state_dict_in_model(self.model, state, config)
        self.model.requires_grad_(False)

    def _check_loaded(self, layer: torch.nn.Module, path: str) -> None:
        for name, tensor in layer.state_dict().items():
            if tensor.device.type == "meta":
                raise QuantizeError(
                    f"{self._checkpoint.folder}: {path}{name} is not there, though the model's "
                    f"class, {type(self.model).__name__}, has it; calibration cannot run the model"
                )


def _without_weights(module: torch.nn.Module) -> torch.nn.Module:
    """``module``, its parameters on the meta device. Buffers stay: not all of them can be loaded
    again (rotary frequencies, for example), and they are small."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.to("meta"), False)
    return module


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' progress bars, one for each layer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
