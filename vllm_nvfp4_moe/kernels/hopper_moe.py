"""Routed NVFP4 experts on Hopper, activations in bf16: the Python side of ``hopper_moe.cu``."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.gates import Gate
from vllm_nvfp4_moe.kernels import hopper_weights, jit
from vllm_nvfp4_moe.kernels.jit import KernelError

ARCHITECTURE = "90a"
UNITS = {"few": (8, 8), "some": (8, 64), "many": (16, 128)}
"""Kernels by what they are for: sizes of tiles of tokens, and the largest."""
KINDS = tuple(UNITS)
MOST_EXPERTS = 1024


@dataclass(frozen=True)
class Experts:
    """Weights as the kernel wants them.

    Attributes:
        w13, w2: of :meth:`matrix`.
        globals13, globals2: float32 ``[experts]``, global scales; gate and up share one.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    globals13: torch.Tensor
    globals2: torch.Tensor
    hidden: int

    @staticmethod
    def matrix(
        codes: torch.Tensor, scales: torch.Tensor, global_scales: torch.Tensor, gated: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One of the two matrices of all experts, and its global scales.

        Args:
            codes: uint8 ``[experts, rows, columns / 2]``, gate's rows before up's.
            scales: E4M3 ``[experts, rows, columns / 16]``.
            global_scales: ``[experts]``.
            gated: whether it is gate's and up's.
        """
        packed = hopper_weights.pack_experts(codes, scales, gated)
        return packed, global_scales.float().contiguous()

    @classmethod
    def pack(
        cls,
        w13: torch.Tensor,
        scales13: torch.Tensor,
        globals13: torch.Tensor,
        w2: torch.Tensor,
        scales2: torch.Tensor,
        globals2: torch.Tensor,
    ) -> Experts:
        """Both, as :meth:`matrix`."""
        packed13, factors13 = cls.matrix(w13, scales13, globals13, True)
        packed2, factors2 = cls.matrix(w2, scales2, globals2, False)
        return cls(packed13, packed2, factors13, factors2, w2.shape[1])


class CGate(ctypes.Structure):
    """As ``Gate`` in hopper_common.cuh."""

    _fields_ = [(name, ctypes.c_float) for name in ("alpha", "beta", "limit")] + [
        ("tanh", ctypes.c_int)
    ]

    @classmethod
    def of(cls, gate: Gate) -> CGate:
        limit = float("inf") if gate.limit is None else gate.limit
        return cls(gate.alpha, gate.beta, limit, gate.form == "gelu_tanh")


def layer_fields(*workspace: str) -> list[tuple[str, type]]:
    """Of a ``Layer`` in a ``.cu`` file, which differ in what memory they are lent."""
    given = ("x", "w13", "w2", "globals13", "globals2", "ids", "local", "weights", "out")
    sizes = (
        "tokens", "top_k", "experts", "hidden", "hidden_padded", "intermediate_padded",
        "row_tiles2", "kind", "processors",
    )  # fmt: skip
    return [
        *((name, ctypes.c_void_p) for name in (*given, *workspace)),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in sizes),
        ("gate", CGate),
    ]


class _Layer(ctypes.Structure):
    """As ``Layer`` in hopper_moe.cu."""

    _fields_ = layer_fields("rows1", "rows2", "parts", "tiles", "sorts", "places")


def wgmma(tokens: int, element: str, columns: int) -> str:
    """D[64, tokens] += A[64, columns] B[columns, tokens] of ``element``, A in registers."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    transposed = ", 0" if element == "bf16" else ""  # others have no such operand
    return (
        f"template <> __device__ __forceinline__ void mma<{tokens}>(float (&d)[{count}], "
        "const uint32_t (&a)[4], uint32_t b) {\n"
        f'asm volatile("{{.reg .b64 desc; mov.b64 desc, {{%{count + 4}, 0x40000040}};"\n'
        f'"wgmma.mma_async.sync.aligned.m64n{tokens}k{columns}.f32.{element}.{element} "\n'
        f'"{{{sums}}}, {{{a}}}, desc, 1, 1, 1{transposed};}}" '
        f': {outputs} : {inputs}, "r"(b));\n}}\n'
    )


def body(path: Path) -> str:
    """What a ``.cu`` file says, with what it includes of ours in its place."""
    common = path.with_name("hopper_common.cuh")
    return path.read_text().replace(f'#include "{common.name}"\n', common.read_text())


def whole(path: Path, units: dict[str, tuple[int, int]], element: str, columns: int) -> str:
    """A ``.cu`` file with the MMAs that kernels of these :data:`UNITS` use."""
    sizes = sorted({n for unit, most in units.values() for n in range(unit, most + 1, unit)})
    head = (
        "#include <stdint.h>\ntemplate <int N> __device__ __forceinline__ void "
        "mma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b);\n"
    )
    return head + "".join(wgmma(size, element, columns) for size in sizes) + body(path)


def source() -> str:
    """The whole of the CUDA source."""
    return whole(Path(__file__).with_suffix(".cu"), UNITS, "bf16", 16)


@functools.cache
def library(device: int) -> ctypes.CDLL:
    """The compiled kernels, ready for the CUDA device of this number.

    Raises:
        KernelError: if they cannot be built, or not on this device.
    """
    return prepared(source(), _Layer, device)


def prepared(source: str, layer: type[ctypes.Structure], device: int) -> ctypes.CDLL:
    """``source`` compiled, whose ``run`` takes a ``layer``; raises as :func:`library`."""
    loaded = jit.load(source, ARCHITECTURE)
    loaded.run.argtypes = [ctypes.POINTER(layer), ctypes.c_void_p]
    with torch.cuda.device(device):
        check(loaded.prepare())
    return loaded


def check(error: int) -> None:
    """Raise a :class:`KernelError` for a ``cudaError_t`` other than success."""
    if error:
        raise KernelError(f"CUDA error {error}")


def expected_pairs(ids: torch.Tensor, experts: int, local: torch.Tensor | None) -> float:
    """Of ``ids``, how many will be for this rank's ``experts`` if all are chosen as often."""
    return ids.numel() * (1 if local is None else experts / len(local))


def kind(pairs: float, experts: int, row_tiles: int, processors: int) -> str:
    """Which of :data:`KINDS` is for a batch, as measured (docs/kernel-notes.md).

    Args:
        pairs: of a token and an expert.
        row_tiles: of 64 rows of gate and up.
        processors: the GPU's.
    """
    if pairs > 48 * experts:
        return "many"
    # "few" divides the work into four times as many tiles, and takes a fifth longer for as much.
    tiles = pairs * row_tiles
    waves = math.ceil(pairs * math.ceil(row_tiles / 4) / processors)
    if tiles <= 2 * processors or (pairs <= 8 and 1.2 * tiles < 4 * waves * processors):
        return "few"
    return "some"


def most_tiles(pairs: int, experts: int, most: int) -> int:
    """Tiles there can be, of at most ``most`` tokens."""
    return min(pairs, experts) + pairs // most


def check_arguments(
    x: torch.Tensor,
    experts: Any,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    """What a kernel takes for granted: pointers have no dtype.

    Args:
        experts: this module's or another's, with ``hidden`` and ``w13``.
    """
    for name, tensor, dtype in (
        ("x", x, torch.bfloat16),
        ("ids", ids, torch.int32),
        ("weights", weights, torch.float32),
        ("local", local, torch.int32),
        ("out", out, torch.bfloat16),
    ):
        if tensor is not None and (
            tensor.dtype != dtype
            or tensor.device != x.device
            or (name != "x" and not tensor.is_contiguous())
        ):
            raise KernelError(f"{name} must be contiguous {dtype} on {x.device}")
    if x.shape[1] != experts.hidden or x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        raise KernelError(
            f"x must have {experts.hidden} columns side by side, in rows aligned to 16 bytes"
        )
    count = experts.w13.shape[0]
    if count > MOST_EXPERTS:
        raise KernelError(f"{count} experts; at most {MOST_EXPERTS} are supported")


def run(
    x: torch.Tensor,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: Gate,
    *,
    local: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    use: str | None = None,
) -> torch.Tensor:
    """The routed experts' sum for each token.

    Args:
        x: bf16 ``[tokens, hidden]``, rows contiguous and 16 bytes aligned.
        ids: int32 ``[tokens, k]``, the router's choice; negative: nobody's.
        weights: float32 ``[tokens, k]``, the router's.
        local: int32 ``[all experts]``, which of ``experts`` each is, -1 for none.
        out: bf16 ``[tokens, hidden]``, contiguous; may be ``x``.
        use: of :data:`KINDS`, instead of what :func:`kind` says.

    Raises:
        KernelError: if it cannot be built, CUDA reports an error, or an argument is not as it says.
    """
    check_arguments(x, experts, ids, weights, local, out)
    count = experts.w13.shape[0]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    use = use or kind(expected_pairs(ids, count, local), count, experts.w13.shape[1], processors)

    def workspace(rows: int, hidden: int, intermediate: int) -> tuple[torch.Tensor, ...]:
        rows1 = torch.empty(rows * hidden, dtype=torch.bfloat16, device=x.device)
        rows2 = torch.empty(rows * intermediate, dtype=torch.bfloat16, device=x.device)
        return rows1, rows2, rows1  # the first's are each row's output in the end

    return launch(
        x, experts, ids, weights, gate, local, out,
        _Layer, library, UNITS, use, processors, hopper_weights.CHUNK, workspace,
    )  # fmt: skip


def launch(
    x: torch.Tensor,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: Gate,
    local: torch.Tensor | None,
    out: torch.Tensor | None,
    layer: type[ctypes.Structure],
    library: Callable[[int], ctypes.CDLL],
    units: dict[str, tuple[int, int]],
    use: str,
    processors: int,
    columns: int,
    workspace: Callable[[int, int, int], tuple[torch.Tensor, ...]],
) -> torch.Tensor:
    """What :func:`run` does once a kernel was chosen, whatever the type of activations.

    Args:
        layer: of :func:`layer_fields`.
        units: the kernels there are, in the order of their numbers.
        use: of ``units``.
        processors: the GPU's.
        columns: of a unit of packed weights.
        workspace: of a number of rows, and of the padded hidden and intermediate sizes: what
            ``layer`` has before the tiles.
    """
    tokens, hidden = x.shape
    count, top_k = experts.w13.shape[0], ids.shape[1]
    unit, most = units[use]
    if out is None:
        out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=x.device)
    if tokens == 0:
        return out
    pairs = tokens * top_k
    tiles = most_tiles(pairs, count, most)
    hidden_padded, intermediate_padded = (
        matrix.shape[2] * columns for matrix in (experts.w13, experts.w2)
    )
    lent = workspace(pairs + tiles * unit, hidden_padded, intermediate_padded)
    # Each CTA also reads the tile after its last.
    table, sorts, places = (
        torch.empty(size, dtype=torch.int32, device=x.device)
        for size in (4 * (tiles + processors), most // unit, 4 * pairs)
    )
    filled = layer(
        *(
            None if tensor is None else tensor.data_ptr()
            for tensor in (
                x, experts.w13, experts.w2, experts.globals13, experts.globals2, ids, local,
                weights, out, *lent, table, sorts, places,
            )
        ),
        x.stride(0), tokens, top_k, count, hidden, hidden_padded, intermediate_padded,
        experts.w2.shape[1], list(units).index(use), processors, CGate.of(gate),
    )  # fmt: skip
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(library(torch.cuda.current_device()).run(ctypes.byref(filled), stream))
    return out
