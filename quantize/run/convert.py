"""NVFP4 weights of the source, which are written in the target's layout and not quantized again.

Codes and block scales keep their bits. A global or input scale goes to the layout as the float32
factor that it is, or as which vLLM takes it: from compressed-tensors to ModelOpt that is exact.
The other way a factor ``s`` is stored as ``1 / s`` rounded to float32, and read as ``1 / (1 / s)``.
For about one ``s`` in seven no float32 has exactly ``s`` as its reciprocal. Then the result is the
nearest there is, one unit in the last place away: ``2 ** -23`` at most, relatively.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from glob import escape
from itertools import pairwise

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import DamagedWeightsError, QuantizeError
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.experts.names import natural_order
from quantize.layouts.heads import EMBEDDING
from quantize.layouts.layout import Layout
from quantize.layouts.stated import stays_float
from quantize.nvfp4.format import NvFp4, bad_scales
from quantize.run.jobs import QuantizeExpert, QuantizeLinears
from quantize.run.options import Options
from quantize.run.shards import ShardWriter
from quantize.run.weight_error import WeightError
from quantize.run.worker import Worker

Stored = tuple[NvFp4, torch.Tensor | None]
"""A weight and its input scale, as ``Checkpoint.load_nvfp4`` reads them."""


@dataclass(frozen=True)
class ConvertExpert(QuantizeExpert):
    """Writes one expert's gate and up, or its down, that are NVFP4 in the source."""

    @property
    def memory(self) -> int:
        # Read, turned, split, written.
        return 4 * self.nbytes + self.written

    def stored(self, worker: Worker) -> list[Stored]:
        """The weights as they are stored, one for each of ``modules``."""
        expert = self.expert if self.group.fused else None
        load = worker.checkpoint.load_nvfp4
        found = [load(name, expert, worker.arena) for name in self.tensor_names]
        if not (self.gate_up and self.group.joined):
            return found
        [(weight, input_scale)] = found
        halves = zip(
            self.group.split(weight.codes, self.interleaved),
            # As bytes: PyTorch cannot index float8 in all ways.
            self.group.split(weight.block_scale.view(torch.uint8), self.interleaved),
            strict=True,
        )
        return [
            (NvFp4(codes, scale.view(weight.block_scale.dtype), weight.global_scale), input_scale)
            for codes, scale in halves
        ]

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        return _write(self, self.stored(worker), worker, writer)


@dataclass(frozen=True)
class ConvertLinear(QuantizeLinears):
    """Writes a linear that is NVFP4 in the source."""

    @property
    def memory(self) -> int:
        return self.nbytes + self.written

    def stored(self, worker: Worker) -> list[Stored]:
        """The weight as it is stored."""
        return [worker.checkpoint.load_nvfp4(name, None, worker.arena) for name in self.names]

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        return _write(self, self.stored(worker), worker, writer)


Converts = ConvertExpert | ConvertLinear


def is_converted(checkpoint: Checkpoint, group: ExpertGroup, names: tuple[str, ...]) -> bool:
    """Whether the weights ``names`` of a group are NVFP4 in the source.

    Raises:
        QuantizeError: if only some are, or if they lie where they cannot be taken out.
    """
    which = [checkpoint.is_nvfp4(name) for name in names]
    for (one, other), pair in zip(pairwise(which), pairwise(names), strict=True):
        if one != other:
            raise QuantizeError(
                f"{' and '.join(pair)}: only one of them is NVFP4, and quantizing 4-bit values "
                "again, to give both one scale, only loses accuracy; start from the original "
                "checkpoint"
            )
    if any(which) and group.flat:
        raise QuantizeError(
            f"{names[0]}: NVFP4 experts cannot be taken out of a matrix that holds all of them; "
            "start from the original checkpoint"
        )
    return any(which)


def convertible_linears(
    checkpoint: Checkpoint, groups: Iterable[ExpertGroup], takes: Callable[[str], bool]
) -> list[str]:
    """Names of the matrices that are NVFP4 in the source and stay it.

    These are all beside the experts of ``groups``, but for embeddings, which no engine reads in
    NVFP4.

    Args:
        takes: whether a module is to be in NVFP4.
    """
    experts = tensor_names_of(list(groups))
    return [
        name
        for name, info in checkpoint.tensors.items()
        if name not in experts
        and name.endswith(".weight")
        and len(info.shape) == 2
        and checkpoint.is_nvfp4(name)
        and not EMBEDDING.fullmatch(name)
        and takes(name.removesuffix(".weight"))
    ]


def with_activations(
    checkpoint: Checkpoint,
    options: Options,
    groups: list[ExpertGroup],
    dense: list[tuple[str, ...]],
) -> tuple[Options, tuple[str, ...]]:
    """The options with ``activations`` decided, and what the user should know of that.

    Raises:
        QuantizeError: if input scales are asked for that NVFP4 weights of the source do not have.
    """
    said = options.weight_only
    options = _with_weight_only(checkpoint, options, groups)
    weights = {
        *(
            name
            for group in groups
            if not options.keeps_floats(group.prefix)
            for expert in range(group.num_experts)
            for name in group.weights_of(expert)
        ),
        *(name for names in dense for name in names),
    }
    nvfp4 = sorted(filter(checkpoint.is_nvfp4, weights), key=natural_order)
    without = [name for name in nvfp4 if not checkpoint.has_input_scale(name)]
    if options.activations and without:
        raise QuantizeError(
            f"--activations nvfp4: {checkpoint.folder}: {len(without)} of {len(nvfp4)} weights in "
            f"NVFP4 have no input scale (first: {without[0]}), and nobody has seen their inputs; "
            "leave --activations out"
        )
    if options.activations is not None:
        return options, ()
    activations = bool(nvfp4) and len(nvfp4) == len(weights) and not without
    if not activations:
        options = replace(options, weight_only=said)
    notes: tuple[str, ...] = ()
    if 0 < len(without) < len(nvfp4):
        notes = (
            f"Weights only: {len(without)} of {len(nvfp4)} NVFP4 weights have no input scale "
            f"({without[0]}).",
        )
    return replace(options, activations=activations), notes


def _with_weight_only(
    checkpoint: Checkpoint, options: Options, groups: list[ExpertGroup]
) -> Options:
    """Experts whose activations stay floats in the source, though others' do not, keep that."""
    if options.activations is False:
        return options
    floats = [
        group.prefix
        for group in groups
        if not any(map(checkpoint.has_input_scale, group.tensor_names))
        and all(map(checkpoint.is_nvfp4, group.weights_of(0)))
        and stays_float(checkpoint.config, group.modules(0)[0])
    ]
    if len(floats) == len(groups):
        return options
    return replace(options, weight_only=(*options.weight_only, *map(escape, floats)))


def stored_tensors_of(stored: Stored, layout: Layout) -> dict[str, torch.Tensor]:
    """The tensors of a converted weight in ``layout``, by suffix.

    Raises:
        ArithmeticError: if a scale, or its reciprocal, is not positive and finite; the message
            says which.
    """
    weight, input_scale = stored
    scales = {"block scale": weight.block_scale, "global scale": weight.global_scale}
    inputs = None if layout is layout.weights_only else input_scale
    if inputs is not None:
        scales["input scale"] = inputs
    for what, scale in scales.items():
        # Of a number so small that it loses digits, the reciprocal may be infinite.
        for each in (scale, scale.float().reciprocal()):
            if problem := bad_scales(each):
                raise ArithmeticError(f"of its {what}, {problem}")
    tensors = layout.store(weight)
    return tensors if inputs is None else tensors | layout.store_input_scale(float(inputs))


def _write(
    job: ConvertExpert | ConvertLinear, stored: list[Stored], worker: Worker, writer: ShardWriter
) -> list[WeightError]:
    lost, names = [], job.tensor_names
    for number, (module, one) in enumerate(zip(job.modules, stored, strict=True)):
        try:
            tensors = stored_tensors_of(one, job.layout)
        except ArithmeticError as error:
            name = names[number] if len(names) == len(job.modules) else names[0]
            raise DamagedWeightsError(
                f"{module} ({name}): {error}; the source is damaged, or was "
                "written by a tool that stores zero for what it has not seen",
                worker.checkpoint.files_of([name]),
            ) from None
        for suffix, tensor in tensors.items():
            writer.write(f"{module}.{suffix}", worker.to_host(tensor))
        lost.append(nothing_lost(module, one[0]))
    return lost


def nothing_lost(module: str, weight: NvFp4) -> WeightError:
    """What the report says of a converted weight. Its norm is not computed: it would take longer
    than all the rest, and nothing is divided by it but zero."""
    bits = weight.block_scale.contiguous().view(torch.uint8).flatten()
    return WeightError(module, 0.0, 1.0, torch.bincount(bits, minlength=127).tolist())
