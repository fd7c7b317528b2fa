"""Do ``--include`` and ``--exclude`` match anything?"""

from __future__ import annotations

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
