"""``--push-to``: what comes to the hub, and what the card says."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.filesize import decimal

from quantize.push import card
from tests.hub_server import Hub
from tests.quantize.checkpoints import contents
from tests.quantize.pushes import CARD, NAME, OPTIONS, front_and_text, hub, model, of_hub
from tests.quantize.test_cli import refusal, run

__all__ = ["hub", "model"]  # fixtures


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
