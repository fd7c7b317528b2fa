"""Do ``--include``, ``--exclude`` and ``--weight-only`` match anything?"""

from __future__ import annotations

from dataclasses import replace

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.run.options import Options, matches


def check_patterns(
    checkpoint: Checkpoint,
    options: Options,
    groups: list[ExpertGroup],
    candidates: list[tuple[str, ...]],
    converted: list[str],
) -> None:
    """A pattern that changes nothing is a mistake, unless it excludes what stays anyway."""
    prefixes = {group.prefix for group in groups}
    dense = {name.removesuffix(".weight") for names in candidates for name in names}
    others = checkpoint.tensors.keys() - tensor_names_of(groups)
    kept = {name.removesuffix(".weight") for name in converted}
    included = prefixes | kept | (dense if options.linears or options.base else set())
    what = {
        "--include": (options.include, included),
        "--exclude": (options.exclude, prefixes | {name.rpartition(".")[0] for name in others}),
    }
    for option, (patterns, modules) in what.items():
        for pattern in patterns:
            if any(matches(module, (pattern,)) for module in modules):
                continue
            if any(matches(module, (pattern,)) for module in dense):
                raise QuantizeError(
                    f"{option} {pattern!r} matches only linears, and these are quantized only with "
                    "--all-linears or --base"
                )
            raise QuantizeError(
                f"{option} {pattern!r} matches nothing; patterns are compared with module paths "
                f"such as {groups[0].prefix}"
            )


def with_weight_only(options: Options, nvfp4: list[str], others: bool) -> Options:
    """``--weight-only`` must name experts, and leave others. If ``--bits`` has left none, all stay
    as they are.

    Args:
        options: decided, but for that.
        nvfp4: module paths of the experts in NVFP4.
        others: linears are in NVFP4 too.

    Raises:
        QuantizeError: if it does not.
    """
    if not options.weight_only:
        return options
    if not options.activations:
        raise QuantizeError(
            "--weight-only: no activations are quantized here, so those of all experts stay as "
            "they are; leave it out, or add --input-scales TEXT"
        )
    example = nvfp4[0] if nvfp4 else "model.layers.3.mlp.experts"
    experts = nvfp4 + [prefix for prefix, _ in options.formats]
    for pattern in options.weight_only:
        if not any(matches(module, (pattern,)) for module in experts):
            raise QuantizeError(
                f"--weight-only {pattern!r} matches no experts in NVFP4; patterns are compared "
                f"with module paths such as {example}"
            )
    if others or not all(map(options.keeps_floats, nvfp4)):
        return options
    if options.formats:
        return replace(options, activations=False, weight_only=())
    raise QuantizeError(
        "--weight-only leaves no experts with activations in NVFP4; say --activations bf16"
    )
