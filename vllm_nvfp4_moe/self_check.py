"""At load: a few random tokens through the chosen kernel, against a plain float32 computation.

A kernel that applies another gate, or weights that were converted wrongly for it, give fluent and
wrong text. Both show in one small batch: the reference takes the weights as they were loaded,
before any conversion, and the gate from the contract. One layer of each kind is checked, which
takes a fraction of a second; ``NVFP4_MOE_SELF_CHECK=0`` in the environment turns it off.

Half of the tokens are scaled so that the gate's limit is exceeded often, half so that its curve
around zero matters. The output must be within ``BOUNDS`` of the reference, and nearer to it than to
what any other gate would have given. With activations of 4 bits, that does not show a number of the
gate that is slightly off: a limit of 8 for one of 7, say.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.logger import init_logger
from vllm.utils.torch_utils import set_default_torch_dtype

from quantize.gates import Gate
from quantize.nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, decode, dequantize, pack, round_to_e2m1
from vllm_nvfp4_moe import compat
from vllm_nvfp4_moe.checks import RefusedError

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.method import NvFp4MoEMethod

logger = init_logger("vllm.nvfp4_moe.self_check")

VARIABLE = "NVFP4_MOE_SELF_CHECK"
TOKENS = 16
_ACTIVE = 4
"""Experts that count. On CPUs half of them: there the reference takes longest."""
_UNLIMITED = 3.0
"""Standard deviation of what goes into a gate without a limit."""


class Error(NamedTuple):
    """How far an output is from another.

    Attributes:
        token: L2 norm of one token's error, relative to that of its output; of the worst token.
        value: error of one output, relative to the root mean square of its token's; of the worst.
        total: L2 norm of all errors.
    """

    token: float
    value: float
    total: float = 0.0


BOUNDS = {16: Error(0.02, 0.15), 8: Error(0.1, 0.6), 4: Error(0.25, 1.5)}
"""By the bits of the kernel's activations. With 16, only roundings differ, 0.6 % in bfloat16. 8 are
not reproduced here. 4 are, but a kernel may round elsewhere."""
ROUNDED_WEIGHTS = Error(0.15, 1.0)
"""Of 8 bits where weights are rounded too: 0.10 and 0.67 were seen, for experts of few columns."""

_TELLING = 0.2
"""Part of the error by which a gate must differ from the contract's to be told from it."""


class SelfCheck:
    """Decides which layers to check, and remembers how long that took.

    Attributes:
        seconds: spent so far.
        worst: the largest relative error of a token so far; None if nothing was checked.
        skipped: why a check could not be made; None if none was skipped.
    """

    def __init__(self) -> None:
        self.enabled = os.environ.get(VARIABLE, "1") != "0"
        self.seconds = 0.0
        self.worst: float | None = None
        self.skipped: str | None = None
        self._seen: set[object] = set()

    def told(self) -> str:
        """In a few words, what came of it."""
        if self.skipped is not None:
            return f"self-check impossible ({self.skipped})"
        if self.worst is None:
            return "no self-check"
        return f"self-check passed, relative error {self.worst:.2g}, {self.seconds:.1f} s"

    def before(self, layer: RoutedExperts, method: NvFp4MoEMethod) -> Sample | None:
        """A sample for ``layer``, whose weights have the names and shapes that the docstring of
        ``vllm_nvfp4_moe.method`` gives: call it before they are converted, and :meth:`after` with
        the sample then. None if the layer needs no check."""
        kind = (method.kernel, method.gate, layer.w13_weight.shape, layer.w2_weight.shape)
        if not self.enabled or kind in self._seen:
            return None
        self._seen.add(kind)
        with self._guarded(layer, method):
            return _sample(layer, method)
        return None

    def after(self, sample: Sample, layer: RoutedExperts, method: NvFp4MoEMethod) -> None:
        """Compare the kernel's output.

        Raises:
            RefusedError: if it is not what the checkpoint means.
        """
        with self._guarded(layer, method):
            output = compat.run_alone(layer, method, sample)[:, : sample.x.shape[1]]
            self._judge(output.float(), sample, layer, method)

    @contextmanager
    def _guarded(self, layer: RoutedExperts, method: NvFp4MoEMethod) -> Iterator[None]:
        """A check that cannot be made is no reason not to serve, but is said."""
        begin = time.perf_counter()
        try:
            # vLLM loads under the model's dtype and device as defaults, and runs under PyTorch's.
            with torch.no_grad(), torch.device("cpu"), set_default_torch_dtype(torch.float32):
                yield
        except RefusedError:
            raise
        except Exception as error:
            self.skipped = f"{type(error).__name__}: {error}"
            logger.warning(
                "%s: the self-check of %s could not be made: %s",
                layer.layer_name,
                method.kernel,
                self.skipped,
            )
        self.seconds += time.perf_counter() - begin

    def _judge(
        self, output: torch.Tensor, sample: Sample, layer: RoutedExperts, method: NvFp4MoEMethod
    ) -> None:
        bound = ROUNDED_WEIGHTS if method.rounds_weights else BOUNDS[method.activation_bits]
        own = sample.truth[method.gate]
        error = _error(output, own)
        errors = {
            gate: _error(output, truth)
            for gate, truth in sample.truth.items()
            if gate == method.gate or float((truth - own).norm()) > _TELLING * error.total
        }
        nearest = min(errors, key=lambda gate: errors[gate].total)
        # Written so that NaN fails.
        right = error.token <= bound.token and error.value <= bound.value
        if right and nearest == method.gate:
            self.worst = max(self.worst or 0.0, error.token)
            return
        hint = "" if nearest == method.gate else f" It is nearer to what {nearest} would give."
        raise RefusedError(
            f"{layer.layer_name}: self-check: {method.kernel} does not compute what the checkpoint "
            f"means: relative error {error.token:.3g} for a token and {error.value:.3g} for a "
            f"value, at most {bound.token:g} and {bound.value:g} are roundings.{hint} Use another "
            f"--moe-backend, and please report this; {VARIABLE}=0 serves it all the same"
        )


@dataclass
class Sample:
    """A batch and what it should give.

    Attributes:
        x: ``[TOKENS, hidden]``, in the layer's dtype.
        ids: the router's choice, int32 ``[TOKENS, k]``, global expert numbers.
        weights: the router's, float32 ``[TOKENS, k]``.
        logits: that lead the layer's router to these; only for kernels that route by themselves.
        truth: by gate, the contract's and others: float32 ``[TOKENS, hidden]``, of this rank's
            experts.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None = None
    truth: dict[Gate, torch.Tensor] = field(default_factory=dict)


def _others(gate: Gate) -> Iterator[Gate]:
    """Gates that an engine may apply by mistake."""
    yield Gate("silu")
    yield Gate("gelu_tanh")
    yield Gate("swiglu_oai", 1.702, 1.0, gate.limit or 7.0)
    yield replace(gate, alpha=1.0)
    yield replace(gate, beta=0.0)
    yield replace(gate, limit=None)


def _sample(layer: RoutedExperts, method: NvFp4MoEMethod) -> Sample:
    device = layer.w13_weight.device
    random = torch.Generator().manual_seed(0)
    local = {
        expert: index
        for expert in range(layer.global_num_experts)
        if (index := layer._map_global_expert_id_to_local_expert_id(expert)) >= 0
    }
    numbers = list(local)
    count = min(_ACTIVE if device.type != "cpu" else _ACTIVE // 2, len(numbers))
    # The first, the last, and some between: a conversion may get just some experts wrong.
    active = [numbers[i * (len(numbers) - 1) // max(count - 1, 1)] for i in range(count)]
    hidden = layer.moe_config.hidden_dim_unpadded or layer.hidden_size
    x = torch.randn(TOKENS, hidden, generator=random).to(device)
    experts = {e: _Expert(layer, method, local[e], hidden) for e in active}
    spread = torch.stack([e.hidden(x).std(dim=1, keepdim=True) for e in experts.values()]).amax(0)
    # More could leave float16's range.
    large = min(0.75 * method.gate.limit, 20.0) if method.gate.limit else _UNLIMITED
    wanted = torch.where(torch.arange(TOKENS) % 2 == 0, large, 1.0).to(device).unsqueeze(1)
    x = x * torch.where(spread > 0, wanted / spread, 1.0)
    if method.quantizes_activations:
        # Beyond this, block scales saturate, and all gates look alike.
        most = E2M1_MAX * E4M3_MAX * layer.w13_input_scale.min()
        x *= (most / x.abs().amax(1, keepdim=True)).clamp(max=1)
    x = x.to(layer.params_dtype)
    ids, weights = _routing(layer, active, random)
    sample = Sample(x, ids.to(device), weights.to(device))
    if method.is_monolithic:
        compat.route(layer, sample)
    ids, weights = sample.ids.cpu(), sample.weights.cpu()
    on_input = layer.apply_router_weight_on_input
    for gate in dict.fromkeys([method.gate, *_others(method.gate)]):
        sample.truth[gate] = torch.zeros(TOKENS, hidden, device=device)
    for number in sorted({int(e) for e in ids[weights > 0]} & local.keys()):
        expert = experts.get(number) or _Expert(layer, method, local[number], hidden)
        tokens, slots = (ids == number).nonzero(as_tuple=True)
        factor = weights[tokens, slots].to(device).unsqueeze(1)
        tokens = tokens.to(device)
        pre = expert.hidden(x[tokens] * factor.to(x.dtype) if on_input else x[tokens])
        for gate, truth in sample.truth.items():
            result = expert.output(gate.apply_stacked(pre))
            truth.index_add_(0, tokens, result if on_input else result * factor)
    return sample


def _routing(
    layer: RoutedExperts, active: list[int], random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and weights ``[TOKENS, k]``: two of ``active`` a token, and others of weight zero."""
    ids = torch.empty(TOKENS, layer.top_k, dtype=torch.int32)
    weights = torch.zeros(TOKENS, layer.top_k)
    # Few: a CPU computes with each of them.
    pool = torch.randperm(layer.global_num_experts, generator=random)[: 2 * layer.top_k + 2]
    for token in range(TOKENS):
        counted = [active[(token + i) % len(active)] for i in range(min(2, len(active)))]
        counted = counted[: layer.top_k]
        others = pool[torch.randperm(len(pool), generator=random)].tolist()
        row = counted + [expert for expert in others if expert not in counted]
        ids[token] = torch.tensor(row[: layer.top_k])
        weights[token, : len(counted)] = torch.rand(len(counted), generator=random) + 0.25
    return ids, weights


class _Expert:
    """One expert's weights in float32, of this rank's slice, and its inputs as the kernel sees
    them."""

    def __init__(
        self, layer: RoutedExperts, method: NvFp4MoEMethod, index: int, hidden: int
    ) -> None:
        scale = layer.w13_weight_scale_2[index, 0]
        both = dequantize(layer.w13_weight[index], layer.w13_weight_scale[index], scale)
        scale = layer.w2_weight_scale_2[index]
        down = dequantize(layer.w2_weight[index], layer.w2_weight_scale[index], scale)
        self.w13, self.w2 = both[:, :hidden], down[:hidden]
        self.input_scales: tuple[torch.Tensor, torch.Tensor] | None = None
        if method.quantizes_activations:
            w13, w2 = layer.w13_input_scale, layer.w2_input_scale
            if method.input_scales_by_expert:
                w13, w2 = w13[index], w2[index]
            self.input_scales = w13.max(), w2.max()

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """What goes into the gate, ``[tokens, 2 * intermediate]``."""
        return self._seen(x.float(), 0) @ self.w13.T

    def output(self, middle: torch.Tensor) -> torch.Tensor:
        return self._seen(middle, 1) @ self.w2.T

    def _seen(self, values: torch.Tensor, gemm: int) -> torch.Tensor:
        if self.input_scales is None:
            return values
        return round_activations(values, self.input_scales[gemm])


def round_activations(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """``x`` as kernels with 4-bit activations see it.

    Args:
        x: float32 ``[tokens, n]``, ``n`` a multiple of 16.
        input_scale: float32 scalar, as it multiplies: E4M3 block scales are relative to it.
    """
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / E2M1_MAX / input_scale
    step = scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * input_scale
    codes = round_to_e2m1(torch.where(step > 0, blocks / step, 0.0))
    return (decode(pack(codes)) * step).flatten(-2)


def _error(output: torch.Tensor, truth: torch.Tensor) -> Error:
    difference = output - truth
    norm = truth.norm(dim=1).clamp_min(1e-30)
    token = difference.norm(dim=1) / norm
    value = difference.abs().amax(1) / (norm / truth.shape[1] ** 0.5)
    return Error(float(token.max()), float(value.max()), float(difference.norm()))
