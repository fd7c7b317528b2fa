"""What ``quantize`` says about a run before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.cli.output import err, plain

if TYPE_CHECKING:
    from quantize.run.plan import Plan


def say(line: str) -> None:
    """Print a line."""
    err.print(plain(line), highlight=False, soft_wrap=True)


def summary(steps: Plan) -> str:
    """What is quantized, in a line."""
    experts = sum(g.num_experts for g in steps.groups)
    linears = sum(map(len, steps.dense))
    also = f", {linears} dense linears" if linears else ""
    if steps.base:
        also = f", {len(steps.base)} linears in {steps.options.base}"
    bits = ", NVFP4 in SRC: bits are kept" if steps.converts else ""
    return (
        f"{len(steps.groups)} MoE layers, {experts} experts{also}{bits}, gate {plain(steps.gates)}"
    )


def say_activations(steps: Plan, found: bool, by_default: bool) -> None:
    """Say what may surprise about activations."""
    options = steps.options
    if not steps.quantizes:
        return
    if options.activations and not (found and not options.linears):
        of = "the dense linears" if found else "all that is quantized"
        advice = "" if found else "; --input-scales TEXT finds them in minutes"
        err.print(
            f"Warning: the input scales of {of} are 1.0. Kernels with 4-bit activations round "
            f"inputs below about 0.006 to zero then, and small ones badly{advice}.",
            highlight=False,
        )
    elif found and by_default and not options.activations:
        err.print(
            "Weights only: text finds the input scales of experts, not of --all-linears. "
            "With --activations nvfp4, those are 1.0.",
            highlight=False,
        )
