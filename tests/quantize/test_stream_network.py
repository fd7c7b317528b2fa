"""``--stream`` where networks and servers fail: what is made up for, and what is one error."""

import json
import re
import time
from pathlib import Path

import huggingface_hub
import pytest

from quantize.checkpoint import streamed
from tests.hub_server import Hub
from tests.quantize.streams import FILES, OPTIONS, expected, hub, model, without_revision
from tests.quantize.test_cli import refusal, run

__all__ = ["expected", "hub", "model"]  # fixtures


@pytest.mark.parametrize("fault", ["cut", "short", "long", "other", "again"])
def test_what_networks_and_servers_do(
    fault: str, hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Cut connections, files of another size or content than listed: once, and each is made up
    for; always, and it is one error that names the file, after which the run can go on."""
    name = f"model-00003-of-{FILES:05d}.safetensors"
    file = hub.models["org/moe"].files[name]
    whole = file.content
    assert isinstance(whole, bytes)
    file.digest  # noqa: B018  (what is listed: of what it should be)
    wrong = {
        "short": whole[:-7],
        "long": whole + b"more",
        "other": whole[:-7] + bytes(7),
        "again": whole[:-7] + bytes(7),
    }
    times = [0]

    def before(request: str) -> None:
        if request == f"GET /org/moe/resolve/{commit}/{name}":
            times[0] += 1
            if fault != "cut" and times[0] > 1:  # the first is for the header
                file.content = wrong[fault] if fault == "again" or times[0] == 2 else whole

    commit = hub.models["org/moe"].branches["main"]
    hub.before = before
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS, "--stream")
    if fault == "cut":
        hub.cut[name] = [20_000, 0, 1000, 2000, 0]
    if fault == "again":
        said = refusal(*words)
        assert f"org/moe/{name}: what came is not what the hub lists" in said
        assert not (out / "config.json").exists()
        assert (out / ".nvfp4_moe" / "run.json").exists()
        assert not (out / ".nvfp4_moe" / "source" / name).exists()
        file.content = whole
        hub.before = lambda _: None
        words = (*words, "--resume")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert times[0] > 2
    assert without_revision(out) == expected


def test_a_list_that_does_not_say_what_is_in_lfs(
    hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """As a mirror's may be. Its hash is then that of git's pointer, and still tells one content
    from another."""
    hub.lists_lfs = False
    name = f"model-00003-of-{FILES:05d}.safetensors"
    file = hub.models["org/moe"].files[name]
    assert isinstance(file.content, bytes) and file.large
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--stream")
    assert run(*words).exit_code == 0
    assert without_revision(tmp_path / "out") == expected
    file.digest  # noqa: B018  (what is listed: of what it should be)
    file.content = file.content[:-7] + bytes(7)
    said = refusal("quantize", "org/moe", tmp_path / "other", *OPTIONS, "--stream")
    assert said.startswith(f"error: org/moe/{name}: what came is not what the hub lists")


REFUSALS = {
    "accept its terms on its page there": (403, "GatedRepo"),
    "check the name, and if it is private": (404, "RepoNotFound"),
    "if it is private log in with `hf auth login`": (401, "RepoNotFound"),
    "log in with `hf auth login`, and correct HF_TOKEN": (403, ""),
}


@pytest.mark.parametrize("to_do", REFUSALS)
def test_a_hub_that_says_no(to_do: str, hub: Hub, model: Path, tmp_path: Path) -> None:
    """In the middle: it is not asked again and again, and nobody waits. What was done is not lost,
    and the message says so."""
    name = f"model-00009-of-{FILES:05d}.safetensors"
    out = tmp_path / "out"

    def before(request: str) -> None:
        if "HEAD" in request and name in request:
            hub.refused["org/moe"] = REFUSALS[to_do]

    hub.before = before
    start = time.monotonic()
    said = refusal("quantize", "org/moe", out, *OPTIONS, "--stream")
    # Two come at a time, and either may be told first.
    assert re.search(r"org/moe/model-000\d\d-of-00014\.safetensors: ", said)
    assert "is not a folder here" not in said
    assert to_do in said and said.endswith("; then go on, by the same command with --resume")
    assert time.monotonic() - start < 20
    assert not (out / "config.json").exists()
    hub.before = lambda _: None
    hub.refused.clear()
    # Without the option, or at another commit, it is another run.
    said = refusal("quantize", "org/moe", out, *OPTIONS, "--resume")
    assert "the interrupted run was started with --stream; go on so" in said
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream", "--resume")
    assert result.exit_code == 0, result.output


def test_a_commit_that_vanishes(hub: Hub, model: Path, tmp_path: Path) -> None:
    """Its branch was written anew: what the message says to do works."""
    name = f"model-00009-of-{FILES:05d}.safetensors"
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS, "--stream")
    commits = hub.models["org/moe"].commits
    (gone,) = commits

    def before(request: str) -> None:
        if "HEAD" in request and name in request:
            commits.pop(gone, None)

    hub.before = before
    said = refusal(*words)
    assert re.search(r"org/moe/model-000\d\d-of-00014\.safetensors: ", said)
    assert said.endswith(
        f"; the hub has commit {gone} no longer: begin again with what it has now, by --overwrite"
    )
    hub.before = lambda _: None
    (model / "LICENSE").write_text("another")
    now = hub.publish("org/moe", model)
    assert now != gone
    result = run(*words, "--overwrite")
    assert result.exit_code == 0, result.output
    made = json.loads((out / "config.json").read_text())["nvfp4_moe"]["made"]
    assert made["revision"] == f"org/moe@{now}"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_a_model_that_has_another_name_now(
    when: str, status: int, hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The hub sends who asks for the old one to the new one."""
    out = tmp_path / "out"
    commit = hub.models["org/moe"].branches["main"]
    hub.models["org/new"] = hub.models["org/moe"]

    def rename(request: str = "") -> None:
        if not request or re.match("HEAD .*/model-00009-of", request):
            hub.renamed["org/moe"] = "org/new", status

    if when == "before":
        rename()
    hub.before = rename
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream")
    assert result.exit_code == 0, result.output
    assert any("org/new/resolve" in request for request in hub.requests)
    assert without_revision(out) == expected
    made = json.loads((out / "config.json").read_text())["nvfp4_moe"]["made"]
    assert made["revision"] == f"org/moe@{commit}"


XET = "Task error: File reconstruction error: CAS Client Error: "
STATUS = XET + "Request error: HTTP status client error ({}), domain: http://hub/v1/x"


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (XET + "Request middleware error: error sending request for url (http://hub/v2/x)", True),
        (XET + "Request error: error decoding response body, domain: no-url", True),
        (STATUS.format("429 Too Many Requests"), True),
        (STATUS.format("403 Forbidden"), False),
        (STATUS.format("404 Not Found"), False),
        ("Task error: File size mismatch: expected 5 bytes but downloaded 0 bytes", False),
    ],
)
def test_what_xet_says_of_networks(
    words: str,
    passes: bool,
    hub: Hub,
    model: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The true hub's large files come by it, and its errors are RuntimeErrors, whatever it was. The
    words are those of hf_xet 1.8.0 with servers that answered so, or not at all."""
    out, real, count = tmp_path / "out", huggingface_hub.hf_hub_download, [0]

    def download(*args: object, **more: object) -> object:
        count[0] += 1
        if count[0] == 9:
            raise RuntimeError(words)
        return real(*args, **more)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    command = ("quantize", "org/moe", out, *OPTIONS, "--stream")
    if passes:
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert f"{words}; trying again in" in " ".join(result.stderr.split())
        assert without_revision(out) == expected
    else:
        assert words in refusal(*command)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_says_later_for_ever(
    status: int, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait is told of, and they end some time after the last byte came."""
    monkeypatch.setattr(streamed, "_LONGEST_WAIT", 0.1)
    monkeypatch.setattr(streamed, "_PATIENCE", 0.5)
    name = f"model-00009-of-{FILES:05d}.safetensors"

    def before(request: str) -> None:
        if "HEAD" in request and name in request:
            hub.refused[name] = status, ""

    hub.before = before
    out = tmp_path / "out"
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream")
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert re.search(rf"org/moe/{name}: [^;]*\b{status} ", said)
    assert "trying again in 0.1 s, and for 0." in said and "at most if nothing comes" in said
    assert 2 <= said.count("trying again") <= 5
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: org/moe/{name}: ") and f"{status} " in last
    assert "with --resume" in last
    hub.before = lambda _: None
    hub.refused.clear()
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream", "--resume")
    assert result.exit_code == 0, result.output
    assert "trying again" not in result.output
