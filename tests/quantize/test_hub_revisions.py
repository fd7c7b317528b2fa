"""Models on the hub: every file at one commit, and which one that was is kept."""

import json
from pathlib import Path

import pytest

from quantize.checkpoint.hub import resolve
from tests.hub_server import Hub
from tests.quantize.hub_models import hub
from tests.quantize.test_cli import refusal, run

__all__ = ["hub"]  # a fixture


def test_a_commit_that_is_published_meanwhile_changes_nothing(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    """Once its number is known, main moves on, to other weights and a broken config."""
    first = hub.publish("org/moe", source)
    others = tmp_path / "others"
    others.mkdir()
    (others / "config.json").write_text("{}")
    moved = []

    def move(request: str) -> None:
        if not moved and "/tree/" in request:
            moved.append(hub.publish("org/moe", others))

    hub.before = move
    out = tmp_path / "out"
    result = run("quantize", "org/moe", out)
    assert result.exit_code == 0, result.output
    assert moved
    config = json.loads((out / "config.json").read_text())
    assert config["nvfp4_moe"]["made"]["revision"] == f"org/moe@{first}"
    report = json.loads((out / "nvfp4_moe_report.json").read_text())
    assert report["revision"] == f"org/moe@{first}"
    # verify asks for the commit that DST was made of; and says so if that is another one.
    assert run("verify", "org/moe", out).exit_code == 0
    assert "holds no" in refusal("verify", "org/moe", out, "--revision", "main")
    assert run("verify", "org/moe", out, "--revision", first).exit_code == 0


def test_a_revision(hub: Hub, source: Path, tmp_path: Path) -> None:
    """A branch, a commit, and one that is not there; only what belongs to the model comes."""
    (source / "adapter_model.safetensors").write_bytes(b"not the model")
    (source / "consolidated.safetensors").write_bytes(b"not the model")
    (source / "pytorch_model.bin").write_bytes(b"not the model")
    wanted = hub.publish("org/moe", source, "refs/pr/3")
    (source / "config.json").write_text("{}")
    hub.publish("org/moe", source)
    for revision in ("refs/pr/3", wanted):
        folder = resolve("org/moe", revision)
        assert folder.name == wanted
    (source / "config.json").unlink()
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    said = refusal("inspect", "org/moe", "--revision", "v9")
    assert "org/moe" in said
    assert "pass one that it has with --revision" in said
    said = refusal("inspect", source, "--revision", "main")
    assert "is a folder here" in said
    assert refusal("verify", source, "--revision", "main", code=2)


def test_going_on_needs_the_same_commit(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another commit with the same model is another source: config.json says which it was."""
    first = hub.publish("org/moe", source)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("quantize.execute.finish", _stopped)
        assert "stopped" in refusal("quantize", "org/moe", out)
    (source / ".gitattributes").write_text("")
    second = hub.publish("org/moe", source)
    said = refusal("quantize", "org/moe", out, "--resume")
    assert f"revision org/moe@{first} to org/moe@{second}" in said
    assert "--revision" in said
    result = run("quantize", "org/moe", out, "--resume", "--revision", first)
    assert result.exit_code == 0, result.output


def _stopped(*_: object) -> None:
    raise KeyError("stopped")
