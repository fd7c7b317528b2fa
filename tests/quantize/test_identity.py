"""Whose source is this: a run goes on only with the one that it began with."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.checkpoint.headers import read_header
from quantize.checkpoint.identity import identity_of, tensor_digests
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize.checkpoints import contents
from tests.quantize.test_cli import refusal, run
from tests.quantize.user_files import interrupted, tree


@pytest.mark.parametrize("hub_cache", [False, True])
def test_any_one_tensor_that_changed(hub_cache: bool, source: Path, tmp_path: Path) -> None:
    """Between kill and resume, of a file with the same size and time, or of a new blob."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    if hub_cache:
        snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True)
        (snapshot / "../../blobs").mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(source / name, snapshot / "../../blobs" / f"{name}-1")
            (snapshot / name).symlink_to(f"../../blobs/{name}-1")
        source = snapshot
        file = snapshot / "model.safetensors"
    out = interrupted(source, tmp_path)
    before = tree(out)
    time_ = file.stat().st_mtime_ns
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, Options(max_shard_size=5000))
    raw = file.read_bytes()
    for number, name in enumerate(tensors):
        changed = {n: t + (n == name) for n, t in tensors.items()}
        new = file
        if hub_cache:
            new = source / f"../../blobs/{number}"
            file.unlink()
            file.symlink_to(f"../../blobs/{number}")
        save_file(changed, new, {"format": "pt"})
        assert len(new.read_bytes()) == len(raw)
        os.utime(new, ns=(time_, time_))
        with Checkpoint(source) as checkpoint, pytest.raises(QuantizeError) as caught:
            execute(checkpoint, steps, out, resume=True)
        assert "had another source" in str(caught.value)
        assert name in str(caught.value)
        assert "--overwrite" in str(caught.value)
        assert tree(out) == before


@pytest.mark.parametrize(
    ("size", "at"),
    [(2048, at) for at in (0, 700, 1400, 2047)] + [(9000, at) for at in (0, 511, 4500, 8488, 8999)],
)
def test_a_byte_that_is_looked_at(size: int, at: int, tmp_path: Path) -> None:
    """Each of a small tensor; of a large one those at both ends and in the middle."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(size, dtype=torch.uint8), "b": torch.zeros(4)}, file)
    tensors = read_header(file)
    before = tensor_digests(tensors)[file.name]
    (place,) = [info.offset for info in tensors if info.name == "a"]
    content = bytearray(file.read_bytes())
    content[place + at] ^= 1
    file.write_bytes(content)
    now = tensor_digests(tensors)[file.name]
    assert {name for name in before if now[name] != before[name]} == {"a"}


def test_what_else_an_identity_holds(source: Path) -> None:
    """The header, also where the bytes of all tensors are the same; the size; copied files."""
    file = source / "model.safetensors"
    with Checkpoint(source) as checkpoint:
        before = identity_of(checkpoint)
        file.write_bytes(file.read_bytes() + b"x")
        assert identity_of(checkpoint) == before._replace(files=identity_of(checkpoint).files)
        assert identity_of(checkpoint).files != before.files
    content = file.read_bytes()[:-1]
    file.write_bytes(content.replace(b"q_norm.weight", b"Q_norm.weight"))
    with Checkpoint(source) as checkpoint:
        renamed = identity_of(checkpoint)
    assert renamed.files != before.files
    assert renamed.companions == before.companions
    file.write_bytes(content)
    (source / "tokenizer.json").write_text('{"of": "the sourcE"}')
    with Checkpoint(source) as checkpoint:
        now = identity_of(checkpoint)
    assert now.companions["tokenizer.json"] != before.companions["tokenizer.json"]
    assert now == before._replace(companions=now.companions)


def test_a_blob_that_differs_where_nobody_looks(source: Path, tmp_path: Path) -> None:
    """Only its name, the hub's hash of it, tells."""
    tensors = load_file(source / "model.safetensors") | {"big": torch.zeros(1_000_000)}
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "../../blobs").mkdir()
    shutil.copy(source / "config.json", snapshot)
    for number in (1, 2):
        save_file(tensors, snapshot / f"../../blobs/{number}", {"format": "pt"})
        tensors["big"][1000] = 1.0
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    out = interrupted(snapshot, tmp_path)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/2")
    message = refusal("quantize", snapshot, out, "--max-shard-size", "5KB", "--resume")
    assert "had another source: model.safetensors changed" in message


def test_a_moved_file_counts_as_changed(source: Path, tmp_path: Path) -> None:
    """What differs where nobody looked, under another path: all of it is made again."""
    tensors = load_file(source / "model.safetensors") | {"big": torch.zeros(1_000_000)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = interrupted(source, tmp_path)
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    tensors["big"][1000] = 1.0
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    time_ = (source / "model.safetensors").stat().st_mtime_ns
    os.utime(moved / "model.safetensors", ns=(time_, time_))
    words = ("--max-shard-size", "5KB")
    assert run("quantize", moved, out, *words, "--resume").exit_code == 0
    assert run("quantize", moved, tmp_path / "fresh", *words).exit_code == 0
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("state", ["interrupted", "finished"])
def test_a_copied_file_that_changed(state: str, source: Path, tmp_path: Path) -> None:
    """With the same size."""
    (source / "chat_template.jinja").write_text("AAAA")
    out = tmp_path / "out"
    if state == "finished":
        assert run("quantize", source, out).exit_code == 0
        options: tuple[str, ...] = ()
    else:
        interrupted(source, tmp_path)
        options = ("--max-shard-size", "5KB")
    (source / "chat_template.jinja").write_text("BBBB")
    before = tree(out)
    message = refusal("quantize", source, out, *options, "--resume")
    assert "chat_template.jinja" in message if state == "interrupted" else "--overwrite" in message
    assert tree(out) == before


def test_a_finished_targets_copy_that_changed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", source, out).exit_code == 0
    (out / "tokenizer.json").write_text('{"of": "nobodys"}'[:19])
    assert "not a whole one" in refusal("quantize", source, out, "--resume")


def test_another_older_source_of_a_finished_target(source: Path, tmp_path: Path) -> None:
    """One tensor differs; its file is older than the target."""
    out = tmp_path / "out"
    assert run("quantize", source, out).exit_code == 0
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(1, 1))
    assert "not a whole one" in refusal("quantize", source, out, "--resume")


def test_many_tensors_are_looked_at_in_seconds(tmp_path: Path) -> None:
    """As many as a model of a trillion parameters has."""
    count, size = 69_000, 4096
    header = {
        f"model.layers.{n // 1152}.mlp.experts.{n % 384}.{n % 3}.weight-{n}": {
            "dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]
        }
        for n in range(count)
    }  # fmt: skip
    encoded = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + count * size)
    tensors = read_header(tmp_path / "model.safetensors")
    started = time.process_time()
    found = tensor_digests(tensors)
    assert time.process_time() - started < 8
    assert len(found["model.safetensors"]) == count
