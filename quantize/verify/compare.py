"""The target's tensors beside the source's: what was quantized, what was copied, what is too many.

What this shares with the quantizer (finding experts, reading and splitting them, their gate) it
cannot judge; docs/users/verifying.md lists what cannot be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from quantize.checkpoint.kv_cache import kv_cache_of
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import PLAIN, TensorInfo
from quantize.experts import linears
from quantize.experts.find import find, left_as_is
from quantize.experts.gates import Gates
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.experts.strangers import check_no_strangers
from quantize.layouts.base import BASES
from quantize.layouts.base.base_format import BaseFormat
from quantize.layouts.layout import INPUT_SCALE, Layout
from quantize.run.convert import ConvertExpert, ConvertLinear, convertible_linears
from quantize.run.jobs import PIECE, Biases, QuantizeExpert
from quantize.run.planned_jobs import expert_jobs
from quantize.run.worker import Worker
from quantize.verify.base import BaseLinear, base_modules
from quantize.verify.blocks import COLUMNS
from quantize.verify.claims import BASE, DENSE, Claims
from quantize.verify.kv_scales import Job, kv_scales_of
from quantize.verify.stored import Part, same_bits
from quantize.verify.weights import Weights

Task = Callable[[Worker], tuple[Part, int]]
"""Checks something; also says how many bytes of the source it was."""


@dataclass
class Comparison:
    """What there is to compare.

    Attributes:
        weights: the quantized weights, in the order of the report.
        expected: names of all tensors that the target must have, once :meth:`tasks` is through.
        memory: the most bytes that a task takes.
        problems: what is wrong with all of it.
        base: the weights in 8 bits, of linears and of experts.
        kv_scales: the scales of a key-value cache.
        experts_left: module paths of the experts that are not quantized.
        before: bytes in the source of what is quantized, by the prefix of a layer.
    """

    source: Checkpoint
    target: Checkpoint
    layout: Layout
    gates: Gates
    claims: Claims
    weights: list[Weights] = field(default_factory=list)
    expected: set[str] = field(default_factory=set)
    memory: int = 0
    problems: list[str] = field(default_factory=list)
    base: list[BaseLinear] = field(default_factory=list)
    kv_scales: list[Job] = field(default_factory=list)
    experts_left: set[str] = field(default_factory=set)
    before: dict[str, int] = field(default_factory=dict)

    def tasks(self) -> Iterator[Task]:
        """Everything that is to be done."""
        groups = find(self.source, self._asked)
        quantized = [group for group in groups if self._is_quantized(group)]
        eight_bit = [group for group in groups if self._is_eight_bit(group)]
        check_no_strangers(self.source, quantized + eight_bit)
        self.experts_left = {g.prefix for g in groups if g not in quantized + eight_bit}
        self.experts_left.update(left_as_is(self.source))
        dense = [
            names
            for names in linears.find(self.source, groups)
            if not any(map(self.source.is_nvfp4, names))
            and self._are_quantized([name.removesuffix(".weight") for name in names], names)
        ]
        converted = convertible_linears(self.source, groups, self._is_converted)
        self.experts_left = {
            prefix
            for prefix in self.experts_left
            if not any(name.startswith(f"{prefix}.") for name in converted)
        }
        biases: list[Task] = []
        for prefix, names in (
            *((group.prefix, group.tensor_names) for group in quantized + eight_bit),
            *((DENSE, names) for names in (*dense, *((name,) for name in converted))),
        ):
            stored = sum(map(self.source.stored_bytes, names))
            self.before[prefix] = self.before.get(prefix, 0) + stored
        for group in quantized + eight_bit:
            interleaved = self.gates.of(group.prefix).interleaved
            for expert in range(group.num_experts):
                for job in expert_jobs(self.source, group, expert, interleaved, self.layout, "max"):
                    if isinstance(job, Biases):
                        self.expected.update(out.name for out in job.outputs)
                        self.memory = max(self.memory, job.memory)
                        biases.append(partial(self._biases, job))
                    elif group in quantized:
                        self._add(self._expert(job))
                    else:
                        self.base += self._in_eight_bit(job)
        for names in dense:
            self._add(self._linears(names))
        for name in converted:
            self._add(self._converted(name))
        if not self.weights:
            self.problems.append(
                f"{self.target.folder}: none of the source's experts is quantized; its "
                "config.json and its tensors are not of the same checkpoint"
            )
        for weights in self.weights:
            yield partial(weights.check, self.target, self.layout)
        yield from biases
        self.kv_scales = kv_scales_of(self.source, self.target, self.layout, self.claims)
        self.expected.update(out.name for job in self.kv_scales for out in job.outputs)
        for linear in self._base(groups):
            self.before[BASE] = self.before.get(BASE, 0) + linear.nbytes
            self.base.append(linear)
        for linear in self.base:
            assert linear.source is not None
            outputs = linear.outputs(linear.source[1], self.layout)
            self.expected.update(out.name for out in outputs)
            self.memory = max(self.memory, 32 * math.prod(linear.source[1]))
            yield partial(linear.check, self.target, self.layout)
        done = tensor_names_of(quantized) | {name for names in dense for name in names}
        done.update(name for each in self.base if each.source for name in each.source[0])
        done.update(tensor_names_of(eight_bit))
        done.update(converted)
        # What is not written as the layout has it is left out, or was copied by older versions.
        cache = kv_cache_of(self.source.folder, self.source.config, self.source.stored).names
        done.update(cache - (self.target.tensors.keys() - self.expected))
        for name, info in self.source.tensors.items():
            if name not in done:
                self.expected.add(name)
                yield partial(self._copy, info)

    def too_many(self) -> Iterator[str]:
        """Tensors of the target that it must not have."""
        every = {*self.layout.store_input_scale(INPUT_SCALE)}
        for name, info in self.target.tensors.items():
            if name in self.expected:
                continue
            module, _, suffix = name.rpartition(".")
            if suffix not in every and f"{module}.{self.layout.suffixes[0]}" in self.expected:
                yield (
                    f"{info.file.name}: {name} is not in the source, and config.json says nothing "
                    "of it (input scales belong to NVFP4 activations alone); quantize again"
                )
            else:
                yield f"{info.file.name}: {name} is not in the source; quantize again"

    def _add(self, weights: Weights) -> None:
        self.weights.append(weights)
        self.memory = max(self.memory, weights.memory)
        self.expected.update(out.name for outs in weights.outputs(self.layout) for out in outs)

    def _asked(self, prefix: str) -> bool:
        """Whether the experts at ``prefix``, in another part than the language model, were to be
        quantized."""
        made = self.claims.made
        if made is None:
            end = f".{self.layout.suffixes[1]}"
            return any(n.startswith(f"{prefix}.") and n.endswith(end) for n in self.target.tensors)
        return made.selection().asks_for(prefix, self.source.config)

    def _is_quantized(self, group: ExpertGroup) -> bool:
        made = self.claims.made
        if made is not None:
            return made.selection().takes(group.prefix)
        return self._has_nvfp4(m for e in range(group.num_experts) for m in group.modules(e))

    def _is_eight_bit(self, group: ExpertGroup) -> bool:
        made, stored = self.claims.made, self.stored_base
        if made is not None:
            return made.formats.get(group.prefix) in BASES
        modules = {m for e in range(group.num_experts) for m in group.modules(e)}
        # What the source has in 8 bits is a copy.
        return modules <= stored.keys() and not any(
            self.source.tensors[n].dtype not in PLAIN for n in group.tensor_names
        )

    def _in_eight_bit(self, job: QuantizeExpert) -> Iterator[BaseLinear]:
        """The weights of one expert's gate and up, or of its down."""
        group, made = job.group, self.claims.made
        shape = group.shapes[0 if job.gate_up else -1]

        def load(number: int, worker: Worker) -> torch.Tensor:
            return job.weights(worker)[number]

        for number, module in enumerate(job.modules):
            yield BaseLinear(
                module,
                BASES[made.formats[group.prefix]] if made else self.stored_base[module],
                (job.tensor_names, shape),
                self.claims.known,
                job.nbytes // len(job.modules),
                partial(load, number),
                group.prefix,
            )

    @cached_property
    def stored_base(self) -> dict[str, BaseFormat]:
        """The format of each of the target's weights that it stores in 8 bits."""
        return base_modules(self.target)

    def _are_quantized(self, modules: list[str], names: tuple[str, ...]) -> bool:
        made = self.claims.made
        if made is not None and not self.claims.foreign:
            return made.linears and all(map(made.selection().takes, modules))
        return self._has_nvfp4(modules)

    def _is_converted(self, module: str) -> bool:
        made = self.claims.made
        return made.selection().takes(module) if made is not None else self._has_nvfp4([module])

    def _has_nvfp4(self, modules: Iterable[str]) -> bool:
        """Whether the target has any tensor of these modules in NVFP4; else they should be copies.

        ModelOpt's codes are called as the source's weights are.
        """
        for name in (f"{module}.{end}" for module in modules for end in self.layout.suffixes):
            found, original = self.target.tensors.get(name), self.source.tensors.get(name)
            if found and (original is None or found.dtype != original.dtype):
                return True
        return False

    def _base(self, groups: list[ExpertGroup]) -> Iterator[BaseLinear]:
        """The linears that the target has, or should have, in 8 bits."""
        made, stored = self.claims.made, self.stored_base
        if made is not None and made.base not in BASES:
            return
        chosen: dict[str, BaseFormat] = {}
        if made is not None and made.base is not None:
            base, options = BASES[made.base], made.selection()
            for names in linears.find(self.source, groups, base.fits):
                modules = [name.removesuffix(".weight") for name in names]
                if all(map(options.takes, modules)):
                    chosen |= dict.fromkeys(modules, base)
        else:
            experts = {each.module for each in self.base}
            names_of = {name.removesuffix(".weight") for name in self.source.tensors}
            chosen = {
                module: base
                for module, base in stored.items()
                if module not in experts
                and module in names_of
                and self.source.tensors[f"{module}.weight"].dtype in PLAIN
            }
        for module, base in chosen.items():
            info = self._info(f"{module}.weight")
            yield BaseLinear(
                module,
                base,
                ((info.name,), (info.shape[0], info.shape[1])),
                self.claims.known,
                self.source.stored_bytes(info.name),
            )

    def _expert(self, job: QuantizeExpert) -> Weights:
        group = job.group
        shape = group.shapes[0 if job.gate_up else -1]
        return Weights(
            group.prefix,
            job.modules,
            (shape,) * len(job.modules),
            self.claims.rule(group.prefix, group.first + job.expert),
            self.claims.global_rule,
            self.claims.text,
            self.claims.bounds,
            job.weights,
            job.nbytes,
            # The blocks' errors, and the weight in float32.
            2 * job.memory + 5 * len(job.modules) * shape[0] * shape[1],
            job.stored if isinstance(job, ConvertExpert) else None,
            self.claims.foreign,
            job.tensor_names,
            self._stays_float(job.modules[0]),
        )

    def _stays_float(self, module: str) -> bool:
        """Whether the config says that what goes into one of its weights stays as it is."""
        if self.claims.made is not None:
            return self.claims.stays_float(module)
        config = self.target.config.get("quantization_config") or {}
        return self.layout.stays_float(config, module)

    def _converted(self, name: str) -> Weights:
        rows, columns = self._info(name).shape
        nbytes = self.source.stored_bytes(name)
        job = ConvertLinear((name,), ((rows, columns),), self.layout, "max", nbytes, False)
        return Weights(
            DENSE,
            job.modules,
            job.shapes,
            load=lambda worker: [worker.load(name)],
            nbytes=nbytes,
            memory=2 * job.memory + 5 * rows * columns,
            carried=job.stored,
            names=job.names,
        )

    def _linears(self, names: tuple[str, ...]) -> Weights:
        shapes = tuple((info.shape[0], info.shape[1]) for info in map(self._info, names))
        return Weights(
            DENSE,
            tuple(name.removesuffix(".weight") for name in names),
            shapes,
            self.claims.rule(DENSE, None),
            None,
            # Text is for experts.
            self.claims.made is None or self.claims.foreign,
            COLUMNS,
            lambda worker: [worker.load(name) for name in names],
            sum(map(self.source.stored_bytes, names)),
            10 * sum(rows * columns for rows, columns in shapes),
            foreign=self.claims.foreign,
            names=names,
        )

    def _info(self, name: str) -> TensorInfo:
        return self.source.tensors[name]

    def _biases(self, job: Biases, worker: Worker) -> tuple[Part, int]:
        part, group = Part(), job.group
        biases = group.biases(worker, job.expert, job.interleaved)
        for out in job.outputs:
            bias = biases[out.name.removesuffix(".bias")]
            same = partial(self._same_bias, bias)
            part.problems += self._copy_problems(out, same)
        return part, job.nbytes

    def _same_bias(self, bias: torch.Tensor, copy: TensorInfo) -> bool:
        return same_bits(self.target.load(copy.name), bias)

    def _copy(self, info: TensorInfo, worker: Worker) -> tuple[Part, int]:
        problems = self._copy_problems(info, lambda copy: self._same(info, copy, worker))
        return Part(problems=list(problems)), self.source.stored_bytes(info.name)

    def _copy_problems(
        self, wanted: TensorInfo, same: Callable[[TensorInfo], bool]
    ) -> Iterator[str]:
        """What is wrong with the target's copy of a tensor; ``same`` compares what it holds."""
        name, copy = wanted.name, self.target.tensors.get(wanted.name)
        if copy is None:
            yield f"{self.target.folder}: {name} is missing; quantize again"
        elif (copy.dtype, copy.shape) != (wanted.dtype, wanted.shape):
            yield (
                f"{copy.file.name}: {name} is {copy.dtype} {list(copy.shape)}, the source's "
                f"{wanted.dtype} {list(wanted.shape)}; quantize again"
            )
        elif not same(copy):
            yield f"{copy.file.name}: {name} differs from the source; quantize again"

    def _same(self, info: TensorInfo, copy: TensorInfo, worker: Worker) -> bool:
        if self.source.parts(info.name) != (info.name,):
            return all(
                same_bits(ours, decoded.bfloat16()) for ours, decoded in self._decoded(info, worker)
            )
        size = min(PIECE, info.nbytes)
        left, right = worker.arena.take(size), worker.arena.take(size)
        for start in range(0, info.nbytes, PIECE):
            count = min(PIECE, info.nbytes - start)
            self.source.read_into(left[:count], info, start)
            self.target.read_into(right[:count], copy, start)
            if not torch.equal(left[:count], right[:count]):
                return False
        return True

    def _decoded(
        self, info: TensorInfo, worker: Worker
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A copy and the source's weight, dequantized: of stacked experts, one after another."""
        if len(info.shape) != 3:
            yield self.target.load(info.name, worker.arena), worker.load(info.name)
            return
        for expert in range(info.shape[0]):
            worker.arena.reset()
            copy = self.target.load_expert(info.name, expert, arena=worker.arena)
            yield copy, worker.load_expert(info.name, expert).contiguous()
