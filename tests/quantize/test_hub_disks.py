"""Models on the hub: whether disks have room for a download, and caches that cannot be written."""

import errno
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.filesize import decimal

from quantize.checkpoint.companions import companions
from quantize.checkpoint.hub import look_up
from quantize.checkpoint.opened import opened
from quantize.errors import QuantizeError
from quantize.run.fetch import fetch
from quantize.run.finish import written_names
from quantize.run.leftovers import replaced_by_new
from quantize.run.plan import plan
from quantize.run.target import FOLDER
from tests.hub_server import Hub
from tests.quantize.hub_models import hub
from tests.quantize.test_cli import refusal, run

__all__ = ["hub"]  # a fixture

NO_WRITING = "; set HF_HUB_CACHE to a folder that you can write to"
FULL = "; the hub's cache is {cache}: free some space there, or set HF_HUB_CACHE"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.EROFS, "Read-only file system", "{cache}/models--org--moe"), NO_WRITING),
        (PermissionError(errno.EACCES, "Permission denied", "{cache}"), NO_WRITING),
        (FileExistsError(errno.EEXIST, "File exists", "{cache}"), NO_WRITING),
        (OSError(errno.ENOSPC, "No space left on device"), FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "{cache}/models--org--moe/blobs/1"), FULL),
        (RuntimeError("Task error: IO Error: No space left on device (os error 28)"), FULL),
        (RuntimeError("Task error: IO Error: Permission denied (os error 13)"), NO_WRITING),
        # What has nothing to do with the cache.
        (PermissionError(errno.EACCES, "Permission denied", "/home/me/huggingface/token"), ""),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), ""),
        (RuntimeError("Task error: the service is away (os error 111)"), ""),
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_written(
    error: Exception, advice: str, hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's error has, at most, a path; what to do depends on what went wrong."""
    cache = constants.HF_HUB_CACHE
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(cache=cache)

    def fails(*_: object, **__: object) -> None:
        raise error

    hub.publish("org/moe", source)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    said = refusal("inspect", "org/moe")
    assert said.endswith(f"{' '.join(str(error).split())}{advice.format(cache=cache)}")


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # the client's own word
def test_disks_have_room_for_all_of_it(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads, output, copies and hidden states on one disk are added up, before the first of
    them; what an old checkpoint frees is counted, and what is in the cache is not downloaded."""
    (source / "LICENSE").write_text("x" * 1000)
    hub.publish("org/moe", source)
    size = (source / "model.safetensors").stat().st_size
    room: list[int] = []
    real = shutil.disk_usage

    def usage(path: object) -> object:
        found = real(path)  # type: ignore[call-overload]
        return found._replace(free=room[0]) if room else found

    monkeypatch.setattr(shutil, "disk_usage", usage)
    out = tmp_path / "out"
    with opened(look_up("org/moe"), whole=True) as checkpoint:
        steps = plan(checkpoint)
        copied = sum(map(len, map(Path.read_bytes, map(source.joinpath, companions(source)))))
        needed = size + steps.nbytes + copied
        for states in (0, 12345):
            room[:] = [needed + states - 1]
            with pytest.raises(QuantizeError, match="are still to be written") as caught:
                fetch(checkpoint, steps, out, states, None, False)
            assert ("--work-dir" in str(caught.value)) == bool(states)
            assert ("--stream" in str(caught.value)) == (not states)
            assert "HF_HUB_CACHE" in str(caught.value)
            # However small it is: sizes that look alike would say nothing.
            assert f"{decimal(needed + states)} are still" in str(caught.value)
            assert "free, 1 byte too little" in str(caught.value)
        room[:] = [needed - 1]
        assert "are still to be written" in refusal("quantize", "org/moe", out)
        assert not any("HEAD" in line and "safetensors" in line for line in hub.requests)
        assert not out.exists()
        room[:] = [needed]
        fetch(checkpoint, steps, out, 0, None, False)
    assert hub.sent["model.safetensors"] >= size
    room[:] = [steps.nbytes + copied]
    result = run("quantize", "org/moe", out)
    assert result.exit_code == 0, result.output
    # verify downloads, too.
    shutil.rmtree(tmp_path / "cache")
    room[:] = [size - 1]
    said = refusal("verify", "org/moe", out)
    assert f"{decimal(size)} are still to be downloaded" in said and "1 byte too little" in said
    # Again over it: the old checkpoint goes, though not before the download is here.
    room[:] = [size]
    with opened(look_up("org/moe"), whole=True) as checkpoint:
        with pytest.raises(QuantizeError, match="are still to be written"):
            fetch(checkpoint, steps, tmp_path / "other", 0, None, False)
        freed = replaced_by_new(out, out / FOLDER, written_names(steps, companions(source)))
        enough = max(size, needed - freed.nbytes(out))
        assert enough < needed
        room[:] = [enough - 1]
        with pytest.raises(QuantizeError, match="are still to be"):
            fetch(checkpoint, steps, out, 0, None, True)
        room[:] = [enough]
        fetch(checkpoint, steps, out, 0, None, True)
