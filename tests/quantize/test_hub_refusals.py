"""Models on the hub that cannot be read, or not at once: what is said, and what is tried again."""

import json
from pathlib import Path

import pytest

from tests.hub_server import Hub
from tests.quantize.hub_models import hub, in_shards
from tests.quantize.test_cli import refusal, run

__all__ = ["hub"]  # a fixture


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "accept its terms on its page there"),
        (401, "GatedRepo", "accept its terms on its page there"),
        (401, "RepoNotFound", "check the name"),
        (404, "RepoNotFound", "check the name"),
        (418, "", "418"),
        (401, "", "correct HF_TOKEN"),
        (403, "", "correct HF_TOKEN"),
        (429, "", "try again later"),
        (500, "", "try again later"),
        (503, "", "try again later"),
    ],
)
def test_a_model_that_cannot_be_read(
    status: int, code: str, expected: str, hub: Hub, source: Path
) -> None:
    hub.publish("org/moe", source)
    hub.refused["org/moe"] = status, code
    said = refusal("inspect", "org/moe")
    assert "org/moe is not a folder here, and reading it from the hub failed" in said
    assert expected in said


PAGE = "text/html", b"<html><title>Log in to the proxy</title></html>"


@pytest.mark.parametrize(
    "answer",
    [PAGE, ("application/json", b'{"error": "sorry"}'), ("application/json", b"[1]")],
    ids=["a page", "an object", "a list"],
)
@pytest.mark.parametrize("asked", ["GET /api/models/org/moe", "GET /api/models/org/moe/tree/.*"])
def test_what_answers_is_no_hub(
    asked: str, answer: tuple[str, bytes], hub: Hub, source: Path
) -> None:
    """A proxy that wants to be logged in to, say, with status 200."""
    hub.publish("org/moe", source)
    hub.instead[asked] = answer
    said = refusal("inspect", "org/moe")
    assert "org/moe is not a folder here, and reading it from the hub failed" in said
    assert said.endswith("; what answered is not the hub, but a proxy or a login page: look at "
                         "HF_ENDPOINT")  # fmt: skip


@pytest.mark.parametrize("asked", ["HEAD /org/moe/resolve/.*", "GET /org/moe/resolve/.*safetens.*"])
def test_a_page_in_place_of_a_file(asked: str, hub: Hub, source: Path) -> None:
    hub.publish("org/moe", source)
    hub.instead[asked] = PAGE
    said = refusal("inspect", "org/moe")
    assert "config.json is missing the 'X-Repo-Commit' header" in said or (
        "model.safetensors: the hub lists" in said
    )


@pytest.mark.parametrize("token", ["hf_abcdefghijkl", "another-secret", "hf_s\xe9cret"])
@pytest.mark.parametrize("what", ["inspect", "push"])
def test_secrets_are_in_no_message(
    what: str, token: str, hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, passwords in addresses, signatures: whatever the client says of them."""
    hub.publish("org/moe", source)
    monkeypatch.setenv("HF_TOKEN", token)
    log = tmp_path / "log"
    signed = "https://me:password@cdn.hub/file?X-Amz-Signature=abc123&Expires=1"

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError(f"no answer from '{signed}' to Authorization: Bearer {token}")

    if what == "inspect":
        monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
        said = refusal("inspect", "org/moe")
    else:
        monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", fails)
        words = ("quantize", source, tmp_path / "out", "--push-to", "me/moe", "--log-file", log)
        said = refusal(*words) + log.read_text()
    assert not [s for s in (token, "password", "abc123", "Expires") if s in said], said
    if token.isascii() or what == "push":
        assert "no answer from 'https://cdn.hub/file?…'" in said
    else:
        assert "the token that HF_TOKEN or `hf auth login` gave is none" in said


def test_weights_that_are_gated_though_the_list_is_not(hub: Hub, source: Path) -> None:
    """As the hub does it: anyone may see which files there are."""
    hub.publish("org/moe", source)
    for name in ("config.json", "model.safetensors"):
        hub.refused[name] = 403, "GatedRepo"
        assert "accept its terms" in refusal("inspect", "org/moe")
        del hub.refused[name]


def test_connections_that_break(hub: Hub, source: Path) -> None:
    """Within headers: they are read again, up to five times."""
    hub.publish("org/moe", source)
    expected = run("inspect", source, "--json").stdout
    hub.cut["model.safetensors"] = [0, 3, 8, 500]
    result = run("inspect", "org/moe", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    same = {"source": "", "revision": ""}
    assert found | same == json.loads(expected) | same
    assert not hub.cut["model.safetensors"]
    hub.cut["model.safetensors"] = [5] * 5
    assert "reading it from the hub failed" in refusal("inspect", "org/moe")


def test_a_server_that_always_says_later(hub: Hub, source: Path) -> None:
    """The client asks six times, half a minute; that is not multiplied by our own tries."""
    hub.publish("org/moe", source)
    hub.refused["model.safetensors"] = 429, ""
    assert "429" in refusal("inspect", "org/moe")
    assert 1 < len([r for r in hub.requests if "model.safetensors" in r and "GET" in r]) <= 6


def test_a_model_without_a_config(hub: Hub, source: Path, tmp_path: Path) -> None:
    """As those in GGUF are: it is no file of the cache's that is missing."""
    (source / "config.json").unlink()
    hub.publish("org/moe", source)
    for words in (("inspect", "org/moe"), ("quantize", "org/moe", tmp_path / "out", "--stream")):
        said = refusal(*words)
        assert "org/moe on the hub has no config.json at main" in said and "cache" not in said
    assert not hub.sent


@pytest.mark.parametrize("lacks", ["a file of the index", "safetensors"])
def test_weights_that_the_hub_lacks(lacks: str, hub: Hub, source: Path, tmp_path: Path) -> None:
    """To download it again is of no use, nor is the cache's folder."""
    folder = in_shards(source, tmp_path / "model", 3)
    if lacks == "safetensors":
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
    else:
        (folder / "model-00002-of-00003.safetensors").unlink()
    hub.publish("org/moe", folder)
    for words in (("inspect",), ("quantize", tmp_path / "out"), ("verify", tmp_path)):
        said = refusal(words[0], "org/moe", *words[1:])
        assert said.startswith("error: org/moe on the hub, at main, ")
        assert "cache" not in said and "download" not in said
        expected = {"safetensors": "holds no *.safetensors files"}
        assert expected.get(lacks, "names model-00002-of-00003.safetensors, which the hub") in said
