"""``--push-to``: what comes to the hub, what the card says, and what becomes of errors."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.filesize import decimal

from quantize.push import card, upload
from tests import hub_server
from tests.hub_server import Hub, Model, Stored, serving, use
from tests.quantize.checkpoints import contents
from tests.quantize.processes import FORKED
from tests.quantize.test_cli import refusal, run
from tests.quantize.user_files import tree

NAME = "me/moe-NVFP4"
OPTIONS = ("--max-shard-size", "20KB")
CARD = """---
license: other
license_name: of-its-own
license_link: LICENSE
language: [en, de]
pipeline_tag: text-generation
tags:
- conversational
- moe
library_name: transformers
base_model: org/pretrained
model-index:
- name: moe
  results: []
---

# Moe

A model | of the test.
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(upload.time, "sleep", lambda _: None)
    monkeypatch.setattr(upload, "_BATCH_FILES", 3)
    with serving() as found:
        use(found, tmp_path / "cache", monkeypatch, found.token)
        yield found


@pytest.fixture
def model(hub: Hub, source: Path) -> str:
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("a license")
    return hub.publish("org/moe", source)


def of_hub(hub: Hub) -> dict[str, bytes]:
    return {path: file.read(0, file.size) for path, file in hub.models[NAME].files.items()}


def front_and_text(card: bytes) -> tuple[dict[str, object], str]:
    _, front, text = card.decode().split("---\n", 2)
    return yaml.safe_load(front), text


def test_what_comes_to_the_hub(hub: Hub, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS)
    result = run(*words, "--push-to", NAME)
    assert result.exit_code == 0, result.output
    assert f"Uploaded: {hub.url}/{NAME}" in result.stdout
    assert "private" in result.stderr
    assert hub.models[NAME].private
    there, here = of_hub(hub), contents(out)
    left = {"nvfp4_moe_report.html", "nvfp4_moe_report.json", "README.md"}
    own = {path: content for path, content in here.items() if path not in left}
    assert {path: there[path] for path in own} == own
    assert there.keys() == own.keys() | left | {".gitattributes"}
    assert here["README.md"].decode() == CARD
    assert not [file for file in out.rglob("*") if file.name.startswith(".")]
    fields, text = front_and_text(there["README.md"])
    assert fields == {
        "license": "other",
        "license_name": "of-its-own",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "base_model": "org/moe",
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "tags": ["conversational", "moe", "nvfp4", "fp4", "modelopt", "vllm"],
    }
    report = json.loads((out / "nvfp4_moe_report.json").read_text())
    for expected in (
        "# moe-NVFP4\n",
        f"`{model}`",
        f"`nvfp4-moe quantize org/moe DST --max-shard-size 20KB --revision {model}`",
        f"vllm-nvfp4-moe {report['versions']['vllm-nvfp4-moe']}",
        "layout `modelopt`, scales `mse`",
        f"vllm serve {NAME} --quantization nvfp4_moe",
        f"without the plugin, too: `vllm serve {NAME}`",
        "# Moe\n\nA model | of the test.",
    ):
        assert expected in text
    assert text.index("How to serve it") < text.index("# Moe\n")
    assert str(tmp_path) not in text
    # What is on the hub is whole: verify takes it, beside SRC and alone.
    folder = tmp_path / "again"
    folder.mkdir()
    for path, content in there.items():
        (folder / path).write_bytes(content)
    for words in ((folder,), ("org/moe", folder)):
        result = run("verify", *words)
        assert result.exit_code == 0, result.output
    for name in left:
        assert str(tmp_path) not in there[name].decode()
    (folder / "README.md").unlink()  # it is not the checkpoint's
    assert run("verify", "org/moe", folder).exit_code == 0
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in run("verify", "org/moe", folder).output


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("silu", f"vLLM reads it without the plugin, too: `vllm serve {NAME}`."),
        ("swiglu_oai(limit=7)", "whether it then applies this gate depends on its class"),
        ("silu(post_norm)", "vLLM does not load it without the plugin"),
    ],
)
def test_what_serves_it(gate: str, said: str) -> None:
    """vLLM's class for Muse Spark stops at a tensor of one expert (models/muse_spark/common)."""
    made: Any = SimpleNamespace(report=SimpleNamespace(layers=[SimpleNamespace(gate=gate)]))
    text = card._serving(made, NAME)
    assert said in text and f"vllm serve {NAME} --quantization nvfp4_moe" in text
    assert ("--moe-backend marlin" in text) == ("post_norm" in gate)


def test_config_and_card_come_last(hub: Hub, model: str, tmp_path: Path) -> None:
    """Nothing takes what is there before for a model."""
    assert run("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME).exit_code == 0
    *before, last = list(hub.models[NAME].commits.values())
    assert len(before) > 2
    for files in before:
        assert not {"config.json", "README.md"} & files.keys()
    assert {"config.json", "README.md"} <= last.keys()


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


def test_how_far_an_upload_is(hub: Hub, model: str, tmp_path: Path) -> None:
    """Where there is no terminal: lines, in the log too; with ``--quiet`` there alone."""
    out, log = tmp_path / "out", tmp_path / "run.log"
    words = ("quantize", "org/moe", out, *OPTIONS, "--push-to", NAME)
    assert run(*words[:-2]).exit_code == 0
    result = run(*words, "--log-file", log)
    nbytes = sum(
        file.stat().st_size
        for file in out.iterdir()
        if file.name not in ("README.md", "nvfp4_moe_report.html", "nvfp4_moe_report.json")
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("Uploading: ")]
    assert lines[0] == f"Uploading: 0 bytes of {decimal(nbytes)}, 0%"
    assert lines[-1].startswith(f"Uploading: {decimal(nbytes)} of {decimal(nbytes)}, 100%, ")
    assert all(line in log.read_text() for line in lines)
    log.unlink()
    result = run(*words, "--log-file", log, "--quiet")
    assert result.exit_code == 0 and result.output == ""
    assert "Uploading: " in log.read_text()


def test_figures_of_an_evaluation(hub: Hub, model: str, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "result.json"
    words = ("quantize", "org/moe", out, *OPTIONS)
    assert run(*words).exit_code == 0
    time.sleep(0.01)
    found = {
        "perplexity": {"source": 7.676, "target": 7.701, "change_percent": 0.33},
        "kl": {"mean": 0.0072, "standard_error": 0.0001},
        "top1_agreement": 0.9512,
        "text": "/home/somebody/wiki.txt",
        "samples": 32,
        "length": 2048,
        "activations": "bf16",
        "dtype": "bfloat16",
        "seconds": 90.0,
    }
    file.write_text(json.dumps(found))
    result = run(*words, "--push-to", NAME, "--evaluation", file)
    assert result.exit_code == 0, result.output
    _, text = front_and_text(of_hub(hub)["README.md"])
    assert "| perplexity | 7.676 before, 7.701 after (+0.33 %) |" in text
    assert "0.00720 nats a token" in text
    assert "95.12%" in text
    assert "wiki.txt" in text
    assert "somebody" not in text
    for wrong, expected in (
        ("{}", "is not what evaluate --json prints"),
        ("[]", "is not what evaluate --json prints"),
        ("no", "--evaluation"),
    ):
        file.write_text(wrong)
        assert expected in refusal(*words, "--push-to", NAME, "--evaluation", file)
    snapshots = "/home/somebody/hub/models--org--moe/snapshots"
    file.write_text(json.dumps(found | {"source": f"{snapshots}/{'0' * 40}"}))
    said = refusal(*words, "--push-to", NAME, "--evaluation", file)
    assert f"with org/moe@{'0' * 40}, and it was made of org/moe@{model}" in said
    file.write_text(json.dumps(found | {"source": f"{snapshots}/{model}"}))
    assert run(*words, "--push-to", NAME, "--evaluation", file).exit_code == 0
    older = tmp_path / "older.json"
    older.write_text(json.dumps(found))
    os.utime(older, (1, 1))
    said = refusal(*words, "--push-to", NAME, "--evaluation", older)
    assert "older than DST" in said
    assert "--evaluation" in refusal(*words, "--evaluation", file, code=2)
    new = ("quantize", "org/moe", tmp_path / "new", "--push-to", NAME, "--evaluation", file)
    assert "quantize, evaluate, then" in refusal(*new, code=2)
    assert not (tmp_path / "new").exists()


def test_what_is_not_pushed(hub: Hub, model: str, source: Path, tmp_path: Path) -> None:
    """Before anything is computed: over SRC, over another model, without a token; and what another
    command has made."""
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS)
    assert "is SRC" in refusal(*words, "--push-to", "org/moe", code=2)
    assert "ORG/NAME" in refusal(*words, "--push-to", "name", code=2)
    hub.publish("me/other", source)
    said = refusal(*words, "--push-to", "me/other")
    assert "holds another model" in said or "are not this checkpoint's" in said
    (source / "model.safetensors").unlink()
    hub.publish("me/other", source)
    assert "holds another model" in refusal(*words, "--push-to", "me/other")
    hub.refused["me/forbidden"] = 403, ""
    assert "hf auth login" in refusal(*words, "--push-to", "me/forbidden")
    assert not out.exists()
    assert not [line for line in hub.requests if line.startswith("HEAD") and "safetensors" in line]
    assert run(*words).exit_code == 0
    said = refusal(*words, "--scales", "max", "--push-to", NAME)
    assert "was made by another command" in said
    assert NAME not in hub.models
    (out / "hf_quant_config.json").unlink()
    assert "hf_quant_config.json is missing" in refusal(*words, "--push-to", NAME)


def test_weights_of_the_same_name_are_not_replaced(hub: Hub, source: Path, tmp_path: Path) -> None:
    """Without a config beside them, which says whose they are, they are somebody's."""
    precious = {"model.safetensors": Stored(b"precious" * 1000), "README.md": Stored(b"by hand")}
    hub.models["me/theirs"] = Model()
    hub.models["me/theirs"].commit(precious)
    words = ("quantize", source, tmp_path / "out", "--push-to", "me/theirs")
    assert "holds another model" in refusal(*words)
    assert not (tmp_path / "out").exists()
    assert run(*words[:3]).exit_code == 0
    assert "holds another model" in refusal(*words)
    assert hub.models["me/theirs"].files == precious


def test_another_model_of_ours_is_not_replaced(
    hub: Hub, model: str, source: Path, tmp_path: Path
) -> None:
    words = ("quantize", "org/moe", tmp_path / "out", "--push-to", NAME)
    assert run(*words).exit_code == 0
    before = of_hub(hub)
    hub.publish("org/another", source)
    said = refusal("quantize", "org/another", tmp_path / "another", "--push-to", NAME)
    assert "made of org/moe" in said
    assert not (tmp_path / "another").exists()
    assert of_hub(hub) == before


def test_an_update_that_breaks_leaves_no_model(hub: Hub, model: str, tmp_path: Path) -> None:
    """Its weights are then of two versions."""
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    assert run(*words).exit_code == 0
    whole = of_hub(hub)
    assert run(*words).exit_code == 0  # the same once more: it stays a model all the time
    assert all("config.json" in files for files in list(hub.models[NAME].commits.values())[-3:])
    parts = [0]

    def before(request: str) -> None:
        if request.startswith("POST") and "/commit/" in request:
            parts[0] += 1
            hub.fail_commits = 100 * (parts[0] > 1)

    hub.before = before
    other = (*words, "--scales", "max", "--overwrite")
    assert "is complete, but" in refusal(*other)
    there = of_hub(hub)
    assert there != whole
    assert "config.json" not in there
    hub.before, hub.fail_commits = (lambda _: None), 0
    result = run(*other[:-1])
    assert result.exit_code == 0, result.output
    here = contents(tmp_path / "out")
    assert {
        p: c for p, c in of_hub(hub).items() if p.endswith((".safetensors", "config.json"))
    } == {p: c for p, c in here.items() if p.endswith((".safetensors", "config.json"))}


@pytest.mark.parametrize(
    ("readme", "fields", "text"),
    [
        (None, {}, None),
        ("# No front matter\n", {}, "# No front matter"),
        ("---\nlicense: mit\n", {}, "license: mit"),
        ("---\n: [broken\n---\n# Below\n", {}, "# Below"),
        ("---\n- a list\n---\n# Below\n", {}, "# Below"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n# Below\r\n", {"license": "mit"}, "# Below"),
        ("---\nlicense: mit\ntags: one\n---\n", {"license": "mit"}, None),
    ],
)
def test_cards_of_all_kinds(
    readme: str | None,
    fields: dict[str, str],
    text: str | None,
    hub: Hub,
    source: Path,
    tmp_path: Path,
) -> None:
    """A folder as SRC, with another card or none: the base is then not known."""
    if readme is not None:
        (source / "README.md").write_text(readme, encoding="utf-8", newline="")
    words = ("quantize", source, tmp_path / "out", *OPTIONS, "--push-to", NAME)
    result = run(*words)
    assert result.exit_code == 0, result.output
    found, below = front_and_text(of_hub(hub)["README.md"])
    ours = {"library_name": "vllm", "tags": ["nvfp4", "fp4", "moe", "modelopt", "vllm"]}
    assert found == fields | ours
    assert text is None or text in below
    assert ("made of" in below) == (text is not None)
    assert str(tmp_path) not in below
    assert "`nvfp4-moe quantize SRC DST --max-shard-size 20KB`" in below


# -- who may, and what is there already ------------------------------------------------------------


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


@pytest.mark.parametrize("status", [307, 308])
def test_a_repository_that_has_another_name_now(
    status: int, hub: Hub, model: str, tmp_path: Path
) -> None:
    """The hub forwards what comes under the old one, until a new one of that name is made."""
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS)
    assert run(*words, "--push-to", NAME).exit_code == 0
    hub.models[NAME].commit({"nvfp4_moe_report.json": Stored(of_hub(hub)["nvfp4_moe_report.json"])})
    hub.renamed = {"me/old": (NAME, status)}
    result = run(*words, "--push-to", "me/old")
    assert result.exit_code == 0, result.output
    assert "me/old" not in hub.models
    assert "private" not in result.stderr
    assert contents(out).keys() <= of_hub(hub).keys()


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


UPDATES = {
    "another layout": ("hf_quant_config.json", ("--layout", "compressed-tensors", *OPTIONS)),
    "one file, after its weights were deleted": ("model.safetensors.index.json", ()),
    "a file that SRC has no longer": ("chat_template.jinja", OPTIONS),
}


@pytest.mark.parametrize("breaks", [False, True], ids=["whole", "breaks"])
@pytest.mark.parametrize("update", UPDATES)
def test_an_update_leaves_nothing_of_the_version_before(
    update: str, breaks: bool, hub: Hub, model: str, source: Path, tmp_path: Path
) -> None:
    """An engine would read it: an index names files that are gone, a template goes before another.
    What others have put there stays."""
    gone, options = UPDATES[update]
    (source / "chat_template.jinja").write_text("of the first version")
    hub.publish("org/moe", source)
    first = ("quantize", "org/moe", tmp_path / "first", *OPTIONS, "--push-to", NAME)
    assert run(*first).exit_code == 0
    assert gone in of_hub(hub)
    kept = {"notes.txt": b"theirs", "images/plot.png": b"theirs"}
    files = hub.models[NAME].files | {name: Stored(content) for name, content in kept.items()}
    if not options:
        files = {name: f for name, f in files.items() if not name.endswith(".safetensors")}
    hub.models[NAME].commit(files)
    if gone == "chat_template.jinja":
        (source / gone).unlink()
        hub.publish("org/moe", source)
    words = ("quantize", "org/moe", tmp_path / "second", *options, "--push-to", NAME)
    if breaks:
        parts = [0]

        def before(request: str) -> None:
            parts[0] += request.startswith("POST") and "/commit/" in request
            hub.fail_commits = 100 * (parts[0] > 1)

        hub.before = before
        assert "is complete, but" in refusal(*words)
        assert gone not in of_hub(hub)
        hub.before, hub.fail_commits = (lambda _: None), 0
    result = run(*words)
    assert result.exit_code == 0, result.output
    whole = ("quantize", "org/moe", tmp_path / "second", *options, "--push-to", "me/fresh")
    assert run(*whole).exit_code == 0
    assert of_hub(hub).keys() == hub.models["me/fresh"].files.keys() | kept.keys()
    assert {name: of_hub(hub)[name] for name in kept} == kept
    folder = tmp_path / "again"
    for path, content in of_hub(hub).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    assert run("verify", "org/moe", folder).exit_code == 0


def test_an_index_of_nobodys_is_not_kept_beside_one_file(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    """Engines would look for what it names."""
    index = {"model.safetensors.index.json": Stored(b'{"weight_map": {"a": "old.safetensors"}}')}
    hub.models[NAME] = Model()
    hub.models[NAME].commit(index)
    said = refusal("quantize", source, tmp_path / "out", "--push-to", NAME)
    assert "not this checkpoint's (model.safetensors.index.json)" in said
    assert not (tmp_path / "out").exists()
    assert hub.models[NAME].files == index


def test_what_is_replaced_is_said(hub: Hub, model: str, tmp_path: Path) -> None:
    """A card and a license that somebody has written, before the work begins."""
    theirs = {"README.md": Stored(b"by hand"), "LICENSE": Stored(b"mit"), "a.txt": Stored(b"a")}
    hub.models[NAME] = Model()
    before = hub.models[NAME].commit(theirs)
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--push-to", NAME)
    result = run(*words)
    assert result.exit_code == 0
    said = f"{NAME} on the hub has README.md, LICENSE: replaced, and kept in its history"
    assert said in result.stderr.split("Quantizing")[0]
    assert hub.models[NAME].commits[before] == theirs
    assert of_hub(hub)["a.txt"] == b"a"
    assert "replaced" not in run(*words).stderr  # they are ours now


@pytest.mark.parametrize("report", [b"{}", b"[]", b"\xff", b"no", b'{"version": 99}'])
def test_a_report_that_cannot_be_read(report: bytes, hub: Hub, model: str, tmp_path: Path) -> None:
    """Neither there nor here; which file it is, and what to do."""
    hub.models[NAME] = Model()
    hub.models[NAME].commit({"nvfp4_moe_report.json": Stored(report)})
    out = tmp_path / "out"
    said = refusal("quantize", "org/moe", out, *OPTIONS, "--push-to", NAME)
    assert f"{NAME}/nvfp4_moe_report.json on the hub cannot be read" in said
    assert "choose another name, or delete what is there" in said
    assert not out.exists()
    assert run("quantize", "org/moe", out, *OPTIONS).exit_code == 0
    (out / "nvfp4_moe_report.json").write_bytes(report)
    said = refusal("quantize", "org/moe", out, *OPTIONS, "--push-to", "me/another")
    assert f"{out / 'nvfp4_moe_report.json'}: " in said and "--overwrite" in said
    assert "me/another" not in hub.models


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "config.json"])
def test_what_was_edited_is_not_uploaded(name: str, hub: Hub, model: str, tmp_path: Path) -> None:
    """The report that goes with it says how it was, and `verify` would refuse it."""
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS)
    assert run(*words).exit_code == 0
    was = (out / name).read_bytes()
    (out / name).write_bytes(was + b"\n")
    said = refusal(*words, "--push-to", NAME)
    assert f"{out / name} was changed since it was written" in said
    assert ("quantize again" if name == "config.json" else "copy SRC's again") in said
    assert "is complete" not in said
    assert NAME not in hub.models
    assert run("verify", out).exit_code == 1
    (out / name).write_bytes(was)
    (out / "README.md").write_text("a text of my own")  # it comes into the card as it is here
    (out / "notes.txt").write_text("and this is not the checkpoint's")
    assert run(*words, "--push-to", NAME).exit_code == 0
    assert b"a text of my own" in of_hub(hub)["README.md"]
    assert "notes.txt" not in of_hub(hub)


def test_a_branch_is_a_commit_on_the_card(hub: Hub, model: str, tmp_path: Path) -> None:
    words = ("quantize", "org/moe", tmp_path / "out", "--revision", "main", "--scales", "max")
    assert run(*words, "--push-to", NAME).exit_code == 0
    _, text = front_and_text(of_hub(hub)["README.md"])
    assert f"--revision {model}" in text and "--revision main" not in text
    assert "--revision main" not in of_hub(hub)["nvfp4_moe_report.json"].decode()


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
