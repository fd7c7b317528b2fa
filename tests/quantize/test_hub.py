"""Models on the hub: what is downloaded, and that nothing is for nothing."""

import json
from pathlib import Path

import pytest

from quantize.checkpoint.hub import look_up, resolve
from quantize.checkpoint.identity import identity_of
from quantize.checkpoint.opened import opened
from tests.hub_server import Hub
from tests.quantize.checkpoints import contents
from tests.quantize.hub_models import hub
from tests.quantize.test_cli import refusal, run

__all__ = ["hub"]  # a fixture


def test_without_the_hub_the_cache_is_enough(hub: Hub, source: Path, tmp_path: Path) -> None:
    """And identities are equal, whether a model's weights are there or only its headers."""
    (source / "pytorch_model.bin").write_bytes(b"not of the model")
    commit = hub.publish("org/moe", source)
    with opened(look_up("org/moe"), whole=True) as headers:
        known = {file.name: headers.weights.digest(file) for file in headers.files}
        assert not headers.weights.here
    folder = resolve("org/moe")
    with opened(look_up("org/moe"), whole=True) as cached:
        assert cached.weights.here
        assert cached.folder == folder
        identity = identity_of(cached)
        assert identity.files == known
        assert identity.revision == f"org/moe@{commit}"
    hub.publish("org/part", source)
    assert run("inspect", "org/part").exit_code == 0
    hub.refused |= {"org/moe": (500, ""), "org/part": (500, "")}
    assert resolve("org/moe") == folder
    assert run("inspect", "org/moe").exit_code == 0
    for name in ("org/other", "org/part"):
        assert "reading it from the hub failed" in refusal("inspect", name)


def test_all_that_belongs_comes(hub: Hub, source: Path, tmp_path: Path) -> None:
    """Quantizing from the hub gives what quantizing the folder gives."""
    (source / "README.md").write_text("of the source")
    (source / "notes.zip").write_bytes(b"not of the model")
    hub.publish("org/moe", source)
    for name, what in (("one", "org/moe"), ("two", source)):
        assert run("quantize", what, tmp_path / name).exit_code == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    same = {name for name in one if one[name] == two[name]}
    assert one.keys() - same == {"config.json"}
    assert "notes.zip" not in hub.sent


def test_nothing_is_downloaded_for_nothing(hub: Hub, source: Path, tmp_path: Path) -> None:
    """What can refuse a run is asked first: here a pattern, an option, and a model without a gate
    that is known."""
    hub.publish("org/moe", source)
    out = tmp_path / "out"
    assert refusal("quantize", "org/moe", out, "--exclude", "*")
    assert refusal("quantize", "org/moe", out, "--scales", "max", "--include", "no.such.module")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "brand_new", "architectures": ["BrandNew"]}
    (source / "config.json").write_text(json.dumps(config))
    hub.publish("org/moe", source)
    assert "--gate" in refusal("quantize", "org/moe", out)
    assert not any("HEAD" in line and "safetensors" in line for line in hub.requests)
    assert not out.exists()


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_a_dry_run_downloads_nothing(
    more: list[str], hub: Hub, source: Path, tmp_path: Path
) -> None:
    """It says what would be; and what refuses the run refuses it."""
    hub.publish("org/moe", source)
    result = run("quantize", "org/moe", tmp_path / "out", "--dry-run", *more)
    assert result.exit_code == 0, result.output
    size = (source / "model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB to be downloaded" in result.stdout or more
    assert "Time: of downloading" in result.stdout
    assert not any("HEAD" in line and "safetensors" in line for line in hub.requests)
    assert not (tmp_path / "out").exists()
    out = ("quantize", "org/moe", tmp_path / "out", "--push-to", "me/moe", "--dry-run")
    assert run(*out).exit_code == 0
    assert "me/moe" not in hub.models


@pytest.mark.parametrize("more", [[], ["--bits", "5"], ["--weight-only", "1"]], ids=str)
def test_a_dry_run_of_a_calibration_downloads_nothing(
    more: list[str], hub: Hub, trained: Path, tmp_path: Path
) -> None:
    """Memory and disk are arithmetic on headers; time would take weights."""
    (tmp_path / "a.txt").write_text("".join(f"x{n} = {n}\n" for n in range(999)))
    hub.publish("org/moe", trained)
    size = ("--calibration-rows", "4", "--calibration-length", "64")
    command = ("quantize", "org/moe", tmp_path / "out", "--input-scales", tmp_path / "a.txt", *size)
    result = run(*command, *more, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "Calibration: about" in result.stderr and "of memory" in result.stderr
    assert "are known once" in result.stderr or "is known once" in result.stderr or not more
    assert "Time: of downloading" in result.stdout
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
