"""Modules that take another module's place in a model that runs one layer at a time."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup


class StopForward(Exception):  # noqa: N818  (not an error: the run has what it was started for)
    """Ends the model's forward."""


class StandIn(torch.nn.Module):
    """Takes the place of another module, and has that module's attributes.

    Attributes:
        original: the other module; it is no submodule of this one.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.__dict__["original"] = original

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


class ReplayExperts(StandIn):
    """Takes the place of a layer's routed experts, which are never loaded as a whole.

    It records its arguments. Then it returns what was computed for them elsewhere, one expert at a
    time, or ends the run if nothing was computed yet.

    Attributes:
        group: the experts.
        seen: the arguments of the last call, ``(x, ids, weights)``.
        replay: what the next call is to return; None: it ends the run.
    """

    def __init__(self, original: torch.nn.Module, group: ExpertGroup) -> None:
        super().__init__(original)
        self.group = group
        self.seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.replay: torch.Tensor | None = None

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        bound = inspect.signature(self.original.forward).bind(*args, **kwargs)
        x, ids, weights = bound.arguments.values()
        self.seen = x, ids, weights
        if self.replay is None:
            raise StopForward
        return self.replay.view(x.shape).to(x.device, x.dtype)

    def routed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the last call's arguments, with one row for each token.

        Returns:
            hidden states ``[n, hidden]``, expert numbers int32 ``[n, k]``, and the router's
            weights float32 ``[n, k]``.

        Raises:
            QuantizeError: if the model passes something else.
        """
        assert self.seen is not None
        x, ids, weights = self.seen
        if ids.is_floating_point() or ids.shape != weights.shape:
            raise QuantizeError(
                f"{self.group.prefix}: its experts are given {tuple(ids.shape)} {ids.dtype} and "
                f"{tuple(weights.shape)}; calibration knows expert numbers and as many weights"
            )
        k = ids.shape[-1]
        return x.flatten(0, -2), ids.reshape(-1, k).int(), weights.reshape(-1, k).float()


class LayerInput:
    """The current layer's input.

    Attributes:
        value: what the layer before the current one returns.
    """

    value: Any = None


class ReplayLayer(StandIn):
    """Takes the place of a layer before the current one, and returns the current one's input."""

    def __init__(self, original: torch.nn.Module, layer_input: LayerInput) -> None:
        super().__init__(original)
        self.layer_input = layer_input

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.layer_input.value


class CaptureLayer(StandIn):
    """Takes the place of the current layer: keeps what it returns, and ends the run.

    Attributes:
        returned: what the layer returned; None if the run did not reach its end.
    """

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__(original)
        self.returned: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.returned = self.original(*args, **kwargs)
        raise StopForward
