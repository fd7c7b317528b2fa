"""How much of a download has come: what is counted in the hub's cache, and what is said of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import pytest
from rich.filesize import decimal

from quantize.checkpoint.coming import counted
from tests.hub_server import Hub, environment, serving, use
from tests.quantize.checkpoints import ONE_THREAD
from tests.quantize.hub_models import in_shards
from tests.quantize.test_cli import refusal, run
from tests.quantize.test_evaluate_run import made, words  # noqa: F401  (a fixture)

SIZES = {"a" * 64: 100_000, "b" * 64: 50_000, "c" * 40: 1000}


def test_what_is_counted(tmp_path: Path) -> None:
    """Files as they grow, under names with and without more than the hash; not what a killed
    download has left, nor what is none of them; whole files wholly, and no more than there is."""
    told: Queue[int] = Queue()
    (tmp_path / ("a" * 64 + ".0123abcd.incomplete")).write_bytes(b"x" * 70_000)
    (tmp_path / ("b" * 64 + ".incomplete")).write_bytes(b"x" * 8_192)
    (tmp_path / ("d" * 64 + ".incomplete")).write_bytes(b"x" * 8_192)
    with counted(tmp_path, SIZES, told.put, every=0.01):
        new = tmp_path / ("a" * 64 + ".4567abcd.incomplete")
        new.write_bytes(b"x" * 40_960)
        assert told.get(timeout=10) == 40_960
        with (tmp_path / ("b" * 64 + ".incomplete")).open("ab") as old:  # it is gone on with
            old.write(b"x" * 20_480)
        assert told.get(timeout=10) == 20_480
        (tmp_path / ("d" * 64)).write_bytes(b"x" * 8_192)
        new.write_bytes(b"x" * 4_096)  # another try has begun: what is told of goes not back
        (tmp_path / ("c" * 40)).write_bytes(b"x" * 1000)
        (tmp_path / ("b" * 64 + ".incomplete")).rename(tmp_path / ("b" * 64))
        new.write_bytes(b"x" * 200_000)
        found = 40_960 + 20_480
        while found < sum(SIZES.values()):
            found += told.get(timeout=10)
        assert found == sum(SIZES.values())
    assert told.empty()


def test_what_the_cache_does_not_show_is_there_at_the_end(tmp_path: Path) -> None:
    """As without links, where a file never lies by its hash; but not if the download fails."""
    told: list[int] = []
    with counted(tmp_path / "none", SIZES, told.append):
        pass
    assert sum(told) == sum(SIZES.values())
    told.clear()
    with pytest.raises(ConnectionError), counted(tmp_path / "none", SIZES, told.append):
        raise ConnectionError
    assert told == []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as found:
        use(found, tmp_path / "cache", monkeypatch)
        yield found


@pytest.mark.parametrize("command", ["quantize", "verify", "evaluate"])
def test_a_download_has_lines_of_its_own(
    command: str, hub: Hub, made: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """In the log too; of what is here already there are none."""
    hub.publish("org/moe", made / "src")
    nbytes = hub.models["org/moe"].files["model.safetensors"].size
    log = tmp_path / "run.log"
    given = {
        "quantize": ["quantize", "org/moe", tmp_path / "new"],
        "verify": ["verify", "org/moe", made / "dst"],
        "evaluate": ["evaluate", "org/moe", *words(made)[2:]],
    }[command]
    result = run(*given, "--log-file", log)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Downloading: ")]
    assert lines[0] == f"Downloading: 0 bytes of {decimal(nbytes)}, 0%"
    all_of_it = re.escape(f"{decimal(nbytes)} of {decimal(nbytes)}")
    assert re.fullmatch(rf"Downloading: {all_of_it}, 100%, [\d.]+ \w?B/s", lines[-1])
    assert all(line in log.read_text() for line in lines)
    again = run(*given[:2], tmp_path / "more" if command == "quantize" else given[2], *given[3:])
    assert again.exit_code == 0 and "Downloading" not in again.output


def test_none_of_the_clients_bars(hub: Hub, made: Path, tmp_path: Path) -> None:  # noqa: F811
    """Whose lines are of their own, and not quiet."""
    hub.publish("org/moe", in_shards(made / "src", tmp_path / "model", 3))

    def said(*more: str) -> str:
        env = ONE_THREAD | environment(hub, tmp_path / f"cache{len(more)}")
        del env["HF_HUB_DISABLE_PROGRESS_BARS"]
        done = subprocess.run(
            [sys.executable, "-c", "from quantize.cli import main; main()", "quantize", "org/moe",
             tmp_path / f"out{len(more)}", *more],
            capture_output=True, text=True, check=False, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    found = said()
    assert "Downloading: " in found
    assert "\r" not in found and "Fetching" not in found and "it/s" not in found
    assert said("--quiet") == ""


def test_a_text_that_is_not_there_is_missed_first(
    hub: Hub, made: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """Nothing is downloaded for it."""
    hub.publish("org/moe", made / "src")
    given = ["evaluate", "org/moe", made / "dst", "--text", tmp_path / "none.txt"]
    assert "there is no such file" in refusal(*given)
    assert hub.requests == []
