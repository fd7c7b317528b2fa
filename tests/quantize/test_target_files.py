"""A target's files that no run wrote: what is removed, what is moved aside, and that links stay."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize import execute as pipeline
from quantize.run.record import FOLDER
from quantize.run.report_files import REPORT_DATA
from tests.quantize.checkpoints import contents, convert
from tests.quantize.reference import INDEX
from tests.quantize.test_cli import refusal, run
from tests.quantize.user_files import (
    MINE,
    SIZE,
    Folders,
    interrupted,
    others_checkpoint,
    tree,
)

# -- what is removed -------------------------------------------------------------------------------


def test_overwriting_a_checkpoint_of_another_tool(
    source: Path, saved: Folders, tmp_path: Path
) -> None:
    """Its weights go, since its index names them. What would be read with the new model is moved
    aside: nobody knows whose it is. All else stays."""
    out = others_checkpoint(tmp_path / "out", saved)
    old = contents(out)
    result = run("quantize", source, out, *SIZE, "--overwrite")
    assert result.exit_code == 0, result.output
    assert "vocab.json" in result.stderr
    assert "replaced/" in result.stderr
    assert run("quantize", source, tmp_path / "fresh", *SIZE).exit_code == 0
    aside = {"config.json", INDEX, "chat_template.jinja", "vocab.json"}
    wanted = contents(tmp_path / "fresh") | MINE
    assert contents(out) == wanted | {f"replaced/{name}": old[name] for name in aside}


def test_overwriting_what_a_run_wrote_leaves_no_trace(
    source: Path, saved: Folders, tmp_path: Path
) -> None:
    """Whatever it copied too: the next model must not get its template or vocabulary."""
    first = Path(shutil.copytree(saved("mixtral"), tmp_path / "first"))
    (first / "chat_template.jinja").write_text("old")
    (first / "vocab.json").write_text("{}")
    (first / "additional_chat_templates").mkdir()
    (first / "additional_chat_templates" / "rag.jinja").write_text("old")
    out = tmp_path / "out"
    convert(first, out, "modelopt", max_shard_size=3000)
    assert (out / "additional_chat_templates" / "rag.jinja").exists()
    (out / "my_lora.safetensors").write_bytes(b"mine")
    convert(source, out, "compressed-tensors", overwrite=True, max_shard_size=12_000)
    convert(source, tmp_path / "fresh", "compressed-tensors", max_shard_size=12_000)
    assert contents(out) == contents(tmp_path / "fresh") | {"my_lora.safetensors": b"mine"}
    assert not (out / "additional_chat_templates").exists()


def test_what_a_run_wrote_is_listed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, max_shard_size=12_000)
    listed = json.loads((out / REPORT_DATA).read_text())["files"]
    assert listed == sorted(str(file.relative_to(out)) for file in out.rglob("*"))


def test_a_list_of_files_that_anyone_may_have_written(source: Path, tmp_path: Path) -> None:
    """A downloaded checkpoint's report names whatever its author likes."""
    out = tmp_path / "out"
    convert(source, out)
    (tmp_path / "outside.json").write_text("mine")
    mine = {"my_lora.safetensors": b"1", "thesis.docx": b"2", ".env": b"3", "data/a.csv": b"4"}
    for name, data in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    report = json.loads((out / REPORT_DATA).read_text())
    report["files"] += [*mine, "../outside.json", str(tmp_path / "outside.json"), 3, None, ""]
    (out / REPORT_DATA).write_text(json.dumps(report))
    convert(source, out, overwrite=True)
    found = contents(out)
    assert {name: found[name] for name in mine} == mine
    assert (tmp_path / "outside.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "chat_template.jinja", "config.json"])
def test_what_was_edited_since_is_moved_aside(name: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for made in ("README.md", "chat_template.jinja"):
        (source / made).write_text("the source's")
    convert(source, out)
    before = contents(out)
    edited = before[name] + b" "
    (out / name).write_bytes(edited)
    convert(source, out, overwrite=True)
    after = contents(out)
    assert after.pop(f"replaced/{name}") == edited
    assert after == before


def test_a_report_that_names_what_a_run_might_copy(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    mine = {"train.py": b"1", "my.model": b"2", "notes/diary.txt": b"3"}
    for name, data in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    report = json.loads((out / REPORT_DATA).read_text())
    report["files"] += list(mine)
    (out / REPORT_DATA).write_text(json.dumps(report))
    convert(source, out, overwrite=True)
    found = contents(out)
    assert {name: found[f"replaced/{name}"] for name in mine} == mine


@pytest.mark.parametrize("names", [["notes.txt", "../x.safetensors", "a/b.safetensors"], 3])
def test_an_index_that_names_what_are_no_weights(
    names: Any, source: Path, saved: Folders, tmp_path: Path
) -> None:
    out = others_checkpoint(tmp_path / "out", saved)
    (tmp_path / "x.safetensors").write_bytes(b"mine")
    (out / "a").mkdir()
    (out / "a" / "b.safetensors").write_bytes(b"mine")
    index = {"weight_map": dict(enumerate(names)) if isinstance(names, list) else names}
    (out / INDEX).write_text(json.dumps(index))
    convert(source, out, overwrite=True)
    found = contents(out)
    assert {name: found[name] for name in MINE} == MINE
    assert (out / "a" / "b.safetensors").exists()
    assert (tmp_path / "x.safetensors").exists()


def test_a_folder_that_is_no_checkpoint(source: Path, tmp_path: Path) -> None:
    """Without a config.json not even model.safetensors is known to be one."""
    out = tmp_path / "out"
    out.mkdir()
    mine = {"sdxl_vae.safetensors": b"1", "my_lora.safetensors": b"2"}
    for name, data in mine.items():
        (out / name).write_bytes(data)
    assert run("quantize", source, out, "--overwrite").exit_code == 0
    convert(source, tmp_path / "fresh")
    found = contents(out)
    index = json.loads(found.pop(INDEX))
    assert found == contents(tmp_path / "fresh") | mine
    # Without an index an engine would read all three files as one model.
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert run("verify", source, out).exit_code == 0


def test_a_file_that_has_a_new_ones_name(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"mine, without a config")
    before = tree(out)
    message = refusal("quantize", source, out, "--overwrite")
    assert f"{out / 'model.safetensors'} is there already" in message
    assert tree(out) == before


@pytest.mark.parametrize("what", ["a folder for the index", "a file for a folder"])
def test_what_would_fail_when_the_old_checkpoint_is_gone(
    what: str, source: Path, tmp_path: Path
) -> None:
    """A file that others left calls for an index, and one of the new model's files for a folder;
    what has the name is in the way, and that is said while the old checkpoint is whole."""
    out = tmp_path / "out"
    assert run("quantize", source, out).exit_code == 0
    if what == "a folder for the index":
        (out / "my_lora.safetensors").write_bytes(b"mine")
        (out / INDEX).mkdir()
        (out / INDEX / "mine").write_text("mine")
        wanted = f"{out / INDEX} is a folder"
    else:
        (out / "sp").write_text("mine")
        (source / "sp").mkdir()
        (source / "sp" / "a.model").write_text("x")
        (source / "tokenizer_config.json").write_text('{"tokenizer_file": "sp/a.model"}')
        wanted = f"{out / 'sp'} is a file"
    before = tree(out)
    assert wanted in refusal("quantize", source, out, "--overwrite")
    assert tree(out) == before


def test_a_target_that_is_in_the_source_or_around_it(source: Path, tmp_path: Path) -> None:
    """A source is not written to, nor a target read."""
    (source / "tokenizer_config.json").write_text('{"tokenizer_file": "source/tokenizer.json"}')
    (source / "source").mkdir()
    (source / "source" / "tokenizer.json").write_text("another")
    before = tree(source)
    assert f"{source} is the source" in refusal("quantize", source, tmp_path, "--overwrite")
    for inside in (source / "source", source / "source" / "out"):
        assert "which is copied" in refusal("quantize", source, inside, "--overwrite")
    assert tree(source) == before
    assert run("quantize", source, source / "out").exit_code == 0


# -- links in the target ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize(
    "where",
    [FOLDER, f"{FOLDER}/calibration", f"{FOLDER}/new", "model.safetensors", "tokenizer.json"],
)
def test_links_in_the_target(where: str, flags: list[str], source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "folder").mkdir(parents=True)
    (precious / "data.bin").write_bytes(b"mine")
    (precious / "folder" / "more.bin").write_bytes(b"mine")
    out = tmp_path / "out"
    (out / where).parent.mkdir(parents=True)
    (out / where).symlink_to(precious / "data.bin" if "." in Path(where).name[1:] else precious)
    before = tree(tmp_path)
    message = refusal("quantize", source, out, *flags)
    assert f"{out / where} is a link to" in message
    assert tree(tmp_path) == before


def test_a_link_among_more_templates(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "mine")
    assert "is a link" in refusal("quantize", source, out, "--overwrite")


@pytest.mark.parametrize("flags", [["--overwrite"], ["--resume"]])
def test_a_link_in_a_folder_that_the_new_model_brings(
    flags: list[str], source: Path, tmp_path: Path
) -> None:
    """Its files would come to where the link leads."""
    out, mine = tmp_path / "out", tmp_path / "mine"
    (source / "tokenizer_config.json").write_text('{"tokenizer_file": "sp/more/words.txt"}')
    (source / "sp" / "more").mkdir(parents=True)
    (source / "sp" / "more" / "words.txt").write_text("new")
    if flags == ["--resume"]:
        interrupted(source, tmp_path)
    (out / "sp").mkdir(parents=True)
    mine.mkdir()
    (mine / "words.txt").write_text("mine")
    (out / "sp" / "more").symlink_to(mine)
    message = refusal("quantize", source, out, "--max-shard-size", "5KB", *flags)
    assert f"{out / 'sp' / 'more'} is a link to" in message
    assert (mine / "words.txt").read_text() == "mine"


def test_what_is_not_ours_in_the_records_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / FOLDER / "precious").mkdir(parents=True)
    (out / FOLDER / "precious" / "a").write_bytes(b"mine")
    (out / FOLDER / "data.bin").write_bytes(b"mine")
    assert run("quantize", source, out).exit_code == 0
    assert run("quantize", source, out, "--overwrite").exit_code == 0
    assert (out / FOLDER / "precious" / "a").read_bytes() == b"mine"
    assert (out / FOLDER / "data.bin").read_bytes() == b"mine"


def test_a_link_that_appears_while_a_run_is_at_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the name that a file will have until it is complete: it is replaced, not followed."""
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.write_bytes(b"mine")
    make = pipeline.make_shards

    def linking(*args: Any) -> None:
        record = args[2]
        for name in ("model.safetensors", "model.safetensors.json", "other"):
            record.partial(name).symlink_to(mine)
        make(*args)

    monkeypatch.setattr(pipeline, "make_shards", linking)
    assert run("quantize", source, out).exit_code == 0
    assert mine.read_bytes() == b"mine"
    assert not (out / "model.safetensors").is_symlink()


def test_overwriting_an_older_versions_interrupted_run(source: Path, tmp_path: Path) -> None:
    """Whose record does not list its files, nor prove that they are its: they are moved aside."""
    out = interrupted(source, tmp_path)
    shards = {f"replaced/{file.name}": file.read_bytes() for file in out.glob("model-*")}
    record = json.loads((out / FOLDER / "run.json").read_text())
    old = {key: record[key] for key in ("command", "source", "files")} | {"fingerprint": "old"}
    (out / FOLDER / "run.json").write_text(json.dumps(old))
    (out / "my_lora.safetensors").write_bytes(b"mine")
    assert run("quantize", source, out, "--max-shard-size", "5KB", "--overwrite").exit_code == 0
    assert run("quantize", source, tmp_path / "fresh", "--max-shard-size", "5KB").exit_code == 0
    mine = {"my_lora.safetensors": b"mine"}
    assert contents(out) == contents(tmp_path / "fresh") | mine | shards
