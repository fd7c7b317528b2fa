"""The arguments and options that commands share, and how what a user writes for them is read.

Values are judged here without PyTorch as far as that is possible, so that a mistake is answered
at once.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli.errors import UsageError
from quantize.errors import QuantizeError
from quantize.experts.gates import Gate
from quantize.layouts import LAYOUTS
from quantize.layouts.base import BASES
from quantize.nvfp4.input_scales import INPUT_RULES
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.scales import RULES
from quantize.run.bits import check_bits

if TYPE_CHECKING:
    import torch

# Choices come from the registries, which know names without importing what they name; mypy can
# only follow enums that are written out.
LayoutName = StrEnum("LayoutName", dict(zip(LAYOUTS, LAYOUTS, strict=True)))  # type: ignore[misc]
RuleName = StrEnum("RuleName", dict(zip(RULES, RULES, strict=True)))  # type: ignore[misc]
InputScaleName = StrEnum("InputScaleName", dict(zip(INPUT_RULES, INPUT_RULES, strict=True)))  # type: ignore[misc]
MethodName = StrEnum("MethodName", dict(zip(METHODS, METHODS, strict=True)))  # type: ignore[misc]

KEEP = "keep"
"""What ``--base`` says of linears that stay."""

BaseName = StrEnum("BaseName", {name: name for name in (KEEP, *BASES)})  # type: ignore[misc]


class KvCache(StrEnum):
    """How engines are asked to keep keys and values."""

    AUTO = "auto"
    FP8 = "fp8"


class Activations(StrEnum):
    """What a checkpoint says of activations at its quantized weights."""

    BF16 = "bf16"
    NVFP4 = "nvfp4"


class Rounded(StrEnum):
    """How kernels round what goes into quantized experts."""

    NVFP4 = "nvfp4"
    FP8 = "fp8"
    BF16 = "bf16"


MODELOPT, MSE, DESCENT = LayoutName("modelopt"), RuleName("mse"), MethodName("descent")
KEPT, LARGEST = BaseName(KEEP), InputScaleName("max")

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder or hub id of the original checkpoint.")
]
Target = Annotated[Path, typer.Argument(metavar="DST", help="Folder for the quantized checkpoint.")]
GateOption = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="GATE",
        help="The experts' gate, for models that Transformers does not know, by name or as JSON "
        '(with "interleaved": true if rows of gate and up alternate), '
        "e.g. --gate silu, --gate gelu_tanh or --gate "
        '\'{"form": "swiglu_oai", "alpha": 1.702, "beta": 1, "limit": 7}\'.',
    ),
]
LayoutOption = Annotated[
    LayoutName,
    typer.Option(
        "--layout", help="How tensors are named on disk, e.g. --layout compressed-tensors."
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run SRC's own Python code to identify its gate; without this flag, nothing from a "
        "checkpoint is ever run. Needed for models that Transformers does not have, e.g. "
        "inspect org/brand-new-moe --trust-remote-code.",
    ),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        help="Quantize only modules whose path matches, e.g. --include '*.layers.1?.*'; can be "
        "given several times. Linears that engines fuse are taken only together.",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        help="Leave modules whose path matches as they are, e.g. --exclude '*.layers.3.*'.",
    ),
]
LinearsOption = Annotated[
    bool,
    typer.Option(
        "--all-linears/--experts-only",
        help="Quantize attention and dense linears of the decoder too, e.g. --all-linears "
        "--exclude '*.self_attn.*'.",
    ),
]
BaseOption = Annotated[
    BaseName,
    typer.Option(
        "--base",
        help="What becomes of attention, shared experts and dense linears of the decoder beside "
        "NVFP4 experts: keep; fp8, with a scale for 128 x 128 weights; or mxfp8, as NVIDIA "
        "publishes MiniMax-M3; e.g. --base mxfp8.",
    ),
]
BitsOption = Annotated[
    float | None,
    typer.Option(
        "--bits",
        metavar="BITS",
        help="Bits that a weight of the experts may take on average, scales included, e.g. --bits "
        "4.75 --calibrate texts.jsonl: layers that lose most in NVFP4 (4.5 bits), measured with "
        "the text, become FP8 (8), MXFP8 (8.25) or stay bf16 (16).",
    ),
]
KvCacheOption = Annotated[
    KvCache | None,
    typer.Option(
        "--kv-cache",
        help="fp8: config.json asks engines to keep keys and values in FP8, e.g. --kv-cache fp8. "
        "auto: as they like. Default: as SRC says.",
    ),
]
InputScaleOption = Annotated[
    InputScaleName,
    typer.Option(
        "--input-scale-rule",
        help="How input scales follow from the text, e.g. --input-scale-rule headroom: ModelOpt's "
        "nvfp4_act_headroom, with more room for inputs larger than the text's.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of tables, e.g. --json > result.json.")
]
WeightOnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weight-only",
        metavar="PATTERN|N",
        help="Of experts whose path matches, what goes into them stays bf16, though that of others "
        "is NVFP4 (--activations), e.g. --weight-only '*.layers.3.*'; can be given several times. "
        "A number: of so many layers, those that lose most otherwise, measured with the text.",
    ),
]
LogOption = Annotated[
    Path | None,
    typer.Option(
        "--log-file",
        metavar="FILE",
        help="Write everything that is said to FILE too, each line with its time, e.g. --log-file "
        "run.log; a log that is there is continued.",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="Print nothing but errors, and what was asked for, e.g. --quiet --log-file run.log.",
    ),
]


def parse_size(text: str) -> int:
    """Bytes in ``5GB``, ``500 MB``, ``2GiB`` or a plain number.

    Raises:
        QuantizeError: if ``text`` is none of these, or not positive.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise QuantizeError(f"{text!r} is not a size such as 5GB or 500MB") from None
    if size <= 0:
        raise QuantizeError(f"{text!r}: a shard must be larger than nothing")
    return size


def stated_base(base: BaseName, all_linears: bool) -> str | None:
    """The key of ``BASES`` that ``--base`` says; None: linears stay.

    Raises:
        UsageError: if ``--all-linears`` puts them in NVFP4.
    """
    if base is KEPT:
        return None
    if all_linears:
        raise UsageError(
            f"--base {base.value} and --all-linears (NVFP4) are for the same linears; leave one out"
        )
    return str(base.value)


def stated_weight_only(words: list[str] | None, text: bool) -> tuple[tuple[str, ...], int | None]:
    """What ``--weight-only`` says: patterns, or a number of layers.

    Args:
        text: there is one, with which losses can be measured.

    Raises:
        UsageError: if it says both, or a number without a text.
    """
    numbers = [word for word in words or () if word.isdecimal()]
    if not numbers:
        return tuple(words or ()), None
    if len(words or ()) > 1:
        raise UsageError("--weight-only takes patterns, or one number of layers, and not both")
    if not text:
        raise UsageError(f"--weight-only {numbers[0]} needs --calibrate or --input-scales")
    if int(numbers[0]) == 0:
        raise UsageError("--weight-only 0 says nothing; leave it out")
    return (), int(numbers[0])


def stated_bits(bits: float | None) -> float | None:
    """What ``--bits`` says.

    Raises:
        UsageError: if nothing fits, or everything does.
    """
    if bits is not None:
        try:
            check_bits(bits)
        except QuantizeError as error:
            raise UsageError(str(error)) from None
    return bits


def shard_size(text: str) -> int:
    """Bytes that ``--max-shard-size`` says.

    Raises:
        UsageError: if ``text`` is not a size.
    """
    try:
        return parse_size(text)
    except QuantizeError as error:
        raise UsageError(f"--max-shard-size {error}") from None


def stated_gate(text: str | None) -> Gate | None:
    """The gate that ``--gate`` says: a form's name, or JSON with a form and its numbers.

    Raises:
        UsageError: if ``text`` is neither, or no gate has these numbers.
    """
    if text is None:
        return None
    try:
        fields = json.loads(text) if text.lstrip().startswith("{") else {"form": text}
        return Gate(**fields)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"--gate {text!r} is neither a form's name nor its JSON: {error}"
        ) from None
    except QuantizeError as error:
        raise UsageError(f"--gate: {error}") from None


_DEVICE = re.compile(r"(cpu|cuda)(?::(0|[1-9][0-9]{0,3}))?")


def check_device(name: str) -> None:
    """Refuse what can be no device, before it is known which devices there are.

    Raises:
        UsageError: if ``name`` is neither cpu, nor cuda with or without a number.
    """
    if not _DEVICE.fullmatch(name):
        raise UsageError(f"--device {name!r} is neither cpu, nor cuda, nor cuda:0 or the like")


def device_of(name: str) -> torch.device:
    """The device that ``name``, which :func:`check_device` accepts, is on this machine.

    Raises:
        QuantizeError: if this machine does not have it.
    """
    import torch

    match = _DEVICE.fullmatch(name)
    assert match is not None
    if match[1] == "cpu":
        return torch.device("cpu")
    index = int(match[2] or 0)
    if index >= torch.cuda.device_count():
        raise QuantizeError(
            f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs"
        )
    return torch.device("cuda", index)
