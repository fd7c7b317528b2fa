"""``--stream`` that is killed or interrupted goes on, and downloads nothing twice."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.hub_server import Hub, use
from tests.quantize.processes import FORKED
from tests.quantize.streams import FILES, OPTIONS, expected, hub, model, without_revision
from tests.quantize.test_cli import run

__all__ = ["expected", "hub", "model"]  # fixtures


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
