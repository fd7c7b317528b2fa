"""Running a module's own gating code on chosen numbers.

If the class has a method ``_apply_gate``, as those of Transformers do, it is called. Otherwise
``forward`` runs with its GEMMs replaced: the first GEMMs return the chosen numbers, and the input
of the last GEMM is the result. The module may be on the meta device, since its weights are never
read.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

_GEMMS = {
    F.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
}
_MARK = 0.125
"""The value that fills the module's input. By it, GEMMs on the input are told from later ones."""


class CannotDriveError(Exception):
    """The module's code is not two GEMMs with an elementwise function between them."""


@dataclass(frozen=True)
class Driven:
    """A module's gating code.

    Attributes:
        gated: whether the code takes gate and up; if False, it takes up alone.
        joined: whether gate and up come from one GEMM, so that they may be interleaved.
        run: a function from one row of the first GEMM's outputs, float64, to the result ``[n]``.
            The row is ``[2 * n]``, or ``[n]`` without a gate. If not joined, it is gate, then up.
    """

    gated: bool
    joined: bool
    run: Callable[[torch.Tensor], torch.Tensor]


def drive(module: torch.nn.Module) -> Driven:
    """Find out how to run the gating code of ``module``.

    Args:
        module: a layer's experts, or one expert.

    Raises:
        CannotDriveError: if the structure of its ``forward`` is unknown.
    """
    apply_gate: Any = getattr(module, "_apply_gate", None)
    if apply_gate is not None and getattr(module, "has_gate", True):
        return Driven(True, True, lambda row: apply_gate(row.unsqueeze(0)).flatten())
    module = _on_meta(module)
    arguments, seen = _first_run(module)
    assert seen.result is not None
    first, inner = seen.widths[0], seen.result.shape[-1]
    joined = first == 2 * inner
    if set(seen.widths) != {first} or first not in (inner, 2 * inner):
        raise CannotDriveError(f"its GEMMs give {seen.widths} numbers, its last one takes {inner}")
    if not joined and len(seen.widths) > 2:
        raise CannotDriveError(f"it has {len(seen.widths)} GEMMs before the last")
    gated = joined or len(seen.widths) == 2

    def run(row: torch.Tensor) -> torch.Tensor:
        gemms = _Gemms(row.view(2, -1) if gated and not joined else row)
        with gemms, torch.no_grad():
            module(*arguments)
        assert gemms.result is not None  # the first run had one
        return gemms.result.reshape(-1, gemms.result.shape[-1])[0]

    return Driven(gated, joined, run)


class _Gemms(TorchFunctionMode):
    """Replaces every GEMM whose weight is on the meta device.

    Args:
        rows: the output of the GEMMs on the module's input, for every row of it. With ``[m]``, each
            GEMM returns ``rows``. With ``[2, n]``, the first GEMM returns ``rows[0]`` and the
            second ``rows[1]``. With None, they return zeros. Every other GEMM returns zeros.

    Attributes:
        widths: the number of outputs of each GEMM on the module's input.
        result: the input of the first GEMM after those; None if there was none yet.
    """

    def __init__(self, rows: torch.Tensor | None) -> None:
        super().__init__()
        self.rows = rows
        self.widths: list[int] = []
        self.result: torch.Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _GEMMS or args[1].device.type != "meta":
            return func(*args, **(kwargs or {}))
        x, weight = args[0], args[1]
        takes, gives = weight.shape[-2:] if func is not F.linear else weight.shape[:-3:-1]
        if x.numel() == 0:  # an expert without tokens
            first = self.result is None and x.shape[-1] == takes
        else:
            first = self.result is None and bool((x == _MARK).all())
        if first and x.shape[-1] != takes:
            raise CannotDriveError(f"its first GEMM takes {takes} numbers, not {x.shape[-1]}")
        row = torch.zeros(gives, dtype=torch.float64)
        if first and self.rows is not None:
            row = self.rows if self.rows.ndim == 1 else self.rows[len(self.widths)]
        if first and x.numel():
            self.widths.append(gives)
        elif x.numel() and self.result is None:
            self.result = x
        return row.expand(*x.shape[:-1], -1)


def _on_meta(module: torch.nn.Module) -> torch.nn.Module:
    """A copy with GEMM weights on the meta device and zeros for all else (routers, biases)."""
    module = copy.deepcopy(module).to("meta").double().eval()
    if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
        config._experts_implementation = "eager"  # so that the class's own forward runs
    stacked = any(p.ndim == 3 for p in module.parameters())
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.ndim < 2 or (stacked and parameter.ndim < 3):
                zeros = torch.zeros(parameter.shape, dtype=torch.float64)
                setattr(owner, name, torch.nn.Parameter(zeros, requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return module


def _first_run(module: torch.nn.Module) -> tuple[tuple[torch.Tensor, ...], _Gemms]:
    """Arguments with which ``forward`` runs, and the GEMMs of that run.

    Raises:
        CannotDriveError: if no arguments of a plausible shape work.
    """
    weights = [p for p in module.parameters() if p.device.type == "meta"]
    sizes = dict.fromkeys(size for p in weights for size in p.shape[:-3:-1])
    problem: Exception = CannotDriveError("it has no weights")
    count = len(inspect.signature(module.forward).parameters)
    shapes = [shape for n in sizes for shape in ((1, n), (1, 1, n), (len(weights[0]), n))]
    # One expert per token, then two: LongCat's code fails with one.
    for shape, top_k in itertools.product(shapes, (1, 2) if count > 1 else (1,)):
        x = torch.full(shape, _MARK, dtype=torch.float64)
        routing = (torch.arange(top_k).view(1, -1), torch.ones(1, top_k, dtype=torch.float64))
        arguments = (x, *routing)[:count]
        gemms = _Gemms(None)
        try:
            with gemms, torch.no_grad():
                module(*arguments)
        except NotImplementedError:
            raise
        except Exception as error:  # the module's code may raise anything on a wrong shape
            problem = error
            continue
        if gemms.widths and gemms.result is not None:
            return arguments, gemms
        problem = CannotDriveError("it is not a GEMM after a GEMM")
    raise CannotDriveError(f"its forward does not run on numbers: {problem}") from problem
