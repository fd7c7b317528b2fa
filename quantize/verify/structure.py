"""The target alone, without its source: what its tensors say is quantized, and whether it fits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.agreement import per_token_problem
from quantize.experts.layers import check_layers_are_there
from quantize.experts.names import PROJECTIONS
from quantize.experts.parts import config_of_part, other_part
from quantize.experts.stated import Stated, stated
from quantize.layouts import LAYOUTS
from quantize.layouts.layout import INPUT_SCALE, Layout
from quantize.nvfp4.format import BLOCK
from quantize.run.report_files import REPORT_DATA
from quantize.verify.base import base_modules
from quantize.verify.claims import DENSE, Claims
from quantize.verify.weights import Weights

_EXPERT = re.compile(
    r"(?P<prefix>.*\bexperts)\.(?P<expert>\d{1,9})\."
    rf"(?P<kind>{'|'.join(name for names in PROJECTIONS for name in names)})"
)
_DOWN = {names[-1] for names in PROJECTIONS}


class Structure:
    """What the target's tensors say is quantized.

    Attributes:
        quantized: module paths.
        problems: what does not fit together.
    """

    def __init__(self, target: Checkpoint, layout: Layout) -> None:
        self._target = target
        self._layout = layout
        self.quantized = sorted(quantized_modules(target, layout))
        self.problems = list(self._stray())

    def weights(self, claims: Claims) -> list[Weights]:
        """The quantized weights, those of an expert's gate and up together."""
        sets: dict[tuple[str, str, bool], list[str]] = defaultdict(list)
        experts: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for module in self.quantized:
            if match := _EXPERT.fullmatch(module):
                experts[match["prefix"]][int(match["expert"])].add(match["kind"])
                sets[match["prefix"], match["expert"], match["kind"] in _DOWN].append(module)
            else:
                sets[DENSE, module, False].append(module)
        for prefix, found in experts.items():
            self.problems += self._counted(prefix, found, claims)
        foreign = claims.foreign
        return [
            Weights(
                prefix, tuple(modules), tuple(map(self._shape, modules)),
                text=(claims.text and prefix != DENSE) or claims.made is None or foreign,
                foreign=foreign,
                stays_float=self._stays_float(claims, modules[0]),
            )
            for (prefix, _, _), modules in sets.items()
        ]  # fmt: skip

    def _stays_float(self, claims: Claims, module: str) -> bool:
        if claims.made is not None:
            return claims.stays_float(module)
        config = self._target.config.get("quantization_config") or {}
        return self._layout.stays_float(config, module)

    def _shape(self, module: str) -> tuple[int, int]:
        """``[out, in]``, from the codes or else from the block scales."""
        codes, scales = (
            self._target.tensors.get(f"{module}.{end}") for end in self._layout.suffixes[:2]
        )
        if codes is not None and len(codes.shape) == 2:
            return codes.shape[0], codes.shape[1] * 2 // BLOCK * BLOCK
        if scales is not None and len(scales.shape) == 2:
            return scales.shape[0], scales.shape[1] * BLOCK
        return BLOCK, BLOCK

    def _counted(self, prefix: str, found: dict[int, set[str]], claims: Claims) -> Iterator[str]:
        """That no expert and no projection is missing."""
        folder, count = self._target.folder, max(found) + 1
        missing = sorted(set(range(count)) - set(found))
        every = set.union(*found.values())
        partial = [expert for expert, kinds in found.items() if kinds != every]
        if missing:
            yield f"{folder}: {prefix}.{missing[0]} is missing; complete the download"
        elif partial:
            lacking = sorted(every - found[partial[0]])[0]
            yield f"{folder}: {prefix}.{partial[0]}.{lacking} is missing; complete the download"
        stated = _stated(self._target, prefix).num_experts
        said = {count for counts in stated.values() for count in counts}
        for layer in claims.run.layers if claims.run else ():
            if layer.prefix == prefix:
                said = {len(layer.errors)}
        if said and count not in said:
            yield (
                f"{folder}: {prefix} has {count} experts, but there should be "
                f"{' or '.join(map(str, sorted(said)))}; complete the download"
            )

    def _stray(self) -> Iterator[str]:
        """Tensors of quantized weights of which the config does not speak."""
        full = LAYOUTS.get(self._layout.name, self._layout)
        inputs = set(full.store_input_scale(INPUT_SCALE))
        config = self._target.config.get("quantization_config") or {}
        for name, info in self._target.tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix in inputs and self._layout.stays_float(config, module):
                yield (
                    f"{info.file.name}: {name} is an input scale, but config.json says that only "
                    "weights are quantized; quantize again"
                )


def missing_layers(structure: Structure, claims: Claims) -> Iterator[str]:
    """Layers that the report has and the tensors have not."""
    prefixes = {m["prefix"] for module in structure.quantized if (m := _EXPERT.fullmatch(module))}
    for layer in claims.run.layers if claims.run else ():
        if layer.prefix not in prefixes:
            yield f"{REPORT_DATA} has {layer.prefix}, which is not quantized; quantize again"


def quantized_modules(target: Checkpoint, layout: Layout) -> set[str]:
    """Module paths with any tensor of a weight in NVFP4."""
    codes, *scales = layout.suffixes
    found = set()
    for name, info in target.tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in scales or (suffix == codes and info.dtype in ("U8", "I8")):
            found.add(module)
    return found - base_modules(target).keys()


def count_problems(target: Checkpoint, quantized: Iterable[str]) -> Iterator[str]:
    """Numbers of layers, and of experts for a token, in the config that the tensors contradict.

    Args:
        quantized: module paths.
    """
    where = str(target.folder / "config.json")
    experts: dict[str, int] = {}
    for match in filter(None, map(_EXPERT.fullmatch, quantized)):
        prefix, count = match["prefix"], int(match["expert"]) + 1
        experts[prefix] = max(count, experts.get(prefix, 0))
    for prefix, count in experts.items():
        if problem := per_token_problem(_stated(target, prefix), count):
            yield f"{where}: {prefix} has {count} experts, but {problem}"
            break
    language = [prefix for prefix in experts if other_part(prefix, target.config) is None]
    try:
        check_layers_are_there(target.text_config(), language, target.tensors, where)
    except QuantizeError as error:
        yield str(error)


def _stated(target: Checkpoint, prefix: str) -> Stated:
    return stated(config_of_part(other_part(prefix, target.config), target.config), prefix)
