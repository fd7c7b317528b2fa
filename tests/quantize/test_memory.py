"""Memory does not grow with the checkpoint."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.quantize.checkpoints import ONE_THREAD

Folders = Callable[[str], Path]


MEASURE = """
import sys
from pathlib import Path
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize.own_memory import Watch, own_memory

def convert(source, target):
    with Checkpoint(Path(source)) as checkpoint:
        steps = plan(checkpoint, Options(max_shard_size=20_000_000))
        execute(checkpoint, steps, Path(target))

small, large, out = sys.argv[1:]
convert(small, out + "/small")  # so that imports, threads and caches are in the baseline
before = own_memory()
with Watch() as watch:
    convert(large, out + "/large")
print(watch.peak - before)
"""


def write_large(folder: Path, config: dict[str, Any], stack: bool) -> int:
    """About 400 MB in one file, written from one buffer; returns its size."""
    hidden, inner, experts, layers = 1024, 512, 8, 12
    shapes = {"lm_head.weight": (50_000, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        if stack:
            shapes[f"{prefix}.gate_up_proj"] = (experts, 2 * inner, hidden)
            shapes[f"{prefix}.down_proj"] = (experts, hidden, inner)
            continue
        for expert in range(experts):
            shapes[f"{prefix}.{expert}.gate_proj.weight"] = (inner, hidden)
            shapes[f"{prefix}.{expert}.up_proj.weight"] = (inner, hidden)
            shapes[f"{prefix}.{expert}.down_proj.weight"] = (hidden, inner)
    config = config | {
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "num_local_experts": experts,
        "num_hidden_layers": layers,
        "vocab_size": 50_000,
    }
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header).encode()
    pattern = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    chunk = pattern.view(torch.uint8).numpy().tobytes()
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(config | {"num_local_experts": experts, "hidden_size": hidden})
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _ in range(start // len(chunk)):
            file.write(chunk)
        file.write(chunk[: start % len(chunk)])
    return start


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("stack", [True, False], ids=["stacked", "separate"])
def test_memory_does_not_grow_with_the_checkpoint(
    stack: bool, saved: Folders, tmp_path: Path
) -> None:
    config = json.loads((saved("qwen3_moe") / "config.json").read_text())
    size = write_large(tmp_path / "large", config, stack)
    assert size > 390e6
    (tmp_path / "out").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, saved("qwen3_moe"), tmp_path / "large", tmp_path / "out"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        env=ONE_THREAD,
    )
    assert int(result.stdout) < 60e6  # one expert's gate and up are 2 MB here, lm_head 102 MB
    assert len(list((tmp_path / "out" / "large").glob("*.safetensors"))) >= 5
    shutil.rmtree(tmp_path)
