"""A run that was killed, interrupted or cut off, and what ``--resume`` makes of it."""

import json
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantize.errors import QuantizeError
from quantize.run.record import FOLDER
from quantize.run.report_files import REPORT, REPORT_DATA
from tests.quantize import checkpoints, processes
from tests.quantize.checkpoints import convert
from tests.quantize.reference import INDEX

Folders = Callable[[str], Path]

SIZE = ("--max-shard-size", "6KB", "--threads", "2")
ONE_BY_ONE = ("--threads", "1")
KILLED = -signal.SIGKILL


def everything(folder: Path) -> dict[str, bytes]:
    """All that ``folder`` holds, the report included."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="session")
def source(saved: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with files of every kind beside its weights."""
    folder = tmp_path_factory.mktemp("resume") / "source"
    shutil.copytree(saved("qwen3_moe"), folder)
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": list(range(1000))}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="session")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """What an uninterrupted run leaves, and the number of its moments."""
    folder = tmp_path_factory.mktemp("whole")
    ended = processes.run(folder, "quantize", source, "out", *SIZE)
    assert ended.code == 0, ended.output
    files = everything(folder / "out")
    assert len([name for name in files if name.endswith(".safetensors")]) > 5
    assert ended.calls > 100
    return files, ended.calls


def assert_not_taken_for_whole(out: Path, whole: dict[str, bytes]) -> None:
    """No engine loads it; what has the name of a shard is one."""
    found = everything(out) if out.exists() else {}
    if "config.json" in found:  # the last step: only the record of the run may still be there
        assert {n: d for n, d in found.items() if not n.startswith(FOLDER)} == whole
        return
    if INDEX in found:
        assert set(whole) - set(found) == {"config.json"}
    for name, data in found.items():
        if name.endswith(".safetensors"):
            assert data == whole[name]


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(20))
def test_killed_at_a_random_moment(
    part: int, source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """One in each twentieth of the run, from before anything is there until it is tidied up."""
    files, moments = whole
    moment = 1 + int(moments * (part + random.Random(part).random()) / 20)
    killed = processes.run(tmp_path, "quantize", source, "out", *SIZE, at=moment)
    assert killed.code == KILLED, killed.output
    assert_not_taken_for_whole(tmp_path / "out", files)
    resumed = processes.run(tmp_path, "quantize", source, "out", *SIZE, "--resume")
    assert resumed.code == 0, resumed.output
    assert everything(tmp_path / "out") == files


@pytest.mark.parametrize("before_the_end", range(1, 16))
def test_killed_in_its_last_moments(
    before_the_end: int, source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """Each of them: config.json gets its name, and the record goes."""
    files, moments = whole
    killed = processes.run(
        tmp_path, "quantize", source, "out", *SIZE, at=moments + 1 - before_the_end
    )
    assert killed.code == KILLED, killed.output
    assert_not_taken_for_whole(tmp_path / "out", files)
    resumed = processes.run(tmp_path, "quantize", source, "out", *SIZE, "--resume")
    assert resumed.code == 0, resumed.output
    assert everything(tmp_path / "out") == files


def test_killed_again_and_again(
    source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    files, moments = whole
    generator = random.Random(0)
    kills = 0
    while True:
        # Ever later: on a busy machine the thread that finishes shards lags behind the others.
        at = generator.randrange(1, moments // 3 + 2 * kills)
        words = ("quantize", source, "out", *SIZE, *ONE_BY_ONE, "--resume")
        ended = processes.run(tmp_path, *words, at=at)
        if ended.code == 0:
            break
        assert ended.code == KILLED, ended.output
        assert_not_taken_for_whole(tmp_path / "out", files)
        kills += 1
        assert kills < 100, "it never gets further"
    assert kills >= 3
    assert everything(tmp_path / "out") == files


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 5, 6, 8, 11, 15, 20, 40])
def test_killed_while_it_replaces_another(
    moment: int,
    source: Path,
    whole: tuple[dict[str, bytes], int],
    saved: Folders,
    tmp_path: Path,
) -> None:
    """Resumed it is this one; or the other is still whole, and only --overwrite touches it."""
    out = tmp_path / "out"
    convert(saved("mixtral"), out, max_shard_size=4000)
    old = everything(out)
    words = ("quantize", source, "out", *SIZE)
    killed = processes.run(tmp_path, *words, "--overwrite", at=moment)
    assert killed.code == KILLED, killed.output
    left = everything(out)
    resumed = processes.run(tmp_path, *words, "--resume")
    if resumed.code != 0:
        assert {n: d for n, d in left.items() if not n.startswith(FOLDER)} == old
        assert everything(out) == left
        assert "--overwrite" in resumed.output
        resumed = processes.run(tmp_path, *words, "--overwrite")
    assert resumed.code == 0, resumed.output
    assert everything(out) == whole[0]


# -- interrupted -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "which"),
    [(0.2, "SIGINT"), (0.5, "SIGINT"), (0.9, "SIGINT"), (0.3, "SIGTERM"), (0.8, "SIGTERM")],
)
def test_ctrl_c(
    share: float, which: str, source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """And what schedulers send."""
    files, moments = whole
    interrupted = processes.run(
        tmp_path, "quantize", source, "out", *SIZE,
        at=int(share * moments), send=signal.Signals[which],
    )  # fmt: skip
    assert interrupted.code == 130, interrupted.output
    last = interrupted.output.splitlines()[-1]
    assert re.fullmatch(r"interrupted: .*same command with --resume to go on", last)
    assert "Traceback" not in interrupted.output
    assert_not_taken_for_whole(tmp_path / "out", files)
    assert not list(tmp_path.rglob("*.partial"))
    resumed = processes.run(tmp_path, "quantize", source, "out", *SIZE, "--resume")
    assert resumed.code == 0, resumed.output
    assert everything(tmp_path / "out") == files


def test_ctrl_c_while_it_replaces_another(
    source: Path, whole: tuple[dict[str, bytes], int], saved: Folders, tmp_path: Path
) -> None:
    """--overwrite does not go with --resume, so the advice says which of them."""
    convert(saved("mixtral"), tmp_path / "out")
    words = ("quantize", source, "out", *SIZE)
    interrupted = processes.run(tmp_path, *words, "--overwrite", at=60, send=signal.SIGINT)
    assert interrupted.code == 130
    assert "with --resume instead of --overwrite" in interrupted.output
    assert processes.run(tmp_path, *words, "--resume").code == 0
    assert everything(tmp_path / "out") == whole[0]


# -- what is left of a run -------------------------------------------------------------------------


@pytest.fixture
def half(source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path) -> Path:
    """A run that was killed when some of its shards were done."""
    words = ("quantize", source, "out", *SIZE, *ONE_BY_ONE, "--resume")
    while len(list(tmp_path.glob("out/*.safetensors"))) < 2:
        killed = processes.run(tmp_path, *words, at=whole[1] // 2)
        assert killed.code == KILLED, killed.output
    return tmp_path / "out"


def first_shard(out: Path) -> Path:
    return min(out.glob("*.safetensors"))


def record_of_first(out: Path) -> Path:
    return out / FOLDER / f"{first_shard(out).name}.json"


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def without_a_weight(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))


def with_strings_for_numbers(file: Path) -> None:
    file.write_text(json.dumps([[e[0], "a", "b", e[3]] for e in json.loads(file.read_text())]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a shard that is cut off": lambda out: cut(first_shard(out), -1),
    "an empty shard": lambda out: cut(first_shard(out), 0),
    "a shard that is gone": lambda out: first_shard(out).unlink(),
    "a shard with another header": lambda out: first_shard(out).write_bytes(
        first_shard(out).read_bytes().replace(b"U8", b"I8")
    ),
    "a record that is cut off": lambda out: cut(record_of_first(out), -20),
    "an empty record": lambda out: cut(record_of_first(out), 0),
    "a record of zeros": lambda out: record_of_first(out).write_bytes(bytes(500)),
    "a record that is no list": lambda out: record_of_first(out).write_text("3"),
    "a record of nonsense": lambda out: record_of_first(out).write_text("[[1], null]"),
    "a record without a weight": lambda out: without_a_weight(record_of_first(out)),
    "a record without numbers": lambda out: with_strings_for_numbers(record_of_first(out)),
    "a record that is gone": lambda out: record_of_first(out).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_again(
    damage: str, half: Path, source: Path, whole: tuple[dict[str, bytes], int]
) -> None:
    DAMAGES[damage](half)
    aside = {}
    if "another header" in damage:  # it may be somebody's
        name = first_shard(half).name
        aside = {f"replaced/{name}": first_shard(half).read_bytes()}
    resumed = processes.run(half.parent, "quantize", source, "out", *SIZE, "--resume")
    assert resumed.code == 0, resumed.output
    assert everything(half) == whole[0] | aside


def test_what_is_done_is_not_made_again(
    half: Path, source: Path, whole: tuple[dict[str, bytes], int]
) -> None:
    done = {file: file.stat().st_mtime_ns for file in half.glob("*.safetensors")}
    assert len(done) > 1
    ended = processes.run(half.parent, "quantize", source, "out", *SIZE, "--resume")
    assert ended.code == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done
    # Of the whole run's calls at least those of the shards that were done: a file is opened, synced
    # and renamed, and so is its record.
    assert ended.calls <= whole[1] - 6 * len(done)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"fingerprint": 3}'])
def test_a_run_that_cannot_be_told(text: str, half: Path, source: Path) -> None:
    (half / FOLDER / "run.json").write_text(text)
    before = everything(half)
    with pytest.raises(QuantizeError, match=r"run\.json: .*--overwrite"):
        convert(source, half, resume=True, max_shard_size=6000)
    assert everything(half) == before


def refusal(*args: object, folder: Path, code: int = 1) -> str:
    """What a run says that changes nothing."""
    before = everything(folder)
    ended = processes.run(folder.parent, *args)
    assert ended.code == code, ended.output
    assert everything(folder) == before
    last = ended.output.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    "options",
    [
        ("--scales", "max"),
        ("--layout", "compressed-tensors"),
        ("--max-shard-size", "7KB"),
        ("--exclude", "*.layers.0.*"),
        ("--all-linears",),
    ],
    ids=lambda options: options[0],
)
def test_other_options_are_refused(options: tuple[str, ...], half: Path, source: Path) -> None:
    words = ("quantize", source, "out", *SIZE, *options, "--resume")
    message = refusal(*words, folder=half)
    assert "another source, options or version" in message
    assert "--overwrite" in message


def test_another_source_is_refused(half: Path, source: Path, tmp_path: Path) -> None:
    """Even one that differs in nothing but its weights: a fine-tuned model, say."""
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(source / "model.safetensors")
    tuned = {name: torch.flip(tensor, [0]) for name, tensor in tensors.items()}
    checkpoints.save(other, tuned, json.loads((source / "config.json").read_text()))
    message = refusal("quantize", other, "out", *SIZE, "--resume", folder=half)
    assert "another source" in message


def test_a_source_that_moved_is_the_same(
    half: Path, source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """Downloaded again to another folder: the report keeps the first one's name."""
    shutil.copytree(source, tmp_path / "moved")
    ended = processes.run(tmp_path, "quantize", "moved", "out", *SIZE, "--resume")
    assert ended.code == 0, ended.output
    assert everything(half) == whole[0]


def test_another_version_is_refused(
    half: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.run.plan.package_version", lambda: "99.0")
    with pytest.raises(QuantizeError, match="another source, options or version"):
        convert(source, half, resume=True, max_shard_size=6000)


# -- without an interrupted run --------------------------------------------------------------------


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "an empty record"])
def test_resuming_nothing_starts(
    left: str, source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    if left != "nothing":
        (tmp_path / "out").mkdir()
    if left == "an empty record":
        (tmp_path / "out" / FOLDER).mkdir()
    ended = processes.run(tmp_path, "quantize", source, "out", *SIZE, "--resume")
    assert ended.code == 0, ended.output
    assert everything(tmp_path / "out") == whole[0]


def test_resuming_what_is_complete_does_nothing(
    source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """So that a job which is started until it succeeds ends."""
    words = ("quantize", source, "out", *SIZE, "--resume")
    assert processes.run(tmp_path, *words).code == 0
    again = processes.run(tmp_path, *words)
    assert (again.code, again.calls) == (0, 0), again.output
    assert everything(tmp_path / "out") == whole[0]


@pytest.mark.parametrize(
    "change", ["options", "a shard", "the report", "the report's data", "another run's data"]
)
def test_resuming_what_is_not_quite_complete(change: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert processes.run(tmp_path, "quantize", source, "out", *SIZE).code == 0
    if change == "a shard":
        cut(first_shard(out), -1)
    elif change == "the report":
        (out / REPORT).unlink()
    elif change == "the report's data":
        (out / REPORT_DATA).unlink()
    elif change == "another run's data":
        data = json.loads((out / REPORT_DATA).read_text())
        (out / REPORT_DATA).write_text(json.dumps(data | {"fingerprint": "another"}))
    options = ("--scales", "max") if change == "options" else ()
    words = ("quantize", source, "out", *SIZE, *options, "--resume")
    assert "--overwrite" in refusal(*words, folder=out)


def test_resuming_among_foreign_files(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    words = ("quantize", source, "out", "--resume")
    assert "nothing to resume" in refusal(*words, folder=tmp_path / "out")


def test_an_interrupted_run_is_not_touched_without_being_asked(half: Path, source: Path) -> None:
    message = refusal("quantize", source, "out", *SIZE, folder=half)
    assert "--resume" in message
    assert "--overwrite" in message


def test_overwriting_an_interrupted_run(half: Path, source: Path, tmp_path: Path) -> None:
    words = ("quantize", source, "out", "--layout", "compressed-tensors", "--overwrite")
    assert processes.run(tmp_path, *words).code == 0
    (tmp_path / "fresh").mkdir()
    assert processes.run(tmp_path / "fresh", *words[:-1]).code == 0
    assert everything(half) == everything(tmp_path / "fresh" / "out")


def test_overwriting_and_resuming_exclude_each_other(half: Path, source: Path) -> None:
    words = ("quantize", source, "out", *SIZE, "--overwrite", "--resume")
    assert "exclude each other" in refusal(*words, folder=half, code=2)


def test_a_run_that_failed_can_be_resumed(
    source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """Damaged weights stop it; with the source repaired, what was done before still counts."""
    repaired = tmp_path / "source"
    shutil.copytree(source, repaired)
    damaged = load_file(source / "model.safetensors")
    damaged["model.layers.1.mlp.experts.3.up_proj.weight"][3, 3] = float("nan")
    config = json.loads((source / "config.json").read_text())
    checkpoints.save(repaired, damaged, config)
    words = ("quantize", "source", "out", *SIZE)
    failed = processes.run(tmp_path, *words)
    assert failed.code == 1
    assert "NaN" in failed.output
    assert_not_taken_for_whole(tmp_path / "out", whole[0])
    done = len(list((tmp_path / "out").glob("*.safetensors")))
    assert done > 0
    shutil.copy(source / "model.safetensors", repaired)
    assert processes.run(tmp_path, *words, "--resume").code == 0
    ours = everything(tmp_path / "out")
    assert ours.keys() == whole[0].keys()
    different = {name for name, data in ours.items() if data != whole[0][name]}
    assert different == {REPORT, REPORT_DATA}  # it says where the source was
