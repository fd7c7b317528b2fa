"""Who may write to a target, and what of an interrupted run is still good."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from quantize import execute
from quantize.checkpoint.reader import Checkpoint
from quantize.cli import errors
from quantize.cli.app import app
from quantize.errors import QuantizeError
from quantize.run import workers
from quantize.run.options import Options
from quantize.run.plan import plan
from quantize.run.record import FOLDER, Record
from tests.quantize import checkpoints, reference
from tests.quantize.checkpoints import contents, convert

Folders = Callable[[str], Path]
CPU = [torch.device("cpu")]


def two_files(saved: Folders, folder: Path) -> Path:
    """A source in one file for each of its two layers, and another for the rest."""
    source = saved("qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    return checkpoints.save(
        folder, tensors, config, lambda n: next((i for i in (0, 1) if f"layers.{i}." in n), 2)
    )


def interrupted(source: Path, target: Path) -> list[str]:
    """All shards made, but not the end of the run; their names."""
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, Options(max_shard_size=3000))
        files = {str(f.resolve()): f.stat().st_mtime_ns for f in checkpoint.files}
        record = Record(target, steps.fingerprint(checkpoint), files=files)
        record.begin(overwrite=False, resume=False)
        workers.make_shards(checkpoint, steps, record, range(len(steps.shards)), CPU, 1)
    return steps.file_names


def test_a_file_of_the_source_that_changed_voids_just_what_was_made_from_it(
    saved: Folders, tmp_path: Path
) -> None:
    source, out = two_files(saved, tmp_path / "source"), tmp_path / "out"
    names = interrupted(source, out)
    for name in names:
        os.utime(out / name, ns=(1, 1))
    layer = {
        name: any("layers.1." in tensor for tensor in reference.read_file(out / name))
        for name in names
    }
    file = next(f for f in source.glob("*.safetensors") if "layers.1." in str(list(load_file(f))))
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**9))
    convert(source, out, max_shard_size=3000, resume=True)
    again = {name: (out / name).stat().st_mtime_ns != 1 for name in names}
    assert again == layer
    assert len(set(layer.values())) == 2
    convert(source, tmp_path / "fresh", max_shard_size=3000)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_finished_target_is_not_that_of_a_source_that_changed_later(
    saved: Folders, tmp_path: Path
) -> None:
    source, out = two_files(saved, tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    before = contents(out)
    convert(source, out, resume=True)  # nothing to do
    assert contents(out) == before
    file = min(source.glob("*.safetensors"))
    os.utime(file, ns=(1, (out / "config.json").stat().st_mtime_ns + 1))
    with pytest.raises(QuantizeError, match=r"not a whole one of this source.*--overwrite"):
        convert(source, out, resume=True)
    assert contents(out) == before


def test_a_finished_target_that_lost_a_copied_file(saved: Folders, tmp_path: Path) -> None:
    source, out = two_files(saved, tmp_path / "source"), tmp_path / "out"
    (source / "tokenizer.json").write_text("{}")
    convert(source, out)
    (out / "tokenizer.json").unlink()
    with pytest.raises(QuantizeError, match="not a whole one"):
        convert(source, out, resume=True)


def test_two_runs_in_one_target(saved: Folders, tmp_path: Path) -> None:
    """The one that was there first stops before it gives anything a name."""
    source, out = two_files(saved, tmp_path / "source"), tmp_path / "out"
    with Checkpoint(source) as checkpoint:
        first, second = plan(checkpoint, Options()), plan(checkpoint, Options(scales="max"))
        record = Record(out, first.fingerprint(checkpoint))
        record.begin(overwrite=False, resume=False)
        other = Record(out, second.fingerprint(checkpoint))
        other.begin(overwrite=True, resume=False)
        with pytest.raises(QuantizeError, match=r"another run has taken .*out over"):
            workers.make_shards(checkpoint, first, record, [0], CPU, 1)
        record.abandon()
        assert not list(out.glob("*.safetensors"))
        assert (out / FOLDER / "run.json").exists()  # the other's


def test_overwriting_a_folder_of_links_to_the_source(saved: Folders, tmp_path: Path) -> None:
    """The target is where the source's files really are."""
    files = tmp_path / "files"
    shutil.copytree(saved("qwen3_moe"), files)
    links = tmp_path / "links"
    links.mkdir()
    for file in files.iterdir():
        (links / file.name).symlink_to(file)
    before = contents(files)
    with pytest.raises(QuantizeError, match="is the source"):
        convert(links, files, overwrite=True)
    assert contents(files) == before


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--device cpu"),
        (MemoryError(), "--threads"),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), "not enough memory"),
        (RuntimeError("CUDA error: unspecified launch failure"), "a library failed (RuntimeError"),
        (RecursionError("a mistake of ours"), "RecursionError: a mistake of ours. This is a bug"),
        (ZeroDivisionError("a mistake of ours"), "ZeroDivisionError: a mistake of ours"),
    ],
)
def test_what_nobody_foresaw_is_one_line_too(
    error: Exception, says: str, saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(execute, "make_shards", fail)
    monkeypatch.delenv(errors.TRACEBACK, raising=False)
    words = ["quantize", str(saved("qwen3_moe")), str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "config.json").exists()
