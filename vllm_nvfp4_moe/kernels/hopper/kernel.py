"""What is common to the Hopper kernels' Python sides: weights, the library, a call."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.experts.gates import Gate
from quantize.native import jit
from quantize.native.jit import KernelError
from vllm_nvfp4_moe.kernels.hopper import source
from vllm_nvfp4_moe.kernels.hopper.bf16_weights import (
    GROUP_ROWS,
    Rows,
    packed_biases,
    padded_columns,
)
from vllm_nvfp4_moe.kernels.hopper.launch import (
    PLACE_BYTES,
    TILE_BYTES,
    CGate,
    LaunchSpec,
    TileShape,
    check,
    check_library,
)
from vllm_nvfp4_moe.kernels.hopper.source import ORDINARY, Form

ARCHITECTURE = "90a"
MAX_EXPERTS = 1024
"""The most experts that a rank may hold: ``route`` has one thread for each."""


@dataclass(frozen=True)
class Experts:
    """A layer's weights as a kernel wants them.

    Attributes:
        w13, w2: uint8, of :meth:`HopperKernel.pack_matrix`.
        global_scales13, global_scales2: float32 ``[experts]``; gate and up share one.
        hidden: the hidden size, without padding.
        bias13, bias2: float32 ``[experts, 64 * row tiles]``, of :func:`packed_biases`: added to
            what the products give, before the activation and before the router's weights. None for
            none: with tensor parallelism only one rank adds ``w2``'s.
        gated: whether w13 is gate and up, or up alone.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    global_scales13: torch.Tensor
    global_scales2: torch.Tensor
    hidden: int
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None
    gated: bool = True

    @property
    def intermediate(self) -> int:
        """Columns that come of w13, with its rows' padding."""
        return self.w13.shape[1] * GROUP_ROWS // (2 if self.gated else 1)


class HopperKernel(ABC):
    """One kernel: its weights' layout, its tile shapes, how it is built and called.

    Attributes:
        name: what the line at load calls it.
        activation_bits: of the GEMMs' inputs.
        file: its ``.cu`` file.
        tile_shapes: those that it has GEMMs for, in the order of their numbers.
        packed_columns: columns of weights in one unit of a packed matrix.
        mma_element: PTX's name of the MMA's type.
        mma_columns: K of the MMA.
    """

    name: str
    activation_bits: int
    file: Path
    tile_shapes: tuple[TileShape, ...]
    packed_columns: int
    mma_element: str
    mma_columns: int

    def __init__(self) -> None:
        self._libraries: dict[tuple[int, Form], ctypes.CDLL] = {}

    # What kernels differ in.

    @abstractmethod
    def pack_matrix(
        self, codes: torch.Tensor, scales: torch.Tensor, global_scales: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pack one of the two matrices of all experts.

        Args:
            codes: uint8 ``[experts, rows, columns / 2]``.
            scales: E4M3 ``[experts, rows, columns / 16]``.
            global_scales: ``[experts]``.
            rows: which of the two it is, and what its rows are.

        Returns:
            The packed matrix, uint8 ``[experts, row tiles, units, bytes]``, and its global scales,
            float32 ``[experts]``.
        """

    @abstractmethod
    def choose_tile_shape(self, pairs: float, experts: int, row_tiles: int) -> TileShape:
        """The tile shape that should be the fastest for a batch (``choice.py``).

        Args:
            pairs: how many pairs of a token and one of its ``experts`` this rank will have.
            row_tiles: of w13, 64 rows each.
        """

    @abstractmethod
    def workspace(
        self, rows: int, hidden: int, intermediate: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Memory for what lies between the kernels, by the name of :class:`LaunchSpec`'s field.

        Args:
            rows: of all tiles.
            hidden, intermediate: columns of the two products' inputs, with padding.
        """

    # What they share.

    def pack(
        self,
        w13: torch.Tensor,
        scales13: torch.Tensor,
        global_scales13: torch.Tensor,
        w2: torch.Tensor,
        scales2: torch.Tensor,
        global_scales2: torch.Tensor,
        *,
        gated: bool = True,
        bias13: torch.Tensor | None = None,
        bias2: torch.Tensor | None = None,
    ) -> Experts:
        """Pack both matrices; arguments as of :meth:`pack_matrix`.

        Args:
            gated: whether ``w13`` is gate and up, or up alone.
            bias13, bias2: ``[experts, rows]``.
        """
        rows = Rows.GATE_AND_UP if gated else Rows.OF_ONE
        packed13, packed_scales13 = self.pack_matrix(w13, scales13, global_scales13, rows)
        packed2, packed_scales2 = self.pack_matrix(w2, scales2, global_scales2, Rows.OF_ONE)
        return Experts(
            packed13,
            packed2,
            packed_scales13,
            packed_scales2,
            w2.shape[1],
            None if bias13 is None else packed_biases(bias13, rows),
            None if bias2 is None else packed_biases(bias2, Rows.OF_ONE),
            gated,
        )

    def source(self, form: Form = ORDINARY) -> str:
        """The whole CUDA source for experts of ``form``."""
        tokens = {n for shape in self.tile_shapes for n in shape.tile_sizes}
        return source.whole(self.file, form, tokens, self.mma_element, self.mma_columns)

    def library(self, device: int, form: Form) -> ctypes.CDLL:
        """The compiled kernels for experts of ``form``, ready for the CUDA device of this number.

        Raises:
            KernelError: if they cannot be built, or not on this device.
        """
        if (device, form) not in self._libraries:
            library = jit.load(self.source(form), jit.cuda(ARCHITECTURE))
            check_library(library, self.tile_shapes)
            with torch.cuda.device(device):
                check(library, library.prepare())
            self._libraries[device, form] = library
        return self._libraries[device, form]

    def run(
        self,
        x: torch.Tensor,
        experts: Experts,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate: Gate,
        *,
        local: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        tile_shape: TileShape | None = None,
    ) -> torch.Tensor:
        """The routed experts' sum for each token.

        Args:
            x: bf16 ``[tokens, hidden]``, rows contiguous and 16 bytes aligned.
            experts: of this kernel's :meth:`pack`.
            ids: int32 ``[tokens, k]``, the router's choice; a negative one is nobody's.
            weights: float32 ``[tokens, k]``, the router's; one of zero makes its id nobody's too.
            gate: the activation between the products, one of ``launch.FORMS``.
            local: int32 ``[all experts]``, which of ``experts`` each is, -1 for none.
            out: bf16 ``[tokens, hidden]``, contiguous; may be ``x``.
            tile_shape: one of ``tile_shapes``, instead of what :meth:`choose_tile_shape` says.

        Raises:
            KernelError: if the kernel cannot be built, CUDA reports an error, or an argument is
                not as described here.
        """
        _check_arguments(x, experts, ids, weights, local, out)
        form = Form(gate.gated, experts.bias13 is not None or experts.bias2 is not None)
        tokens, hidden = x.shape
        count, top_k = experts.w13.shape[0], ids.shape[1]
        if tile_shape is None:
            tile_shape = self.choose_tile_shape(
                expected_pairs(ids, count, local), count, experts.w13.shape[1]
            )
        if out is None:
            out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=x.device)
        if tokens == 0:
            return out
        pairs = tokens * top_k
        tiles = tile_shape.most_tiles(pairs, count)
        hidden_padded, intermediate_padded = (
            matrix.shape[2] * self.packed_columns for matrix in (experts.w13, experts.w2)
        )
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        _check_matrices(experts, intermediate_padded, gate)
        rows = pairs + tiles * tile_shape.token_step
        integers = {
            # Each CTA also reads the tile after its last.
            "tiles": (tiles + processors) * TILE_BYTES // 4,
            "size_ends": len(tile_shape.tile_sizes),
            "places": pairs * PLACE_BYTES // 4,
        }
        tensors = {
            "x": x,
            "w13": experts.w13,
            "w2": experts.w2,
            "global_scales13": experts.global_scales13,
            "global_scales2": experts.global_scales2,
            "bias13": experts.bias13,
            "bias2": experts.bias2,
            "ids": ids,
            "local": local,
            "router_weights": weights,
            "out": out,
            **self.workspace(rows, hidden_padded, intermediate_padded, x.device),
            **{
                name: torch.empty(size, dtype=torch.int32, device=x.device)
                for name, size in integers.items()
            },
        }
        spec = LaunchSpec(
            **{name: t.data_ptr() for name, t in tensors.items() if t is not None},
            x_stride=x.stride(0),
            tokens=tokens,
            top_k=top_k,
            experts=count,
            hidden=hidden,
            hidden_padded=hidden_padded,
            intermediate=experts.intermediate,
            intermediate_padded=intermediate_padded,
            w13_row_tiles=experts.w13.shape[1],
            w2_row_tiles=experts.w2.shape[1],
            tile_shape=self.tile_shapes.index(tile_shape),
            processors=processors,
            gate=CGate.of(gate),
        )
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            library = self.library(torch.cuda.current_device(), form)
            check(library, library.run(ctypes.byref(spec), stream))
        return out


def expected_pairs(ids: torch.Tensor, experts: int, local: torch.Tensor | None) -> float:
    """How many of ``ids`` will be for this rank's ``experts``, if all are chosen as often."""
    return ids.numel() * (1 if local is None else experts / len(local))


def _check_arguments(
    x: torch.Tensor,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    """What a kernel takes for granted: it gets pointers, and they have no dtype."""
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
    if count > MAX_EXPERTS:
        raise KernelError(f"{count} experts; at most {MAX_EXPERTS} are supported")


def _check_matrices(experts: Experts, columns: int, gate: Gate) -> None:
    """That the experts are packed for this gate, w2 has as many ``columns`` as belong to w13, and
    biases are as their matrices."""
    if experts.gated != gate.gated or padded_columns(experts.intermediate) != columns:
        raise KernelError(
            f"w13 is {'gate and up' if experts.gated else 'up alone'} in "
            f"{experts.w13.shape[1]} row tiles, which is not what {gate} takes with w2's "
            f"{columns} columns"
        )
    for name, bias, matrix in (
        ("bias13", experts.bias13, experts.w13),
        ("bias2", experts.bias2, experts.w2),
    ):
        wanted = (matrix.shape[0], matrix.shape[1] * GROUP_ROWS)
        if bias is not None and (
            bias.shape != wanted or bias.dtype != torch.float32 or not bias.is_contiguous()
        ):
            raise KernelError(f"{name} must be contiguous float32 {list(wanted)}")
