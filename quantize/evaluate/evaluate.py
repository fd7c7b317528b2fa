"""The pass: both models side by side, a layer at a time.

Memory holds what one layer of one model takes without its experts, one expert, and the embedding
and head, once where both models have the same. States of all tokens before and after one layer lie
on the disk, of both models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from rich.filesize import decimal

from quantize.calibration.budget import state_size
from quantize.calibration.progress import Progress as Advance
from quantize.calibration.proof import prove_pass
from quantize.calibration.samples import digest_of
from quantize.checkpoint.identity import identity_of
from quantize.checkpoint.kv_cache import is_cache_scale
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.evaluate.activations import BF16, NVFP4, check_has_scales, stated, visitor_of
from quantize.evaluate.agreement import check_same_model, differences
from quantize.evaluate.depth import Depth, distance
from quantize.evaluate.predictions import figures_of, row_of
from quantize.evaluate.result import Result
from quantize.evaluate.side import Side, in_own_words, share
from quantize.evaluate.work import Progress, fingerprint, work_folder
from quantize.experts.gates import Gate
from quantize.experts.group import tensor_names_of
from quantize.run.space import free
from quantize.run.version import VERSIONS, package_version

Say = Callable[[str], None]
"""Is told, in one line, what a user should know."""

PRECISION = torch.float32
"""In bf16, a few tokens go to other experts by rounding alone, and that would count as loss. On
GPUs too: an evaluation takes the time that it takes to read the weights."""


def evaluate(
    source: Checkpoint,
    target: Checkpoint,
    samples: torch.Tensor,
    *,
    text: str = "",
    activations: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = PRECISION,
    gate: Gate | None = None,
    trust_remote_code: bool = False,
    work_dir: Path | None = None,
    resume: bool = False,
    beside: Path | None = None,
    progress: Advance = lambda *_: None,
    say: Say = lambda _: None,
) -> Result:
    """Compare what ``target`` predicts with what ``source`` does.

    Either may be stored in any format that ``quantize.checkpoint.sources`` reads. The source runs
    as floats; of the target, what goes into the products of quantized experts is rounded.

    Args:
        samples: tokens, int64 ``[num_samples, sequence_length]``, see
            ``quantize.evaluate.agreement.tokens_of``.
        text: where they are from, for the result.
        activations: how they are rounded, see ``quantize.evaluate.activations``; by default what
            the target says.
        device: what computes; by default the CPU.
        gate: of both, if the user states it.
        work_dir: where states are kept so that ``resume`` can go on; by default they go at the end.
        beside: without ``work_dir``, a temporary folder for states is made in this one; by default
            where the system has its own.
        progress: see ``quantize.calibration.progress.Progress``. A step is a layer of both models,
            or all predictions.
        say: is told what is said before the hours begin.

    Raises:
        QuantizeError: if they are not two versions of one model, one cannot be run, or there is
            too little disk for hidden states.
    """
    started = time.perf_counter()
    device = device or torch.device("cpu")
    with in_own_words():
        first = Side(source, device, dtype, gate, trust_remote_code)
        second = Side(target, device, dtype, gate, trust_remote_code)
        check_same_model(first, second)
        if activations == NVFP4:
            check_has_scales(target, second.groups)
        chosen = activations or stated(target, second.groups)
        notes = (*differences(first, second), *_ignored(second, chosen))
        for note in notes:
            say(note)
        nbytes = _states(first, samples)
        say(
            f"Evaluation: {samples.shape[0]} rows of {samples.shape[1]} tokens, {decimal(nbytes)} "
            "of hidden states on disk until it ends"
        )
        share(first, second)
        mark = ""
        if work_dir is not None:
            mark = fingerprint(
                *map(identity_of, (source, target)), digest_of(samples), samples.shape, chosen,
                dtype, device.type, gate, package_version(), [version(name) for name in VERSIONS],
            )  # fmt: skip
        with work_folder(work_dir, beside, mark, resume) as folder:
            _check_disk(folder, nbytes)
            state = Progress(folder)
            if not state.begun and not any(map(source.is_nvfp4, tensor_names_of(first.groups))):
                prove_pass(
                    source, first.gates, first.model, samples, folder / "proof",
                    trust_remote_code, logits=True, what="Evaluation", say=say,
                )  # fmt: skip
            first.begin(samples, state.store("source"), visitor_of(BF16, source))
            second.begin(samples, state.store("target"), visitor_of(chosen, target))
            state.resume((first, second))
            earlier = state.seconds
            _run(first, second, samples, state, progress, started)
    return Result(
        source.folder,
        target.folder,
        text,
        digest_of(samples),
        len(samples),
        samples.shape[1],
        chosen,
        figures_of(state.rows),
        state.depth,
        notes,
        earlier + time.perf_counter() - started,
        device,
        dtype,
    )


def _run(
    first: Side,
    second: Side,
    tokens: torch.Tensor,
    state: Progress,
    progress: Advance,
    started: float,
) -> None:
    """All layers and then the predictions, from where ``state`` is."""
    sides = first, second
    layers = len(first.model.layers)
    with_experts = {site.layer for site in first.model.sites}

    def seconds() -> float:
        return state.seconds + time.perf_counter() - started

    for layer in range(len(state.depth), layers):
        progress(layer, layers + 1, f"layer {layer}")
        begun = time.perf_counter()
        for number, side in enumerate(sides):

            def report(part: float, what: str, number: int = number, layer: int = layer) -> None:
                where = f"layer {layer} of {('SRC', 'DST')[number]}, {what}"
                progress(layer + (number + part) / 2, layers + 1, where)

            side.layer_forward(layer, report)
        found = distance(*(side.hidden_states(layer + 1) for side in sides))
        took = time.perf_counter() - begun
        state.depth.append(Depth(layer, layer in with_experts, *found, took))
        state.write(sides, seconds())
        for side in sides:
            side.remove_states(layer)
    with first.end.loaded(), second.end.loaded(), torch.no_grad():
        share(first, second)
        for row in range(len(state.rows), len(tokens)):
            where = f"predictions, row {row + 1} of {len(tokens)}"
            progress(layers + row / len(tokens), layers + 1, where)
            state.rows.append(row_of(first, second, tokens, row))
            state.write(sides, seconds())
    progress(layers + 1, layers + 1, "done")


def _ignored(side: Side, activations: str) -> Iterator[str]:
    """Notes about what an engine may round in the target, and this does not."""
    experts = tensor_names_of(side.groups)
    checkpoint = side.checkpoint
    if any(map(is_cache_scale, checkpoint.stored)):
        yield "The scales of an FP8 key-value cache are ignored: keys and values are not rounded."
    linears = [
        name
        for name in checkpoint.tensors
        if name not in experts and len(checkpoint.parts(name)) > 1
    ]
    if linears and activations != BF16:
        yield (
            f"{len(linears)} quantized linears beside the experts: their weights are what the "
            "files hold, and what goes into them is not rounded."
        )


def _states(side: Side, tokens: torch.Tensor) -> int:
    """Bytes of hidden states that are on the disk at once, at most."""
    # In both models a layer's input and output; in one its experts' input, output and routing.
    group = max(side.groups, key=lambda each: each.hidden)
    wide = state_size(side.checkpoint, group.hidden)
    numbers = tokens.numel() * (4 * wide + 2 * max(wide, group.hidden))
    return numbers * side.model.dtype.itemsize


def _check_disk(folder: Path, nbytes: int) -> None:
    """See that there is room for the states, of which an interrupted run has left some.

    Raises:
        QuantizeError: if there is not.
    """
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if (left := free(folder) + there) < nbytes:
        raise QuantizeError(
            f"{folder}: {decimal(left)} free, and hidden states need {decimal(nbytes)}; give "
            "another disk with --work-dir, or take fewer --samples or a shorter --length"
        )
