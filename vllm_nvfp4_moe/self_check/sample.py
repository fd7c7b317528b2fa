"""The self-check's batch, and what the checkpoint means its experts to make of it.

The reference is computed in float32 from the weights as they were loaded, before any conversion for
a kernel, and from the gate contract. So it shares nothing with the kernel but the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from quantize.experts.gates import Gate
from quantize.nvfp4.activations import round_nvfp4, round_nvfp4_rows
from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX, dequantize
from vllm_nvfp4_moe.self_check.alone import route

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.interface import ExpertsBackend

TOKENS = 16
"""Tokens in the batch."""
_LARGE, _LARGE_ON_CPUS = 512, 32
"""Tokens of the largest batch. On CPUs it is one token, whose experts then have many rows each."""
_ACTIVE = 4
"""Experts whose router weight is not zero. On CPUs half of them: there the reference takes long."""
_UNLIMITED = 3.0
"""Standard deviation of what goes into a gate without a limit."""
_UNBIASED = "experts without w13's biases", "experts without w2's biases"


@dataclass
class Sample:
    """A batch of tokens, and what the layer's experts should make of it.

    Attributes:
        x: ``[TOKENS, hidden]``, in the layer's dtype.
        ids: the router's choice, int32 ``[TOKENS, k]``, global expert numbers.
        weights: the router's weights, float32 ``[TOKENS, k]``.
        logits: float32 ``[TOKENS, experts]``, from which the layer's router chooses ``ids``. None
            unless the kernel routes by itself.
        truth: the output of this rank's experts, float32 ``[TOKENS, hidden]``, under the contract's
            gate, under each of some others, and without the biases that they have.
        values: how many different values the gate gives for a whole batch; the kernel may round
            each of them another way.
        apart: whether each token is given to the kernel alone.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None = None
    truth: dict[Gate | str, torch.Tensor] = field(default_factory=dict)
    values: int = 0
    apart: bool = False

    def batches(self, alone: int) -> Iterator[Sample]:
        """Some tokens alone, all, and a large batch of the same ones: kernels choose by their
        number, and the truth need not be computed again.

        Args:
            alone: how many are given to the kernel one by one, and judged together.
        """
        every = torch.arange(TOKENS, device=self.x.device)
        yield replace(self._of(every[:alone]), apart=True)
        yield self
        many = every.repeat(_LARGE // TOKENS)
        yield self._of(every[:1].repeat(_LARGE_ON_CPUS) if self.x.device.type == "cpu" else many)

    def calls(self) -> Iterator[Sample]:
        """What the kernel is to be given at once."""
        if not self.apart:
            yield self
            return
        for token in torch.arange(len(self.x), device=self.x.device).split(1):
            yield self._of(token)

    def _of(self, tokens: torch.Tensor) -> Sample:
        logits = None if self.logits is None else self.logits[tokens]
        truth = {gate: each[tokens] for gate, each in self.truth.items()}
        values = self.values * len(tokens.unique()) // len(self.x)
        return Sample(self.x[tokens], self.ids[tokens], self.weights[tokens], logits, truth, values)


def _others(gate: Gate) -> Iterator[Gate]:
    """Gates that an engine may apply by mistake in place of ``gate``."""
    if not gate.gated:
        yield Gate("relu")
        return
    yield Gate("silu")
    yield Gate("gelu_tanh")
    yield Gate("swiglu_oai", 1.702, 1.0, gate.limit or 7.0)
    yield replace(gate, alpha=1.0)
    yield replace(gate, beta=0.0)
    yield replace(gate, limit=None)


def make_sample(layer: RoutedExperts, method: ExpertsBackend) -> Sample:
    """A sample for ``layer``.

    Args:
        layer: its weights are as the docstring of ``vllm_nvfp4_moe.method`` has them, not yet
            converted for a kernel.
        method: the layer's.
    """
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
    # A larger scale could leave float16's range.
    large = min(0.75 * method.gate.limit, 20.0) if method.gate.limit else _UNLIMITED
    wanted = torch.where(torch.arange(TOKENS) % 2 == 0, large, 1.0).to(device).unsqueeze(1)
    x = x * torch.where(spread > 0, wanted / spread, 1.0)
    if method.quantizes_activations and not method.per_token_activation:
        # Beyond this, block scales saturate and all gates give nearly the same.
        most = E2M1_MAX * E4M3_MAX * layer.w13_input_scale.min()
        x *= (most / x.abs().amax(1, keepdim=True)).clamp(max=1)
    x = x.to(layer.params_dtype)
    ids, weights = _routing(layer, active, random)
    sample = Sample(x, ids.to(device), weights.to(device))
    if method.is_monolithic:
        sample.logits, sample.weights, sample.ids = route(layer, sample.x, sample.ids)
    ids, weights = sample.ids.cpu(), sample.weights.cpu()
    sample.values = int((weights > 0).sum()) * next(iter(experts.values())).w2.shape[1]
    on_input = layer.apply_router_weight_on_input
    for gate in dict.fromkeys([method.gate, *_others(method.gate)]):
        sample.truth[gate] = torch.zeros(TOKENS, hidden, device=device)
    for without in _UNBIASED if layer.moe_config.has_bias else ():
        sample.truth[without] = torch.zeros(TOKENS, hidden, device=device)
    for number in sorted({int(e) for e in ids[weights > 0]} & local.keys()):
        expert = experts.get(number) or _Expert(layer, method, local[number], hidden)
        tokens, slots = (ids == number).nonzero(as_tuple=True)
        factor = weights[tokens, slots].to(device).unsqueeze(1)
        tokens = tokens.to(device)
        pre = expert.hidden(x[tokens] * factor.to(x.dtype) if on_input else x[tokens])
        results: dict[Gate | str, torch.Tensor] = {
            name: expert.output(name.apply_stacked(pre))
            for name in sample.truth
            if isinstance(name, Gate)
        }
        if expert.w13_bias is not None and expert.w2_bias is not None:
            unbiased = expert.output(method.gate.apply_stacked(pre - expert.w13_bias))
            pairs = zip(_UNBIASED, (unbiased, results[method.gate] - expert.w2_bias), strict=True)
            results |= dict(pairs)
        for name, result in results.items():
            sample.truth[name].index_add_(0, tokens, result if on_input else result * factor)
    return sample


def _routing(
    layer: RoutedExperts, active: list[int], random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int32 and weights float32, ``[TOKENS, k]``. Each token gets two of ``active``, and other
    experts with a weight of zero."""
    ids = torch.empty(TOKENS, layer.top_k, dtype=torch.int32)
    weights = torch.zeros(TOKENS, layer.top_k)
    # Only a few experts, since a CPU computes with each of them.
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
    """One expert in float32: this rank's slice of its weights, and its inputs rounded as the kernel
    rounds them.

    Args:
        index: the expert's place in the layer's parameters.
        hidden: the hidden size without padding.
    """

    def __init__(
        self, layer: RoutedExperts, method: ExpertsBackend, index: int, hidden: int
    ) -> None:
        scale = layer.w13_weight_scale_2[index, 0]
        both = dequantize(layer.w13_weight[index], layer.w13_weight_scale[index], scale)
        scale = layer.w2_weight_scale_2[index]
        down = dequantize(layer.w2_weight[index], layer.w2_weight_scale[index], scale)
        self.w13, self.w2 = both[:, :hidden], down[:hidden]
        self.w13_bias = self.w2_bias = None
        if layer.moe_config.has_bias:
            self.w13_bias = layer.w13_bias[index].float()
            self.w2_bias = layer.w2_bias[index, :hidden].float()
        self.input_scales: tuple[torch.Tensor, torch.Tensor] | None = None
        self.per_token = method.per_token_activation
        if method.quantizes_activations and not self.per_token:
            w13, w2 = layer.w13_input_scale, layer.w2_input_scale
            if method.input_scales_by_expert:
                w13, w2 = w13[index], w2[index]
            self.input_scales = w13.max(), w2.max()

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """What goes into the gate, float32 ``[tokens, rows of w13]``."""
        return torch.nn.functional.linear(self._seen(x.float(), 0), self.w13, self.w13_bias)

    def output(self, middle: torch.Tensor) -> torch.Tensor:
        """The expert's output float32 ``[tokens, hidden]``, from what the gate gave."""
        return torch.nn.functional.linear(self._seen(middle, 1), self.w2, self.w2_bias)

    def _seen(self, values: torch.Tensor, gemm: int) -> torch.Tensor:
        if self.per_token:
            return round_nvfp4_rows(values)
        if self.input_scales is None:
            return values
        return round_nvfp4(values, self.input_scales[gemm])
