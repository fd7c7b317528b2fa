"""What this host's processor can do, and what tells a C++ compiler to use it."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Instructions:
    """A set of vector instructions.

    Attributes:
        name: for users.
        flags: the names in ``/proc/cpuinfo`` of all that is used.
    """

    name: str
    flags: frozenset[str]

    @property
    def options(self) -> tuple[str, ...]:
        """What has the compiler use them."""
        return tuple(
            f"-m{flag.replace('_', '-' if flag.startswith('amx') else '')}"
            for flag in sorted(self.flags)
        )

    @property
    def here(self) -> bool:
        """Whether this host has them."""
        return self.flags <= flags()


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

AVX2 = Instructions("AVX2", _AVX2)
AVX512 = Instructions("AVX-512", _AVX512)
AVX512_BF16 = Instructions("AVX-512 with BF16", _AVX512 | {"avx512_bf16"})
AMX = Instructions("AMX", AVX512_BF16.flags | {"amx_tile", "amx_bf16"})


@cache
def flags() -> frozenset[str]:
    """What this host's processor has, in Linux's names; empty if it is no x86, or nothing says so:
    then numba compiles what C++ would."""
    if platform.machine() in ("x86_64", "AMD64"):
        with suppress(OSError):
            for line in CPUINFO.read_text().splitlines():
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    return frozenset()
