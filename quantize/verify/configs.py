"""The target's JSON files: the source's config, the quantization, the ignore lists, the gate.

What must be on an ignore list is derived from the target's tensors, not from the quantizer's plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from quantize.checkpoint.descriptions import without_descriptions
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY, Gates, from_contract, to_contract
from quantize.experts.names import ignored_modules
from quantize.layouts import LAYOUTS
from quantize.layouts.base.base_format import BaseFormat
from quantize.layouts.beside import Beside
from quantize.layouts.heads import heads
from quantize.layouts.layout import Layout
from quantize.layouts.siblings import absent_siblings
from quantize.run.made import FIELD
from quantize.verify.claims import CONFIG, Claims


class Modules(NamedTuple):
    """Module paths of a checkpoint.

    Attributes:
        quantized: those with a weight in NVFP4.
        experts_left: routed experts that are not.
        base: the format of those in 8 bits.
        known: others that an ignore list may name.
    """

    quantized: set[str]
    experts_left: set[str]
    base: dict[str, BaseFormat]
    known: set[str]


OURS = {KEY, "quantization_config"}
"""What the quantizer adds to a config."""


def config_problems(source: Checkpoint, target: Checkpoint) -> Iterator[str]:
    """Where the target's config is not the source's, but for how weights are stored."""
    ours = {key: value for key, value in target.config.items() if key not in OURS}
    original = without_descriptions(source.config)
    theirs = {key: value for key, value in original.items() if key not in OURS}
    where = target.folder / CONFIG
    for path, found, wanted in _differences(ours, theirs, ""):
        yield f"{where}: {path} is {found}, the source's {wanted}; quantize again"


def gate_problems(target: Checkpoint, truth: Gates | None, ours: bool) -> Iterator[str]:
    """What is wrong with the gate contract.

    Args:
        truth: the source's gates, if there is a source.
        ours: this package wrote the contract, so that it has every field and no other.
    """
    where = str(target.folder / CONFIG)
    if KEY not in target.config:
        yield f"{where}: no gate contract ({KEY}); quantize with this package"
        return
    try:
        written = from_contract(target.config[KEY], where)
    except QuantizeError as error:
        yield str(error)
        return
    plain = {key: value for key, value in target.config[KEY].items() if key != FIELD}
    if ours:
        for path, found, wanted in _differences(plain, to_contract(written), f"{KEY}."):
            yield f"{where}: {path} is {found}, expected {wanted}; quantize again"
    if written.concatenated() != written:
        yield f"{where}: {KEY} says that gate and up alternate, but they are stored apart"
    elif truth is not None and written != truth.concatenated():
        yield f"{where}: the gate is {written}, but the source's is {truth}; quantize again"


def quantization_problems(
    target: Checkpoint, layout: Layout, claims: Claims, modules: Modules
) -> Iterator[str]:
    """What is wrong with ``quantization_config``, and with the layout's files beside it."""
    where = target.folder / CONFIG
    config = target.config["quantization_config"]
    bases = {base.name: base for base in modules.base.values()}
    kind = claims.made.kv_cache if claims.made else None
    beside = Beside(
        tuple(
            (bases[name], tuple(m for m, base in modules.base.items() if base.name == name))
            for name in sorted(bases)
        ),
        tuple(modules.quantized),
        kind if kind in layout.kv_caches else None,
        tuple(filter(claims.stays_float, modules.quantized)) if claims.made else (),
    )
    lists = {"ignore": config.get("ignore", config.get("exclude_modules"))}
    for name in layout.config_files:
        try:
            found = read_json(target.folder / name)
        except QuantizeError as error:
            yield f"{error}; quantize again"
            continue
        lists[name] = _excluded(found)
        if claims.made is None or not _strings(lists[name]):
            continue
        wanted = layout.extra_files(lists[name], beside)[name]
        for path, ours, theirs in _differences(found, wanted, ""):
            yield f"{target.folder / name}: {path} is {ours}, expected {theirs}; quantize again"
    if claims.made is not None and len({json.dumps(names) for names in lists.values()}) > 1:
        yield f"{where}: its ignore list is not that of {name}; quantize again"
    for file, ignore in lists.items():
        place = f"{where}: quantization_config" if file == "ignore" else target.folder / file
        if not _strings(ignore):
            yield f"{place}: its ignore list is {_shown(ignore)}, expected names; quantize again"
            continue
        for problem in _ignore_problems(target, modules, ignore, claims.made is not None):
            yield f"{place}: {problem}; quantize again"
    if claims.made is None or not _strings(lists["ignore"]):
        return
    if (
        claims.made.layout != layout.name
        or claims.made.activations != (layout is not layout.weights_only)
    ) and claims.made.layout in LAYOUTS:
        yield (
            f"{where}: quantization_config describes the layout {layout.name!r}"
            f"{' for weights only' if layout is layout.weights_only else ''}, but {KEY}.made says "
            f"{claims.made.layout!r} with activations {claims.made.activations}; quantize again"
        )
    wanted = layout.quantization_config(lists["ignore"], beside)
    if not (differences := list(_differences(config, wanted, "quantization_config."))):
        return
    by_name = layout.quantization_config(lists["ignore"], replace(beside, experts_by_name=True))
    if not any(_differences(config, by_name, "")):
        return
    for path, ours, theirs in differences:
        yield f"{where}: {path} is {ours}, expected {theirs}; quantize again"


def _ignore_problems(
    target: Checkpoint, modules: Modules, ignore: list[str], ours: bool
) -> Iterator[str]:
    """What is wrong with an ignore list.

    Args:
        ours: this package wrote it, so that it names each module; else a path or a pattern may
            stand for several, as vLLM has it.
    """
    names = set(ignore)
    patterns = [entry for entry in names if entry.startswith("re:") or set(entry) & set("*?[")]
    parents = names - set(patterns)

    def covering(module: str) -> str | None:
        parts = module.split(".")
        for count in range(len(parts), 0, -1):
            if (path := ".".join(parts[:count])) in parents:
                return path
        return next((entry for entry in patterns if _matches(entry, module)), None)

    quantized = modules.quantized | modules.base.keys()
    for module in sorted(quantized):
        if (entry := covering(module)) is not None:
            yield f"the ignore list has {entry!r}, but {module} is quantized"
            return
    stays = {
        name.removesuffix(".weight")
        for name, info in target.tensors.items()
        if name.endswith(".weight") and len(info.shape) >= 2
    } - quantized
    needed = stays.union(*map(ignored_modules, modules.experts_left))
    nowhere = heads(target.tensors, modules.quantized) | absent_siblings(stays, quantized)
    if ours:
        needed |= nowhere
    for module in sorted(needed):
        if module not in names and (ours or covering(module) is None):
            yield f"the ignore list lacks {module}, which is not quantized"
            return
    if len(ignore) != len(names):
        yield "the ignore list names a module twice"
    known = {part for name in needed | nowhere | modules.known for part in _paths(name)}
    experts = tuple(f"{path}." for path in known if path.endswith("experts"))
    for entry in sorted(parents - known):
        if not entry.startswith(experts):
            yield f"the ignore list has {entry!r}, which no module here is called"
            return


def _paths(module: str) -> Iterator[str]:
    """The paths of a module and of all that it is in."""
    parts = module.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")


def _excluded(value: dict[str, Any]) -> Any:
    nested = value.get("quantization")
    fields = nested if isinstance(nested, dict) else value
    return fields.get("exclude_modules", fields.get("ignore"))


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Where two JSON values differ: the path there, and what is there in each."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            mine, other = ours.get(key, _MISSING), theirs.get(key, _MISSING)
            yield from _differences(mine, other, f"{path}{key}.")
    elif _shown(ours) != _shown(theirs):
        yield path.rstrip("."), _shown(ours)[:200], _shown(theirs)[:200]


_MISSING = object()


def _shown(value: Any) -> str:
    return "missing" if value is _MISSING else json.dumps(value, sort_keys=True)
