"""A hub for tests, whose server lets nobody wait, and models in several files."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantize.checkpoint import hub_weights
from tests.hub_server import Hub, serving, use
from tests.quantize.checkpoints import write_index

Folders = Callable[[str], Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_weights.time, "sleep", lambda _: None)
    with serving() as found:
        use(found, tmp_path / "cache", monkeypatch)
        yield found


def in_shards(source: Path, folder: Path, count: int) -> Path:
    """``source`` with its tensors in some files, and an index."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number * len(names) // count : (number + 1) * len(names) // count]
        save_file({n: tensors[n] for n in part}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder
