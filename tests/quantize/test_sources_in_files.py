"""Sources in any dtype and any arrangement of files: the same tensors."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantize.checkpoint.reader import Checkpoint
from tests.quantize import published as pub
from tests.quantize.checkpoints import save
from tests.quantize.source_headers import PLAIN, write
from tests.quantize.stored_formats import EXPERTS, Published, assert_same


def arrangements(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    numbers = itertools.count()
    yield "one file", {}
    yield "index", {"shard_of": lambda name: len(name) % 2}
    files: dict[str, int] = {}
    yield "a file a tensor", {"shard_of": lambda name: files.setdefault(name, next(numbers))}


def without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_sources(dtype: torch.dtype, index: bool, tmp_path: Path) -> None:
    """The same tensors from every dtype and arrangement of files, with an index or without."""
    shapes = {"experts.gate_up_proj": (EXPERTS, 8, 4), "experts.down_proj": (EXPERTS, 4, 4)}
    shapes |= {f"experts.{e}.w1.weight": (4, 4) for e in range(3)}
    rng = np.random.default_rng(0)
    whole = {n: torch.from_numpy(rng.integers(-99, 99, s) / 64) for n, s in shapes.items()}
    for number, (_, arrangement) in enumerate(arrangements(len(whole))):
        folder = tmp_path / str(number)
        save(folder, {n: t.to(dtype) for n, t in whole.items()}, {}, **arrangement)
        if not index:
            without_index(folder)
        with Checkpoint(folder) as checkpoint:
            assert {n: i.shape for n, i in checkpoint.tensors.items()} == shapes
            assert checkpoint.formats == set()
            for name, expected in whole.items():
                assert checkpoint.load(name).dtype == dtype
                assert torch.equal(checkpoint.load(name).double(), expected)
            name = "experts.gate_up_proj"
            assert torch.equal(checkpoint.load_expert(name, 1).double(), whole[name][1])


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("publish", [pub.transformers_fp8_gate_up, pub.minimax_m3, pub.gpt_oss])
def test_arrangements(publish: Callable[[], Published], index: bool, tmp_path: Path) -> None:
    """Codes and scales may lie in different files."""
    published = publish()
    [(name, expected)] = published.weights.items()
    for number, (_, arrangement) in enumerate(arrangements(len(published.stored))):
        folder = write(tmp_path / str(number), published, **arrangement)
        if not index:
            without_index(folder)
        with Checkpoint(folder) as checkpoint:
            assert set(checkpoint.tensors) == {name, *PLAIN}
            assert_same(checkpoint.load(name), expected)
