"""Which version of this package runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """This package's version."""
    try:
        return version("vllm-nvfp4-moe")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"
