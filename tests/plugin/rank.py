"""One of two ranks that load checkpoints together: ``python -m tests.plugin.rank RANK JOBS OUT``.

``JOBS`` is a JSON file: a list of {"name", "folder", "pipeline", "args"}. For each, the rank writes
to ``OUT`` what its slice of every MoE layer makes of the same tokens, or what it was refused for.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

TOKENS = 6


def batch(hidden: int, experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens ``[TOKENS, hidden]``, and the router's weights and global experts ``[TOKENS, k]``."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, hidden, generator=random)
    order = torch.rand(TOKENS, experts, generator=random).argsort(1)
    weights = torch.rand(TOKENS, k, generator=random) + 0.1
    return x, weights, order[:, :k].int()


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import initialize_model_parallel
    from vllm.distributed.parallel_state import destroy_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    split = "pipeline_parallel_size" if job["pipeline"] else "tensor_parallel_size"
    config = EngineArgs(
        model=job["folder"], quantization="nvfp4_moe", max_model_len=64, enforce_eager=True,
        dtype="float32", **{split: 2}, **job["args"],
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        initialize_model_parallel(*((1, 2) if job["pipeline"] else (2, 1)))
        try:
            model = get_model(vllm_config=config)
        except ValueError as error:
            return {"refused": str(error)}
        finally:
            destroy_model_parallel()
    outputs = {}
    for name, runner in config.compilation_config.static_forward_context.items():
        if hasattr(runner, "routed_experts"):
            layer = runner.routed_experts
            moe = layer.moe_config
            x, weights, ids = batch(moe.hidden_dim, moe.num_experts, moe.experts_per_token)
            outputs[name] = layer.quant_method.apply(layer, x, weights, ids, None, None)
    del model
    check = config.quant_config.context.self_check
    return {"outputs": outputs, "worst": check.worst, "skipped": check.skipped}


def main(rank: int, jobs: Path, out: Path) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_DIST_IDENT"] = str(os.getppid())  # as vLLM's worker: names shared memory
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, rank, f"file://{jobs.parent / 'rendezvous'}", rank, "gloo")
    torch.save({job["name"]: run(job) for job in json.loads(jobs.read_text())}, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
