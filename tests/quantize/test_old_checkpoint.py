"""An old checkpoint in the target, which stays until the new one is there."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantize import execute as pipeline
from quantize.errors import QuantizeError
from quantize.run.record import FOLDER
from tests.quantize import processes
from tests.quantize.test_cli import refusal, run
from tests.quantize.test_output_damage import Usage
from tests.quantize.user_files import (
    KILLED,
    MINE,
    SIZE,
    Folders,
    calibrate,
    others_checkpoint,
    tree,
)

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
