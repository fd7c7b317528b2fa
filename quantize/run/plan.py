"""Planning a run: everything about the output that follows from the source's headers.

Which tensors it has, of which shapes, in which shards, at which offsets, and the independent jobs
that make them. The same source and options always give the same plan, on every machine.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from quantize.checkpoint.identity import Identity, identity_of
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.sources.refusals import check_config
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts import linears
from quantize.experts.find import find, left_as_is
from quantize.experts.gates import Gates, to_contract
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.experts.identify import identify
from quantize.experts.layers import (
    check_layer_count,
    check_layers_are_there,
    check_layers_of_class,
)
from quantize.experts.names import ignored_modules
from quantize.experts.parts import other_part
from quantize.experts.strangers import check_no_strangers
from quantize.layouts import LAYOUTS
from quantize.layouts.base import BASES
from quantize.layouts.beside import Beside
from quantize.layouts.heads import heads
from quantize.layouts.layout import Layout
from quantize.layouts.siblings import absent_siblings
from quantize.run.bits import Choice
from quantize.run.convert import (
    Converts,
    convertible_linears,
    with_activations,
)
from quantize.run.jobs import Job, KeepRounded, QuantizeExpert, QuantizeLinears
from quantize.run.kv_carried import CarryKvScales, with_kv_cache
from quantize.run.kv_scales import KvRanges, KvScales
from quantize.run.notes import bare_fp8, left_over, of_mxfp4, other_parts
from quantize.run.options import Options
from quantize.run.patterns import check_patterns, with_weight_only
from quantize.run.planned_jobs import check_unique, into_shards, jobs_of
from quantize.run.ranges import Ranges
from quantize.run.staged import Staged
from quantize.run.version import package_version


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is known before it.

    Attributes:
        found: all routed experts.
        groups: those that are quantized.
        dense: the linears that are, in sets that share a global scale. Those that are NVFP4 in the
            source have sets of their own.
        base: the linears that are rounded to ``options.base``, by their weights' names.
        eight_bit: the experts that are rounded to what ``options.formats`` say, a key of ``BASES``.
        ignore: modules with a weight of two or more dimensions that stay, and the head, which may
            have none.
        notes: what the user should know about the source, a sentence each.
        shards: jobs, in the order of their outputs in each shard.
        choice: how ``options.formats`` were chosen; None if they were not, or nobody needs to know.
    """

    options: Options
    found: list[ExpertGroup]
    groups: list[ExpertGroup]
    dense: list[tuple[str, ...]]
    base: list[str]
    gates: Gates
    layout: Layout
    ignore: list[str]
    shards: list[list[Job]] = field(repr=False)
    notes: tuple[str, ...] = ()
    eight_bit: list[ExpertGroup] = field(default_factory=list)
    choice: Choice | None = field(default=None, repr=False)

    @property
    def converts(self) -> bool:
        """Whether some weights are NVFP4 in the source, and keep their bits."""
        return any(isinstance(job, Converts) for jobs in self.shards for job in jobs)

    @property
    def quantizes(self) -> bool:
        """Whether some weights are not, and get theirs."""
        return any(
            isinstance(job, QuantizeExpert | QuantizeLinears) and not isinstance(job, Converts)
            for jobs in self.shards
            for job in jobs
        )

    def check_can_calibrate(self) -> None:
        """Raise QuantizeError if some weights are NVFP4 in the source."""
        if self.converts:
            raise QuantizeError(
                "--calibrate, --input-scales: the checkpoint is already NVFP4; quantizing 4-bit "
                "values again only loses accuracy; start from the original one"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in the output."""
        return sum(job.written for jobs in self.shards for job in jobs)

    @property
    def beside(self) -> Beside:
        """What the config must say of what is not in NVFP4."""
        nvfp4 = [m for g in self.groups for e in range(g.num_experts) for m in g.modules(e)]
        nvfp4 += [name.removesuffix(".weight") for names in self.dense for name in names]
        eight_bit: dict[str, list[str]] = {}
        if self.base and self.options.base:
            linears = [name.removesuffix(".weight") for name in self.base]
            eight_bit[self.options.base] = linears
        for group in self.eight_bit:
            modules = (m for expert in range(group.num_experts) for m in group.modules(expert))
            eight_bit.setdefault(self.format_of(group), []).extend(modules)
        return Beside(
            tuple((BASES[name], tuple(eight_bit[name])) for name in sorted(eight_bit)),
            tuple(nvfp4),
            self.options.kv_cache,
            tuple(
                module
                for group in self.groups
                if self.options.keeps_floats(group.prefix)
                for expert in range(group.num_experts)
                for module in group.modules(expert)
            ),
        )

    def layout_of(self, group: ExpertGroup) -> Layout:
        """The layout of one of ``groups``."""
        stays = self.options.keeps_floats(group.prefix)
        return self.layout.weights_only if stays else self.layout

    def format_of(self, group: ExpertGroup) -> str:
        """The key of ``BASES`` that one of ``eight_bit`` has."""
        return dict(self.options.formats)[group.prefix]

    @property
    def caches(self) -> list[str]:
        """Module paths of the attentions whose keys and values get scales."""
        jobs = (job for jobs in self.shards for job in jobs)
        return [job.attention for job in jobs if isinstance(job, KvScales)]

    @property
    def carried_caches(self) -> list[CarryKvScales]:
        """The jobs that write the source's own scales of keys and values."""
        jobs = (job for jobs in self.shards for job in jobs)
        return [job for job in jobs if isinstance(job, CarryKvScales)]

    @property
    def file_names(self) -> list[str]:
        """The shards' file names."""
        count = len(self.shards)
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    def outputs(self, shard: int) -> list[TensorInfo]:
        """The tensors of one shard, in the file's order."""
        return [out for job in self.shards[shard] for out in job.outputs]

    def reads(self, checkpoint: Checkpoint, shard: int) -> set[str]:
        """The stored tensors that one shard is made from."""
        names = (name for job in self.shards[shard] for name in job.tensor_names)
        return {part for name in names for part in checkpoint.parts(name)}

    def fingerprint(self, checkpoint: Checkpoint, identity: Identity | None = None) -> str:
        """Equal for two runs only if all their output's files are, but for what the report says of
        where they ran.

        Args:
            identity: ``identity_of(checkpoint)``, if that is known already.
        """
        what = [self.settings(checkpoint), *(identity or identity_of(checkpoint))]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def fingerprint_of_commit(self, checkpoint: Checkpoint, identity: Identity) -> str:
        """As :meth:`fingerprint`, but known before any weights are downloaded: a commit on the hub
        stays as it is. Empty if the source's is not known.

        Args:
            identity: ``identity_of(checkpoint)``.
        """
        if not identity.is_commit:
            return ""
        return self.fingerprint(checkpoint, identity._replace(files={}, tensors={}))

    def settings(self, checkpoint: Checkpoint) -> str:
        """Equal for two runs if they differ in nothing but the values of the source's tensors and
        the files beside them."""
        options = asdict(self.options)
        if self.options.calibration:
            del options["calibration"]["text"]  # where the tokens are from; their digest is there
        what: dict[str, Any] = {
            "version": package_version(),
            "options": options,
            "gates": to_contract(self.gates),
            "config": checkpoint.config,
            "source": [
                (t.name, t.file.name, t.dtype, t.shape, t.offset)
                for t in checkpoint.stored.values()
            ],
            "outputs": [
                [(out.name, out.dtype, out.shape) for out in self.outputs(i)]
                for i in range(len(self.shards))
            ],
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def rounds(self) -> bool:
        """Whether calibration rounds the experts, and writes them into the shards itself."""
        used = self.options.calibration
        return used is not None and used.method is not None

    def calibrated(self, staged: Staged) -> Plan:
        """The plan as it is carried out, with what calibration has left: what it has rounded is
        there already, or weights get the input scales that it has found.

        Without calibration, the plan itself.

        Raises:
            QuantizeError: if input scales are not there.
        """
        if not self.options.calibration:
            return self
        folder, with_ranges = staged.folder, not self.rounds
        scales = {g.prefix: Ranges(folder).of(g) for g in self.groups} if with_ranges else {}

        kept = KvRanges(folder)

        def carried_out(job: Job) -> Job:
            if isinstance(job, KvScales):
                return replace(job, scales=kept.scales(job.attention))
            if not isinstance(job, QuantizeExpert):
                return job
            if not with_ranges:
                return KeepRounded(job, staged)
            gate_up, down = scales[job.group.prefix][job.expert]
            return replace(job, input_scale=gate_up if job.gate_up else down)

        return replace(self, shards=[list(map(carried_out, jobs)) for jobs in self.shards])


def plan(
    checkpoint: Checkpoint, options: Options | None = None, gates: Gates | None = None
) -> Plan:
    """Plan the quantization of ``checkpoint``; reads headers only.

    Args:
        gates: if they are known already; else they are identified.

    Raises:
        QuantizeError: see ``find``, ``identify`` and ``check_config``; also if the patterns leave
            nothing.
    """
    options = options or Options()
    leftover = left_over(checkpoint)
    where = str(checkpoint.folder / "config.json")
    if not leftover:
        check_config(checkpoint.config, where)

    def asked(prefix: str) -> bool:
        return options.asks_for(prefix, checkpoint.config)

    found = find(checkpoint, asked)
    of_language = [group for group in found if not other_part(group.prefix, checkpoint.config)]
    check_layer_count(checkpoint.config, of_language, where)
    language, prefixes = checkpoint.text_config(), [group.prefix for group in of_language]
    check_layers_are_there(language, prefixes, checkpoint.tensors, where)
    gates = gates or _gates(checkpoint, options, found)
    if gates.of_class is not None and of_language == found:
        check_layers_of_class(language, gates.of_class, prefixes, where)
    for group in found:
        group.check_gate(gates.of(group.prefix))
    groups = [group for group in found if options.takes(group.prefix)]
    eight_bit = [group for group in found if dict(options.formats).get(group.prefix) in BASES]
    # What stays is copied with whatever lies beside it, but a model that is run needs all of it.
    check_no_strangers(checkpoint, found if options.calibration else groups + eight_bit)
    base = BASES[options.base] if options.base else None
    converted = convertible_linears(checkpoint, found, options.takes)
    candidates = [
        names
        for names in linears.find(checkpoint, found, *([base.fits] if base else []))
        if not any(map(checkpoint.is_nvfp4, names))
    ]
    if (options.linears or base) and not candidates and not converted:
        raise QuantizeError(
            f"{f'--base {options.base}' if base else '--all-linears'}: no linears besides the "
            "experts that can be quantized; known are "
            f"{', '.join(sorted(linears.INPUTS | linears.OUTPUTS))} of a decoder's layers, in "
            "whole blocks (fp8: 128 x 128 weights; mxfp8: 32 inputs; NVFP4: 16 x 16)"
        )
    check_patterns(checkpoint, options, found, candidates, converted)
    # Siblings stay together: an engine that fuses them needs all of them in one format.
    taken = [
        names
        for names in candidates
        if all(options.takes(name.removesuffix(".weight")) for name in names)
    ]
    dense = list(taken) if options.linears else []
    rounded = [name for names in taken for name in names] if base else []
    dense += [(name,) for name in converted]
    if not groups and not dense:
        raise QuantizeError(
            "--include and --exclude leave nothing to quantize; linears that engines fuse (query, "
            "key and value; gate and up) are quantized only if all of them are included"
        )
    quantized = tensor_names_of(groups + eight_bit) | {name for names in dense for name in names}
    changed = quantized.union(rounded)
    left = {name.removesuffix(".weight") for name in _linear_weights(checkpoint) - changed}
    unquantized = [group.prefix for group in found if group not in groups + eight_bit]
    stays = left_as_is(checkpoint, asked)
    for prefix in (*unquantized, *stays):
        if not any(name.startswith(f"{prefix}.") for name in converted):
            left |= ignored_modules(prefix)
    prefixes = [group.prefix for group in groups]
    left |= absent_siblings(left, (name.removesuffix(".weight") for name in changed))
    left |= heads(checkpoint.tensors, (*prefixes, *(n for names in dense for n in names)))
    said, of_cache = with_kv_cache(checkpoint, options)
    decided, of_scales = with_activations(checkpoint, said, groups, dense)
    decided = with_weight_only(decided, prefixes, bool(dense))
    layout = LAYOUTS[decided.layout]
    layout = layout if decided.activations else layout.weights_only
    jobs = jobs_of(checkpoint, groups, dense, rounded, gates, layout, decided, eight_bit)
    shards = into_shards(jobs, decided.max_shard_size)
    check_unique(shards)
    notes = (
        *leftover,
        *of_cache,
        *of_scales,
        *of_mxfp4(checkpoint, decided),
        *other_parts(checkpoint, stays),
        *bare_fp8(checkpoint),
    )
    made = Plan(
        decided,
        found,
        groups,
        dense,
        rounded,
        gates,
        layout,
        sorted(left),
        shards,
        notes,
        eight_bit,
    )
    if not made.quantizes and decided.scales != Options.scales:
        raise QuantizeError(
            f"--scales {decided.scales}: {checkpoint.folder} is NVFP4 already, and its scales are "
            "kept; leave --scales out"
        )
    return made


def _gates(checkpoint: Checkpoint, options: Options, found: list[ExpertGroup]) -> Gates:
    """The gates that the user states, or those of the model's class.

    Raises:
        QuantizeError: also if the user states another order of gate and up in the rows of a joined
            ``gate_up_proj`` than the class has, since each order can be read as the other.
    """
    others = any(other_part(group.prefix, checkpoint.config) for group in found)
    if options.gate is None:
        return identify(checkpoint.folder, options.trust_remote_code, others)
    joined = [g.prefix for g in found if g.joined and g.interleaved is None]
    if joined:
        try:
            truth = identify(checkpoint.folder, options.trust_remote_code, others)
        except QuantizeError:
            return Gates.uniform(options.gate)
        for prefix in joined:
            if truth.of(prefix).interleaved != options.gate.interleaved:
                raise QuantizeError(
                    f"--gate {options.gate}: the rows of {prefix}.gate_up_proj "
                    f"{'alternate' if truth.of(prefix).interleaved else 'do not alternate'} "
                    f"between gate and up in the model's class, whose gate is {truth}; leave "
                    "--gate out, or state the same order (interleaved)"
                )
    return Gates.uniform(options.gate)


def _linear_weights(checkpoint: Checkpoint) -> set[str]:
    return {
        name
        for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) >= 2
    }
