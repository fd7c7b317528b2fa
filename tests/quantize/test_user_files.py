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
from quantize.experts.find import find
from quantize.experts.layers import check_layer_count
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
    """Though it would have to make room for calibration."""
    out = others_checkpoint(tmp_path / "out", saved)
    with min(out.glob("model-*.safetensors")).open("ab") as file:
        file.write(bytes(1_000_000))
    before = tree(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 50_000, 50_000))
    said: list[str] = []

    def refusing(*_: Any, **__: Any) -> Any:
        raise QuantizeError("calibration does not know this model")

    with monkeypatch.context() as patched, pytest.raises(QuantizeError, match="does not know"):
        patched.setattr("quantize.calibration.layerwise.LayerwiseModel._find_experts", refusing)
        calibrate(source, out, overwrite=True, say=said.append)
    assert tree(out) == before
    assert said == []
    calibrate(source, out, overwrite=True, say=said.append)
    assert any("is removed first" in line for line in said)


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
    """Two checkpoints fit: then the old one is whole, or nothing looks whole and the run can be
    resumed, or the new one is. All calls that change the file system at the beginning and at the
    end, where files are swapped, and some between."""
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
    first, last = 12, ended.calls - 48
    for moment in (*range(1, first), *range(first, last, 40), *range(last, ended.calls + 1)):
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


# -- one run a target ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_second_run_in_a_target(flags: list[str], source: Path, tmp_path: Path) -> None:
    """One message; and a run that died holds nothing."""
    out = tmp_path / "out"
    stopped = processes.run(tmp_path, "quantize", source, "out", *SIZE, at=40)
    assert stopped.code == KILLED
    # Its lock went with it. Another process takes it, as a run does.
    holding = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; "
         "from quantize.run.lock import locked\n"
         "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
         out / FOLDER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ONE_THREAD, cwd=ROOT,
    )  # fmt: skip
    assert holding.stdout is not None
    assert holding.stdout.readline() == b"held\n"
    before = tree(out)
    message = refusal("quantize", source, out, *SIZE, *flags)
    assert f"{out}: another run is at work in it" in message
    with Checkpoint(source) as checkpoint, pytest.raises(QuantizeError, match="another run"):
        execute(checkpoint, plan(checkpoint), out, overwrite=True)
    assert tree(out) == before
    holding.kill()
    holding.wait()
    assert run("quantize", source, out, *SIZE, "--resume").exit_code == 0
    assert not (out / FOLDER).exists()


def test_two_runs_started_at_once(source: Path, tmp_path: Path) -> None:
    """As a scheduler may: one is done, or the second finds it complete; never two at work."""
    words = [str(Path(sys.executable).with_name("nvfp4-moe")), "quantize", source, "out", *SIZE]
    both = [
        subprocess.Popen(
            [*words, "--resume"], cwd=tmp_path, env=ONE_THREAD, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 1]), errors
    if codes == [0, 1]:
        assert sum("another run is at work" in error for error in errors) == 1
    assert run("verify", source, tmp_path / "out").exit_code == 0


def test_the_lock_is_held_while_ray_is_at_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    seen = []

    def looking(*_: Any) -> None:
        with (out / FOLDER / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                seen.append("held")
        raise QuantizeError("enough")

    monkeypatch.setattr(pipeline, "check_threads", lambda *_: None)
    monkeypatch.setattr(pipeline, "make_shards_on_ray", looking)
    with Checkpoint(source) as checkpoint, pytest.raises(QuantizeError, match="enough"):
        execute(checkpoint, plan(checkpoint), out, ray="auto")
    assert seen == ["held"]
    assert tree(out) == {}


# -- --work-dir ------------------------------------------------------------------------------------


def test_calibration_elsewhere(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing large is in the target, nothing is left, and the files are the same."""
    calibrate(source, tmp_path / "plain", "two-sided")
    work, out = tmp_path / "scratch" / "mine", tmp_path / "out"
    work.mkdir(parents=True)
    (work / "data.bin").write_bytes(b"mine")
    sizes: dict[str, int] = {}
    make = pipeline.make_shards

    def looking(*args: Any) -> None:
        sizes.update(
            {
                str(path.relative_to(tmp_path)): path.stat().st_size
                for folder in (work, out)
                for path in folder.rglob("*")
                if path.is_file()
            }
        )
        make(*args)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "make_shards", looking)
        calibrate(source, out, "two-sided", work_dir=work)
    (own,) = {name.split("/")[2] for name in sizes if name.startswith("scratch/mine/nvfp4_moe-")}
    assert any(name.startswith(f"scratch/mine/{own}/") and size > 10_000
               for name, size in sizes.items())  # fmt: skip
    assert not [n for n in sizes if n.startswith("out/") and n.endswith(".safetensors")]
    assert tree(work) == {"data.bin": b"mine"}
    assert contents(out) == contents(tmp_path / "plain")


def stopped(source: Path, out: Path, work: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was interrupted once it was calibrated."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "make_shards", stop)
        calibrate(source, out, work_dir=work)


def test_going_on_with_a_calibration_elsewhere(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    stopped(source, out, work, monkeypatch)
    assert list(work.rglob("*.safetensors"))
    before = tree(tmp_path)
    with pytest.raises(QuantizeError, match=r"was started --work-dir .*work; go on so"):
        calibrate(source, out, work_dir=tmp_path / "other", resume=True)
    assert tree(tmp_path) == before

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it is calibrated already")

    monkeypatch.setattr("quantize.calibration.calibrate.LayerwiseModel", fail)
    calibrate(source, out, resume=True)  # the record says where
    assert list(work.iterdir()) == []


def test_starting_again_removes_what_is_elsewhere(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    stopped(source, out, work, monkeypatch)
    convert(source, out, overwrite=True)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("what", ["a link", "a file", "a link within", "a file for DIR"])
def test_a_work_dir_that_is_not_safe(
    what: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work, mine = tmp_path / "out", tmp_path / "work", tmp_path / "mine"
    mine.mkdir()
    (mine / "a").write_bytes(b"mine")
    stopped(source, out, work, monkeypatch)
    (own,) = work.iterdir()
    shutil.rmtree(out)
    if what == "a link within":
        (own / "states").symlink_to(mine)
    else:
        shutil.rmtree(own)
        if what == "a link":
            own.symlink_to(mine)
        elif what == "a file":
            own.write_text("mine")
        else:
            work.rmdir()
            work.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(QuantizeError, match=str(work)):
        calibrate(source, out, work_dir=work)
    assert {n: d for n, d in tree(tmp_path).items() if not n.startswith("out")} == before


# -- what is copied of a source --------------------------------------------------------------------

COPIED = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"tokenizer_file": "sp/spm.model"}',
    "tokenizer.model.v3": "x",
    "tekken.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "spiece.model": "x",
    "qwen.tiktoken": "x",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": "{}",
    "preprocessor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "LICENSE": "x",
    "LICENSE-MODEL": "x",
    "NOTICE.txt": "x",
    "README.md": "# x",
    "USE_POLICY.md": "# x",
    "modeling_x.py": "x = 1",
    "helpers.py": "x = 2",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "sp/spm.model": "x",
    "sp/words.txt": "x",
}
NOT_COPIED = {
    ".env": "TOKEN=1",
    "consolidated.safetensors": "x",
    "consolidated.safetensors.index.json": "{}",
    "params.json": "{}",
    "pytorch_model-00001-of-00001.bin": "x",
    "pytorch_model.bin.index.json": "{}",
    "training_args.bin": "x",
    "model-Q4_K_M.gguf": "GGUF",
    "adapter_config.json": "{}",
    "adapter_model.safetensors": "x",
    "backup.tar.gz": "x",
    "id_rsa": "key",
    "server.key": "key",
    "trainer_state.json": "{}",
    "original/params.json": "{}",
    "lora-adapter/adapter_model.safetensors": "x",
    "additional_chat_templates/.env": "x",
    "additional_chat_templates/run.sh": "x",
    "sp/spm.bin": "x",
    "sp/.netrc": "x",
}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def named_in_its_config(folder: Path) -> None:
    """As a model with code of its own."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_x.Config"}
    (folder / "config.json").write_text(json.dumps(config))


def test_what_belongs_to_a_checkpoint_is_copied(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, tmp_path / "bare")
    fill(source, COPIED | NOT_COPIED)
    named_in_its_config(source)
    result = run("quantize", source, out)
    assert result.exit_code == 0, result.output
    found = contents(out)
    assert {name: found[name].decode() for name in COPIED} == COPIED
    own = {"config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors"}
    assert set(found) == set(COPIED) | own
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("not copied")]
    assert ".env" in line
    assert "and " in line  # of so many, some names and how many more
    resumed = run("quantize", source, out, "--resume")
    assert resumed.exit_code == 0


def test_modules_of_a_model_without_any(source: Path, tmp_path: Path) -> None:
    """A script that lies there is not the model's."""
    (source / "upload.py").write_text("token = 1")
    result = run("quantize", source, tmp_path / "out")
    assert "not copied from SRC: upload.py" in result.stderr
    assert not (tmp_path / "out" / "upload.py").exists()


def test_a_checkpoint_of_which_all_is_copied_says_nothing(saved: Folders, tmp_path: Path) -> None:
    result = run("quantize", saved("qwen3_moe"), tmp_path / "out")
    assert "not copied" not in result.stderr


TEMPLATE = "additional_chat_templates/a.jinja"


@pytest.mark.parametrize("name", ["NOTICE.txt", "tokenizer.json", TEMPLATE])
def test_a_link_that_leaves_the_source(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("a private key")
    (source / name).unlink(missing_ok=True)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "home" / "id_rsa")
    message = refusal("quantize", source, tmp_path / "out")
    assert f"{source / name} is a link that leads out of the checkpoint" in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_link(source: Path, tmp_path: Path) -> None:
    """Nothing of it is copied, and that is said."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / Path(TEMPLATE).name).write_text("a private key")
    (source / TEMPLATE).parent.symlink_to(tmp_path / "home")
    result = run("quantize", source, tmp_path / "out")
    assert "not copied from SRC: additional_chat_templates/" in result.stderr
    assert b"a private key" not in tree(tmp_path / "out").values()


def test_links_within_the_source_and_its_hub_cache(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    shutil.copytree(source, snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "aa").write_text("{{ tools }}")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "a.jinja").symlink_to("../../../blobs/aa")
    (snapshot / "chat_template.jinja").symlink_to("additional_chat_templates/a.jinja")
    convert(snapshot, tmp_path / "out")
    for name in ("additional_chat_templates/a.jinja", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == "{{ tools }}"
        assert not (tmp_path / "out" / name).is_symlink()
    (blobs / "aa").unlink()
    (blobs / "aa").symlink_to(tmp_path / "secret")  # out of the cache again
    (tmp_path / "secret").write_text("a private key")
    assert "leads out of the checkpoint" in refusal("quantize", snapshot, tmp_path / "other")


def test_what_is_downloaded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own filter on a list of files: what belongs, with folders that configs name."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    fill(source, COPIED | NOT_COPIED)
    named_in_its_config(source)
    everything = [str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()]
    cache = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    revisions = []

    def download(name: str, revision: str | None = None, **patterns: Any) -> str:
        assert name == "org/name"
        revisions.append(revision)
        for file in filter_repo_objects(everything, **patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/name") == cache
    assert revisions == [None, "0123abcd"]
    found = {str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file()}
    weights = {"model.safetensors", "config.json", "generation_config.json"}
    assert found >= set(COPIED) | weights
    indexes = {name for name in found if name.endswith(".index.json")}
    assert found - set(COPIED) - weights - indexes == set()


# -- whose source is this --------------------------------------------------------------------------


def interrupted(source: Path, tmp_path: Path) -> Path:
    """A run that was killed when some of its shards were done."""
    words = ("quantize", source, "out", "--max-shard-size", "5KB", "--threads", "1", "--resume")
    moment = 60
    while not list((tmp_path / "out").glob("*.safetensors")):
        killed = processes.run(tmp_path, *words, at=moment)
        assert killed.code == KILLED, killed.output
        moment += 15
    return tmp_path / "out"


@pytest.mark.parametrize("hub_cache", [False, True])
def test_any_one_tensor_that_changed(hub_cache: bool, source: Path, tmp_path: Path) -> None:
    """Between kill and resume, of a file with the same size and time, or of a new blob."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    if hub_cache:
        snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True)
        (snapshot / "../../blobs").mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(source / name, snapshot / "../../blobs" / f"{name}-1")
            (snapshot / name).symlink_to(f"../../blobs/{name}-1")
        source = snapshot
        file = snapshot / "model.safetensors"
    out = interrupted(source, tmp_path)
    before = tree(out)
    time_ = file.stat().st_mtime_ns
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, Options(max_shard_size=5000))
    raw = file.read_bytes()
    for number, name in enumerate(tensors):
        changed = {n: t + (n == name) for n, t in tensors.items()}
        new = file
        if hub_cache:
            new = source / f"../../blobs/{number}"
            file.unlink()
            file.symlink_to(f"../../blobs/{number}")
        save_file(changed, new, {"format": "pt"})
        assert len(new.read_bytes()) == len(raw)
        os.utime(new, ns=(time_, time_))
        with Checkpoint(source) as checkpoint, pytest.raises(QuantizeError) as caught:
            execute(checkpoint, steps, out, resume=True)
        assert "had another source" in str(caught.value)
        assert name in str(caught.value)
        assert "--overwrite" in str(caught.value)
        assert tree(out) == before


def test_a_blob_that_differs_where_nobody_looks(source: Path, tmp_path: Path) -> None:
    """Only its name, the hub's hash of it, tells."""
    tensors = load_file(source / "model.safetensors") | {"big": torch.zeros(1_000_000)}
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "../../blobs").mkdir()
    shutil.copy(source / "config.json", snapshot)
    for number in (1, 2):
        save_file(tensors, snapshot / f"../../blobs/{number}", {"format": "pt"})
        tensors["big"][1000] = 1.0
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    out = interrupted(snapshot, tmp_path)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/2")
    message = refusal("quantize", snapshot, out, "--max-shard-size", "5KB", "--resume")
    assert "had another source: model.safetensors changed" in message


def test_a_moved_file_counts_as_changed(source: Path, tmp_path: Path) -> None:
    """What differs where nobody looked, under another path: all of it is made again."""
    tensors = load_file(source / "model.safetensors") | {"big": torch.zeros(1_000_000)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = interrupted(source, tmp_path)
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    tensors["big"][1000] = 1.0
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    time_ = (source / "model.safetensors").stat().st_mtime_ns
    os.utime(moved / "model.safetensors", ns=(time_, time_))
    words = ("--max-shard-size", "5KB")
    assert run("quantize", moved, out, *words, "--resume").exit_code == 0
    assert run("quantize", moved, tmp_path / "fresh", *words).exit_code == 0
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("state", ["interrupted", "finished"])
def test_a_copied_file_that_changed(state: str, source: Path, tmp_path: Path) -> None:
    """With the same size."""
    (source / "chat_template.jinja").write_text("AAAA")
    out = tmp_path / "out"
    if state == "finished":
        assert run("quantize", source, out).exit_code == 0
        options: tuple[str, ...] = ()
    else:
        interrupted(source, tmp_path)
        options = ("--max-shard-size", "5KB")
    (source / "chat_template.jinja").write_text("BBBB")
    before = tree(out)
    message = refusal("quantize", source, out, *options, "--resume")
    assert "chat_template.jinja" in message if state == "interrupted" else "--overwrite" in message
    assert tree(out) == before


def test_a_finished_targets_copy_that_changed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", source, out).exit_code == 0
    (out / "tokenizer.json").write_text('{"of": "nobodys"}'[:19])
    assert "not a whole one" in refusal("quantize", source, out, "--resume")


def test_another_older_source_of_a_finished_target(source: Path, tmp_path: Path) -> None:
    """One tensor differs; its file is older than the target."""
    out = tmp_path / "out"
    assert run("quantize", source, out).exit_code == 0
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(1, 1))
    assert "not a whole one" in refusal("quantize", source, out, "--resume")


def test_many_tensors_are_looked_at_in_seconds(tmp_path: Path) -> None:
    """As many as a model of a trillion parameters has."""
    from quantize.checkpoint.headers import read_header
    from quantize.checkpoint.identity import tensor_digests

    count, size = 69_000, 4096
    header = {
        f"model.layers.{n // 1152}.mlp.experts.{n % 384}.{n % 3}.weight-{n}": {
            "dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]
        }
        for n in range(count)
    }  # fmt: skip
    encoded = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + count * size)
    tensors = read_header(tmp_path / "model.safetensors")
    started = time.process_time()
    found = tensor_digests(tensors)
    assert time.process_time() - started < 8
    assert len(found["model.safetensors"]) == count


# -- files that are larger than memory, and more than one set --------------------------------------


def test_a_file_larger_than_memory(saved: Folders, tmp_path: Path) -> None:
    """A sparse file: its header alone is read to inspect it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    folder = Path(shutil.copytree(saved("qwen3_moe"), tmp_path / "source"))
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = max(t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")
    count = 3 * memory
    header["huge"] = {"dtype": "U8", "shape": [count], "data_offsets": [end, end + count]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
        stream.truncate(8 + len(encoded) + end + count)
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "huge" in result.output


def test_what_the_header_says_is_what_the_library_reads(source: Path) -> None:
    from quantize.checkpoint.headers import read_header

    wanted = reference.read_file(source / "model.safetensors")
    found = read_header(source / "model.safetensors")
    assert {t.name: (t.dtype, list(t.shape)) for t in found} == {
        name: (raw.dtype, list(raw.shape)) for name, raw in wanted.items()
    }


TWO_SETS = {
    "two numbered sets": ("model", "consolidated"),
    "two savings": ("model", "model"),
    "a set and a file": ("model", ""),
}


@pytest.mark.parametrize("kind", TWO_SETS)
def test_two_sets_without_an_index(kind: str, source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    for which, stem in enumerate(TWO_SETS[kind]):
        count = 2 + which
        for number in range(1, count + 1) if stem else ():
            part = dict(list(tensors.items())[number - 1 :: count])
            renamed = {f"copy.{n}" if which else n: t for n, t in part.items()}
            save_file(renamed, source / f"{stem}-{number:05d}-of-{count:05d}.safetensors")
        if not stem:
            save_file({f"copy.{n}": t for n, t in tensors.items()}, source / "copy.safetensors")
    for command in (["inspect", source], ["quantize", source, tmp_path / "out"]):
        message = refusal(*command)
        assert "model-*-of-00002.safetensors" in message
        other = {"a set and a file": "copy.safetensors"}.get(
            kind, f"{TWO_SETS[kind][1]}-*-of-00003.safetensors"
        )
        assert other in message
        assert INDEX in message
    assert not (tmp_path / "out").exists()
    names = {n: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, n in enumerate(tensors)}
    checkpoints.write_index(source, names)
    assert run("inspect", source).exit_code == 0


def test_more_layers_of_experts_than_the_config_has(source: Path, tmp_path: Path) -> None:
    """Two copies under other names, of which an index makes one model."""
    tensors = load_file(source / "model.safetensors")
    copy = {n.removeprefix("model."): t.clone() for n, t in tensors.items() if "layers" in n}
    save_file(tensors | copy, source / "model.safetensors", {"format": "pt"})
    message = refusal("quantize", source, tmp_path / "out")
    assert "has 2 layers, but there are 4 layers of experts" in message
    assert "layers, model.layers" in message


def test_layers_that_a_list_counts(source: Path) -> None:
    """Nemotron-H Puzzle has a list of layers in place of their number, and a number of others."""
    with Checkpoint(source) as checkpoint:
        groups = find(checkpoint)
    config = {"num_hidden_layers": None, "num_nextn_predict_layers": 0}
    check_layer_count(config | {"layers_block_type": ["moe", "moe"]}, groups, "config.json")
    with pytest.raises(QuantizeError, match="has 1 layers, but there are 2 layers of experts"):
        check_layer_count(config | {"layers_block_type": ["moe"]}, groups, "config.json")
