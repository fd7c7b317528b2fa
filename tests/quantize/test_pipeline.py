"""Checkpoint to checkpoint: what comes out."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantize.cli.options import parse_size
from quantize.errors import QuantizeError
from quantize.experts.gates import Gate
from quantize.layouts import LAYOUTS
from quantize.run.record import FOLDER
from tests.quantize import checkpoints, reference
from tests.quantize.checkpoints import contents, convert
from tests.quantize.reference import INDEX, Raw
from tests.trained import Sizes

Folders = Callable[[str], Path]

SUFFIXES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale"),
}


def is_routed(name: str) -> bool:
    return ".experts." in name


def source_weights(source: Path) -> dict[str, np.ndarray]:
    """float32 weights of the routed experts, one per expert, by module path."""
    stored = {
        name: torch.from_numpy(raw.array().astype(np.float32))
        for name, raw in reference.read_folder(source).items()
        if is_routed(name)
    }
    split = checkpoints.per_expert(stored)
    return {name.removesuffix(".weight"): tensor.numpy() for name, tensor in split.items()}


def assert_experts_follow_the_max_rule(
    source: Path, out: dict[str, Raw], layout: str, every: int = 1
) -> None:
    weights = source_weights(source)
    named = any(name.endswith(".w1") for name in weights)
    gate, up, down = ("w1", "w3", "w2") if named else checkpoints.PROJECTIONS
    experts = sorted({name.rpartition(".")[0] for name in weights})
    assert experts
    for expert in experts[::every]:
        for together in ((gate, up), (down,)):
            names = [f"{expert}.{kind}" for kind in together]
            scale, wanted = reference.max_rule(*(weights[name] for name in names))
            for name, (codes, scales) in zip(names, wanted, strict=True):
                packed, block, factor = (out[f"{name}.{s}"].array() for s in SUFFIXES[layout])
                np.testing.assert_array_equal(reference.unpack(packed), codes, err_msg=name)
                np.testing.assert_array_equal(block, scales, err_msg=name)
                assert factor == (scale if layout == "modelopt" else np.float32(1) / scale), name


def assert_the_rest_is_untouched(source: Path, out: dict[str, Raw]) -> None:
    original = {n: raw for n, raw in reference.read_folder(source).items() if not is_routed(n)}
    assert {name: raw for name, raw in out.items() if not is_routed(name)} == original


# -- what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "minimax_m3"])
@pytest.mark.parametrize("form", ["saved", "stacked"])
def test_tiny_models(
    form: str, name: str, layout: str, saved: Folders, stacked: Folders, tmp_path: Path
) -> None:
    source = {"saved": saved, "stacked": stacked}[form](name)
    summary = convert(source, tmp_path / "out", layout)
    out = reference.read_folder(tmp_path / "out")
    assert_the_rest_is_untouched(source, out)
    assert_experts_follow_the_max_rule(source, out, layout)
    routed = [name for name in out if is_routed(name)]
    assert len(routed) == 3 * len({name.rpartition(".")[0] for name in routed})
    assert summary.bytes_before == sum(
        len(raw.data) for raw in reference.read_folder(source).values()
    )
    assert summary.bytes_after == sum(len(raw.data) for raw in out.values())
    assert summary.shards == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trained_models_in_both_layouts(
    each_trained: Path, quantized_of: Callable[[Path], dict[str, Path]], layout: str
) -> None:
    out = reference.read_folder(quantized_of(each_trained)[layout])
    assert_the_rest_is_untouched(each_trained, out)
    assert_experts_follow_the_max_rule(each_trained, out, layout, every=9)
    sizes = Sizes.of(each_trained)
    assert len(out) == len(sizes.sparse) * sizes.experts * 3 * 4 + len(
        [name for name in reference.read_folder(each_trained) if not is_routed(name)]
    )


def test_a_trained_model_from_the_hub_layout(trained_hub: Path, tmp_path: Path) -> None:
    convert(trained_hub, tmp_path / "out")
    out = reference.read_folder(tmp_path / "out")
    assert_the_rest_is_untouched(trained_hub, out)
    assert_experts_follow_the_max_rule(trained_hub, out, "modelopt", every=20)
    assert "model.layers.3.block_sparse_moe.experts.7.w3.weight_scale_2" in out


def test_mse_is_closer_than_max(saved: Folders, tmp_path: Path) -> None:
    errors = {}
    for rule in ("max", "mse"):
        convert(saved("qwen3_moe"), tmp_path / rule, "modelopt", rule)
        out = reference.read_folder(tmp_path / rule)
        errors[rule] = sum(
            ((reference.weight(out, name) - weight) ** 2).sum()
            for name, weight in source_weights(saved("qwen3_moe")).items()
        )
        assert_the_rest_is_untouched(saved("qwen3_moe"), out)
    assert errors["mse"] < 0.95 * errors["max"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_float_dtypes(dtype: torch.dtype, stacked: Folders, tmp_path: Path) -> None:
    source = stacked("qwen3_moe")
    tensors = {n: t.to(dtype) for n, t in load_file(source / "model.safetensors").items()}
    config = json.loads((source / "config.json").read_text())
    checkpoints.save(tmp_path / "source", tensors, config)
    convert(tmp_path / "source", tmp_path / "out")
    out = reference.read_folder(tmp_path / "out")
    assert_the_rest_is_untouched(tmp_path / "source", out)
    assert_experts_follow_the_max_rule(tmp_path / "source", out, "modelopt")


def test_interleaved_and_transposed_experts_come_out_as_plain_ones(
    stacked: Folders, tmp_path: Path
) -> None:
    """The same numbers in GPT-OSS's order give the same output, if the gate says so."""
    source = stacked("qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            tensors[name] = torch.stack(tensor.chunk(2, 1), 2).flatten(1, 2).mT
        elif name.endswith("experts.down_proj"):
            tensors[name] = tensor.mT
    # Of a class that is known, the order of rows is the class's.
    unknown = config | {"model_type": "new_moe", "architectures": ["NewMoeForCausalLM"]}
    checkpoints.save(tmp_path / "interleaved", tensors, unknown)
    convert(source, tmp_path / "plain")
    convert(tmp_path / "interleaved", tmp_path / "out", gate=Gate("silu", interleaved=True))
    assert reference.read_folder(tmp_path / "out") == reference.read_folder(tmp_path / "plain")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["nvfp4_moe"]["gate"]["interleaved"] is False  # gate and up are apart now


def test_tensors_of_every_dtype_and_shape_pass_through(saved: Folders, tmp_path: Path) -> None:
    """Odd lengths also put all that follows at odd addresses."""
    source = saved("qwen3_moe")
    tensors = load_file(source / "model.safetensors") | {
        "a.bool": torch.tensor([True, False, True]),
        "a.scalar": torch.tensor(2.5, dtype=torch.float64),
        "a.empty": torch.empty(0, 4),
        "b.int": torch.arange(5),
        "b.byte": torch.arange(7, dtype=torch.uint8),
        "b.nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    }
    config = json.loads((source / "config.json").read_text())
    checkpoints.save(tmp_path / "source", tensors, config)
    convert(tmp_path / "source", tmp_path / "out")
    assert_the_rest_is_untouched(tmp_path / "source", reference.read_folder(tmp_path / "out"))
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        if not is_routed(name):
            assert torch.equal(
                loaded[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
            )


def test_config_keeps_everything_and_says_what_was_done(trained: Path, quantized: Any) -> None:
    before = json.loads((trained / "config.json").read_text())
    for folder in quantized.values():
        after = json.loads((folder / "config.json").read_text())
        made = after["nvfp4_moe"].pop("made")
        assert (made["layout"], made["scales"], made["activations"]) == (folder.name, "mse", True)
        assert made["rounding"] is None and made["include"] == made["exclude"] == []
        assert after.pop("nvfp4_moe") == {
            "version": 1,
            "gate": {
                "form": "swiglu_oai",
                "alpha": 1.702,
                "beta": 1.0,
                "limit": 7.0,
                "interleaved": False,
            },
        }
        assert after.pop("quantization_config")["quant_method"]
        assert after == before


def test_other_files_are_copied_and_weights_are_not(saved: Folders, tmp_path: Path) -> None:
    source = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    shutil.copytree(saved("qwen3_moe"), source)
    (source / "../../blobs").mkdir()
    (source / "../../blobs/0123").write_text('{"from": "the hub cache"}')
    (source / "tokenizer.json").symlink_to("../../blobs/0123")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer.model").write_bytes(bytes(range(256)))
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    convert(source, tmp_path / "out")
    out = tmp_path / "out"
    assert not (out / "tokenizer.json").is_symlink()
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    generation = source / "generation_config.json"
    assert (out / generation.name).read_bytes() == generation.read_bytes()
    assert not (out / "pytorch_model.bin").exists()


# -- shards ----------------------------------------------------------------------------------------


def job_of(name: str) -> str:
    """What is written in one go: one expert's gate and up, one expert's down, any other tensor."""
    if not is_routed(name):
        return name
    expert, kind, _ = name.rsplit(".", 2)
    return f"{expert}.{'down' if kind in ('down_proj', 'w2') else 'gate and up'}"


@pytest.mark.parametrize("limit", [1, 1500, 3000, 20_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards(limit: int, layout: str, saved: Folders, tmp_path: Path) -> None:
    source, out = saved("qwen3_moe"), tmp_path / "out"
    convert(source, tmp_path / "whole", layout)
    summary = convert(source, out, layout, max_shard_size=limit)
    index = json.loads((out / INDEX).read_text())
    files = sorted(out.glob("*.safetensors"))
    count = len(files)
    assert count == summary.shards > 1
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert set(index["weight_map"].values()) == {f.name for f in files}
    total = 0
    for file in files:
        raw = reference.read_file(file)
        assert set(load_file(file)) == set(raw)  # safetensors' own loader takes it
        assert {name for name, f in index["weight_map"].items() if f == file.name} == set(raw)
        size = sum(len(tensor.data) for tensor in raw.values())
        assert size <= limit or len({job_of(name) for name in raw}) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    assert reference.read_folder(out) == reference.read_folder(tmp_path / "whole")


def test_one_shard_has_no_index(saved: Folders, tmp_path: Path) -> None:
    convert(saved("qwen3_moe"), tmp_path / "out")
    assert [f.name for f in tmp_path.glob("out/*.safetensors*")] == ["model.safetensors"]


SHARDINGS: dict[str, Callable[[str], int]] = {
    "gate, up and down apart": lambda n: (
        1 + ["gate_", "up_", "down_"].index(n.split(".")[-2][:-4]) if is_routed(n) else 0
    ),
    "one tensor a file": lambda n: zlib.crc32(n.encode()),
    "by last expert digit": lambda n: int(n.split(".")[-3]) if is_routed(n) else 9,
}


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_sharding_of_the_source_changes_nothing(
    sharding: str, saved: Folders, tmp_path: Path
) -> None:
    source = saved("qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    spread = checkpoints.save(tmp_path / "spread", tensors, config, SHARDINGS[sharding])
    assert len(list(spread.glob("*.safetensors"))) > 3
    convert(source, tmp_path / "one")
    convert(spread, tmp_path / "two", max_shard_size=4000)
    assert reference.read_folder(tmp_path / "two") == reference.read_folder(tmp_path / "one")


def test_stacked_halves_in_different_shards(stacked: Folders, tmp_path: Path) -> None:
    source = stacked("minimax_m3")
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    spread = checkpoints.save(
        tmp_path / "spread", tensors, config, lambda name: int(name.endswith("gate_up_proj"))
    )
    convert(source, tmp_path / "one")
    convert(spread, tmp_path / "two")
    assert reference.read_folder(tmp_path / "two") == reference.read_folder(tmp_path / "one")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 500 * 10**6),
        ("2GiB", 2 * 2**30),
        ("1.5kb", 1500),
        ("123", 123),
        (" 7 b ", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "0", "-1GB", "nan", "inf", "1e999", "5 5GB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(QuantizeError, match=r"size|larger"):
        parse_size(text)


# -- the target ------------------------------------------------------------------------------------


def test_a_target_with_files_is_refused_and_left_alone(saved: Folders, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(QuantizeError, match=r"out is not empty.*--overwrite"):
        convert(saved("qwen3_moe"), tmp_path / "out")
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}


def test_an_empty_or_missing_target_is_taken(saved: Folders, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b"):
        convert(saved("qwen3_moe"), target)
        assert (target / "config.json").exists()


def test_a_file_as_target(saved: Folders, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(QuantizeError, match="out is a file"):
        convert(saved("qwen3_moe"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "a file"


def test_overwriting_leaves_nothing_of_the_old_checkpoint(saved: Folders, tmp_path: Path) -> None:
    convert(saved("mixtral"), tmp_path / "out", "modelopt", max_shard_size=3000)
    (tmp_path / "out" / FOLDER).mkdir()
    (tmp_path / "out" / FOLDER / "model-00001-of-00003.safetensors.partial").write_bytes(b"old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    convert(saved("qwen3_moe"), tmp_path / "out", "compressed-tensors", overwrite=True)
    convert(saved("qwen3_moe"), tmp_path / "fresh", "compressed-tensors")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh") | {"notes.txt": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("way", ["itself", "a link", "a detour"])
def test_the_source_as_target(way: str, overwrite: bool, saved: Folders, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(saved("qwen3_moe"), source)
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    ways = {
        "itself": source,
        "a link": tmp_path / "link",
        "a detour": tmp_path / "link" / ".." / "source",
    }
    with pytest.raises(QuantizeError, match="is the source"):
        convert(source, ways[way], overwrite=overwrite)
    assert contents(source) == before
