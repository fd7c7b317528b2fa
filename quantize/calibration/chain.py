"""Whether a layer is given nothing of the layers before it but what the last of them returned.

The layerwise model goes by that: when it runs a layer, all layers before it return that layer's
input (``ReplayLayer``). Where a model mixes what several layers returned (Inkling 2's attention
residuals), or runs layers again in a loop (Inkling 2 Mini), its layers would get other states, and
nothing would say so.

So the model is run twice without any layer's own code. What a layer is given must be the same
whether the layers before it return different things or all the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch

from quantize.calibration.layerwise import LayerwiseModel, States
from quantize.calibration.stand_ins import StandIn
from quantize.errors import QuantizeError

Fingerprint = list[tuple[torch.Size, float, float]]
"""Of several tensors: shapes, sums, and sums with weights by the last dimension. Tensors that are
computed alike have the same ones, to the last bit."""


class _Stub(StandIn):
    """Takes a layer's place.

    Attributes:
        answer: makes what it returns.
        watched: whether to look at what it is given.
        calls: how often it was called.
        given: what it was given at the first call; None if there was none.
    """

    def __init__(self, original: Any, answer: Callable[[], Any], watched: bool) -> None:
        super().__init__(original)
        self.answer = answer
        self.watched = watched
        self.calls = 0
        self.given: Fingerprint | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.watched and self.given is None:
            self.given = [_fingerprint(tensor) for tensor in _tensors((args, kwargs))]
        return self.answer()


def check_chain(model: LayerwiseModel, layers: range, tokens: torch.Tensor, states: States) -> None:
    """See that calibration gives ``layers`` what the model gives them.

    What cannot be seen is passed over: a layer that a run without the layers' own code does not
    reach.

    Args:
        layers: numbers of layers.
        tokens: int64 ``[texts, sequence_length]``.
        states: what the layer before the first of ``layers`` returned for ``tokens``.

    Raises:
        QuantizeError: naming the layer, if what it is given depends on more than the layer before
            it returned, or if the model runs a layer several times.
    """

    def run(answer: Callable[[int], int], watched: range) -> list[_Stub]:
        return _run(model, tokens, layers.start - 1, states, answer, watched)

    true = run(lambda number: number, layers)
    name = type(model.model).__name__
    for number, stub in enumerate(true):
        if stub.calls > 1:
            raise QuantizeError(
                f"{model.folder}: {name} runs layer {number} {stub.calls} times for one text; "
                "calibration knows models that run each layer once; leave --calibrate out"
            )
    for layer in layers:
        replayed = run(lambda _, before=layer - 1: before, range(layer, layer + 1))  # type: ignore[misc]
        got, want = replayed[layer].given, true[layer].given
        if got is not None and want is not None and got != want:
            raise QuantizeError(
                f"{model.folder}: layer {layer} of {name} is given more of the layers before it "
                "than the last one's output; calibration runs one layer at a time, on that output; "
                "leave --calibrate out"
            )


def _run(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    form_of: int,
    states: States,
    answer: Callable[[int], int],
    watched: range,
) -> list[_Stub]:
    """Run the model with a stub for each layer.

    Args:
        form_of: the layer that returned ``states``; stubs return theirs in the same form.
        answer: of each layer's number, which of many different states its stub returns.
    """
    originals = list(model.layers)

    def stub(number: int) -> _Stub:
        which = answer(number)
        # New tensors at each call: some models change in place what a layer has returned.
        return _Stub(
            originals[number],
            lambda: model.in_form(form_of, tuple(_other(part, which) for part in states)),
            number in watched,
        )

    stubs = [stub(number) for number in range(len(originals))]
    for number, each in enumerate(stubs):
        model.layers[number] = each
    try:
        # What comes after the layers may have no weights.
        with torch.no_grad(), suppress(Exception):
            model.call(tokens)
    finally:
        for number, layer in enumerate(originals):
            model.layers[number] = layer
    return stubs


def _other(part: torch.Tensor, which: int) -> torch.Tensor:
    """Other numbers of the same kind, of another size and direction. Integers, such as chosen
    positions, stay as they are."""
    return part.roll(which, -1) * (1 + which / 8) if part.is_floating_point() else part.clone()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _fingerprint(tensor: torch.Tensor) -> tuple[torch.Size, float, float]:
    if tensor.is_complex():  # DeepSeek-V2's positions: without the imaginary part, half of them
        tensor = torch.view_as_real(tensor)
    # Masks have infinities, or a dtype's largest number.
    numbers = tensor.to(torch.float64).nan_to_num().clamp(-1e9, 1e9)
    weights = (
        torch.arange(1, 1 + tensor.shape[-1]).to(numbers) if tensor.ndim else numbers.new_ones(())
    )
    return tensor.shape, float(numbers.sum()), float((numbers * weights).sum())
