"""Which version of this package runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGE = "vllm-nvfp4-moe"
VERSIONS = ("torch", "transformers", "safetensors")
"""What decides beside this package what a run computes."""


def package_version() -> str:
    """This package's version."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"
