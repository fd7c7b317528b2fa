"""Fixtures of tests/quantize: tiny random models, saved by Transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.quantize import checkpoints


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved(name)``: a tiny model of ``checkpoints.CONFIGS``, as save_pretrained writes it."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("saved") / name
            checkpoints.build(name).save_pretrained(folders[name])
        return folders[name]

    return get


@pytest.fixture(scope="session")
def stacked(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """``stacked(name)``: the same weights under the names that Transformers' modules have."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            model = checkpoints.build(name)
            tensors: dict[str, torch.Tensor] = dict(model.state_dict())
            config = model.config.to_dict() | {"architectures": [type(model).__name__]}
            folders[name] = tmp_path_factory.mktemp("stacked") / name
            checkpoints.save(folders[name], tensors, config)
        return folders[name]

    return get


@pytest.fixture
def source(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer and a template of its own, to be changed."""
    folder = Path(shutil.copytree(saved("qwen3_moe"), tmp_path / "source"))
    (folder / "tokenizer.json").write_text('{"of": "the source"}')
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python that the models were trained on the likes of: NumPy's, as JSON lines."""
    file = tmp_path_factory.mktemp("text") / "numpy.jsonl"
    sources = sorted(Path(np.__file__).parent.rglob("*.py"))[::4]
    lines = [json.dumps({"text": source.read_text(errors="replace")}) for source in sources]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def one_thread() -> Any:
    """Many small steps: threads would wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
