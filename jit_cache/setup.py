"""Builds the wheel: runs ``vllm_nvfp4_moe.build``, and packs what it has made.

The plugin takes a library from here if its name is the hash that the plugin looks for, so sources
and options that have changed since are compiled as without this package. The wheel is for the
version of vllm-nvfp4-moe that has built it, and for hosts with a C library as new as the one that
the libraries ask for. ``KERNELS=--cuda`` or ``KERNELS=--cpu`` in the environment leaves out the
others.
"""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

PACKAGE = "vllm_nvfp4_moe_jit_cache"
THEIRS = version("vllm-nvfp4-moe")


class Binary(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # so that the wheel is for one platform


class Build(build_py):
    def run(self) -> None:
        from vllm_nvfp4_moe import build

        super().run()
        folder = Path(self.build_lib, PACKAGE)
        for old in folder.glob("*.so"):
            old.unlink()
        if build.main([*os.environ.get("KERNELS", "").split(), "--to", str(folder)]):
            raise SystemExit("not all kernels could be made")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        assert self.bdist_dir is not None
        libraries = Path(self.bdist_dir).rglob("*.so")
        needs = {
            int(n) for so in libraries for n in re.findall(rb"GLIBC_2\.(\d+)", so.read_bytes())
        }
        return "py3", "none", f"manylinux_2_{max(needs, default=17)}_{platform.machine()}"


setup(
    version=THEIRS,
    install_requires=[f"vllm-nvfp4-moe=={THEIRS}"],
    distclass=Binary,
    cmdclass={"build_py": Build, "bdist_wheel": Wheel},
)
