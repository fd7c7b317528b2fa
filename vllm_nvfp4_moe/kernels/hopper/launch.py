"""What Python and the Hopper kernels' libraries share: structs, tables and errors.

``LaunchSpec``, ``CGate`` and ``CTileShape`` mirror structs of the CUDA sources field by field.
:func:`check_library` compares what can be compared when a library is loaded, so that a source and a
Python file that do not belong together are an error then, and not garbage at the first token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from quantize.experts.gates import Gate
from quantize.native.jit import KernelError


@dataclass(frozen=True)
class TileShape:
    """The tile of the output that a multiprocessor computes at a time.

    A tile has the tokens of one expert, and 64 rows of its weights for each row group. Its kernels
    are right for any batch; which is the fastest depends on how many tokens the experts have.

    Attributes:
        max_tokens: the most tokens that a tile may have.
        row_groups: warpgroups side by side, each with 64 rows.
        k_groups: warpgroups that share each 64 rows, every one with its part of the columns.
        token_step: tiles are made for a multiple of this many tokens.
    """

    max_tokens: int
    row_groups: int
    k_groups: int
    token_step: int

    def __str__(self) -> str:
        return f"{self.max_tokens}x{64 * self.row_groups}"

    @property
    def tile_sizes(self) -> range:
        """The numbers of tokens that tiles are made for."""
        return range(self.token_step, self.max_tokens + 1, self.token_step)

    def computed(self, row_tiles: int) -> int:
        """Tiles of 64 rows that are computed for so many, with those past the last in its block."""
        return -(-row_tiles // self.row_groups) * self.row_groups

    def most_tiles(self, pairs: int, experts: int) -> int:
        """How many tiles there can be at most, of so many pairs of a token and an expert."""
        return min(pairs, experts) + pairs // self.max_tokens


class CTileShape(ctypes.Structure):
    """Mirrors ``TileShapeNumbers`` in launch.cuh."""

    _fields_ = [
        (name, ctypes.c_int) for name in ("max_tokens", "row_groups", "k_groups", "token_step")
    ]


FORMS = ("silu", "swiglu_oai", "gelu_tanh", "relu2")
"""The contract's gates that the kernels have."""


class CGate(ctypes.Structure):
    """Mirrors ``Gate`` in gemm.cuh."""

    _fields_ = [(name, ctypes.c_float) for name in ("alpha", "beta", "limit")] + [
        ("tanh", ctypes.c_int)
    ]

    @classmethod
    def of(cls, gate: Gate) -> CGate:
        """The contract's gate in the kernels' numbers; relu2 has none.

        Raises:
            KernelError: if the kernels do not have it: they would compute another.
        """
        if gate.form not in FORMS:
            raise KernelError(f"the Hopper kernels do not have {gate}")
        limit = float("inf") if gate.limit is None else gate.limit
        return cls(gate.alpha, gate.beta, limit, gate.form == "gelu_tanh")


TILE_BYTES = 16
"""The size of ``Tile`` in gemm.cuh: four 32-bit integers."""
PLACE_BYTES = 16
"""The size of ``Place`` in gemm.cuh: four 32-bit numbers."""


class LaunchSpec(ctypes.Structure):
    """One call of a library's ``run``: mirrors ``LaunchSpec`` in launch.cuh."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x", "w13", "w2", "global_scales13", "global_scales2", "bias13", "bias2", "ids",
                "local", "router_weights", "out",
                # Workspace.
                "x_tiles", "middle_rows", "middle_tiles", "pair_outputs", "x_scales",
                "middle_scales", "tiles", "size_ends", "places",
            )
        ),
        ("x_stride", ctypes.c_int64),
        *(
            (name, ctypes.c_int)
            for name in (
                "tokens", "top_k", "experts", "hidden", "hidden_padded", "intermediate",
                "intermediate_padded", "w13_row_tiles", "w2_row_tiles", "tile_shape", "processors",
            )
        ),
        ("gate", CGate),
    ]  # fmt: skip

    def __init__(self, **fields: Any) -> None:
        # ctypes would take a misspelt name for an attribute, and leave the field zero.
        assert fields.keys() <= _FIELDS, f"LaunchSpec has no {sorted(fields.keys() - _FIELDS)}"
        super().__init__(**fields)


_FIELDS = {name for name, *_ in LaunchSpec._fields_}


def check(library: ctypes.CDLL, error: int) -> None:
    """Raise a :class:`KernelError` with CUDA's own words, if ``error`` is a ``cudaError_t`` other
    than success."""
    if error:
        raise KernelError(f"CUDA error {error}: {library.error_text(error).decode()}")


def check_library(library: ctypes.CDLL, shapes: Sequence[TileShape]) -> None:
    """Declare the library's functions, and compare what it and Python both have.

    Raises:
        KernelError: if a struct has another size in it, or it has other tile shapes than
            ``shapes``, in their order.
    """
    library.error_text.restype = ctypes.c_char_p
    library.run.argtypes = [ctypes.POINTER(LaunchSpec), ctypes.c_void_p]
    for name, export, size in (
        ("LaunchSpec", library.launch_spec_bytes, ctypes.sizeof(LaunchSpec)),
        ("Gate", library.gate_bytes, ctypes.sizeof(CGate)),
        ("Tile", library.tile_bytes, TILE_BYTES),
        ("Place", library.place_bytes, PLACE_BYTES),
        ("TileShapeNumbers", library.tile_shape_bytes, ctypes.sizeof(CTileShape)),
    ):
        if (found := export()) != size:
            raise KernelError(
                f"struct {name} has {found} bytes in the CUDA source and {size} in launch.py; the "
                "two must list the same fields"
            )
    theirs = []
    for number in range(library.tile_shape_count()):
        shape = CTileShape()
        library.tile_shape(number, ctypes.byref(shape))
        theirs.append(tuple(getattr(shape, name) for name, *_ in CTileShape._fields_))
    if (ours := [astuple(shape) for shape in shapes]) != theirs:
        raise KernelError(f"the CUDA source has tile shapes {theirs}, and its Python side {ours}")
