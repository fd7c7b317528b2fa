"""Sources that are broken, hostile or odd: refused in one line before anything is written, or taken
as what they are."""

import errno
import itertools
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
from quantize.run.report_files import REPORT
from tests.quantize import checkpoints, reference
from tests.quantize.checkpoints import convert
from tests.quantize.reference import INDEX
from tests.quantize.test_cli import refusal, run
from tests.quantize.test_damage import assert_not_a_checkpoint

Folders = Callable[[str], Path]

MODEL = "model.safetensors"


@pytest.fixture
def source(saved: Folders, tmp_path: Path) -> Path:
    """A checkpoint in one file, to be changed."""
    return Path(shutil.copytree(saved("qwen3_moe"), tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A target that never looks whole, whatever a test does."""
    yield tmp_path / "out"
    assert_not_a_checkpoint(tmp_path / "out")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# -- headers ---------------------------------------------------------------------------------------


def tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (length or len(encoded)).to_bytes(8, "little") + encoded + data


TWICE = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
DEEP = b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"

HEADERS = {
    "a length of 2**63": file_of({}, length=2**63),
    "a length of 2**64 - 1": file_of({}, length=2**64 - 1),
    "a length past the end": file_of({}, length=1000),
    "no JSON": file_of(b"pickle.." * 8),
    "no object": file_of([1, 2, 3]),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "deep nesting": file_of(DEEP),
    "overlapping tensors": file_of(
        {"a": tensor("U8", [8], 0, 8), "b": tensor("U8", [8], 4, 12)}, bytes(12)
    ),
    "a hole": file_of({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 8, 12)}, bytes(12)),
    "data that no tensor has": file_of({"a": tensor("U8", [4], 0, 4)}, bytes(12)),
    "negative offsets": file_of({"a": tensor("U8", [4], -4, 0)}, bytes(4)),
    "an end before its start": file_of({"a": tensor("U8", [4], 4, 0)}, bytes(4)),
    "huge offsets": file_of({"a": tensor("U8", [4], 2**63, 2**63 + 4)}, bytes(4)),
    "offsets beyond 64 bits": file_of({"a": tensor("U8", [4], 0, 10**30)}, bytes(4)),
    "another size than its shape": file_of({"a": tensor("F32", [4], 0, 4)}, bytes(4)),
    "a shape beyond 64 bits": file_of({"a": tensor("U8", [2**40, 2**40], 0, 4)}, bytes(4)),
    "a shape that overflows to its size": file_of(
        {"a": tensor("U8", [2**32, 2**32, 4], 0, 4)}, bytes(4)
    ),
    "a negative shape": file_of({"a": tensor("U8", [-1, -4], 0, 4)}, bytes(4)),
    "a fractional shape": file_of(b'{"a":{"dtype":"U8","shape":[4.5],"data_offsets":[0,4]}}'),
    "a dtype that is not known": file_of({"a": tensor("U3", [4], 0, 4)}, bytes(4)),
    "a dtype that is a number": file_of(b'{"a":{"dtype":8,"shape":[4],"data_offsets":[0,4]}}'),
    "one name twice": file_of(TWICE + TWICE[1:-1] + b"}", bytes(8)),
    "no offsets": file_of({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)),
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("command", ["quantize", "inspect", "verify"])
def test_a_hostile_header(command: str, header: str, source: Path, out: Path) -> None:
    (source / MODEL).write_bytes(HEADERS[header])
    message = refusal(command, source, *([] if command == "inspect" else [out]))
    assert MODEL in message
    assert not out.exists()


def test_a_header_of_more_than_100_megabytes(source: Path, out: Path) -> None:
    """Its length alone is reason enough; nothing of it is read."""
    with (source / MODEL).open("wb") as file:
        file.write((200 * 10**6).to_bytes(8, "little") + b"{")
        file.truncate(300 * 10**6)
    started = time.monotonic()
    assert MODEL in refusal("quantize", source, out)
    assert time.monotonic() - started < 5


def test_no_element_and_a_huge_dimension(source: Path, tmp_path: Path) -> None:
    """It takes no bytes, so it is as good as any other tensor that stays."""
    raw = (source / MODEL).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = max(t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")
    header["empty"] = tensor("F32", [2**40, 0], end, end)
    (source / MODEL).write_bytes(file_of(header, raw[8 + length :]))
    assert run("quantize", source, tmp_path / "whole").exit_code == 0
    assert run("verify", source, tmp_path / "whole").exit_code == 0


# -- names -----------------------------------------------------------------------------------------

NAMES = {
    "a path": "../../x",
    "an absolute path": "/tmp/x",
    "markup": "[bold]x[/] [/nothing] [link=file:///]",
    "control characters": "x\x1b[2J\x07\x00\r",
    "lines": "x\nerror: everything is lost\n",
    "not ASCII": "层.émoji.😀",
    "very long": "x" * 100_000,
    "only a backslash": "\\",
    "empty": "",
    "HTML": "<script>alert(1)</script>.weight",
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_tensor_with_an_odd_name(kind: str, source: Path, tmp_path: Path) -> None:
    """It passes through, is shown as text and becomes no path."""
    name = NAMES[kind]
    tensors = load_file(source / MODEL) | {name: torch.arange(6.0).view(2, 3)}
    save_file(tensors, source / MODEL)
    shown = run("inspect", source)
    assert shown.exit_code == 0
    assert "\x1b" not in shown.stdout
    assert "\nerror" not in shown.stdout
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run("quantize", source, tmp_path / "out", "--max-shard-size", "20KB")
    assert done.exit_code == 0, done.output
    assert run("verify", source, tmp_path / "out").exit_code == 0
    stored = reference.read_folder(tmp_path / "out")[name]
    assert stored == reference.read_folder(source)[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])
    assert "<script>alert" not in (tmp_path / "out" / REPORT).read_text()


@pytest.mark.parametrize("number", ["9" * 19, "9" * 5000, "1²2", "٣"], ids=lambda n: n[:5])
@pytest.mark.parametrize("name", ["model.layers.{}.mlp.experts.0", "model.layers.0.mlp.experts.{}"])
def test_a_number_that_is_none(name: str, number: str, source: Path, out: Path) -> None:
    tensors = load_file(source / MODEL)
    for kind in checkpoints.PROJECTIONS:
        tensors[f"{name.format(number)}.{kind}.weight"] = torch.ones(16, 16)
    save_file(tensors, source / MODEL)
    assert "number that means nothing" in refusal("quantize", source, out)


def test_one_expert_under_two_names(source: Path, out: Path) -> None:
    tensors = load_file(source / MODEL)
    for kind in checkpoints.PROJECTIONS:
        name = "model.layers.0.mlp.experts.{}." + f"{kind}.weight"
        tensors[name.format("00")] = tensors[name.format("0")].clone()
    save_file(tensors, source / MODEL)
    message = refusal("quantize", source, out)
    assert "would both be written as model.layers.0.mlp.experts.0." in message


def test_an_expert_layer_with_an_odd_name(source: Path, out: Path) -> None:
    """In an error message: text, without what a terminal would obey."""
    odd = "[bold]\x1b[2J[/] \\"
    tensors = {
        name.replace("model.layers.1.", f"{odd}.layers.1."): value
        for name, value in load_file(source / MODEL).items()
        if not name.endswith("layers.1.mlp.experts.2.up_proj.weight")
    }
    save_file(tensors, source / MODEL)
    message = refusal("quantize", source, out)
    assert f"{odd}.layers.1.mlp.experts.2.up_proj.weight".replace("\x1b", "\\x1b") in message


def test_folders_with_odd_names(source: Path, tmp_path: Path) -> None:
    odd = source.rename(tmp_path / "m\x1b[1m[bold]")
    out = tmp_path / "out\x1b[7m\\"
    result = run("quantize", odd, out)
    assert result.exit_code == 0, result.output
    assert run("verify", odd, out).exit_code == 0
    assert run("inspect", odd).exit_code == 0
    assert "\x1b" not in result.output


def test_a_folder_whose_name_is_no_text(source: Path, tmp_path: Path) -> None:
    """Names of files are bytes: the report is written all the same, and messages can be shown."""
    odd = tmp_path / os.fsdecode(b"m\xff")
    result = run("quantize", source, odd)
    assert result.exit_code == 0, result.output
    assert (odd / REPORT).read_text(encoding="utf-8")
    (odd / "config.json").write_text("{")
    assert "m\\udcff" in refusal("inspect", odd)


# -- configs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [10**5, 10**9, 10**30])
@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_absurdly_many_layers(command: str, layers: int, source: Path, out: Path) -> None:
    change_config(source, num_hidden_layers=layers)
    started = time.monotonic()
    message = refusal(command, source, *([out] if command == "quantize" else []))
    assert f"num_hidden_layers is {layers}" in message
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("depth", [150, 900, 100_000])
def test_deep_nesting(depth: int, file: str, source: Path, out: Path) -> None:
    (source / file).write_text('{"a":' * depth + "1" + "}" * depth)
    assert file in refusal("quantize", source, out)


# -- files that are not there, or something else ---------------------------------------------------


class Marker:
    """What unpickles to this has run code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_never_opened(name: str, source: Path, out: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    (source / MODEL).unlink()
    torch.save(Marker(marker), source / name)
    assert "safetensors" in refusal("quantize", source, out)
    with (source / name).open("wb") as file:
        pickle.dump(Marker(marker), file)
    assert "safetensors" in refusal("inspect", source)
    assert not marker.exists()


def test_an_index_of_pickles(source: Path, out: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    weights = dict.fromkeys(load_file(source / MODEL), "pytorch_model.bin")
    (source / MODEL).unlink()
    torch.save(Marker(marker), source / "pytorch_model.bin")
    checkpoints.write_index(source, weights)
    assert "pytorch_model.bin: not a complete safetensors file" in refusal("quantize", source, out)
    assert not marker.exists()


def hub_cache(source: Path, tmp_path: Path) -> Path:
    """``source`` as the hub's cache keeps it: a folder of links to files named by their hashes."""
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, repo / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    return snapshot


def test_a_hub_cache(source: Path, tmp_path: Path) -> None:
    """The output holds files, not links, and the cache is only read."""
    snapshot = hub_cache(source, tmp_path)
    before = reference.read_folder(snapshot)
    convert(source, tmp_path / "plain")
    convert(snapshot, tmp_path / "out")
    out, plain = (checkpoints.contents(tmp_path / name) for name in ("out", "plain"))
    configs = [json.loads(each.pop("config.json")) for each in (out, plain)]
    # Where it is from is all that is known of it more.
    revisions = [config["nvfp4_moe"]["made"].pop("revision") for config in configs]
    assert revisions == [f"org/name@{snapshot.name}", None]
    assert configs[0] == configs[1]
    assert out == plain
    assert not [file for file in (tmp_path / "out").iterdir() if file.is_symlink()]
    assert reference.read_folder(snapshot) == before


@pytest.mark.parametrize("name", [MODEL, "config.json", "generation_config.json", INDEX])
def test_a_link_that_leads_nowhere(name: str, source: Path, out: Path, tmp_path: Path) -> None:
    """A download that was not finished; found before hours of work, not after."""
    snapshot = hub_cache(source, tmp_path)
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).symlink_to(Path("..", "..", "blobs", "missing"))
    assert name in refusal("quantize", snapshot, out)
    assert not out.exists()


def test_a_target_of_links_into_the_source(source: Path, tmp_path: Path) -> None:
    """Refused; what they lead to is not written to."""
    (tmp_path / "out").mkdir()
    names = ("config.json", "generation_config.json")
    before = {name: (source / name).read_bytes() for name in names}
    for name in names:
        (tmp_path / "out" / name).symlink_to(source / name)
    message = refusal("quantize", source, tmp_path / "out", "--overwrite")
    assert f"{tmp_path / 'out' / 'config.json'} is a link to {source / 'config.json'}" in message
    assert {name: (source / name).read_bytes() for name in names} == before
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(names)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_shard_without_an_index(gone: int, source: Path, out: Path) -> None:
    """Only the others' names tell."""
    tensors = load_file(source / MODEL)
    (source / MODEL).unlink()
    config = json.loads((source / "config.json").read_text())
    checkpoints.save(source, tensors, config, lambda name: len(name) % 3)
    (source / INDEX).unlink()
    sorted(source.glob("*.safetensors"))[gone].unlink()
    assert "of the 3 files model-*-of-*.safetensors only 2 are there" in refusal(
        "quantize", source, out
    )


# -- reading fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 30, 100])
def test_a_disk_that_fails(
    after: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is sampled, and while it is read."""
    calls = itertools.count()

    def failing(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(calls) >= after:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return plain(*args)

        return call

    for name in ("pread", "preadv"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    message = refusal("quantize", source, out, "--max-shard-size", "6KB")
    assert f"{MODEL}: cannot read " in message
    assert "Input/output error" in message


def test_a_file_that_shrinks_while_it_is_read(source: Path, out: Path) -> None:
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, Options(max_shard_size=6000))
        size = (source / MODEL).stat().st_size
        os.truncate(source / MODEL, size // 2)
        with pytest.raises(QuantizeError, match=r"model\.safetensors: ends within .*cut off"):
            execute(checkpoint, steps, out)


def test_a_file_that_goes_while_it_is_read(source: Path, out: Path) -> None:
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint)
        (source / MODEL).unlink()
        with pytest.raises(QuantizeError, match=r"model\.safetensors: No such file"):
            execute(checkpoint, steps, out)


def test_a_small_file_that_cannot_be_copied(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the very end of a run, which is then not lost."""

    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", failing)
        message = refusal("quantize", source, out)
    assert "generation_config.json cannot be copied" in message
    assert "Input/output error" in message
    assert_not_a_checkpoint(out)
    assert run("quantize", source, out, "--resume").exit_code == 0
    convert(source, tmp_path / "plain")
    assert checkpoints.contents(out) == checkpoints.contents(tmp_path / "plain")
    shutil.rmtree(out)


# -- weights that mean nothing ---------------------------------------------------------------------


def test_an_all_zero_expert(source: Path, tmp_path: Path) -> None:
    """Documented: the global scale is 1, every weight 0; the report says so; it is no damage."""
    tensors = load_file(source / MODEL)
    expert = "model.layers.1.mlp.experts.2"
    for kind in checkpoints.PROJECTIONS:
        tensors[f"{expert}.{kind}.weight"].zero_()
    save_file(tensors, source / MODEL)
    assert run("quantize", source, tmp_path / "out").exit_code == 0
    stored = reference.read_folder(tmp_path / "out")
    for kind in checkpoints.PROJECTIONS:
        assert stored[f"{expert}.{kind}.weight_scale_2"].array() == 1
        assert not reference.weight(stored, f"{expert}.{kind}").any()
        assert (stored[f"{expert}.{kind}.weight_scale"].array() > 0).all()
    assert "all zero" in (tmp_path / "out" / REPORT).read_text()
    verified = run("verify", source, tmp_path / "out")
    assert verified.exit_code == 0, verified.output


def test_a_value_of_another_type(source: Path, out: Path) -> None:
    """Transformers knows the model, so that another gate is no advice."""
    config = json.loads((source / "config.json").read_text())
    config["rms_norm_eps"] = "small"
    (source / "config.json").write_text(json.dumps(config))
    message = refusal("quantize", source, out)
    assert "config.json: Transformers cannot read it" in message
    assert "rms_norm_eps" in message and "--gate" not in message
