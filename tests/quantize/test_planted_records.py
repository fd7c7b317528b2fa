"""A record that somebody else may have written: what it names is removed only if it is proven.

Anyone can put a ``.nvfp4_moe/run.json`` into a folder that others download. What they cannot know
is what the files are like that users have there.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize import execute as pipeline
from quantize.run.record import FOLDER
from quantize.run.stamps import proven, stamp, stamp_of
from tests.quantize.checkpoints import contents, convert

Folders = Callable[[str], Path]

MINE = {
    "thesis.docx": b"1",
    "my_lora.safetensors": b"2",
    ".env": b"3",
    "data/a.csv": b"4",
    "README.md": b"5",
    "tokenizer.json": b'{"my": "own"}',
    "model.safetensors": b"6",
    "model-00001-of-00002.safetensors": b"7",
    "hf_quant_config.json": b"{}",
    "nvfp4_moe_report.json": b"{}",
    "config.json": b'{"my": "own"}',
}


def stopped(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    """A run that was interrupted once its shards were there; the folder of its record."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "finish", stop)
        convert(source, out, **more)
    return out / FOLDER


def users_folder(folder: Path, names: Any = MINE) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(MINE[name])
    return folder


def nothing_is_lost(out: Path, names: Any = MINE) -> None:
    """Each of the user's files is where it was, or in a folder that says it was replaced."""
    found = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    for name in names:
        places = [p for p in found if p == name or p.endswith(f"/{name}")]
        assert MINE[name] in [found[place] for place in places], name


STAMPS = {
    "no stamps": lambda names: list(names),
    "empty ones": lambda names: dict.fromkeys(names, ""),
    "others": lambda names: dict.fromkeys(names, stamp_of(b"another file")),
}


@pytest.mark.parametrize("kind", STAMPS)
@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_a_planted_record_removes_nothing(
    flag: str,
    cleared: bool,
    kind: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the fingerprint of the very run that the user starts."""
    record = stopped(source, tmp_path / "elsewhere", monkeypatch)
    names = [*MINE, "../outside", str(tmp_path / "outside"), "a/../../outside"]
    (tmp_path / "outside").write_bytes(b"mine")
    run = json.loads((record / "run.json").read_text()) | {
        "cleared": cleared,
        "replaced": {"delete": STAMPS[kind](names), "aside": [], "folder": "data"},
        "stamps": STAMPS[kind](names),
    }
    if flag == "overwrite":
        run |= {"fingerprint": "another", "names": names}
    out = users_folder(tmp_path / "out")
    (out / FOLDER).mkdir()
    (out / FOLDER / "run.json").write_text(json.dumps(run))
    for name in MINE:
        if name.endswith(".safetensors"):
            shutil.copy(record / "model.safetensors.json", out / FOLDER / f"{name}.json")
    if flag == "overwrite" or not cleared:  # else it is the weights of that config.json
        names.remove("model.safetensors")
        (out / "model.safetensors").unlink()
    convert(source, out, **{flag: True})
    nothing_is_lost(out, [n for n in names if n in MINE])
    assert (tmp_path / "outside").read_bytes() == b"mine"
    convert(source, tmp_path / "fresh")
    wanted = contents(tmp_path / "fresh")
    assert {name: (out / name).read_bytes() for name in wanted} == wanted | {
        name: (out / name).read_bytes() for name in wanted if name.endswith("index.json")
    }


def test_what_a_run_left_is_proven(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it goes, without a trace: a shard of another run, and one that the same run goes on
    with. One that was exchanged since is moved aside."""
    for exchanged in (False, True):
        out = tmp_path / f"out-{exchanged}"
        stopped(source, out, monkeypatch, max_shard_size=40_000)
        shards = sorted(out.glob("model-*.safetensors"))
        assert len(shards) > 1
        if exchanged:
            shards[0].write_bytes(b"my own")
        before = [shard.stat().st_mtime_ns for shard in shards]
        convert(source, out, resume=True, max_shard_size=40_000)
        now = [shard.stat().st_mtime_ns for shard in shards]
        assert [a == b for a, b in zip(before, now, strict=True)][1:] == [True] * len(now[1:])
        aside = out / "replaced" / shards[0].name
        assert aside.exists() == exchanged
        assert not exchanged or aside.read_bytes() == b"my own"
    stopped(source, tmp_path / "other", monkeypatch, max_shard_size=40_000)
    convert(source, tmp_path / "other", overwrite=True)
    convert(source, tmp_path / "fresh")
    assert contents(tmp_path / "other") == contents(tmp_path / "fresh")


def test_what_was_edited_between_kill_and_resume(
    source: Path, saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template of the old checkpoint, which the run was to delete: the edit is moved aside."""
    out = tmp_path / "out"
    first = Path(shutil.copytree(saved("mixtral"), tmp_path / "first"))
    (first / "chat_template.jinja").write_text("old")
    convert(first, out)
    stopped(source, out, monkeypatch, overwrite=True)
    (out / "chat_template.jinja").write_text("my own")
    convert(source, out, resume=True)
    assert (out / "replaced" / "chat_template.jinja").read_text() == "my own"
    assert not (out / "chat_template.jinja").exists()


def test_what_has_come_into_the_way_since(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a target that was cleared, or empty, under the name of a file still to be written."""
    out = tmp_path / "out"
    stopped(source, out, monkeypatch)
    (out / "tokenizer.json").write_text("my own")
    convert(source, out, resume=True)
    assert (out / "replaced" / "tokenizer.json").read_text() == "my own"
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 2**16, 2**16 + 1, 2**17 - 1, 2**17, 2**18])
def test_a_stamp(size: int, tmp_path: Path) -> None:
    """Of a file and of its content; another of any change at either end, or of the size."""
    file = tmp_path / "file"
    content = bytes(n % 251 for n in range(size))
    file.write_bytes(content)
    known = stamp(file)
    assert known == stamp_of(content)
    assert list(proven(tmp_path, {"file": known, "none": known, "../file": ""})) == ["file"]
    for changed in (content + b"\0", b"\xff" + content[1:], content[:-1] + b"\xff", content[:-1]):
        if changed != content:
            file.write_bytes(changed)
            assert stamp(file) != known
            assert list(proven(tmp_path, {"file": known})) == ["file"] * (not changed)
