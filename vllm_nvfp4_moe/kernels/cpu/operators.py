"""Operators of PyTorch's whose work is C++ alone, so that a model's step calls them without Python.

``operators.cpp`` is them. It gets PyTorch's functions as addresses from here, and those of the
kernels, so that nothing is linked to either. Results are written to tensors that the caller gives,
as those of vLLM's own ``cpu_fused_moe``: torch.compile then plans their memory with all others'.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from quantize.native import jit
from quantize.native.jit import KernelError
from vllm_nvfp4_moe.kernels.cpu.source import inlined

_NAMESPACE = "vllm_nvfp4_moe"
_SCHEMAS = (
    "experts(Tensor(a!) out, Tensor x, Tensor w13, Tensor w13_scale, Tensor w13_global, Tensor w2, "
    "Tensor w2_scale, Tensor w2_global, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    "Tensor? w13_bias, Tensor? w2_bias, Tensor choice, int form, float alpha, "
    "float beta, float limit, bool weight_on_input) -> ()",
    "route(Tensor(a!) weights, Tensor(b!) ids, Tensor logits, Tensor? bias, bool sigmoid, "
    "bool renormalize, float factor) -> ()",
)
_FUNCTIONS = (
    "aoti_torch_check", "aoti_torch_get_data_ptr", "aoti_torch_get_dim", "aoti_torch_get_sizes",
    "aoti_torch_get_dtype", "aoti_torch_is_contiguous", "aoti_torch_delete_tensor_object",
    "aoti_torch_library_init_impl", "aoti_torch_library_impl", "_ZdlPv",
)  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32", "int32", "int64", "uint8", "float8_e4m3fn")


class Torch(ctypes.Structure):
    """Mirrors ``Torch`` in torch_abi.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _FUNCTIONS),
        *((name, ctypes.c_int32) for name in _DTYPES),
    ]


@cache
def _library() -> torch.library.Library:
    """What holds the operators' schemas, for as long as this process runs."""
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
        library._register_fake(schema.partition("(")[0], lambda *_, **__: None)
    return library


@cache
def load() -> ctypes.CDLL:
    """The operators' library, which PyTorch calls from then on.

    ``torch.ops.vllm_nvfp4_moe.experts`` writes to ``out``, ``[tokens, hidden]`` in any of the
    dtypes that ``x`` may have, what ``backends.cpu.forward.experts_forward`` gives; ``choice`` is
    :func:`vllm_nvfp4_moe.kernels.cpu.kernel.choice`'s, ``form`` one of ``FORMS`` there, and
    ``limit`` infinite if there is none. ``route`` writes float32 ``weights`` and int32 ``ids``,
    both ``[tokens, k]``, from ``[tokens, experts]`` logits and a bias ``[experts]`` in any of those
    dtypes (routing.h). Either raises a RuntimeError if a tensor is not as it takes it.

    Raises:
        KernelError: if it cannot be compiled or loaded here, or PyTorch lacks a function.
    """
    native = jit.load(*source())
    if native.size_of_torch() != ctypes.sizeof(Torch):
        raise KernelError("torch_abi.h and operators.py differ")
    try:
        theirs = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        at = [ctypes.cast(theirs[name], ctypes.c_void_p) for name in _FUNCTIONS]
        dtypes = [theirs[f"aoti_torch_dtype_{name}"]() for name in _DTYPES]
    except (OSError, AttributeError) as error:
        raise KernelError(
            f"this PyTorch has not all that an operator in C++ takes: {error}"
        ) from error
    _library()
    if native.attach(ctypes.byref(Torch(*at, *dtypes))):
        raise KernelError("PyTorch does not take the operators")
    return native


def source() -> tuple[str, jit.Language]:
    """What is compiled, and how."""
    return inlined("operators.cpp"), jit.cpp(openmp=True)
