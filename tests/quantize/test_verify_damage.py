"""``verify`` finds every single damage that can be seen: 2,400 random ones, and what cannot be.

Each example takes a good checkpoint, damages one thing, and asks ``verify``. The oracle is that the
damaged thing differs from what was there. What then may go unseen is in ``UNSEEN``, which
docs/users/verifying.md repeats; whether an example is of that kind is decided here by plain numpy,
and never by ``verify``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.calibration.samples import digest_of
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.experts.gates import Gate
from quantize.report import loads, render
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from quantize.verify import verify
from tests.conftest import ROOT
from tests.quantize import checkpoints, reference
from tests.quantize.reference import INDEX

UNSEEN = {
    "calibrated code": "a calibrated weight's code that leaves the weight's error as it was",
    "calibrated input scale": "an input scale of `down` from a text that stays plausible",
}
"""What cannot be seen in principle, of single damages."""

UNSEEN_TOGETHER = {
    "selection": "patterns of `made` that select the same modules",
    "harmless ignore entry": "an ignore entry that names a module which is not quantized",
    "report": "the report's `source`, `target`, `command`, `fingerprint`",
    "text": "what it says of a text and of what experts made of it",
}
"""What cannot be seen if who changes it changes the report and its page alike."""

SHARED = ("finding experts", "reading stored formats", "splitting gate and up", "the gate")
"""What ``verify`` shares with the quantizer: a fault there is the same on both sides."""

RANDOM = int(os.environ.get("FUZZ", "0"))
VARIANTS: dict[str, dict[str, Any]] = {
    "modelopt": {},
    "nvfp4": {"activations": True, "exclude": ("*.layers.0.*",)},
    "compressed-tensors": {"layout": "compressed-tensors", "activations": True},
    "sharded": {"max_shard_size": 12_000, "scales": "mse", "linears": True},
    "calibrated": {"activations": True, "calibration": "gptq"},
    "two-sided": {"activations": True, "calibration": "two-sided"},
}
MORE: dict[str, dict[str, Any]] = {"weights only": {"layout": "compressed-tensors"}}
EXAMPLES = 400
DATA, PAGE = "nvfp4_moe_report.json", "nvfp4_moe_report.html"


class Good(NamedTuple):
    """A good checkpoint, and the folder in which one copy of it is damaged and mended again."""

    source: Checkpoint
    folder: Path
    calibrated: bool
    tensors: dict[str, reference.Raw]
    weights: dict[str, reference.Raw]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "source"
    checkpoints.build("qwen3_moe").save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Do as you please.")
    return folder


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Good]]:
    made: dict[str, Good] = {}

    def get(name: str) -> Good:
        if name not in made:
            options = dict((VARIANTS | MORE)[name])
            rows = torch.randint(0, 32, (8, 32), generator=torch.Generator().manual_seed(0))
            method = options.pop("calibration", None)
            if method:
                options["calibration"] = Calibration(
                    "t", *rows.shape, digest_of(rows), method=method
                )
            folder = tmp_path_factory.mktemp("good") / name
            checkpoint = Checkpoint(source)
            steps = plan(checkpoint, Options(**options))
            execute(checkpoint, steps, folder, samples=rows if method else None)
            made[name] = Good(
                checkpoint,
                folder,
                method is not None,
                reference.read_folder(folder),
                reference.read_folder(source),
            )
        return made[name]

    yield get
    for each in made.values():
        each.source.__exit__()


def problems(good: Good, alone: bool = False) -> list[str]:
    try:
        with Checkpoint(good.folder, decode=False) as target:
            return verify(None if alone else good.source, target, Gate("silu")).problems
    except QuantizeError as error:  # the command prints it and ends with 1, too
        return [str(error)]


@contextmanager
def damaged(folder: Path, name: str, content: bytes | None) -> Iterator[None]:
    """A file with other content, or without it no file at all, until the context ends."""
    file = folder / name
    before = file.read_bytes() if file.exists() else None
    try:
        file.unlink(missing_ok=True) if content is None else file.write_bytes(content)
        yield
    finally:
        file.unlink(missing_ok=True) if before is None else file.write_bytes(before)


# -- damages ---------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """One damage: the file, what it holds then, and in which way of ``UNSEEN`` it may be missed.

    With ``follows``, the report's digest of the file and the page are made to agree with it.
    """

    file: str
    content: bytes | None
    what: str
    unseen: str | None = None
    follows: bool = False


def following(folder: Path, damage: Damage) -> dict[str, bytes | None]:
    """All files of a damage, with what they hold then."""
    files: dict[str, bytes | None] = {damage.file: damage.content}
    if damage.follows:
        assert damage.content is not None
        report = json.loads(damage.content if damage.file == DATA else (folder / DATA).read_text())
        if damage.file != DATA:
            report["digests"][damage.file] = hashlib.sha256(damage.content).hexdigest()
        files[DATA] = compact(report)
        files[PAGE] = render(loads(compact(report))).encode()
    return files


def compact(report: Any) -> bytes:
    """JSON as the report's is written."""
    return json.dumps(report, separators=(",", ":")).encode() + b"\n"


def indented(value: Any) -> bytes:
    """JSON as other files are written."""
    return json.dumps(value, indent=2).encode() + b"\n"


Header = dict[str, Any]


def parse(data: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assemble(header: Header, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def shards(good: Good) -> list[str]:
    return sorted(file.name for file in good.folder.glob("*.safetensors"))


CODES, BLOCK_SCALE = ("weight", "weight_packed"), "weight_scale"
GLOBAL = ("weight_scale_2", "weight_global_scale")
INPUT = ("input_scale", "input_global_scale")


def kind_of(name: str, entry: Any) -> str:
    last = name.rpartition(".")[2]
    if last in CODES and entry["dtype"] == "U8":
        return "codes"
    kinds = {BLOCK_SCALE: "block scale", **dict.fromkeys(GLOBAL, "global scale")}
    return {**kinds, **dict.fromkeys(INPUT, "input scale")}.get(last, "copy")


@st.composite
def values(draw: st.DrawFn, good: Good, kind: str) -> Damage:
    """One code, one block scale, some bit of a global or input scale, or one byte of a copy."""
    places = [
        (file, name, entry)
        for file in shards(good)
        for name, entry in parse((good.folder / file).read_bytes())[0].items()
        if name != "__metadata__" and kind_of(name, entry) == kind
    ]
    if not places:
        return draw(values(good, "codes"))
    file, name, entry = draw(st.sampled_from(places))
    header, body = parse((good.folder / file).read_bytes())
    start, end = entry["data_offsets"]
    changed = bytearray(body)
    at = draw(st.integers(start, end - 1))
    if kind == "codes":
        nibble = 4 * draw(st.integers(0, 1))
        changed[at] ^= draw(st.integers(1, 15)) << nibble
    else:
        changed[at] ^= draw(st.integers(1, 255))
    new = assemble(header, bytes(changed))
    what = f"{kind} {name} at {at - start}: {body[at]} -> {changed[at]}"
    return Damage(file, new, what, may_miss(good, kind, name, bytes(changed[start:end])))


def may_miss(good: Good, kind: str, name: str, data: bytes) -> str | None:
    """In which way a changed tensor of a calibrated checkpoint cannot be told from a good one."""
    if not good.calibrated:
        return None
    if kind == "input scale" and ".down_proj." in name:
        value = struct.unpack("<f", data)[0]
        return "calibrated input scale" if 1e-12 <= value <= 1e6 else None
    if kind != "codes":
        return None
    module = name.rpartition(".")[0]
    exact = good.weights[f"{module}.weight"].array().astype(np.float64)
    raw = good.tensors[name]
    errors = [
        np.sqrt(((reference.weight(tensors, module) - exact) ** 2).sum())
        for tensors in (good.tensors, good.tensors | {name: raw._replace(data=data)})
    ]
    same = math.isclose(*errors, rel_tol=3e-5)
    return "calibrated code" if same else None


@st.composite
def gross(draw: st.DrawFn, good: Good) -> Damage:
    """A row of codes zeroed, its signs flipped, shifted by a block; a row of scales doubled."""
    file = draw(st.sampled_from(shards(good)))
    header, body = parse((good.folder / file).read_bytes())
    names = [n for n, e in header.items() if n != "__metadata__" and kind_of(n, e) == "codes"]
    if not names:
        return draw(values(good, "copy"))
    name = draw(st.sampled_from(names))
    rows, width = header[name]["shape"]
    row = draw(st.integers(0, rows - 1))
    start = header[name]["data_offsets"][0] + row * width
    part = np.frombuffer(body[start : start + width], np.uint8)
    what = draw(st.sampled_from(["zeroed", "flipped", "shifted"]))
    new = {"zeroed": part * 0, "flipped": part ^ 0x88, "shifted": np.roll(part, 8)}[what]
    if new.tobytes() == part.tobytes():
        return draw(values(good, "codes"))
    changed = body[:start] + new.tobytes() + body[start + width :]
    return Damage(file, assemble(header, changed), f"row {row} of {name} {what}")


OTHER_DTYPES = {
    "U8": ["I8", "BOOL", "F8_E4M3"], "F8_E4M3": ["U8", "I8", "F8_E5M2"],
    "F32": ["I32", "U32"], "BF16": ["F16", "I16", "U16"],
}  # fmt: skip


@st.composite
def headers(draw: st.DrawFn, good: Good) -> Damage:
    """A tensor's name, dtype or shape; a tensor removed, added, or exchanged with another."""
    file = draw(st.sampled_from(shards(good)))
    header, body = parse((good.folder / file).read_bytes())
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(names))
    entry = header[name]
    how = draw(st.sampled_from(["dtype", "name", "shape", "remove", "add", "exchange"]))
    if how == "dtype":
        entry["dtype"] = draw(st.sampled_from(OTHER_DTYPES[entry["dtype"]]))
    elif how == "name":
        at = draw(st.integers(0, len(name) - 1))
        other = name[:at] + draw(st.sampled_from(["", "x", "0", "1", "."])) + name[at + 1 :]
        other = other if other not in header else f"{name}_"
        header = {other if key == name else key: value for key, value in header.items()}
    elif how == "shape":
        shape = entry["shape"]
        entry["shape"] = shape[::-1] if len(set(shape)) > 1 and draw(st.booleans()) else [1, *shape]
    elif how == "remove":
        start, end = entry["data_offsets"]
        del header[name]
        body = body[:start] + body[end:]
        for key, value in header.items():
            if key != "__metadata__" and value["data_offsets"][0] >= end:
                value["data_offsets"] = [at - (end - start) for at in value["data_offsets"]]
    elif how == "add":
        new = draw(st.sampled_from([f"{name}_extra", f"{name.rpartition('.')[0]}.input_scale_2"]))
        header[new] = {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [len(body), len(body) + 4],
        }
        body += b"\0\0\x80\x3f"
    else:
        alike = [
            other
            for other in names
            if (header[other]["dtype"], header[other]["shape"]) == (entry["dtype"], entry["shape"])
            and body[slice(*header[other]["data_offsets"])] != body[slice(*entry["data_offsets"])]
        ]
        if not alike:
            return draw(values(good, "copy"))
        other = draw(st.sampled_from(alike))
        if good.calibrated and kind_of(name, entry) == "input scale":
            return draw(values(good, "copy"))  # of down's, either is plausible
        entry["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            entry["data_offsets"],
        )
    return Damage(file, assemble(header, body), f"{how} of {name}")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON value that hold no others, and of empty ones."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list) and inner:
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key)


@st.composite
def json_values(draw: st.DrawFn, good: Good, file: str) -> Damage:
    """One value of a JSON file: another one, none, or one more beside it."""
    before = json.loads((good.folder / file).read_text())
    value = json.loads(json.dumps(before))
    path = draw(st.sampled_from(list(leaves(value))))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    others = [None, True, 0, 17, 0.5, "gelu", "NVFP4", [], ["lm_head"], {}, old]
    others += [old + 1] if isinstance(old, int | float) and not isinstance(old, bool) else []
    new = draw(st.sampled_from([x for x in others if json.dumps(x) != json.dumps(old)] + ["gone"]))
    how = draw(st.sampled_from(["replace"] * 3 + ["remove", "add"]))
    if how == "remove" or (new == "gone" and how == "replace"):
        holder.pop(key)
    elif how == "add" and isinstance(holder, dict):
        holder[f"{key}_"] = old
    elif how == "add":
        holder.append("model.layers.1.mlp.experts.2.down_proj")
    else:
        holder[key] = new
    unseen = None
    if "made" in path and path[path.index("made") + 1] in ("include", "exclude"):
        made = [each["nvfp4_moe"].get("made") or {} for each in (before, value)]
        if selected(made[0]) == selected(made[1]):
            unseen = "selection"
    follows = file == "config.json" and draw(st.booleans())
    content = compact(value) if file == DATA else indented(value)
    what = f"{file} {path} {how} {new!r}{' and the report' * follows}"
    return Damage(file, content, what, unseen if follows else None, follows)


def selected(made: dict[str, Any]) -> Any:
    """Which experts and linears patterns choose; the patterns themselves if they are no lists."""
    lists = [made.get("include"), made.get("exclude")]
    if not all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in lists):
        return json.dumps(lists)
    include, exclude = lists
    modules = [f"model.layers.{n}.mlp.experts" for n in range(2)]
    modules += [f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkvo"]
    return [
        (not include or any(fnmatchcase(m, p) for p in include))
        and not any(fnmatchcase(m, p) for p in exclude)
        for m in modules
    ]


@st.composite
def ignore_lists(draw: st.DrawFn, good: Good) -> Damage:
    """An entry of an ignore list: gone, misspelt, of a quantized module, twice, or all of them."""
    name = draw(st.sampled_from(["config.json", "hf_quant_config.json"]))
    name = name if (good.folder / name).exists() else "config.json"
    value = json.loads((good.folder / name).read_text())
    fields = value["quantization_config" if name == "config.json" else "quantization"]
    ignore = fields["ignore" if name == "config.json" else "exclude_modules"]
    at = draw(st.integers(0, len(ignore) - 1))
    how = draw(st.sampled_from(["gone", "misspelt", "quantized", "twice", "all", "pattern"]))
    expert = "model.layers.1.mlp.experts"
    if how == "gone":
        del ignore[at]
    elif how == "misspelt":
        ignore[at] = ignore[at][:-1] + "_"
    elif how == "quantized":
        inner = f"{expert}.{draw(st.integers(0, 3))}.up_proj"
        ignore.insert(at, draw(st.sampled_from([expert, "model.layers.1", inner])))
    elif how == "twice":
        ignore.append(ignore[at])
    elif how == "pattern":
        ignore.append(draw(st.sampled_from(["*", "re:.*down_proj", "*.experts.*"])))
    else:
        ignore.clear()
    follows = name == "config.json" and draw(st.booleans())
    return Damage(name, indented(value), f"{name} {how} {at} {follows}", follows=follows)


@st.composite
def files(draw: st.DrawFn, good: Good) -> Damage:
    """A file gone, cut, or a byte of a copied one changed; a file that engines read added."""
    everything = sorted(file.name for file in good.folder.iterdir() if file.is_file())
    copied = [name for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json",
              "LICENSE") if name in everything]  # fmt: skip
    how = draw(st.sampled_from(["gone", "cut", "byte", "added"]))
    if how == "gone":
        return Damage(draw(st.sampled_from(everything)), None, how)
    if how == "added":
        names = ["vocab.json", "tokenizer_config.json", "preprocessor_config.json"]
        names += [] if (good.folder / INDEX).exists() else ["model-2.safetensors"]
        name = draw(st.sampled_from(names))
        content = assemble({}, b"") if name.endswith(".safetensors") else b"{}"
        return Damage(name, content, f"{name} added")
    name = draw(st.sampled_from(copied + shards(good) if how == "cut" else copied))
    data = bytearray((good.folder / name).read_bytes())
    at = draw(st.integers(0, len(data) - 1))
    if how == "cut":
        return Damage(name, bytes(data[:at]), f"{name} cut at {at}")
    data[at] ^= draw(st.integers(1, 255))
    return Damage(name, bytes(data), f"{name} byte {at}")


@st.composite
def indexes(draw: st.DrawFn, good: Good) -> Damage:
    """An entry of the index: gone, of another file, of no tensor; or another total."""
    if not (good.folder / INDEX).exists():
        return draw(headers(good))
    value = json.loads((good.folder / INDEX).read_text())
    name = draw(st.sampled_from(sorted(value["weight_map"])))
    how = draw(st.sampled_from(["gone", "file", "renamed", "total"]))
    if how == "gone":
        del value["weight_map"][name]
    elif how == "file":
        others = [file for file in shards(good) if file != value["weight_map"][name]]
        value["weight_map"][name] = draw(st.sampled_from([*others, "model-x.safetensors"]))
    elif how == "renamed":
        value["weight_map"][f"{name}_"] = value["weight_map"].pop(name)
    else:
        value["metadata"]["total_size"] += draw(st.sampled_from([-1, 1, 1000]))
    return Damage(INDEX, json.dumps(value).encode(), f"index {how} {name}")


@st.composite
def reports(draw: st.DrawFn, good: Good) -> Damage:
    """Any one value of the report, or its page; a figure of it, though the page follows."""
    which = draw(st.sampled_from(["figure", "value", "value", "page"]))
    if which == "value":
        return draw(json_values(good, DATA))
    if which == "page":
        page = bytearray((good.folder / PAGE).read_bytes())
        at = draw(st.integers(0, len(page) - 1))
        page[at] ^= draw(st.integers(1, 255))
        return Damage(PAGE, bytes(page), f"{PAGE} byte {at}")
    name = DATA
    value = json.loads((good.folder / name).read_text())
    layer = draw(st.sampled_from(value["layers"]))
    if draw(st.booleans()):
        errors = draw(st.sampled_from(layer["errors"]))
        errors[draw(st.integers(0, len(errors) - 1))] *= 1.001
    else:
        layer["scale_counts"][draw(st.integers(0, 126))] += 1
    return Damage(name, compact(value), f"{name} {layer['prefix']}", follows=True)


@st.composite
def damages(draw: st.DrawFn, good: Good) -> Damage:
    kinds = ["codes"] * 3 + ["block scale"] * 2 + ["global scale", "input scale", "copy"]
    which = draw(st.sampled_from([*kinds, "gross", "header", "header", "config", "config",
                 "layout", "ignore", "file", "file", "index", "report", "report"]))  # fmt: skip
    if which in kinds:
        return draw(values(good, which))
    if which == "config":
        return draw(json_values(good, "config.json"))
    if which == "layout":
        name = "hf_quant_config.json"
        return draw(json_values(good, name if (good.folder / name).exists() else "config.json"))
    others = {"gross": gross, "header": headers, "ignore": ignore_lists, "file": files,
              "index": indexes, "report": reports}  # fmt: skip
    return draw(others[which](good))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_good_checkpoint_has_no_problems(name: str, good: Callable[[str], Good]) -> None:
    assert problems(good(name)) == []
    with Checkpoint(good(name).folder, decode=False) as target:
        assert verify(None, target).problems == []


@pytest.mark.parametrize("name", VARIANTS)
def test_every_damage_that_can_be_seen_is_found(name: str, good: Callable[[str], Good]) -> None:
    whole = good(name)
    seen = {"found": 0, "unseen": 0}

    @settings(
        max_examples=RANDOM or EXAMPLES,
        derandomize=not RANDOM,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        damage = data.draw(damages(whole))
        with ExitStack() as stack:
            for file, content in following(whole.folder, damage).items():
                stack.enter_context(damaged(whole.folder, file, content))
            found = problems(whole)
        if damage.unseen is None:
            assert found, damage.what
        else:
            assert damage.unseen in {**UNSEEN, **UNSEEN_TOGETHER}
        seen["found" if found else "unseen"] += 1

    one()
    assert seen["found"] >= 0.9 * EXAMPLES
    assert problems(whole) == []  # mended again


TOGETHER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "files": lambda r: r["files"].clear(),
    "one file less": lambda r: r["files"].remove("tokenizer.json"),
    "one file more": lambda r: r["files"].insert(0, "config.json"),
    "another file": lambda r: r["files"].__setitem__(0, "zzz.safetensors"),
    "digests": lambda r: r["digests"].clear(),
    "a digest": lambda r: r["digests"].__setitem__("tokenizer.json", "0" * 64),
    "activations": lambda r: r.__setitem__("activations", "fp8"),
    "no activations": lambda r: r.__setitem__("activations", "bf16"),
    "layout": lambda r: r.__setitem__("layout", "modelopt-"),
    "scales": lambda r: r.__setitem__("scales", "four-six"),
    "version": lambda r: r["versions"].__setitem__("vllm-nvfp4-moe", "9.9"),
    "a version less": lambda r: r["versions"].pop("torch"),
    "a version more": lambda r: r["versions"].__setitem__("numpy", "1"),
    "bytes before": lambda r: r.__setitem__("bytes_before", 1 + r["bytes_before"]),
    "bytes after": lambda r: r.__setitem__("bytes_after", 1 + r["bytes_after"]),
    "a layer's gate": lambda r: r["layers"][-1].__setitem__("gate", "swiglu_oai"),
    "a layer's projections": lambda r: r["layers"][-1].__setitem__("projections", ["w1"] * 3),
    "a layer's names": lambda r: r["layers"][-1].__setitem__("names", ["a"]),
    "a layer's bytes before": lambda r: r["layers"][-1].__setitem__("bytes_before", 7),
    "a layer's bytes after": lambda r: r["layers"][-1].__setitem__("bytes_after", 7),
    "a layer's errors": lambda r: r["layers"][-1]["errors"][0].__setitem__(0, 0.5),
    "a layer's counts": lambda r: r["layers"][-1]["scale_counts"].__setitem__(3, 5),
    "a layer less": lambda r: r["layers"].pop(),
    "a layer twice": lambda r: r["layers"].append(r["layers"][-1]),
    "a layer more": lambda r: r["layers"].append(r["layers"][-1] | {"prefix": "model.x.experts"}),
}
"""Changes of the report; the page is made of it again."""

LOST = ("bytes before", "a layer's bytes before", "a layer's errors", "a layer's counts")
"""Of these nothing is known without the source."""

INVISIBLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "source": lambda r: r.__setitem__("source", "/elsewhere"),
    "target": lambda r: r.__setitem__("target", "x"),
    "command": lambda r: r.__setitem__("command", "nvfp4-moe"),
    "fingerprint": lambda r: r.__setitem__("fingerprint", "0"),
    "another torch": lambda r: r["versions"].__setitem__("torch", "1.0"),
}


def remade(good: Good, change: Callable[[dict[str, Any]], Any]) -> Damage:
    report = json.loads((good.folder / DATA).read_text())
    change(report)
    return Damage(DATA, compact(report), "", follows=True)


@pytest.mark.parametrize(
    ("what", "alone"),
    [(what, False) for what in TOGETHER] + [(what, True) for what in TOGETHER if what not in LOST],
)
def test_a_report_that_was_changed_with_its_page(
    what: str, alone: bool, good: Callable[[str], Good]
) -> None:
    whole = good("compressed-tensors")
    damage = remade(whole, TOGETHER[what])
    with ExitStack() as stack:
        for file, content in following(whole.folder, damage).items():
            stack.enter_context(damaged(whole.folder, file, content))
        found = problems(whole, alone)
    assert any("report" in problem or "tokenizer" in problem for problem in found), found
    assert all(problem[-1] != "\n" for problem in found)


@pytest.mark.parametrize("what", INVISIBLE)
def test_what_a_report_may_say_otherwise(what: str, good: Callable[[str], Good]) -> None:
    """Nothing else knows it: it is on the list, and without the page it is seen."""
    whole = good("modelopt")
    damage = remade(whole, INVISIBLE[what])
    with damaged(whole.folder, DATA, damage.content):
        assert problems(whole)
    with ExitStack() as stack:
        for file, content in following(whole.folder, damage).items():
            stack.enter_context(damaged(whole.folder, file, content))
        assert problems(whole) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE"])
def test_what_was_edited_is_seen_without_the_source(name: str, good: Callable[[str], Good]) -> None:
    whole = good("modelopt")
    with damaged(whole.folder, name, (whole.folder / name).read_bytes() + b" "):
        (problem,) = problems(whole, alone=True)
    assert problem.startswith(f"{whole.folder / name} was changed since it was written")


def test_weights_only_says_bf16(good: Callable[[str], Good]) -> None:
    """Compressed-tensors for weights alone, whose report says that activations are quantized."""
    whole = good("weights only")
    assert problems(whole) == []
    for value in ("nvfp4", "gelu"):
        damage = remade(whole, lambda r, v=value: r.__setitem__("activations", v))
        with ExitStack() as stack:
            for file, content in following(whole.folder, damage).items():
                stack.enter_context(damaged(whole.folder, file, content))
            assert any("activations" in problem for problem in problems(whole))


def test_what_cannot_be_seen_is_documented() -> None:
    page = " ".join((ROOT / "docs" / "users" / "verifying.md").read_text().split())
    for what in (*UNSEEN.values(), *UNSEEN_TOGETHER.values(), *SHARED):
        assert what in page
