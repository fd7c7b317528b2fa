"""Models on the hub: for a look, headers alone are read; and headers that are wrong."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantize.checkpoint.hub import look_up
from quantize.checkpoint.opened import opened
from quantize.checkpoint.reader import Checkpoint
from tests.hub_server import Hub, Stored
from tests.quantize.hub_models import Folders, hub, in_shards
from tests.quantize.test_cli import refusal, run

__all__ = ["hub"]  # a fixture


def enlarged(file: Path, factor: int) -> None:
    """Multiply all tensors' first dimension in the header, and the file with holes."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"][-1] *= factor
            entry["data_offsets"] = [n * factor for n in entry["data_offsets"]]
            end = max(end, entry["data_offsets"][1])
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)


def test_inspect_reads_headers_alone(hub: Hub, saved: Folders, tmp_path: Path) -> None:
    """Of a model of some hundred gigabytes, by holes, it is sent a few kilobytes a file; what it
    says is what it says of the same folder on disk."""
    folder = in_shards(saved("qwen3_moe"), tmp_path / "model", 3)
    config = json.loads((folder / "config.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    factor = 2**21
    for key in ("hidden_size", "moe_intermediate_size"):
        assert key in config
    for file in files:
        enlarged(file, factor)
    hub.publish("org/large", tmp_path / "none")
    named = {
        f.name: Stored(f, hashlib.sha256(f.name.encode()).hexdigest())
        if f in files
        else Stored(f.read_bytes())
        for f in folder.iterdir()
    }
    hub.models["org/large"].commit(named)
    total = sum(file.stat().st_size for file in files)
    assert total > 100e9
    with opened(look_up("org/large")) as there, Checkpoint(folder) as here:
        assert there.nbytes == here.nbytes > 100e9
        plain = [[t._replace(file=t.file.name) for t in c.stored.values()] for c in (there, here)]
        assert plain[0] == plain[1]
    headers = {file.name: hub.sent[file.name] for file in files}
    assert all(0 < sent <= 16 * 2**10 for sent in headers.values()), headers
    assert sum(hub.sent.values()) < 200e3
    assert not {"tokenizer.json", "README.md"} & hub.sent.keys()


def test_inspect_says_of_the_hub_what_it_says_of_a_folder(
    hub: Hub, saved: Folders, tmp_path: Path
) -> None:
    folder = in_shards(saved("qwen3_moe"), tmp_path / "model", 3)
    commit = hub.publish("org/moe", folder)
    there = json.loads(run("inspect", "org/moe", "--json").stdout)
    here = json.loads(run("inspect", folder, "--json").stdout)
    assert there.pop("source") != here.pop("source")
    assert there.pop("revision") == f"org/moe@{commit}"
    assert here.pop("revision") is None
    assert there == here
    weights = [name for name in hub.sent if name.endswith(".safetensors")]
    assert len(weights) == 3
    cache = tmp_path / "cache"
    assert not list(cache.rglob("*.safetensors"))


def test_a_size_that_is_not_the_listed_one(hub: Hub, source: Path) -> None:
    hub.publish("org/moe", source)
    size = (source / "model.safetensors").stat().st_size
    hub.sizes["model.safetensors"] = size + 1
    said = refusal("inspect", "org/moe")
    assert (
        f"org/moe/model.safetensors: the hub lists {size + 1} bytes, but the file has {size}"
        in (said)
    )


def test_a_header_that_is_none(hub: Hub, source: Path) -> None:
    whole = (source / "model.safetensors").read_bytes()
    for content in (b"", b"{}", b"\xff" * 8 + whole[8:], whole[:-1]):
        (source / "model.safetensors").write_bytes(content)
        hub.publish("org/moe", source)
        said = refusal("inspect", "org/moe")
        assert "model.safetensors" in said
        assert "not a complete safetensors file" in said


def test_a_header_that_is_long(hub: Hub, tmp_path: Path) -> None:
    """It is read in two ranges; so is that of a server without ranges."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {f"a.rather.long.name.of.a.tensor.{n}": torch.ones(2) for n in range(1000)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    hub.publish("org/long", folder)
    with opened(look_up("org/long")) as there, Checkpoint(folder) as here:
        assert there.stored.keys() == here.stored.keys()
    requests = [line for line in hub.requests if line.startswith("GET /org/long/resolve")]
    assert len([line for line in requests if "model.safetensors" in line]) == 2
