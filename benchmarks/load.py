"""Loading: peak GPU memory and seconds, ours beside stock vLLM's, on one checkpoint in one run.

    python -m benchmarks.load [FOLDER] [--layers 5] [--rounds 2] [--backend humming]

FOLDER, in the published MiniMax-M3 layout, is made if it is not there (``m3_checkpoint``: 5 layers
are 19 GiB of experts); by default it is in ``/dev/shm``, so that no disk is measured. Every load is
a process of its own that does what vLLM's worker does up to the finished model: config, model,
``get_model`` (reading, converting, this package's checks), no KV cache and no graphs. Orders
alternate, since the first load of a machine also compiles kernels.

* final: what PyTorch has allocated once the model is there and garbage is collected;
* peak: the most it had allocated at any time of the load (``reserved``: from the driver);
* used: the most the GPU had in use, by ``nvidia-smi`` every 0.1 s, above what it had before;
* layer: the largest layer's experts as they lie on the GPU in the end.

On a CPU, where this only tries itself out, all of them are the process's resident memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.m3_checkpoint import write

GIB = 2**30
ALLOWED = 1.05
"""Of the final weights, plus one layer: what the peak may be."""

VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "ours": ("nvfp4_moe", {}),
    "stock": ("modelopt_fp4", {"VLLM_PLUGINS": ""}),
}


def allocated() -> int:
    """Bytes that this process has on the GPU (on CPUs: in memory) now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peaks() -> tuple[int, int]:
    """Most bytes allocated, and reserved from the driver, since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return most, most


def load(folder: Path, quantization: str, backend: str) -> dict[str, Any]:
    """Load a model in this process, which must be fresh; bytes and seconds."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.model_loader import get_model

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    config = EngineArgs(
        model=str(folder),
        quantization=quantization,
        moe_backend=backend,
        max_model_len=1024,
        enforce_eager=True,
        skip_tokenizer_init=True,
    ).create_engine_config()
    gpu = torch.cuda.is_available()
    if gpu:
        from vllm.v1.worker.workspace import init_workspace_manager

        torch.cuda.set_device(0)
        init_workspace_manager(torch.device("cuda", 0))
    else:
        from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

        _set_torch_accelerator_to_noop()
    with tempfile.TemporaryDirectory() as temporary, set_current_vllm_config(config):
        rendezvous = f"file://{temporary}/rendezvous"
        init_distributed_environment(1, 0, rendezvous, 0, "nccl" if gpu else "gloo")
        initialize_model_parallel(1, 1)
        before = allocated()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        model = get_model(vllm_config=config)
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        peak, reserved = peaks()
        final = allocated() - before
        torch.distributed.destroy_process_group()
    layers = [
        sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
        for module in model.modules()
        if isinstance(module, RoutedExperts)
    ]
    weights = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {
        "seconds": seconds,
        "final": final,
        "peak": peak - before,
        "reserved": reserved - before,
        "layer": max(layers),
        "parameters": sum(weights.values()),
    }


@contextlib.contextmanager
def gpu_memory(samples: list[int]) -> Iterator[None]:
    """Append to ``samples`` the GPU's memory in use, in bytes, every 0.1 s; nothing without one."""
    if not torch.cuda.is_available():
        yield
        return
    query = "--query-gpu=memory.used"
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", number, query, "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout

        def read() -> None:
            samples.extend(int(line) * 2**20 for line in lines if line.strip().isdigit())

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.5)  # what is in use before
        try:
            yield
        finally:
            process.terminate()
            reader.join()


def measure(folder: Path, variant: str, backend: str, limit: float) -> dict[str, Any]:
    """One load in a process of its own; raises RuntimeError with the end of its log."""
    quantization, variables = VARIANTS[variant]
    samples: list[int] = []
    command = [sys.executable, "-m", "benchmarks.load", str(folder), "--child", quantization]
    with gpu_memory(samples):
        done = subprocess.run(
            [*command, "--backend", backend],
            env=os.environ | variables, capture_output=True, text=True, check=False, timeout=limit,
        )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("CHILD ")]
    if done.returncode or not found:
        raise RuntimeError(f"{variant}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    line = json.loads(found[-1].removeprefix("CHILD "))
    used = max(samples) - samples[0] if samples else None
    ratio = line["peak"] / line["final"]
    within = line["peak"] <= ALLOWED * line["final"] + line["layer"]
    return {"variant": variant, **line, "used": used, "ratio": ratio, "within": within}


def row(line: dict[str, Any]) -> str:
    """One line of the table."""
    names = ("final", "layer", "peak", "reserved", "used")
    sizes = (f"{line[n] / GIB:8.3f}" if line[n] is not None else f"{'':8}" for n in names)
    return f"{line['variant']:6} {line['seconds']:8.2f} {' '.join(sizes)} {line['ratio']:8.3f}"


def verdict(lines: list[dict[str, Any]]) -> list[str]:
    """What the runs say about ours, in words."""
    best = {
        name: min((x for x in lines if x["variant"] == name), key=lambda x: x["seconds"])
        for name in {x["variant"] for x in lines}
    }
    said = []
    if ours := best.get("ours"):
        worst = max(
            (x for x in lines if x["variant"] == "ours"),
            key=lambda x: x["peak"] - ALLOWED * x["final"] - x["layer"],
        )
        limit = ALLOWED * worst["final"] + worst["layer"]
        said.append(
            f"peak {worst['peak'] / GIB:.3f} GiB, {'within' if worst['within'] else 'BEYOND'} "
            f"{ALLOWED} x final + one layer = {limit / GIB:.3f} GiB"
        )
        if stock := best.get("stock"):
            said.append(
                f"ours / stock: {ours['seconds'] / stock['seconds']:.2f} of the seconds, "
                f"{ours['peak'] / stock['peak']:.3f} of the peak, "
                f"{ours['final'] / stock['final']:.3f} of the final bytes"
            )
    return said


def main() -> None:
    """Parse the arguments; make the checkpoint, load it, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("/dev/shm/m3-load"))
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--backend", default="auto", help="vLLM's moe_backend")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one load")
    parser.add_argument("--child", metavar="QUANTIZATION", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("CHILD " + json.dumps(load(args.folder, args.child, args.backend)), flush=True)
        return
    if not (args.folder / "config.json").exists():
        begin = time.perf_counter()
        write(args.folder, args.layers)
        print(f"{args.folder} written in {time.perf_counter() - begin:.1f} s", flush=True)
    lines = []
    for number in range(args.rounds):
        for variant in args.variants[:: -1 if number % 2 else 1]:
            try:
                line = measure(args.folder, variant, args.backend, args.limit)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"FAILED {error}", flush=True)
                continue
            lines.append(line)
            print("RESULT " + json.dumps({"backend": args.backend, **line}), flush=True)
    print(f"{'GiB':6} {'seconds':>8} {'final':>8} {'layer':>8} {'peak':>8} {'reserved':>8} "
          f"{'used':>8} {'peak/final':>8}")  # fmt: skip
    print("\n".join(map(row, lines)))
    print("\n".join(f"VERDICT {text}" for text in verdict(lines)), flush=True)


if __name__ == "__main__":
    main()
