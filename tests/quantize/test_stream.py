"""``--stream``: a model larger than the disk comes from the hub a few files at a time."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from quantize.checkpoint import streamed
from tests.hub_server import Hub
from tests.quantize.hub_models import in_shards
from tests.quantize.kv_sources import WAYS, save_source
from tests.quantize.streams import FILES, OPTIONS, Watched, expected, hub, model, without_revision
from tests.quantize.test_cli import refusal, run

__all__ = ["expected", "hub", "model"]  # fixtures


def test_the_same_checkpoint_on_a_small_disk(
    hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sizes = {file.name: file.stat().st_size for file in model.glob("*.safetensors")}
    with Watched(out) as watched:
        hub.before = watched.look
        result = run("quantize", "org/moe", out, *OPTIONS, "--stream")
    assert result.exit_code == 0, result.output
    assert without_revision(out) == expected
    assert {file.name for file in out.iterdir()} == {
        file.name for file in (tmp_path / "expected").iterdir()
    }
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    # Less than the whole, though each file came once: its header, and itself.
    assert 0 < watched.source < sum(sizes.values()) * 0.75
    for name, size in sizes.items():
        assert size < hub.sent[name] <= size + 16 * 2**10
    # verify, by the whole model, finds nothing; nor is the source another one.
    result = run("verify", "org/moe", out)
    assert result.exit_code == 0, result.output
    one, two = (
        json.loads((folder / "nvfp4_moe_report.json").read_text())
        for folder in (out, tmp_path / "expected")
    )
    assert one["source_digest"] == two["source_digest"]
    # Again with --resume: there is nothing to do.
    before = hub.sent.copy()
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream", "--resume")
    assert result.exit_code == 0, result.output
    assert all(hub.sent[name] - before[name] <= 16 * 2**10 for name in sizes)


def stopped(*_: object) -> None:
    raise KeyError("stopped")


@pytest.mark.parametrize("killed", [False, True])
def test_small_numbers_of_files_that_are_gone(
    killed: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report says the scales of keys and values, when all files have gone; in an earlier run
    even."""
    folder = save_source(tmp_path / "source", WAYS["modelopt"])
    source = in_shards(folder, tmp_path / "model", FILES)
    hub.publish("org/kv", source)
    more = []
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr("quantize.execute.collect", stopped)
            said = refusal("quantize", "org/kv", tmp_path / "one", *OPTIONS, "--stream")
        assert "stopped" in said
        more = ["--resume"]
    for name, what in (("one", ("org/kv", "--stream", *more)), ("two", (source,))):
        result = run("quantize", what[0], tmp_path / name, *OPTIONS, *what[1:])
        assert result.exit_code == 0, result.output
    reports = [
        json.loads((tmp_path / name / "nvfp4_moe_report.json").read_text())["kv_scales"]
        for name in ("one", "two")
    ]
    assert reports[0] == reports[1]
    assert reports[0]
    assert without_revision(tmp_path / "one") == without_revision(tmp_path / "two")


def test_what_it_cannot_do(hub: Hub, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text")
    words = ("quantize", "org/moe", tmp_path / "out", "--stream")
    said = refusal(*words, "--calibrate", tmp_path / "text", code=2)
    assert "run the whole model several times" in said
    assert refusal(*words, "--input-scales", tmp_path / "text", code=2)
    assert "leave one out" in refusal(*words, "--ray", "auto", code=2)
    said = refusal("quantize", model, tmp_path / "out", "--stream")
    assert "is on this machine" in said
    assert not hub.requests


def test_weights_that_are_nan(hub: Hub, model: Path, tmp_path: Path) -> None:
    """The file is named; after it is repaired on the hub, the run can be started again."""
    from safetensors.torch import load_file, save_file

    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    name = [n for n in sorted(index) if n.endswith(".up_proj.weight")][-1]
    file = model / index[name]
    tensors = load_file(file)
    damaged = {n: torch.full_like(t, float("nan")) if n == name else t for n, t in tensors.items()}
    save_file(damaged, file, {"format": "pt"})
    hub.publish("org/moe", model)
    said = refusal("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--stream")
    assert file.name in said
    assert name in said
    save_file(tensors, file, {"format": "pt"})
    hub.publish("org/moe", model)
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--stream")
    assert "had another source" in refusal(*words, "--resume")
    assert run(*words, "--overwrite").exit_code == 0


def test_hashes_are_those_of_the_hub(tmp_path: Path) -> None:
    """SHA-256, and for what is not in LFS git's own, as ``git hash-object`` gives it."""
    file = tmp_path / "file"
    file.write_bytes(b"what is up, doc?")
    assert streamed._hash_of(file, False) == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    assert streamed._hash_of(file, True) == hashlib.sha256(b"what is up, doc?").hexdigest()
