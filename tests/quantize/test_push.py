"""``--push-to``: what comes to the hub, what the card says, and what becomes of errors."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.filesize import decimal

from quantize.push import card, upload
from tests.hub_server import Hub, Model, Stored, serving, use
from tests.quantize.checkpoints import contents
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
