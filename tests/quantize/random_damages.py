"""Random damages to a quantized checkpoint, one thing at a time, as hypothesis strategies."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.quantize import reference
from tests.quantize.damages import (
    DATA,
    PAGE,
    Damage,
    Good,
    compact,
    indented,
)
from tests.quantize.reference import INDEX

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
