"""Finding a checkpoint's routed experts, by tensor names and shapes alone.

Two layouts are known:

* **fused** (Transformers 5): ``….experts.gate_up_proj`` and ``….experts.down_proj``, both with a
  leading experts dimension;
* **one tensor per expert**: ``….experts.E.w1|w3|w2.weight`` or
  ``….experts.E.gate_proj|up_proj|down_proj.weight``.

No model is built and no activation function is looked for: the gate is ``quantize.identify``'s.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import torch

from quantize.checkpoint import Checkpoint, TensorInfo
from quantize.errors import QuantizeError
from quantize.nvfp4 import BLOCK

PLAIN = ("BF16", "F16", "F32")
"""Source dtypes that can be quantized."""

PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down."""

_FUSED = re.compile(r"(?P<prefix>(?:.*\.)?experts)\.(?P<kind>gate_up_proj|down_proj)(?:\.weight)?")
_SINGLE = re.compile(
    r"(?P<prefix>(?:.*\.)?experts)\.(?P<expert>\d+)\."
    rf"(?P<kind>{'|'.join(name for names in PROJECTIONS for name in names)})\.weight"
)
_BIAS = re.compile(r"(?:.*\.)?experts\.(?:.*[._])?bias")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ExpertGroup:
    """The routed experts of one layer.

    Attributes:
        prefix: module path, such as ``model.layers.3.mlp.experts``.
        num_experts: how many.
        hidden: inputs of gate and up, outputs of down.
        intermediate: outputs of gate and of up, inputs of down.
        fused: whether the source stacks all experts in two tensors.
        names: (gate, up, down), what the written tensors are called.
        sources: the source tensors' names; fused: (gate_up, down); else all, in expert order,
            three an expert.
        transposed: fused tensors are stored ``[experts, in, out]``.
    """

    prefix: str
    num_experts: int
    hidden: int
    intermediate: int
    fused: bool
    names: tuple[str, str, str]
    sources: tuple[str, ...]
    transposed: bool = False

    @property
    def parameters(self) -> int:
        """Weights in all its experts."""
        return 3 * self.num_experts * self.hidden * self.intermediate

    def modules(self, expert: int) -> tuple[str, str, str]:
        """Module paths of one expert's gate, up and down."""
        gate, up, down = (f"{self.prefix}.{expert}.{name}" for name in self.names)
        return gate, up, down

    def gate_up(
        self, checkpoint: Checkpoint, expert: int, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's gate and up, each ``[intermediate, hidden]``, in the source's dtype.

        ``interleaved`` says how a fused source orders its rows: gate, up, gate, up, ...
        """
        if not self.fused:
            gate, up, _ = self.sources[3 * expert : 3 * expert + 3]
            return checkpoint.load(gate), checkpoint.load(up)
        both = checkpoint.load_expert(self.sources[0], expert)
        both = both.T if self.transposed else both
        if interleaved:
            return both[0::2].contiguous(), both[1::2].contiguous()
        gate_part, up_part = both.chunk(2)
        return gate_part.contiguous(), up_part.contiguous()

    def down(self, checkpoint: Checkpoint, expert: int) -> torch.Tensor:
        """One expert's down, ``[hidden, intermediate]``, in the source's dtype."""
        if not self.fused:
            return checkpoint.load(self.sources[3 * expert + 2])
        both = checkpoint.load_expert(self.sources[1], expert)
        return (both.T if self.transposed else both).contiguous()


def find(checkpoint: Checkpoint) -> list[ExpertGroup]:
    """All groups of routed experts, in the order of the checkpoint's tensor names.

    Raises:
        QuantizeError: if there are none (listing what was looked at), if a group is incomplete or
            its shapes disagree, or if it has something that is not supported.
    """
    tensors = checkpoint.tensors
    fused: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    single: dict[str, dict[tuple[int, str], TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        if _BIAS.fullmatch(name):
            raise QuantizeError(
                f"{info.file.name}: {name}: experts with biases (as GPT-OSS has) are not "
                "supported yet; only their weights could be quantized, and engines would "
                "need the biases beside them"
            )
        if match := _FUSED.fullmatch(name):
            fused[match["prefix"]][match["kind"]] = info
        elif match := _SINGLE.fullmatch(name):
            single[match["prefix"]][int(match["expert"]), match["kind"]] = info

    groups = [_fused_group(prefix, parts) for prefix, parts in fused.items()]
    groups += [_single_group(prefix, parts) for prefix, parts in single.items()]
    if not groups:
        raise QuantizeError(_nothing_found(checkpoint))
    for group in groups:
        _check(group, checkpoint)
    return sorted(groups, key=lambda g: _natural(g.prefix))


def source_names(groups: list[ExpertGroup]) -> set[str]:
    """The source tensors of all ``groups``: every other tensor stays as it is."""
    return {name for group in groups for name in group.sources}


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _fused_group(prefix: str, parts: dict[str, TensorInfo]) -> ExpertGroup:
    for kind in ("gate_up_proj", "down_proj"):
        if kind not in parts:
            raise QuantizeError(f"{prefix}.{kind} is missing, though its counterpart exists")
        if len(parts[kind].shape) != 3:
            raise QuantizeError(
                f"{parts[kind].name} has shape {list(parts[kind].shape)}; "
                "stacked experts must have three dimensions"
            )
    up, down = parts["gate_up_proj"], parts["down_proj"]
    experts, intermediate, hidden, transposed = up.shape[0], down.shape[2], down.shape[1], False
    if up.shape != (experts, 2 * intermediate, hidden):
        intermediate, hidden, transposed = down.shape[1], down.shape[2], True
    expected = (experts, hidden, 2 * intermediate) if transposed else up.shape
    if up.shape != expected or down.shape[0] != experts:
        raise QuantizeError(
            f"{up.name} {list(up.shape)} and {down.name} {list(down.shape)} do not fit together; "
            "expected [experts, 2 * intermediate, hidden] and [experts, hidden, intermediate]"
        )
    return ExpertGroup(
        prefix,
        experts,
        hidden,
        intermediate,
        True,
        PROJECTIONS[0],
        (up.name, down.name),
        transposed,
    )


def _single_group(prefix: str, parts: dict[tuple[int, str], TensorInfo]) -> ExpertGroup:
    kinds = {kind for _, kind in parts}
    names = next((n for n in PROJECTIONS if kinds <= set(n)), None)
    if names is None:
        raise QuantizeError(f"{prefix}: mixes names of projections: {', '.join(sorted(kinds))}")
    experts = 1 + max(expert for expert, _ in parts)
    sources: list[str] = []
    first = parts.get((0, names[0]))
    shape = first.shape if first else ()  # without it, the loop stops before it looks at shapes
    for expert in range(experts):
        for kind in names:
            info = parts.get((expert, kind))
            if info is None:
                raise QuantizeError(f"{prefix}.{expert}.{kind}.weight is missing")
            expected = shape[::-1] if kind == names[2] else shape
            if len(info.shape) != 2 or info.shape != expected:
                raise QuantizeError(
                    f"{info.name} has shape {list(info.shape)}, expected {list(expected)}"
                )
            sources.append(info.name)
    return ExpertGroup(prefix, experts, shape[1], shape[0], False, names, tuple(sources))


def _check(group: ExpertGroup, checkpoint: Checkpoint) -> None:
    for name in group.sources:
        info = checkpoint.tensors[name]
        if info.dtype not in PLAIN:
            raise QuantizeError(
                f"{info.file.name}: {name} has dtype {info.dtype}; only {', '.join(PLAIN)} sources "
                "can be quantized (start from the original, unquantized checkpoint)"
            )
    for what, size in (("hidden", group.hidden), ("intermediate", group.intermediate)):
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
    return (
        f"{checkpoint.folder}: no routed experts found among {len(checkpoint.tensors)} tensors. "
        "Looked for '….experts.gate_up_proj' with '….experts.down_proj' (three dimensions), "
        "'….experts.E.w1|w3|w2.weight' and '….experts.E.gate_proj|up_proj|down_proj.weight'. "
        f"The tensors are (N for numbers):\n  {shown}"
    )
