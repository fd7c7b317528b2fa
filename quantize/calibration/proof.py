"""The proof that a calibration's passes compute what the model computes, before hours are spent.

The first texts go through Transformers' own model in one go (``quantize.calibration.reference``),
then through the layerwise pass. What each layer returns, and what its experts are given, must
agree. Both compute in float32 on any device, where rounding is far below what is looked for.

A small model is compared to its end. Of a large one, the first layers are, so far that two of them
have experts and each kind of layer has come. For the rest, ``quantize.calibration.chain`` sees that
layers are given what the layer before them returned, and nothing else.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantize.calibration.chain import check_chain
from quantize.calibration.damaged import damaged
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.forward import TOKENS_PER_RUN, LayerwiseForward
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.model_end import ModelEnd
from quantize.calibration.reference import Reference, inputs_name, outputs_name
from quantize.calibration.routing import Routing
from quantize.calibration.store import Store, states_name
from quantize.calibration.visitor import NullVisitor
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import Gates
from quantize.experts.group import ExpertGroup
from quantize.nvfp4.rounding import METHODS

if TYPE_CHECKING:
    from quantize.run.plan import Plan

Say = Callable[[str], None]
"""Is told in one line what was found."""

PRECISION = torch.float32
TEXTS = 2
SMALL_MODEL = 64e9
"""A checkpoint of at most so many bytes is compared to its end: it is read twice more."""
NEAR, FEW = 1e-3, 0.01
"""In the first layers, at most the share FEW of tokens differs by more than NEAR of its norm: those
between two experts, where rounding decides."""
FAR = 1e-2
"""Further on, such tokens become more; the median token differs by at most FAR."""


def prove(
    checkpoint: Checkpoint,
    plan: Plan,
    samples: torch.Tensor,
    folder: Path,
    device: torch.device,
    say: Say = lambda _: None,
) -> None:
    """Compare the forward pass of a plan's calibration with Transformers' own model.

    Args:
        samples, folder, say: see :func:`prove_pass`.

    Raises:
        QuantizeError: see :func:`prove_pass`.
    """
    settings = plan.options.calibration
    assert settings is not None
    method = METHODS[settings.method] if settings.method is not None else None
    trust = plan.options.trust_remote_code
    logits = method is not None and method.needs_output_hessian
    model = LayerwiseModel(checkpoint, plan.found, device, PRECISION, trust)
    prove_pass(checkpoint, plan.gates, model, samples, folder, trust, logits=logits, say=say)


def prove_pass(
    checkpoint: Checkpoint,
    gates: Gates,
    model: LayerwiseModel,
    samples: torch.Tensor,
    folder: Path,
    trust_remote_code: bool = False,
    *,
    logits: bool,
    what: str = "Calibration",
    say: Say = lambda _: None,
) -> None:
    """Compare the forward pass with Transformers' own model on the first of ``samples``.

    Args:
        model: what goes through it is compared; in float32 or better.
        samples: tokens, int64 ``[num_samples, sequence_length]``.
        folder: is made for states, and removed.
        logits: whether the model makes them, and they are needed: a small model's are compared.
        what: goes through the model, for what is said.

    Raises:
        QuantizeError: if they disagree, naming the layer; or if either cannot be run.
    """
    started = time.perf_counter()
    texts = samples[: number_of_texts(samples.shape[1])]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        store = Store(folder)
        first = first_layers(model)
        small = checkpoint.nbytes <= SMALL_MODEL
        last = model.last if small else first
        to_the_end = small and logits
        reference = Reference(checkpoint, model, store, trust_remote_code)
        truth = reference.run(texts, last, to_the_end)
        del reference
        run = LayerwiseForward(checkpoint, gates, model, texts, store)
        inputs = _Inputs(model, store, first)
        worst = 0.0
        for layer in range(last + 1):
            run.layer_forward(layer, inputs)
            got = store.open_all(states_name(layer + 1))
            want = store.open_all(outputs_name(layer))
            worst = max(worst, _compare(model, layer, got, want, layer <= first, inputs.agreed))
            run.remove_states(layer)
        if last < model.last:
            states = tuple(part[:1] for part in store.open_all(states_name(last + 1)))
            check_chain(model, range(last + 1, model.last + 1), texts[:1], states)
        if truth is not None:
            end = ModelEnd(model)
            with end.loaded(), torch.no_grad():
                states = tuple(store.open_all(states_name(last + 1)))
                error = _error(end.logits(texts, states).cpu(), truth.cpu())
            if not float(error.median()) <= FAR:
                raise QuantizeError(
                    _disagreement(model, "the model's end", "makes other logits", error)
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(
        f"{what} agrees with Transformers' own model: {len(texts)} texts, {last + 1} of "
        f"{len(model.layers)} layers, median error at most {worst:.1e} "
        f"({time.perf_counter() - started:.0f} s)"
    )


def number_of_texts(length: int) -> int:
    """Return how many texts of so many tokens are compared."""
    return max(1, min(TEXTS, TOKENS_PER_RUN // length))


def first_layers(model: LayerwiseModel) -> int:
    """Return the last of the layers that are compared closely, and of large models alone."""
    types = getattr(model.model.config.get_text_config(), "layer_types", None) or []
    kinds = [
        ({type(part).__name__ for part in layer.modules()}, types[n] if n < len(types) else "")
        for n, layer in enumerate(model.layers)
    ][: model.last + 1]
    new = [n for n, kind in enumerate(kinds) if kind not in kinds[:n]]
    with_experts = sorted({site.layer for site in model.sites})[:2]
    return min(model.last, max(1, *new, *with_experts))


class _Inputs(NullVisitor):
    """Compares what experts are given.

    Attributes:
        agreed: the layers whose experts' inputs agreed.
    """

    def __init__(self, model: LayerwiseModel, store: Store, first: int) -> None:
        self._model, self._store, self._first = model, store, first
        self.agreed: set[int] = set()
        self._group: ExpertGroup | None = None

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        self._group = group
        (want,) = self._store.open_all(inputs_name(layer, group))
        error = _error(routing.x, want)
        if not _is_near(error, layer <= self._first):
            raise QuantizeError(
                _disagreement(
                    self._model, f"layer {layer}", "gives its experts other states", error
                )
            )
        self.agreed.add(layer)

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        assert self._group is not None
        for weight in (*weights.gate_up, weights.down):
            if not torch.isfinite(weight).all():
                raise damaged(self._model.checkpoint, self._group, number)
        return weights


def _compare(
    model: LayerwiseModel,
    layer: int,
    got: list[torch.Tensor],
    want: list[torch.Tensor],
    close: bool,
    agreed: set[int],
) -> float:
    """Compare what a layer returns, and return the median error."""
    worst = 0.0
    known = ""
    if layer in agreed:
        known = " Its experts are given the same, so they compute something else than their gate."
    for ours, theirs in zip(got, want, strict=True):
        if not theirs.is_floating_point():
            continue
        error = _error(ours, theirs)
        if not _is_near(error, close):
            raise QuantizeError(
                _disagreement(model, f"layer {layer}", "returns other states", error, known)
            )
        worst = max(worst, float(error.median()))
    return worst


def _error(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return for each token ``norm(got - want) / norm(want)``; infinite if shapes differ."""
    if got.shape != want.shape:
        return torch.tensor([torch.inf])
    got, want = (part.reshape(-1, part.shape[-1]).double() for part in (got, want))
    return (got - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)


def _is_near(error: torch.Tensor, close: bool) -> bool:
    if close:
        return bool((error > NEAR).double().mean() <= FEW) and not bool(error.isnan().any())
    return bool(error.median() <= FAR)


def _disagreement(
    model: LayerwiseModel, where: str, what: str, error: torch.Tensor, known: str = ""
) -> str:
    return (
        f"{model.folder}: {where} of {type(model.model).__name__} {what} in calibration than in "
        f"Transformers' own run of the model: {float(error.median()):.2g} of their norm at the "
        f"median token, {float(error.max()):.2g} at most, more than {NEAR:g} at "
        f"{float((error > NEAR).double().mean()):.0%} of tokens.{known} So calibration does not "
        "know this model yet; leave --calibrate out, and report this"
    )
