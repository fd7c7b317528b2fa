"""Files of weights that are larger than memory, and more than one set of them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.find import find
from quantize.experts.layers import check_layer_count
from tests.quantize import checkpoints, reference
from tests.quantize.reference import INDEX
from tests.quantize.test_cli import refusal, run
from tests.quantize.user_files import Folders


def test_a_file_larger_than_memory(saved: Folders, tmp_path: Path) -> None:
    """A sparse file: its header alone is read to inspect it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    folder = Path(shutil.copytree(saved("qwen3_moe"), tmp_path / "source"))
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = max(t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")
    count = 3 * memory
    header["huge"] = {"dtype": "U8", "shape": [count], "data_offsets": [end, end + count]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
        stream.truncate(8 + len(encoded) + end + count)
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "huge" in result.output


def test_what_the_header_says_is_what_the_library_reads(source: Path) -> None:
    from quantize.checkpoint.headers import read_header

    wanted = reference.read_file(source / "model.safetensors")
    found = read_header(source / "model.safetensors")
    assert {t.name: (t.dtype, list(t.shape)) for t in found} == {
        name: (raw.dtype, list(raw.shape)) for name, raw in wanted.items()
    }


TWO_SETS = {
    "two numbered sets": ("model", "consolidated"),
    "two savings": ("model", "model"),
    "a set and a file": ("model", ""),
}


@pytest.mark.parametrize("kind", TWO_SETS)
def test_two_sets_without_an_index(kind: str, source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    for which, stem in enumerate(TWO_SETS[kind]):
        count = 2 + which
        for number in range(1, count + 1) if stem else ():
            part = dict(list(tensors.items())[number - 1 :: count])
            renamed = {f"copy.{n}" if which else n: t for n, t in part.items()}
            save_file(renamed, source / f"{stem}-{number:05d}-of-{count:05d}.safetensors")
        if not stem:
            save_file({f"copy.{n}": t for n, t in tensors.items()}, source / "copy.safetensors")
    for command in (["inspect", source], ["quantize", source, tmp_path / "out"]):
        message = refusal(*command)
        assert "model-*-of-00002.safetensors" in message
        other = {"a set and a file": "copy.safetensors"}.get(
            kind, f"{TWO_SETS[kind][1]}-*-of-00003.safetensors"
        )
        assert other in message
        assert INDEX in message
    assert not (tmp_path / "out").exists()
    names = {n: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, n in enumerate(tensors)}
    checkpoints.write_index(source, names)
    assert run("inspect", source).exit_code == 0


def test_more_layers_of_experts_than_the_config_has(source: Path, tmp_path: Path) -> None:
    """Two copies under other names, of which an index makes one model."""
    tensors = load_file(source / "model.safetensors")
    copy = {n.removeprefix("model."): t.clone() for n, t in tensors.items() if "layers" in n}
    save_file(tensors | copy, source / "model.safetensors", {"format": "pt"})
    message = refusal("quantize", source, tmp_path / "out")
    assert "has 2 layers, but there are 4 layers of experts" in message
    assert "layers, model.layers" in message


def test_layers_of_nested_configs(source: Path) -> None:
    """Of all decoders and of drafting, but of no tower beside them."""
    with Checkpoint(source) as checkpoint:
        groups = find(checkpoint)
    more = [replace(group, prefix=f"talker.{group.prefix}") for group in groups]
    one, two = {"num_hidden_layers": 1}, {"num_hidden_layers": 2}
    for config in (
        {"text_config": two, "talker_config": {"text_config": two}},
        {"thinker_config": {"text_config": one | {"num_nextn_predict_layers": 1}}, "x": two},
        one | {"n_layers": 4},
    ):
        check_layer_count(config, groups + more, "config.json")
    for config in (
        {"text_config": one, "vision_config": two},
        {"text_config": two, "audio_config": {"text_config": two}},
        {"text_config": two | {"num_nextn_predict_layers": 1}},
    ):
        with pytest.raises(QuantizeError, match=r"there are 4 layers of experts \(model"):
            check_layer_count(config, groups + more, "config.json")


def test_layers_that_a_list_counts(source: Path) -> None:
    """Nemotron-H Puzzle has a list of layers in place of their number, and a number of others."""
    with Checkpoint(source) as checkpoint:
        groups = find(checkpoint)
    config = {"num_hidden_layers": None, "num_nextn_predict_layers": 0}
    check_layer_count(config | {"layers_block_type": ["moe", "moe"]}, groups, "config.json")
    with pytest.raises(QuantizeError, match="has 1 layers, but there are 2 layers of experts"):
        check_layer_count(config | {"layers_block_type": ["moe"]}, groups, "config.json")
