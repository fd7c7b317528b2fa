"""Running a module's own gating code on chosen numbers.

If the class has a method ``_apply_gate``, as those of Transformers do, it is called. Otherwise
``forward`` runs with its GEMMs replaced: the first GEMMs return the chosen numbers, and the input
of the last GEMM is the result. The module may be on the meta device, since its weights are never
read.

In the same way, :func:`check_product` sees that ``forward`` does nothing else: a norm, a scale or a
residual beside the GEMMs and the gate would be lost wherever experts are computed by their gate.
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
_ROUTER_WEIGHTS = (0.75, 0.375)
"""None is 1 and no sum of them is: a weight that is applied elsewhere is noticed."""

Row = Callable[[torch.Tensor], torch.Tensor]
"""A function of one row of the first GEMM's outputs; see :class:`Driven`."""


class CannotDriveError(Exception):
    """The module's code is not two GEMMs with an elementwise function between them."""


class MoreThanProductError(Exception):
    """The module's code computes something beside two GEMMs and a gate between them."""


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
    run: Row


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
    forward = _Forward(module)

    def run(row: torch.Tensor) -> torch.Tensor:
        gemms, _ = forward.run(row)
        assert gemms.result is not None  # the first run had one
        return gemms.result.reshape(-1, gemms.result.shape[-1])[0]

    return Driven(forward.gated, forward.joined, run)


def has_post_norm(module: torch.nn.Module) -> bool:
    """Whether ``module`` says of itself that a norm, ``post_expert_norm``, comes after its second
    GEMM. :func:`check_product` sees where it is.

    Source: ``transformers.integrations.moe``, since Transformers 5.20.
    """
    return getattr(module, "has_post_expert_norm", False) is True


def check_product(module: torch.nn.Module, gate: Row) -> None:
    """See that ``forward`` is GEMM, gate, GEMM, times the router's weight, and nothing else.

    With :func:`has_post_norm`, the norm must come before the router's weight.

    Args:
        module: a layer's experts, or one expert.
        gate: its gate, as ``Driven.run`` takes and gives it.

    Raises:
        CannotDriveError: if the structure of its ``forward`` is unknown.
        MoreThanProductError: if something else happens at the experts' inputs, between the GEMMs,
            or to their output.
    """
    forward = _Forward(module)
    row = 3 * _numbers(forward.width if forward.joined or not forward.gated else 2 * forward.width)
    try:
        gemms, output = forward.run(row)
        before_down = gate(row)
    except Exception as error:  # the module's code may raise anything
        raise CannotDriveError(f"its forward fails on plain numbers: {error}") from error
    assert gemms.result is not None  # the first run had one
    if not _same(gemms.result, before_down):
        raise MoreThanProductError("between the first GEMM and the last")
    if gemms.others:
        raise MoreThanProductError("in another GEMM")
    if not _same(output, forward.weight * forward.after(_numbers(output.shape[-1]))):
        raise MoreThanProductError("after the last GEMM, or to the router's weight")


def _same(rows: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether all of ``rows`` ``[..., n]`` are ``want`` ``[n]``; some code computes in float32."""
    return torch.allclose(rows.double(), want.expand(rows.shape), rtol=1e-4, atol=1e-6)


def _numbers(n: int) -> torch.Tensor:
    """Numbers that differ from each other, float64 ``[n]``; always the same ones."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class _Gemms(TorchFunctionMode):
    """Replaces every GEMM whose weight is on the meta device.

    The module's input is ``_numbers``. By it, GEMMs on the input are told from later ones.

    Args:
        rows: the output of the GEMMs on the module's input, for every row of it. With ``[m]``, each
            GEMM returns ``rows``. With ``[2, n]``, an expert's first GEMM returns ``rows[0]`` and
            its second ``rows[1]``. With None, they return zeros. Every other GEMM returns
            ``_numbers``.

    Attributes:
        widths: the number of outputs of each GEMM on the module's input.
        result: the input of the first GEMM after those; None if there was none yet.
        others: how many GEMMs had another input than the module's and ``result``.
    """

    def __init__(self, rows: torch.Tensor | None) -> None:
        super().__init__()
        self.rows = rows
        self.widths: list[int] = []
        self.result: torch.Tensor | None = None
        self.others = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _GEMMS or args[1].device.type != "meta":
            return func(*args, **(kwargs or {}))
        x, weight = args[0], args[1]
        takes, gives = weight.shape[-2:] if func is not F.linear else weight.shape[:-3:-1]
        row = _numbers(gives)
        # An expert without tokens takes part in whichever GEMM it is.
        on_input = self.result is None if x.numel() == 0 else _is_input(x)
        if on_input:
            if x.shape[-1] != takes:
                raise CannotDriveError(f"its first GEMM takes {takes} numbers, not {x.shape[-1]}")
            if self.rows is None:
                row = torch.zeros(gives, dtype=torch.float64)
            else:
                row = self.rows if self.rows.ndim == 1 else self.rows[len(self.widths) % 2]
            if x.numel():
                self.widths.append(gives)
        elif x.numel() and self.result is None:
            self.result = x
        elif x.numel() and self.result is not None:
            same = x.shape[-1] == self.result.shape[-1]
            same = same and _same(x, self.result.reshape(-1, x.shape[-1])[0])
            self.others += not same
        return row.to(x.dtype).expand(*x.shape[:-1], -1)


def _is_input(x: torch.Tensor) -> bool:
    """Whether all of ``x`` is the module's input, which some code casts."""
    return bool((x == _numbers(x.shape[-1]).to(x.dtype)).all())


class _Forward:
    """A module's ``forward``, with its GEMMs replaced.

    Attributes:
        gated, joined: see :class:`Driven`.
        width: the number of outputs of its first GEMM.
        weight: the sum of the router's weights that it is given for each token.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """Raises CannotDriveError if the structure is unknown."""
        self._module = _on_meta(module)
        self._arguments, seen = _first_run(self._module)
        assert seen.result is not None
        first, inner = seen.widths[0], seen.result.shape[-1]
        self.joined = first == 2 * inner
        self.width = first
        if set(seen.widths) != {first} or first not in (inner, 2 * inner):
            raise CannotDriveError(
                f"its GEMMs give {seen.widths} numbers, its last one takes {inner}"
            )
        given = self._arguments[2:]
        self.weight = float(given[0].sum()) if given else 1.0
        experts = given[0].numel() if given else 1
        if not self.joined and len(seen.widths) > 2 * experts:
            raise CannotDriveError(f"it has {len(seen.widths)} GEMMs before the last")
        self.gated = self.joined or len(seen.widths) == 2 * experts

    def after(self, row: torch.Tensor) -> torch.Tensor:
        """What becomes of one token's output of the second GEMM, ``[hidden]``."""
        norm: Any = getattr(self._module, "post_expert_norm", None)
        with torch.no_grad():
            return norm(row) if has_post_norm(self._module) else row

    def run(self, row: torch.Tensor) -> tuple[_Gemms, torch.Tensor]:
        """Run it with ``row`` (see :class:`Driven`) for the first GEMM; return what was seen and
        the output."""
        gemms = _Gemms(row.view(2, -1) if self.gated and not self.joined else row)
        with gemms, torch.no_grad():
            output = self._module(*self._arguments)
        return gemms, output[0] if isinstance(output, tuple) else output


def _on_meta(module: torch.nn.Module) -> torch.nn.Module:
    """A copy with GEMM weights on the meta device, zeros for biases, and numbers for all else
    (routers, norms, scales)."""
    module = copy.deepcopy(module).to("meta").double().eval()
    if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
        config._experts_implementation = "eager"  # so that the class's own forward runs
    stacked = any(p.ndim == 3 for p in module.parameters())
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.ndim < 2 or (stacked and parameter.ndim < 3):
                values = torch.zeros(parameter.shape, dtype=torch.float64)
                if "bias" not in name:
                    values = 2 + _numbers(values.numel()).view(values.shape)
                setattr(owner, name, torch.nn.Parameter(values, requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            values = torch.zeros(buffer.shape, dtype=buffer.dtype)
            if buffer.is_floating_point() and "bias" not in name:
                values += 2 + _numbers(values.numel()).view(values.shape)
            setattr(owner, name, values)
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
        x = _numbers(shape[-1]).repeat(*shape[:-1], 1)
        routing = (
            torch.arange(top_k).view(1, -1),
            torch.tensor([_ROUTER_WEIGHTS[:top_k]], dtype=torch.float64),
        )
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
