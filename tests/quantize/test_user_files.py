"""What is the user's: files in a target that no run wrote, files of a source that are not the
model's, and an old checkpoint, which stays until the new one is there."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import execute as pipeline
from quantize.calibration.samples import digest_of
from quantize.checkpoint import hub
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from quantize.run.record import FOLDER
from quantize.run.report_files import REPORT_DATA
from tests.conftest import ROOT
from tests.quantize import checkpoints, processes, reference
from tests.quantize.checkpoints import ONE_THREAD, contents, convert
from tests.quantize.reference import INDEX
from tests.quantize.test_cli import refusal, run
from tests.quantize.test_output_damage import Usage

Folders = Callable[[str], Path]

SIZE = ("--max-shard-size", "12KB")
KILLED = -signal.SIGKILL


@pytest.fixture
def source(saved: Folders, tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer and a template of its own, to be changed."""
    folder = Path(shutil.copytree(saved("qwen3_moe"), tmp_path / "source"))
    (folder / "tokenizer.json").write_text('{"of": "the source"}')
    return folder


def others_checkpoint(folder: Path, saved: Folders) -> Path:
    """A checkpoint that no run of this package wrote, in several files, among other files."""
    tensors = load_file(saved("mixtral") / "model.safetensors")
    config = json.loads((saved("mixtral") / "config.json").read_text())
    checkpoints.save(folder, tensors, config, lambda name: len(name) % 3)
    (folder / "chat_template.jinja").write_text("old {{ messages }}")
    (folder / "vocab.json").write_text('{"old": 1}')
    (folder / "my_lora.safetensors").write_bytes(b"mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "experiments").mkdir()
    (folder / "experiments" / "model.safetensors").write_bytes(b"mine too")
    return folder


MINE = {
    "my_lora.safetensors": b"mine",
    "notes.txt": b"mine",
    "experiments/model.safetensors": b"mine too",
}


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below ``folder``; of a link, where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.fsencode(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


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


# -- before anything is removed --------------------------------------------------------------------


def test_too_little_space_leaves_the_old_checkpoint(
    source: Path, saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with what is replaced."""
    out = others_checkpoint(tmp_path / "out", saved)
    before = tree(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 100, 100))
    for file in out.glob("model-*.safetensors"):
        file.write_bytes(b"small")
        before[file.name] = b"small"
    message = refusal("quantize", source, out, "--overwrite")
    assert "still to be written" in message
    assert "are replaced" in message
    assert tree(out) == before


def test_the_old_checkpoint_makes_room_only_if_it_must(
    source: Path, saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, first in ((10**6, False), (20_000, True)):
        out = others_checkpoint(tmp_path / f"out-{free}", saved)
        there: list[bool] = []
        make = pipeline.make_shards

        def looking(*args: Any, make: Any = make, out: Path = out, there: Any = there) -> None:
            make(*args)
            there.append((out / "config.json").exists())

        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "make_shards", looking)
            patched.setattr(
                shutil, "disk_usage", lambda _, free=free: Usage(10**6, 10**6 - free, free)
            )
            result = run("quantize", source, out, "--overwrite")
        assert result.exit_code == 0, result.output
        assert there == [not first]
        assert ("the old one" in result.stderr) == first
        assert run("verify", source, out).exit_code == 0


def calibration(source: Path, rows: torch.Tensor, method: str = "gptq") -> Any:
    """A plan with calibration, and its tokens."""
    settings = Calibration("text", *rows.shape, digest_of(rows), method)
    return Options(max_shard_size=12_000, calibration=settings)


def calibrate(source: Path, out: Path, method: str = "gptq", **more: Any) -> None:
    rows = torch.randint(1, 16, (4, 64), generator=torch.Generator().manual_seed(0))
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, calibration(source, rows, method))
        execute(checkpoint, steps, out, samples=rows, **more)


def test_a_model_that_cannot_be_calibrated_leaves_the_old_checkpoint(
    source: Path, saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = others_checkpoint(tmp_path / "out", saved)
    before = tree(out)

    def refusing(*_: Any, **__: Any) -> Any:
        raise QuantizeError("calibration does not know this model")

    monkeypatch.setattr("quantize.calibration.layerwise.LayerwiseModel._find_experts", refusing)
    with pytest.raises(QuantizeError, match="does not know"):
        calibrate(source, out, overwrite=True)
    assert tree(out) == before


def test_damaged_weights_leave_the_old_checkpoint(
    source: Path, saved: Folders, tmp_path: Path
) -> None:
    """Found in the middle of the run: the old checkpoint is whole, and the run can be resumed."""
    good = load_file(source / "model.safetensors")
    bad = {name: tensor.clone() for name, tensor in good.items()}
    bad["model.layers.1.mlp.experts.3.down_proj.weight"][0, 0] = float("nan")
    save_file(bad, source / "model.safetensors", {"format": "pt"})
    out = others_checkpoint(tmp_path / "out", saved)
    before = tree(out)
    message = refusal("quantize", source, out, *SIZE, "--threads", "1", "--overwrite")
    assert "NaN" in message
    left = tree(out)
    assert {name: data for name, data in left.items() if not name.startswith(FOLDER)} == before
    done = [name for name in left if name.startswith(f"{FOLDER}/new/model-")]
    assert done
    save_file(good, source / "model.safetensors", {"format": "pt"})
    assert run("quantize", source, out, *SIZE, "--resume").exit_code == 0
    assert run("verify", source, out).exit_code == 0


# -- killed while it replaces a checkpoint ---------------------------------------------------------


def whole_of(found: dict[str, bytes], checkpoint: dict[str, bytes]) -> bool:
    return {name: found.get(name) for name in checkpoint} == checkpoint


def test_killed_anywhere_while_it_replaces_a_checkpoint(
    source: Path, saved: Folders, tmp_path: Path
) -> None:
    """Each call that changes the file system, when two checkpoints fit: the old one is whole, or
    nothing looks whole and the run can be resumed, or the new one is."""
    template = others_checkpoint(tmp_path / "template", saved)
    old = {name: data for name, data in tree(template).items() if name not in MINE}
    words = ("quantize", source, "out", "--max-shard-size", "40KB", "--threads", "1")
    (tmp_path / "whole").mkdir()
    shutil.copytree(template, tmp_path / "whole" / "out")
    ended = processes.run(tmp_path / "whole", *words, "--overwrite")
    assert ended.code == 0, ended.output
    wanted = tree(tmp_path / "whole" / "out")
    new = {n: d for n, d in wanted.items() if n not in MINE and not n.startswith("replaced/")}
    seen = set()
    for moment in range(1, ended.calls + 1):
        folder = tmp_path / f"at-{moment}"
        shutil.copytree(template, folder / "out")
        killed = processes.run(folder, *words, "--overwrite", at=moment)
        assert killed.code == KILLED, killed.output
        found = tree(folder / "out")
        state = "old" if whole_of(found, old) else "new" if whole_of(found, new) else "between"
        seen.add(state)
        if state == "between":
            assert "config.json" not in found
            assert f"{FOLDER}/run.json" in found
        assert whole_of(found, MINE)
        begun = f"{FOLDER}/run.json" in found
        resumed = processes.run(folder, *words, "--resume" if begun else "--overwrite")
        assert resumed.code == 0, (moment, resumed.output)
        assert {n for n in tree(folder / "out") if n.startswith("replaced/")} >= {
            "replaced/vocab.json",
            "replaced/config.json",
        }
        after = tree(folder / "out")
        assert whole_of(after, new | MINE), moment
        assert not [name for name in after if name.startswith(FOLDER)]
        shutil.rmtree(folder)
    assert seen == {"old", "new", "between"}
