"""``python -m tests.gpu.reload_engine FIRST SECOND``: one engine, asleep, awake, and with other
weights. Fails where text, tensors or their places are not those of a fresh load."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker is in this process

PROMPTS = ["The sky is", "Once upon a time there was a", "1 2 3 4 5", "In the beginning"]


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, module in model.named_modules():
        if hasattr(module, "routed_experts"):
            bias = getattr(module.router, "e_score_correction_bias", None)
            if bias is not None:
                found[f"{name}.router bias"] = bias
    return found


def values(model: torch.nn.Module) -> dict[str, str]:
    def digest(tensor: torch.Tensor) -> str:
        flat = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
        return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]

    return {name: digest(tensor) for name, tensor in tensors(model).items()}


def main(first: str, second: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    options: dict[str, Any] = {
        "quantization": "nvfp4_moe",
        "max_model_len": 128,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,  # it would keep what other weights computed
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 1 << 28,  # measured, it would be wrong beside other processes
        # CUDA graphs without torch.compile, which takes minutes.
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4],
        },
    }
    llm = LLM(model=first, enable_sleep_mode=True, seed=0, **options)
    sampling = SamplingParams(temperature=0.0, max_tokens=24, logprobs=3, ignore_eos=True)

    def worker() -> Any:
        (found,) = llm.collective_rpc(lambda worker: [worker])  # type: ignore[misc]
        return found[0]

    model = worker().model_runner.model

    def text() -> Any:
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
        return [
            [{k: v.logprob for k, v in step.items()} for step in out.outputs[0].logprobs]
            for out in outputs
        ]

    def places() -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in tensors(model).items()}

    def reload(folder: str) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    before = places()
    said, has = {first: text()}, {first: values(model)}
    assert text() == said[first], "the same prompts do not give the same numbers twice"
    checks = 0

    def check(folder: str, what: str) -> None:
        nonlocal checks
        assert places() == before, what
        now = values(model)
        moved = [n for n in now if now[n] != has.setdefault(folder, now)[n]]
        assert not moved, (what, moved)
        assert text() == said.setdefault(folder, text()), what
        checks += 1
        print("right:", what, flush=True)

    llm.sleep(level=1)
    llm.wake_up()
    check(first, "sleep level 1")
    reload(first)
    check(first, "the same weights again")
    reload(second)
    check(second, "other weights")
    reload(second)
    check(second, "other weights twice")
    reload(first)
    check(first, "back")
    for folder in (second, first):
        llm.sleep(level=2)
        llm.wake_up()
        reload(folder)
        check(folder, f"sleep level 2, then {folder}")

    # A fresh load, in the same process.
    reload(second)
    config = EngineArgs(model=second, **options).create_engine_config()
    with set_current_vllm_config(config):
        fresh = values(get_model(vllm_config=config))
    different = [name for name in fresh if fresh[name] != has[second].get(name)]
    assert not different, different
    assert fresh.keys() == has[second].keys()
    differ = said[first] != said[second]
    print(json.dumps({"checks": checks, "tokens differ between the checkpoints": differ}))


if __name__ == "__main__":
    main(*sys.argv[1:])
