"""When, how long and where a run was made: in its report, and in nothing else."""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from quantize import execute as pipeline
from quantize.calibration.samples import load_samples
from quantize.checkpoint.hub import revision_of
from quantize.report import loads
from quantize.run.options import Options
from quantize.run.record import FOLDER
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.run.sessions import NAME, REPRODUCIBLE, Sessions
from tests.quantize.checkpoints import convert
from tests.quantize.test_calibration import interrupted, resumed

CPU = [torch.device("cpu")]


def everything(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name not in but}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what all other tests have: see ``tests/__init__.py``."""
    monkeypatch.delenv(REPRODUCIBLE)


def report(folder: Path) -> Any:
    return loads((folder / REPORT_DATA).read_bytes())


def test_a_run_says_when_and_where(
    recorded: None, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "all_devices", lambda: CPU)
    before = datetime.now(UTC)
    convert(saved("qwen3_moe"), tmp_path / "out")
    (session,) = report(tmp_path / "out").sessions
    started = datetime.fromisoformat(session.started)
    assert before - timedelta(seconds=2) <= started <= datetime.now(UTC)
    assert set(session.seconds) == {"checks", "shards"}
    took = (datetime.now(UTC) - before).total_seconds()
    assert 0 < sum(session.seconds.values()) < took + 1
    assert session.machine.memory == psutil.virtual_memory().total
    assert session.machine.cores == len(psutil.Process().cpu_affinity() or [])
    assert platform.python_version() in session.machine.system
    assert f": {session.machine.cpu}\n" in Path("/proc/cpuinfo").read_text()
    assert (session.machine.gpus, session.machine.cuda, session.cluster) == ([], None, 0)
    # No other file has any of it; and without it, the report neither.
    with monkeypatch.context() as patch:
        patch.setenv(REPRODUCIBLE, "0")
        convert(saved("qwen3_moe"), tmp_path / "again" / "out")
    again = report(tmp_path / "again" / "out")
    assert again.sessions == []
    reports = REPORT, REPORT_DATA
    assert everything(tmp_path / "out", reports) == everything(tmp_path / "again" / "out", reports)
    data = [
        json.loads((tmp_path / folder / REPORT_DATA).read_text()) for folder in ("out", "again/out")
    ]
    assert [len(one.pop("sessions")) for one in data] == [1, 0]
    assert data[0] == data[1]


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_has_its_sessions_and_their_phases(
    recorded: None, trained: Path, text: Path, tmp_path: Path
) -> None:
    rows, out = load_samples(text, trained, 4, 64), tmp_path / "out"
    only = Options(include=("*.layers.1.*",))
    of = {"settings": {"method": "gptq"}, "devices": CPU, "counting": lambda *_: None}
    interrupted(1.3, trained, out, rows, only, **of)
    (first,) = json.loads((out / FOLDER / NAME).read_text())["sessions"]
    assert set(first["seconds"]) == {"checks", "proof", "counting tokens", "calibration"}
    resumed(trained, out, rows, only, **of)
    one, two = report(out).sessions
    assert one.seconds == first["seconds"]
    assert {"calibration", "shards"} < set(two.seconds)
    assert one.started <= two.started
    assert not (out / FOLDER).exists()
    # The text's digest, by the definition in the documentation.
    tokens = rows.numpy().astype("<i8").tobytes()
    assert report(out).calibration.digest == hashlib.sha256(tokens).hexdigest()


MACHINE = {"system": "s", "cpu": "c", "cores": 1, "memory": 1, "gpus": [], "cuda": None}
SESSION = {"started": "now", "seconds": {"a": 1.0}, "machine": MACHINE, "cluster": 0}


@pytest.mark.parametrize(
    "planted",
    [
        "[]", "{}", '{"sessions": 3}', '{"sessions": [{"started": 1}]}', "not JSON",
        *(
            json.dumps({"sessions": [SESSION | changed]})
            for changed in (
                {"started": 1}, {"seconds": {"a": float("inf")}}, {"seconds": {"a": "1"}},
                {"cluster": None}, {"machine": {}}, {"machine": MACHINE | {"gpus": "H200"}},
                {"machine": MACHINE | {"more": 1}}, {"machine": MACHINE | {"cores": "1"}},
            )
        ),
    ],
)  # fmt: skip
def test_what_anyone_may_have_written_is_not_believed(
    recorded: None, planted: str, tmp_path: Path
) -> None:
    (tmp_path / NAME).write_text(json.dumps({"sessions": [SESSION]}))
    assert len(Sessions(tmp_path, CPU, 0.0).all) == 2
    (tmp_path / NAME).write_text(planted)
    assert len(Sessions(tmp_path, CPU, 0.0).all) == 1
    assert len(Sessions(tmp_path, CPU, 0.0).all) == 2


def test_another_run_does_not_inherit_them(
    recorded: None, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "finish", stop)
        convert(saved("qwen3_moe"), out)
    assert (out / FOLDER / NAME).exists()
    convert(saved("qwen3_moe"), out, overwrite=True)
    assert len(report(out).sessions) == 1


def test_which_revision_a_folder_is_of(saved: Callable[[str], Path], tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--org--my-model" / "snapshots" / commit
    shutil.copytree(saved("qwen3_moe"), cached)
    assert revision_of(cached) == f"org/my-model@{commit}"
    local = tmp_path / "local"
    shutil.copytree(saved("qwen3_moe"), local)
    assert revision_of(local) is None
    notes = local / ".cache" / "huggingface" / "download" / "config.json.metadata"
    notes.parent.mkdir(parents=True)
    notes.write_text(f"{commit}\netag\n1700000000.0\n")
    assert revision_of(local) == commit
    notes.write_text("main\n")
    assert revision_of(local) is None
    found = []
    for folder in (cached, local):
        convert(folder, tmp_path / folder.name / "out")
        found.append(report(tmp_path / folder.name / "out"))
    assert found[0].revision == f"org/my-model@{commit}"
    assert found[1].revision is None
    assert found[0].source_digest == found[1].source_digest
    changed = tmp_path / "changed"
    shutil.copytree(local, changed)
    (changed / "generation_config.json").write_text("{}")
    convert(changed, tmp_path / "changed_out")
    assert report(tmp_path / "changed_out").source_digest != found[0].source_digest


def test_a_full_disk_is_not_found_here(
    recorded: None, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run says of itself is no reason to stop it."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("quantize.run.sessions.write_json", full)
    convert(saved("qwen3_moe"), tmp_path / "out")
    assert len(report(tmp_path / "out").sessions) == 1
