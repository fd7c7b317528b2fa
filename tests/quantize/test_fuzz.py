"""Random damage to everything that a checkpoint says of itself: messages, never a traceback.

Cases come from valid files, changed in a few places, so that they get past the first check. They
are the same in each run; ``FUZZ=20000 pytest tests/quantize/test_fuzz.py`` tries as many others.
"""

import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from quantize.cli.app import app
from tests.quantize import checkpoints
from tests.quantize.checkpoints import write_index
from tests.quantize.reference import INDEX

RANDOM = int(os.environ.get("FUZZ", "0"))


def cases(count: int) -> Callable[[Any], Any]:
    """That many, the same ones each time; or ``FUZZ`` new ones."""
    return settings(
        max_examples=RANDOM or count,
        derandomize=not RANDOM,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# -- the strategies --------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 3, 16, 31, 32, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400)
STRINGS = (
    *("", ".", "..", "../x.safetensors", "/etc/passwd", "config.json", "a\0b", "model.safetensors"),
    *("[bold]", "[/]", "\\", "\x1b[31m", "\n", "\ud800", "é", "²", "x" * 5000, "9" * 5000),
    *("BF16", "F8_E4M3", "F4", "U8", "F64", "BOOL", "mixtral", "gpt_oss", "deepseek_v3"),
    *("fp8", "NVFP4", "modelopt", "compressed-tensors", "silu", "gelu", "full_attention"),
    "model.layers.0.mlp.experts.0.gate_proj.weight",
    "model.layers.0.mlp.experts." + "9" * 5000 + ".w1.weight",
    "model.layers.²1.mlp.experts.gate_up_proj",
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-5, 300),
    st.floats(),
    st.sampled_from(STRINGS),
    st.text(max_size=5),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from(STRINGS), st.text(max_size=3)), inner, max_size=3
        ),
    ),
    max_leaves=8,
)


FRAGMENTS = (
    *("", ".", "..", "0", "1", "7", "²", "1²2", "٣", "9" * 5000, "[/]", "\n", "\x1b[2J", "\ud800"),
    *("mtp.", "layers.", "experts.", "gate_up_proj", "up_proj", "w1", "mlp.w1", "_bias", "_scales"),
)


@st.composite
def renamed(draw: st.DrawFn, name: str) -> str:
    """``name`` with another piece in it, or something else altogether."""
    if draw(st.booleans()):
        return draw(st.one_of(st.sampled_from(STRINGS), st.text()))
    start = draw(st.integers(0, len(name)))
    end = draw(st.integers(start, min(len(name), start + 12)))
    return name[:start] + draw(st.sampled_from(FRAGMENTS)) + name[end:]


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in ``value`` with every key."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


@st.composite
def changed(draw: st.DrawFn, text: str, junk: st.SearchStrategy[Any] = JUNK) -> Any:
    """The JSON value in ``text``, with one to three changes anywhere in it."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        match draw(st.sampled_from(["replace"] * 4 + ["delete", "rename", "swap", "nest", "add"])):
            case "replace":
                container[key] = draw(junk)
            case "delete":
                del container[key]
            case "rename" if isinstance(container, dict):
                container[draw(renamed(key))] = container.pop(key)
            case "swap":
                other, its = found[draw(st.integers(0, len(found) - 1))]
                container[key] = json.loads(json.dumps(other[its]))
            case "nest":
                container[key] = nested(draw(st.sampled_from([3, 90, 200, 900])))
            case "add" if isinstance(container, dict):
                container[draw(st.sampled_from(STRINGS))] = draw(junk)
            case _:
                container[key] = draw(junk)
    return value


@st.composite
def bytes_changed(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` with some bytes changed, taken out or put in."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        match draw(st.sampled_from(["flip", "flip", "set", "cut", "insert", "remove"])):
            case "flip" if at < len(changed):
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(changed):
                changed[at] = draw(st.integers(0, 255))
            case "cut":
                del changed[at:]
            case "remove":
                del changed[at : at + draw(st.integers(1, 20))]
            case _:
                changed[at:at] = draw(st.binary(min_size=1, max_size=9))
    return bytes(changed)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- the checkpoint --------------------------------------------------------------------------------

SIZE = 32


def tensors() -> dict[str, torch.Tensor]:
    """Experts in each form, and weights in each quantized format; all of one size."""
    torch.manual_seed(0)
    layer = "model.layers.{}.mlp.experts.{}"
    made = {
        layer.format(0, f"{expert}.{kind}.weight"): torch.randn(SIZE, SIZE).bfloat16()
        for expert in range(2)
        for kind in checkpoints.PROJECTIONS
    }
    made[layer.format(1, "gate_up_proj")] = torch.randn(2, 2 * SIZE, SIZE).bfloat16()
    made[layer.format(1, "down_proj")] = torch.randn(2, SIZE, SIZE).bfloat16()
    made[layer.format(1, "gate_up_proj_bias")] = torch.randn(2, 2 * SIZE).bfloat16()
    made[layer.format(1, "down_proj_bias")] = torch.randn(2, SIZE).bfloat16()
    for kind, rows in (("gate_up_proj", 2 * SIZE), ("down_proj", SIZE)):
        packed = torch.randint(0, 256, (2, rows, 1, 16), dtype=torch.uint8)
        made[layer.format(2, f"{kind}_blocks")] = packed
        made[layer.format(2, f"{kind}_scales")] = torch.full((2, rows, 1), 120, dtype=torch.uint8)
    attention = "model.layers.0.self_attn.q_proj"
    made[f"{attention}.weight"] = torch.randn(SIZE, SIZE).to(torch.float8_e4m3fn)
    made[f"{attention}.weight_scale_inv"] = torch.ones(1, 1)
    made["model.embed_tokens.weight"] = torch.randn(8, SIZE).bfloat16()
    return made


def config() -> dict[str, Any]:
    known = checkpoints.qwen3_moe(num_experts=2, moe_intermediate_size=SIZE, num_hidden_layers=3)
    more = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "architectures": ["Qwen3MoeForCausalLM"],
    }
    return known.to_dict() | more


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file."""
    return checkpoints.save(tmp_path_factory.mktemp("fuzz") / "source", tensors(), config())


@pytest.fixture(scope="module")
def converted(valid: Path) -> Path:
    assert run("quantize", valid, valid.parent / "converted", "--gate", "silu").exit_code == 0
    return valid.parent / "converted"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def run(*words: object) -> Result:
    result = CliRunner(env={"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}).invoke(
        app, [str(word) for word in words]
    )
    if not isinstance(result.exception, SystemExit | None):
        raise AssertionError("".join(traceback.format_exception(result.exception)))
    return result


def answer(*words: object) -> int:
    """The exit code; a failure says something, and in one line what."""
    result = run(*words)
    assert "Traceback" not in result.output
    assert result.exit_code in (0, 1), result.output
    if result.exit_code:
        said = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "prob"))]
        assert said, result.output
        assert all(len(line) > 20 for line in said), said
    return result.exit_code


def answers_to(source: Path, work: Path, *options: str) -> None:
    """What all three commands make of a source."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    if answer("quantize", source, out, *options) == 0:
        assert (out / "config.json").exists()
        assert answer("inspect", source, *options) == 0
        answer("verify", source, out, *options)
    else:  # in what all commands do first, or later
        assert not (out / "config.json").exists()
        assert not (out / INDEX).exists()


def copy(valid: Path, work: Path) -> Path:
    folder = work / "source"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(valid, folder)
    return folder


# -- the header ------------------------------------------------------------------------------------


def split(folder: Path) -> tuple[bytes, bytes]:
    """The JSON of the header, and the data."""
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


@cases(500)
@given(data=st.data())
def test_the_header(data: st.DataObject, valid: Path, work: Path) -> None:
    header, body = split(valid)
    new = as_json(data.draw(changed(header.decode()), label="header"))
    source = copy(valid, work)
    (source / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + body)
    answers_to(source, work, "--gate", "silu")


@cases(500)
@given(data=st.data())
def test_the_bytes_of_the_header(data: st.DataObject, valid: Path, work: Path) -> None:
    header, body = split(valid)
    new = data.draw(bytes_changed(len(header).to_bytes(8, "little") + header), label="header")
    source = copy(valid, work)
    (source / "model.safetensors").write_bytes(new + body)
    answers_to(source, work, "--gate", "silu")


@st.composite
def plausible(draw: st.DrawFn, header: bytes) -> bytes:
    """Other names, shapes and dtypes, with offsets that fit them: what only later checks find."""
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    names = list(entries)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        match draw(st.sampled_from(["shape", "dtype", "name", "delete"])):
            case "shape":
                sizes = st.sampled_from([0, 1, 2, 3, 16, 31, 32, 64, 2**40])
                entries[name]["shape"] = draw(st.lists(sizes, max_size=5))
            case "dtype":
                entries[name]["dtype"] = draw(st.sampled_from(list(BITS)))
            case "name":
                other = draw(st.one_of(st.sampled_from(names), renamed(name)))
                entries[other] = entries.pop(name)
                names[names.index(name)] = other
            case "delete":
                del entries[name]
                names.remove(name)
        names = list(entries)
    start = 0
    for entry in entries.values():
        size = 1
        for dim in entry["shape"]:
            size *= dim
        end = start + size * BITS[entry["dtype"]] // 8
        entry["data_offsets"] = [start, end]
        start = end
    return as_json(entries)


BITS = {"F4": 4, "U8": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F32": 32, "I64": 64, "C64": 64}


@cases(500)
@given(data=st.data())
def test_a_header_that_fits_its_data(data: st.DataObject, valid: Path, work: Path) -> None:
    new = data.draw(plausible(split(valid)[0]), label="header")
    ends = [entry["data_offsets"][1] for entry in json.loads(new).values()]
    size = max(ends, default=0)
    source = copy(valid, work)
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(new).to_bytes(8, "little") + new)
        file.truncate(8 + len(new) + min(size, 2**24))
    answers_to(source, work, "--gate", "silu")


# -- the index -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files and an index."""
    folder = tmp_path_factory.mktemp("fuzz") / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config()))
    weights: dict[str, str] = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {n: t for n, t in tensors().items() if (".layers.1." in n) + (".2." in n) == number}
        save_file(part, folder / file)
        weights |= dict.fromkeys(part, file)
    write_index(folder, weights)
    return folder


@cases(400)
@given(data=st.data())
def test_the_index(data: st.DataObject, sharded: Path, work: Path) -> None:
    text = (sharded / INDEX).read_text()
    source = copy(sharded, work)
    (source / INDEX).write_bytes(as_json(data.draw(changed(text), label="index")))
    answers_to(source, work, "--gate", "silu")


@cases(400)
@given(data=st.data())
def test_the_bytes_of_the_index(data: st.DataObject, sharded: Path, work: Path) -> None:
    raw = (sharded / INDEX).read_bytes()
    source = copy(sharded, work)
    (source / INDEX).write_bytes(data.draw(bytes_changed(raw), label="index"))
    answers_to(source, work, "--gate", "silu")


# -- the config ------------------------------------------------------------------------------------


@cases(200)
@given(data=st.data())
def test_the_config(data: st.DataObject, valid: Path, work: Path) -> None:
    text = (valid / "config.json").read_text()
    source = copy(valid, work)
    (source / "config.json").write_bytes(as_json(data.draw(changed(text), label="config")))
    answers_to(source, work, "--gate", "silu")


@cases(400)
@given(data=st.data())
def test_the_config_that_the_gate_is_found_with(
    data: st.DataObject, valid: Path, work: Path
) -> None:
    text = (valid / "config.json").read_text()
    source = copy(valid, work)
    (source / "config.json").write_bytes(as_json(data.draw(changed(text), label="config")))
    answer("inspect", source)


@cases(400)
@given(data=st.data())
def test_the_bytes_of_the_config(data: st.DataObject, valid: Path, work: Path) -> None:
    raw = (valid / "config.json").read_bytes()
    source = copy(valid, work)
    (source / "config.json").write_bytes(data.draw(bytes_changed(raw), label="config"))
    answer("inspect", source)


# -- what is verified ------------------------------------------------------------------------------


@cases(300)
@given(data=st.data())
def test_verifying_another_config(
    data: st.DataObject, valid: Path, converted: Path, work: Path
) -> None:
    text = (converted / "config.json").read_text()
    target = copy(converted, work)
    (target / "config.json").write_bytes(as_json(data.draw(changed(text), label="config")))
    answer("verify", valid, target, "--gate", "silu")


@cases(300)
@given(data=st.data())
def test_verifying_another_header(
    data: st.DataObject, valid: Path, converted: Path, work: Path
) -> None:
    header, body = split(converted)
    new = data.draw(st.one_of(changed(header.decode()).map(as_json), plausible(header)))
    target = copy(converted, work)
    (target / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + body)
    answer("verify", valid, target, "--gate", "silu")
