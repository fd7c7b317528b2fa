"""What a layer's part of a compiled graph hangs on becomes part of the name that vLLM keeps the
graph by (``quirks.KEPT_GRAPHS``).

vLLM's name has its config, its own environment variables and the model's class; once a graph is
there, it also compares the files that were traced. What decides which operators our layers are in
the graph, and which tensors these are given, is not among them: variables of ours, a table of
measurements, whether a C++ compiler is there, what the kernel of a GPU pads.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.config import CompilationMode

from vllm_nvfp4_moe import quirks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.interface import ExpertsBackend

FACTOR = "vllm_nvfp4_moe.graphs"
"""What the part is called among vLLM's variables, where it is none that could be set."""

_layers: dict[str, list[Any]] = {}
"""What is known of each layer, by its name. Those of an engine that this process had before count
too: then a graph may be compiled again, and never is one taken that is another's."""


def depend_on(layer: RoutedExperts, method: ExpertsBackend, vllm_config: VllmConfig) -> None:
    """Note what the part of ``layer`` in a graph hangs on, once its weights are what its kernel
    reads. Does nothing if vLLM compiles no graphs."""
    if vllm_config.compilation_config.mode in (None, CompilationMode.NONE):
        return
    quirks.KEPT_GRAPHS.log()
    router = getattr(quirks.runner_of(layer), "router", None)
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    _layers[layer.layer_name] = [
        type(method).__qualname__,
        method.kernel,
        method.variant,
        # Whose method routes: the router's own, or one of ours.
        "_compute_routing" in vars(router) if router is not None else False,
        layer.moe_config.hidden_dim,
        layer.moe_config.hidden_dim_unpadded,
        sorted((name, str(t.dtype), list(t.shape), list(t.stride())) for name, t in tensors),
    ]
    envs.environment_variables[FACTOR] = part


def part() -> str:
    """The part of the name: the same for the same facts, in any process."""
    facts = json.dumps(_layers, sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()
