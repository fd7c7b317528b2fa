"""Every option of the plugin, in one place. Nothing else in this package reads the environment.

All but the last two are also taken from vLLM's ``--additional-config``, under ``nvfp4_moe``, in
lower case and without their common beginning: ``{"nvfp4_moe": {"hopper": false}}``. That reaches
each worker, on any machine, and vLLM's hash of its config. It wins over a variable.

===========================  ======================================================================
variable                     meaning
===========================  ======================================================================
``NVFP4_MOE_SELF_CHECK``     ``0`` turns off the check that each kind of layer gets at load.
``NVFP4_MOE_HOPPER``         ``0`` leaves Hopper GPUs to vLLM's own kernels.
``NVFP4_MOE_CPP``            ``0`` has numba compile the CPU's kernel, not the C++ compiler.
``NVFP4_MOE_ACTIVATIONS``    ``bf16`` (the default) or ``fp8``: what our Hopper kernel multiplies.
                             ``bf16``, if it is said: so do all kernels, whatever the checkpoint
                             says. ``nvfp4``: experts that are quantized while they load have input
                             scales of 1.0, for kernels with 4-bit activations.
``NVFP4_MOE_CACHE``          The folder of compiled kernels, by default ``nvfp4_moe`` in vLLM's
                             (``VLLM_CACHE_ROOT``).
``NVFP4_MOE_SELECT``         ``measured``: of the kernels that are right on this machine, the
                             fastest by the table that ``nvfp4-moe doctor`` has saved of it.
``NVFP4_MOE_ANY_VLLM``       ``1`` tries a vLLM of a version that this package does not know.
``NVFP4_MOE_RUN``            Not for users: the folder of one server, which its first process makes
                             and sets for those that it starts (:mod:`vllm_nvfp4_moe.metrics`).
===========================  ======================================================================

Beside them, the plugin respects two variables of vLLM by which users have the activations of vLLM's
own kernels quantized, says when FlashInfer's for four over six is set, and looks at CUDA's two that
say where its compiler is and at ``CXX``, the C++ compiler.

Options are read when a function here is called, not when this is imported. An empty variable counts
as one that is not set. This module imports nothing heavy: vLLM loads it in each of its processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "nvfp4_moe"
"""What users give to ``--quantization``."""

SELF_CHECK = "NVFP4_MOE_SELF_CHECK"
HOPPER = "NVFP4_MOE_HOPPER"
CPP = "NVFP4_MOE_CPP"
ACTIVATIONS = "NVFP4_MOE_ACTIVATIONS"
SELECT = "NVFP4_MOE_SELECT"
CACHE = "NVFP4_MOE_CACHE"
ANY_VLLM = "NVFP4_MOE_ANY_VLLM"
RUN = "NVFP4_MOE_RUN"

OPTIONS: dict[str, type] = {
    SELF_CHECK: bool,
    HOPPER: bool,
    CPP: bool,
    ACTIVATIONS: str,
    CACHE: str,
    SELECT: str,
}
"""What ``--additional-config`` may say too, and of what type it is there."""

BF16 = "bf16"
NVFP4 = "nvfp4"
"""Values of ``NVFP4_MOE_ACTIVATIONS``."""

MEASURED = "measured"
"""The value of ``NVFP4_MOE_SELECT``."""

HUMMING_INPUT = "VLLM_HUMMING_INPUT_QUANT_CONFIG"
"""vLLM's: how Humming quantizes activations."""
MARLIN_INPUT = "VLLM_MARLIN_INPUT_DTYPE"
"""vLLM's: the type to which Marlin quantizes activations."""
FOUR_OVER_SIX = "FLASHINFER_NVFP4_4OVER6"
"""FlashInfer's: the largest value of a block of activations becomes 6 or 4, whichever is better."""


logger = logging.getLogger("vllm.nvfp4_moe.settings")

_configured: dict[str, str] = {}
"""What ``--additional-config`` says, as the variables would."""


def use(additional_config: Any) -> None:
    """Have options of vLLM's ``additional_config`` count in this process, before those of the
    environment, and look whether both are possible.

    Raises:
        ValueError: if there is no such option, or a value is none that it may have.
    """
    for name, kind in OPTIONS.items():
        if kind is bool and os.environ.get(name, "") not in ("", "0", "1"):
            raise ValueError(f"{name}={os.environ[name]} in the environment: must be 0 or 1")
    said = additional_config.get(NAME, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(said, dict):
        raise ValueError(f"--additional-config: nvfp4_moe must be options by name, not {said!r}")
    names = {name.removeprefix(f"{NAME.upper()}_").lower(): name for name in OPTIONS}
    new: dict[str, str] = {}
    for key, value in said.items():
        if key not in names:
            known = ", ".join(names)
            raise ValueError(
                f"--additional-config: nvfp4_moe has no option {key!r}; there are {known}"
            )
        kind = OPTIONS[names[key]]
        if not isinstance(value, kind):
            wanted = "true or false" if kind is bool else "text"
            raise ValueError(
                f"--additional-config: nvfp4_moe.{key} must be {wanted}, not {value!r}"
            )
        new[names[key]] = str(int(value)) if isinstance(value, bool) else str(value)
    if new == _configured:
        return
    from quantize.native import environment  # whatever reads CPP and CACHE is there

    for place in (_configured, environment.configured):
        place.clear()
        place.update(new)
    for name, text in new.items():
        if os.environ.get(name, text) not in ("", text):
            logger.warning(
                "%s=%s in the environment does not count: --additional-config says %s",
                name, os.environ[name], text,
            )  # fmt: skip


def _said(name: str) -> str | None:
    """What the user says of an option; None for nothing."""
    return _configured.get(name) or os.environ.get(name) or None


def self_check() -> bool:
    """Whether layers are checked at load (``NVFP4_MOE_SELF_CHECK``)."""
    return _said(SELF_CHECK) != "0"


def hopper() -> bool:
    """Whether our kernel may be chosen on a Hopper GPU (``NVFP4_MOE_HOPPER``)."""
    return _said(HOPPER) != "0"


def hopper_activations() -> str:
    """The type of the activations that our Hopper kernel multiplies (``NVFP4_MOE_ACTIVATIONS``).

    Whoever has the kernels checks that there is one of that name.
    """
    asked = _said(ACTIVATIONS) or BF16
    return BF16 if asked == NVFP4 else asked


def activations_stay() -> bool:
    """Whether the user has said that activations stay as they are on any kernel, also where the
    checkpoint has input scales (``NVFP4_MOE_ACTIVATIONS``)."""
    return _said(ACTIVATIONS) == BF16


def four_over_six() -> bool:
    """Whether the user has asked FlashInfer's kernels for it, as FlashInfer reads it."""
    return os.environ.get(FOUR_OVER_SIX) == "1"


def on_the_fly_activations() -> bool:
    """Whether activations are quantized too at experts that are quantized while they load
    (``NVFP4_MOE_ACTIVATIONS``)."""
    return _said(ACTIVATIONS) == NVFP4


def measured() -> bool:
    """Whether doctor's measurements are to choose the kernel (``NVFP4_MOE_SELECT``).

    Raises:
        ValueError: if the variable asks for anything else.
    """
    asked = _said(SELECT)
    if asked and asked != MEASURED:
        raise ValueError(f"{SELECT}={asked}: must be {MEASURED}, or not set")
    return bool(asked)


@contextmanager
def set_to(variables: Mapping[str, str]) -> Iterator[None]:
    """Within, the environment has these variables; for what builds layers of several kinds in one
    process."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def quiet() -> Iterator[None]:
    """Within, vLLM that is imported, here or in processes begun, says nothing below errors, unless
    the user has asked for more. Only within: who calls a command from a program of his own keeps
    his log."""
    name = "VLLM_LOGGING_LEVEL"
    with set_to({name: os.environ.get(name, "ERROR")}):
        yield


def any_vllm() -> bool:
    """Whether a vLLM of an unknown version is to be tried (``NVFP4_MOE_ANY_VLLM``)."""
    return os.environ.get(ANY_VLLM) == "1"


def run_folder() -> Path | None:
    """The folder in which the processes of this server leave what others show; None if there is
    none."""
    folder = os.environ.get(RUN)
    return Path(folder) if folder else None


def set_run_folder(folder: str) -> None:
    """Have this process, and all that it starts, use ``folder``."""
    os.environ[RUN] = folder


def humming_input() -> str | None:
    """What the user wants Humming to quantize activations to; None if that was not said."""
    return os.environ.get(HUMMING_INPUT) or None


def marlin_input() -> str | None:
    """What the user wants Marlin to quantize activations to; None if that was not said."""
    return os.environ.get(MARLIN_INPUT) or None
