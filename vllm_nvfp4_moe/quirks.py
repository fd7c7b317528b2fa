"""What is peculiar to a vLLM version, and what this package does about it.

Each peculiarity is a :class:`Quirk`: what vLLM does, in which versions that was seen, and how far
the change made here reaches and ends. ``QUIRKS`` lists them all. A quirk is logged, once a process,
when the plugin acts on it. What changes is an object of an engine that serves one of our
checkpoints, or lasts for one call. The methods of vLLM's that are exchanged, by ``NAMED_NVFP4``,
``UNGATED_ON_CPUS``, ``GPT_OSS``, ``DBRX``, ``MINIMAX_M3_SCALES``, ``UNCHECKED_PARAMETERS`` and
``NO_METRICS_OF_WORKERS``, act for our checkpoints alone.

Whoever supports a new version of vLLM reads this list, and drops what has gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vllm_nvfp4_moe.versions import installed_version, minor_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

logger = init_logger("vllm.nvfp4_moe.quirks")


@dataclass(frozen=True)
class Quirk:
    """A peculiarity of vLLM that this package acts on.

    Attributes:
        name: in a few words, for the log.
        what: what vLLM does, and what that would do to our checkpoints.
        seen_in: versions of vLLM in which it was seen.
        undone: what the change made here is confined to, and how it ends.
        gone_when: what vLLM would have to do for this entry to become needless.
    """

    name: str
    what: str
    seen_in: tuple[str, ...]
    undone: str
    gone_when: str

    def seen_here(self) -> bool:
        """Whether it was seen in the version of vLLM that is installed."""
        here = minor_version(installed_version() or "")
        return here in map(minor_version, self.seen_in)

    def log(self) -> None:
        """Say, once in this process, that the plugin acts on it."""
        logger.info_once(
            "Acting on a quirk of vLLM %s (seen in %s): %s",
            str(installed_version()),
            ", ".join(self.seen_in),
            self.name,
        )


GPU_ONLY_MODELS = Quirk(
    name="MiniMax-M3's own classes cannot be imported on a CPU",
    what="The classes import CUDA kernels, and vLLM says of the model that its architecture failed "
    "to be inspected. On CPUs, gpu_only.GpuOnlyModel stands in for them and says what to do.",
    seen_in=("0.32", "0.33"),
    undone="The class is registered in CPU processes only, for two architectures that no CPU runs.",
    gone_when="vLLM's classes can be imported on a CPU, or say themselves why they cannot run.",
)

FROZEN_ATTENTION = Quirk(
    name="attention would be captured into piecewise CUDA graphs, which are given up",
    what="For some models, MiniMax-M3 among them, vLLM turns on 'breakable' piecewise CUDA graphs, "
    "in which attention runs eagerly between captured pieces. A decorator reads the setting when "
    "attention's module is imported, but VllmConfig makes the setting later, and quantized "
    "checkpoints import that module before it. An engine process that is forked from there "
    "(the default of LLM(...)) captures attention with the rest and replays it for other batches. "
    "Short prompts are then answered with one token repeated for ever. That was seen on an H200 "
    "with stock vLLM, in bf16 as in NVFP4 (docs/evidence/engine.md). `vllm serve` spawns its "
    "engine, which is not affected.",
    seen_in=("0.32",),
    undone="Only cudagraph_mode of this engine's config changes: decode keeps its graphs, prefill "
    "runs eagerly.",
    gone_when="vLLM decides at capture, as 0.33 does.",
)

GROUPED_ROUTING = Quirk(
    name="the CPU router takes sigmoids and correction biases only in groups, and gets one group",
    what="CPURouter asserts softmax unless routing is grouped, and passes over a correction bias "
    "then (ERNIE 4.5's), without a word. Its grouped code knows the sigmoid and the bias, and with "
    "one group it computes just the ungrouped routing.",
    seen_in=("0.32", "0.33"),
    undone="Only the layer's own router object changes, and lives as long as the layer.",
    gone_when="CPURouter accepts a sigmoid, and adds a bias, without groups.",
)

ROUTER_BIAS = Quirk(
    name="the router's correction bias is not float32, and is converted",
    what="vLLM's Transformers backend leaves the bias in the model's dtype, and vLLM's CUDA router "
    'then stops with "bias tensor must be float32".',
    seen_in=("0.32", "0.33"),
    undone="Only that tensor changes its dtype, wherever the model holds it, so that what a reload "
    "writes to it reaches the router.",
    gone_when="the Transformers backend converts the bias, or the router does.",
)

KERNEL_CHOICE = Quirk(
    name="kernels are chosen by the activation's name, without its numbers",
    what="vLLM asks an experts class about the activation's name alone. The order of backends, the "
    "list of those that clamp, and what --moe-backend means are inside the function that asks.",
    seen_in=("0.32", "0.33"),
    undone="The function's own code runs with one global name exchanged; vLLM's function stays.",
    gone_when="experts classes are asked about the numbers, or the order is a value of its own.",
)

NEEDLESS_PADDING = Quirk(
    name="Humming copies all weights to pad them by nothing, and no longer does",
    what="Humming pads all weights before it repacks them, and PyTorch copies even where nothing "
    "is padded, so that a layer's weights would be on the GPU three times. But Humming counts on "
    "the copy for global scales, which it has expanded to all rows: its kernels take contiguous "
    "tensors only. Humming 0.1.19, for 0.33, pads in the same lines as 0.1.17.",
    seen_in=("0.32", "0.33"),
    undone="torch.nn.functional.pad is exchanged while a layer is converted, for the thread that "
    "does so, and put back (backends/padding.py).",
    gone_when="Humming, or PyTorch, does not copy what needs no padding.",
)

SHARED_EXPERTS = Quirk(
    name="shared experts would be added up once per rank",
    what="vLLM's Transformers backend sums routed and shared experts over tensor-parallel ranks, "
    "but replicates a shared expert whose class it cannot split (MiniMax-M3's inline gate). Seen "
    "on two CPU ranks in bf16, without this package: perplexity 22.00 for 20.08.",
    seen_in=("0.32", "0.33"),
    undone="Nothing is changed: the model is refused.",
    gone_when="the Transformers backend adds a replicated shared expert once.",
)

FLAT_EXCLUDES = Quirk(
    name="a flat ModelOpt config lists what is not quantized as exclude_modules, which is not read",
    what="ModelOpt writes the list as 'ignore' or as 'exclude_modules'. Where the config is not "
    "nested in 'quantization', vLLM reads the first alone, and takes all modules for quantized.",
    seen_in=("0.32",),
    undone="The dict from which this package's config is made has the list under both names.",
    gone_when="vLLM reads both, as 0.33 does.",
)

NAMED_NVFP4 = Quirk(
    name="a model counts as NVFP4 by the name of its quantization, and ours is another",
    what="ModelConfig.is_nvfp4_quantized compares --quantization with the names of vLLM's own. "
    "Passes that fuse activations with their quantization to NVFP4, at dense layers, would stay "
    "off.",
    seen_in=("0.32", "0.33"),
    undone="The method is exchanged, and answers for models of our name as it would if they had "
    "the name that vLLM gives to their layout. All other models get vLLM's own answer.",
    gone_when="vLLM asks the quantization config.",
)

UNGATED_ON_CPUS = Quirk(
    name="a layer whose experts have no gate is not even built on a CPU",
    what="The last thing that FusedMoEConfig does when it is made is to raise NotImplementedError, "
    "since vLLM's own kernels for CPUs have gates only. No quantization is asked before.",
    seen_in=("0.32", "0.33"),
    undone="That method is exchanged, and lets layers through while a model of ours is built, "
    "on CPUs only. Those of its experts that are not NVFP4 vLLM refuses later, when none of its "
    "kernels takes them. All other models get vLLM's own error.",
    gone_when="vLLM leaves it to the kernels to say what they support.",
)

GPT_OSS = Quirk(
    name="GPT-OSS's class passes over experts in NVFP4, and is given them",
    what="vLLM's own class for GPT-OSS knows no names for an expert's gate and up apart, nor for "
    "global scales: it drops them without a word. Stacks of plain floats it copies into parameters "
    "without asking their loaders.",
    seen_in=("0.32", "0.33"),
    undone="The method that the class calls with each tensor first is exchanged. It takes what is "
    "for parameters of ours, and hands all else to vLLM's (loading/gpt_oss.py).",
    gone_when="the class loads experts through RoutedExperts.load_weights, as others do.",
)

MERGED_NAMES = Quirk(
    name="an expert's gate and up are renamed to a merged linear's parts, and get their names back",
    what="Aria's class inherits Llama's mapping of names, by which gate_proj and up_proj are parts "
    "of gate_up_proj, also in an expert. RoutedExperts then takes gate alone for both, and splits "
    "it in halves.",
    seen_in=("0.32", "0.33"),
    undone="The load_weights of our layers alone is exchanged. It undoes the renaming of one "
    "expert's tensors on which the mapping has noted the part.",
    gone_when="the mapping leaves experts out, or RoutedExperts looks at the note.",
)

BIAS_AMONG_EXPERTS = Quirk(
    name="a router's correction bias that is stored among the experts is dropped, and is loaded",
    what="Laguna's checkpoints have the bias as mlp.experts.e_score_correction_bias, and its class "
    "leaves all below mlp.experts to RoutedExperts, which passes over names that it does not know. "
    "Routing then goes by zeros, and the text is wrong without any error.",
    seen_in=("0.32", "0.33"),
    undone="The load_weights of our layers alone is exchanged, and loads that tensor, too.",
    gone_when="RoutedExperts loads the bias, or refuses what it does not know.",
)

DBRX = Quirk(
    name="DBRX's class finds no parameters for its experts, and is given ours",
    what="vLLM's own class for DBRX looks for experts' parameters by a name that they no longer "
    "have, so that no DBRX loads, and knows no names for one expert's tensors. Its layers slice "
    "the original's flat stacks, whatever they are given.",
    seen_in=("0.32", "0.33"),
    undone="The method in which the class loads its weights is exchanged: what is for parameters "
    "of ours is taken first, all else handed to vLLM's. Our loaders slice as for all other models.",
    gone_when="the class loads experts through RoutedExperts.load_weights, as others do.",
)

MINIMAX_M3_SCALES = Quirk(
    name="MiniMax-M3's class drops the scales of experts in FP8, and is shown their parameters",
    what="vLLM's own class for MiniMax-M3 renames weight_scale_inv to weight_scale, as its MXFP8 "
    "linears have it, also of experts whose parameters are called weight_scale_inv: those in "
    "ModelOpt's layout, in blocks of 128 x 128. It then drops them without a word, and the "
    "parameters keep their ones. Seen on an H200: perplexity 9382 for 6.6.",
    seen_in=("0.32", "0.33"),
    undone="The method in which the class loads its weights is exchanged. While it runs, scales of "
    "experts beside ours have the name that it looks for (loading/minimax_m3.py).",
    gone_when="the class looks which of the two names a parameter has.",
)

MUSE_SPARK = Quirk(
    name="Muse Spark's class takes stacks of all experts alone, and is given single experts, too",
    what="vLLM's own class for Muse Spark, which alone has its norm after down, stops at the first "
    'tensor of one expert, as ModelOpt writes them: "unexpected expert weight '
    "'0.down_proj.weight'\".",
    seen_in=("0.33",),
    undone="The load_weights of such layers alone is exchanged: it hands single experts to the "
    "class that vLLM's layer is made of, and stacks to the layer's own (loading/muse_spark.py).",
    gone_when="the layer loads experts through RoutedExperts.load_weights, as others do.",
)

UNCHECKED_PARAMETERS = Quirk(
    name="what a class did not load is looked for in models that are not quantized alone",
    what="vLLM's default loader compares the parameters with what load_weights reports, if the "
    "model has no quantization, and leaves out linears and embeddings even then. A quantized one "
    "whose class passes over a norm's name, or a router's bias, starts with what lies in memory. "
    "Seen on an H200: HY-V4's hyper-connections under names of Transformers' saving. Its "
    "log-probabilities were 0.91 off; a fault in the experts makes 0.16.",
    seen_in=("0.32", "0.33"),
    undone="The method in which vLLM's loaders build a model is exchanged. A model of ours looks "
    "at what its first load_weights leaves out (loading/plain.py); all others are as they were.",
    gone_when="vLLM looks at what is not quantized of quantized models, too.",
)

NO_METRICS_OF_WORKERS = Quirk(
    name="a plugin's numbers do not get from workers to /metrics, and ours are read from files",
    what="Plugins for statistics see the scheduler's alone, and with one installed vLLM computes "
    "statistics also where --disable-log-stats turns them off.",
    seen_in=("0.32", "0.33"),
    undone="The method that vLLM's logger for Prometheus has called once the engine is ready is "
    "exchanged, and sets gauges of ours after vLLM's, if ranks have left anything (metrics.py).",
    gone_when="a worker can hand labels to API servers.",
)

KEPT_GRAPHS = Quirk(
    name="compiled graphs are kept without what our layers call, and are now named by it",
    what="A graph is found again by vLLM's config, its variables and the source files that were "
    "traced. The graph may have operators of ours, their constants, and a padding for one kernel: "
    "all of that hangs on our variables, on a saved table of measurements and on what can be "
    "compiled here, and a start with other ones would be given the old graph.",
    seen_in=("0.32", "0.33"),
    undone="vLLM's dictionary of variables gets one more entry in the process of a worker, which "
    "is asked for that name alone (graphs.py).",
    gone_when="a quantization method can add to the name.",
)

QUIRKS = (
    GPU_ONLY_MODELS,
    FROZEN_ATTENTION,
    GROUPED_ROUTING,
    ROUTER_BIAS,
    KERNEL_CHOICE,
    NEEDLESS_PADDING,
    SHARED_EXPERTS,
    FLAT_EXCLUDES,
    NAMED_NVFP4,
    UNGATED_ON_CPUS,
    GPT_OSS,
    MERGED_NAMES,
    BIAS_AMONG_EXPERTS,
    DBRX,
    MINIMAX_M3_SCALES,
    MUSE_SPARK,
    UNCHECKED_PARAMETERS,
    NO_METRICS_OF_WORKERS,
    KEPT_GRAPHS,
)


def with_ignore(config: dict[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` of ModelOpt's in which vLLM finds the list of what is not quantized
    (``FLAT_EXCLUDES``)."""
    listed = config.get("exclude_modules")
    if listed is None or "quantization" in config or "ignore" in config:
        return config
    if FLAT_EXCLUDES.seen_here():
        FLAT_EXCLUDES.log()
    return config | {"ignore": listed}


def runner_of(layer: RoutedExperts) -> Any:
    """The MoE runner that ``layer`` belongs to, None before it exists.

    vLLM gives a method the layer alone; router and shared experts are the runner's.
    """
    from vllm.config import get_current_vllm_config

    context = get_current_vllm_config().compilation_config.static_forward_context
    return context.get(layer.layer_name)


def shared_experts_counted_by_every_rank(layer: RoutedExperts) -> bool:
    """Whether the ranks' sum would hold the shared expert once per rank (``SHARED_EXPERTS``)."""
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
    if any(isinstance(m, split) and m.tp_size > 1 for m in shared.modules()):
        return False
    SHARED_EXPERTS.log()
    return True


def use_grouped_routing(layer: RoutedExperts) -> None:
    """Let vLLM's CPU router route ``layer`` by sigmoid, and with a correction bias
    (``GROUPED_ROUTING``)."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    router: Any = getattr(runner_of(layer), "router", None)
    if (
        isinstance(router, CPURouter)
        and (
            router.scoring_func == "sigmoid"
            or (router.scoring_func == "softmax" and router.e_score_correction_bias is not None)
        )
        and router.custom_routing_function is None
        and not router.use_grouped_topk
    ):
        GROUPED_ROUTING.log()
        router.use_grouped_topk = True
        router.num_expert_group = router.topk_group = 1
        layer.use_grouped_topk, layer.num_expert_group, layer.topk_group = True, 1, 1


def route_with_float32_bias(layer: RoutedExperts) -> None:
    """Give ``layer``'s router its correction bias in float32 (``ROUTER_BIAS``)."""
    router: Any = getattr(runner_of(layer), "router", None)
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None and bias.dtype != torch.float32:
        ROUTER_BIAS.log()
        # Not a copy: the model's own module loads into this tensor, and vLLM's reloading may do so
        # after it has processed this layer.
        bias.data = bias.data.float()
        if layer.e_score_correction_bias is not bias:
            layer.e_score_correction_bias.data = bias.data


def attention_break_is_armed() -> bool:
    """Whether attention stays outside breakable CUDA graphs in this process
    (``FROZEN_ATTENTION``)."""
    from vllm.model_executor.layers.attention import attention

    function: Any = attention.unified_attention_with_output
    while function is not None:
        if function.__code__.co_filename.endswith("breakable_cudagraph.py"):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def avoid_frozen_attention(vllm_config: VllmConfig) -> None:
    """Keep vLLM from replaying attention that was captured for another batch
    (``FROZEN_ATTENTION``). Changes ``cudagraph_mode`` of ``vllm_config``, and warns."""
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
    FROZEN_ATTENTION.log()
    compilation.cudagraph_mode = mode.without_piecewise()
    logger.warning(
        "vLLM would capture attention into its piecewise CUDA graphs in this process and then give "
        "wrong text; cudagraph_mode %s -> %s. To keep piecewise graphs, start with "
        "VLLM_WORKER_MULTIPROC_METHOD=spawn (as `vllm serve` does) or "
        "VLLM_USE_BREAKABLE_CUDAGRAPH=1 in the environment",
        mode.name,
        compilation.cudagraph_mode.name,
    )


def select_nvfp4_moe_backend(kernels_of: Callable[[Any], list[Any]]) -> Callable[..., Any]:
    """vLLM's function of that name, asking ``kernels_of(backend)`` instead of vLLM's classes
    (``KERNEL_CHOICE``).

    Raises:
        RuntimeError: if vLLM's function is no longer made this way.
    """
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4

    function = nvfp4.select_nvfp4_moe_backend
    code = getattr(function, "__code__", None)
    if code is None or code.co_freevars or "backend_to_kernel_cls" not in code.co_names:
        raise RuntimeError(
            f"vLLM {installed_version()} chooses its NVFP4 kernels in a way this package does not "
            "know, and so cannot tell whether they apply the checkpoint's gate"
        )
    KERNEL_CHOICE.log()
    names = {**function.__globals__, "backend_to_kernel_cls": kernels_of}
    return FunctionType(code, names, function.__name__, function.__defaults__)
