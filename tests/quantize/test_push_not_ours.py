"""``--push-to`` where an earlier version is: what of it is ours is known by more than its
report, which anybody can write. What others wrote or changed there stays."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Hub, Stored
from tests.quantize.pushes import NAME, OPTIONS, hub, model, of_hub
from tests.quantize.test_cli import refusal, run

__all__ = ["hub", "model"]  # fixtures

REPORT, INDEX = "nvfp4_moe_report.json", "model.safetensors.index.json"


@pytest.fixture
def first(hub: Hub, model: str, source: Path, tmp_path: Path) -> dict[str, bytes]:
    """An earlier version is on the hub, with two files that SRC has no longer; what is there."""
    (source / "chat_template.jinja").write_text("of the first version")
    (source / "merges.txt").write_text("of the first version")
    hub.publish("org/moe", source)
    assert (
        run("quantize", "org/moe", tmp_path / "first", *OPTIONS, "--push-to", NAME).exit_code == 0
    )
    for name in ("chat_template.jinja", "merges.txt"):
        (source / name).unlink()
    hub.publish("org/moe", source)
    return of_hub(hub)


def commit(hub: Hub, changes: dict[str, bytes | None]) -> dict[str, bytes]:
    """As somebody does on the model's page; what is there then."""
    files: dict[str, Any] = dict(hub.models[NAME].files)
    files |= {name: Stored(content) for name, content in changes.items() if content is not None}
    files = {name: file for name, file in files.items() if changes.get(name, b"") is not None}
    hub.models[NAME].commit(files)
    return of_hub(hub)


def reported(there: dict[str, bytes], **changes: Any) -> bytes:
    report = json.loads(there[REPORT])
    return json.dumps(
        report | {key: change(report[key]) for key, change in changes.items()}
    ).encode()


def test_a_file_that_was_edited_there_stays(
    hub: Hub, first: dict[str, bytes], tmp_path: Path
) -> None:
    """Or was put there by somebody, by a name that we had once: that is said before the
    work. The other one goes."""
    commit(hub, {"chat_template.jinja": b"by hand"})
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert of_hub(hub)["chat_template.jinja"] == b"by hand"
    assert "merges.txt" not in of_hub(hub)
    said = f"{NAME} on the hub has chat_template.jinja, which this package did not write as it is"
    assert said in result.stderr.split("Quantizing")[0]
    assert "config.json" in of_hub(hub)


@pytest.mark.parametrize("lost", [False, True], ids=["told", "answer lost"])
def test_a_file_that_is_edited_while_it_goes_stays(
    lost: bool, hub: Hub, first: dict[str, bytes], tmp_path: Path
) -> None:
    """Between the look at what is there and the commit that removes it, which the hub then refuses;
    or after that, where the answer was lost."""
    commits: list[str] = []

    def before(request: str) -> None:
        if not request.startswith("POST") or "/commit/" not in request:
            return
        commits.append(request)
        if len(commits) == 1 + lost:
            commit(hub, {"chat_template.jinja": b"by hand"})
        elif len(commits) == 1:
            hub.lost_answers = 1

    hub.before = before
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert of_hub(hub)["chat_template.jinja"] == b"by hand"
    assert "merges.txt" not in of_hub(hub)
    assert "config.json" in of_hub(hub)


def test_a_report_without_digests_proves_nothing(
    hub: Hub, first: dict[str, bytes], tmp_path: Path
) -> None:
    kept = ("chat_template.jinja", "merges.txt")
    commit(hub, {REPORT: reported(first, digests=lambda _: {})})
    assert run("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME).exit_code == 0
    assert {name: of_hub(hub)[name] for name in kept} == {name: first[name] for name in kept}


def test_a_report_that_names_files_of_others(
    hub: Hub, first: dict[str, bytes], tmp_path: Path
) -> None:
    """With their digests, too: no run writes such files."""
    theirs = {"notes.md": b"theirs", "images/plot.png": b"theirs", ".gitattributes": b"theirs"}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in theirs.items()}
    report = reported(
        first, files=lambda files: [*files, *theirs], digests=lambda known: known | digests
    )
    commit(hub, theirs | {REPORT: report})
    assert run("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME).exit_code == 0
    assert {name: of_hub(hub)[name] for name in theirs} == theirs
    assert "merges.txt" not in of_hub(hub)


@pytest.mark.parametrize(
    "index",
    [b'{"weight_map": {"a": "theirs.safetensors"}}', b'{"weight_map": {}}', b"{}", b"[]", b"no"],
)
def test_an_index_of_others_is_not_removed(
    index: bytes, hub: Hub, first: dict[str, bytes], tmp_path: Path
) -> None:
    """Ours names our shards. With one beside it that is not ours, a single file would not load."""
    weights = {name: None for name in first if name.endswith(".safetensors")}
    there = commit(hub, weights | {INDEX: index})
    said = refusal("quantize", "org/moe", tmp_path / "out", "--push-to", NAME)
    assert f"not this checkpoint's ({INDEX})" in said
    assert not (tmp_path / "out").exists()
    assert of_hub(hub) == there
