"""``--push-to``: a hub that does not answer, or refuses; and what of an upload goes on by the same
command."""

import os
import signal
import threading
from pathlib import Path

import pytest

from quantize.push import upload
from tests import hub_server
from tests.hub_server import Hub, Model, Stored, use
from tests.quantize.processes import FORKED
from tests.quantize.pushes import NAME, OPTIONS, hub, model, of_hub
from tests.quantize.test_cli import refusal, run
from tests.quantize.user_files import tree

__all__ = ["hub", "model"]  # fixtures


@pytest.mark.parametrize("fault", ["commits", "weights", "token"])
def test_an_upload_that_fails(
    fault: str, hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is complete all the same, and the same command goes on: it quantizes nothing,
    asks SRC for nothing, and sends what is not there yet."""
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS, "--push-to", NAME)
    parts = [0]

    def before(request: str) -> None:
        if request.startswith("POST") and "/commit/" in request:
            parts[0] += 1
            if parts[0] == 2:
                if fault == "commits":
                    hub.fail_commits = 100
                elif fault == "weights":
                    hub.refused[NAME] = 503, ""
                else:
                    hub.token = "another"

    hub.before = before
    said = refusal(*words)
    assert f"{out} is complete, but uploading to {NAME} failed" in said
    assert "goes on with the upload" in said
    assert ("hf auth login" in said) == (fault == "token")
    assert "config.json" not in of_hub(hub)
    assert run("verify", "org/moe", out).exit_code == 0
    state = tree(out)
    hub.before, hub.fail_commits, hub.token = (lambda _: None), 0, "hf_secret"
    hub.refused.clear()
    hub.requests.clear()
    puts = len(hub.uploaded)
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert tree(out) == state
    assert "config.json" in of_hub(hub)
    assert not [line for line in hub.requests if "org/moe" in line]
    sent = [line for line in hub.requests if line.startswith("PUT")]
    assert len(sent) == len(hub.uploaded) - puts  # nothing twice
    # And once more: nothing is sent at all.
    hub.requests.clear()
    commits = len(hub.models[NAME].commits)
    assert run(*words).exit_code == 0
    assert not [line for line in hub.requests if line.startswith("PUT")]
    assert commits <= len(hub.models[NAME].commits)


def test_passing_errors_are_tried_again(hub: Hub, model: str, tmp_path: Path) -> None:
    hub.fail_commits = 2
    result = run("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    assert result.exit_code == 0, result.output
    assert "config.json" in of_hub(hub)


AGAIN = {
    "another commit came": (409, {}, 1),
    "so that the parent is another": (412, {}, 1),
    "a server that cannot": (502, {}, 1),
    "too many, and when": (429, {"Retry-After": "90"}, 90),
    "too many by the hub's own header": (429, {"RateLimit": '"api";r=0;t=52'}, 52),
    "a date, which is not read": (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1),
}


@pytest.mark.parametrize("why", AGAIN)
def test_commits_that_are_tried_again(
    why: str, hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the hub asks for it, else soon; what is there is not sent again."""
    status, headers, pause = AGAIN[why]
    waited: list[float] = []
    monkeypatch.setattr(upload.time, "sleep", waited.append)
    hub.refuse_commits = [(status, headers)]
    result = run("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    assert result.exit_code == 0, result.output
    assert waited == [pause]
    assert ("trying again in" in result.stderr) == (pause > 30)
    assert {"config.json", "README.md"} <= of_hub(hub).keys()
    sent = [line for line in hub.requests if line.startswith("PUT")]
    assert len(sent) == len(set(sent)) == len(hub.uploaded)


def test_a_hub_that_wants_to_be_asked_tomorrow(
    hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(upload.time, "sleep", waited.append)
    hub.refuse_commits = [(429, {"Retry-After": "86400"})]
    said = refusal("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    assert "is complete, but uploading" in said and "; try again later; the same command" in said
    assert waited == []


def test_what_the_hub_itself_refuses_is_no_proxys(hub: Hub, model: str, tmp_path: Path) -> None:
    """The client makes a ValueError of a bad request, and of a card that the hub does not take."""
    hub.refuse_commits = [(400, {})]
    said = refusal("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    assert "is complete, but uploading" in said and "400" in said
    assert "proxy" not in said and "HF_ENDPOINT" not in said


PAGES = ("/api/repos/create", ".*/preupload/main", ".*/batch", ".*/commit/main")


@pytest.mark.parametrize("asked", PAGES)
def test_a_page_in_place_of_the_hub(asked: str, hub: Hub, model: str, tmp_path: Path) -> None:
    """A proxy's, with status 200: nothing is taken for uploaded, and it is said what it is."""
    out = tmp_path / "out"
    assert run("quantize", "org/moe", out, *OPTIONS).exit_code == 0
    hub.instead[f"POST {asked}"] = "text/html", b"<html>log in</html>"
    said = refusal("quantize", "org/moe", out, *OPTIONS, "--push-to", NAME)
    assert "what answered is not the hub, but a proxy or a login page: look at HF_ENDPOINT" in said
    assert "Uploaded" not in said
    hub.instead.clear()
    assert run("quantize", "org/moe", out, *OPTIONS, "--push-to", NAME).exit_code == 0
    assert "config.json" in of_hub(hub)


@pytest.mark.parametrize("private", [False, True], ids=["public", "private"])
def test_a_token_that_may_only_read(
    private: bool, hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repository that is there the client says that it was made, whoever asks."""
    hub.models[NAME] = Model(private=private)
    hub.models[NAME].commit({"notes.txt": Stored(b"theirs")})
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    said = refusal(*words)
    assert f"uploading to {NAME} failed" in said and "403" in said
    assert "log in with `hf auth login`, with a token that may write there" in said
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert of_hub(hub) == {"notes.txt": b"theirs"}
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert run(*words).exit_code == 0
    assert "notes.txt" in of_hub(hub)


def test_a_quota_that_is_full(hub: Hub, model: str, tmp_path: Path) -> None:
    """The hub's answer is that to a token which may not write; who gave it may."""
    hub.refuse_commits = [(403, {})]
    said = refusal("quantize", "org/moe", tmp_path / "out", "--push-to", NAME)
    assert "may write there, unless the hub has another reason, such as a full quota" in said


def test_a_hub_that_does_not_say_who_may(
    hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = [route for route in hub_server._ROUTES if "auth-check" not in route[0]]
    assert len(routes) < len(hub_server._ROUTES)
    monkeypatch.setattr(hub_server, "_ROUTES", routes)
    assert run("quantize", "org/moe", tmp_path / "out", "--push-to", NAME).exit_code == 0


def test_a_commit_whose_answer_is_lost(hub: Hub, model: str, tmp_path: Path) -> None:
    """It is tried again, though it was made; what it took away is gone then."""
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    assert run(*words).exit_code == 0
    hub.lost_answers = 1
    result = run(*words, "--layout", "compressed-tensors", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "config.json" in of_hub(hub) and "hf_quant_config.json" not in of_hub(hub)


def _push(url: str, cache: str, words: list[str]) -> None:
    """In a process of its own."""
    hub = Hub(url=url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload, "_BATCH_FILES", 3)
        use(hub, Path(cache), patch, hub.token)
        os._exit(run(*words).exit_code)


@pytest.mark.parametrize("at", [2, 6, 9, 12, 15, 18])
def test_a_kill_during_an_upload(at: int, hub: Hub, model: str, tmp_path: Path) -> None:
    """At the ``at``-th request, while an earlier version is replaced: until the last commit nothing
    there is a model, and the same command makes it whole."""
    first = ("quantize", "org/moe", tmp_path / "first", *OPTIONS, "--push-to", NAME)
    assert run(*first).exit_code == 0
    words = ["quantize", "org/moe", str(tmp_path / "out"), *OPTIONS]
    words += ["--layout", "compressed-tensors"]
    assert run(*words).exit_code == 0
    before = of_hub(hub)
    count, killed = [0], threading.Event()

    def kill(_: str) -> None:
        count[0] += 1
        if count[0] == at:
            killed.set()
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]

    hub.before = kill
    arguments = (hub.url, str(tmp_path / "cache"), [*words, "--push-to", NAME])
    process = FORKED.Process(target=_push, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and killed.is_set()
    hub.before = lambda _: None
    assert of_hub(hub) == before or "config.json" not in of_hub(hub)
    result = run(*words, "--push-to", NAME)
    assert result.exit_code == 0, result.output
    assert run(*words, "--push-to", "me/fresh").exit_code == 0
    fresh = {path: f.read(0, f.size) for path, f in hub.models["me/fresh"].files.items()}
    assert of_hub(hub).keys() == fresh.keys()
    del fresh["README.md"]  # which has the name
    assert {path: of_hub(hub)[path] for path in fresh} == fresh
