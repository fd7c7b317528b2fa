"""What NVFP4 experts compute on a CPU, from weights that stay 4-bit in memory.

``vllm_nvfp4_moe.kernels.cpu`` does it, in C++. Where that cannot be compiled, numba does. Then,
with few tokens an expert, decoding is most of the work, and the loops of ``kernels`` do everything.
With many tokens, the matrix product is most of it: each routed expert's weights are expanded, used
once and dropped. So are they for a gate whose form the loops do not have. An E2M1 value times an
E4M3 scale has at most five significant bits, so it is exact in bfloat16. The global scale
multiplies the product, in float32.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import vllm.envs as envs

from quantize.experts.gates import Gate
from quantize.native import environment
from quantize.native.jit import KernelError
from quantize.nvfp4.format import BLOCK, decode
from vllm_nvfp4_moe.kernels.cpu.kernel import FORMS, Kernel, kernel_for, kernel_named

logger = logging.getLogger("vllm.nvfp4_moe.cpu")
"""Below vLLM's logger, whose handlers it has in a server."""

MANY = 24
"""Tokens an expert, on average, up to which the loops of ``kernels`` are faster than a matrix
product (measured with m3-nano's shapes on a Zen 5 core)."""

NUMBA = "numba"
"""What stands for numba's loops where kernels are named."""


def expand(packed: torch.Tensor, block_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes times block scales, exactly. The global scale is left out.

    Args:
        packed: uint8 ``[out, in / 2]``.
        block_scale: float8_e4m3fn ``[out, in / 16]``.

    Returns:
        ``[out, in]`` in ``dtype``.
    """
    blocks = decode(packed).to(dtype).unflatten(-1, (-1, BLOCK))
    return (blocks * block_scale.to(dtype).unsqueeze(-1)).flatten(-2)


@cache
def native(dtype: torch.dtype) -> Kernel | None:
    """The kernel in C++ for activations of ``dtype``; None if numba is to do its work."""
    if not environment.cpp():
        return None
    try:
        return kernel_for(dtype, bool(envs.VLLM_BATCH_INVARIANT))
    except KernelError as error:
        logger.warning("numba runs the experts, which is slower than C++ would be: %s", error)
        return None


@cache
def named(name: str) -> Kernel | None:
    """The kernel in C++ of that name; None if it cannot be had, which is said once. Doctor has
    measured it here, but what it had compiled may be gone, and the compiler too."""
    try:
        return kernel_named(name)
    except KernelError as error:
        logger.warning("%s, which doctor has measured, is not used: %s", name, error)
        return None


@cache
def parsed(by_tokens: str) -> tuple[tuple[float, str], ...]:
    """``16=AVX2;inf=numba``: AVX2 takes up to 16 tokens, numba more."""
    pairs = (part.split("=", 1) for part in by_tokens.split(";"))
    return tuple((float(most), name) for most, name in pairs)


def _kernel(by_tokens: str, tokens: int, dtype: torch.dtype) -> Kernel | None:
    """The kernel in C++ for a call; None if numba is to do its work."""
    if not by_tokens:
        return native(dtype)
    name = next(name for most, name in parsed(by_tokens) if tokens <= most)
    return None if name == NUMBA else named(name)


def _expand(packed: torch.Tensor, block_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from vllm_nvfp4_moe.backends.cpu import kernels

    if dtype == torch.bfloat16:
        return kernels.expand(packed, block_scale)
    return expand(packed, block_scale, dtype)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T``. Where vLLM is to be invariant of the batch, row by row: the order of a
    product's sums hangs on how many rows there are."""
    rows = x.split(1) if envs.VLLM_BATCH_INVARIANT else (x,)
    return torch.cat([row @ weight.T for row in rows])


def _local(ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int) -> torch.Tensor:
    """Local numbers of ``ids``, as ``route`` in experts.cpp has them: a negative id stays so, and
    one that the map does not have becomes ``experts``, which no expert has. An index of PyTorch's
    would count from the map's end."""
    if expert_map is None:
        return ids
    longer = torch.cat((expert_map, expert_map.new_tensor([experts, -1])))
    return longer[ids.long().clamp(-1, len(expert_map))]


def experts_forward(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_global: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_global: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    form: str,
    alpha: float,
    beta: float,
    limit: float | None,
    weight_on_input: bool,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    by_tokens: str = "",
) -> torch.Tensor:
    """The routed experts' output ``[tokens, hidden]``, in x's dtype.

    Args:
        x: ``[tokens, hidden]``.
        w13, w13_scale: as ``vllm_nvfp4_moe.method`` has them.
        w13_global: global scale, float32 ``[experts]``.
        w2, w2_scale, w2_global: the same for w2.
        topk_weights: float32 ``[tokens, k]``.
        topk_ids: int32 ``[tokens, k]``, global expert numbers; negative for no expert.
        expert_map: int32 ``[global experts]``: the expert's local number, or -1 if it is another
            rank's. None if local numbers are the global ones.
        form, alpha, beta, limit: the gate's.
        weight_on_input: multiply by the router's weight before the experts instead of after.
        w13_bias, w2_bias: float32 ``[experts, 2 * intermediate]`` and ``[experts, hidden]``; None
            if the experts have none.
        by_tokens: which kernel takes how many tokens, as :func:`parsed` reads it; if it is empty,
            the fastest that this host can compile takes all.

    Raises:
        RuntimeError: if a token is sent to an expert that there is not.
    """
    gate = Gate(form, alpha, beta, limit)
    dtype = x.dtype
    kernel = _kernel(by_tokens, len(x), dtype) if gate.form in FORMS else None
    if kernel is not None:
        return kernel.run(
            x, w13, w13_scale, w13_global, w2, w2_scale, w2_global, topk_weights, topk_ids,
            expert_map, gate, weight_on_input, w13_bias, w2_bias,
        ).to(dtype)  # fmt: skip
    ids = _local(topk_ids, expert_map, len(w2))
    weights = topk_weights.float()
    if dtype == torch.float16:
        # Without the global scale a weight may be 2688, and sums of those leave float16's range.
        x = x.float()
    routed = [expert for expert in ids.unique().tolist() if expert >= 0]
    if routed and routed[-1] >= len(w2):  # numba would read beyond the weights
        raise RuntimeError(f"a token is sent to an expert beyond the last of {len(w2)}")
    # The loops compute a token alike in every batch.
    loops = ids.numel() <= MANY * len(routed) or envs.VLLM_BATCH_INVARIANT
    if gate.form in FORMS and loops:
        # Here and not above: where C++ runs, nobody waits for numba.
        from vllm_nvfp4_moe.backends.cpu import kernels

        few = kernels.forward(
            x, w13, w13_scale, w13_global, w2, w2_scale, w2_global, weights, ids, gate,
            weight_on_input, w13_bias, w2_bias,
        )  # fmt: skip
        return few.to(dtype)
    output = torch.zeros(x.shape, dtype=torch.float32)
    for expert in routed:
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        factor = weights[tokens, slots].unsqueeze(1)
        inputs = x[tokens]
        if weight_on_input:
            inputs = inputs * factor.to(x.dtype)
        hidden = _product(inputs, _expand(w13[expert], w13_scale[expert], inputs.dtype))
        pre = hidden.float() * w13_global[expert]
        middle = gate.apply_stacked(pre if w13_bias is None else pre + w13_bias[expert]).to(x.dtype)
        result = _product(middle, _expand(w2[expert], w2_scale[expert], x.dtype)).float()
        result *= w2_global[expert]
        if w2_bias is not None:
            result += w2_bias[expert]
        output.index_add_(0, tokens, result if weight_on_input else result * factor)
    return output.to(dtype)
