"""What tests of ``--stream`` share: a model in many files on a hub, and how much a run's
folder holds at most."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from quantize.checkpoint import hub_weights, streamed
from tests.hub_server import Hub, serving, use
from tests.quantize.checkpoints import contents
from tests.quantize.hub_models import in_shards
from tests.quantize.test_cli import run
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
