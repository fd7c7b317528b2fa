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


class _Stub(StandIn):
    """Takes a layer's place.

    Attributes:
        answer: makes what it returns.
        given: the tensors that it was given, at each call.
    """

    def __init__(self, original: Any, answer: Callable[[], Any]) -> None:
        super().__init__(original)
        self.answer = answer
        self.given: list[list[torch.Tensor]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given.append([tensor.clone() for tensor in _tensors((args, kwargs))])
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
    generator = torch.Generator().manual_seed(0)
    answers = [tuple(_changed(part, generator) for part in states) for _ in model.layers]
    form_of = layers.start - 1
    true = _run(model, tokens, form_of, lambda number: answers[number])
    name = type(model.model).__name__
    repeated = [number for number, stub in enumerate(true) if len(stub.given) > 1]
    if repeated:
        raise QuantizeError(
            f"{model.folder}: {name} runs layer {repeated[0]} {len(true[repeated[0]].given)} times "
            "for one text; calibration knows models that run each layer once; leave --calibrate out"
        )
    for layer in layers:
        same = answers[layer - 1]
        replayed = _run(model, tokens, form_of, lambda _, same=same: same)  # type: ignore[misc]
        got, want = replayed[layer].given, true[layer].given
        if got and want and not _equal(got[0], want[0]):
            raise QuantizeError(
                f"{model.folder}: layer {layer} of {name} is given more of the layers before it "
                "than the last one's output; calibration runs one layer at a time, on that output; "
                "leave --calibrate out"
            )


def _run(
    model: LayerwiseModel, tokens: torch.Tensor, form_of: int, answer: Callable[[int], States]
) -> list[_Stub]:
    """Run the model with a stub for each layer, which returns its ``answer`` in the form in which
    layer ``form_of`` returns it."""
    originals = list(model.layers)

    def stub(number: int) -> _Stub:
        # Some models change in place what a layer has returned.
        own = answer(number)
        return _Stub(
            originals[number], lambda: model.in_form(form_of, tuple(part.clone() for part in own))
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


def _changed(part: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other numbers of the same kind: integers, such as chosen positions, stay as they are."""
    if not part.is_floating_point():
        return part.clone()
    noise = torch.randn(part.shape, generator=generator, dtype=torch.float32)
    return (part + noise.to(part.device) * part.float().std().clamp_min(1e-6)).to(part.dtype)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return len(got) == len(want) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(got, want, strict=True)
    )
