"""Finding a checkpoint's routed experts, by tensor names and shapes alone.

Known are experts **stacked** in tensors with a leading experts dimension, under the names in
``_STACKED`` (gate and up in one tensor or in two, stored ``[out, in]`` or ``[in, out]``), and **one
tensor per expert**, ``….experts.E.gate_proj|up_proj|down_proj.weight`` or ``….experts.E.w1|w3|w2``.
Experts without a gate have only up and down. Biases are found with their weights.

No model is built and no activation function is looked for: the gate is ``quantize.identify``'s.

**Multi-token-prediction layers are left as they are**: experts under a module called ``mtp…`` or
``nextn…`` (DeepSeek-V4, MiniMax-M3, Qwen3-Next, Nemotron-H), or in a layer whose number is
``num_hidden_layers`` or above (DeepSeek-V3, GLM-4.5, Step-3.7). They only draft what the model then
checks, and engines build them apart from it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from quantize.checkpoint import Checkpoint, TensorInfo
from quantize.errors import QuantizeError
from quantize.gates import Gate
from quantize.nvfp4 import BLOCK

PLAIN = ("BF16", "F16", "F32")
"""Source dtypes that can be quantized."""

PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down."""

_EXPERTS = r"(?P<prefix>(?:.*\.)?experts)\."
_STACKED: tuple[tuple[str, str, str], ...] = (
    ("gate_up", "", _EXPERTS + r"gate_up_proj(?:\.weight)?"),
    ("gate", "", _EXPERTS + r"gate_proj(?:\.weight)?"),
    ("up", "", _EXPERTS + r"up_proj(?:\.weight)?"),
    ("down", "", _EXPERTS + r"down_proj(?:\.weight)?"),
    ("gate_up_bias", "", _EXPERTS + r"gate_up_proj(?:_|\.)bias"),
    ("gate_bias", "", _EXPERTS + r"gate_proj(?:_|\.)bias"),
    ("up_bias", "", _EXPERTS + r"up_proj(?:_|\.)bias"),
    ("down_bias", "", _EXPERTS + r"down_proj(?:_|\.)bias"),
    # Aria
    ("gate_up", "", _EXPERTS + r"fc1\.weight"),
    ("down", "", _EXPERTS + r"fc2\.weight"),
    # Inkling
    ("gate_up", "", _EXPERTS + r"w13_weight"),
    ("down", "", _EXPERTS + r"w2_weight"),
    # Granite, JetMoE
    ("gate_up", ".experts", r"(?P<prefix>.*)\.input_linear\.weight"),
    ("down", ".experts", r"(?P<prefix>.*)\.output_linear\.weight"),
    # Step-3.7
    ("gate", ".experts", r"(?P<prefix>.*\.moe)\.gate_proj\.weight"),
    ("up", ".experts", r"(?P<prefix>.*\.moe)\.up_proj\.weight"),
    ("down", ".experts", r"(?P<prefix>.*\.moe)\.down_proj\.weight"),
    # DBRX: two dimensions, one expert's rows after another's
    ("gate", "", _EXPERTS + r"mlp\.w1"),
    ("up", "", _EXPERTS + r"mlp\.v1"),
    ("down", "", _EXPERTS + r"mlp\.w2"),
)
"""What a tensor is, what its prefix lacks to be that of the experts, and its names."""

_PATTERNS = [(kind, suffix, re.compile(pattern)) for kind, suffix, pattern in _STACKED]
_SINGLE = re.compile(
    _EXPERTS + r"(?P<expert>[0-9]{1,9})\."
    rf"(?P<kind>{'|'.join(name for names in PROJECTIONS for name in names)})"
    r"\.(?P<what>weight|bias)"
)
_MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)[^.]*(?:\.|$)")
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class Source(Protocol):
    """Where a group's tensors are read from; ``Checkpoint`` is one."""

    def load(self, name: str) -> torch.Tensor:
        """One whole tensor."""

    def load_expert(self, name: str, expert: int, experts: int | None = None) -> torch.Tensor:
        """``tensor[expert]``; of so many ``experts`` in the first dimension, if given."""


@dataclass(frozen=True)
class ExpertGroup:
    """The routed experts of one layer, or those of one size.

    Attributes:
        prefix: module path, such as ``model.layers.3.mlp.experts``.
        num_experts: how many.
        hidden: inputs of gate and up, outputs of down.
        intermediate: outputs of gate and of up, inputs of down.
        fused: whether the source stacks all experts in a few tensors.
        names: (gate, up, down) or, without a gate, (up, down): what the written weights are called.
        sources: all its tensors in the source. First the weights: fused: (gate_up, down), or one
            for each of ``names``; else one for each of ``names``, for one expert after another.
            Then ``bias_names``; then tensors of experts that the model never uses.
        transposed: fused tensors are stored ``[experts, in, out]``.
        bias_names: the biases, in the order of the weights; empty if there are none.
        interleaved: how the rows of a fused gate_up are ordered, where its name says so; None: as
            in the model's class.
        joined: a fused source has gate and up in one tensor.
        flat: fused tensors have two dimensions, ``[experts * intermediate, hidden]``.
        first: the number of its first expert in names.
    """

    prefix: str
    num_experts: int
    hidden: int
    intermediate: int
    fused: bool
    names: tuple[str, ...]
    sources: tuple[str, ...]
    transposed: bool = False
    bias_names: tuple[str, ...] = ()
    interleaved: bool | None = None
    joined: bool = False
    flat: bool = False
    first: int = 0

    @property
    def gated(self) -> bool:
        """Whether its experts have a gate."""
        return len(self.names) == 3

    @property
    def parameters(self) -> int:
        """Weights in all its experts, without biases."""
        return len(self.names) * self.num_experts * self.hidden * self.intermediate

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """``[out, in]`` of each of ``names``."""
        wide = (self.intermediate, self.hidden)
        return (*(wide for _ in self.names[:-1]), wide[::-1])

    def modules(self, expert: int) -> tuple[str, ...]:
        """Module paths of one expert's written weights, as ``names``."""
        return tuple(f"{self.prefix}.{self.first + expert}.{name}" for name in self.names)

    def weights_of(self, expert: int) -> tuple[str, ...]:
        """The source tensors of one expert's weights, down's last; fused: those of all experts."""
        return self._of(expert, self.sources)

    def sources_of(self, expert: int) -> tuple[str, ...]:
        """The source tensors of one expert, biases included; fused: those of all experts."""
        return self._of(expert, self.sources) + self._of(expert, self.bias_names)

    def inputs(
        self, source: Source, expert: int, interleaved: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """One expert's (gate, up), or (up,): ``[intermediate, hidden]``, in the source's dtype.

        ``interleaved`` says how the class orders a fused source's rows: gate, up, gate, up, ...
        """
        parts = [self._read(source, name, expert) for name in self.weights_of(expert)[:-1]]
        return self._split(parts[0], interleaved) if self.joined else tuple(parts)

    def down(self, source: Source, expert: int) -> torch.Tensor:
        """One expert's down, ``[hidden, intermediate]``, in the source's dtype."""
        tensor = self._read(source, self.weights_of(expert)[-1], expert)
        return tensor.T.contiguous() if self.flat else tensor

    def biases(
        self, source: Source, expert: int, interleaved: bool = False
    ) -> dict[str, torch.Tensor]:
        """One expert's biases by written module: ``[intermediate]``, down's ``[hidden]``.

        Empty if there are none; ``interleaved`` as for :meth:`inputs`.
        """
        names = self._of(expert, self.bias_names)
        if not names:
            return {}
        parts = [source.load_expert(n, expert) if self.fused else source.load(n) for n in names]
        if self.joined:
            parts = [*self._split(parts[0], interleaved), parts[1]]
        return dict(zip(self.modules(expert), parts, strict=True))

    def check_gate(self, gate: Gate) -> None:
        """Raise QuantizeError if ``gate`` cannot be that of these experts."""
        if gate.gated != self.gated:
            has, wants = ("no gate", "a gate") if gate.gated else ("a gate", "none")
            raise QuantizeError(
                f"{self.prefix}: its experts have {has}, but the model's activation, {gate}, "
                f"takes {wants}; tensors are missing, or the activation is another"
            )

    def _of(self, expert: int, names: tuple[str, ...]) -> tuple[str, ...]:
        count = len(self.names) - self.joined
        start = 0 if self.fused else count * expert
        return names[start : start + count]

    def _read(self, source: Source, name: str, expert: int) -> torch.Tensor:
        if not self.fused:
            return source.load(name)
        tensor = source.load_expert(name, expert, self.num_experts if self.flat else None)
        return tensor.T.contiguous() if self.transposed else tensor

    def _split(self, both: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if interleaved if self.interleaved is None else self.interleaved:
            return both[0::2].contiguous(), both[1::2].contiguous()
        gate, up = both.chunk(2)
        return gate.contiguous(), up.contiguous()


class _Found(NamedTuple):
    """A checkpoint's expert tensors, by prefix."""

    stacked: dict[str, dict[str, TensorInfo]]
    single: dict[str, dict[tuple[int, str, str], TensorInfo]]


def find(checkpoint: Checkpoint) -> list[ExpertGroup]:
    """All groups of routed experts that are to be quantized, in the order of their names.

    Raises:
        QuantizeError: if there are none (listing what was looked at), if a group is incomplete or
            its shapes disagree, or if it has something that is not supported.
    """
    found = _collect(checkpoint)
    config = checkpoint.text_config()
    groups: list[ExpertGroup] = []
    for prefix, parts in found.stacked.items():
        if not _drafts(prefix, config):
            groups.append(_stacked_group(prefix, parts, checkpoint))
    for prefix, single in found.single.items():
        if not _drafts(prefix, config):
            groups += _single_groups(prefix, single, config)
    if not groups:
        raise QuantizeError(_nothing_found(checkpoint))
    for group in groups:
        _check(group, checkpoint)
    return sorted(groups, key=lambda g: (_natural(g.prefix), g.first))


def left_as_is(checkpoint: Checkpoint) -> list[str]:
    """Prefixes of routed experts that :func:`find` leaves out by rule: those of drafting layers."""
    found = _collect(checkpoint)
    config = checkpoint.text_config()
    return sorted((p for p in (*found.stacked, *found.single) if _drafts(p, config)), key=_natural)


def ignored_modules(prefix: str) -> set[str]:
    """What an ignore list must hold for engines to leave the experts at ``prefix`` unquantized.

    They ask for the module, or for the projections of its expert 0, however those are stored.
    """
    return {prefix} | {f"{prefix}.0.{name}" for names in PROJECTIONS for name in names}


def source_names(groups: list[ExpertGroup]) -> set[str]:
    """The source tensors of all ``groups``: every other tensor stays as it is."""
    return {name for group in groups for name in group.sources}


def _collect(checkpoint: Checkpoint) -> _Found:
    found = _Found(defaultdict(dict), defaultdict(dict))
    for name, info in checkpoint.tensors.items():
        if match := _SINGLE.fullmatch(name):
            key = int(match["expert"]), match["kind"], match["what"]
            single = found.single[match["prefix"]]
            if (other := single.setdefault(key, info)) is not info:
                raise QuantizeError(
                    f"{other.name} and {name} would both be written as {match['prefix']}."
                    f"{'.'.join(map(str, key))}; remove the one that the model does not use"
                )
            continue
        for kind, suffix, pattern in _PATTERNS:
            # A shared expert's linear or an ordinary MLP's may be called the same.
            match = pattern.fullmatch(name)
            if match and (not suffix or len(info.shape) == 3):
                parts = found.stacked[match["prefix"] + suffix]
                if (other := parts.setdefault(kind, info)) is not info:
                    raise _both(match["prefix"] + suffix, other, info)
    for prefix, parts in list(found.stacked.items()):
        # The projections of JetMoE's attention are stacked too, but there is nothing between them.
        if {"gate_up", "down"} <= set(parts) and _is_attention(parts["gate_up"], parts["down"]):
            del found.stacked[prefix]
        elif prefix in found.single:
            one, *_ = found.single[prefix].values()
            raise _both(prefix, next(iter(parts.values())), one)
    return found


def _both(prefix: str, one: TensorInfo, other: TensorInfo) -> QuantizeError:
    return QuantizeError(
        f"{prefix}: {one.name} and {other.name} are two ways to store the same experts; remove "
        "the tensors that the model does not use"
    )


def _is_attention(up: TensorInfo, down: TensorInfo) -> bool:
    stacked = up.name.endswith("_linear.weight")
    return stacked and up.shape == (up.shape[0], *down.shape[:0:-1])


def _drafts(prefix: str, config: dict[str, Any]) -> bool:
    """Whether ``prefix`` is in a multi-token-prediction layer."""
    layers = config.get("num_hidden_layers")
    number = layer_number(prefix)
    beyond = isinstance(layers, int) and number is not None and number >= layers
    return beyond or _MTP.search(prefix) is not None


def layer_number(name: str) -> int | None:
    """The number of the decoder layer that a tensor or module is in."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _natural(name: str) -> list[int | str]:
    parts = re.split(r"([0-9]{1,9})", name)  # every other one is a number
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _stacked_group(
    prefix: str, parts: dict[str, TensorInfo], checkpoint: Checkpoint
) -> ExpertGroup:
    joined = "gate_up" in parts or not {"gate", "up"} & set(parts)
    kinds: tuple[str, ...] = ("gate_up", "down") if joined else ("gate", "up", "down")
    if joined and (separate := [parts[kind] for kind in ("gate", "up") if kind in parts]):
        raise _both(prefix, parts["gate_up"], separate[0])
    if not joined and "gate" not in parts:
        kinds = kinds[1:]
    if missing := [kind for kind in kinds if kind not in parts]:
        raise QuantizeError(
            f"{prefix}.{missing[0]}_proj is missing, though its counterpart exists "
            f"({', '.join(info.name for info in parts.values())})"
        )
    weights = [parts[kind] for kind in kinds]
    if parts["down"].name.endswith("mlp.w2"):
        return _flat_group(prefix, weights, checkpoint)
    for info in weights:
        if len(info.shape) != 3:
            raise QuantizeError(
                f"{info.name} has shape {list(info.shape)}; "
                "stacked experts must have three dimensions"
            )
    shapes = [info.shape for info in weights]
    wide = 2 if joined else 1
    experts, hidden, intermediate = shapes[-1]
    # LongCat has rows for its zero experts, which have no down and are never used.
    unused = _zero_experts(checkpoint.text_config())
    fits = False
    for transposed in (False, True):
        if transposed:
            intermediate, hidden = hidden, intermediate
        matrix = (hidden, wide * intermediate) if transposed else (wide * intermediate, hidden)
        allowed = ((experts, *matrix), (experts + unused, *matrix))
        if fits := all(shape in allowed for shape in shapes[:-1]):
            break
    if not fits:
        raise QuantizeError(
            f"{' and '.join(f'{i.name} {list(i.shape)}' for i in weights)} do not fit together; "
            f"expected [experts, {'2 * ' * joined}intermediate, hidden] and "
            "[experts, hidden, intermediate]"
        )
    sizes = [*[wide * intermediate] * (len(kinds) - 1), hidden]
    biases = _stacked_biases(prefix, parts, kinds, [(experts, size) for size in sizes])
    return ExpertGroup(
        prefix,
        experts,
        hidden,
        intermediate,
        True,
        PROJECTIONS[0] if joined or len(kinds) == 3 else PROJECTIONS[0][1:],
        tuple(info.name for info in weights) + biases,
        transposed,
        biases,
        _interleaved(weights[0], checkpoint),
        joined,
    )


def _zero_experts(config: dict[str, Any]) -> int:
    """How many of the experts compute nothing."""
    number = config.get("zero_expert_num") or 0
    if not isinstance(number, int) or number < 0:
        raise QuantizeError(
            f"config.json: zero_expert_num is {number!r}, expected how many experts have no "
            "weights; correct it"
        )
    return number


def _flat_group(prefix: str, weights: list[TensorInfo], checkpoint: Checkpoint) -> ExpertGroup:
    nested = checkpoint.text_config().get("ffn_config")
    experts = nested.get("moe_num_experts") if isinstance(nested, dict) else None
    shape = weights[0].shape
    fits = len(weights) == 3 and len(shape) == 2 and all(info.shape == shape for info in weights)
    if not isinstance(experts, int) or experts < 1 or not fits or shape[0] % experts:
        raise QuantizeError(
            f"{' and '.join(f'{i.name} {list(i.shape)}' for i in weights)} do not fit together; "
            "expected three of [experts * intermediate, hidden], and ffn_config.moe_num_experts, "
            f"which is {experts}"
        )
    names = tuple(info.name for info in weights)
    sizes = experts, shape[1], shape[0] // experts
    return ExpertGroup(prefix, *sizes, True, PROJECTIONS[0], names, flat=True)


def _interleaved(info: TensorInfo, checkpoint: Checkpoint) -> bool | None:
    if not info.name.endswith("w13_weight"):
        return None
    model_type = str(checkpoint.config.get("model_type"))
    if not model_type.startswith("inkling"):
        raise QuantizeError(
            f"{info.name}: whether gate and up alternate in its rows is known only for Inkling, "
            f"not for model type {model_type!r}"
        )
    return True


def _stacked_biases(
    prefix: str,
    parts: dict[str, TensorInfo],
    kinds: tuple[str, ...],
    shapes: list[tuple[int, int]],
) -> tuple[str, ...]:
    biases = {kind: parts[f"{kind}_bias"] for kind in kinds if f"{kind}_bias" in parts}
    others = [i.name for k, i in parts.items() if k.endswith("_bias") and k[:-5] not in biases]
    if others or len(biases) not in (0, len(kinds)):
        names = ", ".join([*others, *(info.name for info in biases.values())])
        raise QuantizeError(f"{prefix}: only some of its weights have biases: {names}")
    for info, shape in zip(biases.values(), shapes, strict=False):
        if info.shape != shape:
            raise QuantizeError(f"{info.name} has shape {list(info.shape)}, expected {list(shape)}")
    return tuple(info.name for info in biases.values())


def _single_groups(
    prefix: str, parts: dict[tuple[int, str, str], TensorInfo], config: dict[str, Any]
) -> list[ExpertGroup]:
    kinds = {kind for _, kind, _ in parts}
    sets = (*PROJECTIONS, PROJECTIONS[0][1:])
    names = min((n for n in sets if kinds <= set(n)), key=len, default=None)
    if names is None:
        raise QuantizeError(f"{prefix}: mixes names of projections: {', '.join(sorted(kinds))}")
    experts = 1 + max(expert for expert, _, _ in parts)
    unused: list[str] = []
    zero = _zero_experts(config)
    if 0 < zero < experts:
        beyond = [key for key in parts if key[0] >= experts - zero]
        if not any(kind == names[-1] for _, kind, _ in beyond):
            unused = [parts[key].name for key in beyond]
            experts -= zero
    # Ernie 4.5 VL: the text's experts, then as many of another size for images.
    sizes = config.get("moe_intermediate_size")
    count = len(sizes) if isinstance(sizes, list) and len(sizes) and not experts % len(sizes) else 1
    share = experts // count
    return [
        _single_group(prefix, parts, names, range(first, first + share), unused)
        for first in range(0, experts, share)
    ]


def _single_group(
    prefix: str,
    parts: dict[tuple[int, str, str], TensorInfo],
    names: tuple[str, ...],
    experts: range,
    unused: list[str],
) -> ExpertGroup:
    first = parts.get((experts[0], names[0], "weight"))
    shape = first.shape if first else ()  # without it, the loop stops before it looks at shapes
    biased = any((expert, name, "bias") in parts for expert in experts for name in names)
    found: dict[str, list[str]] = {"weight": [], "bias": []}
    for expert in experts:
        for kind in names:
            matrix = shape[::-1] if kind == names[-1] else shape
            for what, expected in (("weight", matrix), ("bias", matrix[:1])):
                info = parts.get((expert, kind, what))
                if what == "bias" and not biased:
                    continue
                if info is None:
                    raise QuantizeError(f"{prefix}.{expert}.{kind}.{what} is missing")
                if info.shape != expected or (what == "weight" and len(info.shape) != 2):
                    raise QuantizeError(
                        f"{info.name} has shape {list(info.shape)}, expected {list(expected)}"
                    )
                found[what].append(info.name)
    return ExpertGroup(
        prefix,
        len(experts),
        shape[1],
        shape[0],
        False,
        names,
        (*found["weight"], *found["bias"], *unused),
        bias_names=tuple(found["bias"]),
        first=experts[0],
    )


def _check(group: ExpertGroup, checkpoint: Checkpoint) -> None:
    for name in group.sources:
        info = checkpoint.tensors[name]
        if info.dtype not in PLAIN:
            raise QuantizeError(
                f"{info.file.name}: {name} has dtype {info.dtype}; only {', '.join(PLAIN)} sources "
                "can be quantized (start from the original, unquantized checkpoint)"
            )
    sizes = (("hidden", group.hidden), ("intermediate", group.intermediate))
    for what, size in (("experts", group.num_experts), *sizes):
        if size < 1:
            raise QuantizeError(
                f"{group.sources[0]}: {what} size {size}, there is nothing to quantize; download "
                "the checkpoint again"
            )
    for what, size in sizes:
        if size % BLOCK:
            raise QuantizeError(
                f"{group.prefix}: {what} size {size} is not a multiple of {BLOCK}, NVFP4's block"
            )
    config = checkpoint.text_config()
    counts = {key: config[key] for key in _EXPERT_COUNTS if isinstance(config.get(key), int)}
    if counts and group.num_experts not in counts.values():
        said = ", ".join(f"{key} = {value}" for key, value in counts.items())
        raise QuantizeError(f"{group.prefix} has {group.num_experts} experts; config.json: {said}")


def _nothing_found(checkpoint: Checkpoint) -> str:
    kinds = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in checkpoint.tensors})
    shown = "\n  ".join(kinds[:40]) + ("\n  …" if len(kinds) > 40 else "")
    drafting = left_as_is(checkpoint)
    left = f"Multi-token-prediction layers stay as they are: {', '.join(drafting)}. "
    return (
        f"{checkpoint.folder}: no routed experts found among {len(checkpoint.tensors)} tensors. "
        "Looked for '….experts.gate_up_proj' with '….experts.down_proj' (three dimensions), "
        "'….experts.E.w1|w3|w2.weight' and '….experts.E.gate_proj|up_proj|down_proj.weight', and "
        "names that some models have instead (docs/users/families.md). "
        f"{left if drafting else ''}The tensors are (N for numbers):\n  {shown}"
    )
