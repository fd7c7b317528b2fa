"""What plain arithmetic gives for the tokens that are judged, in files that doctor's processes
share: computed once for all kernels that round alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from vllm_nvfp4_moe.doctor.cases import (
    Case,
    Weights,
    all_cases,
    judged,
    make_batch,
    make_weights,
    some,
    together,
)
from vllm_nvfp4_moe.doctor.reference import RIGHT, Rounding, outputs
from vllm_nvfp4_moe.doctor.shape import Shape

JUDGED = {"cpu": 16, "cuda": 1024}
"""Tokens of a batch that plain arithmetic computes, by device."""


def reference_file(folder: Path, place: str, rounding: Rounding) -> Path:
    """Where the reference's outputs for a shape are, once they are computed."""
    return folder / f"{place} {''.join(str(int(each)) for each in rounding)}.pt"


def save_reference(
    file: Path, weights: Weights, rounding: Rounding, tokens: Iterable[int], device: torch.device
) -> None:
    """Compute what the judged tokens of all cases should give: all at once, so that each expert's
    weights are expanded once; and once for all kernels that round alike."""
    most = JUDGED[device.type]
    asked = [
        some(make_batch(weights.shape, case, device), judged(case.tokens, most))
        for case in all_cases(tokens)
    ]
    (result,) = outputs(weights, together(asked), rounding, (RIGHT,))
    new = file.with_suffix(".new")
    torch.save(result, new)
    new.replace(file)


def load_reference(
    file: Path, tokens: Iterable[int], device: torch.device
) -> dict[Case, torch.Tensor]:
    """What :func:`save_reference` has computed, by case."""
    result = torch.load(file, map_location=device, weights_only=True)
    cases = all_cases(tokens)
    sizes = [len(judged(case.tokens, JUDGED[device.type])) for case in cases]
    return dict(zip(cases, result.split(sizes), strict=True))


def prepare(
    folder: Path,
    shapes: Mapping[str, Shape],
    tokens: tuple[int, ...],
    device: torch.device,
) -> None:
    """Compute the reference for kernels that do not round, before any kernel's time begins; on a
    GPU, where it is done while others are asked, also for those that Hopper may run."""
    every = [Rounding()]
    if device.type == "cuda":
        every += [Rounding(e4m3=True), Rounding(nvfp4=True, stored=True)]
    for rounding in every:
        for place, shape in shapes.items():
            file = reference_file(folder, place, rounding)
            save_reference(file, make_weights(shape, device), rounding, tokens, device)
