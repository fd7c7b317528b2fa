"""``--stream``: a model larger than the disk comes from the hub a few files at a time."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
import torch

from quantize.checkpoint import hub_weights, streamed
from quantize.checkpoint.hub import look_up
from quantize.checkpoint.opened import opened
from quantize.checkpoint.streamed import AHEAD, peak
from quantize.errors import QuantizeError
from quantize.run.plan import plan
from quantize.run.record import Record
from quantize.run.shards import ShardWriter
from quantize.run.stream import bytes_beside
from tests.hub_server import Hub, Model, Stored, serving, use
from tests.quantize.checkpoints import contents
from tests.quantize.hub_models import in_shards
from tests.quantize.kv_sources import WAYS, save_source
from tests.quantize.processes import FORKED
from tests.quantize.test_cli import refusal, run
from tests.quantize.true_size import minimax_m3
from tests.quantize.user_files import Folders

FILES = 14
OPTIONS = ("--max-shard-size", "20KB", "--threads", 2)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_weights.time, "sleep", lambda _: None)
    monkeypatch.setattr(streamed, "_LONGEST_WAIT", 0)
    with serving() as found:
        use(found, tmp_path / "cache", monkeypatch)
        yield found


@pytest.fixture
def model(hub: Hub, saved: Folders, tmp_path: Path) -> Path:
    """``org/moe`` on the hub: a model in many files; the folder has the same."""
    folder = in_shards(saved("qwen3_moe"), tmp_path / "model", FILES)
    (folder / "README.md").write_text("of the source")
    hub.publish("org/moe", folder)
    return folder


@pytest.fixture
def expected(model: Path, tmp_path: Path) -> dict[str, bytes]:
    """What quantizing the folder gives, but for what says where it is from."""
    assert run("quantize", model, tmp_path / "expected", *OPTIONS).exit_code == 0
    return without_revision(tmp_path / "expected")


def without_revision(folder: Path) -> dict[str, bytes]:
    found = contents(folder)
    config = json.loads(found["config.json"])
    config["nvfp4_moe"]["made"]["revision"] = None
    return found | {"config.json": json.dumps(config).encode()}


class Watched:
    """The most bytes that are in a run's folder at any time, and those of the source alone; whoever
    watches looks whenever the server is asked for something, and every millisecond."""

    def __init__(self, target: Path) -> None:
        self.folder = target
        self.most = self.source = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def look(self, _: str = "") -> None:
        # A file may go, and the next one come, during a walk, which then counts both. What really
        # lies there at once is seen three times in a row.
        sizes = [self._sizes() for _ in range(3)]
        self.most = max(self.most, min(source + output for source, output in sizes))
        self.source = max(self.source, min(source for source, _ in sizes))

    def _sizes(self) -> tuple[int, int]:
        """Bytes of the source and of the output."""
        source = output = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with suppress(OSError):  # it is gone again
                    if name.endswith((".safetensors", ".incomplete", ".partial")):
                        size = Path(folder, name).stat().st_size
                        source += size * ("/source" in folder)
                        output += size * ("/source" not in folder)
        return source, output

    def _watch(self) -> None:
        while not self._end.wait(0.001):
            self.look()

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def test_the_same_checkpoint_on_a_small_disk(
    hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sizes = {file.name: file.stat().st_size for file in model.glob("*.safetensors")}
    with Watched(out) as watched:
        hub.before = watched.look
        result = run("quantize", "org/moe", out, *OPTIONS, "--stream")
    assert result.exit_code == 0, result.output
    assert without_revision(out) == expected
    assert {file.name for file in out.iterdir()} == {
        file.name for file in (tmp_path / "expected").iterdir()
    }
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    # Less than the whole, though each file came once: its header, and itself.
    assert 0 < watched.source < sum(sizes.values()) * 0.75
    for name, size in sizes.items():
        assert size < hub.sent[name] <= size + 16 * 2**10
    # verify, by the whole model, finds nothing; nor is the source another one.
    result = run("verify", "org/moe", out)
    assert result.exit_code == 0, result.output
    one, two = (
        json.loads((folder / "nvfp4_moe_report.json").read_text())
        for folder in (out, tmp_path / "expected")
    )
    assert one["source_digest"] == two["source_digest"]
    # Again with --resume: there is nothing to do.
    before = hub.sent.copy()
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream", "--resume")
    assert result.exit_code == 0, result.output
    assert all(hub.sent[name] - before[name] <= 16 * 2**10 for name in sizes)


def test_the_peak_is_the_one_that_was_announced(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is asked for the peak, and has never more on it; one byte less is refused before
    anything is fetched."""
    seen = []
    real = shutil.disk_usage

    def usage(path: object) -> object:
        found = real(path)  # type: ignore[call-overload]
        return found._replace(free=room[0]) if room else found

    room: list[int] = []
    monkeypatch.setattr(shutil, "disk_usage", usage)
    asked = streamed.peak

    def told(*what: object) -> int:
        seen.append(asked(*what))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr("quantize.run.stream.peak", told)
    out = tmp_path / "out"
    with Watched(out) as watched:
        hub.before = watched.look
        assert run("quantize", "org/moe", out, *OPTIONS, "--stream").exit_code == 0
    (announced,) = set(seen)
    total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    report = json.loads((out / "nvfp4_moe_report.json").read_text())
    # Headers and small files of the run's own are not counted.
    assert 0 < watched.most <= announced + 20_000
    assert announced < total + report["bytes_after"]
    others = sum((out / n).stat().st_size for n in ("README.md", "generation_config.json"))
    room.append(announced + others)
    assert run("quantize", "org/moe", tmp_path / "two", *OPTIONS, "--stream").exit_code == 0
    room[0] -= 1
    before = hub.sent.copy()
    said = refusal("quantize", "org/moe", tmp_path / "three", *OPTIONS, "--stream")
    assert "are still to be written" in said
    assert not [file for file in (tmp_path / "three").rglob("*") if file.is_file()]
    more = {name: hub.sent[name] - before[name] for name in hub.sent}
    assert all(more[name] <= 16 * 2**10 for name in more)


def test_the_peak_of_steps() -> None:
    """By hand."""
    sizes = dict.fromkeys("abcdefgh", 1)
    one = ["a", "b", "c", "d", "e", "f", "g", "h"]
    none = [0] * 8
    assert peak([], sizes, []) == 0
    assert peak(["a"], sizes, [0]) == 1
    assert peak(["ab", "bc", "cd"], sizes, none) == 4
    assert peak(one, sizes, none) == 1 + AHEAD
    assert peak(["ah", *one[1:7], "h"], sizes, none) == 2 + AHEAD
    assert peak([["x", "y"], ["z"]], {"x": 5, "y": 7, "z": 1}, none) == 13
    # What is made stays, and comes while the source goes: at the fourth step four files are ahead.
    assert peak(one, sizes, [10] * 8) == max(5 + 50, 4 + 60, 3 + 70, 2 + 80, 1 + 80)
    assert peak(["a"], sizes, [10]) == 11


@pytest.mark.parametrize("fault", ["cut", "short", "long", "other", "again"])
def test_what_networks_and_servers_do(
    fault: str, hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Cut connections, files of another size or content than listed: once, and each is made up
    for; always, and it is one error that names the file, after which the run can go on."""
    name = f"model-00003-of-{FILES:05d}.safetensors"
    file = hub.models["org/moe"].files[name]
    whole = file.content
    assert isinstance(whole, bytes)
    file.digest  # noqa: B018  (what is listed: of what it should be)
    wrong = {
        "short": whole[:-7],
        "long": whole + b"more",
        "other": whole[:-7] + bytes(7),
        "again": whole[:-7] + bytes(7),
    }
    times = [0]

    def before(request: str) -> None:
        if request == f"GET /org/moe/resolve/{commit}/{name}":
            times[0] += 1
            if fault != "cut" and times[0] > 1:  # the first is for the header
                file.content = wrong[fault] if fault == "again" or times[0] == 2 else whole

    commit = hub.models["org/moe"].branches["main"]
    hub.before = before
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS, "--stream")
    if fault == "cut":
        hub.cut[name] = [20_000, 0, 1000, 2000, 0]
    if fault == "again":
        said = refusal(*words)
        assert f"org/moe/{name}: what came is not what the hub lists" in said
        assert not (out / "config.json").exists()
        assert (out / ".nvfp4_moe" / "run.json").exists()
        assert not (out / ".nvfp4_moe" / "source" / name).exists()
        file.content = whole
        hub.before = lambda _: None
        words = (*words, "--resume")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert times[0] > 2
    assert without_revision(out) == expected


def test_a_list_that_does_not_say_what_is_in_lfs(
    hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """As a mirror's may be. Its hash is then that of git's pointer, and still tells one content
    from another."""
    hub.lists_lfs = False
    name = f"model-00003-of-{FILES:05d}.safetensors"
    file = hub.models["org/moe"].files[name]
    assert isinstance(file.content, bytes) and file.large
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--stream")
    assert run(*words).exit_code == 0
    assert without_revision(tmp_path / "out") == expected
    file.digest  # noqa: B018  (what is listed: of what it should be)
    file.content = file.content[:-7] + bytes(7)
    said = refusal("quantize", "org/moe", tmp_path / "other", *OPTIONS, "--stream")
    assert said.startswith(f"error: org/moe/{name}: what came is not what the hub lists")


REFUSALS = {
    "accept its terms on its page there": (403, "GatedRepo"),
    "check the name, and if it is private": (404, "RepoNotFound"),
    "if it is private log in with `hf auth login`": (401, "RepoNotFound"),
    "log in with `hf auth login`, and correct HF_TOKEN": (403, ""),
}


@pytest.mark.parametrize("to_do", REFUSALS)
def test_a_hub_that_says_no(to_do: str, hub: Hub, model: Path, tmp_path: Path) -> None:
    """In the middle: it is not asked again and again, and nobody waits. What was done is not lost,
    and the message says so."""
    name = f"model-00009-of-{FILES:05d}.safetensors"
    out = tmp_path / "out"

    def before(request: str) -> None:
        if "HEAD" in request and name in request:
            hub.refused["org/moe"] = REFUSALS[to_do]

    hub.before = before
    start = time.monotonic()
    said = refusal("quantize", "org/moe", out, *OPTIONS, "--stream")
    # Two come at a time, and either may be told first.
    assert re.search(r"org/moe/model-000\d\d-of-00014\.safetensors: ", said)
    assert "is not a folder here" not in said
    assert to_do in said and said.endswith("; then go on, by the same command with --resume")
    assert time.monotonic() - start < 20
    assert not (out / "config.json").exists()
    hub.before = lambda _: None
    hub.refused.clear()
    # Without the option, or at another commit, it is another run.
    said = refusal("quantize", "org/moe", out, *OPTIONS, "--resume")
    assert "the interrupted run was started with --stream; go on so" in said
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream", "--resume")
    assert result.exit_code == 0, result.output


def test_a_commit_that_vanishes(hub: Hub, model: Path, tmp_path: Path) -> None:
    """Its branch was written anew: what the message says to do works."""
    name = f"model-00009-of-{FILES:05d}.safetensors"
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS, "--stream")
    commits = hub.models["org/moe"].commits
    (gone,) = commits

    def before(request: str) -> None:
        if "HEAD" in request and name in request:
            commits.pop(gone, None)

    hub.before = before
    said = refusal(*words)
    assert re.search(r"org/moe/model-000\d\d-of-00014\.safetensors: ", said)
    assert said.endswith(
        f"; the hub has commit {gone} no longer: begin again with what it has now, by --overwrite"
    )
    hub.before = lambda _: None
    (model / "LICENSE").write_text("another")
    now = hub.publish("org/moe", model)
    assert now != gone
    result = run(*words, "--overwrite")
    assert result.exit_code == 0, result.output
    made = json.loads((out / "config.json").read_text())["nvfp4_moe"]["made"]
    assert made["revision"] == f"org/moe@{now}"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_a_model_that_has_another_name_now(
    when: str, status: int, hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The hub sends who asks for the old one to the new one."""
    out = tmp_path / "out"
    commit = hub.models["org/moe"].branches["main"]
    hub.models["org/new"] = hub.models["org/moe"]

    def rename(request: str = "") -> None:
        if not request or re.match("HEAD .*/model-00009-of", request):
            hub.renamed["org/moe"] = "org/new", status

    if when == "before":
        rename()
    hub.before = rename
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream")
    assert result.exit_code == 0, result.output
    assert any("org/new/resolve" in request for request in hub.requests)
    assert without_revision(out) == expected
    made = json.loads((out / "config.json").read_text())["nvfp4_moe"]["made"]
    assert made["revision"] == f"org/moe@{commit}"


DISK = {
    "read-only": OSError(errno.EROFS, "Read-only file system", "/out/.nvfp4_moe/source/x"),
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "a file in the way": NotADirectoryError(errno.ENOTDIR, "Not a directory"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    # As hf_xet 1.8.0 says them, which writes large files for the client of the true hub.
    "Xet, read-only": RuntimeError(
        "Task error: File reconstruction error: IO Error: Read-only file system (os error 30)"
    ),
    "Xet, full": RuntimeError(
        "Task error: File reconstruction error: IO Error: No space left on device (os error 28)"
    ),
}
"""How writing a file fails, and what the hub's client raises then."""


@pytest.mark.parametrize("kind", DISK)
def test_a_disk_of_dst_that_takes_no_more(
    kind: str, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle. It is DST's disk, no other setting helps; the run goes on later."""
    out, real, count = tmp_path / "out", huggingface_hub.hf_hub_download, [0]

    def download(*args: object, **more: object) -> object:
        count[0] += 1
        if count[0] == 9:
            raise DISK[kind]
        return real(*args, **more)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    words = ("quantize", "org/moe", out, *OPTIONS, "--stream")
    said = refusal(*words)
    assert said.startswith(f"error: {out}/.nvfp4_moe/source: ")
    assert "HF_HUB_CACHE" not in said and "reading it from the hub" not in said
    full = kind.endswith(("full", "quota"))
    assert ("free some space, then go on by the same command with --resume" in said) == full
    assert ("DST must be a folder that you can write to" in said) == (not full)
    assert not (out / "config.json").exists()
    result = run(*words, "--resume")
    assert result.exit_code == 0, result.output


XET = "Task error: File reconstruction error: CAS Client Error: "
STATUS = XET + "Request error: HTTP status client error ({}), domain: http://hub/v1/x"


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (XET + "Request middleware error: error sending request for url (http://hub/v2/x)", True),
        (XET + "Request error: error decoding response body, domain: no-url", True),
        (STATUS.format("429 Too Many Requests"), True),
        (STATUS.format("403 Forbidden"), False),
        (STATUS.format("404 Not Found"), False),
        ("Task error: File size mismatch: expected 5 bytes but downloaded 0 bytes", False),
    ],
)
def test_what_xet_says_of_networks(
    words: str,
    passes: bool,
    hub: Hub,
    model: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The true hub's large files come by it, and its errors are RuntimeErrors, whatever it was. The
    words are those of hf_xet 1.8.0 with servers that answered so, or not at all."""
    out, real, count = tmp_path / "out", huggingface_hub.hf_hub_download, [0]

    def download(*args: object, **more: object) -> object:
        count[0] += 1
        if count[0] == 9:
            raise RuntimeError(words)
        return real(*args, **more)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    command = ("quantize", "org/moe", out, *OPTIONS, "--stream")
    if passes:
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert f"{words}; trying again in" in " ".join(result.stderr.split())
        assert without_revision(out) == expected
    else:
        assert words in refusal(*command)


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)])
def test_a_file_where_the_folder_of_the_run_comes(
    flags: tuple[str, ...], hub: Hub, model: Path, tmp_path: Path
) -> None:
    there = tmp_path / "out" / ".nvfp4_moe"
    there.parent.mkdir()
    there.write_text("mine")
    said = refusal("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--stream", *flags)
    assert f"error: {there}" in said and "HF_HUB_CACHE" not in said
    assert "choose another" in said
    assert there.read_text() == "mine"


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_says_later_for_ever(
    status: int, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait is told of, and they end some time after the last byte came."""
    monkeypatch.setattr(streamed, "_LONGEST_WAIT", 0.1)
    monkeypatch.setattr(streamed, "_PATIENCE", 0.5)
    name = f"model-00009-of-{FILES:05d}.safetensors"

    def before(request: str) -> None:
        if "HEAD" in request and name in request:
            hub.refused[name] = status, ""

    hub.before = before
    out = tmp_path / "out"
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream")
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert re.search(rf"org/moe/{name}: [^;]*\b{status} ", said)
    assert "trying again in 0.1 s, and for 0." in said and "at most if nothing comes" in said
    assert 2 <= said.count("trying again") <= 5
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: org/moe/{name}: ") and f"{status} " in last
    assert "with --resume" in last
    hub.before = lambda _: None
    hub.refused.clear()
    result = run("quantize", "org/moe", out, *OPTIONS, "--stream", "--resume")
    assert result.exit_code == 0, result.output
    assert "trying again" not in result.output


def stopped(*_: object) -> None:
    raise KeyError("stopped")


def _quantize(url: str, cache: str, words: list[str]) -> None:
    """In a process of its own."""
    hub = Hub(url=url)
    with pytest.MonkeyPatch.context() as patch:
        use(hub, Path(cache), patch)
        os._exit(run(*words).exit_code)


@pytest.mark.parametrize("at", [1, 6, 14])
def test_a_kill_at_any_moment(
    at: int, hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """As the ``at``-th file is being sent. The next run downloads no file again that an output
    needed which is there, and leaves nothing behind."""
    out, count, killed = tmp_path / "out", [0], threading.Event()
    words = ["quantize", "org/moe", str(out), *map(str, OPTIONS), "--stream"]

    def before(request: str) -> None:
        if killed.is_set():
            return
        if request.startswith("HEAD") and "safetensors" in request and "index" not in request:
            count[0] += 1
            if count[0] == at:
                killed.set()
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]

    hub.before = before
    process = FORKED.Process(target=_quantize, args=(hub.url, str(tmp_path / "cache"), words))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "config.json").exists()
    made = {file.name for file in out.glob("*.safetensors")}
    there = {f.name for f in (out / ".nvfp4_moe" / "source").glob("*.safetensors.json")}
    hub.sent.clear()
    assert run(*words, "--resume").exit_code == 0
    assert without_revision(out) == expected
    assert {f.name for f in out.iterdir()} == {f.name for f in (tmp_path / "expected").iterdir()}
    files = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    shards = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {files[name] for name in files if shards[name] not in made}
    again = {name for name in set(files.values()) if hub.sent[name] > 16 * 2**10}
    assert again <= needed
    if at > 10:
        assert made
        assert there
        assert len(again) < FILES - 2


@pytest.mark.parametrize("thread", ["main", "another"])
def test_ctrl_c_while_the_hub_does_not_answer(
    thread: str, hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """All threads wait for files then; none waits for the hub. The system may give the signal to
    any of them."""
    out, count, over = tmp_path / "out", [0], threading.Event()
    words = ["quantize", "org/moe", str(out), *map(str, OPTIONS), "--stream"]
    when = []

    def before(request: str) -> None:
        if request.startswith("HEAD") and "safetensors" in request:
            count[0] += 1
            if count[0] == 4:
                time.sleep(0.5)
                when.append(time.monotonic())
                tasks = Path(f"/proc/{process.pid}/task").iterdir()
                main, *others = sorted(int(task.name) for task in tasks)
                os.kill(main if thread == "main" else others[-1], signal.SIGINT)
            if count[0] >= 4:
                over.wait(30)

    hub.before = before
    process = FORKED.Process(target=_quantize, args=(hub.url, str(tmp_path / "cache"), words))
    process.start()
    process.join(60)
    took = time.monotonic() - when[0]
    over.set()
    assert process.exitcode == 130
    assert took < 10
    assert not (out / "config.json").exists()
    hub.before = lambda _: None
    assert run(*words, "--resume").exit_code == 0
    assert without_revision(out) == expected


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_a_file_that_cannot_be_finished(
    threads: int, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, say, as the second file of DST is brought to it: all others wait for that,
    and what is said is why."""
    real, count = ShardWriter.finish, [0]

    def finish(writer: ShardWriter) -> None:
        count[0] += 1
        if count[0] == 2:
            time.sleep(1)  # until whatever can go on has
            writer.abort()
            raise QuantizeError("the disk is full")
        real(writer)

    monkeypatch.setattr(ShardWriter, "finish", finish)
    words = ("quantize", "org/moe", tmp_path / "out", "--max-shard-size", "4KB", "--stream")
    start = time.monotonic()
    said = refusal(*words, "--threads", threads)
    assert "the disk is full" in said
    assert time.monotonic() - start < 30
    assert run(*words, "--resume").exit_code == 0


@pytest.mark.parametrize("killed", [False, True])
def test_small_numbers_of_files_that_are_gone(
    killed: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report says the scales of keys and values, when all files have gone; in an earlier run
    even."""
    folder = save_source(tmp_path / "source", WAYS["modelopt"])
    source = in_shards(folder, tmp_path / "model", FILES)
    hub.publish("org/kv", source)
    more = []
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr("quantize.execute.collect", stopped)
            said = refusal("quantize", "org/kv", tmp_path / "one", *OPTIONS, "--stream")
        assert "stopped" in said
        more = ["--resume"]
    for name, what in (("one", ("org/kv", "--stream", *more)), ("two", (source,))):
        result = run("quantize", what[0], tmp_path / name, *OPTIONS, *what[1:])
        assert result.exit_code == 0, result.output
    reports = [
        json.loads((tmp_path / name / "nvfp4_moe_report.json").read_text())["kv_scales"]
        for name in ("one", "two")
    ]
    assert reports[0] == reports[1]
    assert reports[0]
    assert without_revision(tmp_path / "one") == without_revision(tmp_path / "two")


def test_what_it_cannot_do(hub: Hub, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text")
    words = ("quantize", "org/moe", tmp_path / "out", "--stream")
    said = refusal(*words, "--calibrate", tmp_path / "text", code=2)
    assert "run the whole model several times" in said
    assert refusal(*words, "--input-scales", tmp_path / "text", code=2)
    assert "leave one out" in refusal(*words, "--ray", "auto", code=2)
    said = refusal("quantize", model, tmp_path / "out", "--stream")
    assert "is on this machine" in said
    assert not hub.requests


def test_weights_that_are_nan(hub: Hub, model: Path, tmp_path: Path) -> None:
    """The file is named; after it is repaired on the hub, the run can be started again."""
    from safetensors.torch import load_file, save_file

    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    name = [n for n in sorted(index) if n.endswith(".up_proj.weight")][-1]
    file = model / index[name]
    tensors = load_file(file)
    damaged = {n: torch.full_like(t, float("nan")) if n == name else t for n, t in tensors.items()}
    save_file(damaged, file, {"format": "pt"})
    hub.publish("org/moe", model)
    said = refusal("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--stream")
    assert file.name in said
    assert name in said
    save_file(tensors, file, {"format": "pt"})
    hub.publish("org/moe", model)
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--stream")
    assert "had another source" in refusal(*words, "--resume")
    assert run(*words, "--overwrite").exit_code == 0


def test_minimax_m3_goes_through_a_disk_of_300_gb(hub: Hub, tmp_path: Path) -> None:
    """At true size, by holes: inspect is sent some megabytes of 852 GB, and 300 GB are enough for
    ``--stream``."""
    folder = minimax_m3(tmp_path / "m3")
    assert sum(file.stat().st_blocks * 512 for file in folder.iterdir()) < 20e6
    hub.models["org/m3"] = Model()
    hub.models["org/m3"].commit(
        {
            file.name: Stored(file, hashlib.sha256(file.name.encode()).hexdigest())
            if file.suffix == ".safetensors"
            else Stored(file.read_bytes())
            for file in folder.iterdir()
        }
    )
    with opened(look_up("org/m3"), stream=True) as checkpoint:
        steps = plan(checkpoint)
        assert 850e9 < checkpoint.nbytes < 860e9
        assert 250e9 < steps.nbytes < 265e9
        record = Record(tmp_path / "out", "")
        beside = bytes_beside(checkpoint, steps, record, range(len(steps.shards)))
        assert 15e9 < beside < 300e9 - steps.nbytes
    assert sum(hub.sent.values()) < 6e6


def test_hashes_are_those_of_the_hub(tmp_path: Path) -> None:
    """SHA-256, and for what is not in LFS git's own, as ``git hash-object`` gives it."""
    file = tmp_path / "file"
    file.write_bytes(b"what is up, doc?")
    assert streamed._hash_of(file, False) == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    assert streamed._hash_of(file, True) == hashlib.sha256(b"what is up, doc?").hexdigest()
