"""``--push-to`` into a repository that has something: another model, or an earlier version."""

from pathlib import Path

import pytest

from tests.hub_server import Hub, Model, Stored
from tests.quantize.checkpoints import contents
from tests.quantize.pushes import NAME, OPTIONS, hub, model, of_hub
from tests.quantize.test_cli import refusal, run

__all__ = ["hub", "model"]  # fixtures


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
