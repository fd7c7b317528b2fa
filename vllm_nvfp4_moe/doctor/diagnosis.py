"""Names what a kernel does wrong: the fault of those that are known with which plain arithmetic
gives what the kernel gave."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from vllm_nvfp4_moe.doctor.cases import Weights, some
from vllm_nvfp4_moe.doctor.inputs import Batch
from vllm_nvfp4_moe.doctor.reference import RIGHT, Expert, Rounding, experts_of, faults, outputs
from vllm_nvfp4_moe.doctor.scan import noise_of, outstanding, wrong_scale
from vllm_nvfp4_moe.self_check import Error, error_of

_FEW, _FEWER = 48, 8
"""Tokens that suffice to tell faults apart: those whose errors are largest. The second, where all
their experts' weights are held in floats."""
_PLACES = 4
"""That are looked at where errors stand out: experts that share tokens share errors."""
_LEFT = 0.5
"""Of the errors, what may be left of them where factors of so few tokens' experts explain them: a
little less is left by any, and is enough where an error is just beyond the bound."""
_OFF = 0.05
"""A factor that is nearer to 1 than this is 1."""


@dataclass(frozen=True)
class Judge:
    """What is known of a kernel.

    Attributes:
        rounding: how it rounds activations.
        bound: the largest errors that are roundings.
    """

    weights: Weights
    rounding: Rounding
    bound: Error

    def right(self, out: torch.Tensor, truth: torch.Tensor) -> bool:
        """Whether ``out`` is ``truth`` but for roundings; NaN is not."""
        error = error_of(out, truth)
        return error.token <= self.bound.token and error.value <= self.bound.value


def named(judge: Judge, given: Batch, out: torch.Tensor) -> str | None:
    """The fault that gives ``out``, in words; None if it is none of those that are known, or a
    single block scale (:func:`single_scale`).

    Args:
        given: the tokens that were judged, with the router's weights as plain arithmetic has them.
        out: what the kernel gave, float32 ``[tokens, hidden]``.
    """
    if not bool(out.isfinite().all()):
        return f"NaN or infinity in {int((~out.isfinite()).any(1).sum())} of {len(out)} tokens"
    if not bool(out.any()):
        return "zeros alone"
    (truth,) = outputs(judge.weights, given, judge.rounding)
    size = truth.norm(dim=1).clamp_min(1e-30)
    worst = ((out - truth).norm(dim=1) / size).argsort(descending=True)
    given, out = some(given, worst[:_FEW]), out[worst[:_FEW]]
    candidates = [RIGHT, *faults(judge.weights, judge.rounding)]
    results = outputs(judge.weights, given, judge.rounding, candidates)
    errors = [float((out - result).norm()) for result in results]
    nearest = min(range(len(errors)), key=errors.__getitem__)
    if nearest and judge.right(out, results[nearest]):
        return candidates[nearest].name
    few = slice(_FEWER)
    at = torch.arange(len(out))[few]
    return _factors(judge, some(given, at), out[few], results[0][few])


def single_scale(judge: Judge, given: Batch, out: torch.Tensor, truth: torch.Tensor) -> str | None:
    """The one block scale that is wrong, in words; None if none stands out of the roundings."""
    error, noise = out - truth, noise_of(out - truth, truth)
    places = outstanding(judge.weights, given, judge.rounding, error, noise)[:_PLACES]
    found = [
        wrong_scale(judge.weights, given, judge.rounding, error, noise, place) for place in places
    ]
    explained = [each for each in found if each is not None]
    return str(min(explained, key=lambda pair: pair[0])[1]) if explained else None


def _factors(judge: Judge, given: Batch, out: torch.Tensor, truth: torch.Tensor) -> str | None:
    """Global scales that are wrong, by expert, if those of one of both matrices explain ``out``."""
    experts = list(experts_of(judge.weights, given, judge.rounding))
    for matrix, fit in (("w2", _fit_w2), ("w13", _fit_w13)):
        found, result = fit(experts, given, out, truth)
        wrong = {number: f for number, f in found.items() if abs(f - 1) > _OFF}
        explained = float((out - result).norm()) < _LEFT * float((out - truth).norm())
        if wrong and explained and judge.right(out, result):
            return _told(matrix, wrong, len(found))
    return None


def _told(matrix: str, wrong: dict[int, float], experts: int) -> str:
    rounded = Counter(float(f"{factor:.2g}") for factor in wrong.values())
    factor, times = rounded.most_common(1)[0]
    if times == experts:
        return f"{matrix}'s global scales of all experts count {factor:g} times"
    listed = [f"{f:.3g} times for expert {number}" for number, f in sorted(wrong.items())]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return f"{matrix}'s global scale counts {', '.join(listed[:4])}{more}"


def _fit_w2(
    experts: list[Expert], given: Batch, out: torch.Tensor, truth: torch.Tensor
) -> tuple[dict[int, float], torch.Tensor]:
    """Each expert's factor with which their sum is nearest to ``out``, and that sum."""
    parts = []
    for expert in experts:
        part = torch.zeros_like(truth)
        middle = expert.gate.apply_stacked(expert.pre())
        part.index_add_(0, expert.token, expert.output(middle) * expert.factor)
        parts.append(part)
    gram = torch.tensor([[float((a * b).sum()) for b in parts] for a in parts])
    seen = torch.tensor([float((part * out).sum()) for part in parts])
    factors = torch.linalg.lstsq(gram.double(), seen.double().unsqueeze(1)).solution.flatten()
    fitted = {e.number: float(f) for e, f in zip(experts, factors, strict=True)}
    return fitted, sum((f * p for f, p in zip(fitted.values(), parts, strict=True)), truth * 0)


def _fit_w13(
    experts: list[Expert], given: Batch, out: torch.Tensor, truth: torch.Tensor
) -> tuple[dict[int, float], torch.Tensor]:
    """The same for factors of what goes into the gate: one expert after the other, twice."""
    grid = [2.0**k for k in range(-10, 11)]
    fitted = {expert.number: 1.0 for expert in experts}
    result = truth.clone()

    pre = {expert.number: expert.pre() for expert in experts}

    def output(expert: Expert, factor: float) -> torch.Tensor:
        middle = expert.gate.apply_stacked(factor * pre[expert.number])
        return expert.output(middle) * expert.factor

    for _ in range(2):
        for expert in experts:
            own = fitted[expert.number]
            rest = result[expert.token] - output(expert, own)
            wanted = out[expert.token] - rest

            def left(
                factor: float, expert: Expert = expert, wanted: torch.Tensor = wanted
            ) -> float:
                return float((wanted - output(expert, factor)).norm())

            best = min([own, *grid], key=left)
            for width in (1.4, 1.1, 1.03, 1.01):
                best = min((best / width, best, best * width), key=left)
            if left(best) < 0.9 * left(own):
                fitted[expert.number] = best
                result[expert.token] = rest + output(expert, best)
    return fitted, result
