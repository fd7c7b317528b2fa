"""Running a module's own gating code on chosen numbers, whatever the module looks like.

Where a class has ``_apply_gate``, as Transformers' do, that is called. Else ``forward`` runs with
its GEMMs replaced: the first give the chosen numbers, the last is where the result is read. The
module may be on the meta device: its weights are never looked at.
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
"""What the module's input is filled with, so that GEMMs on it can be told from those after them."""


class CannotDriveError(Exception):
    """The module's code is not two GEMMs with something elementwise between them."""


@dataclass(frozen=True)
class Driven:
    """A module's gating code.

    Attributes:
        gated: whether it takes gate and up; False: up alone.
        joined: gate and up come from one GEMM, so they may be interleaved.
        run: from one row of the first GEMM's outputs (``[2 * n]``, or ``[n]`` without a gate;
            where not joined, gate then up), float64, to ``[n]``.
    """

    gated: bool
    joined: bool
    run: Callable[[torch.Tensor], torch.Tensor]


def drive(module: torch.nn.Module) -> Driven:
    """Find out how to run the gating code of ``module``: a layer's experts, or one expert.

    Raises:
        CannotDriveError: if its ``forward`` has another structure than is known.
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
        assert gemms.result is not None  # as in the first run
        return gemms.result.reshape(-1, gemms.result.shape[-1])[0]

    return Driven(gated, joined, run)


class _Gemms(TorchFunctionMode):
    """Replaces GEMMs with tensors on the meta device.

    Args:
        rows: what GEMMs on the module's input give: ``[m]``, the same for each; ``[2, n]``, one
            after the other; None: zeros of the true width.

    Attributes:
        widths: of the outputs of GEMMs on the module's input.
        result: the input of the first other GEMM.
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
    """A copy whose GEMM weights are on the meta device, and all else (routers, biases) zeros."""
    module = copy.deepcopy(module).to("meta").double().eval()
    if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
        config._experts_implementation = "eager"  # the class's own forward
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
    """Arguments with which ``forward`` runs, and what its GEMMs were."""
    weights = [p for p in module.parameters() if p.device.type == "meta"]
    sizes = dict.fromkeys(size for p in weights for size in p.shape[:-3:-1])
    problem: Exception = CannotDriveError("it has no weights")
    count = len(inspect.signature(module.forward).parameters)
    shapes = [shape for n in sizes for shape in ((1, n), (1, 1, n), (len(weights[0]), n))]
    # Two experts a token: LongCat's code cannot do with one.
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
        except Exception as error:  # whatever code that is not ours raises on a wrong shape
            problem = error
            continue
        if gemms.widths and gemms.result is not None:
            return arguments, gemms
        problem = CannotDriveError("it is not a GEMM after a GEMM")
    raise CannotDriveError(f"its forward does not run on numbers: {problem}") from problem
