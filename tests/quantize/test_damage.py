"""Damaged sources, and what a failed run leaves behind: never what looks like a checkpoint."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantize.errors import QuantizeError
from tests.quantize import checkpoints, reference
from tests.quantize.checkpoints import ONE_THREAD, contents, convert
from tests.quantize.reference import INDEX

Folders = Callable[[str], Path]


# -- failures on the way ---------------------------------------------------------------------------


def assert_not_a_checkpoint(folder: Path) -> None:
    """Nothing that an engine would load, nothing half-written."""
    names = [f.name for f in folder.iterdir()] if folder.exists() else []
    assert "config.json" not in names
    assert INDEX not in names
    assert not [name for name in names if name.endswith(".partial")]
    for name in names:
        if name.endswith(".safetensors"):
            reference.read_file(folder / name)  # what has its name is complete


def with_value(source: Path, target: Path, name: str, value: float, at: tuple[int, ...]) -> Path:
    tensors = load_file(source / "model.safetensors")
    tensors[name][at] = value
    config = json.loads((source / "config.json").read_text())
    return checkpoints.save(target, tensors, config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("scales", ["max", "mse"])
def test_a_damaged_weight(
    kind: str, value: float, scales: str, saved: Folders, tmp_path: Path
) -> None:
    name = f"model.layers.1.mlp.experts.2.{kind}.weight"
    source = with_value(saved("qwen3_moe"), tmp_path / "source", name, value, (5, 7))
    with pytest.raises(QuantizeError) as caught:
        convert(source, tmp_path / "out", "modelopt", scales, max_shard_size=3000)
    assert str(caught.value).startswith("model.safetensors: ")
    assert name in str(caught.value)
    assert "NaN or infinite" in str(caught.value)
    assert_not_a_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(("row", "named"), [(3, "gate_proj"), (60, "up_proj")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_in_a_stack(
    row: int, named: str, value: float, stacked: Folders, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    source = with_value(stacked("qwen3_moe"), tmp_path / "source", name, value, (2, row, 7))
    with pytest.raises(QuantizeError) as caught:
        convert(source, tmp_path / "out")
    assert str(caught.value).startswith("model.safetensors: ")
    assert name in str(caught.value)
    assert f"model.layers.1.mlp.experts.2.{named}" in str(caught.value)
    assert_not_a_checkpoint(tmp_path / "out")


def test_a_failed_overwrite_leaves_the_old_checkpoint(saved: Folders, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    source = with_value(saved("qwen3_moe"), tmp_path / "source", name, float("inf"), (0, 0))
    convert(saved("qwen3_moe"), tmp_path / "out", max_shard_size=3000)
    before = contents(tmp_path / "out")
    with pytest.raises(QuantizeError):
        convert(source, tmp_path / "out", max_shard_size=3000, overwrite=True)
    after = contents(tmp_path / "out")
    assert {n: data for n, data in after.items() if not n.startswith(".nvfp4_moe/")} == before


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Writes beyond ``nbytes`` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [10, 5_000, 20_000])
def test_a_full_disk(nbytes: int, saved: Folders, tmp_path: Path) -> None:
    with pytest.raises((QuantizeError, OSError), match="File too large"), largest_file(nbytes):
        convert(saved("qwen3_moe"), tmp_path / "out")
    assert_not_a_checkpoint(tmp_path / "out")


def test_a_killed_run_can_be_repeated(trained: Path, quantized: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "quantize", str(trained), str(out), "--max-shard-size=1MB"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ONE_THREAD) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
    assert not (out / "config.json").exists()
    assert not (out / INDEX).exists()
    for file in out.glob("*.safetensors"):
        reference.read_file(file)
    convert(trained, out, scales="max", overwrite=True, activations=True)
    assert contents(out) == contents(quantized["modelopt"])


# -- damaged or foreign sources --------------------------------------------------------------------


@pytest.fixture
def sharded(saved: Folders, tmp_path: Path) -> Path:
    """A source in two files with an index."""
    source = saved("qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    return checkpoints.save(tmp_path / "source", tensors, config, lambda n: int("layers.1" in n))


def refusal(source: Path, tmp_path: Path) -> str:
    with pytest.raises(QuantizeError) as caught:
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def change_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    change(weight_map)
    checkpoints.write_index(folder, weight_map)


def test_an_index_that_names_a_tensor_that_is_not_there(sharded: Path, tmp_path: Path) -> None:
    first = min(f.name for f in sharded.glob("*.safetensors"))
    change_index(sharded, lambda m: m.update({"model.ghost.weight": first}))
    message = refusal(sharded, tmp_path)
    assert "model.ghost.weight" in message
    assert first in message


def test_an_index_that_puts_a_tensor_into_the_wrong_file(sharded: Path, tmp_path: Path) -> None:
    second = max(f.name for f in sharded.glob("*.safetensors"))
    change_index(sharded, lambda m: m.update({"lm_head.weight": second}))
    message = refusal(sharded, tmp_path)
    assert "lm_head.weight" in message
    assert second in message


def test_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    second = max(sharded.glob("*.safetensors"))
    second.unlink()
    message = refusal(sharded, tmp_path)
    assert second.name in message
    assert "missing" in message


@pytest.mark.parametrize("path", ["../x.safetensors", "/etc/x", "sub/x.safetensors", "..", ""])
def test_an_index_that_leaves_its_folder(path: str, sharded: Path, tmp_path: Path) -> None:
    shutil.copyfile(min(sharded.glob("*.safetensors")), tmp_path / "x.safetensors")
    change_index(sharded, lambda m: m.update({"lm_head.weight": path}))
    message = refusal(sharded, tmp_path)
    assert INDEX in message
    assert repr(path) in message


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}"])
def test_a_malformed_index(text: str, sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX).write_text(text)
    assert INDEX in refusal(sharded, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard(keep: int, sharded: Path, tmp_path: Path) -> None:
    file = max(sharded.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(sharded, tmp_path)
    assert file.name in message
    assert "not a complete safetensors file" in message


def test_a_tensor_in_two_files(sharded: Path, tmp_path: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(second) | {"lm_head.weight": load_file(first)["lm_head.weight"]}
    save_file(tensors, second)
    message = refusal(sharded, tmp_path)
    assert "lm_head.weight" in message
    assert first.name in message
    assert second.name in message


@pytest.mark.parametrize("text", ["{not json", "[]", "", "\xff\xfe"])
def test_a_config_that_is_no_json_object(text: str, sharded: Path, tmp_path: Path) -> None:
    (sharded / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refusal(sharded, tmp_path)


def test_a_missing_config(sharded: Path, tmp_path: Path) -> None:
    (sharded / "config.json").unlink()
    assert "config.json does not exist" in refusal(sharded, tmp_path)


def test_a_folder_without_safetensors(saved: Folders, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    shutil.copy(saved("qwen3_moe") / "config.json", tmp_path / "source")
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"pickle")
    message = refusal(tmp_path / "source", tmp_path)
    assert "safetensors" in message


def test_a_null_quantization_config_means_none(sharded: Path, tmp_path: Path) -> None:
    config = json.loads((sharded / "config.json").read_text()) | {"quantization_config": None}
    (sharded / "config.json").write_text(json.dumps(config))
    convert(sharded, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_an_unknown_gate_stops_before_anything_is_written(sharded: Path, tmp_path: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    config |= {"model_type": "brand_new", "architectures": ["BrandNewForCausalLM"]}
    (sharded / "config.json").write_text(json.dumps(config))
    message = refusal(sharded, tmp_path)
    assert "gate" in message
    assert "--gate" in message
