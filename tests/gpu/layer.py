"""A vLLM fused-MoE layer with this package's method, without a model or files.

Built as a model builds it (``FusedMoEFactory``), loaded through the parameters' weight loaders as a
model loads it, converted, and run either below the router (``apply``) or whole (``forward``).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from benchmarks.moe_layer_table import SHAPES, Shape
from tests.gpu.reference import GATES, MAGNITUDES, Stored, bias, route, routed

PREACTIVATION = 6.0
"""Standard deviation of gate and up: the clamp at 7 is reached by a fourth of the values."""


NUMBERS = {"swiglu_oai": (1.702, 1.0, 7.0), "situ": (4.0, 0.0, 25.0)}
"""Alpha, beta and limit."""

MODELS = (*SHAPES.values(), Shape("m3-nano", 32, 384, 128, 4))


def start(device: torch.device, folder: Path) -> None:
    """Make this process a rank of one, as vLLM's worker does before it builds a model.

    Args:
        folder: for the rendezvous file.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    if device.type == "cuda":
        from vllm.v1.worker.workspace import init_workspace_manager

        torch.cuda.set_device(device)
        init_workspace_manager(device)
    else:
        from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

        _set_torch_accelerator_to_noop()
    if not torch.distributed.is_initialized():
        with set_current_vllm_config(VllmConfig()):
            backend = "nccl" if device.type == "cuda" else "gloo"
            init_distributed_environment(1, 0, f"file://{folder / 'rendezvous'}", 0, backend)
            initialize_model_parallel(1, 1)


def skip_elsewhere(backend: str) -> None:
    """Skip a test of our Hopper kernels on another GPU."""
    if backend.startswith("hopper") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel runs on compute capability 9.0 alone")


def random_weights(shape: Shape, device: torch.device, seed: int = 0) -> tuple[Stored, Stored]:
    """Gate and up above each other, and down, of every expert.

    Codes are random bytes; block scales run from 1 to 448, each E4M3 value as often; each expert
    has global scales of its own, so that another's would be noticed.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*dims: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, dims, dtype=torch.uint8, device=device, generator=generator)

    code_rms = math.sqrt(sum(value**2 for value in MAGNITUDES) / len(MAGNITUDES))
    every = torch.arange(0x38, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scale_rms = float(every.square().mean().sqrt())

    def matrices(rows: int, columns: int, std: float) -> Stored:
        spread = torch.rand(shape.experts, device=device, generator=generator) * 2 - 1
        return Stored(
            draw(shape.experts, rows, columns // 2),
            draw(shape.experts, rows, columns // 16, low=0x38, high=0x7F).view(torch.float8_e4m3fn),
            std / (code_rms * scale_rms) * spread.exp2(),
        )

    w13 = matrices(2 * shape.intermediate, shape.hidden, PREACTIVATION / math.sqrt(shape.hidden))
    w2 = matrices(shape.hidden, shape.intermediate, 1 / (20 * math.sqrt(shape.intermediate)))
    return w13, w2


class Batch(NamedTuple):
    """One call's input; ``logits`` where the layer's own router is to choose."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    logits: torch.Tensor | None = None


def batch(
    shape: Shape, tokens: int, routing: str, device: torch.device, dtype: torch.dtype, seed: int
) -> Batch:
    """Random tokens ``[tokens, hidden]``.

    Args:
        routing: ``uniform``; ``skewed``: expert e is chosen about as often as 1 / (e + 1)**2, so
            that the first gets nearly all tokens and most get none; ``silu``, ``swiglu_oai``: as
            the router for that gate chooses from random logits.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, shape.hidden, device=device, generator=generator).to(dtype)
    noise = torch.rand(tokens, shape.experts, device=device, generator=generator)
    if routing in GATES:
        logits = noise.clamp(1e-6, 1 - 1e-6).logit()
        return Batch(x, *route(logits, shape.top_k, routing), logits)
    gumbel = -(-noise.clamp_min(1e-9).log()).log()
    if routing == "skewed":
        rank = torch.arange(1, shape.experts + 1, device=device)
        gumbel = gumbel - 2 * rank.log()
    ids = gumbel.topk(shape.top_k, dim=-1).indices.int()
    weights = torch.rand(tokens, shape.top_k, device=device, generator=generator) + 0.1
    return Batch(x, weights, ids)


class Layer:
    """A built layer; ``experts`` is vLLM's ``RoutedExperts``."""

    def __init__(self, runner: Any, config: Any) -> None:
        self.runner = runner
        self.experts = runner.routed_experts
        self.config = config

    def context(self, tokens: int) -> Any:
        """What vLLM's model runner sets around each forward."""
        from vllm.forward_context import set_forward_context

        return set_forward_context(None, self.config, num_tokens=tokens)

    def apply(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The routed experts' output ``[tokens, hidden]``, in x's dtype.

        Memory of the output's size is filled with NaN and freed just before, so that the output
        likely lies there, and what a kernel leaves unwritten shows.
        """
        with torch.inference_mode(), self.context(len(x)):
            if not torch.compiler.is_compiling() and not capturing():
                torch.full_like(x, torch.nan)
            return self.experts.quant_method.apply(self.experts, x, weights, ids, None, None)

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The whole layer, router included, through vLLM's custom op."""
        with torch.inference_mode(), self.context(len(x)):
            return self.runner(x.clone(), logits)  # the op may overwrite its input


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def build(
    shape: Shape,
    gate: str,
    w13: Stored | torch.Tensor,
    w2: Stored | torch.Tensor,
    backend: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    stock: bool = False,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Layer:
    """A layer with these weights, converted for ``backend``.

    Args:
        w13, w2: NVFP4, or plain floats ``[experts, out, in]``, which are quantized as they load. Of
            a gate that is none, the first half of w13 is up, and the other is not loaded.
        backend: vLLM's ``moe_backend``, or ``hopper`` or ``hopper fp8``: this package's kernels.
        gate: a key of ``tests.gpu.reference.GATES``; the router is that of :func:`route`.
        stock: with vLLM's own ``modelopt_fp4`` method in place of this package's.
        biases: of w13 ``[experts, rows]`` and of w2, if the experts have any.
    """
    from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
    from vllm.config.kernel import KernelConfig
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    from quantize.experts.gates import Gate, Gates
    from quantize.layouts import LAYOUTS
    from vllm_nvfp4_moe.config import NvFp4MoEConfig
    from vllm_nvfp4_moe.registration import register

    register()  # as vLLM does in each of its processes
    plain = isinstance(w13, torch.Tensor)
    device = w13.device if isinstance(w13, torch.Tensor) else w13.codes.device
    numbers = NUMBERS.get(gate, ())
    stored = LAYOUTS["modelopt"].quantization_config([])
    quantization: Any
    told: dict[str, Any] = {}
    if stock:
        from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

        quantization = ModelOptNvFp4Config.from_config(stored)
        if gate == "swiglu_oai":  # as vLLM's MiniMax-M3 says it
            names = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
            told = {
                "activation": "swigluoai_uninterleave",
                **dict(zip(names, numbers, strict=True)),
            }
    else:
        quantization = NvFp4MoEConfig() if plain else NvFp4MoEConfig.from_config(stored)
        quantization.gates = Gates.uniform(Gate(gate, *numbers))
    if gate == "relu2":
        told = {"activation": "relu2_no_mul", "ckpt_names": ("up_proj", "down_proj", None)}
    ours = backend.startswith("hopper")
    wanted = KernelConfig(moe_backend="auto" if ours else backend)
    rounded = {"hopper fp8": "fp8", "emulation": "nvfp4"}  # the latter has no other activations
    activations = mock.patch.dict(
        os.environ, {"NVFP4_MOE_ACTIVATIONS": rounded.get(backend, "bf16")}
    )
    config = VllmConfig(load_config=LoadConfig(), kernel_config=wanted)
    config.quant_config = quantization
    sigmoid = gate == "swiglu_oai"
    with activations, set_current_vllm_config(config), torch.device(device):
        runner = FusedMoEFactory(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            params_dtype=dtype,
            renormalize=True,
            scoring_func="sigmoid" if sigmoid else "softmax",
            e_score_correction_bias=bias(torch.empty(shape.experts)) if sigmoid else None,
            routed_scaling_factor=2.0 if sigmoid else 1.0,
            apply_routed_scale_to_output=True,
            router_logits_dtype=torch.float32,
            quant_config=quantization,
            has_bias=biases is not None,
            **told,
            prefix="model.layers.0.mlp.experts",
        )
        record_metadata_for_reloading(runner)  # as vLLM does for each model
        layer = Layer(runner, config)
        method = layer.experts.quant_method
        assert not ours or method.kernel.startswith(f"{backend.upper()} ("), method.passed_over
        load(layer.experts, w13, w2, biases)
        method.process_weights_after_loading(layer.experts)
    return layer


def load(
    experts: Any,
    w13: Stored | torch.Tensor,
    w2: Stored | torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Every tensor of every expert through its parameter's weight loader, as from a checkpoint."""
    parameters = dict(experts.named_parameters())

    def put(name: str, shard: str, expert: int, tensor: torch.Tensor) -> None:
        parameter = parameters.get(name)
        if parameter is None and name.endswith("input_scale"):
            return  # the layer takes weights alone
        parameter.weight_loader(
            parameter, tensor, f"experts.{name}", shard_id=shard, expert_id=expert
        )

    shards = [("w1", w13, "w13"), ("w3", w13, "w13"), ("w2", w2, "w2")]
    for shard, stored, prefix in shards if experts.moe_config.is_act_and_mul else shards[::2]:
        whole = stored if isinstance(stored, torch.Tensor) else stored.codes
        half = whole.shape[1] // 2
        rows = {"w1": slice(half), "w3": slice(half, None), "w2": slice(None)}[shard]
        for expert in range(len(whole)):
            put(f"{prefix}_weight", shard, expert, whole[expert, rows])
            if biases is not None:
                put(f"{prefix}_bias", shard, expert, biases[prefix == "w2"][expert, rows])
            if isinstance(stored, torch.Tensor):
                continue
            put(f"{prefix}_weight_scale", shard, expert, stored.block_scale[expert, rows])
            put(f"{prefix}_weight_scale_2", shard, expert, stored.global_scale[expert])
            put(f"{prefix}_input_scale", shard, expert, torch.ones((), device=whole.device))


class Case:
    """A shape's weights, inputs, and what comes out of them by the reference.

    Args:
        tokens: sizes of batches; each is made with both routings.
        precision: of the reference.
        emulated: also compute what vLLM's emulation should give.
    """

    ROUTINGS = ("uniform", "skewed")
    ROUTED = 64
    """Tokens of the batches that the layer's own router distributes."""

    def __init__(
        self,
        shape: Shape,
        tokens: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        precision: torch.dtype = torch.float32,
        emulated: bool = False,
    ) -> None:
        self.shape = shape
        self.w13, self.w2 = random_weights(shape, device)
        names = [(count, routing) for count in tokens for routing in self.ROUTINGS]
        names += [(self.ROUTED, gate) for gate in GATES]
        self.batches = {
            f"{count} {routing}": batch(shape, count, routing, device, dtype, seed)
            for seed, (count, routing) in enumerate(names)
        }
        # All batches at once, so that each expert is dequantized once.
        parts = zip(*(b[:3] for b in self.batches.values()), strict=True)
        whole = [torch.cat(part) for part in parts]
        sizes = [len(b.x) for b in self.batches.values()]
        self._truth = {}
        for gate in GATES:
            for kind in (False, True)[: 1 + emulated]:
                out = routed(whole[0], self.w13, self.w2, whole[1], whole[2], gate, precision, kind)
                self._truth[gate, kind] = dict(zip(self.batches, out.split(sizes), strict=True))

    def truth(self, gate: str, name: str, emulated: bool = False) -> torch.Tensor:
        """The reference's output for the batch ``name``."""
        return self._truth[gate, emulated][name]


class Error(NamedTuple):
    """Relative errors: of the whole output, and of the worst token."""

    whole: float
    token: float


def error(out: torch.Tensor, truth: torch.Tensor) -> Error:
    """Euclidean norms of difference / truth; NaN if anything is."""
    difference, size = (t.double().norm(dim=-1) for t in (out.to(truth.dtype) - truth, truth))
    return Error(float(difference.norm() / size.norm()), float((difference / size).max()))
