"""Models on the hub: every file at one commit, and which one that was is kept."""

import json
import shutil
from pathlib import Path

import pytest

from quantize.checkpoint.hub import resolve
from tests.hub_server import Hub
from tests.quantize.checkpoints import contents
from tests.quantize.hub_models import Folders, hub, in_shards
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
    # The hub takes no part of a commit's number, as `git` does.
    for unknown in ("v9", wanted[:7]):
        said = refusal("inspect", "org/moe", "--revision", unknown)
        assert "org/moe" in said
        assert "pass one that it has with --revision: a branch, a tag, or a commit's 40" in said
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


REVISIONS = ("main", "v1.0", "a/branch", "refs/pr/3", "commit")


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_revision_becomes_a_commit(
    revision: str, stream: list[str], hub: Hub, source: Path, tmp_path: Path
) -> None:
    """In whatever is written down, whatever it was called, and whatever that becomes later."""
    commits = {}
    for name in REVISIONS[:-1]:
        (source / "README.md").write_text(name)
        commits[name] = hub.publish("org/moe", source, name)
    commit = commits.get(revision, commits["v1.0"])
    asked = revision if revision != "commit" else commit
    (source / "README.md").write_text("later")
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, "--revision", asked)
    assert run(*words, *stream).exit_code == 0
    hub.publish("org/moe", source, revision)  # it moves on
    expected = f"org/moe@{commit}"
    assert (
        json.loads((out / "config.json").read_text())["nvfp4_moe"]["made"]["revision"] == expected
    )
    assert json.loads((out / "nvfp4_moe_report.json").read_text())["revision"] == expected
    assert run("verify", "org/moe", out).exit_code == 0
    if revision != "commit":
        said = refusal(*words, *stream, "--resume")
        moved = hub.models["org/moe"].branches[revision]
        assert f"holds a checkpoint that was made of {expected}, and SRC is org/moe@{moved}" in said
        assert "--revision" in said
    again = ("quantize", "org/moe", out, "--revision", commit, *stream, "--resume")
    assert run(*again).exit_code == 0


@pytest.mark.parametrize("left", ["interrupted", "finished", "streamed"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
def test_another_source_is_seen_before_it_is_downloaded(
    left: str,
    dry: list[str],
    hub: Hub,
    saved: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its hundreds of gigabytes. Where many files differ, the commit is named first."""
    folder = in_shards(saved("qwen3_moe"), tmp_path / "model", 2)
    first = hub.publish("org/moe", folder)
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out)
    with monkeypatch.context() as patch:
        if left != "finished":
            patch.setattr("quantize.execute.finish", _stopped)
        code = run(*words, *["--stream"] * (left == "streamed")).exit_code
        assert code == int(left != "finished")
    if left != "streamed":
        shutil.rmtree(tmp_path / "model")
        second = hub.publish("org/moe", in_shards(saved("qwen3_moe"), tmp_path / "model", 4))
    shutil.rmtree(tmp_path / "cache")
    said = refusal(*words, "--resume", *dry)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    if left == "streamed":
        assert "was started with --stream; go on so" in said
    else:
        assert first in said and second in said and "--revision" in said
    # The same source is no other one, before it is downloaded once more and after.
    before = contents(out)
    again = (*words, "--resume", "--revision", first)
    if left == "interrupted":
        assert run(*again, "--dry-run").exit_code == 0
    result = run(*again, *["--stream"] * (left == "streamed"))
    assert result.exit_code == 0, result.output
    assert left != "finished" or contents(out) == before


def test_what_is_in_the_cache_comes_without_a_bar(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own, in logs of many lines: of files that are there, it counts them."""
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    hub.publish("org/moe", source)
    assert run("quantize", "org/moe", tmp_path / "out").exit_code == 0
    result = run("verify", "org/moe", tmp_path / "out")
    assert result.exit_code == 0
    assert "Fetching" not in result.output
